"""Deduplication: recall and precision against brute force, and speed beside datatrove.

    python benchmarks/corpus_dedup.py [--documents FILES] [--count 6000] [--piece 3000]
        [--versions OLD NEW] [--datatrove PYTHON] [--memory]

Takes real documents (default: the source of Python's standard library, cut at line ends
into pieces of about 3 KB), plants exact copies and edited copies among them, and
prints, for one process:

- exact: planted copies that were found, and documents/s.
- near: recall and precision against brute force. The brute force is independent of the
  package: its own words by a regular expression, n-grams as tuples, intersections by
  sparse matrices. Recall is the share of its pairs with J >= 0.8 of which at least one
  document is marked; it is also given for pairs that are not word for word the same.
  Precision is the share of marked documents that have J >= 0.8 with the document they
  are said to be a duplicate of.
- speed: CPU seconds of signatures (shingling included) and of everything, reading and
  writing of files included. With --datatrove also those of datatrove 0.10 on the same
  documents: PYTHON is an interpreter of an environment with `pip install
  "datatrove[processing]" "xxhash<4" spacy`.
- versions: of two versions of the same manual (two folders), the pages with J >= 0.8 to
  their other version that were found. For Django: `pip download --no-binary :all:
  --no-deps django==4.2.16`, the same for 5.0.9, unpack both, and give their docs
  folders.
- memory (--memory): peak memory of a process for corpora of 1, 4 and 16 times the size,
  of shards of one size.
"""

import argparse
import json
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from maxlm.corpus.dedup.minhash import compute_band_keys, make_shingle_set
from maxlm.corpus.shards import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    StageShardView,
    open_shard_writer,
)
from maxlm.corpus.stage import CrossDocumentStage, JobRunner
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.stages.near import NearStage
from maxlm.data.documents.config import PYTHON_STDLIB, SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import ignore_progress

TARGET = 0.8


def words(text: str) -> list[str]:
    """Words as the package's documentation defines them, by other means."""
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text))
    return re.findall(r"[^\W_]+", plain.casefold())


