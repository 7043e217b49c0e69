"""E-mail and IP addresses."""

import ipaddress
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from maxlm.corpus.pii import PiiMatch, get_preceding_words

_LOCAL = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.%+'-"
    + "".join(chr(code) for code in range(0xC0, 0x250))
)
_LONGEST_LOCAL = 64  # RFC 5321.
_LABEL = r"[0-9A-Za-zÀ-ɏ](?:[0-9A-Za-zÀ-ɏ-]{0,61}[0-9A-Za-zÀ-ɏ])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL}){{1,8}}")
_IPV4 = re.compile(r"(?<![\w.-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])")
_IPV6 = re.compile(r"(?<![\w:.-])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:.])")
_VERSION = re.compile(
    r"(?:\bv|version|release|firmware|build|driver|\bver\.?|section|§|kernel)\W*$"
)


def find_emails(text: str) -> Iterator[PiiMatch]:
    """Finds e-mail addresses whose last label is a top-level domain.

    Those of a file name (`icon@2x.png`), code (`w@x.shape`), `git@host:path` and the
    handle `@user@host` are none. What follows without a space is left out:
    `bob@example.com.She knows`.
    """
    done = 0
    at = text.find("@")
    while at >= 0:
        head = text[max(done, at - _LONGEST_LOCAL) : at]
        local_start = len(head.rstrip(_LOCAL))
        local = head[local_start:].lstrip(".%+'-")
        end = None
        if local and local[-1] != ".":
            end = _find_domain_end(text, at + 1)
        if end is not None:
            start = at - len(local)
            is_handle = text[max(0, start - 1) : start] == "@"
            is_scp_path = local == "git" and text[end : end + 1] == ":"
            if not is_handle and not is_scp_path:
                yield PiiMatch(start, end, "email")
                done = end
        at = text.find("@", at + 1)


def _find_domain_end(text: str, start: int) -> int | None:
    """Returns the end of the domain that begins at `start`; None: there is none."""
    match = _DOMAIN.match(text, start)
    if match is None:
        return None
    labels = match[0].split(".")
    following = text[match.end() : match.end() + 1]
    if following.isalnum():
        # The match ends within a label, which is too long or not of Latin letters.
        labels.pop()
    elif following == "@":
        labels = _cut_next_address(labels)
    while len(labels) > 1 and not _is_top_level(labels[-1]):
        labels.pop()
    # The first word of the next sentence may be a top-level domain too: example.com.So
    while (
        len(labels) > 2
        and labels[-1][0].isupper()
        and ".".join(labels[:-1]).islower()
        and _is_top_level(labels[-2])
    ):
        labels.pop()
    if len(labels) < 2:
        return None
    return start + len(".".join(labels))


def _cut_next_address(labels: list[str]) -> list[str]:
    """Returns the domain's labels before the next address, if a hyphen joins them:
    example.com-al@x.org."""
    for number, label in enumerate(labels[1:], 1):
        top_level, hyphen, _ = label.partition("-")
        if hyphen and _is_top_level(top_level):
            return [*labels[:number], top_level]
    return labels


def _is_top_level(label: str) -> bool:
    return label.lower() in _read_top_level_domains()


@cache
def _read_top_level_domains() -> frozenset[str]:
    """Reads the top-level domains of the Public Suffix List, internationalised ones
    also as ASCII."""
    path = distribution("tldextract").locate_file("tldextract/.tld_set_snapshot")
    snapshot = Path(str(path)).read_text("utf-8")
    names = set()
    for line in snapshot.split("\n"):
        if line and not line.startswith("//"):
            # Of some there are only rules below: *.np
            name = line.rpartition(".")[2]
            names.add(name)
            names.add(name.encode("idna").decode())
    return frozenset(names)


def find_ips(text: str) -> Iterator[PiiMatch]:
    """Finds IPv4 and IPv6 addresses that are public: others say nothing about a person.

    Private, loopback, documentation and other reserved ranges (IANA's registries, as
    `ipaddress` knows them) are left out, and IPv6 is looked for in 2000::/3, the only
    range given out. Four numbers after "version", "section" and the like are none, nor
    are those of which the last three are below 25: one address in a thousand, and most
    numbers of sections.
    """
    for match in _IPV4.finditer(text):
        _, *last_three = map(int, match[0].split("."))
        if max(last_three) < 25:
            continue
        if _VERSION.search(get_preceding_words(text, match.start())):
            continue
        if _is_public(match[0]):
            yield PiiMatch(*match.span(), "ip")
    for match in _IPV6.finditer(text):
        if _is_public(match[0]):
            yield PiiMatch(*match.span(), "ip")


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast
