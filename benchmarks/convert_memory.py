"""Memory and speed of converting published weights to a checkpoint and back.

    python benchmarks/convert_memory.py [--parameters 1e9] [--dtype BF16] [--folder DIR]

Random weights in the shape of a Llama are streamed to disk, imported and exported again, each in a
process of its own. MB (1e6) of resident memory: before converting, with all imported, and at its
peak; what lies between, over the largest tensor as it is stored. Needs 5 × the size of the weights
on the disk of DIR (in bf16; default: the system's folder for temporary files), and Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxlm.huggingface.dtypes import NUMPY, Dtypes, slabs
from maxlm.huggingface.files import stored_tensors
from maxlm.huggingface.writer import SafetensorsWriter
from maxlm.models.families.entries import Entry, Place

LAYERS = 16


class Declared(NamedTuple):
    """All that importing asks of a ``ParamSpec``."""

    shape: tuple[int, ...]


def transposed(theirs: str, shape: tuple[int, int], name: str, *index: int) -> Entry:
    """A linear map, which they store as [out, in] and we as [in, out]."""
    place = (Place(name, index),)
    return Entry(theirs, shape, place, lambda x: (x.T,), lambda parts: parts[0].T)


def llama(parameters: float) -> tuple[list[Entry], dict[str, tuple[int, ...]]]:
    """A table of names and the shapes of our parameters, for about so many of them."""
    d = max(1, round((parameters / (128 + 14.5 * LAYERS)) ** 0.5 / 64)) * 64
    vocab, ff, kv = 64 * d, 4 * d, d // 4
    entries = [
        Entry("model.embed_tokens.weight", (vocab, d), (Place("embedding.table"),)),
        transposed("lm_head.weight", (vocab, d), "head.kernel"),
        Entry("model.norm.weight", (d,), (Place("final_norm.scale"),)),
    ]
    linear = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    for i in range(LAYERS):
        entries += [
            transposed(f"model.layers.{i}.{name}.weight", shape, f"layers.{name}", i)
            for name, shape in linear.items()
        ]
        entries += [
            Entry(f"model.layers.{i}.{name}.weight", (d,), (Place(f"layers.{name}", (i,)),))
            for name in norms
        ]
    shapes = {f"layers.{name}": (LAYERS, *shape[::-1]) for name, shape in linear.items()}
    shapes |= {f"layers.{name}": (LAYERS, d) for name in norms}
    shapes |= {"embedding.table": (vocab, d), "head.kernel": (d, vocab), "final_norm.scale": (d,)}
    return entries, shapes


def make(folder: Path, entries: list[Entry], dtype: str) -> None:
    random = np.random.default_rng(0)
    with SafetensorsWriter(folder, {e.theirs: (dtype, e.shape) for e in entries}) as writer:
        for entry in entries:
            values = np.empty(entry.shape, NUMPY[dtype])
            for slab in slabs(values):
                slab[...] = random.standard_normal(slab.shape, np.float32) * 0.02
            writer.write(entry.theirs, values)
        writer.commit()


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def convert(way: str, home: Path, parameters: float, dtype: str) -> None:
    """One direction; prints [baseline, peak, seconds]."""
    import orbax.checkpoint  # noqa: F401 (the command that converts has loaded it)
    import tensorstore  # noqa: F401

    from maxlm.huggingface.checkpoint import CheckpointReader, CheckpointWriter
    from maxlm.huggingface.convert import export_tensors, import_tensors

    entries, shapes = llama(parameters)
    began, baseline = time.perf_counter(), resident("VmRSS")
    if way == "import":
        specs = {name: Declared(shape) for name, shape in shapes.items()}
        with CheckpointWriter(home / "checkpoints") as writer:
            import_tensors(home / "theirs", entries, specs, writer)
            writer.commit({})
    else:
        reader = CheckpointReader(home / "checkpoints")
        export_tensors(reader, entries, Dtypes(default=dtype), home / "again")
    print(json.dumps([baseline, resident("VmHWM"), time.perf_counter() - began]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--dtype", default="BF16", choices=("BF16", "F16", "F32"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, home = args.child
        convert(way, Path(home), args.parameters, args.dtype)
        return
    entries, _ = llama(args.parameters)
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        theirs = Path(home) / "theirs"
        make(theirs, entries, args.dtype)
        sizes = [stored.nbytes for stored in stored_tensors(theirs).values()]
        largest, total = max(sizes), sum(sizes)
        print(
            f"{total / NUMPY[args.dtype].itemsize / 1e6:.0f} M parameters in {args.dtype}: "
            f"{total / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB"
        )
        for way in ("import", "export"):
            command = [sys.executable, __file__, "--parameters", str(args.parameters)]
            command += ["--dtype", args.dtype, "--child", way, home]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            baseline, peak, seconds = json.loads(out)
            print(
                f"{way}: {baseline / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at its peak: "
                f"{(peak - baseline) / largest:.2f} × the largest tensor more; "
                f"{seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s",
                flush=True,
            )
        for file in sorted(theirs.iterdir()):
            same = subprocess.run(["cmp", file, Path(home) / "again" / file.name]).returncode == 0
            print(f"{file.name}: {'the same bytes' if same else 'DIFFERENT'} again")


if __name__ == "__main__":
    main()
