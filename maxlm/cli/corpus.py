"""`maxlm corpus`: from raw documents over labels to token stores, and looking into
each."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from maxlm.cli.common import (
    ConfigArgument,
    JsonOption,
    KeepOption,
    SetOption,
    SettingsArgument,
    TextArgument,
    TextFieldOption,
    WorkersOption,
    open_console,
    print_json,
    print_table,
)
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import check_corpus_packages, is_corpus
from maxlm.data.documents.reader import read_documents
from maxlm.runtime.executor import TaskExecutor, open_executor
from maxlm.runtime.progress import show_progress

if TYPE_CHECKING:
    from maxlm.corpus.opened import OpenCorpus
    from maxlm.corpus.perplexity_model import PerplexityMetadata
    from maxlm.corpus.recipe import FilterRules

app = typer.Typer(
    no_args_is_help=True,
    help="Clean and label documents, build token stores, and look into them.",
)

# Counts of a corpus's documents that are of rows, not of what is passed over.
_ROW_COUNTS = ("rows", "labelled")
StoreArgument = Annotated[
    str, Argument(help="A token store: a folder, s3://... or gs://...")
]
OnOption = Annotated[
    str,
    Option(
        help="Where tasks run: local (processes of this machine), ray://HOST:PORT (a "
        "Ray cluster, by its Ray client server) or ray (the cluster of RAY_ADDRESS or "
        "of this machine, else one that is started here)."
    ),
]
CorpusArgument = Annotated[Path, Argument(help="A corpus's folder, as `run` made it.")]


@app.command()
def build(
    text: TextArgument,
    tokenizer: Annotated[Path, Option(help="A tokenizer's folder.")],
    out: Annotated[Path, Option(help="The store's folder; appears when complete.")],
    workers: WorkersOption = None,
    split: Annotated[
        Literal["all", "train", "heldout"], Option(help="Which documents to take.")
    ] = "all",
    heldout_fraction: Annotated[
        float, Option(help="Share of documents held out, by hashes of texts.")
    ] = 0.01,
    text_field: TextFieldOption = "text",
    on_bad_bytes: Annotated[
        Literal["error", "replace"],
        Option(help="What to do with text that is not valid UTF-8."),
    ] = "error",
    piece_bytes: Annotated[
        int | None,
        Option(
            min=1, help="Cut text files into pieces of so many bytes, at line ends."
        ),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Replace a store made from other inputs.")
    ] = False,
    join: Annotated[
        bool, Option("--join", help="Share the work with other builders of this store.")
    ] = False,
) -> None:
    """Tokenize documents into a token store. Run it again to resume after an
    interruption."""
    from maxlm.data.store.build import build_store

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
            force=force,
            join=join,
            progress=progress,
        )
    show_info(str(out))
    for entry in text:
        if is_corpus(Path(entry)):
            corpus = _open_corpus(Path(entry))
            _print_lost_text(corpus, corpus.resolve_rules())


@app.command()
def append(
    store: Annotated[Path, Argument(help="A token store's folder.")],
    text: TextArgument,
    workers: WorkersOption = None,
) -> None:
    """Add documents to a store, as a new segment; earlier documents keep their
    numbers."""
    from maxlm.data.store.build import append_store
    from maxlm.data.store.store import TokenStore

    # New documents are read as the earlier ones were.
    manifest = TokenStore.open(store).manifest
    source = SourceConfig(
        documents=tuple(text),
        text_field=manifest.text_field,
        on_bad_bytes=manifest.on_bad_bytes,
        piece_bytes=manifest.piece_bytes,
    )
    with show_progress() as progress:
        append_store(source, store, workers=workers, progress=progress)
    show_info(str(store))


@app.command()
def verify(
    folder: Annotated[
        str, Argument(help="A token store (a folder, s3:// or gs://) or a corpus.")
    ],
) -> None:
    """Read all of a store or a corpus, and check that every file is as it was written.

    Every file is compared with its SHA-256; of a store also every token, offset and
    packing index.
    """
    if is_corpus(Path(folder)):
        corpus = _open_corpus(Path(folder))
        unchecked = corpus.verify()
        num_stages = len(corpus.list_stages())
        contents = f"{len(corpus.shards):,} shards of {num_stages:,} stages"
    else:
        from maxlm.data.loader.packing import (
            describe_missing_checksums,
            list_indices,
            verify_index,
        )
        from maxlm.data.store.store import TokenStore

        store = TokenStore.open(folder, verify=True)
        for index in list_indices(store):
            verify_index(index)
        unchecked = describe_missing_checksums(store)
        contents = f"{store.num_documents:,} documents, {store.num_tokens:,} tokens"
    for line in unchecked:
        print(line, file=sys.stderr)
    print(f"{contents}: all is well")


@app.command()
def mix(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run reads of each source, by phase and in all, before it trains.

    Prepares the run's text in the run's folder, as training would. Weights, phases and
    steps may then be tried, as KEY=VALUE; other text needs another folder.
    """
    from maxlm.run.config import RunConfig
    from maxlm.train.mixture import prepare_mixture

    run = load_config(RunConfig, config, settings or ()).value
    usages = prepare_mixture(run)
    if as_json:
        print_json([asdict(usage) for usage in usages])
        return
    rows = []
    for usage in usages:
        steps = f"{usage.first_step:,} to {usage.stop_step - 1:,}"
        if (usage.first_step, usage.stop_step) == (0, run.train.steps):
            steps = "all steps"
        row = (
            steps,
            usage.source,
            f"{usage.sequences:,}",
            f"{usage.share:.2%}",
            f"{usage.tokens:,}",
            f"{usage.epochs:.2f}",
            f"{usage.epochs_so_far:.2f}",
        )
        rows.append(row)
    columns = ("source", "sequences", "share", "tokens", "epochs", "epochs so far")
    print_table("steps", columns, rows)


