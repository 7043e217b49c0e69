"""Reading an HTML page: its main text, title, date and language.

Runs C code on whatever the web holds; `maxlm.corpus.extraction` runs it at a safe distance.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date

from maxlm.corpus.encoding import count_control_bytes, decode, remove_control_characters

_HEAD = 1 << 16  # Characters of a page in which its metadata are looked for.
_TAG = re.compile(r"<[a-zA-Z!/?]")
_TITLE = re.compile(r"<title\b[^>]{0,500}>([^<]*)", re.I)
_META = re.compile(r"<meta\b[^>]{0,2000}>", re.I)
_ATTRIBUTE = re.compile(r"""([\w:.-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""")
_LANGUAGE = re.compile(r"""<html\b[^>]{0,2000}?\blang\s*=\s*["']?([a-zA-Z]{2,3}(?:-\w+)*)""", re.I)
_CODE = re.compile(r"[a-zA-Z]{2,3}(?:-\w+)*")
_PUBLISHED = re.compile(r'"datePublished"\s*:\s*"([^"]{8,40})"')
_TIME = re.compile(r"""<time\b[^>]{0,500}?\bdatetime\s*=\s*["']?([^"'>]{8,40})""", re.I)
_DAY = re.compile(r"((?:19|20)\d\d)[-/.]?([01]\d)[-/.]?([0-3]\d)(?!\d)")
# Schema.org, Open Graph, Dublin Core, Google Scholar and the rest, best first.
_DATE_NAMES = (
    "article:published_time datepublished og:published_time citation_publication_date "
    "dc.date.issued dcterms.issued dc.date.created dcterms.created dc.date dcterms.date pubdate "
    "publishdate publish-date publish_date publication_date parsely-pub-date sailthru.date "
    "article.published citation_date date"
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
    head = source[:_HEAD]
    metas = dict(_metas(head.partition("</head>")[0]))
    page = ExtractedPage(
        "ok",
        title=_title(head, metas),
        date=_date(head, metas),
        language_hint=_language(head, metas),
        encoding=encoding,
    )
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


def _title(head: str, metas: dict[str, str]) -> str | None:
    found = _TITLE.search(head)
    text = html.unescape(found[1]) if found else metas.get("og:title", "")
    return remove_control_characters(" ".join(text.split()))[:_TITLE_CHARACTERS] or None


def _date(head: str, metas: dict[str, str]) -> str | None:
    values = [metas[name] for name in _DATE_NAMES.split() if name in metas]
    values += [found[1] for pattern in (_PUBLISHED, _TIME) if (found := pattern.search(head))]
    for value in values:
        if found := _DAY.match(value.strip()):
            try:
                return date(*map(int, found.groups())).isoformat()
            except ValueError:
                continue
    return None


def _language(head: str, metas: dict[str, str]) -> str | None:
    found = _LANGUAGE.search(head)
    code = found[1] if found else metas.get("content-language", "").strip()
    return code.lower() if _CODE.fullmatch(code) else None


def _metas(head: str) -> Iterator[tuple[str, str]]:
    """(name in lower case, content) of meta tags, last first: in a dict the first wins."""
    for tag in reversed(_META.findall(head)):
        attributes = {k.lower(): v.strip("\"'") for k, v in _ATTRIBUTE.findall(tag)}
        content = attributes.get("content")
        for key in ("name", "property", "itemprop", "http-equiv"):
            if content and (name := attributes.get(key)):
                yield name.lower(), html.unescape(content)
