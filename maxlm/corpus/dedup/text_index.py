"""An index of texts that corpora have: which of a new corpus's texts an earlier one has
already.

The index is a folder with a file for each corpus, NUMBER-ID.digests, of the sorted
digests of the texts that it keeps, and `settings.json`, how texts are normalised before
they are hashed. A corpus takes its number when it first looks into the index, and is
compared with those of lower numbers. So a corpus that is run again is compared with the
same ones, and of two only one drops what both have.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.runtime.files import convert_write_errors, lock_folder, replace_file

DIGEST = "S16"
"""numpy's type of a digest. It is compared without trailing zeros, which is right for
one width."""
_ENTRY = re.compile(r"\d{6}-[0-9a-f]{32}\.digests")
_CORPUS_ID = "corpus.id"


def reserve_index_entry(
    index: Path, corpus: Path, settings: Mapping[str, object]
) -> tuple[list[Path], Path]:
    """Finds the entries of corpora that come before a corpus, and its own, which is
    made if it is not there. Raises MaxlmError: the index's texts are normalised by
    other settings.

    Args:
        index: the index's folder, which is made if need be.
        corpus: the corpus's folder. A file in it tells it from others, wherever it
            lies.
        settings: how texts are normalised, as JSON has it.
    """
    with convert_write_errors(index):
        index.mkdir(parents=True, exist_ok=True)
    with lock_folder(index):
        _check_settings(index / "settings.json", settings)
        name = f"{_read_corpus_id(corpus)}.digests"
        entries = sorted(
            path for path in index.iterdir() if _ENTRY.fullmatch(path.name)
        )
        for position, entry in enumerate(entries):
            if entry.name.endswith(f"-{name}"):
                return entries[:position], entry
        last_number = int(entries[-1].name[:6]) if entries else 0
        entry = index / f"{last_number + 1:06d}-{name}"
        write_index_entry(entry, np.empty(0, DIGEST))
        return entries, entry


def _check_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Checks that an index has these settings, and writes those of a new one."""
    if not path.exists():
        with replace_file(path) as new:
            new.write_text(json.dumps(settings))
        return
    index_settings = json.loads(path.read_text())
    if index_settings != settings:
        message = (
            f"this index holds texts normalised by {index_settings}, not by "
            f"{dict(settings)}"
        )
        fix = "set the same, or name another folder"
        raise MaxlmError(message, where=str(path), fix=fix)


def _read_corpus_id(corpus: Path) -> str:
    path = corpus / _CORPUS_ID
    if not path.exists():
        with replace_file(path) as new:
            new.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


def write_index_entry(entry: Path, digests: np.ndarray) -> None:
    """Writes the digests of a corpus's texts, replacing those of an earlier run."""
    content = np.unique(digests).tobytes()
    if entry.exists() and entry.read_bytes() == content:
        return
    with replace_file(entry) as new:
        new.write_bytes(content)


def mark_indexed_texts(digests: np.ndarray, entries: Sequence[Path]) -> np.ndarray:
    """Marks digests (in any order) that one of the entries has: bool [digests]."""
    is_indexed = np.zeros(len(digests), np.bool_)
    for entry in entries:
        if entry.stat().st_size == 0:  # Which cannot be mapped.
            continue
        entry_digests = np.memmap(entry, DIGEST, "r")
        places = np.searchsorted(entry_digests, digests)
        # Behind the last there is nothing to compare with.
        inside = np.flatnonzero(places < len(entry_digests))
        is_indexed[inside] |= entry_digests[places[inside]] == digests[inside]
    return is_indexed
