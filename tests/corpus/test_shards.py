"""Labels lie beside documents, row by row; what is written appears whole or not at
all."""

import pyarrow as pa
import pytest

from maxlm.corpus.expression import parse_expression
from maxlm.corpus.shards import StageShardView, read_counts
from tests.corpus.corpora import add_labels, make_corpus

SCHEMA = pa.schema([("words", pa.int32()), ("good", pa.bool_()), ("kind", pa.string())])


def label(shard, make):
    with shard.open_writer(SCHEMA) as writer:
        for rows in shard.read_selected_rows(["text"]):
            texts = rows.batch.column("text").to_pylist()
            writer.write_selected_rows(
                rows,
                pa.RecordBatch.from_pylist([make(t) for t in texts], schema=SCHEMA),
            )


def by_length(text):
    return {"words": len(text.split()), "good": len(text) > 3, "kind": text[:1]}


def test_labels_stand_beside_their_documents_and_nulls_beside_others(tmp_path):
    texts = ["a b", None, "", "b c d", "é", None, "last one"]
    (shard,) = make_corpus(tmp_path, texts, shards=1, rows_per_group=3)
    where = parse_expression('id != "d3"', {"id": pa.string()}, "where")
    label(
        StageShardView(tmp_path, shard.name, where=where, output_stage="made"),
        by_length,
    )
    read = [
        r
        for g in shard.read_row_groups(["id", "made.words", "text"])
        for r in g.to_pylist()
    ]
    assert [row["id"] for row in read] == [f"d{i}" for i in range(7)]
    assert [row["text"] for row in read] == texts
    assert [row["made.words"] for row in read] == [2, None, 0, None, 1, None, 2]
    assert [g.num_rows for g in shard.read_row_groups(["made.words"])] == [3, 3, 1]
    counts = read_counts(shard.path("made"))
    assert counts == {
        "rows": 7,
        "labelled": 4,
        "good=true": 1,
        "kind=a": 1,
        "kind=": 1,
        "kind=é": 1,
        "kind=l": 1,
    }


def test_the_newest_version_of_each_text_is_read(tmp_path):
    (shard,) = make_corpus(tmp_path, ["raw 0", "raw 1", None, None], shards=1)
    add_labels(
        [shard],
        "extract",
        text=pa.array([None, None, "new 2", "new 3"], pa.large_string()),
    )
    add_labels(
        [shard],
        "pii",
        text=pa.array([None, "<EMAIL>", None, "<IP>"], pa.large_string()),
    )
    view = StageShardView(tmp_path, shard.name, ("documents", "extract", "pii"))
    (group,) = view.read_row_groups(["text"])
    assert group.column("text").to_pylist() == ["raw 0", "<EMAIL>", "new 2", "<IP>"]


def test_a_file_appears_when_complete(tmp_path):
    (shard,) = make_corpus(tmp_path, ["a", "b"], shards=1)
    view = StageShardView(tmp_path, shard.name, output_stage="made")
    with pytest.raises(ZeroDivisionError):
        label(view, lambda text: 1 // 0)
    assert list((tmp_path / "made").iterdir()) == []
    label(view, by_length)
    assert [path.name for path in (tmp_path / "made").iterdir()] == [
        f"{shard.name}.parquet"
    ]
