"""Threads of the tokenizer libraries in worker processes."""

import os


def use_one_thread() -> None:
    """Hold ``encode_batch`` to the calling thread, in this process from now on.

    For the initialiser of worker processes: each would otherwise start a thread per core, and N
    workers on N cores would run N² threads. Where one process does all the encoding, leave it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
