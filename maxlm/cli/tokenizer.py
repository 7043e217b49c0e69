"""`maxlm tokenizer`: train or import tokenizers, try them, measure them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from maxlm.cli.common import (
    JsonOption,
    TextArgument,
    TextFieldOption,
    print_json,
    print_table,
)
from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import check_corpus_packages, find_files
from maxlm.data.documents.reader import read_documents
from maxlm.runtime.progress import show_progress

app = typer.Typer(
    no_args_is_help=True, help="Train, import, compare and try tokenizers."
)

TokenizerArgument = Annotated[Path, Argument(help="A tokenizer's folder.")]


@app.command()
def train(
    text: TextArgument,
    out: Annotated[Path, Option(help="The tokenizer's folder.")],
    kind: Annotated[
        Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram", "wordpiece"],
        Option(help="Byte-level BPE, a SentencePiece model, or BERT's WordPiece."),
    ] = "bpe",
    vocab_size: Annotated[
        int, Option(min=1, help="Ids, special tokens included.")
    ] = 8192,
    special: Annotated[
        list[str] | None, Option(help="A special token; repeatable.")
    ] = None,
    bos: Annotated[
        str, Option(help="The token that opens a document.")
    ] = "<|endoftext|>",
    eos: Annotated[
        str, Option(help="The token that closes a document.")
    ] = "<|endoftext|>",
    pad: Annotated[str | None, Option(help="The token that pads.")] = None,
    chat: Annotated[
        Literal["chatml", "llama3"] | None, Option(help="The chat template.")
    ] = None,
    lowercase: Annotated[
        bool, Option("--lowercase", help="wordpiece: fold case and accents.")
    ] = False,
    sample_bytes: Annotated[
        int, Option(min=1, help="Learn from the first so many bytes.")
    ] = 100_000_000,
    text_field: TextFieldOption = "text",
    force: Annotated[
        bool, Option("--force", help="Replace a tokenizer in --out.")
    ] = False,
) -> None:
    """Train a tokenizer on text."""
    from maxlm.data.tokenizer.config import TokenizerConfig
    from maxlm.data.tokenizer.train import train_tokenizer

    _require_no_tokenizer(out, force)
    config = TokenizerConfig(
        kind=kind,
        vocab_size=vocab_size,
        bos=bos,
        eos=eos,
        pad=pad,
        chat=chat,
        lowercase=lowercase,
        sample_bytes=sample_bytes,
        extra_special_tokens=tuple(special or ()),
    )
    with show_progress() as progress:
        texts = _read_texts(text, text_field, progress, limit=sample_bytes)
        tokenizer = train_tokenizer(config, texts)
    tokenizer.save(out)
    print(f"{out}: {kind}, {tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:12]}")


@app.command("import")
def import_(
    source: Annotated[
        str,
        Argument(
            help="A Hugging Face folder; a tokenizer.json, SentencePiece or .tiktoken "
            "file."
        ),
    ],
    out: Annotated[Path, Option(help="The tokenizer's folder.")],
    bos: Annotated[str | None, Option(help="The token that opens a document.")] = None,
    eos: Annotated[str | None, Option(help="The token that closes a document.")] = None,
    pad: Annotated[str | None, Option(help="The token that pads.")] = None,
    pattern: Annotated[
        str | None,
        Option(
            help="How a .tiktoken file splits text: gpt2, cl100k_base (Llama 3), "
            "o200k_base (gpt-oss), qwen2, tekken, or a regex."
        ),
    ] = None,
    special: Annotated[
        list[str] | None,
        Option(
            help="LITERAL or LITERAL=ID: a special token of a .tiktoken file; "
            "repeatable."
        ),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Replace a tokenizer in --out.")
    ] = False,
) -> None:
    """Import another program's tokenizer."""
    from maxlm.data.tokenizer.load import import_tokenizer

    _require_no_tokenizer(out, force)
    tokenizer = import_tokenizer(
        source,
        bos=bos,
        eos=eos,
        pad=pad,
        pattern=pattern,
        special_tokens=dict(map(_parse_special_token, special or ())),
    )
    tokenizer.save(out)
    exact = "lossless" if tokenizer.lossless else "not every text comes back as it was"
    print(
        f"{out}: {tokenizer.vocab_size} tokens, {exact}, {tokenizer.fingerprint[:12]}"
    )


@app.command()
def export(
    tokenizer: TokenizerArgument,
    out: Annotated[Path, Option(help="Folder to write to; other files there stay.")],
) -> None:
    """Write a tokenizer's files for other tools; an imported tokenizer's unchanged."""
    from maxlm.data.tokenizer.load import export_tokenizer, load_tokenizer

    export_tokenizer(load_tokenizer(tokenizer), out)
    print(f"{out}: the files of {tokenizer}")


@app.command()
def encode(
    tokenizer: TokenizerArgument,
    text: Annotated[str, Argument(help="The text; - reads standard input.")] = "-",
    allow_special: Annotated[
        bool, Option("--allow-special", help="Read special tokens.")
    ] = False,
) -> None:
    """Print the ids of a text."""
    from maxlm.data.tokenizer.load import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if text == "-":
        source = typer.get_binary_stream("stdin").read()
    else:
        # Python keeps what the shell passed and is no UTF-8 as surrogates.
        source = text.encode("utf-8", "surrogateescape")
    ids = loaded.encode(source, allow_special=allow_special)
    print(" ".join(map(str, ids)))


