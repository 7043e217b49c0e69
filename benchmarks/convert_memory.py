"""Memory and speed of `maxlm convert`: published weights to a run and back.

    python benchmarks/convert_memory.py [--parameters 1e9] [--dtype BF16] [--folder DIR]

A random Llama is streamed to disk, converted to a run and back again, each in a process
of its own. MB (1e6) of resident memory: before converting, with all imported, and at
its peak; what lies between, over the largest tensor as it is stored. Needs 5 × the size
of the weights on the disk of DIR (in bf16; default: the system's folder for temporary
files), and Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from maxlm.huggingface.families.llama import LLAMA
from maxlm.huggingface.families.names import TensorEntry
from maxlm.huggingface.files import (
    NUMPY,
    SafetensorsWriter,
    list_stored_tensors,
    split_into_slabs,
)
from maxlm.models.architectures.transformer import DecoderConfig

LAYERS, HEAD = 16, 64


def llama(parameters: float) -> DecoderConfig:
    """Of about so many parameters: a wide one, whose tables are its largest tensors."""
    d = max(1, round((parameters / (128 + 14.5 * LAYERS)) ** 0.5 / 256)) * 256
    heads = {"num_heads": d // HEAD, "num_kv_heads": d // HEAD // 4, "head_dim": HEAD}
    return DecoderConfig.model_validate(
        {
            "vocab_size": 64 * d,
            "num_layers": LAYERS,
            "d_model": d,
            "max_seq_len": 4096,
            "attention": heads,
            "mlp": {"d_ff": 4 * d},
        }
    )


def make(folder: Path, entries: list[TensorEntry], dtype: str) -> None:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(folder, {e.theirs: (dtype, e.shape) for e in entries})
    for entry in entries:
        values = np.empty(entry.shape, NUMPY[dtype])
        for slab in split_into_slabs(values):
            slab[...] = random.standard_normal(slab.shape, np.float32) * 0.02
        writer.write(entry.theirs, values)


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def convert_one_way(source: str, target: str) -> None:
    """Prints [baseline, peak, seconds]."""
    import orbax.checkpoint  # noqa: F401 (restoring the run would load it too)
    import tensorstore  # noqa: F401

    from maxlm.run.convert import convert

    began = time.perf_counter()
    baseline = resident("VmRSS")
    convert(source, target)
    print(json.dumps([baseline, resident("VmHWM"), time.perf_counter() - began]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--dtype", default="BF16", choices=("BF16", "F16", "F32"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        convert_one_way(*args.child)
        return
    config = llama(args.parameters)
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        theirs, run, again = (
            str(Path(home) / name) for name in ("theirs", "run", "again")
        )
        make(Path(theirs), LLAMA.list_entries(config), args.dtype)
        (Path(theirs) / "config.json").write_text(
            json.dumps(LLAMA.write_config(config))
        )
        sizes = [stored.nbytes for stored in list_stored_tensors(theirs).values()]
        largest = max(sizes)
        total = sum(sizes)
        print(
            f"{total / NUMPY[args.dtype].itemsize / 1e6:.0f} M parameters in "
            f"{args.dtype}: "
            f"{total / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB"
        )
        for way, places in (("to a run", (theirs, run)), ("and back", (run, again))):
            command = [sys.executable, __file__, "--child", *places]
            out = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            baseline, peak, seconds = json.loads(out)
            print(
                f"{way}: {baseline / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at its "
                f"peak: "
                f"{(peak - baseline) / largest:.2f} × the largest tensor more; "
                f"{seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s",
                flush=True,
            )
        for file in sorted(Path(theirs).glob("*.safetensors")):
            same = (
                subprocess.run(["cmp", file, Path(again) / file.name]).returncode == 0
            )
            print(f"{file.name}: {'the same bytes' if same else 'DIFFERENT'} again")


if __name__ == "__main__":
    main()
