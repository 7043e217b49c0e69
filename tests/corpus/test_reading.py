"""Whatever lies in source files, what can be read becomes documents and the rest is
counted."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.crawl import CrawlSource
from maxlm.corpus.reading import plan_shards, write_document_shard
from maxlm.corpus.shards import DOCUMENTS, read_counts


def make_source(*paths, max_document_bytes=64 << 20, text_field="text"):
    return CrawlSource(
        name="web",
        documents=tuple(map(str, paths)),
        max_document_bytes=max_document_bytes,
        text_field=text_field,
    )


def read(folder, source, shard_bytes=1 << 20):
    """All documents of a source and the sum of the shards' counts of what is left
    out."""
    rows = []
    counts = Counter()
    jobs, _ = plan_shards(folder / "corpus", [source], shard_bytes)
    for job in jobs:
        write_document_shard(job)
        rows += pq.read_table(job.shard.path(DOCUMENTS)).to_pylist()
        counts += read_counts(job.shard.path(DOCUMENTS))
    del counts["rows"], counts["labelled"]
    return rows, dict(counts)


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "one", "url": "http://a.org/", "lang": "en", "n": 3}',
        b"{broken",
        b'{"text": null}',
        b'{"text": "  "}',
        b"[1, 2]",
        b'{"txt": "no text"}',
        b'{"text": 17}',
        b"",
        b'{"text": "nul\\u0000 and \\ud800 surrogate", "id": "mine"}',
        b'{"text": "bad \xff byte"}',
        b"42",
        b"null",
        b'{"text": "odd fields", "url": "http://x/\\ud800", "id": "i\\udfff", "more": '
        b'"\\udc80"}',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 300 + b'"}',
        b'{"text": "' + b"x" * 3000 + b'"}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows, counts = read(tmp_path, make_source(path, max_document_bytes=200))
    assert [(row["id"], row["text"]) for row in rows] == [
        (f"{path}:1", "one"),
        ("mine", "nul and \ufffd surrogate"),
        (f"{path}:10", "bad \ufffd byte"),
        ("i\ufffd", "odd fields"),
        (f"{path}:17", "last"),
    ]
    assert rows[3]["url"] == "http://x/\ufffd"
    assert rows[0]["url"] == "http://a.org/"
    assert json.loads(rows[0]["meta"]) == {"lang": "en", "n": 3}
    assert {row["source"] for row in rows} == {"web"}
    assert counts == {"broken": 6, "empty": 2, "too_large": 3}


def test_text_and_html_files(tmp_path):
    root = tmp_path / "tree"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a.py").write_text("print('é')\n")
    (root / "b.html").write_bytes(b"<p>caf\xe9</p>")
    (root / "f.html.gz").write_bytes(gzip.compress(b"<p>packed</p>"))
    (root / "c.txt").write_text("")
    (root / "large.txt").write_text("y" * 5000)
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    with gzip.open(root / "d.txt.gz", "wt") as file:
        file.write("compressed")
    rows, counts = read(tmp_path, make_source(root, max_document_bytes=1000))
    contents = {}
    for row in rows:
        name = row["id"].removeprefix(f"{root}/")
        contents[name] = (row["text"], row["html"])
    assert contents == {
        "src/a.py": ("print('é')\n", None),
        "b.html": (None, b"<p>caf\xe9</p>"),
        "f.html.gz": (None, b"<p>packed</p>"),
        "d.txt.gz": ("compressed", None),
    }
    assert counts == {"too_large": 1, "empty": 1}


def test_large_fields_bound_a_row_group_too(tmp_path):
    row = json.dumps({"text": "short", "raw": "x" * 2_000_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 20)
    read(tmp_path, make_source(tmp_path / "a.jsonl"), shard_bytes=1 << 30)
    (path,) = (tmp_path / "corpus" / "documents").glob("*.parquet")
    assert pq.ParquetFile(path).num_row_groups == 3


def test_parquet(tmp_path):
    columns = {"body": ["a", None, "c"], "url": ["u", None, None], "n": [1, 2, None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing more")
    source = make_source(tmp_path / "a.parquet", text_field="body")
    rows, counts = read(tmp_path, source, shard_bytes=1)
    assert [(row["text"], row["url"], row["meta"]) for row in rows] == [
        ("a", "u", '{"n": 1}'),
        ("c", None, None),
    ]
    assert counts == {"empty": 1}


@pytest.mark.parametrize("num_bytes", [30, 200, 2000])
def test_a_compressed_file_that_was_cut_short(tmp_path, num_bytes):
    whole = "".join(
        json.dumps({"text": f"document {i} " * 50}) + "\n" for i in range(2000)
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(whole.encode())[:num_bytes])
    rows, counts = read(tmp_path, make_source(path))
    assert counts["broken"] == 1
    expected = [f"document {i} " * 50 for i in range(len(rows))]
    assert [row["text"] for row in rows] == expected
    if num_bytes == 2000:
        assert rows


def test_a_bomb_is_passed_over(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "before"}\n')
        for _ in range(64):
            file.write(b"0" * (1 << 20))
        file.write(b'\n{"text": "after"}\n')
    rows, counts = read(tmp_path, make_source(path, max_document_bytes=1 << 16))
    assert [row["text"] for row in rows] == ["before", "after"]
    assert counts == {"too_large": 1}


def test_a_shard_is_named_after_what_is_in_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)

    source = CrawlSource(name="web", documents=(str(tmp_path),))

    def list_names(source):
        jobs, _ = plan_shards(tmp_path / "c", [source], 1)
        return [job.shard.name for job in jobs]

    before = list_names(source)
    assert list_names(source) == before
    (tmp_path / "c.txt").write_text("new")
    more = list_names(source)
    assert more[:2] == before
    assert len(more) == 3
    (tmp_path / "a.txt").write_text("changed")
    changed = list_names(source)
    assert changed[0] != before[0]
    assert changed[1] == before[1]
    other_pieces = source.model_copy(update={"piece_bytes": 9})
    assert set(list_names(other_pieces)).isdisjoint(changed)


def test_a_file_that_changes_after_it_was_cut_is_an_error(tmp_path):
    """A crawl that is still being fetched; the shards would be neither of the old nor
    the new."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(90)))
    source = CrawlSource(name="web", documents=(str(path),))
    jobs = plan_shards(tmp_path / "c", [source], 200)[0]
    assert len(jobs) > 2
    write_document_shard(jobs[0])
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    for job in jobs[1:]:
        with pytest.raises(MaxlmError) as error:
            write_document_shard(job)
        assert str(error.value) == (
            f"{path}: the file changed while the corpus was being built; run the build "
            "again"
        )
        assert not job.shard.path(DOCUMENTS).exists()