@app.command("info")
def show_info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what is in a store, after checking that its arrays have the sizes that it
    states."""
    from maxlm.data.store.store import TokenStore, describe_store, summary_table

    opened = TokenStore.open(store)
    if as_json:
        print_json(describe_store(opened))
    else:
        open_console().print(summary_table(opened))


@app.command()
def run(
    recipe: Annotated[str, Argument(help="A recipe's file.")],
    settings: SettingsArgument = None,
    on: OnOption = "local",
) -> None:
    """Read sources and label their documents. Run it again to resume after an
    interruption.

    Stages whose settings have not changed are not done again; rules under keep are
    applied when a token store is built, so another threshold costs nothing here. Prints
    what the rules keep, and `text lost: N`, the documents and passages that they drop
    as copies and keep nowhere.
    """
    check_corpus_packages(recipe)
    from maxlm.corpus.recipe import RecipeConfig
    from maxlm.corpus.run import run_recipe

    config = load_config(RecipeConfig, recipe, settings or ()).value
    with open_executor(on, config.workers) as executor:
        with show_progress("parts") as progress:
            folder = run_recipe(config, progress, executor)
        _print_funnel(_open_corpus(folder), executor)


@app.command()
def report(
    corpus: CorpusArgument,
    out: Annotated[
        Path | None, Option(help="HTML file to write; default: CORPUS/report.html.")
    ] = None,
    tokenizer: Annotated[
        Path | None, Option(help="A tokenizer, to count tokens with.")
    ] = None,
    keep: KeepOption = None,
    as_json: JsonOption = False,
    on: OnOption = "local",
) -> None:
    """Show what rules keep and drop: numbers here, histograms and samples in an HTML
    page.

    Of a run that is not done it shows the stages before the first that is not, and how
    far that is. `text lost: N` counts documents and passages that the rules drop as
    copies and keep nowhere.
    """
    opened = _open_corpus(corpus, allow_unfinished=True)
    rules = dict(opened.recipe.keep) | _parse_rules(keep or [])
    page = out or corpus / "report.html"
    with open_executor(on, opened.recipe.workers) as executor:
        _print_funnel(opened, executor, rules, tokenizer, page, as_json)


@app.command()
def export(
    corpus: CorpusArgument,
    out: Annotated[
        Path, Option(help="The folder of the files; appears when complete.")
    ],
    to: Annotated[
        Literal["parquet", "jsonl"],
        Option(help="Parquet with zstd, or lines of JSON with gzip."),
    ] = "parquet",
    keep: KeepOption = None,
    force: Annotated[
        bool, Option("--force", help="Replace an earlier export.")
    ] = False,
    on: OnOption = "local",
) -> None:
    """Write the documents that rules keep to files for other programs, with cuts and
    masks applied: the texts that `build` tokenizes, with id, source, url, meta and
    language."""
    opened = _open_corpus(corpus)
    from maxlm.corpus.export import export_corpus

    rules = opened.resolve_rules(dict(opened.recipe.keep) | _parse_rules(keep or []))
    with (
        open_executor(on, opened.recipe.workers) as executor,
        show_progress("parts") as progress,
    ):
        counts = export_corpus(
            opened, rules, out, to, executor, force=force, progress=progress
        )
    print(
        f"{counts['documents']:,} documents, {counts['text_bytes']:,} bytes, "
        f"{counts['files']:,} files"
    )
    print(
        f"left out: {counts['dropped']:,} dropped by rules, "
        f"{counts['empty']:,} empty after cuts"
    )
    print(f"the files: {out}")


def _open_corpus(folder: Path, allow_unfinished: bool = False) -> "OpenCorpus":
    check_corpus_packages(str(folder))
    from maxlm.corpus.opened import OpenCorpus

    return OpenCorpus.open(folder, allow_unfinished=allow_unfinished)


def _parse_rules(rules: list[str]) -> dict[str, str]:
    """Parse rules, NAME=EXPRESSION each."""
    expressions: dict[str, str] = {}
    for rule in rules:
        name, equals, expression = rule.partition("=")
        name = name.strip()
        if not equals or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            fix = "write it like: --keep 'long=heuristics.words >= 100'"
            raise MaxlmError(f"{rule!r} has no name", where="--keep", fix=fix)
        expressions[name] = expression
    return expressions


def _print_funnel(
    corpus: "OpenCorpus",
    executor: TaskExecutor,
    keep: dict[str, str] | None = None,
    tokenizer: Path | None = None,
    page: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print what each rule drops and leaves; also into a page, if one is given."""
    from maxlm.corpus.lost import count_lost_text
    from maxlm.corpus.report import (
        compute_funnel,
        list_alarms,
        summarize_corpus,
        write_report,
    )
    from maxlm.corpus.shards import DOCUMENTS

    rules = corpus.resolve_rules(keep)
    with show_progress("parts") as progress:
        summary = summarize_corpus(corpus, rules, executor, tokenizer, progress)
        lost = count_lost_text(corpus, rules, executor, progress)
    rows = compute_funnel(rules, summary)
    if page is not None:
        write_report(corpus, rules, summary, page, lost)
    alarms = list_alarms(corpus, rules, summary)
    if as_json:
        funnel = {
            "funnel": rows,
            "lost": asdict(lost),
            "alarms": alarms,
            "unfinished": corpus.unfinished,
        }
        print_json(funnel)
        return
    columns = ("dropped", "left", "MB", *rows[0]["by_source"])
    cells = []
    for row in rows:
        counts = [f"{count:,}" for count in row["by_source"].values()]
        megabytes = row["bytes"] / 1e6
        figures = (f"{row['dropped']:,}", f"{row['left']:,}", f"{megabytes:,.1f}")
        cells.append((row["rule"], *figures, *counts))
    print_table("rule", columns, cells, title=str(corpus.folder))
    # Beside the numbers of rows these count what was not read, by reason.
    reading_counts = corpus.read_manifest(DOCUMENTS)["counts"]
    passed_over = [
        f"{count:,} {reason}"
        for reason, count in reading_counts.items()
        if count and reason not in _ROW_COUNTS
    ]
    if passed_over:
        print(f"passed over in reading: {', '.join(passed_over)}")
    print(lost)
    for alarm in alarms:
        print(alarm)
    if corpus.unfinished:
        print(corpus.unfinished)
    if page is not None:
        print(f"the page: {page}")


