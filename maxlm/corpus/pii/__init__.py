"""Personal data in a text: where it is, and what kind.

The detectors are small functions in a file by kind. They look only where a rare
character or number stands, so that most of a text is passed at the speed of a string
search.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

Kind = Literal["email", "phone", "ip", "iban", "card", "ssn", "key"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Of overlapping finds the one whose evidence is stronger: a checksum or a prefix before
# a shape.
_PRIORITY: tuple[Kind, ...] = ("key", "email", "iban", "card", "ssn", "ip", "phone")

_LEAD = 40  # Characters before a number that are looked at.
_LEAD_START = re.compile(r"[0-9\n]|@\S+|[.!?]\s+(?=[A-ZÀ-Þ])|[^\W\d]{6}[.!?]$")

COUNTED_THING = re.compile(
    r"(?:isbn|issn|doi|ean|imei|order|product|stock|catalog\w*|docket|invoice|ticket|case|part|"
    r"serial|sku|item|tracking|version|article|bestell\w*|rechnung\w*|commande|pedido|ordine|"
    r"facture|patent|model|lot|batch|id|ref\w*|no|nr|n°|№|#|[$€£¥])"
    r"[\s.:#-]*(?:no|nr|number|nummer|code|id)?[\s.:#-]*$"
)
"""Ends a `get_preceding_words` to a number that counts things."""


class PiiMatch(NamedTuple):
    """Personal data at `text[start:end]`."""

    start: int
    end: int
    kind: Kind


def remove_overlaps(matches: Iterable[PiiMatch]) -> list[PiiMatch]:
    """Returns the matches in order; of those that overlap, one."""
    separate: list[PiiMatch] = []
    for match in sorted(matches):
        if not separate or match.start >= separate[-1].end:
            separate.append(match)
        elif _PRIORITY.index(match.kind) < _PRIORITY.index(separate[-1].kind):
            separate[-1] = match
    return separate


def get_preceding_words(text: str, start: int) -> str:
    """Returns the words that lead up to a number, in lower case.

    Those of the same sentence and line (or the line above, if none of its own), after
    any number before: a word such as "phone" speaks of the number that comes next.
    """
    lead = text[max(0, start - _LEAD) : start].rstrip()
    return _LEAD_START.split(lead)[-1].lower()
