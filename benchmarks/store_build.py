"""Speed of the token store builder beside the tokenizer library's own batch encoding.

    python benchmarks/store_build.py [--megabytes 20] [--rounds 5] [--workers N]

Both get the same documents of the demo's text and the same byte-level BPE, on the same
cores, in alternation. The library's time is `encode_batch` alone, on texts already in
memory, by a tokenizer whose word cache is empty. Ours is the whole of `build_store`:
starting processes, hashing, reading, encoding, compressing and writing.
`encode_batch_fast` is the same without character offsets, which the builder uses. On a
machine that others use too, the ratio of CPU time (all threads and processes) says more
than that of wall time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maxlm.config.load import load_config
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import read_documents
from maxlm.data.store.build import build_store
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.run.config import RunConfig
from maxlm.runtime.pool import count_usable_cores

LIBRARY = ("encode_batch", "encode_batch_fast")


def sample_demo_text(folder: Path, size: int) -> list[str]:
    """Copy about `size` bytes of the demo's files, spread evenly, and return their
    texts."""
    documents = load_config(RunConfig, "demo").value.data.sources[0].documents
    source = SourceConfig(documents=documents)
    files = find_files(source).files
    step = max(sum(file.size for file in files) / size, 1.0)
    texts: list[str] = []
    seen = 0.0
    folder.mkdir()
    for file in files:
        seen += file.size
        if seen < step * sum(map(len, texts)):
            continue
        for document in read_documents(source, file):
            (folder / f"{len(texts):05d}.py").write_bytes(document.text)
            texts.append(document.text.decode())
    return texts


@dataclass(frozen=True)
class BuildSeconds:
    """Seconds of wall time, and of CPU time over all threads and finished child
    processes."""

    wall: float
    cpu: float


def cost(function: Callable[[], object]) -> BuildSeconds:
    start = time.perf_counter()
    before = sum(os.times()[:4])
    function()
    return BuildSeconds(time.perf_counter() - start, sum(os.times()[:4]) - before)


def measure(
    texts: list[str], root: Path, workers: int, rounds: int
) -> dict[str, list[BuildSeconds]]:
    """The cost of each contestant in each round."""
    from tokenizers import Tokenizer

    source = SourceConfig(documents=(str(root / "texts"),))
    costs: dict[str, list[BuildSeconds]] = {
        name: [] for name in (*LIBRARY, "build_store")
    }
    for turn in range(rounds):
        for name in LIBRARY:
            tokenizer = Tokenizer.from_file(str(root / "tokenizer" / "tokenizer.json"))
            encode = getattr(tokenizer, name)
            costs[name].append(cost(partial(encode, texts)))
        store = partial(build_store, source, root / "tokenizer", root / f"store{turn}")
        costs["build_store"].append(cost(partial(store, workers=workers)))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=count_usable_cores())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = sample_demo_text(root / "texts", int(arguments.megabytes * 1e6))
        config = TokenizerConfig(vocab_size=8192, sample_bytes=5_000_000)
        train_tokenizer(config, texts).save(root / "tokenizer")
        costs = measure(texts, root, arguments.workers, arguments.rounds)
    size = sum(len(text.encode()) for text in texts) / 1e6
    cores = count_usable_cores()
    print(
        f"{size:.1f} MB, {len(texts)} documents, {cores} cores, {arguments.workers} "
        f"workers"
    )
    for name, name_costs in costs.items():
        wall, cpu = (
            [getattr(one, kind) for one in name_costs] for kind in ("wall", "cpu")
        )
        rate = f"{size / statistics.median(wall):6.2f} MB/s ({size / max(wall):.2f} to"
        per_core = size / statistics.median(cpu)
        print(
            f"{name:18}{rate} {size / min(wall):.2f}), {per_core:.2f} MB per CPU second"
        )
    for name in LIBRARY:
        for kind in ("wall", "cpu"):
            pairs = zip(costs[name], costs["build_store"], strict=True)
            ratios = [
                getattr(theirs, kind) / getattr(ours, kind) for theirs, ours in pairs
            ]
            print(f"build_store / {name}, {kind}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
