"""A headless Chromium, and reports open in it."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


# By module: while it lives, no other test of this process could start an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the program that $CHROMIUM names, or the first on the path."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs the package playwright"
    )
    program = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if program is None:
        pytest.skip(
            f"needs Chromium: set CHROMIUM, or install one of {', '.join(NAMES)}"
        )
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, timeout=120_000)
        yield running
        running.close()


@dataclass
class Report:
    """An open report."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and exceptions."""
    requests: list[str] = field(default_factory=list)
    """Of anything but the page itself."""

    def text(self, selector: str) -> str:
        """As it is read: units do not break away from their figures by a special
        space."""
        return self.page.inner_text(selector).replace("\u00a0", " ")


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Report]]:
    """``open_report(plan, width=1200, color_scheme=None)``: the page of a plan's JSON,
    or a path's, loaded."""
    from maxlm.runtime.report_page import write_report_page

    opened = []

    def opening(
        plan: dict[str, Any] | Path, width: int = 1200, color_scheme: str | None = None
    ) -> Report:
        if isinstance(plan, Path):
            path = plan
        else:
            path = tmp_path / "report.html"
            write_report_page(path, "maxlm.plan", plan["name"], plan)
        page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=color_scheme
        )
        report = Report(page)
        opened.append(report)
        record_complaints(page, report.complaints)
        page.on("request", lambda request: report.requests.append(request.url))
        page.goto(path.as_uri())
        report.requests.remove(path.as_uri())
        return report

    yield opening
    for report in opened:
        report.page.close()
    for report in opened:
        assert report.complaints == []
        assert report.requests == []


def record_complaints(page: Any, complaints: list[str]) -> None:
    """Appends what the page's scripts complain about, as it happens."""

    def on_console(line: Any) -> None:
        if line.type in ("error", "warning"):
            complaints.append(line.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))
