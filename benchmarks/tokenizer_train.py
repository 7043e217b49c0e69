"""Byte-level BPE training: ours, tokenizers' own call and rustbpe, time and memory.

    python benchmarks/tokenizer_train.py TEXT [--megabytes 100] [--vocab-size 32768]

TEXT is files, a folder or a quoted glob; read again from its start until there is
enough of it. Each side trains in a process of its own, one after another, fed text by
text as it is read; rustbpe if it is installed (`pip install rustbpe`; it splits text by
its own pattern, so its merges are others). maxlm's merges must be tokenizers'. Peak
memory is the process's less what it had before.
"""

import argparse
import hashlib
import multiprocessing
import queue
import resource
import time
from collections.abc import Iterator

from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents


def read_texts(source: str, limit: int) -> Iterator[str]:
    """``limit`` bytes of text, of a source that is read as often as that takes."""
    size = 0
    while size < limit:
        for document in read_documents(
            SourceConfig(documents=(source,), on_bad_bytes="replace")
        ):
            data = document.text[: limit - size]
            size += len(data)
            yield data.decode("utf-8", "ignore")
            if size >= limit:
                return


def train(side: str, texts: Iterator[str], vocab_size: int) -> str:
    """What names the merges that this side learned."""
    if side == "rustbpe":
        import rustbpe  # pyright: ignore[reportMissingImports]

        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(texts, vocab_size - 1)
        return hashlib.sha256(str(tokenizer.get_mergeable_ranks()).encode()).hexdigest()
    if side == "maxlm":
        from maxlm.data.tokenizer.config import TokenizerConfig
        from maxlm.data.tokenizer.huggingface import HuggingFaceCodec
        from maxlm.data.tokenizer.train import train_tokenizer

        config = TokenizerConfig(vocab_size=vocab_size, sample_bytes=1 << 60)
        codec = train_tokenizer(config, texts).codec  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(codec, HuggingFaceCodec)
        library = codec._library
    else:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        from maxlm.data.tokenizer.huggingface import PATTERN

        library = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
        )
        library.train_from_iterator(texts, trainer)
    vocab = library.get_vocab(with_added_tokens=False)
    return hashlib.sha256(str(sorted(vocab.items())).encode()).hexdigest()


def measure(side: str, source: str, limit: int, vocab_size: int, results) -> None:
    """Put (wall seconds, CPU seconds, MB, digest) or None into ``results``."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall = time.perf_counter()
    cpu = time.process_time()
    try:
        digest = train(side, read_texts(source, limit), vocab_size)
    except ImportError:
        return results.put(None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return results.put((wall, cpu, peak, digest))


def received(results, process):
    """What the process puts into ``results``, or the end of all if it dies without."""
    while True:
        alive = (
            process.is_alive()
        )  # First: what it put before it ended is there to be got.
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if not alive:
                raise SystemExit(
                    f"a side's process died: exit code {process.exitcode}"
                ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocab-size", type=int, default=32768)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    digests = {}
    print(f"{'':12}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}  merges")
    for side in ("tokenizers", "maxlm", "rustbpe"):
        results = spawn.Queue()
        limit = int(arguments.megabytes * 1e6)
        process_arguments = (side, arguments.text, limit, arguments.vocab_size, results)
        process = spawn.Process(target=measure, args=process_arguments)
        process.start()
        measurement = received(results, process)
        process.join()
        if measurement is None:
            print(f"{side:12} not installed")
            continue
        wall, cpu, peak, digests[side] = measurement
        print(f"{side:12}{wall:8.1f}{cpu:8.1f}{peak:9.0f}  {digests[side][:12]}")
    if digests["maxlm"] != digests["tokenizers"]:
        raise SystemExit("the merges differ")


if __name__ == "__main__":
    main()
