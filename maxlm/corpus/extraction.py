"""Text, title, date and language of HTML pages, read in a process of its own.

Parsers of HTML can loop, eat all memory or crash, inside C code that holds the
interpreter's lock, where neither signal handlers nor threads get a word in. So a child
process reads the pages. The kernel ends it when a page has used up its processor time,
and the page is given up, not the run. A limit on wall time, which depends on what else
the machine does, is for what hangs without any.
"""

import logging
import math
import re
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

from maxlm.config import MaxlmError
from maxlm.corpus.encoding import CONTROLS, decode, remove_control_characters

_MEMORY = 4 << 30  # Bytes of address space; what needs more is broken.
_GRACE = 60  # Seconds on the clock for a page, beside 20 for each of processor time.
_CHILD = "import sys; sys.path[:] = {path!r}; import {module} as m; m.serve_extractor{arguments!r}"
_HEAD = 1 << 16  # Characters of a page in which its metadata are looked for.
_TAG = re.compile(r"<[a-zA-Z!/?]")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-\w+)*")
_PUBLISHED = re.compile(r'"datePublished"\s*:\s*"([^"]{8,40})"')
_DAY = re.compile(r"\s*((?:19|20)\d\d)[-/.]?([01]\d)[-/.]?([0-3]\d)(?!\d)")
# Open Graph, schema.org, Google Scholar, Dublin Core and the rest, best first.
_DATES = (
    'meta[property="article:published_time"]',
    'meta[itemprop="datePublished"]',
    'meta[name="citation_publication_date" i]',
    'meta[name^="dc.date" i], meta[name^="dcterms." i]',
    'meta[name="pubdate" i], meta[name="publish-date" i], meta[name="date" i]',
    "time[datetime]",
)
_TITLE_CHARACTERS = 500

MOST_DEPTH = 256
"""Depth of nested elements beyond which libxml2, below trafilatura, drops the rest of a
page."""
_SLOW_DEPTH = 3000
"""Depth beyond which resiliparse, whose time grows with its square, is slow."""
_FLAT_DEPTH = (
    200  # Of counted elements that keep their tags; parsers add some of their own.
)
# A tag with its attributes; in quotes there may be a ">".
_TAG_WITH_NAME = re.compile(
    r"""<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:[^<>"']|"[^"<]*"|'[^'<]*')*>?"""
)
# Elements without an end tag, and those whose end tag may be left out, by their first
# letters.
_UNCLOSED = frozenset(
    (
        "are",
        "bas",
        "br",
        "col",
        "dd",
        "dt",
        "emb",
        "hr",
        "img",
        "inp",
        "li",
        "lin",
        "met",
        "opt",
    )
).union(("p", "sou", "tbo", "td", "tfo", "th", "the", "tr", "tra", "wbr"))
# Elements whose content is no markup: without their tags it would be text.
_RAW = frozenset(
    ["script", "style", "title", "textarea", "noscript", "iframe", "template", "xmp"]
)
# Elements that the end tag of another element within them does not close.
_BARRIERS = ("div", "table")


@dataclass(frozen=True)
class ExtractedPage:
    """A page that was read, or the reason why it was not."""

    status: str
    """ok, empty, not_html, broken; from outside also too_large and timeout."""
    text: str | None = None
    """Unicode without NUL, other control characters or surrogates."""
    title: str | None = None
    date: str | None = None
    """Date of publication, as YYYY-MM-DD."""
    language_hint: str | None = None
    """Language that the page declares, as BCP 47 in lower case."""
    encoding: str | None = None
    mode: str | None = None
    """Name of the extractor that found the text: "trafilatura" or "fast"."""


def extract_page(
    data: bytes, charset: str | None, use_trafilatura: bool, markdown: bool
) -> ExtractedPage:
    """Read a page.

    Args:
        data: HTML.
        charset: of the HTTP header.
        use_trafilatura: (Barbaresi, ACL 2021) without its fallbacks to other libraries:
            they cost half its speed and lose on both labelled sets of
            `benchmarks/corpus_extract.py`. Else, and where it finds nothing, or less of
            a page that is too deep for it, resiliparse is used (Bevendorff et al., ECIR
            2018).
        markdown: headings, emphasis and fences around code; only for trafilatura.
    """
    source, encoding = decode(data, charset)
    # A tenth of random bytes are controls, and they are no UTF-8.
    controls = len(data) - len(data.translate(None, CONTROLS))
    binary = not encoding.startswith("utf") and controls > len(data) // 20
    if binary or not _TAG.search(source):
        return ExtractedPage("not_html", encoding=encoding)
    page = ExtractedPage("ok", None, *_read_metadata(source[:_HEAD]), encoding)
    if source.count("<") > (MOST_DEPTH if use_trafilatura else _SLOW_DEPTH):
        flat = flatten_deep_html(source)
    else:
        flat = source
    text = _trafilatura(flat, markdown) if use_trafilatura else ""
    # Of a page so broken, the more text the better.
    fast_text = _resiliparse(flat) if flat is not source or not text else ""
    if text and len(text.split()) >= len(fast_text.split()):
        return replace(page, text=text, mode="trafilatura")
    if fast_text:
        return replace(page, text=fast_text, mode="fast")
    return replace(page, status="empty")


def _trafilatura(source: str, markdown: bool) -> str:
    import trafilatura

    text = trafilatura.extract(
        source,
        fast=True,
        include_comments=False,
        include_tables=True,
        output_format="markdown" if markdown else "txt",
    )
    return remove_control_characters(text or "").strip()


