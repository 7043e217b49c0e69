"""Threads of the tokenizer libraries in worker processes."""

import os


def use_one_thread() -> None:
    """Holds tokenizers' ``encode_batch`` to the calling thread, in this process from now on.

    For the initialiser of worker processes: each would otherwise start a thread per core, and N
    workers on N cores would run N² threads. Where one process does all the encoding, leave it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def thread_count() -> int:
    """Number of threads that ``encode_batch`` may use in this process."""
    # The `tokenizers` library's own switch, as it reads it.
    serial = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no")
    return 1 if serial else os.cpu_count() or 1
