"""How fast the loader alone makes batches.

    python benchmarks/loader.py [--tokens 100000000] [--seq-len 512 2048] [--seconds 4]

Builds a synthetic store in a temporary folder (document lengths like the standard library's
files, token frequencies by Zipf's law), then prints tokens/s for each packing and number of
workers. The default store is larger than the 64 MiB that a store caches. "direct" calls the
function that makes a batch, without Grain and without reading ahead.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from maxlm.data.loader import LoaderConfig, make_batches, make_loader
from maxlm.data.loader.best_fit import build_index
from maxlm.data.loader.packing import utilisation
from maxlm.data.loader.prefetch import WARM_UP_STEPS
from maxlm.data.store import Manifest, TokenStore
from maxlm.data.store.arrays import create_array, write_array
from maxlm.data.store.manifest import write_manifest

VOCABULARY = 8192
# Steps left out of a rate: threads' own, and those the workers made ahead while starting.
SETTLE_STEPS = WARM_UP_STEPS + 16


def main() -> None:
    parser = argparse.ArgumentParser(description="The loader's speed.")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), arguments.tokens)
        print(
            f"{store.num_tokens:,} tokens, {store.num_documents:,} documents, "
            f"{arguments.batch_tokens:,} tokens a batch, {os.cpu_count()} CPUs"
        )
        began = time.perf_counter()
        build_index(store.offsets, 2048, 16384)
        print(f"best_fit index: {store.num_documents / (time.perf_counter() - began):,.0f} docs/s")
        for seq_len in arguments.seq_len:
            for packing in ("concat", "best_fit"):
                config = LoaderConfig(
                    seq_len=seq_len,
                    batch_size=max(1, arguments.batch_tokens // seq_len),
                    packing=packing,
                )
                measure(store, config, arguments.workers, arguments.seconds)


def measure(store: TokenStore, config: LoaderConfig, workers: list[int], seconds: float) -> None:
    """Prints one packing's lines."""
    stores, weights = {"a": store}, {"a": 1.0}
    batches = make_batches(stores, weights, config, seed=0)
    full = utilisation(batches.sources[0].packing, store.num_tokens, config.seq_len)
    head = f"seq_len {config.seq_len:5}  {config.packing:9}"
    tokens = config.batch_size * config.seq_len
    steps = iter(range(1 << 30))
    direct = tokens * rate(lambda: batches.rows(next(steps)), seconds)
    print(f"{head} utilisation {full:.4f}  direct     {direct:12,.0f} tokens/s")
    for count in workers:
        began = time.perf_counter()
        made = config.model_copy(update={"workers": count})
        with make_loader(stores, weights, made, seed=0, start_step=0) as loader:
            next(loader)
            first = time.perf_counter() - began
            for _ in range(SETTLE_STEPS):
                next(loader)
            speed = tokens * rate(lambda: next(loader), seconds)
        print(
            f"{head}                     workers {count}  {speed:12,.0f} tokens/s"
            f"  first batch {first:.2f} s"
        )


def rate(function: Callable[[], object], seconds: float) -> float:
    """Calls a second."""
    began, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        function()
        calls += 1
    return calls / elapsed


def synthetic_store(folder: Path, num_tokens: int) -> TokenStore:
    """A real store of random documents, without the text and the tokenizer behind it."""
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
