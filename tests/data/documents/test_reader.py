"""Documents out of every format, and what happens to bad input."""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import read_documents


def texts(
    path, text_field="text", on_bad_bytes="error", piece_bytes=None
) -> list[bytes]:
    config = SourceConfig(
        documents=(str(path),),
        text_field=text_field,
        on_bad_bytes=on_bad_bytes,
        piece_bytes=piece_bytes,
    )
    return [document.text for document in read_documents(config)]


def fails(path, text_field="text") -> str:
    with pytest.raises(MaxlmError) as caught:
        texts(path, text_field)
    return str(caught.value)


def compress(data: bytes, suffix: str) -> bytes:
    match suffix:
        case ".gz":
            return gzip.compress(data)
        case ".zst":
            # Two frames: concatenated files are how .zst corpora are often made.
            half = len(data) // 2
            frame = zstandard.ZstdCompressor().compress
            return frame(data[:half]) + frame(data[half:])
        case _:
            return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_jsonl(tmp_path, suffix):
    text = "naïve\r\nline\n".encode() * 9999
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(text, suffix))
    assert texts(tmp_path / f"a.txt{suffix}") == [text]
    rows = ["one", "", "two\nlines \u00e9 \U0001f600", None, "last"]
    lines = [json.dumps({"id": 1, "body": row}) for row in rows]
    data = ("\ufeff" + "\n\n".join(lines)).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(data, suffix))
    name = f"{tmp_path}/a.jsonl{suffix}"
    config = SourceConfig(documents=(name,), text_field="body")
    documents = list(read_documents(config))
    expected_texts = [row for row in rows if row]
    assert [document.text.decode() for document in documents] == expected_texts
    # Every second line is blank, and every second row has no text.
    expected_ids = [f"{name}:{line}" for line in (1, 5, 9)]
    assert [document.id for document in documents] == expected_ids


@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet(tmp_path, dictionary):
    rows = ["one", None, "zwei ü", "", "three"] * 7
    column = pa.array(rows, pa.string())
    if dictionary:
        column = column.dictionary_encode()
    table = pa.table({"n": range(len(rows)), "text": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    config = SourceConfig(documents=(str(tmp_path / "a.parquet"),))
    rows_and_texts = [
        (document.id.split(":")[-1], document.text)
        for document in read_documents(config)
    ]
    expected = [(str(i), row.encode()) for i, row in enumerate(rows) if row]
    assert rows_and_texts == expected


def test_empty_files_hold_no_documents(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b"")
        assert texts(tmp_path / name) == []
    no_rows = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(no_rows, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == []


BAD = b"ab\xff\xfe c\xc3"


def test_bad_bytes_may_be_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(BAD)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + BAD + b'"}\n')
    bad_row = pa.table({"text": pa.array([BAD], pa.binary())})
    pq.write_table(bad_row, tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        replaced = texts(tmp_path / name, on_bad_bytes="replace")
        assert replaced == ["ab\ufffd\ufffd c\ufffd".encode()]
    (tmp_path / "b.jsonl").write_text('{"text": "a\\ud800b"}')
    assert texts(tmp_path / "b.jsonl", on_bad_bytes="replace") == ["a\ufffdb".encode()]
    assert "character 1 is a lone surrogate (U+D800)" in fails(tmp_path / "b.jsonl")


def test_bad_bytes_are_an_error_by_default(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + BAD)
    assert fails(path).startswith(
        f"{path}: byte 0xff at offset 7 is not valid UTF-8; set on_bad"
    )
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "' + BAD + b'"}\n')
    assert fails(path).startswith(
        f"{path}:2: byte 0xff at offset 12 is not valid UTF-8; "
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"fine", BAD], pa.binary())}), path)
    assert fails(path).startswith(
        f"{path}, row 1: byte 0xff at offset 2 is not valid UTF-8; "
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "x"',
            "not valid JSON (Expecting ',' delimiter); put one JSON object on each",
        ),
        (
            "[" * 200_000,
            "not valid JSON (nested too deeply); put one JSON object on each line",
        ),
        ('["x"]', 'a JSON object was expected, not list; write {"text": "..."}'),
        (
            '{"body": "x", "id": 1}',
            'there is no key "text"; set text_field to one of: "body", "id',
        ),
        (
            '{"text": 3}',
            '"text" holds int, not a string; set text_field to the key or column of',
        ),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    assert fails(path).startswith(f"{path}:3: {message}")


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    assert fails(path).endswith(
        'there is no column "text"; set text_field to one of: "body", "n"'
    )
    assert fails(path, text_field="n").startswith(
        f'{path}: column "n" holds int64, not text; set'
    )
    path.write_bytes(b"not parquet")
    assert fails(path).startswith(f"{path}: cannot read as Parquet: ")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    whole = compress(bytes(range(256)) * 99, suffix)
    path.write_bytes(whole[:-9] if damage == "cut" else b"garbage")
    message = fails(path)
    assert message.startswith(f"{path}: damaged or incomplete {suffix} data (")
    assert message.endswith("; fetch or compress the file again")


def test_unreadable_file(tmp_path):
    config = SourceConfig(documents=(str(tmp_path / "a.txt"),))
    (tmp_path / "a.txt").write_text("x")
    [file] = find_files(config).files
    (tmp_path / "a.txt").unlink()
    message = r"a.txt: cannot read: No such file .*permissions$"
    with pytest.raises(MaxlmError, match=message):
        list(read_documents(config, file))


@pytest.mark.parametrize("name", ["a.parquet", "a.zst"])
def test_missing_packages(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert fails(tmp_path / name).endswith(
        "is not installed; pip install 'maxlm[data]'"
    )


# A NUL would make the file binary.
LINES_OF_BYTES = st.lists(
    st.binary(max_size=40).map(lambda line: line.replace(b"\0", b"x")), max_size=30
)


@given(LINES_OF_BYTES)
def test_pieces_are_whole_lines_that_add_up(tmp_path_factory, lines):
    text = b"\n".join(line.decode("latin1").encode() for line in lines)
    path = tmp_path_factory.mktemp("pieces") / "long.txt"
    path.write_bytes(text)
    pieces = texts(path, piece_bytes=50)
    assert b"".join(pieces) == text
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    if len(text) > 50:
        for piece in pieces[:-1]:
            start_of_last_line = piece.rstrip(b"\n").rfind(b"\n") + 1
            assert len(piece) >= 50 > start_of_last_line
    else:
        assert len(pieces) <= 1
