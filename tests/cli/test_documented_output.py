"""What README.md and docs/*.md show as a command's output is what the command
prints."""

import runpy
from pathlib import Path

import pytest

OUTPUTS = runpy.run_path(str(Path(__file__).parents[2] / "docs/outputs.py"))
PAGES = OUTPUTS["list_pages"]()
TABLE = ["name    seconds", "", "one       1.5 s", "two        12 s", "three     2 min"]


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_what_commands_print(page):
    """Fails too where a block shows output without its command or a reason not to run
    it."""
    new = OUTPUTS["rewrite_page"](page, OUTPUTS["run_command"])
    assert page.read_text() == new, "write it anew: make docs"


def rewrite(tmp_path: Path, text: str) -> str:
    page = tmp_path / "page.md"
    page.write_text(text)
    return OUTPUTS["rewrite_page"](
        page, lambda command: TABLE if command == "maxlm x" else []
    )


def test_figures_are_written_anew_and_the_selection_stays(tmp_path):
    shown = "a\n```\n$ maxlm x\nname    seconds\ntwo        9 s\n```\nb\n"
    new = "a\n```\n$ maxlm x\nname    seconds\n...\ntwo        12 s\n...\n```\nb\n"
    assert rewrite(tmp_path, shown) == new
    assert rewrite(tmp_path, new) == new
    # Lines that are no longer left out need no elision.
    block = "<!-- run: maxlm x -->\n```text\n{}\n```\n"
    whole = block.format("\n".join(TABLE))
    elided = (
        "name    seconds\n...\n\none       1.5 s\n...\ntwo        12 s\nthree     2 min"
    )
    assert rewrite(tmp_path, block.format(elided)) == whole
    assert rewrite(tmp_path, whole) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nerror: no\n```\n", "page.md:1: a block of output without its command"),
        (
            "a\n\n```\n$ maxlm x\nno such words\n```\n",
            "page.md:3: no line printed is like",
        ),
        (
            "```\n$ maxlm x\ntwo 1 s\nname seconds\n```\n",
            "page.md:1: no line printed is like",
        ),
    ],
)
def test_what_no_command_prints_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        rewrite(tmp_path, text)


def test_input_and_what_cannot_be_run_stay_as_they_are(tmp_path):
    text = (
        "```\nmaxlm x  # prints a table\nmake \\\n  all\n```\n```yaml\nname: 1\n```\n"
        "<!-- not run: needs a TPU -->\n```\nname 7\n```\n"
    )
    assert rewrite(tmp_path, text) == text
