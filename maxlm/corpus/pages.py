"""What an HTML page says: its main text, title, date and language.

Runs C code on whatever the web holds; `maxlm.corpus.extraction` runs it at a safe distance.
"""

import html
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from maxlm.corpus.encoding import clean, decode, num_controls

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
"""Elements inside each other beyond which libxml2, below trafilatura, drops the rest of a page."""
TOO_DEEP = 3000
"""Where resiliparse, whose time grows with the square of it, is not tried either."""
_KEPT_DEPTH = MOST_DEPTH // 2  # Rows and items, which `nesting` does not count, lie in between.
_WHOLE_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/<>]*)[^<>]*>")
_BREAKS = re.compile(r"(?:<p>\s*){2,}")
_INLINE_NAMES = (
    "a abbr acronym b bdi bdo big blink cite code data del dfn em font i ins kbd label mark nobr q "
    "s samp small span strike strong sub sup time tt u var"
)
# Without their tags, what they hold would be taken for text of the page.
_HIDDEN_NAMES = "script style textarea title noscript iframe template svg"
# Elements without an end tag, and those whose end tag may be left out, by their first letters.
_UNCLOSED_NAMES = (
    "are bas br col emb hr img inp lin met sou tra wbr li p dt dd td th tr tbo the tfo opt"
)


@dataclass(frozen=True)
class Page:
    """What became of a page."""

    status: str
    """ok, empty, not_html, too_deep, broken; from outside also too_large and timeout."""
    text: str | None = None
    """Unicode without NUL, other control characters or surrogates."""
    title: str | None = None
    date: str | None = None
    """When it was published, as YYYY-MM-DD."""
    language_hint: str | None = None
    """What the page says it is written in, as BCP 47 in lower case."""
    encoding: str | None = None
    mode: str | None = None
    """What found the text: "trafilatura" or "fast"."""


def read_page(data: bytes, charset: str | None, quality: bool, markdown: bool) -> Page:
    """Read a page.

    Args:
        data: HTML.
        charset: of the HTTP header.
        quality: by trafilatura (Barbaresi, ACL 2021), without its fallbacks to other libraries:
            they cost half its speed and lose on both labelled sets of
            `benchmarks/corpus_extract.py`. Else, and where it finds nothing or would be cut short,
            by resiliparse (Bevendorff et al., ECIR 2018).
        markdown: headings, emphasis and fences around code; only for trafilatura.
    """
    source, encoding = decode(data, charset)
    if not _TAG.search(source) or _is_binary(data, encoding):
        return Page("not_html", encoding=encoding)
    raw = source.encode() if encoding.startswith("utf-16") else data
    few = raw.count(b"<") <= (MOST_DEPTH if quality else TOO_DEEP)
    depth = 0 if few else nesting(raw)
    content = source
    if depth > (MOST_DEPTH if quality else TOO_DEEP):
        content = limit_nesting(source)
        depth = nesting(content.encode())
    if depth > TOO_DEEP:
        return Page("too_deep", encoding=encoding)
    head = source[:_HEAD]
    metas = dict(_metas(head.partition("</head>")[0]))
    page = Page(
        "ok",
        title=_title(head, metas),
        date=_date(head, metas),
        language_hint=_language(head, metas),
        encoding=encoding,
    )
    if quality and depth <= MOST_DEPTH and (text := _trafilatura(content, markdown)):
        return replace(page, text=text, mode="trafilatura")
    if text := _resiliparse(content):
        return replace(page, text=text, mode="fast")
    return replace(page, status="empty")


def _is_binary(data: bytes, encoding: str) -> bool:
    # A tenth of random bytes are controls, and they are no UTF-8.
    return not encoding.startswith("utf") and num_controls(data) > len(data) // 20


def load_parsers(quality: bool) -> None:
    """Import what `read_page` needs, which takes longer than most pages."""
    import resiliparse.extract.html2text  # noqa: F401

    if quality:
        import trafilatura  # noqa: F401


