"""Substring deduplication: speed end to end, linearity, memory, and suffix arrays
beside it.

    python benchmarks/corpus_substring.py FOLDER... [--memory 32] [--min-tokens 50]

The folders hold HTML or text (.gz too), for example of Debian's documentation packages:

    apt-get download python3.13-doc anarchism linux-doc-6.12
    for each in *.deb; do dpkg -x $each docs; done

Texts are taken from HTML by deleting tags, shuffled, and written as corpora of a 16th,
a quarter and all of them, in shards of 4 MB. Each runs in a process of its own, with
one worker, from Parquet to labels; times are the process's CPU seconds and wall, and
memory its peak over what it holds after a first small run, which loads compiled code
(Linux only; allocators are told to give back what is freed, or they hoard some 100 MB
whatever the setting). Needs `pip install pydivsufsort`, whose suffix sort and common
prefixes are timed on the smallest corpus, beside the sort of hashes that stands for
them here: in memory, and no more than finding equal windows.
"""

import argparse
import gzip
import html
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.corpus.shards import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    StageShardView,
    open_shard_writer,
)
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.substring import SubstringStage, find_words, hash_windows
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import ignore_progress

_HIDDEN = re.compile(r"(?s)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>")
_SHARD_BYTES = 4 << 20


def read_texts(folders: Sequence[Path]) -> list[str]:
    """The texts below some folders, in a fixed random order."""
    texts = []
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        name = path.name.removesuffix(".gz")
        if (
            not path.is_file()
            or path.is_symlink()
            or not name.endswith((".html", ".txt", ".rst"))
        ):
            continue
        data = (
            gzip.decompress(path.read_bytes())
            if path.suffix == ".gz"
            else path.read_bytes()
        )
        text = data.decode("utf-8", "replace")
        texts.append(
            html.unescape(_HIDDEN.sub("", text)) if name.endswith(".html") else text
        )
    random.Random(0).shuffle(texts)
    return texts


def write_corpus(folder: Path, texts: Sequence[str]) -> list[StageShardView]:
    """Shards of about `_SHARD_BYTES`, of row groups of 64 documents."""
    shards = []
    for part in _parts(texts):
        shards.append(StageShardView(folder, f"{len(shards):05d}"))
        with open_shard_writer(shards[-1].path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
            for first in range(0, len(part), 64):
                rows = [
                    {"id": str(i), "text": t}
                    for i, t in enumerate(part[first : first + 64])
                ]
                writer.write_row_group(
                    pa.RecordBatch.from_pylist(rows, schema=DOCUMENT_SCHEMA)
                )
    return shards


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    part = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= _SHARD_BYTES:
            yield part
            part = []
            size = 0
    if part:
        yield part


def run(stage: SubstringStage, shards: Sequence[StageShardView], scratch: Path) -> None:
    """The stage, as the runner would call it."""
    scratch.mkdir()
    views = [replace(shard, output_stage=stage.unique_name) for shard in shards]
    with WorkerPool(1) as pool:
        stage.label(views, scratch, JobRunner(stage.unique_name, pool, ignore_progress))


def measure(stage, small, shards, scratch, connection) -> None:
    """Send CPU seconds, wall seconds and peak memory in MB of one run."""
    run(stage, small, scratch / "small")
    Path("/proc/self/clear_refs").write_text("5")  # The peak becomes what is held now.
    before = memory("VmRSS")
    cpu = time.process_time()
    wall = time.perf_counter()
    run(stage, shards, scratch / "all")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    connection.send((cpu, wall, memory("VmHWM") - before))


def memory(name: str) -> float:
    """A figure of this process's memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def cut_share(stage: SubstringStage, shards: Sequence[StageShardView]) -> float:
    """The share of all characters that are cut."""
    lost = total = 0
    for shard in shards:
        for rows in shard.read_selected_rows(
            ("text", f"{stage.unique_name}.cut_share")
        ):
            sizes = np.array([len(text) for text in rows.batch.column(0).to_pylist()])
            total += sizes.sum()
            lost += (sizes * rows.batch.column(1).to_numpy()).sum()
    return lost / total


def sorting_seconds(texts: Sequence[str], size: int) -> dict[str, float]:
    """CPU seconds of finding equal windows of `size` words in memory: by sorting all
    suffixes, with their common prefixes too, and by sorting hashes of the windows."""
    from pydivsufsort import divsufsort, kasai

    encoded = [text.encode() for text in texts]
    data = np.frombuffer(bytearray(b"\0".join(encoded)), np.uint8)
    began = time.process_time()
    suffixes = divsufsort(data)
    sorted_ = time.process_time()
    kasai(data, suffixes)
    ended = time.process_time()
    joined = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    offsets = np.cumsum([0, *map(len, texts)])
    hashing = time.process_time()
    hashes, _ = hash_windows(joined, *find_words(joined, offsets), size)
    np.argsort(hashes, kind="stable")
    return {
        "suffixes": sorted_ - began,
        "and prefixes": ended - began,
        "hashes": time.process_time() - hashing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--memory", type=int, default=32, help="MB a job may use")
    parser.add_argument("--min-tokens", type=int, default=50)
    arguments = parser.parse_args()
    stage = SubstringStage(
        min_tokens=arguments.min_tokens, memory=arguments.memory << 20
    )
    os.environ |= {
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    texts = read_texts(arguments.folders)
    total = sum(len(text.encode()) for text in texts)
    print(
        f"{len(texts)} documents, {total / 1e6:.1f} MB, memory: {arguments.memory} MB"
    )
    print(f"{'':>14}{'MB':>7}{'MB/CPU s':>10}{'MB/s':>8}{'peak MB':>9}{'cut':>7}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        small = write_corpus(home / "small", texts[:4])
        for times in (1, 4, 16):
            some = texts[: len(texts) * times // 16]
            size = sum(len(text.encode()) for text in some) / 1e6
            shards = write_corpus(home / f"{times}", some)
            scratch = home / f"scratch-{times}"
            scratch.mkdir()
            ours, theirs = context.Pipe()
            process = context.Process(
                target=measure, args=(stage, small, shards, scratch, theirs)
            )
            process.start()
            theirs.close()
            cpu, wall, peak = ours.recv()
            process.join()
            share = cut_share(stage, shards)
            row = f"{size:7.1f}{size / cpu:10.1f}{size / wall:8.1f}{peak:9.0f}{share:7.1%}"
            print(f"{f'maxlm, {times}x':>14}{row}")
            if times == 1:
                sorting_seconds(texts[:4], stage.min_tokens)  # Loads compiled code.
                for name, seconds in sorting_seconds(some, stage.min_tokens).items():
                    print(f"{name:>14}{size:7.1f}{size / seconds:10.1f}")


if __name__ == "__main__":
    main()
