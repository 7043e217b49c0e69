"""Telephone numbers."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from maxlm.config import MaxlmError
from maxlm.corpus.pii import NOT_OURS, PiiMatch, get_preceding_words

_LEAST_DIGITS = 7
_RUN = re.compile(
    r"(?<!\w)(?:\(?\+|\()?[0-9][0-9 \u00a0()./\u2010-\u2015-]{5,}[0-9]"
    r"(?:(?: ?x| ?ext\.? ?)[0-9]{1,6})?"
)
_TABLE_GROUPS = 14  # As many numbers in a row are a table.
_GROUP = re.compile(r"[0-9]+")
_WORDS = re.compile(
    r"phone|t[eé]l[eéè]f|\bt[eé]l(?:\b|[a-z]*[.:])|\bmob(?:ile|iel|il)?\b|m[oó]vil|\bcel|portable\b|"
    r"\bcall|\bfax|whatsapp|\bsms\b|\btext "
    r"(?:me|us|him|her)\b|\bring\b|\bdial|handy|hotline|"
    r"\banruf|\brufen? |rufnummer|\bllam|\bchiam|\bappele|\bbel(?:len)?\b|dzwon|komórk|"
    r"\blig(?:ue|ar)|\breach\b|\bcontact\b|kontakt\b|電話|电话|전화|\bтел"
)
_BEFORE, _AFTER = re.compile(r"[\w.,/#$€£¥=&%-]"), re.compile(r"[\w%€°]")
# Dates, decimal fractions, ISBNs.
_OTHER = re.compile(
    r"[0-9]{1,4}([-./])[0-9]{1,2}\1[0-9]{1,4}(?![-./]?[0-9])"
    r"|[0-9]+\.[0-9]+|97[89](?:[ -]?[0-9]){10}"
)
# Thousands; US postal codes and clauses of US regulations, which every licence text
# quotes.
_UNSPOKEN_OTHER = re.compile(
    r"[1-9][0-9]{0,2}([ .\u00a0])[0-9]{3}(?:\1[0-9]{3})*(?:(?!\1)\.[0-9]+)?"
    r"|[0-9]{5}-[0-9]{4}|[0-9]{3}\.[0-9]{3}-[0-9]{4}"
)
_NORTH_AMERICAN = re.compile(
    r"(?:1[-. ])?(?:\([2-9][0-9]{2}\) "
    r"?[2-9][0-9]{2}[-.]|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1)"
    r"[0-9]{4}"
)


def check_regions(regions: Sequence[str]) -> None:
    """Checks that there is a numbering plan of each of some countries."""
    from phonenumbers import SUPPORTED_REGIONS

    for region in regions:
        if region not in SUPPORTED_REGIONS:
            fix = "use codes of ISO 3166 such as US, GB, DE"
            raise MaxlmError(
                f'no numbering plan of "{region}"', where="regions", fix=fix
            )


def find_phones(text: str, regions: Sequence[str]) -> Iterator[PiiMatch]:
    """Finds telephone numbers as Google's library does, with its numbering plans of the
    world.

    Taken are numbers with `+` that are possible; numbers in the form of North America;
    numbers valid in one of `regions` that are written in groups, as is usual there or
    with a leading 0; and, where a word such as "tel" or "call" comes before, any number
    possible there.
    """
    for run in _RUN.finditer(text):
        if len(run[0].split()) <= _TABLE_GROUPS or "+" in run[0]:
            yield from _find_in_run(text, run[0], run.start(), regions)


def _find_in_run(
    text: str, run: str, offset: int, regions: Sequence[str]
) -> Iterator[PiiMatch]:
    from phonenumbers import Leniency, PhoneNumberMatcher

    if run.count("(") != run.count(")"):
        run = run.replace("(", " ")  # "(call 030 123456)": the library would take none.
    found = [
        (offset + each.start, offset + each.end, each.number)
        for region in regions
        for each in PhoneNumberMatcher(run, region, Leniency.POSSIBLE, sys.maxsize)
    ]
    end = 0
    for start, stop, number in sorted(found, key=lambda each: (each[0], -each[1])):
        if start >= end and _is_phone(text, start, stop, number):
            yield PiiMatch(start, stop, "phone")
            end = stop


def _is_phone(text: str, start: int, stop: int, number: Any) -> bool:
    from phonenumbers import PhoneNumberFormat, format_number, is_valid_number

    raw = text[start:stop]
    base = re.split(r" ?(?:x|ext)", raw)[0]
    groups = _GROUP.findall(base)
    if sum(map(len, groups)) < _LEAST_DIGITS or _AFTER.match(text, stop):
        return False
    words = get_preceding_words(text, start)
    other = NOT_OURS.search(words)
    # "Phone no." is one, "contact me about order no." is none.
    spoken = _WORDS.search(words, max(0, other.start() - 12) if other else 0)
    if (other and not spoken) or (start and _BEFORE.match(text, start - 1)):
        return False
    if raw[0] == "+":
        return raw[1].isalnum()
    if _OTHER.fullmatch(base):
        return False
    if spoken or _NORTH_AMERICAN.fullmatch(base):
        return True
    if _UNSPOKEN_OTHER.fullmatch(base):
        return False
    usual = format_number(number, PhoneNumberFormat.NATIONAL)
    written = base.lstrip("(").startswith("0") or _GROUP.findall(usual) == groups
    return len(groups) > 1 and written and is_valid_number(number)
