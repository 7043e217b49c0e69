"""Reports on a corpus: its figures, those of its rules, and examples, as numbers and as
a page."""

# pyarrow.compute makes its functions at run time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import heapq
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from maxlm.corpus.expression import Threshold
from maxlm.corpus.lost import LostText
from maxlm.corpus.opened import OpenCorpus, remove_cut_spans
from maxlm.corpus.recipe import FilterRules
from maxlm.corpus.shards import DOCUMENTS, StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.decontaminate import (
    DecontaminateStage,
    count_contaminated_documents,
)
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

SAMPLES = 5
_SNIPPET_CHARS = 700
_VALUES = 16_384  # of each label
_TOKENIZED_BYTES = 200_000  # of each source and language in each shard
_BINS = 48
_MOST_ITEMS = 100
_ALARM_SHARE = 0.5  # Of a source's text, of which the report warns if more is lost.
_WIDTH, _HEIGHT = 440, 120

Key = tuple[str, ...]


@dataclass(frozen=True, order=True)
class Sample:
    """A document shown as an example."""

    sort_key: str
    """A hash of its id: which documents are shown is arbitrary, but always the same."""
    id: str = field(compare=False)
    source: str = field(compare=False)
    text: str = field(compare=False)
    labels: Mapping[str, Any] = field(compare=False)


@dataclass
class CorpusSummary:
    """Counts, values and examples; the sum of two is that of both their documents."""

    documents: Counter[Key] = field(default_factory=Counter)
    """Documents that fulfil a rule and all before, by (rule, source); rule "" counts
    all."""
    bytes: Counter[Key] = field(default_factory=Counter)
    """UTF-8 bytes of their texts, by the same keys."""
    mixture: dict[Key, np.ndarray] = field(default_factory=dict)
    """Kept text, after cuts, by (source, language): documents, bytes, and bytes and
    tokens of the documents tokenized: int64 [4]."""
    value_samples: dict[str, np.ndarray] = field(default_factory=dict)
    """A sample of each numeric label's values: float64 [2, values], the first row
    random numbers of which the smallest are kept, so that the sample does not depend on
    the order of shards."""
    dropped: dict[str, list[Sample]] = field(default_factory=dict)
    """Examples that a rule alone drops of what the rules before leave, by rule."""
    kept: list[Sample] = field(default_factory=list)
    """Examples that all rules keep."""

    def add(self, other: "CorpusSummary") -> None:
        self.documents.update(other.documents)
        self.bytes.update(other.bytes)
        for key, figures in other.mixture.items():
            self.mixture[key] = self.mixture.get(key, np.zeros(4, np.int64)) + figures
        for label, sample in other.value_samples.items():
            self.add_values(label, sample)
        for rule, samples in other.dropped.items():
            self.dropped[rule] = heapq.nsmallest(
                SAMPLES, self.dropped.get(rule, []) + samples
            )
        self.kept = heapq.nsmallest(SAMPLES, self.kept + other.kept)

    def add_values(self, label: str, sample: np.ndarray) -> None:
        both = np.concatenate(
            [self.value_samples.get(label, np.empty((2, 0))), sample], axis=1
        )
        self.value_samples[label] = both[
            :, np.argsort(both[0], kind="stable")[:_VALUES]
        ]


def summarize_corpus(
    corpus: OpenCorpus,
    rules: FilterRules,
    executor: TaskExecutor,
    tokenizer: Path | None = None,
    progress: Progress = ignore_progress,
) -> CorpusSummary:
    """Computes figures of a corpus under rules, tokens by the tokenizer in a folder."""
    numeric = [
        name
        for name, type_ in corpus.labels.items()
        if (types.is_integer(type_) or types.is_floating(type_))
        and not name.endswith((".cluster", ".group"))  # Numbers that are names.
    ]
    job = partial(
        _summarize_shard, rules, numeric, find_language_label(corpus), tokenizer
    )
    shards = corpus.settle_rules(rules, progress)
    total = CorpusSummary()
    executor.require_on_workers(corpus.folder, ())
    for each in JobRunner("report", executor, progress)(job, shards):
        total.add(each)
    return total


def find_language_label(corpus: OpenCorpus) -> str | None:
    """The label that names a document's language, if a stage gives one."""
    found = [
        stage.unique_name for stage in corpus.recipe.stages if stage.stage == "language"
    ]
    return f"{found[0]}.name" if found else None