def _resiliparse(source: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(
        source, main_content=True, alt_texts=False, comments=False, post_meta=False
    )
    return remove_control_characters(text).strip()


def flatten_deep_html(source: str) -> str:
    """Removes the tags, but not the text, of elements that lie too deep in others for
    the parsers.

    A page of unclosed tags (`<font>` before each paragraph) is deep by accident: what
    it says is all there, and so is what its outer elements say of it. An end tag closes
    the last open element of its name and all within, but for those that hold an element
    of another kind (a `</b>` in a table cell closes none outside the table). Rows and
    items do not count. A page that is not deep stays as it is. Takes time in proportion
    to the page.
    """
    depth = 0
    positions: dict[
        str, list[int]
    ] = {}  # By name, the depths of its open elements, rising.
    stack: list[str] = []
    pieces = []
    done = 0
    for tag in _TAG_WITH_NAME.finditer(source):
        closes = bool(tag[1])
        name = tag[2].lower()
        if name in _RAW or name[:3] in _UNCLOSED:
            continue
        if not closes:
            is_deep = depth >= _FLAT_DEPTH
            positions.setdefault(name, []).append(depth)
            stack.append(name)
            depth += 1
        else:
            opened = positions.get(name)
            if not opened:
                continue
            position = opened[-1]
            if _is_behind_barrier(name, position, positions):
                continue
            while depth > position:
                positions[stack.pop()].pop()
                depth -= 1
            is_deep = position >= _FLAT_DEPTH
        if is_deep:
            pieces.append(source[done : tag.start()])
            done = tag.end()
    if not pieces:
        return source
    return "".join([*pieces, source[done:]])


def _is_behind_barrier(
    name: str, position: int, positions: Mapping[str, Sequence[int]]
) -> bool:
    """Tells whether an open element holds one whose content its end tag does not
    close."""
    if name in _BARRIERS or name in ("body", "html"):
        return False
    for barrier in _BARRIERS:
        depths = positions.get(barrier)
        if depths and depths[-1] > position:
            return True
    return False


def _read_metadata(head: str) -> tuple[str | None, str | None, str | None]:
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(head)
    document: Any = tree.document
    published = _PUBLISHED.search(head)
    root = document.query_selector("html[lang]")
    language = root.getattr("lang").lower() if root else ""
    nodes = [node for each in _DATES for node in document.query_selector_all(each)]
    days = [node.getattr("content") or node.getattr("datetime") or "" for node in nodes]
    days += [published[1]] if published else []
    return (
        remove_control_characters(" ".join((tree.title or "").split()))[
            :_TITLE_CHARACTERS
        ]
        or None,
        next(filter(None, map(_parse_day, days)), None),
        language if _LANGUAGE.fullmatch(language) else None,
    )


def _parse_day(text: str) -> str | None:
    try:
        return (
            date(*map(int, found.groups())).isoformat()
            if (found := _DAY.match(text))
            else None
        )
    except ValueError:
        return None


class HtmlExtractorProcess:
    """Reads pages in a child process, which starts with the first page and ends with
    this object.

    Works in any process and thread, daemonic ones included; used by one thread at a
    time.
    """

    def __init__(self, use_trafilatura: bool, markdown: bool, seconds: float):
        """See `extract_page`; `seconds`: processor time that each way of a page may
        take."""
        self._ways = (
            [(True, markdown), (False, False)] if use_trafilatura else [(False, False)]
        )
        self._seconds = seconds
        self._child: tuple[subprocess.Popen, Connection] | None = None
        self._end: Callable[[], object] = lambda: None

    def read(self, data: bytes, charset: str | None) -> ExtractedPage:
        """Read a page of HTML, with the charset of its HTTP header. What takes too long
        or fails in one way is tried in the next."""
        page = ExtractedPage("broken")
        for way in self._ways:
            page = self._ask(data, charset, *way)
            if page.status not in (
                "timeout",
                "broken",
            ):
                break
        return page

    def close(self) -> None:
        """End the child process."""
        self._end()
        self._child = None

    def _ask(self, *question: Any) -> ExtractedPage:
        process, connection = self._child or self._start()
        try:
            connection.send(question)
            # A second at a time, so that a suspension of both costs it no more than
            # that.
            if not any(
                connection.poll(1)
                for _ in range(math.ceil(_GRACE + 20 * self._seconds))
            ):
                process.kill()  # It waits for something, and uses none of its time.
            return connection.recv()
        except (EOFError, OSError):  # The page was its end.
            stopped = process.wait() in (-signal.SIGPROF, -signal.SIGKILL)
            self.close()
            return ExtractedPage("timeout" if stopped else "broken")

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            arguments = fd, self._seconds, self._ways[0][0]
            code = _CHILD.format(path=sys.path, module=__name__, arguments=arguments)
            process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[fd])
        connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _stop, process, connection)
        try:
            connection.recv()
        except EOFError as error:
            what = (
                f"the process that extracts text does not start (exit {process.wait()})"
            )
            raise MaxlmError(what, fix="see its error above") from error
        self._child = process, connection
        return self._child


def _stop(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve_extractor(fd: int, cpu_seconds: float, use_trafilatura: bool) -> None:
    """Read pages for the process at the other end, until it ends; see
    `HtmlExtractorProcess`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    connection = Connection(fd)
    extract_page(
        b"<p>", None, use_trafilatura, False
    )  # Else imports are on the first page's time.
    connection.send("ready")
    with suppress(EOFError, ConnectionError):
        while True:
            question = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            try:
                page = extract_page(*question)
            except Exception:  # The parsers raise what they like; the label says so.
                page = ExtractedPage("broken")
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(page)
