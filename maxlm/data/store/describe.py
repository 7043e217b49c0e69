"""A token store's description, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maxlm.data.store.store import TokenStore

if TYPE_CHECKING:
    from rich.table import Table


def describe(store: TokenStore) -> dict[str, Any]:
    """The manifest as JSON values, with `path`, `bytes_on_disk` (0: not on a disk here) and
    `bytes_per_token`.

    Bytes per token counts bos and eos among the tokens.
    """
    files = store.path.rglob("*") if store.path else ()
    derived = {
        "path": str(store.place),
        "bytes_on_disk": sum(path.stat().st_size for path in files if path.is_file()),
        "bytes_per_token": store.manifest.text_bytes / store.num_tokens,
    }
    return derived | store.manifest.model_dump(mode="json")


def summary_table(store: TokenStore) -> Table:
    """The description as a two-column table, with the sources summed up."""
    from rich.table import Table

    about, manifest = describe(store), store.manifest
    left_out = sum(source.num_left_out for source in manifest.sources)
    dropped = sum(source.num_dropped for source in manifest.sources)
    split = manifest.split
    bos = "none" if manifest.bos_id is None else manifest.bos_id
    if split != "all":
        split = f"{split} ({manifest.heldout_fraction:g} of documents held out)"
    rows = {
        "tokens": f"{manifest.num_tokens:,} ({manifest.dtype})",
        "documents": f"{manifest.num_documents:,}",
        "segments": f"{len(manifest.segments):,}",
        "text": f"{manifest.text_bytes:,} bytes",
        "bytes per token": f"{about['bytes_per_token']:.3f}",
        "on disk": f"{about['bytes_on_disk']:,} bytes" if store.path else "elsewhere",
        "split": split,
        "source files": f"{len(manifest.sources):,}",
        "left out": f"{left_out:,} empty or undecodable documents, "
        f"{manifest.num_binary_files:,} binary files, {dropped:,} documents that rules dropped",
        "vocabulary": f"{manifest.vocab_size:,} (bos {bos}, eos {manifest.eos_id})",
        "tokenizer": manifest.tokenizer_fingerprint[:16],
    }
    table = Table(title=str(store.place), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