def _print_lost_text(corpus: "OpenCorpus", rules: "FilterRules") -> None:
    """Print what the rules lose to deduplication."""
    from maxlm.corpus.lost import count_lost_text

    with (
        open_executor("local", corpus.recipe.workers) as executor,
        show_progress("parts") as progress,
    ):
        lost = count_lost_text(corpus, rules, executor, progress)
    print(lost)


def _read_texts(documents: list[str]) -> Iterator[bytes]:
    source = SourceConfig(documents=tuple(documents), on_bad_bytes="replace")
    return (document.text for document in read_documents(source))


@app.command("train-perplexity")
def train_perplexity(
    text: TextArgument,
    out: Annotated[Path, Option(help="The model's folder.")],
    reference: Annotated[
        list[str] | None, Option(help="Documents that set the cutoffs; repeatable.")
    ] = None,
    settings: SetOption = None,
) -> None:
    """Train an n-gram model of good prose in one language, for the stage `perplexity`.

    It is a modified Kneser-Ney model, as KenLM's lmplz makes it. The cutoffs of head,
    middle and tail part a reference in thirds: give a sample of the crawl that is to be
    filtered. Without one, some documents of TEXT are the reference, and not trained on.
    """
    from maxlm.corpus import perplexity_model

    config = load_config(
        perplexity_model.PerplexityTrainingConfig, None, settings or ()
    ).value
    texts = map(bytes.decode, _read_texts(text))
    sample = None
    if reference:
        sample = map(bytes.decode, _read_texts(reference))
    report = perplexity_model.train_perplexity(texts, out, config, sample)
    counts = ", ".join(f"{count:,}" for count in report.ngrams.num_ngrams)
    print(
        f"{report.num_documents:,} documents, {report.ngrams.num_tokens:,} words and "
        f"line ends"
    )
    print(f"n-grams of 1, 2, ... words: {counts}")
    _print_cutoffs(report.metadata, out)


