"""The page of a run of policies works at a desk's width and a phone's, and shows text
as text."""

import pytest

from maxlm.rl.report import write_run_report
from tests.rl.test_report import make_record, make_sample, write_run

HOSTILE = "</script><img src=x onerror=alert(1)> {{data}} '\"`" + "w" * 300


@pytest.fixture(params=[1200, 390], ids=["desktop", "phone"])
def report(request, open_report, tmp_path):
    samples = [make_sample(number, number / 50) for number in range(50)]
    samples[49]["prompt"] = HOSTILE
    samples[0]["turns"] = [["assistant", "<calc>"], ["tool", HOSTILE]]
    write_run(tmp_path / "run", [make_record(step) for step in range(1, 90)], samples)
    write_run_report(tmp_path / "run", tmp_path / "page.html", 3)
    opened = open_report(tmp_path / "page.html", request.param)
    yield opened
    size = "[document.body.scrollWidth <= innerWidth, document.images.length]"
    assert opened.page.evaluate(size) == [True, 0]


def test_figures_curves_and_samples(report):
    page = report.page
    assert report.text("#headline") == "89 steps, 50 samples"
    assert page.locator("#curves svg").count() == 6
    assert "reward/right is 0 in every rollout" in report.text("#summary")
    rows = page.locator("#phases tbody tr")
    assert rows.count() == 2
    summaries = page.locator("#sample-list summary")
    assert summaries.count() == 3
    page.locator("#sample-list details").first.locator("summary").click()
    assert HOSTILE in report.text("#sample-list details:first-child pre")
    page.select_option("#sample-group", label="Lowest reward")
    first = page.locator("#sample-list details").first
    assert first.locator("summary b").inner_text() == "0"
    first.locator("summary").click()
    assert first.locator(".role").all_inner_texts() == ["prompt", "assistant", "tool"]
    assert "Rewards: right 0; advantage -0.5" in first.inner_text()