def _trafilatura(source: str, markdown: bool) -> str:
    import trafilatura

    try:
        text = trafilatura.extract(
            source,
            fast=True,
            include_comments=False,
            include_tables=True,
            output_format="markdown" if markdown else "txt",
        )
    # Whatever it stumbles over, there is the other one, and the label `mode` names that.
    except Exception:
        return ""
    return clean(text or "").strip()


def _resiliparse(source: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(
        source, main_content=True, alt_texts=False, comments=False, post_meta=False
    )
    return clean(text).strip()


def nesting(data: bytes) -> int:
    """About how deep a page's elements lie in each other, in a millisecond a megabyte.

    Counts tags, so that markup in comments and scripts counts, and rows and items do not.
    """
    codes = np.frombuffer(data + b"\0\0\0\0", np.uint8)
    start = np.flatnonzero(codes == ord("<")) + 1
    closes = codes[start] == ord("/")
    first, second, third = (_letters(codes[start + closes + i]) for i in range(3))
    key = (first * 32 + second) * 32 + third * (second > 0)
    steps = np.where(closes, -1, 1) * ((first > 0) & ~_UNCLOSED[key])
    return int(np.cumsum(steps).max(initial=0))


def limit_nesting(source: str) -> str:
    """Return a page without the tags that make it deep: those that nothing closes, where there are
    several of a name, and those of elements that lie too deep.

    What such elements hold belongs to those around them; one that is no part of a line begins a
    paragraph.
    """
    unclosed: dict[str, list[int]] = defaultdict(list)
    for tag in _WHOLE_TAG.finditer(source):
        name = tag[2].lower()
        if not tag[1]:
            unclosed[name].append(tag.start())
        elif unclosed[name]:
            unclosed[name].pop()
    dropped = {start for starts in unclosed.values() if starts[1:] for start in starts}
    opened: dict[str, list[bool]] = defaultdict(list)
    inline, hidden = {*_INLINE_NAMES.split()}, {*_HIDDEN_NAMES.split()}
    never_deep = {*_UNCLOSED_NAMES.split()}
    depth = 0

    def limit(tag: re.Match[str]) -> str:
        nonlocal depth
        name = tag[2].lower()
        if name[:3] in never_deep or name in hidden or (tag[1] and not opened[name]):
            return tag[0]
        if tag[1]:
            keep = opened[name].pop()
            depth -= keep
        else:
            keep = depth < _KEPT_DEPTH and tag.start() not in dropped
            depth += keep
            if tag.start() not in dropped:
                opened[name].append(keep)
        return tag[0] if keep else "" if name in inline else "<p>"

    return _BREAKS.sub("<p>", _WHOLE_TAG.sub(limit, source))


def _letters(codes: np.ndarray) -> np.ndarray:
    """1 to 26 for ASCII letters, 0 for other bytes: int64 of the shape of `codes`."""
    letters = (codes | 0x20).astype(np.int64) - (ord("a") - 1)
    return np.where((letters > 0) & (letters <= 26), letters, 0)


def _title(head: str, metas: dict[str, str]) -> str | None:
    found = _TITLE.search(head)
    text = html.unescape(found[1]) if found else metas.get("og:title", "")
    return clean(" ".join(text.split()))[:_TITLE_CHARACTERS] or None


def _date(head: str, metas: dict[str, str]) -> str | None:
    for value in _dates(head, metas):
        if found := _DAY.match(value.strip()):
            try:
                return date(*map(int, found.groups())).isoformat()
            except ValueError:
                continue
    return None


def _dates(head: str, metas: dict[str, str]) -> Iterator[str]:
    yield from (metas[name] for name in _DATE_NAMES.split() if name in metas)
    yield from (found[1] for pattern in (_PUBLISHED, _TIME) if (found := pattern.search(head)))


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


def _table() -> np.ndarray:
    table = np.zeros(32**3, np.bool_)
    for name in _UNCLOSED_NAMES.split():
        a, b, c = _letters(np.frombuffer(name.ljust(3).encode(), np.uint8))
        table[(a * 32 + b) * 32 + c] = True
    return table


_UNCLOSED = _table()
