"""`maxlm tokenizer`: train or import tokenizers, try them, measure them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from maxlm.cli.common import JsonOption, TextArgument, TextFieldOption, print_json, print_table
from maxlm.config import MaxlmError
from maxlm.data.documents import SourceConfig, find_files, read_documents
from maxlm.runtime.progress import show_progress

app = typer.Typer(no_args_is_help=True, help="Train, import and try tokenizers.")

TokenizerArgument = Annotated[Path, Argument(help="A tokenizer's folder.")]


@app.command()
def train(
    context: typer.Context,
    text: TextArgument,
    out: Annotated[Path, Option(help="The tokenizer's folder.")],
    kind: Annotated[
        Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"],
        Option(help="Byte-level BPE, or a SentencePiece model."),
    ] = "bpe",
    vocab_size: Annotated[int, Option(min=1, help="Ids, special tokens included.")] = 8192,
    special: Annotated[list[str] | None, Option(help="A special token; repeatable.")] = None,
    bos: Annotated[str, Option(help="Opens a document.")] = "<|endoftext|>",
    eos: Annotated[str, Option(help="Closes a document.")] = "<|endoftext|>",
    pad: Annotated[str | None, Option(help="Pads.")] = None,
    chat: Annotated[Literal["chatml", "llama3"] | None, Option(help="The format of chats.")] = None,
    sample_bytes: Annotated[int, Option(min=1, help="Learn from the first so many.")] = 100_000_000,
    text_field: TextFieldOption = "text",
    force: Annotated[bool, Option("--force", help="Replace a tokenizer in --out.")] = False,
) -> None:
    """Learn a tokenizer from text."""
    from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer

    _require_free(out, force)
    given = {k: v for k, v in context.params.items() if k in TokenizerConfig.model_fields}
    config = TokenizerConfig(**given, extra_special_tokens=tuple(special or ()))
    with show_progress() as progress:
        tokenizer = train_tokenizer(config, _read_texts(text, text_field, progress, sample_bytes))
    tokenizer.save(out)
    print(f"{out}: {kind}, {tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:12]}")


@app.command("import")
def import_(
    source: Annotated[
        str, Argument(help="A Hugging Face folder; a tokenizer.json or SentencePiece file.")
    ],
    out: Annotated[Path, Option(help="The tokenizer's folder.")],
    bos: Annotated[str | None, Option(help="The token that opens a document.")] = None,
    eos: Annotated[str | None, Option(help="The token that closes a document.")] = None,
    pad: Annotated[str | None, Option(help="The token that pads.")] = None,
    force: Annotated[bool, Option("--force", help="Replace a tokenizer in --out.")] = False,
) -> None:
    """Take in someone else's tokenizer."""
    from maxlm.data.tokenizer import import_tokenizer

    _require_free(out, force)
    tokenizer = import_tokenizer(source, bos=bos, eos=eos, pad=pad)
    tokenizer.save(out)
    exact = "lossless" if tokenizer.lossless else "not every text comes back as it was"
    print(f"{out}: {tokenizer.vocab_size} tokens, {exact}, {tokenizer.fingerprint[:12]}")


@app.command()
def encode(
    tokenizer: TokenizerArgument,
    text: Annotated[str, Argument(help="The text; - reads standard input.")] = "-",
    allow_special: Annotated[bool, Option("--allow-special", help="Read special tokens.")] = False,
) -> None:
    """Print the ids of a text."""
    from maxlm.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    # Python keeps what the shell passed and is no UTF-8 as surrogates.
    given = text.encode("utf-8", "surrogateescape")
    source = typer.get_binary_stream("stdin").read() if text == "-" else given
    print(" ".join(map(str, loaded.encode(source, allow_special=allow_special))))


@app.command()
def decode(
    tokenizer: TokenizerArgument,
    ids: Annotated[list[str] | None, Argument(help="Ids; none, or -: standard input.")] = None,
) -> None:
    """Write the exact bytes of ids to standard output, with no line end added."""
    from maxlm.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    words = typer.get_text_stream("stdin").read().split() if ids in (None, ["-"]) else ids
    for word in words or ():
        if not (word.isascii() and word.isdigit()):
            raise MaxlmError(f"{word!r} is not a token id", fix="give whole numbers from 0 on")
    stream = typer.get_binary_stream("stdout")
    stream.write(loaded.decode_bytes(map(int, words or ())))
    stream.flush()


@app.command("stats")
def measure(
    tokenizer: TokenizerArgument,
    text: TextArgument,
    text_field: TextFieldOption = "text",
    as_json: JsonOption = False,
) -> None:
    """Measure bytes per token, vocabulary use and speed on text."""
    from maxlm.data.tokenizer import load_tokenizer, measure_tokenizer

    loaded = load_tokenizer(tokenizer)
    with show_progress() as progress:
        found = measure_tokenizer(loaded, _read_texts(text, text_field, progress))
    if as_json:
        print_json(found)
        return
    measures = {
        "documents": f"{found['documents']:,}",
        "bytes": f"{found['bytes']:,}",
        "tokens": f"{found['tokens']:,}",
        "bytes per token": f"{found['bytes_per_token']:.3f}",
        "tokens per word": f"{found['fertility']:.3f}",
        "unknown": f"{found['unknown_share']:.2%}",
        "vocabulary used": f"{found['vocabulary_use']:.1%} of {found['vocab_size']:,}",
        "speed": f"{found['megabytes_per_second']:.2f} MB/s",
    }
    print_table("measure", [str(tokenizer)], measures.items())


def _require_free(out: Path, force: bool) -> None:
    from maxlm.data.tokenizer import has_tokenizer_files

    if has_tokenizer_files(out) and not force:
        fix = "add --force to replace it, or choose another --out"
        raise MaxlmError("there is a tokenizer here already", where=str(out), fix=fix)


def _read_texts(
    text: list[str], text_field: str, progress: Callable[[str, int, int], None], limit: int = 2**63
) -> Iterator[bytes]:
    """Yield texts, and report their bytes against their files' size or ``limit``."""
    source = SourceConfig(documents=tuple(text), text_field=text_field, on_bad_bytes="replace")
    files = find_files(source).files
    total, done = min(sum(file.size for file in files), limit), 0
    for file in files:
        for document in read_documents(source, file):
            yield document.text
            done += len(document.text)
            # Compressed files hold more than their size, JSON less.
            progress("reading", min(done, total), total)
    if done < total:
        progress("reading", total, total)
