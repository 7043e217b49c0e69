"""Notes of which process was asked what, for tests of several processes. Apart from
``policy_worker.py``, which registers kinds when it is imported."""

from pathlib import Path

import jax


def get_notes_path(folder: str | Path, process: int, call: str) -> Path:
    return Path(folder, f"{call}-{process}.txt")


def note(folder: str, call: str, text: str = "") -> None:
    with get_notes_path(folder, jax.process_index(), call).open("a") as file:
        file.write(f"{text}\n")


def read_notes(folder: str | Path, process: int, call: str) -> list[str]:
    path = get_notes_path(folder, process, call)
    return path.read_text().splitlines() if path.exists() else []