def brute_force(texts: list[str], n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """All pairs with J >= TARGET and their J, from sets of n-grams of words."""
    numbers: dict[tuple[str, ...], int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        text_words = words(text)
        grams = (
            {
                tuple(text_words[i : i + n])
                for i in range(max(1, len(text_words) - n + 1))
            }
            if text_words
            else ()
        )
        columns += [numbers.setdefault(gram, len(numbers)) for gram in grams]
        rows += [row] * len(grams)
    sets = csr_array(
        (np.ones(len(rows), np.int32), (rows, columns)), (len(texts), len(numbers))
    )
    sizes = np.bincount(rows, minlength=len(texts))
    pairs, jaccard = [], []
    for start in range(0, len(texts), 500):
        shared = (sets[start : start + 500] @ sets.T).tocoo()
        a = shared.coords[0] + start
        b = shared.coords[1]
        similarity = shared.data / (sizes[a] + sizes[b] - shared.data)
        alike = (a < b) & (similarity >= TARGET)
        pairs.append(np.stack([a[alike], b[alike]], axis=1))
        jaccard.append(similarity[alike])
    return np.concatenate(pairs), np.concatenate(jaccard)


def plant(
    texts: list[str], count: int, random_: random.Random
) -> tuple[list[str], set[int]]:
    """Add copies with other case and spacing, and edited ones; returns also which are
    copies."""
    planted = list(texts)
    copies = set()
    for text in random_.sample(texts, count):
        copies.add(len(planted))
        planted.append(text.upper().replace(" ", "  ") + "\n")
    for share in (
        0.005,
        0.01,
        0.015,
        0.02,
        0.03,
        0.05,
    ):  # J = (1 - 5 share) / (1 + 5 share), about
        for text in random_.sample(texts, count):
            pieces = re.split(r"(\W+)", text)
            for _ in range(max(1, round(share * len(pieces) / 2))):
                pieces[random_.randrange(0, len(pieces), 2)] = (
                    f"edit{random_.random()}"[:9]
                )
            planted.append("".join(pieces))
    return planted, copies


def write_corpus(
    folder: Path, texts: list[str], shards: int = 4
) -> list[StageShardView]:
    views = []
    for number in range(shards):
        part = range(number * len(texts) // shards, (number + 1) * len(texts) // shards)
        views.append(StageShardView(folder, f"{number:05d}"))
        with open_shard_writer(views[-1].path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
            for first in range(part.start, part.stop, 1000):
                rows = [
                    {"id": str(i), "source": "real", "text": texts[i]}
                    for i in range(first, min(first + 1000, part.stop))
                ]
                writer.write_row_group(
                    pa.RecordBatch.from_pylist(rows, schema=DOCUMENT_SCHEMA)
                )
    return views


def run(
    stage: CrossDocumentStage, shards: list[StageShardView], scratch: Path
) -> tuple[pa.Table, float]:
    """The stage's labels, and CPU seconds."""
    scratch.mkdir()
    views = [replace(shard, output_stage=stage.unique_name) for shard in shards]
    start = time.process_time()
    with WorkerPool(1) as pool:
        stage.label(views, scratch, JobRunner(stage.unique_name, pool, ignore_progress))
    seconds = time.process_time() - start
    return pa.concat_tables(
        pq.read_table(view.path(stage.unique_name)) for view in views
    ), seconds


def report_quality(texts: list[str], labels: pa.Table) -> None:
    pairs, jaccard = brute_force(texts)
    duplicate = labels["duplicate"].to_numpy()
    cluster = np.array([-1 if c is None else c for c in labels["cluster"].to_pylist()])
    marked = duplicate[pairs].any(axis=1)
    together = (cluster[pairs[:, 0]] == cluster[pairs[:, 1]]) & (
        cluster[pairs[:, 0]] >= 0
    )
    print(
        f"near: {len(texts)} documents, {len(pairs)} pairs with J >= {TARGET} by brute "
        f"force"
    )
    for name, which in (
        ("all pairs", jaccard > 0),
        ("J < 1", jaccard < 1),
        ("J < 0.9", jaccard < 0.9),
    ):
        print(
            f"  recall, {name:9}: {marked[which].mean():.4f} (one marked), "
            f"{together[which].mean():.4f} (in one cluster) of {which.sum()}"
        )
    true = {tuple(pair) for pair in pairs.tolist()}
    of = [
        (i, int(original))
        for i, original in enumerate(labels["of"].to_pylist())
        if original is not None
    ]
    right = sum((min(pair), max(pair)) in true for pair in of)
    print(f"  precision: {right / len(of):.4f} of {len(of)} marked documents")


def report_versions(old: Path, new: Path, folder: Path) -> None:
    names = sorted(
        str(p.relative_to(old))
        for p in old.rglob("*.txt")
        if (new / p.relative_to(old)).exists()
    )
    texts = [(root / name).read_text() for name in names for root in (old, new)]
    same = sum(texts[2 * i] == texts[2 * i + 1] for i in range(len(names)))
    pairs, jaccard = brute_force(texts)
    version = (pairs[:, 0] % 2 == 0) & (pairs[:, 1] == pairs[:, 0] + 1)
    changed = [
        i for i in np.flatnonzero(version) if texts[pairs[i, 0]] != texts[pairs[i, 1]]
    ]
    labels, _ = run(NearStage(), write_corpus(folder, texts, 2), folder / "scratch")
    duplicate = labels["duplicate"].to_numpy()
    num_found = duplicate[pairs[version]].any(axis=1).sum()
    print(
        f"versions: {len(names)} pages in both, {same} identical, {len(changed)} "
        f"others with "
        f"J >= {TARGET}; found {num_found} of {version.sum()}, by J from low to high:"
    )
    for i in sorted(changed, key=lambda i: jaccard[i])[:: max(1, len(changed) // 6)]:
        mark = "found" if duplicate[pairs[i]].any() else "MISSED"
        print(f"  {mark} J = {jaccard[i]:.3f}  {names[pairs[i, 0] // 2]}")


def peak_memory(shards: list[StageShardView], folder: Path) -> float:
    """MB that a process takes at most to run both stages over shards, in small
    ranges."""
    for stage in (ExactStage(memory=8 << 20), NearStage(memory=8 << 20)):
        run(stage, shards, folder / stage.unique_name)
    # Not getrusage: that is never below what the parent had when it started this
    # process.
    return (
        int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
        / 1e3
    )


def report_memory(texts: list[str], folder: Path) -> None:
    """Peak memory over corpora of 1, 4 and 16 times as many shards of the same size."""
    context = multiprocessing.get_context("spawn")
    for times in (1, 4, 16):
        # Words told apart by a number, so that the copies of the corpus are not alike.
        many = [
            re.sub(r"\b(?=[a-z])", f"{i}", text)
            for i in range(times)
            for text in texts[:2000]
        ]
        place = folder / str(times)
        shards = write_corpus(place / "corpus", many, 4 * times)
        with context.Pool(1) as pool:
            peak = pool.apply(peak_memory, (shards, place))
        print(f"memory, {len(many)} documents in {len(shards)} shards: {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documents", nargs="+", default=[PYTHON_STDLIB])
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--piece", type=int, default=3000)
    parser.add_argument("--versions", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument(
        "--memory", action="store_true", help="peak memory by corpus size"
    )
    parser.add_argument("--datatrove", help="a Python interpreter that has datatrove")
    arguments = parser.parse_args()

    random_ = random.Random(0)
    source = SourceConfig(
        documents=tuple(arguments.documents),
        piece_bytes=arguments.piece,
        on_bad_bytes="replace",
    )
    texts = [document.text.decode() for document in read_documents(source)]
    texts = random_.sample(texts, min(arguments.count, len(texts)))
    texts, copies = plant(texts, len(texts) // 30, random_)
    size = sum(map(len, texts)) / len(texts)
    print(
        f"{len(texts)} documents of {size:.0f} characters, {len(copies)} planted copies"
    )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_corpus(folder / "corpus", texts)
        labels, seconds = run(ExactStage(), shards, folder / "exact")
        num_found = sum(labels["duplicate"][i].as_py() for i in copies)
        print(
            f"exact: found {num_found} of {len(copies)} copies; "
            f"{len(texts) / seconds:,.0f} documents/s"
        )

        stage = NearStage()
        banding = stage.banding
        run(stage, write_corpus(folder / "small", texts[:50] * 2), folder / "compile")
        signature = []
        for _ in range(5):
            start = time.process_time()
            compute_band_keys(
                [make_shingle_set(text, stage.ngram) for text in texts], banding
            )
            signature.append(time.process_time() - start)
        ours = {"signature": sorted(signature)[2]}
        labels, ours["all"] = run(stage, shards, folder / "near")
        report_quality(texts, labels)
        speed = len(texts) / ours["signature"]
        print(
            f"  signatures, {banding[0]} bands of {banding[1]}: {speed:,.0f} "
            f"documents/s"
        )
        print(f"  end to end: {len(texts) / ours['all']:,.0f} documents/s")
        if arguments.datatrove:
            documents = folder / "documents.jsonl"
            with documents.open("w") as out:
                for i, text in enumerate(texts):
                    out.write(json.dumps({"text": text, "id": str(i)}) + "\n")
            for tokenizer in ("spacy", "whitespace"):
                peer = Path(__file__).with_name("corpus_dedup_peer.py")
                command = [
                    arguments.datatrove,
                    peer,
                    documents,
                    folder / tokenizer,
                    tokenizer,
                ]
                done = subprocess.run(
                    command, check=True, capture_output=True, cwd=folder
                )
                theirs = json.loads(done.stdout.splitlines()[-1])
                for part in ("signature", "all"):
                    print(
                        f"datatrove ({tokenizer}), {part}: "
                        f"{len(texts) / theirs[part]:,.0f} "
                        f"documents/s; ours is {theirs[part] / ours[part]:.0f} times "
                        f"as fast"
                    )
        if arguments.memory:
            report_memory(texts, folder / "memory")
        if arguments.versions:
            report_versions(
                arguments.versions[0], arguments.versions[1], folder / "versions"
            )


if __name__ == "__main__":
    sys.exit(main())
