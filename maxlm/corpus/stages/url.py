"""Labels from a document's address."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import Field

from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels
from maxlm.data.documents.streams import COMPRESSIONS, open_stream

_LISTS = Path(__file__).parents[1] / "lists"
# Files of words, of subwords and of soft words.
_NSFW_LISTS = (
    (str(_LISTS / "nsfw_words.txt"),),
    (str(_LISTS / "nsfw_subwords.txt"),),
    (str(_LISTS / "nsfw_soft_words.txt"),),
)
_AUTHORITY = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//([^/?#]*)", re.I)
_LONGEST_AUTHORITY = 1024
_LONGEST_HOST = 253  # DNS has no longer names.
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
        if self.nsfw:
            lists += _NSFW_LISTS
        for paths in lists:
            yield from map(Path, paths)

    def make_row_label_fn(self) -> RowLabelFn:
        """Raises: MaxlmError: a list cannot be read."""
        from tldextract import TLDExtract

        # Only what it ships: no list is downloaded.
        suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)
        blocked_names = frozenset(map(_encode_host, _read_entries(self.domains)))
        words = _BlockedWords(
            self.words, self.subwords, self.soft_words, soft_count=self.soft_count
        )
        nsfw_words = None
        if self.nsfw:
            nsfw_words = _BlockedWords(*_NSFW_LISTS, soft_count=self.soft_count)

        def find_rule(host: str, domain: str | None, address: str) -> str | None:
            if domain in blocked_names:
                return "domain"
            labels = host.split(".")
            for first in range(len(labels)):
                if ".".join(labels[first:]) in blocked_names:
                    return "subdomain"
            rule = words.find_rule(address)
            if rule is None and nsfw_words and nsfw_words.find_rule(address):
                return "nsfw"
            return rule

        def label(url: str | None) -> RowLabels:
            if url is None:
                return {}
            host, rest = _split_url(url)
            if not host:
                return {"blocked": False}
            parts = suffixes.extract_str(host)
            domain = None
            if parts.domain and parts.suffix:
                domain = f"{parts.domain}.{parts.suffix}"
            rule = find_rule(host, domain, f"{_decode_host(host)}/{rest}")
            return {
                "host": host,
                "domain": domain,
                "blocked": rule is not None,
                "rule": rule,
            }

        return label


class _BlockedWords:
    """Words to look for in addresses, from files of words, subwords and soft words."""

    def __init__(
        self,
        words: Iterable[str],
        subwords: Iterable[str],
        soft_words: Iterable[str],
        *,
        soft_count: int,
    ):
        self._words = frozenset(_read_entries(words))
        self._soft_words = frozenset(_read_entries(soft_words))
        self._soft_count = soft_count
        parts = sorted(set(_read_entries(subwords)))
        self._subwords = re.compile("|".join(map(re.escape, parts))) if parts else None

    def find_rule(self, address: str) -> str | None:
        """Returns the rule by which an address is blocked; None: it is not."""
        words = set(_WORD.findall(address))
        if not words.isdisjoint(self._words):
            return "word"
        if self._subwords is not None and self._subwords.search(address):
            return "word"
        if len(words & self._soft_words) >= self._soft_count:
            return "soft_words"
        return None


def _split_url(url: str) -> tuple[str, str]:
    """Returns the host as ASCII, "" if there is none, and what follows it,
    percent-decoded."""
    url = url.strip()
    if not _AUTHORITY.match(url):
        url = f"//{url}"
    authority = _AUTHORITY.match(url)
    # A long one that is not ASCII would take urlsplit a time that grows with its
    # square.
    if authority is None or len(authority[1]) > _LONGEST_AUTHORITY:
        return "", ""
    try:
        parts = urlsplit(url)
        host = _encode_host(unquote(parts.hostname or ""))
        _ = parts.port  # Raises where the port is none, as in "javascript:alert(1)".
    except ValueError:
        return "", ""
    if len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
        return "", ""
    return host, unquote(f"{parts.path}?{parts.query}").lower()


def _encode_host(host: str) -> str:
    """Returns a name in lower case, an internationalised one as ASCII."""
    host = host.strip(".").lower()
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _decode_host(host: str) -> str:
    """Returns an internationalised name as Unicode."""
    try:
        return host.encode().decode("idna") if "xn--" in host else host
    except UnicodeError:
        return host


def _read_entries(paths: Iterable[str]) -> Iterator[str]:
    """Yields the entries of list files, in lower case."""
    for path in map(Path, paths):
        compression = COMPRESSIONS.get(path.suffix.lower(), "none")
        with open_stream(path, compression) as stream:
            content = stream.read().decode("utf-8", "replace")
        for line in content.lower().splitlines():
            columns = line.partition("#")[0].split()
            if columns:
                yield columns[-1]
