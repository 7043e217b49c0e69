"""The verbs of `maxlm corpus` that build token stores, check them and mix them."""

from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from maxlm.cli.common import (
    JsonOption,
    SettingsArgument,
    TextArgument,
    TextFieldOption,
    WorkersOption,
    make_numeric_table,
    open_console,
    print_json,
)

StoreArgument = Annotated[str, Argument(help="A token store: a folder, s3://... or gs://...")]


def build(
    text: TextArgument,
    tokenizer: Annotated[Path, Option(help="A tokenizer's folder.")],
    out: Annotated[Path, Option(help="The store's folder; appears when complete.")],
    workers: WorkersOption = None,
    split: Annotated[
        Literal["all", "train", "heldout"], Option(help="Which documents to take.")
    ] = "all",
    heldout_fraction: Annotated[float, Option(help="Share held out, by hashes of texts.")] = 0.01,
    text_field: TextFieldOption = "text",
    on_bad_bytes: Annotated[
        Literal["error", "replace", "keep", "skip"],
        Option(help="What to do with text that is not valid UTF-8."),
    ] = "error",
    piece_bytes: Annotated[int | None, Option(min=1, help="Cut text files at line ends.")] = None,
    force: Annotated[bool, Option("--force", help="Replace a store of other inputs.")] = False,
    join: Annotated[bool, Option("--join", help="Work beside other builders of it.")] = False,
) -> None:
    """Tokenize documents into a token store. Run it again after an interruption to go on."""
    from maxlm.data.documents import SourceConfig
    from maxlm.data.documents.files import find_folder_format, resolve_glob
    from maxlm.data.store import build_store
    from maxlm.runtime.progress import show_progress

    reading: dict[str, Any] = {"on_bad_bytes": on_bad_bytes, "piece_bytes": piece_bytes}
    source = SourceConfig(documents=tuple(text), text_field=text_field, **reading)
    options: dict[str, Any] = {"split": split, "heldout_fraction": heldout_fraction}
    options |= {"workers": workers, "force": force, "join": join}
    with show_progress() as progress:
        build_store(source, tokenizer, out, progress=progress, **options)
    show_info(str(out))
    for root in chain.from_iterable(map(resolve_glob, text)):
        if find_folder_format(root) == "corpus":
            _print_lost(root)


def _print_lost(folder: Path) -> None:
    """Print how much of what a corpus's rules drop as duplicates is in no kept document."""
    from maxlm.corpus.opened import OpenCorpus
    from maxlm.corpus.report import estimate_text_lost_to_dedup
    from maxlm.runtime.pool import open_executor

    corpus = OpenCorpus.open(folder)
    with open_executor(corpus.recipe.engine, corpus.recipe.workers) as engine:
        print(f"{folder}: {estimate_text_lost_to_dedup(corpus, corpus.resolve_rules(), engine)}")


def append(
    store: Annotated[Path, Argument(help="A token store's folder.")],
    text: TextArgument,
    workers: WorkersOption = None,
) -> None:
    """Add documents to a store, as a new segment; those that are there keep their numbers."""
    from maxlm.data.documents import SourceConfig
    from maxlm.data.store import TokenStore, append_store
    from maxlm.runtime.progress import show_progress

    made = TokenStore.open(store).manifest
    reading: dict[str, Any] = {"on_bad_bytes": made.on_bad_bytes, "piece_bytes": made.piece_bytes}
    source = SourceConfig(documents=tuple(text), text_field=made.text_field, **reading)
    with show_progress() as progress:
        append_store(source, store, workers=workers, progress=progress)
    show_info(str(store))


def verify(store: StoreArgument) -> None:
    """Read a whole store: every file against its checksum, counts, offsets and every token."""
    from maxlm.data.store import TokenStore

    opened = TokenStore.open(store)
    opened.verify()
    print(f"{opened.num_documents:,} documents, {opened.num_tokens:,} tokens: all is well")


def mix(
    config: Annotated[str, Argument(help="A run's config.")], settings: SettingsArgument = None
) -> None:
    """Show what a run reads of each source, over all its steps; builds stores that are missing."""
    from maxlm.config import load_config
    from maxlm.data.loader import make_batches, summarize_source_usage
    from maxlm.programs.prepare import check_prepared_data, prepare_data
    from maxlm.programs.run_folder import create_run_folder, run_folder_path
    from maxlm.run import RunConfig

    run = load_config(RunConfig, config, settings or ()).value
    folder = run_folder_path(run)
    check_prepared_data(run, folder)
    with create_run_folder(run, folder):
        stores = prepare_data(run, folder).train_stores
    batches = make_batches(stores, run.data.mixing(), run.data, seed=run.seed)
    table = make_numeric_table("source", ("sequences", "share", "tokens", "epochs"))
    for row in summarize_source_usage(batches, 0, run.train.steps):
        figures = (f"{row.share:.2%}", f"{row.tokens:,}", f"{row.epochs:.2f}")
        table.add_row(row.source, f"{row.sequences:,}", *figures)
    open_console().print(table)


def show_info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what a store holds, after checking that its arrays have the sizes it claims."""
    from maxlm.data.store import TokenStore
    from maxlm.data.store.store import describe_store, summary_table

    opened = TokenStore.open(store)
    if as_json:
        print_json(describe_store(opened))
    else:
        open_console().print(summary_table(opened))
