"""Keys and tokens: by the prefixes their issuers give them, or by what they are
assigned to."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from maxlm.corpus.pii import PiiMatch

# Token formats as their issuers document them. Each begins with the text that is
# searched for.
_TOKENS = {
    "AKIA": r"[A-Z2-7]{16}",  # Amazon Web Services
    "ASIA": r"[A-Z2-7]{16}",
    "AIza": r"[\w-]{35}",  # Google
    "ya29.": r"[\w-]{20,}",
    "ghp_": r"[A-Za-z0-9]{36,}",  # GitHub
    "gho_": r"[A-Za-z0-9]{36,}",
    "ghu_": r"[A-Za-z0-9]{36,}",
    "ghs_": r"[A-Za-z0-9]{36,}",
    "ghr_": r"[A-Za-z0-9]{36,}",
    "github_pat_": r"\w{22,}",
    "glpat-": r"[\w-]{20,}",  # GitLab
    "xox": r"[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    "xapp-": r"[0-9]-[A-Za-z0-9-]{10,}",
    "sk_live_": r"[A-Za-z0-9]{16,}",  # Stripe
    "sk_test_": r"[A-Za-z0-9]{16,}",
    "rk_live_": r"[A-Za-z0-9]{16,}",
    "whsec_": r"[A-Za-z0-9]{16,}",
    "sk-": r"(?=[\w-]*[0-9])[\w-]{20,}",  # OpenAI, Anthropic
    "hf_": r"[A-Za-z0-9]{30,}",  # Hugging Face
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-": r"[\w-]{50,}",
    "SG.": r"[\w-]{22}\.[\w-]{43}",  # SendGrid
    "dop_v1_": r"[a-f0-9]{64}",  # DigitalOcean
    "eyJ": r"[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON Web Token (RFC 7519)
}
_TOKEN = re.compile(
    r"(?<![\w-])(?:"
    + "|".join(re.escape(p) + rest for p, rest in _TOKENS.items())
    + ")",
    re.ASCII,
)
_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_LONGEST_KEY = 1 << 15
_LOGIN = re.compile(r"://[^\s/:@]{1,64}:([^\s/@]{3,128})@")

_NAMES = ("secret", "token", "passw", "pwd", "key", "bearer")
_ASSIGNED = re.compile(
    r"(?:secret|token|passw(?:or)?d|pwd|(?:api|access|auth|private|account|signing|encryption)"
    r"[_ -]?key)[\w-]{0,20}[\"']?\s{0,3}(?:=>|:=|[:=]|\bis\b)\s{0,3}[\"']?"
    r"([A-Za-z0-9+/_.~-]{16,256}={0,2})(?![\w(\[])|\bbearer "
    r"([A-Za-z0-9+/_.~-]{16,256}={0,2})",
    re.IGNORECASE | re.ASCII,
)
_STAND_IN = re.compile(
    r"example|your|change|placeholder|xxxx|dummy|insert|redacted|^passw|^\$|^<|^\*+$",
    re.IGNORECASE,
)
# A character of random hexadecimal digits, 16 of them, carries this at least.
_LEAST_BITS = 3.0


def find_credentials(text: str) -> Iterator[PiiMatch]:
    """Finds access tokens, private keys, passwords in URLs, random values given to a
    secret."""
    if any(prefix in text for prefix in _TOKENS):
        for token in _TOKEN.finditer(text):
            yield PiiMatch(*token.span(), "key")
    if "PRIVATE KEY" in text:
        for begin in _BEGIN.finditer(text):
            end = _END.search(text, begin.end(), begin.end() + _LONGEST_KEY)
            if end:
                yield PiiMatch(begin.start(), end.end(), "key")
    if "://" in text and "@" in text:
        for login in _LOGIN.finditer(text):
            if not _STAND_IN.search(login[1]):
                yield PiiMatch(*login.span(1), "key")
    lowered = text.lower()
    if any(name in lowered for name in _NAMES):
        for assignment in _ASSIGNED.finditer(text):
            group = 1 if assignment[1] else 2
            if _is_random(assignment[group]):
                yield PiiMatch(*assignment.span(group), "key")


def _is_random(value: str) -> bool:
    """Tells whether a value looks drawn at random, not like a name or an expression."""
    num_digits = sum(character.isdigit() for character in value)
    has_both_cases = value.lower() != value != value.upper()
    if num_digits == 0 or num_digits == len(value):
        return False
    if num_digits < 3 and not has_both_cases:
        return False
    if _STAND_IN.search(value):
        return False
    # The entropy of its characters.
    bits = 0.0
    for count in Counter(value).values():
        share = count / len(value)
        bits -= share * math.log2(share)
    return bits >= _LEAST_BITS
