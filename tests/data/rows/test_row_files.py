"""Rows of files of every form, alike; and files that cannot be read."""

import gzip
import json
import pickle

import pytest

from maxlm.config import MaxlmError
from maxlm.data.row_files import open_rows

ROWS = [{"prompt": f"é {i}", "completion": ["x"] * i, "n": i} for i in range(23)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def save_dataset(folder, rows, num_files=2):
    """As ``datasets.Dataset.save_to_disk`` writes it."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{num_files:05}.arrow" for i in range(num_files)]
    for i, name in enumerate(names):
        file_rows = rows[i * len(rows) // num_files : (i + 1) * len(rows) // num_files]
        table = pa.Table.from_pylist(file_rows)
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as to,
        ):
            to.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def write(path):
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=5)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(LINES.encode()))
    elif path.suffix:
        path.write_text(LINES + "\n \n")
    else:
        save_dataset(path, ROWS)


NAMES = ["a.jsonl", "a.v2.json", "a.jsonl.gz", "a.JSONL.zst", "a.parquet", "saved"]


@pytest.mark.parametrize("name", NAMES)
def test_all_forms_hold_the_same_rows(tmp_path, name):
    write(tmp_path / name)
    file = open_rows(tmp_path / name)
    assert [file[i] for i in range(len(file))] == ROWS
    assert pickle.loads(pickle.dumps(file))[7] == ROWS[7]
    assert file.locate(7) == f"{tmp_path / name}: row 7"


def test_several_files_follow_one_another(tmp_path):
    for name in NAMES[:2]:
        write(tmp_path / name)
    file = open_rows(*(tmp_path / name for name in NAMES[:2]))
    assert [file[i] for i in range(len(file))] == ROWS * 2
    assert file.locate(23 + 5) == f"{tmp_path / NAMES[1]}: row 5"


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for size in (3, 5):
        path.write_text("\n".join(LINES.splitlines()[:size]))
        assert len(open_rows(path)) == size


def test_damage_names_the_file_and_the_row(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"a": 1}', "", '{"a": 1', "[1]", '{"a": "\\u12"}']
    path.write_text("\n".join(lines))
    file = open_rows(path)
    for row, message in (
        (1, "no JSON object (Expecting"),
        (2, "no JSON object;"),
        (3, "no JSON object"),
    ):
        with pytest.raises(MaxlmError) as caught:
            file[row]
        assert str(caught.value).startswith(f"{path}: row {row}: {message}")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(MaxlmError, match=r"b\.jsonl\.gz: damaged or incomplete"):
        open_rows(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    pytest.importorskip("pyarrow")
    with pytest.raises(MaxlmError, match=r"c\.parquet: cannot be read"):
        open_rows(tmp_path / "c.parquet")


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    save_dataset(tmp_path / "d" / "train", ROWS)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        MaxlmError, match="the splits train, test; name one of their folders"
    ):
        open_rows(tmp_path / "d")
    assert len(open_rows(tmp_path / "d" / "train")) == len(ROWS)
    (tmp_path / "e").mkdir()
    with pytest.raises(MaxlmError, match="no saved dataset in this folder"):
        open_rows(tmp_path / "e")
