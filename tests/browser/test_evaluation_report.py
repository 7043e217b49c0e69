"""The page of evaluations works at a desk's width and a phone's, and shows text as
text."""

import pytest

from maxlm.evaluation.report import build_report, write_report
from maxlm.evaluation.results import find_evaluations
from tests.evaluation.folders import make_sample, write_evaluation

HOSTILE = (
    "</script><img src=x onerror=alert(1)> \u202eright to left {{data}} '\"` "
    + "w" * 300
)
RIGHT = [1.0] * 30 + [0.0] * 10
WRONG = [0.0] * 30 + [1.0] * 5 + [0.0] * 5


@pytest.fixture(params=[1200, 390], ids=["desktop", "phone"])
def report(request, open_report, tmp_path):
    """A run of two checkpoints, and a model that is worse at one task of three, with a
    group."""
    calls = {"gen_args_0": {"arg_0": "<i>2+2=</i>", "arg_1": {}}}
    text = {
        "resps": [["<u>5</u>"]],
        "filtered_resps": ["<u>5</u>"],
        "target": "<s>4</s>",
    }
    samples = {"text": [make_sample(0, {"acc": 0.0}, arguments=calls, **text)]}
    tasks = {"text": {"acc": [0.0]}, "m_art": {"acc": [1.0] * 9}}
    for model, step, scores in (
        ("run", 10, WRONG),
        ("run", 20, RIGHT),
        ("<b>other", None, WRONG),
    ):
        tasks |= {"arc": {"acc": scores}, "m_law": {"acc": scores[25:]}}
        options = {
            "maxlm": {"step": step, "seconds": 90},
            "groups": {"m": ["m_law", "m_art"]},
        }
        lines = [make_sample(i, {"acc": x}) for i, x in enumerate(scores)]
        # One that no model has right, and that is therefore shown.
        lines[35]["arguments"] = {
            i: {0: HOSTILE, 1: x} for i, x in enumerate((" a", "<b>b</b>"))
        }
        samples["arc"] = lines
        write_evaluation(
            tmp_path / str(step), tasks, model=model, samples=samples, **options
        )
    write_report(build_report(find_evaluations(tmp_path)), tmp_path / "page.html")
    opened = open_report(tmp_path / "page.html", request.param)
    yield opened
    size = "[document.body.scrollWidth <= innerWidth, document.images.length]"
    assert opened.page.evaluate(size) == [True, 0]


def test_tables_bars_and_curves(report):
    page = report.page
    arc = page.locator("#results-table tr", has_text="arc").inner_text()
    assert "12.5%" in arc
    assert "75.0%\n59.8 – 85.8" in arc  # Wilson's, of 30 of 40 (any calculator).
    page.fill("#results-table-filter", "text")
    assert page.locator("#results-table tbody tr:visible").count() == 1
    assert page.locator("#steps svg").count() == 3
    assert (
        page.locator("#steps svg[aria-label='run · step 20: 12.5% to 75.0%']").count()
        == 1
    )
    subjects = page.locator("#group-m-table tbody tr").all_inner_texts()
    assert [row.split()[0] for row in subjects] == ["art", "law"]  # Best first.
    bar = page.locator("#group-m-table tr:last-child .track i").first
    assert bar.get_attribute("style").startswith("width:33.333")
    assert report.text("#cost").count("90 s") == 3


def test_samples_are_filtered_and_hostile_text_stays_text(report):
    page = report.page
    total = report.page.locator("details").count()
    page.get_by_label("Task").last.select_option(label="arc")
    assert page.inner_text("#sample-count") == f"20 of {total} samples"
    page.get_by_label("Outcome").select_option(label="Models disagree")
    disagree = page.locator("details").count()
    assert 0 < disagree < 20
    assert (
        page.locator("details .yes").count()
        == page.locator("details .no").count()
        == disagree
    )
    page.get_by_label("Outcome").select_option(label="All wrong")
    page.get_by_label("Search").fill("RIGHT left")
    page.locator("summary").click()
    assert page.locator("details pre").inner_text() == HOSTILE
    assert "<b>b</b>" in page.locator("details td").all_inner_texts()[3]
    page.get_by_label("Task").last.select_option(label="All")
    page.get_by_label("Search").fill("2+2")
    page.locator("summary").click()
    page.locator("details pre").nth(2).wait_for()
    assert page.locator("details pre").all_inner_texts() == [
        "<i>2+2=</i>",
        "<u>5</u>",
        "<u>5</u>",
    ]
    assert "<s>4</s>" in page.locator("details").inner_text()
    assert "<b>other" in report.text("h1")
    assert (
        page.locator("main :is(img, b:not(.track b), i:not(.track i), u, s)").count()
        == 0
    )
