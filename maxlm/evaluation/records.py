"""Files of JSON records: problems, answers, judgments, battles."""

import gzip
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress

Record = dict[str, Any]


def read_records(
    path: Path, fields: Sequence[str], skip_damaged: bool = False
) -> list[Record]:
    """Returns a file's records: one a line, or, of a name in ".json", a list; a name
    that ends in ".gz" is decompressed. Raises MaxlmError for a file that cannot be
    read, and for a record without all `fields`."""
    try:
        data = (
            gzip.decompress(path.read_bytes())
            if path.suffix == ".gz"
            else path.read_bytes()
        )
        rows = json.loads(data) if path.suffix == ".json" else data.split(b"\n")
    except (OSError, EOFError, ValueError, RecursionError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise MaxlmError(what, where=str(path)) from None
    records = []
    for number, row in enumerate(rows, 1):
        if row in (b"", b"\r"):
            continue
        try:
            record = json.loads(row) if isinstance(row, bytes) else row
            _ = [record[field] for field in fields]
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"not a record with {', '.join(fields)}: {error!r}"
            if not skip_damaged:
                raise MaxlmError(what, where=f"{path}:{number}") from None
    return records


def fill_records(
    path: Path,
    fields: Sequence[str],
    keys: Sequence[tuple[Any, ...]],
    make: Callable[[Any, Record], Record],
    num_threads: int,
    progress: Progress,
) -> dict[Any, Record]:
    """Writes a JSONL file of records by key, the values of `fields`, and returns those
    of `keys`.

    Args:
        make: called as (key, record that the file has, or an empty one); its result is
            written at once, so that a run that was cut off goes on. One with an "error"
            is dropped next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = read_records(path, fields, skip_damaged=True) if path.exists() else []
    old = {
        tuple(each[field] for field in fields): each
        for each in found
        if "error" not in each
    }
    lock = threading.Lock()

    def work(key: tuple[Any, ...]) -> Record:
        record = make(key, old.get(key, {}))
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(record)}")  # The line before may be cut short.
        return record

    new = {}
    progress(path.stem, 0, len(keys))
    with ThreadPoolExecutor(num_threads) as pool:  # An error ends it after what runs.
        for key, record in zip(keys, pool.map(work, keys), strict=True):
            new[key] = record
            progress(path.stem, len(new), len(keys))
    with replace_file(path) as temporary:
        lines = [
            json.dumps(record) + "\n" for _, record in sorted({**old, **new}.items())
        ]
        temporary.write_text("".join(lines), "utf-8")
    return new
