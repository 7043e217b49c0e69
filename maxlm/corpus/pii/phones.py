"""Telephone numbers."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from maxlm.config import MaxlmError
from maxlm.corpus.pii import COUNTED_THING, PiiMatch, get_preceding_words

if TYPE_CHECKING:
    from phonenumbers import PhoneNumber, PhoneNumberMatch

_LEAST_DIGITS = 7
_RUN = re.compile(
    r"(?<!\w)(?:\(?\+|\()?[0-9][0-9 \u00a0()./\u2010-\u2015-]{5,}[0-9]"
    r"(?:(?: ?x| ?ext\.? ?)[0-9]{1,6})?"
)
_TABLE_GROUPS = 14  # As many numbers in a row are a table.
_GROUP = re.compile(r"[0-9]+")
_WORDS = re.compile(
    r"phone|t[eé]l[eéè]f|\bt[eé]l(?:\b|[a-z]*[.:])|\bmob(?:ile|iel|il)?\b|m[oó]vil|\bcel|portable\b|"
    r"\bcall|\bfax|whatsapp|\bsms\b|\btext (?:me|us|him|her)\b|\bring\b|\bdial|"
    r"handy|hotline|"
    r"\banruf|\brufen? |rufnummer|\bllam|\bchiam|\bappele|\bbel(?:len)?\b|dzwon|komórk|"
    r"\blig(?:ue|ar)|\breach\b|\bcontact\b|kontakt\b|電話|电话|전화|\bтел"
)
_BEFORE = re.compile(r"[\w.,/#$€£¥=&%-]")
_AFTER = re.compile(r"[\w%€°]")
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
    r"(?:1[-. ])?"
    r"(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-.]|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1)"
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
    """Finds the numbers of a run of digits and signs, which begins at `offset`."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    if run.count("(") != run.count(")"):
        run = run.replace("(", " ")  # "(call 030 123456)": the library would take none.
    matches: list[PhoneNumberMatch] = []
    for region in regions:
        matches += PhoneNumberMatcher(run, region, Leniency.POSSIBLE, sys.maxsize)
    # Of those that overlap the first and longest.
    matches.sort(key=lambda match: (match.start, -match.end))
    end = 0
    for match in matches:
        start = offset + match.start
        stop = offset + match.end
        if start >= end and _is_phone(text, start, stop, match.number):
            yield PiiMatch(start, stop, "phone")
            end = stop


def _is_phone(text: str, start: int, stop: int, number: "PhoneNumber") -> bool:
    from phonenumbers import PhoneNumberFormat, format_number, is_valid_number

    written = text[start:stop]
    without_extension = re.split(r" ?(?:x|ext)", written)[0]
    groups = _GROUP.findall(without_extension)
    num_digits = sum(map(len, groups))
    if num_digits < _LEAST_DIGITS or _AFTER.match(text, stop):
        return False
    words = get_preceding_words(text, start)
    thing = COUNTED_THING.search(words)
    # "Phone no." is one, "contact me about order no." is none.
    is_announced = _WORDS.search(words, max(0, thing.start() - 12) if thing else 0)
    if thing and not is_announced:
        return False
    if start and _BEFORE.match(text, start - 1):
        return False
    if written[0] == "+":
        return written[1].isalnum()
    if _OTHER.fullmatch(without_extension):
        return False
    if is_announced or _NORTH_AMERICAN.fullmatch(without_extension):
        return True
    if _UNSPOKEN_OTHER.fullmatch(without_extension):
        return False
    usual_groups = _GROUP.findall(format_number(number, PhoneNumberFormat.NATIONAL))
    has_leading_zero = without_extension.lstrip("(").startswith("0")
    is_as_usual = has_leading_zero or usual_groups == groups
    return len(groups) > 1 and is_as_usual and is_valid_number(number)
