"""E-mail and IP addresses."""

import importlib.util
import ipaddress
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.data.corpus.pii.match import Match, lead

_LOCAL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.%+'-" + "".join(
    chr(code) for code in range(0xC0, 0x250)
)
_DOMAIN = re.compile(r"(?:[0-9A-Za-zÀ-ɏ](?:[0-9A-Za-zÀ-ɏ-]{0,62})\.){1,8}([A-Za-zÀ-ɏ-]{2,24})")
_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w-]|\.[0-9])", re.ASCII)
_IPV6 = re.compile(r"[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:.])", re.ASCII)
_VERSION = re.compile(
    r"(?:\bv|version|release|firmware|build|driver|\bver\.?|section|§|kernel)\W*$"
)


def find_emails(text: str) -> Iterator[Match]:
    """E-mail addresses whose last label is a top-level domain.

    Those of a file name (`icon@2x.png`), code (`w@x.shape`), `git@host:path` and the handle
    `@user@host` are none.
    """
    at = text.find("@")
    while at >= 0:
        head = text[max(0, at - 64) : at]
        local = head[len(head.rstrip(_LOCAL)) :].lstrip(".%+'-")
        domain = _DOMAIN.match(text, at + 1) if local and local[-1] != "." else None
        if domain and domain[1].lower() in _top_level():
            start, end = at - len(local), domain.end()
            handle = text[max(0, start - 1) : start] == "@"
            scp = local == "git" and text[end : end + 1] == ":"
            if not handle and not scp and not text[end : end + 1].isalnum():
                yield Match(start, end, "email")
        at = text.find("@", at + 1)


@cache
def _top_level() -> frozenset[str]:
    package = importlib.util.find_spec("tldextract")
    if package is None or package.origin is None:
        what = "finding e-mail addresses needs tldextract, which is not installed"
        raise MaxlmError(what, fix="pip install 'maxlm[corpus]'")
    snapshot = Path(package.origin).with_name(".tld_set_snapshot").read_text("utf-8")
    return frozenset(line for line in snapshot.split("\n") if line.isalpha() or "xn--" in line)


def find_ips(text: str) -> Iterator[Match]:
    """IPv4 and IPv6 addresses that are public: others say nothing about a person.

    Private, loopback, documentation and other reserved ranges (IANA's registries, as `ipaddress`
    knows them) are left out, and IPv6 is looked for in 2000::/3, the only range given out. Four
    numbers after "version", "section" and the like are none, nor are those of which the last three
    are below 25: one address in a thousand, and most numbers of sections.
    """
    for found in _IPV4.finditer(text):
        start, end = found.span()
        if text[max(0, start - 1) : start].isalnum() or text[max(0, start - 1) : start] in (
            "-",
            ".",
        ):
            continue
        numbered = max(map(int, found[0].split(".")[1:])) < 25
        if numbered or _VERSION.search(lead(text, start)):
            continue
        if _is_public(found[0]):
            yield Match(start, end, "ip")
    for found in _IPV6.finditer(text):
        start, end = found.span()
        previous = text[max(0, start - 1) : start]
        if not previous.isalnum() and previous not in (":", ".", "-") and _is_public(found[0]):
            yield Match(start, end, "ip")


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast
