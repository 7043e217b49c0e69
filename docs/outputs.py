"""Hold the output that README.md and docs/*.md print to what the commands print.

A fenced block with lines ``$ maxlm ...`` is a session: each command is run, and the
lines below it are lines of its output. ``<!-- run: maxlm ... -->`` above a block does
the same for a block that shows no command. ``...`` stands for lines left out. ``make
docs`` writes the figures anew and keeps the selection of lines; a test compares. What
cannot be run has ``<!-- not run: why -->`` above it. Blocks that hold commands alone,
or are marked as a language's, are no output.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Written whole from the code, by generate.py.
_GENERATED = ("settings.md", "recipe.md", "api.md")
# Columns of the terminal that the pages show.
WIDTH = 118
ELISION = "..."
# Below this likeness a shown line is of another output.
_LIKENESS = 0.6
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>run|not run): (?P<words>.*?) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PROGRAM = re.compile(r"(maxlm|make|pip|python|export|curl|git|\.venv/bin/\w+)\b")
_NUMBER = re.compile(r"\d[\d.,]*(?: ?(?:[KMGT]?i?B|µs|ms|s|min|h|days|[KMBT])\b)?")

Runner = Callable[[str], list[str]]
"""Runs a command line; returns the lines that it prints."""


@dataclass(frozen=True)
class OutputBlock:
    """A fenced block that shows output."""

    page: str
    line: int
    """Line of its fence, from 1."""
    text: str
    command: str | None
    """The command that made all of it, of a ``run`` mark; None: its own ``$`` lines
    say."""
    reason: str | None
    """Why it is not run; None: it is."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def list_pages() -> list[Path]:
    """List the pages whose blocks are looked at."""
    pages = [
        path for path in (ROOT / "docs").glob("*.md") if path.name not in _GENERATED
    ]
    return [ROOT / "README.md", *sorted(pages)]


def list_output_blocks(page: Path) -> list[OutputBlock]:
    """List the blocks of a page that show output. Raises ValueError: one shows output
    of which neither a command nor a reason is given."""
    text = page.read_text("utf-8")
    return [block for block, _ in _find_blocks(page.name, text)]


def rewrite_page(page: Path, run: Runner) -> str:
    """Return a page's text with the figures of its commands' output written anew.
    Raises ValueError: a shown line is like no line that the command prints."""
    text = page.read_text("utf-8")
    for block, (start, end) in reversed(list(_find_blocks(page.name, text))):
        if block.reason is None:
            text = text[:start] + rewrite_block(block, run) + text[end:]
    return text


def _find_blocks(page: str, text: str) -> Iterator[tuple[OutputBlock, tuple[int, int]]]:
    """Yield blocks of output, and the span of their text within the page's."""
    for match in _BLOCK.finditer(text):
        mark = match["mark"]
        is_session = match["text"].startswith("$ ")
        if mark is None and (
            match["language"] not in ("", "text") or _is_input(match["text"])
        ):
            continue
        line = text.count("\n", 0, match.start("language")) + 1
        if mark is None and not is_session:
            raise ValueError(
                f"{page}:{line}: a block of output without its command; begin it with "
                "`$ maxlm ...`, or put `<!-- run: COMMAND -->` or `<!-- not run: "
                "REASON -->` above"
            )
        block = OutputBlock(
            page=page,
            line=line,
            text=match["text"],
            command=match["words"] if mark == "run" else None,
            reason=match["words"] if mark == "not run" else None,
        )
        yield block, match.span("text")


def _is_input(text: str) -> bool:
    """Return whether a block holds commands to type and comments, and nothing that they
    print."""
    lines = text.replace("\\\n", " ").splitlines()
    return all(
        not line.strip() or line.startswith("#") or _PROGRAM.match(line.strip())
        for line in lines
    )


def rewrite_block(block: OutputBlock, run: Runner) -> str:
    """Return a block's text with the lines that its commands print now."""
    if block.command is not None:
        return "".join(
            f"{line}\n"
            for line in _select(block, block.text.splitlines(), run(block.command))
        )
    sections: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            sections.append((line.removeprefix("$ "), []))
        else:
            sections[-1][1].append(line)
    lines = []
    for command, shown in sections:
        lines += [f"$ {command}", *_select(block, shown, run(command))]
    return "".join(f"{line}\n" for line in lines)


def _select(
    block: OutputBlock, shown: Sequence[str], printed: Sequence[str]
) -> list[str]:
    """Return the printed lines that are like the shown ones, in order, with ``...``
    wherever lines between them are left out."""
    lines = []
    place = 0  # in what is printed, behind the last selected line
    blank = False
    for line in shown:
        if line in ("", ELISION):
            blank = blank or not line
            continue
        index = _find_line(line, printed, place)
        if index is None:
            raise ValueError(f"{block.place}: no line printed is like this one: {line}")
        if any(text.strip() for text in printed[place:index]):
            lines.append(ELISION)
        if blank:
            lines.append("")
        lines.append(printed[index])
        place = index + 1
        blank = False
    if any(text.strip() for text in printed[place:]):
        lines.append(ELISION)
    return lines


def _find_line(line: str, printed: Sequence[str], start: int) -> int | None:
    """Find the first printed line from an index on that differs from a line in numbers
    alone, else the one most like it."""
    skeleton = _strip_figures(line)
    skeletons = [_strip_figures(text) for text in printed]
    for index in range(start, len(printed)):
        if skeletons[index] == skeleton:
            return index
    likeness = {
        index: SequenceMatcher(None, skeleton, skeletons[index], autojunk=False).ratio()
        for index in range(start, len(printed))
        if printed[index].strip()
    }
    best = max(likeness, key=lambda index: likeness[index], default=None)
    return best if best is not None and likeness[best] >= _LIKENESS else None


def _strip_figures(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


@cache
def _run_cached(command: str) -> tuple[str, ...]:
    program, *arguments = shlex.split(command, comments=True)
    if program == "maxlm":
        stdout, stderr = _run_maxlm(arguments)
    elif program == "python":
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        stdout = process.stdout
        stderr = ""
    else:
        raise ValueError(f"{command}: neither maxlm nor python")
    # A line of stderr is as long as it is: the pages fold it as a terminal does.
    messages = [
        part
        for line in stderr.splitlines()
        for part in textwrap.wrap(
            line, WIDTH, break_long_words=False, break_on_hyphens=False
        )
    ]
    return (*(line.rstrip() for line in stdout.splitlines()), *messages)


def _run_maxlm(arguments: list[str]) -> tuple[str, str]:
    """Run ``maxlm`` in this process, on a terminal of :data:`WIDTH` columns; return its
    stdout and its stderr."""
    from maxlm.cli.main import main

    stdout = io.StringIO()
    stderr = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main(arguments)
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return stdout.getvalue(), stderr.getvalue()


def run_command(command: str) -> list[str]:
    """Run a command line, ``maxlm ...`` or ``python benchmarks/...``; return the lines
    that it prints, as a terminal of :data:`WIDTH` columns shows them: stdout first,
    then stderr."""
    return list(_run_cached(command))
