"""The report counts what the rules do, and shows documents without being led astray by
them."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from maxlm.cli.main import main
from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.report import (
    compute_funnel,
    list_alarms,
    summarize_corpus,
    write_report,
)
from maxlm.corpus.run import run_recipe
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.runtime.pool import WorkerPool
from tests.corpus.corpora import recipe


@pytest.fixture(scope="module")
def figures(whole):
    corpus = OpenCorpus.open(whole)
    with WorkerPool(1) as pool:
        return corpus, summarize_corpus(corpus, corpus.resolve_rules(), pool)


def test_the_funnel_ends_at_what_is_kept(figures, whole):
    corpus, summary = figures
    rows = compute_funnel(corpus.resolve_rules(), summary)
    assert [row["rule"] for row in rows] == [
        "all documents",
        "has text",
        "long",
        "unique",
    ]
    assert rows[0]["left"] == 240
    for before, after in pairwise(rows):
        assert before["left"] - after["dropped"] == after["left"]
        assert sum(after["by_source"].values()) == after["left"]
    taken = list(read_documents(SourceConfig(documents=(str(whole),))))
    assert rows[-1]["left"] == len(taken)
    assert rows[-1]["bytes"] == sum(len(document.text) for document in taken)
    by_source = Counter(document.id.split("-")[0] for document in taken)
    assert rows[-1]["by_source"] == by_source
    mixture = summary.mixture.values()
    assert sum(counts.documents for counts in mixture) == len(taken)
    assert sum(counts.bytes for counts in mixture) == rows[-1]["bytes"]


def test_samples_fell_where_the_report_says(figures):
    _, summary = figures
    for rule, samples in summary.dropped.items():
        assert 0 < len(samples) <= 5, rule
    for sample in summary.dropped["long"]:
        assert sample.labels["heuristics.words"] < 20
    for sample in summary.dropped["unique"]:
        assert sample.labels["exact.duplicate"] or sample.labels["near.duplicate"]
    for sample in summary.kept_samples:
        assert sample.labels["heuristics.words"] >= 20


class PageElements(HTMLParser):
    """Collects elements and what would be fetched or run."""

    def __init__(self):
        super().__init__()
        self.tags = Counter()
        self.fetched = []
        self.text = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v != "data:,"]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_hostile_documents_as_text(tmp_path):
    hostile = (
        "<script>alert('x')</script> {{ 7 * 7 }} &amp; " + "words of the page " * 20
    )
    (tmp_path / "web.jsonl").write_text(
        json.dumps({"text": hostile, "id": "<img src=x>"}) + "\n"
    )
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    out = tmp_path / "corpus"
    corpus = OpenCorpus.open(run_recipe(recipe(tmp_path, out)))
    with WorkerPool(1) as pool:
        summary = summarize_corpus(corpus, corpus.resolve_rules(), pool)
    write_report(corpus, corpus.resolve_rules(), summary, out / "report.html")
    page = PageElements()
    page.feed((out / "report.html").read_text())
    text = "".join(page.text)
    assert page.tags["script"] == page.tags["img"] == 0
    assert page.fetched == []
    assert "<script>alert('x')</script> {{ 7 * 7 }} &amp; words" in text
    assert "heuristics.words >= 20" in text
    assert "<img src=x>" in text


def test_labels_that_rules_name_are_drawn_first_with_their_thresholds(
    figures, tmp_path
):
    corpus, summary = figures
    write_report(corpus, corpus.resolve_rules(), summary, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert [chart.count("<line") for chart in charts] == [1] + [0] * (len(charts) - 1)
    assert ">&gt;= 20</text>" in charts[0]
    # The share of values below the line is the share of bars left of it, up to a bar.
    line = float(re.findall(r'<line x1="([\d.]+)"', charts[0])[0])
    bars = re.findall(r'<rect x="([\d.]+)" .*?height="([\d.]+)"', charts[0])
    # A bar's height goes with the square root of its count.
    counts = [(float(x), float(height) ** 2) for x, height in bars]
    total = sum(count for _, count in counts)
    share_left = sum(count for x, count in counts if x < line) / total
    values = summary.value_samples["heuristics.words"][1]
    assert abs(share_left - (values < 20).mean()) < 0.08
    assert re.findall(r"<figcaption><code>(.*?)</code>", page)[0] == "heuristics.words"
    assert page.count("<svg") == len(summary.value_samples)


def test_evaluation_sets_in_the_documents_are_listed(tmp_path):
    question = "Which of the four rivers that leave the lake runs north past the old stone mill?"
    rows = [
        {"text": f"Some words before. {question} Some more words after it."},
        {"text": "None."},
    ]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "books.jsonl").write_text(
        json.dumps({"text": "A book about other things."}) + "\n"
    )
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(json.dumps({"text": question}) + "\n")
    stage = {"stage": "decontaminate", "sets": {"quiz": {"documents": [str(quiz)]}}}
    out = tmp_path / "corpus"
    corpus = OpenCorpus.open(run_recipe(recipe(tmp_path, out, stages=[stage], keep={})))
    with WorkerPool(1) as pool:
        summary = summarize_corpus(corpus, corpus.resolve_rules(), pool)
    write_report(corpus, corpus.resolve_rules(), summary, out / "report.html")
    page = (out / "report.html").read_text()
    assert f"<td>quiz</td><td>{quiz}:1</td>" in page
    assert '<td class="num">1</td><td class="num">100.0%</td>' in page


def test_a_source_that_loses_most_of_its_text_raises_an_alarm(figures):
    corpus, summary = figures
    assert list_alarms(corpus, corpus.resolve_rules(), summary) == []
    keep = corpus.recipe.keep | {"web": 'source != "books" or heuristics.words > 10000'}
    rules = corpus.resolve_rules(keep)
    with WorkerPool(1) as pool:
        summary = summarize_corpus(corpus, rules, pool)
    alarms = list_alarms(corpus, rules, summary)
    assert len(alarms) == 1
    assert re.fullmatch(
        r'alarm: source "books" loses 100% of its text \(0\.0 MB\): web 9\d%.*',
        alarms[0],
    )


def test_a_source_of_copies_raises_an_alarm_of_copies(tmp_path):
    rows = [{"text": "one and the same text of a few words, again and again, " * 5}] * 9
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "books.jsonl").write_text(
        json.dumps({"text": "A book about other things. " * 9})
    )
    corpus = OpenCorpus.open(run_recipe(recipe(tmp_path, tmp_path / "corpus")))
    with WorkerPool(1) as pool:
        summary = summarize_corpus(corpus, corpus.resolve_rules(), pool)
    assert list_alarms(corpus, corpus.resolve_rules(), summary) == [
        'alarm: source "web" loses 89% of its text (0.0 MB): unique (copies) 89%'
    ]


def test_a_run_that_is_not_done_can_be_looked_into(whole, tmp_path, capsys):
    folder = tmp_path / "corpus"
    shutil.copytree(whole, folder)
    shards = sorted((folder / "exact").glob("*.parquet"))
    (folder / "exact" / "manifest.json").unlink()
    shards[0].unlink()
    assert main(["corpus", "report", str(folder)]) == 0
    printed = capsys.readouterr().out
    line = (
        f"not done: stage exact is 4 of 5, {len(shards) - 1} of its {len(shards)} "
        "shards are written; rules that wait for it or later ones: unique; "
        "run maxlm corpus run with its recipe again"
    )
    assert line in printed
    text = (folder / "heuristics" / "manifest.json").read_text()
    manifest = json.loads(text.rpartition("\n")[0])
    assert manifest["counts"]["rows"] == 240
    num_long = 0
    for shard in OpenCorpus.open(whole).shards:
        for table in shard.read_row_groups(["heuristics.words"]):
            num_long += sum(words >= 20 for words in table.column(0).to_pylist())
    assert f" {num_long} " in printed
    assert line in (folder / "report.html").read_text()
    assert main(["corpus", "show", str(folder), "web-3"]) == 0
    assert line in capsys.readouterr().err
    # A store is built of what is done only.
    assert main(["corpus", "export", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "the stage exact is not finished" in capsys.readouterr().err
    (folder / "documents" / "manifest.json").unlink()
    assert main(["corpus", "report", str(folder)]) == 2
    assert (
        f"the stage documents is not finished: {len(shards)} shards are read"
        in capsys.readouterr().err
    )
