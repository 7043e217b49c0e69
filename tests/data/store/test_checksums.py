"""A file that stands where another belongs, or differs in one bit, is found and
named."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from maxlm.cli.main import main
from maxlm.data.loader.batches import LoaderConfig, make_batches
from maxlm.data.loader.packing import open_best_fit
from maxlm.data.store.store import TokenStore
from tests.errors import message

RESTORE = "put the store back from a copy, or build it again with maxlm corpus build"


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_checksums(store: Path) -> None:
    """Leaves a store as one that was built before maxlm wrote checksums."""
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    for segment in manifest["segments"]:
        del segment["checksums_sha256"]
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    for listed in store.rglob("checksums.sha256"):
        listed.unlink()


def print_verify(folder: Path, capfd) -> tuple[int, str, str]:
    code = main(["corpus", "verify", str(folder)])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_exchanged_token_files_of_two_segments_are_found(appended, capfd):
    """They have the sizes and the chunk checksums of the right ones, and so are read as
    tokens."""
    before = TokenStore.open(appended)
    tokens = before.read(0, before.num_tokens)
    first, second = (
        appended / "tokens" / "c" / "1",
        appended / "segments/000001/tokens/c/1",
    )
    assert print_verify(appended, capfd)[0] == 0
    exchange(first, second)
    after = TokenStore.open(appended)
    assert not np.array_equal(after.read(0, after.num_tokens), tokens)
    others = "(and 1 other: segments/000001/tokens/c/1)"
    expected = (
        f"{first}: this file has changed since it was written {others}; {RESTORE}"
    )
    assert message(after.verify) == expected
    assert message(lambda: TokenStore.open(appended, verify=True)) == expected
    code, out, error = print_verify(appended, capfd)
    assert (code, out, error) == (2, "", f"error: {expected}\n")
    exchange(first, second)
    assert "all is well" in print_verify(appended, capfd)[1]


@pytest.mark.parametrize("name", ["tokens", "offsets"])
def test_a_store_without_checksums_says_so_once_and_is_compared_with_its_manifest(
    appended, capfd, name
):
    remove_checksums(appended)
    code, out, error = print_verify(appended, capfd)
    assert (code, out.count("all is well"), error.count("without checksums")) == (
        0,
        1,
        1,
    )
    assert error.startswith(
        f"{appended}: an earlier maxlm wrote segment 0, 1, 2 without"
    )
    second, third = (
        appended / "segments" / number / name for number in ("000001", "000002")
    )
    exchange(second, third)
    error_text = message(lambda: TokenStore.open(appended, verify=True))
    if name == "tokens":
        place = f"{second}: the tokens of segment 1 are not those that were written"
        assert error_text == f"{place}; {RESTORE}"
    else:
        assert f"{appended}: damaged store: offsets " in error_text


def test_a_segment_of_another_store_is_no_segment_of_this(appended):
    """With the list of checksums that belongs to it."""
    exchange(appended / "segments/000001", appended / "segments/000002")
    error_text = message(lambda: TokenStore.open(appended, verify=True))
    listed = appended / "segments/000001/checksums.sha256"
    assert (
        error_text == f"{listed}: this file has changed since it was written; {RESTORE}"
    )


@pytest.mark.parametrize(
    "name", ["tokens/c/1", "offsets/zarr.json", "tokenizer/double.json"]
)
def test_one_bit_or_a_lost_file_is_found_and_sha256sum_agrees(appended, name):
    """Every file but the manifest, and what comes later, is in the list."""
    lines = (appended / "checksums.sha256").read_text().splitlines()
    paths = {
        path.relative_to(appended) for path in appended.rglob("*") if path.is_file()
    }
    first_segment = {path.as_posix() for path in paths if path.parts[0] != "segments"}
    assert {line[66:] for line in lines} == first_segment - {
        "manifest.json",
        "checksums.sha256",
    }
    check = ["sha256sum", "--quiet", "-c", "checksums.sha256"]
    assert subprocess.run(check, cwd=appended, check=False).returncode == 0
    store = TokenStore.open(appended)
    flip_bit(appended / name)
    expected = (
        f"{appended / name}: this file has changed since it was written; {RESTORE}"
    )
    assert message(store.verify) == expected
    assert message(lambda: TokenStore.open(appended, verify=True)) == expected
    assert subprocess.run(check, cwd=appended, check=False).returncode == 1
    (appended / name).unlink()
    assert (
        message(store.verify) == f"{appended / name}: this file is missing; {RESTORE}"
    )


def test_several_changed_files_are_all_told(appended):
    for name in ("tokens/c/0", "offsets/c/0"):
        flip_bit(appended / name)
    error_text = message(TokenStore.open(appended).verify)
    changed = "this file has changed since it was written (and 1 other: tokens/c/0)"
    assert error_text == f"{appended}/offsets/c/0: {changed}; {RESTORE}"


def test_a_lost_or_cut_list_is_damage(appended):
    path = appended / "checksums.sha256"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    store = TokenStore.open(appended)
    assert (
        message(store.verify)
        == f"{path}: this file has changed since it was written; {RESTORE}"
    )
    path.unlink()
    assert message(store.verify) == f"{path}: this file is missing; {RESTORE}"


def open_index(store: Path, block: int, *, verify: bool = True) -> None:
    _ = open_best_fit(TokenStore.open(store), 32, block, verify=verify).index


def test_files_of_two_packing_indices_are_not_exchanged_unnoticed(appended, capfd):
    for block in (40, 60):
        open_index(appended, block)
    first, second = sorted((appended / "packing").iterdir())
    exchange(first / "pieces.npy", second / "pieces.npy")
    open_index(appended, 40, verify=False)
    expected = f"{first}/pieces.npy: this file has changed since it was written; delete its folder,"
    assert message(lambda: open_index(appended, 40)).startswith(expected)
    assert print_verify(appended, capfd)[2].startswith(f"error: {expected}")
    exchange(first / "pieces.npy", second / "pieces.npy")
    flip_bit(second / "sequence_offsets.npy")
    assert "sequence_offsets.npy: this file has changed" in message(
        lambda: open_index(appended, 60)
    )
    flip_bit(second / "sequence_offsets.npy")
    exchange(first, second)
    assert (
        f"{first}: this folder holds the packing index {second.name}; delete this"
        in message(lambda: open_index(appended, 40))
    )
    exchange(first, second)
    for path in (second / "index.json", second / "checksums.sha256"):
        path.unlink()
    code, _, error = print_verify(appended, capfd)
    assert (code, error.count("\n")) == (0, 1)
    assert error.startswith(
        f"{second}: an earlier maxlm wrote this packing index without checksums"
    )


def test_the_loader_verifies_its_index_where_it_is_told_to(appended):
    config = LoaderConfig(
        seq_len=32, batch_size=4, packing="best_fit", packing_block=40
    )
    store = TokenStore.open(appended)
    make_batches({"a": store}, {"a": 1}, config, seed=0)
    (folder,) = (appended / "packing").iterdir()
    flip_bit(folder / "pieces.npy")
    make_batches({"a": store}, {"a": 1}, config, seed=0)
    verified = config.model_copy(update={"verify": True})
    error_text = message(lambda: make_batches({"a": store}, {"a": 1}, verified, seed=0))
    assert "pieces.npy: this file has changed" in error_text