@app.command()
def decode(
    tokenizer: TokenizerArgument,
    ids: Annotated[
        list[str] | None, Argument(help="Ids; none, or -: standard input.")
    ] = None,
) -> None:
    """Write the exact bytes of ids to standard output, without a newline."""
    from maxlm.data.tokenizer.load import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if ids is None or ids == ["-"]:
        words = typer.get_text_stream("stdin").read().split()
    else:
        words = ids
    for word in words:
        if not (word.isascii() and word.isdigit()):
            message = f"{word!r} is not a token id"
            raise MaxlmError(message, fix="give whole numbers from 0 on")
    stream = typer.get_binary_stream("stdout")
    stream.write(loaded.decode_bytes(map(int, words)))
    stream.flush()


@app.command("stats")
def measure(
    tokenizer: TokenizerArgument,
    text: TextArgument,
    text_field: TextFieldOption = "text",
    as_json: JsonOption = False,
) -> None:
    """Measure bytes per token, vocabulary use and speed on text."""
    from maxlm.data.tokenizer.load import load_tokenizer
    from maxlm.data.tokenizer.stats import measure_tokenizer

    loaded = load_tokenizer(tokenizer)
    with show_progress() as progress:
        measures = measure_tokenizer(loaded, _read_texts(text, text_field, progress))
    if as_json:
        print_json(measures)
        return
    print_table("measure", [str(tokenizer)], _format_measures([measures]))


@app.command()
def compare(
    first: Annotated[
        str, Argument(help="A tokenizer's folder, or what `import` takes.")
    ],
    second: Annotated[str, Argument(help="Another.")],
    text: TextArgument,
    by_language: Annotated[
        bool, Option("--by-language", help="Group by language.")
    ] = False,
    text_field: TextFieldOption = "text",
    as_json: JsonOption = False,
) -> None:
    """Measure two tokenizers on the same text: bytes per token of each TEXT, tokens per
    word, unknown tokens, vocabulary use and speed."""
    from maxlm.data.tokenizer.files import METADATA
    from maxlm.data.tokenizer.load import import_tokenizer, load_tokenizer
    from maxlm.data.tokenizer.stats import compare_tokenizers

    tokenizers = {}
    for name in (first, second):
        is_saved = (Path(name) / METADATA).exists()
        tokenizers[name] = load_tokenizer(name) if is_saved else import_tokenizer(name)
    with show_progress() as progress:
        # Grouped by the argument that names it, or by its language.
        texts: Iterable[tuple[str, bytes]] = (
            (argument, document)
            for argument in text
            for document in _read_texts([argument], text_field, progress)
        )
        if by_language:
            texts = _group_by_language(texts)
        measures_by_group = compare_tokenizers(tokenizers, texts)
    if as_json:
        print_json(measures_by_group)
        return
    rows = []
    for group, measures_by_name in measures_by_group.items():
        cells = [
            f"{measures['bytes_per_token']:.3f} ({measures['fertility']:.2f})"
            for measures in measures_by_name.values()
        ]
        megabytes = measures_by_name[first]["bytes"] / 1e6
        rows.append((group, f"{megabytes:,.2f}", *cells))
    title = "bytes per token (tokens per word)"
    print_table("group", ["MB", *tokenizers], rows, title=title)
    *_, total = measures_by_group.values()
    print_table("all texts", list(tokenizers), _format_measures(list(total.values())))


def _format_measures(measured: Sequence[Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Make a row for each measure, with a column for each tokenizer that was
    measured."""
    forms = {
        "documents": "{documents:,}",
        "bytes": "{bytes:,}",
        "tokens": "{tokens:,}",
        "bytes per token": "{bytes_per_token:.3f}",
        "tokens per word": "{fertility:.3f}",
        "unknown": "{unknown_share:.2%}",
        "vocabulary used": "{vocabulary_use:.1%} of {vocab_size:,}",
        "speed": "{megabytes_per_second:.2f} MB/s",
    }
    rows = []
    for name, form in forms.items():
        cells = [form.format_map(measures) for measures in measured]
        rows.append((name, *cells))
    return rows


def _group_by_language(
    texts: Iterable[tuple[str, bytes]],
) -> Iterator[tuple[str, bytes]]:
    """Yield each text after its detected language."""
    check_corpus_packages("--by-language")
    import pyarrow as pa

    from maxlm.corpus.stages.language import LanguageStage

    label_batch = LanguageStage().make_batch_label_fn()
    for _, text in texts:
        rows = pa.record_batch({"text": [text.decode("utf-8", "replace")]})
        yield label_batch(rows).column("name")[0].as_py(), text


def _parse_special_token(option: str) -> tuple[str, int | None]:
    """Parse LITERAL or LITERAL=ID; a literal may hold "=" itself."""
    literal, equals, number = option.rpartition("=")
    if equals and literal and number.isascii() and number.isdigit():
        return literal, int(number)
    return option, None


def _require_no_tokenizer(out: Path, force: bool) -> None:
    """Refuse a folder with a tokenizer, which is not to be replaced."""
    from maxlm.data.tokenizer.files import has_tokenizer_files

    if has_tokenizer_files(out) and not force:
        fix = "add --force to replace it, or choose another --out"
        raise MaxlmError("there is a tokenizer here already", where=str(out), fix=fix)


def _read_texts(
    text: list[str],
    text_field: str,
    progress: Callable[[str, int, int], None],
    limit: int = 2**63,
) -> Iterator[bytes]:
    """Yield texts, and report their bytes against their files' size.

    Args:
        limit: most bytes that are read, by which progress is reported too.
    """
    source = SourceConfig(
        documents=tuple(text), text_field=text_field, on_bad_bytes="replace"
    )
    files = find_files(source).files
    total = min(sum(file.size for file in files), limit)
    done = 0
    for file in files:
        for document in read_documents(source, file):
            yield document.text
            done += len(document.text)
            # Compressed files hold more than their size, JSON less.
            progress("reading", min(done, total), total)
    if done < total:
        progress("reading", total, total)