def _summarize_shard(
    rules: FilterRules,
    numeric: Sequence[str],
    language: str | None,
    tokenizer: Path | None,
    shard: StageShardView,
) -> CorpusSummary:
    from maxlm.data.tokenizer import load_tokenizer

    summary = CorpusSummary()
    languages = [language] if language else []
    columns = [
        "id",
        "source",
        "text",
        *rules.label_names,
        *numeric,
        *languages,
        *rules.cut,
    ]
    seed = int.from_bytes(hashlib.sha256(shard.name.encode()).digest()[:8], "big")
    random = np.random.default_rng(seed)
    codec = tokenizer and load_tokenizer(tokenizer)
    for table in shard.read_row_groups(list(dict.fromkeys(columns))):
        texts = table.column("text")
        sizes = pc.fill_null(pc.binary_length(texts), 0).to_numpy()
        sources = table.column("source")
        keep = np.ones(table.num_rows, np.bool_)
        _count(summary, "", sources, sizes, keep)
        keep = keep & pc.is_valid(texts).to_numpy(zero_copy_only=False)
        _count(summary, "has text", sources, sizes, keep)
        for name, rule in rules.keep.items():
            passes = rule.evaluate(table)
            fell = _samples(table, np.flatnonzero(keep & ~passes), rule.label_names)
            summary.dropped[name] = heapq.nsmallest(
                SAMPLES, summary.dropped.get(name, []) + fell
            )
            keep = keep & passes
            _count(summary, name, sources, sizes, keep)
        kept = _samples(table, np.flatnonzero(keep), rules.label_names)
        summary.kept = heapq.nsmallest(SAMPLES, summary.kept + kept)
        for label in numeric:
            values = pc.cast(table.column(label), pa.float64()).drop_null().to_numpy()
            summary.add_values(label, np.stack([random.random(len(values)), values]))
        table = table.filter(pa.array(keep))
        names = (
            table.column(language).to_pylist() if language else [None] * table.num_rows
        )
        for source, name, text in zip(
            table.column("source").to_pylist(),
            names,
            remove_cut_spans(table, rules),
            strict=True,
        ):
            raw = text.encode()
            figures = summary.mixture.setdefault(
                (source, name or "?"), np.zeros(4, int)
            )
            figures[:2] += (1, len(raw))
            if codec is not None and figures[2] < _TOKENIZED_BYTES:
                figures[2:] += (len(raw), len(codec.encode(raw)))
    return summary


def _count(
    summary: CorpusSummary,
    rule: str,
    sources: pa.Array,
    sizes: np.ndarray,
    keep: np.ndarray,
) -> None:
    names = np.asarray(sources.to_pylist(), object)[keep]
    for source in set(names.tolist()):
        here = names == source
        summary.documents[rule, source] += int(here.sum())
        summary.bytes[rule, source] += int(sizes[keep][here].sum())


def _samples(
    table: pa.RecordBatch, rows: np.ndarray, labels: Sequence[str]
) -> list[Sample]:
    ids = table.column("id")
    order = {
        hashlib.sha256(ids[int(r)].as_py().encode()).hexdigest()[:16]: int(r)
        for r in rows
    }
    return [
        Sample(
            each,
            ids[order[each]].as_py(),
            table.column("source")[order[each]].as_py(),
            (table.column("text")[order[each]].as_py() or "")[:_SNIPPET_CHARS],
            {label: table.column(label)[order[each]].as_py() for label in labels},
        )
        for each in heapq.nsmallest(SAMPLES, order)
    ]


def write_report(
    corpus: OpenCorpus,
    rules: FilterRules,
    summary: CorpusSummary,
    path: Path,
    lost: LostText | None = None,
) -> None:
    """Write a page that needs no network, whole or not at all; `report.html` is its
    template."""
    from jinja2 import Environment

    template = files("maxlm.corpus").joinpath("report.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": "{:,.0f}".format, "share": "{:.1%}".format, "value": _format_value
    }  # fmt: skip
    stages = corpus.recipe.stages
    funnel = compute_funnel(rules, summary)
    page = environment.from_string(template).render(
        name=corpus.folder.resolve().name,
        sources=[*funnel[0]["by_source"]],
        read=corpus.read_manifest(DOCUMENTS)["counts"],
        funnel=funnel,
        stages=[
            (stage.unique_name, corpus.read_manifest(stage.unique_name))
            for stage in stages
        ],
        histograms=_draw_histograms(rules, summary),
        rules=[
            (n, rule.text, summary.dropped.get(n, [])) for n, rule in rules.keep.items()
        ],
        kept=summary.kept,
        mixture=_list_mixture(summary),
        cut=", ".join(rules.cut),
        unfinished=corpus.unfinished,
        alarms=list_alarms(corpus, rules, summary),
        lost="" if lost is None else str(lost),
        contaminated=[
            item
            for stage in stages
            if isinstance(stage, DecontaminateStage)
            for item in count_contaminated_documents(stage, corpus.shards)[:_MOST_ITEMS]
        ],
    )
    with replace_file(path) as new:
        new.write_text(page, "utf-8")


