"""Reading an HTML page: its main text, title, date and language.

Runs C code on whatever the web holds; `maxlm.corpus.extraction` runs it at a safe distance.
"""

import re
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from maxlm.corpus.encoding import count_control_bytes, decode, remove_control_characters

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
"""Depth of nested elements beyond which libxml2, below trafilatura, drops the rest of a page."""
TOO_DEEP = 3000
"""Depth beyond which resiliparse, whose time grows with its square, is not tried either."""
_TAG_NAME = re.compile(rb"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
# Elements without an end tag, and those whose end tag may be left out, by their first letters.
_UNCLOSED = frozenset(
    b"are bas br col emb hr img inp lin met sou tra wbr li p dt dd td th tr tbo the tfo opt".split()
)


@dataclass(frozen=True)
class ExtractedPage:
    """A page that was read, or the reason why it was not."""

    status: str
    """ok, empty, not_html, too_deep, broken; from outside also too_large and timeout."""
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
        use_trafilatura: (Barbaresi, ACL 2021) without its fallbacks to other libraries: they cost
            half its speed and lose on both labelled sets of `benchmarks/corpus_extract.py`. Else,
            and where it finds nothing or would be cut short, resiliparse is used (Bevendorff et
            al., ECIR 2018).
        markdown: headings, emphasis and fences around code; only for trafilatura.
    """
    source, encoding = decode(data, charset)
    # A tenth of random bytes are controls, and they are no UTF-8.
    binary = not encoding.startswith("utf") and count_control_bytes(data) > len(data) // 20
    if binary or not _TAG.search(source):
        return ExtractedPage("not_html", encoding=encoding)
    raw = source.encode() if encoding.startswith("utf-16") else data
    few = raw.count(b"<") <= (MOST_DEPTH if use_trafilatura else TOO_DEEP)
    depth = 0 if few else estimate_html_depth(raw)
    if depth > TOO_DEEP:
        return ExtractedPage("too_deep", encoding=encoding)
    page = ExtractedPage("ok", None, *_read_metadata(source[:_HEAD]), encoding)
    if use_trafilatura and depth <= MOST_DEPTH and (text := _trafilatura(source, markdown)):
        return replace(page, text=text, mode="trafilatura")
    if text := _resiliparse(source):
        return replace(page, text=text, mode="fast")
    return replace(page, status="empty")


def load_parsers(use_trafilatura: bool) -> None:
    """Import what `extract_page` needs, which takes longer than most pages."""
    import resiliparse.extract.html2text  # noqa: F401

    if use_trafilatura:
        import trafilatura  # noqa: F401


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


def estimate_html_depth(data: bytes) -> int:
    """Estimates how deep a page's elements lie in each other.

    Counts tags, so that markup in comments and scripts counts, and rows and items do not.
    """
    depth = deepest = 0
    for closes, name in _TAG_NAME.findall(data):
        if name.lower()[:3] not in _UNCLOSED:
            depth += -1 if closes else 1
            deepest = max(deepest, depth)
    return deepest


def _read_metadata(head: str) -> tuple[str | None, str | None, str | None]:
    """Reads the title, the date of publication and the declared language."""
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(head)
    document: Any = tree.document
    published = _PUBLISHED.search(head)
    root = document.query_selector("html[lang]")
    language = root.getattr("lang").lower() if root else ""
    nodes = [node for each in _DATES for node in document.query_selector_all(each)]
    days = [node.getattr("content") or node.getattr("datetime") or "" for node in nodes]
    days += [published[1]] if published else []
    title = remove_control_characters(" ".join((tree.title or "").split()))
    return (
        title[:_TITLE_CHARACTERS] or None,
        next(filter(None, map(_parse_day, days)), None),
        language if _LANGUAGE.fullmatch(language) else None,
    )


def _parse_day(text: str) -> str | None:
    try:
        return date(*map(int, found.groups())).isoformat() if (found := _DAY.match(text)) else None
    except ValueError:
        return None
