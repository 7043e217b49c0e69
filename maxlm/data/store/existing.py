"""Checks of a store that exists where one is to be built or appended to."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from maxlm.config import MaxlmError
from maxlm.data.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from maxlm.data.store.store import TokenStore

_SETTINGS = ("split", "heldout_fraction", "text_field", "on_bad_bytes", "piece_bytes")


def check_replaceable(out: Path, planned: Manifest, force: bool) -> Manifest | None:
    """The manifest of the store in `out` if it is the planned one; None if `out` may be written.

    Raises:
        MaxlmError: `out` holds something that is no store, a damaged store, or (without `force`)
            a store of other inputs; the message names the first difference.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        what = "this exists and is not a token store"
        raise MaxlmError(what, where=str(out), fix="choose another folder or remove it")
    if force:
        try:
            manifest = TokenStore.open(out).manifest
        except MaxlmError:
            return None
        return None if describe_difference(manifest, planned) else manifest
    manifest = read_manifest(out)
    if found := describe_difference(manifest, planned):
        fix = "choose another folder, or replace the store with --force (force=True)"
        raise MaxlmError(
            f"the store here was built from other inputs: {found}", where=str(out), fix=fix
        )
    return TokenStore.open(out).manifest


def is_appended(out: Path, existing: Manifest, planned: Manifest) -> bool:
    """Whether a segment of the store in `out` holds just the files of the planned one.

    Raises:
        MaxlmError: the planned one is read in another way, or some of its files are in the store,
            under the same path or one that may be the same, or all of them under others.
    """
    for found in _other_settings(existing, planned):
        fix = "give the store's settings, or build a store of its own and mix the two"
        raise MaxlmError(f"cannot append: {found}", where=str(out), fix=fix)
    files = [(source.name, source.sha256, source.format) for source in existing.sources]
    new = [(source.name, source.sha256, source.format) for source in planned.sources]
    start, selections = 0, (existing.selection or "").split("\n")
    for segment in existing.segments:
        same_files = files[start : start + segment.num_sources] == new
        if same_files and (planned.selection is None or planned.selection in selections):
            return True
        start += segment.num_sources
    names: dict[str, list[str]] = {}
    for source in existing.sources:
        names.setdefault(source.sha256, []).append(source.name)
    # By name, too: other documents may well hold the same text, a licence for one.
    all_there = all(source.sha256 in names for source in planned.sources)
    for source in planned.sources:
        for name in names.get(source.sha256, ()):
            if all_there or _may_be_one(name, source.name):
                told = "" if name == source.name else f", as {name}"
                what = f"{source.name} is already in the store{told}"
                fix = "append files that are new" if all_there else "leave it out"
                raise MaxlmError(what, where=str(out), fix=fix)
    return False


def _may_be_one(a: str, b: str) -> bool:
    """Whether two paths may be one as seen from two folders: one ends as the other is."""
    parts = [
        [part for part in PurePath(os.path.normpath(name)).parts if part not in ("/", "..")]
        for name in (a, b)
    ]
    shorter, longer = sorted(parts, key=len)
    return longer[len(longer) - len(shorter) :] == shorter


def describe_difference(existing: Manifest, planned: Manifest) -> str | None:
    """Describes the first input in which two manifests differ; None if their inputs are equal.

    Counts follow from the inputs and file names do not matter, so neither is compared.
    """
    return next(_differences(existing, planned), None)


def _differences(existing: Manifest, planned: Manifest) -> Iterator[str]:
    yield from _other_settings(existing, planned)
    if existing.selection != planned.selection:
        yield "the rules by which the corpus's documents are taken have changed"
    for old, new in zip(existing.sources, planned.sources, strict=False):
        if (old.sha256, old.format) != (new.sha256, new.format):
            same = old.name == new.name
            yield f"{new.name} has changed" if same else f"{old.name} where now {new.name} comes"
    old, new = len(existing.sources), len(planned.sources)
    if old != new:
        yield f"{old} files, now {new}"


def _other_settings(existing: Manifest, planned: Manifest) -> Iterator[str]:
    old, new = existing.tokenizer_fingerprint, planned.tokenizer_fingerprint
    if old != new:
        yield f"another tokenizer ({old[:12]}, now {new[:12]})"
    for name in _SETTINGS:
        old, new = getattr(existing, name), getattr(planned, name)
        if old != new:
            yield f"{name} was {old}, now {new}"