def compute_funnel(rules: FilterRules, summary: CorpusSummary) -> list[dict[str, Any]]:
    """Computes what is left after each rule, from all documents down."""
    sources = sorted({source for _, source in summary.documents})
    rows = []
    for rule in ("", "has text", *rules.keep):
        documents = {source: summary.documents[rule, source] for source in sources}
        left = sum(documents.values())
        rows.append(
            {
                "rule": rule or "all documents",
                "expression": rules.keep[rule].text if rule in rules.keep else "",
                "left": left,
                "bytes": sum(summary.bytes[rule, source] for source in sources),
                "dropped": rows[-1]["left"] - left if rows else 0,
                "by_source": documents,
                "of_all": left / max(1, rows[0]["left"]) if rows else 1.0,
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
    for (source, _), (_, size, _, _) in summary.mixture.items():
        kept_bytes[source] += int(size)
    alarms = []
    for source in sorted({source for _, source in summary.documents}):
        total = summary.bytes["has text", source]
        if total == 0 or total - kept_bytes[source] <= _ALARM_SHARE * total:
            continue
        losses = []
        before = total
        for name, rule in rules.keep.items():
            after = summary.bytes[name, source]
            kind = "" if settled_labels.isdisjoint(rule.label_names) else " (copies)"
            losses.append((before - after, f"{name}{kind}"))
            before = after
        losses.append((before - kept_bytes[source], f"cut {', '.join(rules.cut)}"))
        losses.sort(key=lambda loss: -loss[0])
        reasons = [
            f"{name} {size / total:.0%}" for size, name in losses if size >= total / 200
        ]
        share = 1 - kept_bytes[source] / total
        alarms.append(
            f'alarm: source "{source}" loses {share:.0%} of its text '
            f"({total / 1e6:,.1f} MB): "
            f"{', '.join(reasons)}"
        )
    return alarms


def _list_mixture(summary: CorpusSummary) -> list[dict[str, Any]]:
    rows = []
    for (source, language), (documents, size, tried, tokens) in sorted(
        summary.mixture.items(), key=lambda item: (item[0][0], -item[1][1])
    ):
        row = {
            "source": source,
            "language": language,
            "documents": documents,
            "bytes": size,
        }
        rows.append(row | {"tokens": size * tokens / tried if tried else None})
    return rows


def _draw_histograms(
    rules: FilterRules, summary: CorpusSummary
) -> list[dict[str, Any]]:
    """Draws labels that rules compare with numbers first, each with the values where
    they cut, then others that rules name."""
    thresholds: dict[str, list[Threshold]] = {}
    for rule in rules.keep.values():
        for threshold in rule.thresholds:
            thresholds.setdefault(threshold.label, []).append(threshold)
    named = rules.label_names
    order = sorted(
        summary.value_samples,
        key=lambda label: (label not in thresholds, label not in named, label),
    )
    charts = []
    for label in order:
        sample = summary.value_samples[label][1]
        values = sample[np.isfinite(sample)]
        if values.size:
            svg = _draw_histogram(values, thresholds.get(label, []))
            charts.append({"label": label, "number": values.size, "svg": svg})
    return charts


def _draw_histogram(values: np.ndarray, thresholds: Sequence[Threshold]) -> str:
    """Draws a histogram with a line at each threshold, as SVG."""
    least, most = np.quantile(values, (0.005, 0.995))
    # Thresholds lie in the picture, also where no value does.
    low = min(float(least), *(threshold.value for threshold in thresholds), float(most))
    high = max(
        float(most), *(threshold.value for threshold in thresholds), float(least)
    )
    # Counts and perplexities span decades.
    logarithmic = low >= 0 and high > 50 * max(float(np.median(values)), 1e-9) > 0
    scale = np.log1p if logarithmic else np.asarray
    left = float(scale(low))
    right = float(scale(high))
    right = right if right > left else left + 1
    counts, _ = np.histogram(np.clip(scale(values), left, right), _BINS, (left, right))
    height = np.sqrt(counts / max(1, counts.max())) * (
        _HEIGHT - 24
    )  # roots: rare values show
    width = _WIDTH / _BINS
    floor = _HEIGHT - 16
    parts = [
        f'<rect x="{i * width:.1f}" y="{floor - bar:.1f}" width="{width - 1:.1f}" '
        f'height="{bar:.1f}" class="in"/>'
        for i, bar in enumerate(height)
    ]
    for threshold in thresholds:
        x = (float(scale(threshold.value)) - left) / (right - left) * _WIDTH
        anchor = "end" if x > _WIDTH / 2 else "start"
        text = html.escape(f"{threshold.comparison} {threshold.value:g}")
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{floor}"/>'
            f'<text x="{x:.1f}" y="10" text-anchor="{anchor}">{text}</text>'
        )
    parts.append(f'<text x="0" y="{_HEIGHT - 2}">{low:.4g}</text>')
    note = " (log)" if logarithmic else ""
    parts.append(
        f'<text x="{_WIDTH}" y="{_HEIGHT - 2}" '
        f'text-anchor="end">{high:.4g}{note}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return f"{len(value)} of them"
    return "none" if value is None else str(value)
