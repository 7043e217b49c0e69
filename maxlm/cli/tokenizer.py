"""`maxlm tokenizer`: train or import tokenizers, try them, measure them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from maxlm.data.corpus import SourceConfig
    from maxlm.data.tokenizer import TokenizerStats

app = typer.Typer(no_args_is_help=True, help="Train, import and try tokenizers.")

TokenizerArgument = Annotated[Path, typer.Argument(help="A tokenizer's folder.")]
TextArgument = Annotated[
    list[str],
    typer.Argument(help="Files, folders, quoted globs, or python-stdlib.", metavar="TEXT..."),
]


@app.command()
def train(
    text: TextArgument,
    out: Annotated[Path, typer.Option(help="The tokenizer's folder.")],
    kind: Annotated[
        Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"],
        typer.Option(help="Byte-level BPE, or a SentencePiece model."),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(min=1, help="Ids, special tokens included.")] = 8192,
    special: Annotated[
        list[str] | None, typer.Option(help="A further special token; may be repeated.")
    ] = None,
    sample_bytes: Annotated[
        int, typer.Option(min=1, help="Learn from the first so many bytes.")
    ] = 100_000_000,
    text_field: Annotated[str, typer.Option(help="JSON key or Parquet column.")] = "text",
    force: Annotated[bool, typer.Option("--force", help="Replace a tokenizer in --out.")] = False,
) -> None:
    """Learn a tokenizer from text."""
    from maxlm.data.store.progress import show_progress
    from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer

    _require_free(out, force)
    source = _source(text, text_field)
    with show_progress() as progress:
        config = TokenizerConfig(
            kind=kind,
            vocab_size=vocab_size,
            extra_special_tokens=tuple(special or ()),
            sample_bytes=sample_bytes,
        )
        tokenizer = train_tokenizer(config, _counted(source, sample_bytes, progress))
    tokenizer.save(out)
    typer.echo(f"{out}: {kind}, {tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:12]}")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint's folder.")],
    out: Annotated[Path, typer.Option(help="The tokenizer's folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a tokenizer in --out.")] = False,
) -> None:
    """Take in the tokenizer of a Hugging Face checkpoint."""
    from maxlm.data.tokenizer import import_tokenizer

    _require_free(out, force)
    tokenizer = import_tokenizer(checkpoint)
    tokenizer.save(out)
    exact = "lossless" if tokenizer.lossless else "not every text comes back as it was"
    typer.echo(f"{out}: {tokenizer.vocab_size} tokens, {exact}, {tokenizer.fingerprint[:12]}")


@app.command()
def export(
    tokenizer: TokenizerArgument,
    out: Annotated[Path, typer.Option(help="Where to write; other files there stay.")],
) -> None:
    """Write a tokenizer's files for other tools, an imported one's as they came."""
    from maxlm.data.tokenizer import export_tokenizer

    export_tokenizer(tokenizer, out)


@app.command()
def encode(
    tokenizer: TokenizerArgument,
    text: Annotated[str, typer.Argument(help="The text; - reads standard input.")] = "-",
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Special tokens' literals give their ids.")
    ] = False,
) -> None:
    """Print the ids of a text."""
    from maxlm.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    source = typer.get_binary_stream("stdin").read() if text == "-" else _argument_bytes(text)
    typer.echo(" ".join(map(str, loaded.encode(source, allow_special=allow_special))))


@app.command()
def decode(
    tokenizer: TokenizerArgument,
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids; none, or -, reads standard input.")
    ] = None,
) -> None:
    """Write the exact bytes of ids to standard output, with no line end added."""
    from maxlm.config import MaxlmError
    from maxlm.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    words = typer.get_text_stream("stdin").read().split() if ids in (None, ["-"]) else ids
    for word in words or ():
        if not (word.isascii() and word.isdigit()):
            raise MaxlmError(f"{word!r} is not a token id", fix="give whole numbers from 0 on")
    stream = typer.get_binary_stream("stdout")
    stream.write(loaded.decode_bytes(map(int, words or ())))
    stream.flush()


@app.command()
def stats(
    tokenizer: TokenizerArgument,
    text: TextArgument,
    text_field: Annotated[str, typer.Option(help="JSON key or Parquet column.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure bytes per token, vocabulary use and speed on text."""
    from maxlm.data.store.progress import show_progress
    from maxlm.data.tokenizer import load_tokenizer, tokenizer_stats

    loaded = load_tokenizer(tokenizer)
    with show_progress() as progress:
        found = tokenizer_stats(loaded, _counted(_source(text, text_field), None, progress))
    if as_json:
        import json

        typer.echo(json.dumps(found.as_dict()))
    else:
        _print_table(str(tokenizer), found)


def _require_free(out: Path, force: bool) -> None:
    from maxlm.config import MaxlmError
    from maxlm.data.tokenizer import holds_tokenizer

    if holds_tokenizer(out) and not force:
        raise MaxlmError(
            "there is a tokenizer here already",
            where=str(out),
            fix="add --force to replace it, or choose another --out",
        )


def _source(text: list[str], text_field: str) -> "SourceConfig":
    """Undecodable bytes are kept: a tokenizer takes any."""
    from maxlm.data.corpus import SourceConfig

    return SourceConfig(documents=tuple(text), text_field=text_field, on_bad_bytes="keep")


def _counted(
    source: "SourceConfig", limit: int | None, progress: Callable[[str, int, int], None]
) -> Iterator[bytes]:
    """The texts of a source, their bytes reported against the size of its files or ``limit``."""
    from maxlm.data.corpus import list_files, read_documents

    files = list_files(source)
    total = sum(file.size for file in files)
    total = min(total, limit) if limit else total
    done = 0
    for file in files:
        for document in read_documents(source, file):
            yield document.text
            done += len(document.text)
            # Compressed files hold more than their size, JSON less.
            progress("reading", min(done, total), total)
    if done < total:
        progress("reading", total, total)


def _argument_bytes(text: str) -> bytes:
    """The bytes the shell passed; Python hides those that are not UTF-8 in surrogates."""
    return text.encode("utf-8", "surrogateescape")


def _print_table(title: str, found: "TokenizerStats") -> None:
    from rich.console import Console
    from rich.table import Table

    rows: Iterable[tuple[str, str]] = (
        ("documents", f"{found.documents:,}"),
        ("bytes", f"{found.bytes:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("bytes per token", f"{found.bytes_per_token:.3f}"),
        (
            "vocabulary used",
            f"{found.used_ids:,} of {found.vocab_size:,} ({found.vocabulary_use:.1%})",
        ),
        ("speed", f"{found.megabytes_per_second:.2f} MB/s"),
    )
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
