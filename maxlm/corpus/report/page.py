"""A corpus's figures as one HTML page that needs no network: `page.html` is its template."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.recipe import FilterRules
from maxlm.corpus.report.summary import CorpusSummary
from maxlm.corpus.shards import DOCUMENTS
from maxlm.corpus.stages.decontaminate import DecontaminateStage, count_contaminated_documents
from maxlm.runtime.files import replace_file

_BINS = 48
_MOST_ITEMS = 100
_WIDTH, _HEIGHT = 440, 120


def write_report(
    corpus: OpenCorpus, rules: FilterRules, summary: CorpusSummary, path: Path
) -> None:
    """Write the page, whole or not at all."""
    from jinja2 import Environment

    template = files("maxlm.corpus.report").joinpath("page.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": "{:,.0f}".format, "share": "{:.1%}".format, "value": _format_value
    }  # fmt: skip
    sources, stages = sorted({source for _, source in summary.documents}), corpus.recipe.stages
    contaminated = [
        item
        for stage in stages
        if isinstance(stage, DecontaminateStage)
        for item in count_contaminated_documents(stage, corpus.shards)[:_MOST_ITEMS]
    ]
    page = environment.from_string(template).render(
        name=corpus.folder.resolve().name,
        sources=sources,
        read=corpus.read_manifest(DOCUMENTS)["counts"],
        funnel=compute_funnel(rules, summary, sources),
        stages=[(stage.unique_name, corpus.read_manifest(stage.unique_name)) for stage in stages],
        histograms=_draw_histograms(rules, summary),
        rules=[(n, rule.text, summary.dropped.get(n, [])) for n, rule in rules.keep.items()],
        kept=summary.kept,
        mixture=_list_mixture(summary),
        cut=", ".join(rules.cut),
        contaminated=contaminated,
    )
    with replace_file(path) as new:
        new.write_text(page, "utf-8")


def compute_funnel(
    rules: FilterRules, summary: CorpusSummary, sources: Sequence[str]
) -> list[dict[str, Any]]:
    """Computes what is left after each rule, from all documents down."""
    rows, before = [], None
    for rule in ("", "has text", *rules.keep):
        documents = {source: summary.documents[rule, source] for source in sources}
        left = sum(documents.values())
        rows.append(
            {
                "rule": rule or "all documents",
                "expression": rules.keep[rule].text if rule in rules.keep else "",
                "left": left,
                "bytes": sum(summary.bytes[rule, source] for source in sources),
                "dropped": 0 if before is None else before - left,
                "by_source": documents,
                "of_all": left / max(1, rows[0]["left"]) if rows else 1.0,
            }
        )
        before = left
    return rows


def _list_mixture(summary: CorpusSummary) -> list[dict[str, Any]]:
    rows = []
    for (source, language), (documents, size, tried, tokens) in sorted(
        summary.mixture.items(), key=lambda item: (item[0][0], -item[1][1])
    ):
        estimate = size * tokens / tried if tried else None
        row = {"source": source, "language": language, "documents": documents, "bytes": size}
        rows.append(row | {"tokens": estimate})
    return rows


def _draw_histograms(rules: FilterRules, summary: CorpusSummary) -> list[dict[str, Any]]:
    """Labels that rules name first."""
    charts = []
    named = rules.label_names
    for label in sorted(summary.value_samples, key=lambda label: (label not in named, label)):
        values = summary.value_samples[label][1]
        values = values[np.isfinite(values)]
        if values.size:
            charts.append({"label": label, "number": values.size, "svg": _draw_histogram(values)})
    return charts


def _draw_histogram(values: np.ndarray) -> str:
    """A histogram as SVG."""
    low, high = np.quantile(values, (0.005, 0.995))
    # Counts and perplexities span decades.
    logarithmic = low >= 0 and high > 50 * max(float(np.median(values)), 1e-9) > 0
    scale = np.log1p if logarithmic else np.asarray
    left, right = float(scale(low)), float(scale(high))
    right = right if right > left else left + 1
    counts, _ = np.histogram(np.clip(scale(values), left, right), _BINS, (left, right))
    height = np.sqrt(counts / max(1, counts.max())) * (_HEIGHT - 24)  # roots: rare values show
    width, floor = _WIDTH / _BINS, _HEIGHT - 16
    parts = [
        f'<rect x="{i * width:.1f}" y="{floor - each:.1f}" width="{width - 1:.1f}" '
        f'height="{each:.1f}" class="in"/>'
        for i, each in enumerate(height)
    ]
    ends = (f"{low:.4g}", f"{high:.4g}{' (log)' if logarithmic else ''}")
    parts.append(f'<text x="0" y="{_HEIGHT - 2}">{ends[0]}</text>')
    parts.append(f'<text x="{_WIDTH}" y="{_HEIGHT - 2}" text-anchor="end">{ends[1]}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return f"{len(value)} of them"
    return "none" if value is None else str(value)
