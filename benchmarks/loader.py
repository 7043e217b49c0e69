"""How fast the loader alone makes batches of a mixture, beside Grain's own packers.

    python benchmarks/loader.py [--tokens 100000000] [--seq-len 512 2048] [--seconds 4]

Builds two synthetic stores in a temporary folder (document lengths like the standard
library's files, token frequencies by Zipf's law), mixes them 3 to 1 and prints tokens/s
for each packing and number of workers. The default stores are larger than the 64 MiB
that a store caches. "direct" calls the function that makes a batch, without Grain and
without reading ahead; "1 of 4 hosts" counts the tokens of that host. Grain's packers
get the same documents out of memory, mixed and shuffled by it, one thread; best fit
gets them cut to seq_len. Last comes what a resumed run waits for at step 10^9 of a
mixture of 10 trillion tokens in 10^10 documents, whose offsets are computed and not
stored.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import numpy as np

from maxlm.data.loader.batches import LoaderConfig, load_batches, make_batches
from maxlm.data.loader.mixture import Mixing, Phase
from maxlm.data.loader.packing import build_index
from maxlm.data.loader.prefetch import THREAD_STEPS
from maxlm.data.store.arrays import Offsets, create_array, write_array
from maxlm.data.store.manifest import Manifest, write_manifest
from maxlm.data.store.store import TokenStore

VOCABULARY = 8192
WEIGHTS = {"web": 3.0, "code": 1.0}
# Steps left out of a rate: threads' own, and those the workers made ahead while
# starting.
SETTLE_STEPS = THREAD_STEPS + 16


def main() -> None:
    parser = argparse.ArgumentParser(description="The loader's speed.")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"web": arguments.tokens * 3 // 4, "code": arguments.tokens // 4}
        stores = {
            n: synthetic_store(Path(folder, n), size) for n, size in sizes.items()
        }
        for name, store in stores.items():
            print(
                f"{name}: {store.num_tokens:,} tokens, {store.num_documents:,} "
                f"documents"
            )
        print(f"{arguments.batch_tokens:,} tokens a batch, {os.cpu_count()} CPUs")
        store = stores["web"]
        began = time.perf_counter()
        build_index(store.offsets, 2048, 16384)
        print(
            f"best_fit index: "
            f"{store.num_documents / (time.perf_counter() - began):,.0f} docs/s"
        )
        for seq_len in arguments.seq_len:
            for packing in ("concat", "best_fit"):
                config = LoaderConfig(
                    seq_len=seq_len,
                    batch_size=max(4, arguments.batch_tokens // seq_len),
                    packing=packing,
                )
                measure(stores, config, arguments.workers, arguments.seconds)
                measure_grain(stores, config, arguments.seconds)
    measure_resume()


def measure(
    stores: dict[str, TokenStore],
    config: LoaderConfig,
    workers: list[int],
    seconds: float,
) -> None:
    """Prints one packing's lines."""
    batches = make_batches(stores, WEIGHTS, config, seed=0)
    full = min(
        s.store.num_tokens / (s.num_sequences * config.seq_len) for s in batches.sources
    )
    head = f"seq_len {config.seq_len:5}  {config.packing:9}"
    tokens = config.batch_size * config.seq_len
    for hosts in (1, 4):
        rows = range(config.batch_size // hosts)
        steps = iter(range(1 << 30))
        speed = len(rows) * config.seq_len
        speed *= rate(
            lambda steps=steps, rows=rows: batches.rows(next(steps), rows), seconds
        )
        name = (
            f"direct, 1 of {hosts} hosts"
            if hosts > 1
            else f"direct, utilisation {full:.4f}"
        )
        print(f"{head} {name:28} {speed:12,.0f} tokens/s")
    for count in workers:
        began = time.perf_counter()
        with load_batches(batches, range(config.batch_size), workers=count) as loader:
            next(loader)
            first = time.perf_counter() - began
            for _ in range(SETTLE_STEPS):
                next(loader)
            speed = tokens * rate(lambda: next(loader), seconds)
        name = f"workers {count}, first batch {first:.2f} s"
        print(f"{head} {name:28} {speed:12,.0f} tokens/s")


def measure_grain(
    stores: dict[str, TokenStore], config: LoaderConfig, seconds: float
) -> None:
    """Prints the line of Grain's packer of the same kind."""
    length = {"tokens": config.seq_len}
    packing = config.packing
    datasets = []
    for store in stores.values():
        tokens = store.read(0, store.num_tokens).astype(np.int32)
        starts = store.offsets
        if packing == "best_fit":
            starts = np.union1d(
                starts,
                np.concatenate(
                    [
                        np.arange(a, b, config.seq_len)
                        for a, b in itertools.pairwise(starts)
                    ]
                ),
            )
        documents = np.split(tokens, starts[1:-1])
        datasets.append(grain.MapDataset.source(documents).shuffle(0).repeat())
    mixed = grain.MapDataset.mix(datasets, list(WEIGHTS.values()))
    documents = mixed.map(lambda tokens: {"tokens": tokens}).to_iter_dataset(
        grain.ReadOptions(num_threads=1)
    )
    packed = (
        grain.experimental.ConcatThenSplitIterDataset(documents, length_struct=length)
        if packing == "concat"
        else grain.experimental.BestFitPackIterDataset(
            documents, length_struct=length, num_packing_bins=config.batch_size
        )
    )
    iterator = iter(packed.batch(config.batch_size))
    filled = places = 0

    def take() -> None:
        nonlocal filled, places
        segments = next(iterator)["tokens_segment_ids"]
        filled, places = filled + np.count_nonzero(segments), places + segments.size

    for _ in range(8):
        take()
    filled = places = 0
    began = time.perf_counter()
    rate(take, seconds)
    speed, full = filled / (time.perf_counter() - began), filled / places
    head = f"seq_len {config.seq_len:5}  {packing:9}"
    print(f"{head} {f'Grain, utilisation {full:.4f}':28} {speed:12,.0f} tokens/s")


class ZeroTokenStore:
    """Documents of 500 to 1,500 tokens, all zeros, whose offsets are computed."""

    path, offsets_sha256 = None, ""

    def __init__(self, num_documents: int):
        self.num_tokens = int(_starts(np.array([num_documents]))[0])
        self.offsets = Offsets(_starts, num_documents + 1)

    def read_many(
        self, starts: Sequence[int], stops: Sequence[int]
    ) -> list[np.ndarray]:
        return [np.zeros(b - a, np.uint16) for a, b in zip(starts, stops, strict=True)]


def _starts(index: np.ndarray) -> np.ndarray:
    return 1000 * index + (index * 2654435761 % 500) * (index > 0)


def measure_resume() -> None:
    """Prints how long the first batch of a resumed run takes, and the rate from there
    on."""
    stores = {name: ZeroTokenStore(5 * 10**9) for name in WEIGHTS}
    config = LoaderConfig(seq_len=2048, batch_size=64)
    mixing = Mixing(
        WEIGHTS, max_epochs={"code": 1}, phases=(Phase(from_step=9, weights=WEIGHTS),)
    )
    began = time.perf_counter()
    batches = make_batches(stores, mixing, config, seed=0)
    batches.rows(10**9)
    first = time.perf_counter() - began
    steps = iter(range(10**9, 1 << 60))
    speed = 64 * 2048 * rate(lambda: batches.rows(next(steps)), 3.0)
    total = sum(store.num_tokens for store in stores.values())
    print(
        f"{total:,} tokens: first batch at step 10^9 after {first:.3f} s, {speed:,.0f} "
        f"tokens/s"
    )


def rate(function: Callable[[], object], seconds: float) -> float:
    """Calls a second."""
    began = time.perf_counter()
    calls = 0
    elapsed = 0.0
    while elapsed < seconds:
        function()
        calls += 1
        elapsed = time.perf_counter() - began
    return calls / elapsed


def synthetic_store(folder: Path, num_tokens: int) -> TokenStore:
    """A real store of random documents, without the text and the tokenizer behind
    it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lengths = random.lognormal(7.0, 1.4, num_tokens // 1000).astype(np.int64) + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets = offsets[: np.searchsorted(offsets, num_tokens) + 1]
    ranks = random.zipf(1.2, int(offsets[-1])) % VOCABULARY
    for name, values in (("tokens", ranks.astype(np.uint16)), ("offsets", offsets)):
        array = create_array(folder, name, values.size, values.dtype.name)
        write_array(array, 0, values, folder)
    manifest = Manifest(
        format_version=1,
        tokenizer_fingerprint="",
        vocab_size=VOCABULARY,
        bos_id=0,
        eos_id=1,
        dtype="uint16",
        num_tokens=int(offsets[-1]),
        num_documents=offsets.size - 1,
        text_bytes=0,
        split="all",
        heldout_fraction=0.0,
        text_field="text",
        on_bad_bytes="error",
        num_binary_files=0,
        sources=(),
    )
    write_manifest(folder, manifest)
    return TokenStore.open(folder)


if __name__ == "__main__":
    main()
