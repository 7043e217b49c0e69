"""`maxlm corpus`: build token stores and look into them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, help="Build token stores and look into them.")

StoreArgument = Annotated[Path, typer.Argument(help="A token store's folder.")]


@app.command()
def build(
    text: Annotated[
        list[str],
        typer.Argument(help="Files, folders, quoted globs, or python-stdlib.", metavar="TEXT..."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer's folder.")],
    out: Annotated[Path, typer.Option(help="The store's folder; appears when complete.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a core.")
    ] = None,
    split: Annotated[
        Literal["all", "train", "heldout"], typer.Option(help="Which documents to take.")
    ] = "all",
    heldout_fraction: Annotated[
        float, typer.Option(help="Share of documents held out, by a hash of their text.")
    ] = 0.01,
    text_field: Annotated[str, typer.Option(help="JSON key or Parquet column.")] = "text",
    on_bad_bytes: Annotated[
        Literal["error", "replace", "keep", "skip"],
        typer.Option(help="What to do with text that is not valid UTF-8."),
    ] = "error",
    piece_bytes: Annotated[
        int | None, typer.Option(min=1, help="Cut longer text files into pieces, at line ends.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a store of other inputs.")
    ] = False,
) -> None:
    """Tokenize documents into a token store. Run it again after an interruption to go on."""
    from maxlm.data.corpus import SourceConfig
    from maxlm.data.store import build_store
    from maxlm.data.store.progress import show_progress

    source = SourceConfig(
        documents=tuple(text),
        text_field=text_field,
        on_bad_bytes=on_bad_bytes,
        piece_bytes=piece_bytes,
    )
    with show_progress() as progress:
        build_store(
            source,
            tokenizer,
            out,
            split=split,
            heldout_fraction=heldout_fraction,
            workers=workers,
            progress=progress,
            force=force,
        )
    info(out)


@app.command()
def info(
    store: StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    full: Annotated[bool, typer.Option("--verify", help="Read and check every token.")] = False,
) -> None:
    """Show what a store holds, after checking that its arrays have the sizes it claims."""
    from maxlm.data.store import TokenStore
    from maxlm.data.store.describe import describe, summary_table

    opened = TokenStore.open(store)
    if full:
        opened.verify()
    if as_json:
        import json

        typer.echo(json.dumps(describe(opened), indent=1))
    else:
        from rich.console import Console

        Console().print(summary_table(opened))


@app.command()
def show(
    store: StoreArgument,
    index: Annotated[int, typer.Argument(help="The document's number, from 0.")],
    tokens: Annotated[bool, typer.Option("--tokens", help="Print token ids instead.")] = False,
) -> None:
    """Print a document of a store, decoded with the tokenizer that made it."""
    from maxlm.data.store import TokenStore, check_tokenizer
    from maxlm.data.tokenizer import load_tokenizer

    opened = TokenStore.open(store)
    if tokens:
        typer.echo(" ".join(map(str, opened.document(index).tolist())))
        return
    tokenizer = load_tokenizer(opened.tokenizer_folder)
    check_tokenizer(opened, tokenizer)
    # Bytes, so that a document's own line ends and undecodable bytes come out as they went in.
    stream = typer.get_binary_stream("stdout")
    stream.write(tokenizer.decode_bytes(opened.text_tokens(index).tolist()))
    stream.flush()
