"""Which files a corpus is made of, and in which order."""

import gzip
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.crawl import CrawlSource
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import read_documents


def names(config: SourceConfig, root: Path) -> list[str]:
    return [file.path.relative_to(root).as_posix() for file in find_files(config).files]


def write(root: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_folder_is_walked_in_sorted_order_without_hidden_and_binary_files(tmp_path):
    write(tmp_path, b_txt=b"b", a__z_md=b"z", a_txt=b"a", c_jsonl=b"{}", _hidden=b"h")
    write(tmp_path, image_bin=b"x" * 8191 + b"\0", late_bin=b"x" * 8192 + b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "packed.bin.gz").write_bytes(gzip.compress(b"\0"))
    config = SourceConfig(documents=(str(tmp_path),))
    assert names(config, tmp_path) == [
        "a.txt",
        "a/z.md",
        "b.txt",
        "c.jsonl",
        "late.bin",
    ]
    assert find_files(config).num_binary_files == 2


def test_formats_that_say_what_is_broken_are_never_binary(tmp_path):
    write(
        tmp_path,
        a_jsonl=b'{"text": "a"}\n\0\n',
        b_html="<p>b".encode("utf-16"),
        c_txt=b"c\0",
    )
    (tmp_path / "d.ndjson.gz").write_bytes(gzip.compress(b"\0"))
    crawl = CrawlSource(name="web", documents=(str(tmp_path),))
    listing = find_files(crawl)
    assert [file.path.name for file in listing.files] == [
        "a.jsonl",
        "b.html",
        "d.ndjson.gz",
    ]
    assert listing.num_binary_files == 1
    # Without a stage that finds out its encoding, this page is no text.
    source = SourceConfig(documents=(str(tmp_path),))
    assert names(source, tmp_path) == ["a.jsonl", "d.ndjson.gz"]


def test_entries_keep_their_order_and_a_file_is_listed_once(tmp_path):
    write(tmp_path, a_txt=b"a", b_txt=b"b", c_txt=b"c")
    config = SourceConfig(documents=(str(tmp_path / "b.txt"), f"{tmp_path}/*.txt"))
    assert names(config, tmp_path) == ["b.txt", "a.txt", "c.txt"]


def test_glob_reaches_folders_and_subfolders(tmp_path):
    write(tmp_path, x__a_txt=b"a", y__deep__b_txt=b"b", y__c_md=b"c")
    shallow = SourceConfig(documents=(f"{tmp_path}/*",))
    assert names(shallow, tmp_path) == ["x/a.txt", "y/c.md", "y/deep/b.txt"]
    deep = SourceConfig(documents=(f"{tmp_path}/**/*.txt",))
    assert names(deep, tmp_path) == ["x/a.txt", "y/deep/b.txt"]


def test_formats_by_suffix(tmp_path):
    write(
        tmp_path,
        a_JSONL=b"",
        b_ndjson_gz=b"",
        c_parquet=b"",
        d_txt_zst=b"",
        e=b"",
        f_py_gz=b"",
    )
    files = [
        find_files(SourceConfig(documents=(str(path),))).files[0]
        for path in sorted(tmp_path.iterdir())
    ]
    formats = [file.format for file in files]
    assert formats == ["jsonl", "jsonl", "parquet", "text", "text", "text"]
    compressions = [file.compression for file in files]
    assert compressions == ["none", "gz", "none", "zst", "none", "gz"]


def test_python_stdlib_is_what_every_installation_of_it_has():
    config = SourceConfig(documents=("python-stdlib",))
    files = find_files(config).files
    assert files == find_files(config).files
    # 10.2 to 10.7 MB on the Pythons tried; 31.5 MB with its tests, which distributions
    # leave out.
    assert 8e6 < sum(file.size for file in files) < 13e6
    assert all(file.name.endswith(".py") for file in files)
    parts = {part for file in files for part in Path(file.name).parts}
    assert not parts & {"test", "tests", "idlelib", "tkinter", "site-packages"}
    os_file = next(file for file in files if file.name == "os.py")
    [document] = read_documents(config, os_file)
    assert document.id == "os.py"
    assert document.text == Path(sysconfig.get_path("stdlib"), "os.py").read_bytes()


def test_an_installed_package_is_its_source_with_tests():
    files = find_files(SourceConfig(documents=("python-package:numpy",))).files
    home = Path(np.__file__).parent
    paths = [path for path in home.rglob("*.py") if path.is_file()]
    expected = {path.relative_to(home.parent).as_posix() for path in paths}
    assert {file.name for file in files} == expected
    assert any("/tests/" in file.name for file in files)


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        (
            "no.txt",
            None,
            "no such file or folder; give a file, a folder, a quoted glob, python",
        ),
        (
            "*.txt",
            None,
            "the pattern matches nothing; check the pattern (and quote it, so that",
        ),
        (
            "",
            b"\0",
            "no text files here (1 binary files skipped); name a folder or files that",
        ),
        (
            "a.parquet.gz",
            b"",
            "Parquet inside another compression cannot be read in pieces; dec",
        ),
    ],
)
def test_entries_that_are_refused(tmp_path, name, data, fault):
    if data is not None:
        (tmp_path / (name or "a.bin")).write_bytes(data)
    entry = f"{tmp_path}/{name}".rstrip("/")
    with pytest.raises(MaxlmError) as caught:
        find_files(SourceConfig(documents=(entry,)))
    assert str(caught.value).startswith(f"{entry}: {fault}")


@pytest.mark.parametrize("name", ["none_such", "numpy.linalg", "math", ""])
def test_a_package_that_is_not_installed_is_refused(name):
    with pytest.raises(MaxlmError) as caught:
        find_files(SourceConfig(documents=(f"python-package:{name}",)))
    assert str(caught.value) == (
        f"python-package:{name}: no package {name!r} is installed in this Python's "
        "environment; install it, or name another that is imported so, such as "
        "python-package:numpy"
    )


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("text")
    pipe = SourceConfig(documents=(str(tmp_path / "a.txt"),))
    message = r"a\.txt: neither a file nor a folder, but a pipe"
    with pytest.raises(MaxlmError, match=message):
        find_files(pipe)
    # In a folder it is passed over.
    (file,) = find_files(SourceConfig(documents=(str(tmp_path),))).files
    assert Path(file.path).name == "b.txt"
