"""Byte-level BPE encoding: ours against the library's own batch call, on the same texts.

    python benchmarks/tokenizer_encode.py [--megabytes 10] [--rounds 7] [--tokenizer FOLDER]

Both sides run the same tokenizer.json with as many threads as there are cores. The library's side
is timed twice: its call alone, which leaves the ids inside its own objects, and with the ids taken
out as lists, which is what any use of them needs and what ours returns. Rounds alternate, in an
order that reverses each time; the ratios are medians over rounds of ours to theirs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from maxlm.data.corpus import PYTHON_STDLIB, SourceConfig, read_documents
from maxlm.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer


def stdlib_texts(limit: int) -> list[bytes]:
    """About ``limit`` bytes of the standard library's source, a text a file."""
    texts: list[bytes] = []
    size = 0
    for document in read_documents(SourceConfig(documents=(PYTHON_STDLIB,))):
        texts.append(document.text)
        size += len(document.text)
        if size >= limit:
            break
    return texts


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time of one call, what it returned thrown away inside."""
    start = clock()
    call()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--tokenizer", type=Path, help="a saved bpe tokenizer; else one is trained")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of all threads: steadier where other programs share the cores",
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    import tokenizers

    raw = stdlib_texts(int(arguments.megabytes * 1e6))
    texts = [text.decode() for text in raw]
    size = sum(map(len, raw)) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        home = arguments.tokenizer or Path(folder)
        if arguments.tokenizer is None:
            config = TokenizerConfig(vocab_size=arguments.vocab_size)
            train_tokenizer(config, raw).save(home)
        ours = load_tokenizer(home)
        library = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    library.encode_special_tokens = True

    def their_lists() -> list[list[int]]:
        encodings = library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    calls: dict[str, Callable[[], object]] = {
        "tokenizers, ids left inside": lambda: library.encode_batch_fast(
            texts, add_special_tokens=False
        ),
        "tokenizers, ids as lists": their_lists,
        "maxlm, from str": lambda: ours.encode_batch(texts),
        "maxlm, from bytes": lambda: ours.encode_batch(raw),
    }
    if ours.encode_batch(raw) != their_lists():
        raise SystemExit("the ids differ")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(arguments.rounds):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            times[name].append(seconds(calls[name], clock))

    base = times["tokenizers, ids left inside"]
    print(f"{len(raw)} texts, {size:.1f} MB, {os.cpu_count()} cores, {ours.vocab_size} tokens")
    unit = "MB/CPU s" if arguments.cpu_time else "MB/s"
    print(f"{'':30}{unit:>8}{'ratio':>8}   (medians of {arguments.rounds} alternating rounds)")
    for name, measured in times.items():
        ratio = statistics.median(b / m for b, m in zip(base, measured, strict=True))
        print(f"{name:30}{size / statistics.median(measured):8.2f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
