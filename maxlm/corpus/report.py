"""Reports on a corpus: its figures, those of its rules, and examples, as numbers and as
a page."""

# pyarrow.compute makes its functions at run time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import heapq
import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from maxlm.corpus.expression import Threshold
from maxlm.corpus.lost import LostTextCounts
from maxlm.corpus.opened import OpenCorpus, remove_cut_spans
from maxlm.corpus.recipe import FilterRules
from maxlm.corpus.shards import DOCUMENTS, StageShardView, mark_valid
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.decontaminate import (
    DecontaminateStage,
    count_contaminated_documents,
)
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

HAS_TEXT = "has text"
"""The rule before all others."""
SAMPLES = 5
"""Examples of each kind."""
_SNIPPET_CHARS = 700
_MAX_VALUES = 16_384  # Of each label, as a sample.
# Bytes of each source and language in each shard that are tokenized.
_TOKENIZED_BYTES = 200_000
_MAX_CONTAMINATED_ITEMS = 100  # Of each stage.
_ALARM_SHARE = 0.5  # Of a source's text, of which the report warns if more is lost.
# Of a histogram.
_BINS = 48
_WIDTH = 440  # In pixels, as the height.
_HEIGHT = 120

RuleSource = tuple[str, str]
"""A rule and a source."""
SourceLanguage = tuple[str, str]
"""A source and a language."""


@dataclass(frozen=True)
class MixtureCounts:
    """Counts of kept text, after cuts."""

    documents: int = 0
    bytes: int = 0
    tokenized_bytes: int = 0
    """Bytes of the documents that were tokenized, which are a sample."""
    tokens: int = 0
    """Their tokens."""

    def add(self, other: "MixtureCounts") -> "MixtureCounts":
        """Returns the sum of both."""
        return MixtureCounts(
            self.documents + other.documents,
            self.bytes + other.bytes,
            self.tokenized_bytes + other.tokenized_bytes,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True, order=True)
class ReportSample:
    """A document shown as an example."""

    sort_key: str
    """A hash of its id: which documents are shown is arbitrary, but always the same."""
    id: str = field(compare=False)
    source: str = field(compare=False)
    text: str = field(compare=False)
    labels: Mapping[str, object] = field(compare=False)


@dataclass
class CorpusSummary:
    """Counts, values and examples; the sum of two is that of both their documents."""

    documents: Counter[RuleSource] = field(default_factory=Counter)
    """Documents that fulfil a rule and all before; rule "" counts all."""
    bytes: Counter[RuleSource] = field(default_factory=Counter)
    """UTF-8 bytes of their texts."""
    mixture: dict[SourceLanguage, MixtureCounts] = field(default_factory=dict)
    """Kept text, after cuts."""
    value_samples: dict[str, np.ndarray] = field(default_factory=dict)
    """A sample of each numeric label's values: float64 [2, values], the first row
    random numbers of which the smallest are kept, so that the sample does not depend on
    the order of shards."""
    dropped: dict[str, list[ReportSample]] = field(default_factory=dict)
    """Examples that a rule alone drops of what the rules before leave, by rule."""
    kept_samples: list[ReportSample] = field(default_factory=list)
    """Examples that all rules keep."""

    def add(self, other: "CorpusSummary") -> None:
        """Adds what another summary counts."""
        self.documents.update(other.documents)
        self.bytes.update(other.bytes)
        for key, counts in other.mixture.items():
            if key in self.mixture:
                counts = self.mixture[key].add(counts)
            self.mixture[key] = counts
        for label, sample in other.value_samples.items():
            self.add_values(label, sample)
        for rule, samples in other.dropped.items():
            self.add_dropped(rule, samples)
        self.add_kept(other.kept_samples)

    def add_dropped(self, rule: str, samples: Sequence[ReportSample]) -> None:
        """Adds examples of documents that a rule drops."""
        all_samples = [*self.dropped.get(rule, []), *samples]
        self.dropped[rule] = heapq.nsmallest(SAMPLES, all_samples)

    def add_kept(self, samples: Sequence[ReportSample]) -> None:
        """Adds examples of documents that all rules keep."""
        self.kept_samples = heapq.nsmallest(SAMPLES, [*self.kept_samples, *samples])

    def add_values(self, label: str, sample: np.ndarray) -> None:
        """Adds values of a label, see `value_samples`."""
        known = self.value_samples.get(label, np.empty((2, 0)))
        values = np.concatenate([known, sample], axis=1)
        smallest_first = np.argsort(values[0], kind="stable")
        self.value_samples[label] = values[:, smallest_first[:_MAX_VALUES]]