@app.command("calibrate-perplexity")
def calibrate_perplexity(
    model: Annotated[
        Path, Argument(help="An ARPA or binary file of KenLM, or a model's folder.")
    ],
    reference: Annotated[
        list[str], Option(help="Documents that set the cutoffs; repeatable.")
    ],
    out: Annotated[
        Path | None,
        Option(help="The model's new folder; default: the folder that is given."),
    ] = None,
    settings: SetOption = None,
) -> None:
    """Set the cutoffs of an n-gram model by a sample, for the stage `perplexity`.

    Head, middle and tail are thirds of the sample's perplexities, or as percentiles
    says.
    """
    from maxlm.corpus import perplexity_model

    if out is None and not model.is_dir():
        fix = "name a folder for the model and its cutoffs with --out"
        raise MaxlmError("this is no model's folder", where=str(model), fix=fix)
    config = load_config(
        perplexity_model.PerplexityCalibrationConfig, None, settings or ()
    ).value
    sample = map(bytes.decode, _read_texts(reference))
    folder = out or model
    metadata = perplexity_model.calibrate_perplexity(model, sample, folder, config)
    _print_cutoffs(metadata, folder)


def _print_cutoffs(metadata: "PerplexityMetadata", folder: Path) -> None:
    percentiles = ", ".join(
        f"{percentile}%: {value:,.1f}"
        for percentile, value in metadata.percentiles.items()
    )
    print(
        f"perplexities of {metadata.reference_documents:,} reference documents: "
        f"{percentiles}"
    )
    head_end, tail_start = metadata.cutoffs
    print(f"head up to {head_end:,.1f}, tail beyond {tail_start:,.1f}")
    print(f"the model: {folder}")


@app.command("train-quality")
def train_quality(
    positive: Annotated[
        list[str], Option(help="Documents as they should be; repeatable.")
    ],
    negative: Annotated[
        list[str], Option(help="Documents as they should not be; repeatable.")
    ],
    out: Annotated[Path, Option(help="The model's file, .safetensors.")],
    settings: SetOption = None,
) -> None:
    """Train a classifier of good and bad documents for the stage `quality`, and measure
    it."""
    from maxlm.corpus.stages.quality import ClassifierConfig, train_classifier

    config = load_config(ClassifierConfig, None, settings or ()).value
    model, report = train_classifier(
        _read_texts(positive), _read_texts(negative), config
    )
    model.save(out)
    print(report)
    print(f"the model: {out}")


@app.command()
def show(
    folder: Annotated[
        str, Argument(help="A token store (a folder, s3:// or gs://) or a corpus.")
    ],
    document: Annotated[
        str, Argument(help="Its number in the store, from 0; its id in a corpus.")
    ],
    tokens: Annotated[
        bool, Option("--tokens", help="A store's ids instead of text.")
    ] = False,
) -> None:
    """Print a document: of a corpus with its labels, of a store decoded by its
    tokenizer."""
    if is_corpus(Path(folder)):
        _show_labels(Path(folder), document)
    else:
        _show_stored(folder, document, tokens)


def _show_labels(corpus: Path, document: str) -> None:
    opened = _open_corpus(corpus, allow_unfinished=True)
    if opened.unfinished:
        print(opened.unfinished, file=sys.stderr)
    from maxlm.corpus.opened import find_document

    labels, passes_of_rule = find_document(opened, document)
    text = labels.pop("text")
    for name, value in labels.items():
        print(f"{name}: {value}", file=sys.stderr)
    for name, passes in passes_of_rule.items():
        verdict = "kept" if passes else "dropped"
        print(f"rule {name}: {verdict}", file=sys.stderr)
    sys.stderr.flush()
    print(text if text is not None else "", end="")


def _show_stored(store: str, document: str, tokens: bool) -> None:
    from maxlm.data.store.store import TokenStore, check_tokenizer
    from maxlm.data.tokenizer.load import load_tokenizer

    if not document.isdecimal():
        message = f"{document!r} is no number of a document"
        raise MaxlmError(message, where=store, fix="give its number, from 0")
    opened = TokenStore.open(store)
    index = int(document)
    if tokens:
        ids = opened.document(index).tolist()
        print(" ".join(map(str, ids)))
        return
    tokenizer = load_tokenizer(opened.tokenizer_folder)
    check_tokenizer(opened, tokenizer)
    # Bytes, so that a document's own line ends come out as they went in.
    stream = typer.get_binary_stream("stdout")
    stream.write(tokenizer.decode_bytes(opened.text_tokens(index).tolist()))
    stream.flush()
