"""Slices of a file hold each of its documents exactly once, with right line and row
numbers; a split holds each document by its hash."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import is_heldout
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import read_documents, read_slice
from maxlm.data.documents.streams import scan_file


def cut_and_whole(path, slice_bytes):
    config = SourceConfig(documents=(str(path),))
    [file] = find_files(config).files
    scan = scan_file(file, slice_bytes)
    cut = []
    for file_slice in scan.slices:
        for document in read_slice(config, file_slice):
            if document and document.text:
                cut.append(document)
    assert scan.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    total_bytes = sum(file_slice.size_bytes for file_slice in scan.slices)
    assert total_bytes <= path.stat().st_size
    return scan.slices, cut, list(read_documents(config))


LINES = st.lists(
    st.sampled_from(["", '{"text": ""}', '{"text": "é"}', '{"text": "longer text"}'])
)


@settings(max_examples=60, deadline=None)
@given(LINES, st.booleans(), st.integers(1, 90))
def test_jsonl(tmp_path_factory, lines, newline_at_end, slice_bytes):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * newline_at_end)
    slices, cut, whole = cut_and_whole(path, slice_bytes)
    assert cut == whole
    sizes = [file_slice.size_bytes for file_slice in slices]
    assert all(size >= slice_bytes for size in sizes[:-1])
    if len(slices) > 1:
        assert all(sizes)


@pytest.mark.parametrize("slice_bytes", [1, 150, 10**9])
def test_parquet(tmp_path, slice_bytes):
    rows = [f"row {i}" for i in range(23)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=5)
    slices, cut, whole = cut_and_whole(tmp_path / "a.parquet", slice_bytes)
    assert cut == whole
    assert [document.text.decode() for document in cut] == rows
    assert (len(slices) == 5) == (slice_bytes == 1)
    assert (len(slices) == 1) == (slice_bytes == 10**9)


def test_errors_in_a_later_slice_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 20 + "broken\n")
    config = SourceConfig(documents=(str(path),))
    [file] = find_files(config).files
    last = scan_file(file, 30).slices[-1]
    assert last.start > 0
    with pytest.raises(MaxlmError, match=rf"^{path}:21: not valid JSON"):
        list(read_slice(config, last))


def test_known_hashes():
    # sha256("abc") = ba7816bf..., sha256("") = e3b0c442... (FIPS 180-2): 0.72839,
    # 0.88942.
    assert is_heldout(b"abc", 0.7284)
    assert not is_heldout("abc", 0.7283)
    assert is_heldout("", 0.8895)
    assert not is_heldout(b"", 0.8894)


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_share(fraction):
    n = 20_000
    share = sum(is_heldout(str(i), fraction) for i in range(n)) / n
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / n) ** 0.5