def summarize_corpus(
    corpus: OpenCorpus,
    rules: FilterRules,
    executor: TaskExecutor,
    tokenizer: Path | None = None,
    progress: Progress = ignore_progress,
) -> CorpusSummary:
    """Computes figures of a corpus under rules, tokens by the tokenizer in a folder."""
    numeric_labels = []
    for name, type_ in corpus.labels.items():
        is_number = types.is_integer(type_) or types.is_floating(type_)
        is_identity = name.endswith((".cluster", ".group"))  # Numbers that are names.
        if is_number and not is_identity:
            numeric_labels.append(name)
    language_label = find_language_label(corpus)
    job = partial(_summarize_shard, rules, numeric_labels, language_label, tokenizer)
    shards = corpus.settle_rules(rules, progress)
    executor.require_on_workers(corpus.folder, ())
    run = JobRunner("report", executor, progress)
    total = CorpusSummary()
    for summary in run(job, shards):
        total.add(summary)
    return total


def find_language_label(corpus: OpenCorpus) -> str | None:
    """Returns the label that names a document's language, if a stage gives one."""
    for stage in corpus.recipe.stages:
        if stage.stage == "language":
            return f"{stage.unique_name}.name"
    return None


def _summarize_shard(
    rules: FilterRules,
    numeric_labels: Sequence[str],
    language_label: str | None,
    tokenizer: Path | None,
    shard: StageShardView,
) -> CorpusSummary:
    """Computes the figures of one shard, tokens by the tokenizer in a folder."""
    from maxlm.data.tokenizer.load import load_tokenizer

    summary = CorpusSummary()
    columns = ["id", "source", "text", *rules.label_names, *numeric_labels, *rules.cut]
    if language_label:
        columns.append(language_label)
    # The same sample of values in every run, another for each shard.
    shard_digest = hashlib.sha256(shard.name.encode()).digest()
    random = np.random.default_rng(int.from_bytes(shard_digest[:8], "big"))
    encode = load_tokenizer(tokenizer).encode if tokenizer else None
    for table in shard.read_row_groups(list(dict.fromkeys(columns))):
        is_kept = _count_rules(summary, rules, table)
        for label in numeric_labels:
            values = pc.cast(table.column(label), pa.float64()).drop_null().to_numpy()
            sample = np.stack([random.random(len(values)), values])
            summary.add_values(label, sample)
        kept_table = table.filter(pa.array(is_kept))
        _count_mixture(summary, rules, language_label, encode, kept_table)
    return summary


def _count_rules(
    summary: CorpusSummary, rules: FilterRules, table: pa.RecordBatch
) -> np.ndarray:
    """Counts what is left of documents after each rule, and takes examples. Returns
    which of them all rules keep: bool [rows]."""
    texts = table.column("text")
    sizes = pc.fill_null(pc.binary_length(texts), 0).to_numpy()
    sources = np.asarray(table.column("source").to_pylist(), object)
    is_kept = np.ones(table.num_rows, np.bool_)
    _count_documents(summary, "", sources, sizes, is_kept)
    is_kept = is_kept & mark_valid(texts)
    _count_documents(summary, HAS_TEXT, sources, sizes, is_kept)
    for name, rule in rules.keep.items():
        passes = rule.evaluate(table)
        dropped_rows = np.flatnonzero(is_kept & ~passes)
        samples = _choose_samples(table, dropped_rows, rule.label_names)
        summary.add_dropped(name, samples)
        is_kept = is_kept & passes
        _count_documents(summary, name, sources, sizes, is_kept)
    kept_rows = np.flatnonzero(is_kept)
    summary.add_kept(_choose_samples(table, kept_rows, rules.label_names))
    return is_kept


