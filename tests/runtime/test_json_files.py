"""JSON from outside is read in bounded size and depth, or refused in a line naming its
place."""

import json
import os

import pytest

from maxlm.runtime import json_files
from maxlm.runtime.json_files import (
    MAX_JSON_DEPTH,
    parse_json,
    read_json_file,
    read_json_object,
)
from tests.errors import message

FIX = "copy it again"


def nest(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + closing * levels


@pytest.mark.parametrize("text", ['{"a": [1, {"b": null}], "c": "é"}', "3.5", "[]"])
def test_a_file_is_what_json_reads(tmp_path, text):
    (tmp_path / "a.json").write_text(text, "utf-8")
    assert read_json_file(tmp_path / "a.json", FIX) == json.loads(text)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":[', "]}")])
def test_depth_is_bounded(opening, closing):
    levels = MAX_JSON_DEPTH // len(closing)
    assert parse_json(nest(levels, opening, closing), "f", FIX) is not None
    for deeper in (levels + 1, 5000):  # past the second, Python's own parser gives up
        text = message(parse_json, nest(deeper, opening, closing), "f:3", FIX)
        assert text == f"f:3: cannot be read (nested deeper than 100 levels); {FIX}"


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    assert message(read_json_file, path, FIX).startswith(
        f"{path}: cannot be read (No such file"
    )
    path.write_text('{"a":\n 1,}')
    text = message(read_json_file, path, FIX)
    assert "(Expecting property name" in text
    assert "line 2 column 4" in text
    path.write_bytes(b'{"a": "\xff"}')
    assert "can't decode byte 0xff" in message(read_json_file, path, FIX)
    path.write_text("[1]")
    assert "not a mapping, but list" in message(read_json_object, path, FIX)
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 2)
    assert "3 bytes of JSON, where at most 2 are read" in message(
        read_json_file, path, FIX
    )


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    # Opened, it would wait for a writer until the test's own limit of time.
    assert "a pipe or device" in message(read_json_file, tmp_path / "pipe", FIX)
