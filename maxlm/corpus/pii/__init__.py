"""Personal data in a text: where it is, and what kind.

`PiiFinder` runs the detectors, each a small function in a file by kind. They look only where a rare
character or number stands, so that most of a text is passed at the speed of a string search.
"""

import re

from maxlm.corpus.pii.addresses import find_emails, find_ips
from maxlm.corpus.pii.match import KINDS, Kind, PiiMatch, remove_overlaps
from maxlm.corpus.pii.numbers import find_card_numbers, find_ibans, find_ssns
from maxlm.corpus.pii.phones import PhoneFinder
from maxlm.corpus.pii.secrets import find_credentials

__all__ = ["KINDS", "Kind", "PiiFinder", "PiiMatch"]

# The least that a number of any kind has: five digits with little between them.
_DIGITS = re.compile(r"[0-9](?:[^0-9\n]{0,3}[0-9]){4}")


class PiiFinder:
    """Finds personal data.

    Args:
        regions: countries (ISO 3166) whose telephone numbers are known without a country code.
    """

    def __init__(self, regions: tuple[str, ...]):
        self._phones = PhoneFinder(regions)

    def find(self, text: str) -> list[PiiMatch]:
        """Finds the personal data of a text, in order and without overlaps."""
        found = [*find_credentials(text)]
        if "@" in text:
            found += find_emails(text)
        if _DIGITS.search(text):
            found += [*find_card_numbers(text), *find_ssns(text), *find_ibans(text)]
            found += self._phones.find(text)
        if "." in text or ":" in text:
            found += find_ips(text)
        return remove_overlaps(found)
