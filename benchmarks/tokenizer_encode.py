"""Byte-level BPE encoding: ours against tokenizers' and tiktoken's own calls, on the
same texts.

    pip install tiktoken
    python benchmarks/tokenizer_encode.py [--megabytes 10] [--rounds 7] [--text FOLDER]
        [--tokenizer FOLDER] [--cpu-time]

All sides have the same tokens and as many threads as there are cores, or one with
--cpu-time. tokenizers is timed twice: its call alone, which leaves the ids inside its
own objects, and with the ids taken out as lists, which is what any use of them needs
and what the others return. tiktoken is given the same pattern. Rounds alternate, in an
order that reverses each time; the ratios are medians over rounds of tiktoken's time to
each. Ids are compared first.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

from maxlm.data.documents.config import PYTHON_STDLIB, SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.huggingface import PATTERN
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.runtime.pool import use_one_tokenizer_thread


def read_texts(limit: int, source: str = PYTHON_STDLIB) -> list[bytes]:
    """About ``limit`` bytes of the standard library's source, or another's, a text a
    file."""
    texts: list[bytes] = []
    size = 0
    for document in read_documents(
        SourceConfig(documents=(source,), on_bad_bytes="replace")
    ):
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


def peer_encoding(ours):
    """tiktoken's Encoding of the same tokens."""
    import tiktoken

    special = {*ours.special_tokens.values()}
    ranks = {
        token: i for i, token in enumerate(ours.codec.token_bytes) if i not in special
    }
    return tiktoken.Encoding(
        "", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument(
        "--text", default=PYTHON_STDLIB, help="files, a folder, or python-stdlib"
    )
    parser.add_argument("--tokenizer", default="", help="a saved bpe; else trained")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, in CPU seconds"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        use_one_tokenizer_thread()

    import tokenizers

    raw = read_texts(int(arguments.megabytes * 1e6), arguments.text)
    texts = [text.decode() for text in raw]
    size = sum(map(len, raw)) / 1e6
    if arguments.tokenizer:
        ours = load_tokenizer(arguments.tokenizer)
    else:
        ours = train_tokenizer(TokenizerConfig(vocab_size=arguments.vocab_size), raw)
    library = tokenizers.Tokenizer.from_str(ours.codec.data.decode())
    library.encode_special_tokens = True
    peer = peer_encoding(ours)
    threads = 1 if arguments.cpu_time else os.cpu_count() or 1

    def their_lists() -> list[list[int]]:
        encodings = library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    calls: dict[str, Callable[[], object]] = {
        "tiktoken": lambda: (
            [peer.encode_ordinary(text) for text in texts]
            if threads == 1
            else peer.encode_ordinary_batch(texts, num_threads=threads)
        ),
        "tokenizers, ids left inside": lambda: library.encode_batch_fast(
            texts, add_special_tokens=False
        ),
        "tokenizers, ids as lists": their_lists,
        "maxlm, from str": lambda: ours.encode_batch(texts),
        "maxlm, from bytes": lambda: ours.encode_batch(raw),
    }
    if not ours.encode_batch(raw) == their_lists() == calls["tiktoken"]():
        raise SystemExit("the ids differ")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(arguments.rounds):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            times[name].append(seconds(calls[name], clock))

    base = times["tiktoken"]
    print(
        f"{len(raw)} texts, {size:.1f} MB, {threads} threads, {ours.vocab_size} "
        f"tokens, ids equal"
    )
    unit = "MB/CPU s" if arguments.cpu_time else "MB/s"
    print(
        f"{'':30}{unit:>8}{'ratio':>8}   (medians of {arguments.rounds} alternating "
        f"rounds)"
    )
    for name, measured in times.items():
        ratio = statistics.median(b / m for b, m in zip(base, measured, strict=True))
        print(f"{name:30}{size / statistics.median(measured):8.2f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