def _count_mixture(
    summary: CorpusSummary,
    rules: FilterRules,
    language_label: str | None,
    encode: Callable[[bytes], Sequence[int]] | None,
    kept_table: pa.RecordBatch,
) -> None:
    """Counts the text of kept documents by source and language."""
    sources = kept_table.column("source").to_pylist()
    languages = [None] * kept_table.num_rows
    if language_label:
        languages = kept_table.column(language_label).to_pylist()
    texts = remove_cut_spans(kept_table, rules)
    for source, language, text in zip(sources, languages, texts, strict=True):
        encoded = text.encode()
        key = (source, language or "?")
        counts = summary.mixture.get(key, MixtureCounts())
        tokenized_bytes = 0
        tokens = 0
        if encode is not None and counts.tokenized_bytes < _TOKENIZED_BYTES:
            tokenized_bytes = len(encoded)
            tokens = len(encode(encoded))
        summary.mixture[key] = counts.add(
            MixtureCounts(1, len(encoded), tokenized_bytes, tokens)
        )


def _count_documents(
    summary: CorpusSummary,
    rule: str,
    sources: np.ndarray,
    sizes: np.ndarray,
    is_kept: np.ndarray,
) -> None:
    """Counts the documents that a rule and all before keep, and their bytes, by
    source. `sources`, `sizes`, `is_kept`: of each document."""
    kept_sources = sources[is_kept]
    kept_sizes = sizes[is_kept]
    for source in set(kept_sources.tolist()):
        is_of_source = kept_sources == source
        summary.documents[rule, source] += int(is_of_source.sum())
        summary.bytes[rule, source] += int(kept_sizes[is_of_source].sum())


def _choose_samples(
    table: pa.RecordBatch, rows: np.ndarray, labels: Sequence[str]
) -> list[ReportSample]:
    """Chooses documents among some rows: those with the smallest hashes of their
    ids."""
    ids = table.column("id")
    row_by_hash = {}
    for row in rows.tolist():
        document_id = ids[row].as_py()
        id_hash = hashlib.sha256(document_id.encode()).hexdigest()[:16]
        row_by_hash[id_hash] = row
    samples = []
    for id_hash in heapq.nsmallest(SAMPLES, row_by_hash):
        row = row_by_hash[id_hash]
        text = table.column("text")[row].as_py() or ""
        samples.append(
            ReportSample(
                sort_key=id_hash,
                id=ids[row].as_py(),
                source=table.column("source")[row].as_py(),
                text=text[:_SNIPPET_CHARS],
                labels={label: table.column(label)[row].as_py() for label in labels},
            )
        )
    return samples


