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
    at = text.find("@")
    done = 0
    while at >= 0:
        head = text[max(done, at - 64) : at]
        local = head[len(head.rstrip(_LOCAL)) :].lstrip(".%+'-")
        end = _domain_end(text, at + 1) if local and local[-1] != "." else None
        if end is not None:
            start = at - len(local)
            handle = text[max(0, start - 1) : start] == "@"
            scp = local == "git" and text[end : end + 1] == ":"
            if not handle and not scp:
                yield PiiMatch(start, end, "email")
                done = end
        at = text.find("@", at + 1)


def _domain_end(text: str, start: int) -> int | None:
    """Returns the end of the domain that begins at `start`; None: there is none."""
    found = _DOMAIN.match(text, start)
    if found is None:
        return None
    labels = found[0].split(".")
    if text[found.end() : found.end() + 1].isalnum():
        # The match ends within a label, which is too long or not of Latin letters.
        labels.pop()
    elif text[found.end() : found.end() + 1] == "@":
        labels = _before_next(labels)
    while len(labels) > 1 and not _is_top(labels[-1]):
        labels.pop()
    # The first word of the next sentence may be a top-level domain too: example.com.So
    while (
        len(labels) > 2
        and labels[-1][0].isupper()
        and ".".join(labels[:-1]).islower()
        and _is_top(labels[-2])
    ):
        labels.pop()
    return start + len(".".join(labels)) if len(labels) > 1 else None


def _before_next(labels: list[str]) -> list[str]:
    """The domain's labels before the next address, if a hyphen joins them:
    example.com-al@x.org."""
    for number, label in enumerate(labels[1:], 1):
        top, hyphen, _ = label.partition("-")
        if hyphen and _is_top(top):
            return [*labels[:number], top]
    return labels


def _is_top(label: str) -> bool:
    return label.lower() in _top_level()


@cache
def _top_level() -> frozenset[str]:
    path = distribution("tldextract").locate_file("tldextract/.tld_set_snapshot")
    snapshot = Path(str(path)).read_text("utf-8")
    rules = [
        line for line in snapshot.split("\n") if line and not line.startswith("//")
    ]
    names = {
        rule.rpartition(".")[2] for rule in rules
    }  # Of some there are only rules below: *.np
    return frozenset(names | {name.encode("idna").decode() for name in names})


def find_ips(text: str) -> Iterator[PiiMatch]:
    """Finds IPv4 and IPv6 addresses that are public: others say nothing about a person.

    Private, loopback, documentation and other reserved ranges (IANA's registries, as
    `ipaddress` knows them) are left out, and IPv6 is looked for in 2000::/3, the only
    range given out. Four numbers after "version", "section" and the like are none, nor
    are those of which the last three are below 25: one address in a thousand, and most
    numbers of sections.
    """
    for found in _IPV4.finditer(text):
        numbered = max(map(int, found[0].split(".")[1:])) < 25
        numbered = numbered or _VERSION.search(get_preceding_words(text, found.start()))
        if not numbered and _is_public(found[0]):
            yield PiiMatch(*found.span(), "ip")
    for found in _IPV6.finditer(text):
        if _is_public(found[0]):
            yield PiiMatch(*found.span(), "ip")


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast
