"""Labels from a document's address."""

import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import Field

from maxlm.corpus.stage import LabelTypes, PerDocumentStage
from maxlm.data.documents.streams import COMPRESSIONS, open_stream

_LISTS = Path(__file__).parents[1] / "lists"
_NSFW_LISTS = [
    [str(_LISTS / f"nsfw_{kind}.txt")] for kind in ("words", "subwords", "soft_words")
]
_AUTHORITY = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//([^/?#]*)", re.I)
_LONGEST_AUTHORITY, _LONGEST_HOST = 1024, 253  # DNS has no longer names.
_HOST = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+")
_WORD = re.compile(r"[^\W_]+")


class UrlStage(PerDocumentStage):
    """Tells whether an address is on a list, or made of words that are.

    The rules are RefinedWeb's (arXiv:2306.01116, appendix G.1), which FineWeb kept
    (arXiv:2406.17557): domains; words anywhere in an address (strict); whole words
    (hard); several whole words each of which alone is harmless (soft). The lists are
    files, plain or .gz or .zst, one entry a line, `#` before comments; of a hosts
    file's lines the last column counts. Addresses are compared in lower case,
    percent-decoded; words of internationalised names as Unicode, names themselves as
    ASCII (`xn--...`).

    Labels: `host`; `domain`, the registered domain by the Public Suffix List that
    tldextract ships (null for IP addresses and names such as localhost); `blocked`;
    `rule`, the first rule that blocks: `domain`, `subdomain`, `word`, `soft_words`, or
    `nsfw` for the shipped lists of words. All null without an address; host and domain
    null for what is none.
    """

    stage: Literal["url"] = "url"
    domains: tuple[str, ...] = ()
    """Files of names to block, each with all names below it: registered domains, hosts,
    or whole top-level domains."""
    words: tuple[str, ...] = ()
    """Files of words of which one as a whole word blocks."""
    subwords: tuple[str, ...] = ()
    """Files of words of which one blocks anywhere, also inside another word."""
    soft_words: tuple[str, ...] = ()
    """Files of words of which `soft_count` different ones block, as whole words."""
    soft_count: int = Field(default=2, ge=1)
    """Number of different soft words that block; 2 in RefinedWeb."""
    nsfw: bool = True
    """Use the shipped lists of words of pornographic addresses too: short ones, in
    English. Name the category lists of your choice in `domains` for real coverage."""

    document_columns: ClassVar[tuple[str, ...]] = ("url",)
    label_types: ClassVar[LabelTypes] = {
        "host": pa.large_string(),
        "domain": pa.large_string(),
        "blocked": pa.bool_(),
        "rule": pa.string(),
    }
    packages: ClassVar[tuple[str, ...]] = ("tldextract",)

    def list_input_files(self) -> Iterable[Path]:
        lists = [self.domains, self.words, self.subwords, self.soft_words]
        return map(Path, chain(*lists, *(_NSFW_LISTS if self.nsfw else ())))

    def make_row_label_fn(self) -> Callable[[str | None], dict[str, Any]]:
        """Raises: MaxlmError: a list cannot be read."""
        from tldextract import TLDExtract

        suffixes = TLDExtract(
            suffix_list_urls=(), cache_dir=None
        )  # Only what it ships.
        names = frozenset(map(_ascii, _entries(self.domains)))
        words = _Words([self.words, self.subwords, self.soft_words], self.soft_count)
        nsfw = _Words(_NSFW_LISTS, self.soft_count) if self.nsfw else None

        def label(url: str | None) -> dict[str, Any]:
            if url is None:
                return {}
            host, rest = _split(url)
            if not host:
                return {"blocked": False}
            found = suffixes.extract_str(host)
            domain = (
                f"{found.domain}.{found.suffix}"
                if found.domain and found.suffix
                else None
            )
            labels = host.split(".")
            address = f"{_unicode(host)}/{rest}"
            if domain in names:
                rule = "domain"
            elif names.intersection(".".join(labels[i:]) for i in range(len(labels))):
                rule = "subdomain"
            else:
                rule = words.rule(address) or (
                    "nsfw" if nsfw and nsfw.rule(address) else None
                )
            return {
                "host": host,
                "domain": domain,
                "blocked": rule is not None,
                "rule": rule,
            }

        return label


class _Words:
    """Words to look for in addresses, from files of words, subwords and soft words."""

    def __init__(self, lists: Iterable[Iterable[str]], soft_count: int):
        self._words, subwords, self._soft = (
            frozenset(_entries(paths)) for paths in lists
        )
        parts = sorted(subwords)
        self._subwords = re.compile("|".join(map(re.escape, parts))) if parts else None
        self._soft_count = soft_count

    def rule(self, address: str) -> str | None:
        found = set(_WORD.findall(address))
        if found & self._words or (self._subwords and self._subwords.search(address)):
            return "word"
        return "soft_words" if len(found & self._soft) >= self._soft_count else None


def _split(url: str) -> tuple[str, str]:
    """The host as ASCII, "" if there is none, and what follows it, percent-decoded."""
    url = url.strip()
    url = url if _AUTHORITY.match(url) else f"//{url}"
    authority = _AUTHORITY.match(url)
    # A long one that is not ASCII would take urlsplit a time that grows with its
    # square.
    if authority is None or len(authority[1]) > _LONGEST_AUTHORITY:
        return "", ""
    try:
        parts = urlsplit(url)
        host = _ascii(unquote(parts.hostname or ""))
        _ = parts.port  # Raises where the port is none, as in "javascript:alert(1)".
    except ValueError:
        return "", ""
    if len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
        return "", ""
    return host, unquote(f"{parts.path}?{parts.query}").lower()


def _ascii(host: str) -> str:
    host = host.strip(".").lower()
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _unicode(host: str) -> str:
    try:
        return host.encode().decode("idna") if "xn--" in host else host
    except UnicodeError:
        return host


def _entries(paths: Iterable[str]) -> Iterable[str]:
    """The entries of list files, in lower case."""
    for path in map(Path, paths):
        with open_stream(path, COMPRESSIONS.get(path.suffix.lower(), "none")) as stream:
            content = stream.read().decode("utf-8", "replace")
        for line in content.lower().splitlines():
            if entry := line.partition("#")[0].split():
                yield entry[-1]