def write_report(
    corpus: OpenCorpus,
    rules: FilterRules,
    summary: CorpusSummary,
    path: Path,
    lost: LostTextCounts | None = None,
) -> None:
    """Writes a page that needs no network, whole or not at all; `report.html` is its
    template."""
    from jinja2 import Environment

    template = files("maxlm.corpus").joinpath("report.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = "{:,.0f}".format
    environment.filters["share"] = "{:.1%}".format
    environment.filters["value"] = _format_value
    funnel = compute_funnel(rules, summary)
    manifests = []
    contaminated = []
    for stage in corpus.recipe.stages:
        name = stage.unique_name
        manifests.append((name, corpus.read_manifest(name)))
        if isinstance(stage, DecontaminateStage):
            items = count_contaminated_documents(stage, corpus.shards)
            contaminated += items[:_MAX_CONTAMINATED_ITEMS]
    page = environment.from_string(template).render(
        name=corpus.folder.resolve().name,
        sources=list(funnel[0]["by_source"]),
        read=corpus.read_manifest(DOCUMENTS)["counts"],
        funnel=funnel,
        stages=manifests,
        histograms=_draw_histograms(rules, summary),
        rules=[
            (name, rule.text, summary.dropped.get(name, []))
            for name, rule in rules.keep.items()
        ],
        kept=summary.kept_samples,
        mixture=_list_mixture(summary),
        cut=", ".join(rules.cut),
        unfinished=corpus.unfinished,
        alarms=list_alarms(corpus, rules, summary),
        lost="" if lost is None else str(lost),
        contaminated=contaminated,
    )
    with replace_file(path) as new:
        new.write_text(page, "utf-8")


class FunnelRow(TypedDict):
    """What is left after a rule and all before it."""

    rule: str
    expression: str
    left: int
    """Documents."""
    bytes: int
    """Of their texts."""
    dropped: int
    """Documents that the rule drops."""
    by_source: dict[str, int]
    """`left` by source."""
    of_all: float
    """`left` as a share of all documents."""


def compute_funnel(rules: FilterRules, summary: CorpusSummary) -> list[FunnelRow]:
    """Computes what is left after each rule, from all documents down."""
    sources = sorted({source for _, source in summary.documents})
    rows: list[FunnelRow] = []
    for rule in ("", HAS_TEXT, *rules.keep):
        left_by_source = {source: summary.documents[rule, source] for source in sources}
        left = sum(left_by_source.values())
        num_all = rows[0]["left"] if rows else left
        num_before = rows[-1]["left"] if rows else left
        rows.append(
            {
                "rule": rule or "all documents",
                "expression": rules.keep[rule].text if rule in rules.keep else "",
                "left": left,
                "bytes": sum(summary.bytes[rule, source] for source in sources),
                "dropped": num_before - left,
                "by_source": left_by_source,
                "of_all": left / max(1, num_all) if rows else 1.0,
            }
        )
    return rows


def list_alarms(
    corpus: OpenCorpus, rules: FilterRules, summary: CorpusSummary
) -> list[str]:
    """Lists sources that lose most of their text, a sentence each: how much, and to
    which rules.

    A rule that a threshold, a list or a template has gone wrong with drops a source
    without an error; a source that is copied from others may lose all of it to
    deduplication.
    """
    settled_labels = set(corpus.list_settled_labels(rules))
    kept_bytes: Counter[str] = Counter()
    for (source, _), counts in summary.mixture.items():
        kept_bytes[source] += counts.bytes
    alarms = []
    for source in sorted({source for _, source in summary.documents}):
        total = summary.bytes[HAS_TEXT, source]
        lost = total - kept_bytes[source]
        if total == 0 or lost <= _ALARM_SHARE * total:
            continue
        losses = []
        before = total
        for name, rule in rules.keep.items():
            after = summary.bytes[name, source]
            is_about_copies = not settled_labels.isdisjoint(rule.label_names)
            title = f"{name} (copies)" if is_about_copies else name
            losses.append((before - after, title))
            before = after
        losses.append((before - kept_bytes[source], f"cut {', '.join(rules.cut)}"))
        losses.sort(key=lambda loss: -loss[0])
        # Rules that drop less than half a percent are not named.
        smallest_reason = total / 200
        reasons = [
            f"{title} {size / total:.0%}"
            for size, title in losses
            if size >= smallest_reason
        ]
        share = 1 - kept_bytes[source] / total
        alarms.append(
            f'alarm: source "{source}" loses {share:.0%} of its text '
            f"({total / 1e6:,.1f} MB): {', '.join(reasons)}"
        )
    return alarms


class MixtureRow(TypedDict):
    """Kept text of a source in a language."""

    source: str
    language: str
    documents: int
    bytes: int
    tokens: float | None
    """Estimated from the documents that were tokenized; None: none was."""


def _list_mixture(summary: CorpusSummary) -> list[MixtureRow]:
    """Lists the kept text by source, and of a source the language with the most
    documents first."""

    def get_order(entry: tuple[SourceLanguage, MixtureCounts]) -> tuple[str, int]:
        (source, _), counts = entry
        return source, -counts.documents

    rows: list[MixtureRow] = []
    for (source, language), counts in sorted(summary.mixture.items(), key=get_order):
        tokens = None
        if counts.tokenized_bytes:
            tokens = counts.bytes * counts.tokens / counts.tokenized_bytes
        rows.append(
            {
                "source": source,
                "language": language,
                "documents": counts.documents,
                "bytes": counts.bytes,
                "tokens": tokens,
            }
        )
    return rows


class Histogram(TypedDict):
    """The values of a label, drawn."""

    label: str
    number: int
    """Values drawn."""
    svg: str


def _draw_histograms(rules: FilterRules, summary: CorpusSummary) -> list[Histogram]:
    """Draws labels that rules compare with numbers first, each with the values where
    they cut, then others that rules name."""
    thresholds: dict[str, list[Threshold]] = {}
    for rule in rules.keep.values():
        for threshold in rule.thresholds:
            thresholds.setdefault(threshold.label, []).append(threshold)
    named = rules.label_names
    labels = sorted(
        summary.value_samples,
        key=lambda label: (label not in thresholds, label not in named, label),
    )
    histograms: list[Histogram] = []
    for label in labels:
        sample = summary.value_samples[label][1]
        values = sample[np.isfinite(sample)]
        if values.size:
            svg = _draw_histogram(values, thresholds.get(label, []))
            histograms.append({"label": label, "number": values.size, "svg": svg})
    return histograms


def _draw_histogram(values: np.ndarray, thresholds: Sequence[Threshold]) -> str:
    """Draws a histogram with a line at each threshold, as SVG."""
    # But for outliers. Thresholds lie in the picture, also where no value does.
    least, most = np.quantile(values, (0.005, 0.995)).tolist()
    threshold_values = [threshold.value for threshold in thresholds]
    low = min(least, most, *threshold_values)
    high = max(least, most, *threshold_values)
    # Counts and perplexities span decades.
    typical = max(float(np.median(values)), 1e-9)
    is_logarithmic = low >= 0 and high > 50 * typical
    scale = np.log1p if is_logarithmic else np.asarray
    left = float(scale(low))
    right = float(scale(high))
    if right <= left:
        right = left + 1
    floor = _HEIGHT - 16  # Of the bars; below are the labels of the axis.

    scaled_values = np.clip(scale(values), left, right)
    counts, _ = np.histogram(scaled_values, _BINS, (left, right))
    # Roots, so that rare values show.
    bar_heights = np.sqrt(counts / max(1, counts.max())) * (_HEIGHT - 24)
    parts = _draw_bars(bar_heights, floor)
    for threshold in thresholds:
        fraction = (float(scale(threshold.value)) - left) / (right - left)
        parts.append(_draw_threshold(threshold, fraction * _WIDTH, floor))
    axis = f'y="{_HEIGHT - 2}"'
    note = " (log)" if is_logarithmic else ""
    parts.append(f'<text x="0" {axis}>{low:.4g}</text>')
    parts.append(f'<text x="{_WIDTH}" {axis} text-anchor="end">{high:.4g}{note}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _draw_bars(bar_heights: np.ndarray, floor: float) -> list[str]:
    """Draws bars side by side that stand on a floor; all in pixels."""
    bar_width = _WIDTH / _BINS
    return [
        f'<rect x="{i * bar_width:.1f}" y="{floor - bar_height:.1f}" '
        f'width="{bar_width - 1:.1f}" height="{bar_height:.1f}" class="in"/>'
        for i, bar_height in enumerate(bar_heights)
    ]


def _draw_threshold(threshold: Threshold, x: float, floor: float) -> str:
    """Draws a threshold's line at x, and beside its top what it compares."""
    # The text stands on the side that has more room.
    anchor = "end" if x > _WIDTH / 2 else "start"
    text = html.escape(f"{threshold.comparison} {threshold.value:g}")
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{floor}"/>'
        f'<text x="{x:.1f}" y="10" text-anchor="{anchor}">{text}</text>'
    )


def _format_value(value: object) -> str:
    """Formats a label of an example; of spans it says how many they are."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return f"{len(value)} of them"
    return str(value)
