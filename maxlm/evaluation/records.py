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
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.progress import Progress

Record = JsonObject
Key = tuple[Any, ...]
"""The values of some of a record's fields, names or numbers, by which it is found."""


def read_json_records(
    path: Path, fields: Sequence[str], skip_damaged: bool = False
) -> list[Record]:
    """Returns a file's records: one a line, or, of a name in ".json", a list; a name
    that ends in ".gz" is decompressed. Raises MaxlmError for a file that cannot be
    read, and for a record without all `fields`."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        rows = json.loads(data) if path.suffix == ".json" else data.split(b"\n")
    except (OSError, EOFError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MaxlmError(f"cannot be read ({reason})", where=str(path)) from None
    records: list[Record] = []
    for number, row in enumerate(rows, 1):
        if row in (b"", b"\r"):
            continue
        try:
            record = json.loads(row) if isinstance(row, bytes) else row
        except (ValueError, RecursionError) as error:
            record = {}
            fault = repr(error)
        else:
            fault = _find_fault(record, fields)
        if fault is None:
            records.append(record)
        elif not skip_damaged:
            message = f"not a record with {', '.join(fields)}: {fault}"
            raise MaxlmError(message, where=f"{path}:{number}")
    return records


def _find_fault(record: object, fields: Sequence[str]) -> str | None:
    """Says why JSON is no record with these fields; None: it is one."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object"
    missing = [field for field in fields if field not in record]
    return f"no {', '.join(missing)}" if missing else None


def fill_records(
    path: Path,
    fields: Sequence[str],
    keys: Sequence[Key],
    make: Callable[[Key, Record], Record],
    num_threads: int,
    progress: Progress,
) -> dict[Key, Record]:
    """Writes a JSONL file of records by key, the values of `fields`, and returns those
    of `keys`.

    Args:
        make: called as (key, record that the file has, or an empty one); its result is
            written at once, so that a run that was cut off goes on. One with an "error"
            is dropped next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old: dict[Key, Record] = {}
    if path.exists():
        for record in read_json_records(path, fields, skip_damaged=True):
            if "error" not in record:
                old[tuple(record[field] for field in fields)] = record
    lock = threading.Lock()

    def make_and_append(key: Key) -> Record:
        record = make(key, old.get(key, {}))
        with lock, open(path, "a", encoding="utf-8") as file:
            # Behind a line break: the line before may be cut short.
            file.write(f"\n{json.dumps(record)}")
        return record

    new: dict[Key, Record] = {}
    progress(path.stem, 0, len(keys))
    # An error leaves the block once the calls that run have ended.
    with ThreadPoolExecutor(num_threads) as pool:
        for key, record in zip(keys, pool.map(make_and_append, keys), strict=True):
            new[key] = record
            progress(path.stem, len(new), len(keys))
    # Once more in the order of the keys, without damaged lines and errors made good.
    in_order = sorted({**old, **new}.items())
    with replace_file(path) as temporary:
        lines = [json.dumps(record) + "\n" for _, record in in_order]
        temporary.write_text("".join(lines), "utf-8")
    return new
