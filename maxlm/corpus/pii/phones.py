"""Telephone numbers."""

import re
from collections.abc import Iterator

from maxlm.config import MaxlmError
from maxlm.corpus.pii.match import NOT_OURS, PiiMatch, get_preceding_words

_RUN = re.compile(
    r"(?:\(?\+|\()?[0-9][0-9 \u00a0()./\u2010-\u2015-]{5,}[0-9](?:(?: ?x| ?ext\.? ?)[0-9]{1,6})?"
)
_TOKEN = re.compile(r"[^ \u00a0]+")
_GROUP = re.compile(r"[0-9]+")
_TRUNK = re.compile(r"\(?0[1-9]")
_MOST_TOKENS = 8
_TABLE_TOKENS = 14  # As many numbers in a row are a table.
_EXTENSION = re.compile(r" ?(?:x|ext)")
_WORDS = re.compile(
    r"phone|t[eé]l[eéè]f|\bt[eé]l(?:\b|[a-z]*[.:])|\bmob(?:ile|iel|il)?\b|m[oó]vil|\bcel|portable\b|"
    r"\bcall|\bfax|whatsapp|\bsms\b|\btext (?:me|us|him|her)\b|\bring\b|\bdial|handy|hotline|"
    r"\banruf|\brufen? |rufnummer|\bllam|\bchiam|\bappele|\bbel(?:len)?\b|dzwon|komórk|"
    r"\blig(?:ue|ar)|\breach\b|\bcontact\b|kontakt\b|電話|电话|전화|\bтел"
)
_DATE = re.compile(
    r"(?<![0-9])[0-9]{4}[-./][0-9]{2}[-./][0-9]{2}(?![0-9])|"
    r"^[0-9]{1,4}[-./][0-9]{1,2}[-./][0-9]{1,4}(?![-./]?[0-9])"
)
_NORTH_AMERICAN = re.compile(
    r"(?:1[-. ])?(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-.]|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1)"
    r"[0-9]{4}"
)
# US postal codes and clauses of US regulations, which every licence text quotes.
_ZIP_OR_CLAUSE = re.compile(r"[0-9]{5}-[0-9]{4}|[0-9]{3}\.[0-9]{3}-[0-9]{4}")
_INTERNATIONAL = re.compile(r"\(?(?:\+|00)(?=[1-9])")
_THOUSANDS = re.compile(
    r"[1-9][0-9]{0,2}(?:([ .\u00a0])[0-9]{3})(?:\1[0-9]{3})*(?:(?!\1)\.[0-9]+)?"
)
_DECIMAL = re.compile(r"(?<![0-9.])[0-9]+\.(?:[0-9]{5,}|[0-9]+$)(?![0-9.])")
_ISBN = re.compile(r"97[89](?:[ -]?[0-9]){10}")


class PhoneFinder:
    """Finds telephone numbers with Google's metadata of the world's numbering plans.

    Taken are numbers with `+` (or 00) that are possible; numbers in the form of North America;
    numbers valid in one of `regions` that are written in groups, as is usual there or with a
    leading 0; and, where a word such as "tel" or "call" comes before, any number possible there.
    """

    def __init__(self, regions: tuple[str, ...]):
        import phonenumbers

        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                fix = "use codes of ISO 3166 such as US, GB, DE"
                raise MaxlmError(f'no numbering plan of "{region}"', where="regions", fix=fix)
        self._library, self._regions = phonenumbers, regions

    def find(self, text: str) -> Iterator[PiiMatch]:
        """Finds the numbers in a text."""
        for found in _RUN.finditer(text):
            yield from self._in_run(text, *found.span())

    def _in_run(self, text: str, start: int, end: int) -> Iterator[PiiMatch]:
        """The numbers in a run of digits and what may stand between them."""
        tokens = [token.span() for token in _TOKEN.finditer(text, start, end)]
        table = len(tokens) > _TABLE_TOKENS
        if text[end : end + 1].isalnum() or text[end : end + 1] in ("_", "%", "€", "°"):
            tokens.pop()
        words = get_preceding_words(text, start)
        other = NOT_OURS.search(words)
        # "Phone no." is one, "contact me about order no." is none.
        spoken = _WORDS.search(words, max(0, other.start() - 12) if other else 0) is not None
        previous = text[start - 1] if start else " "
        if previous.isalnum() or previous in "_.,-/#$€£¥=&%" or (other and not spoken):
            tokens = tokens[1:]
            spoken = False
        first = 0
        while first < len(tokens):
            number = None
            if not table or "+" in text[slice(*tokens[first])]:
                number = self._longest(text, tokens[first : first + _MOST_TOKENS], spoken)
            if number is None:
                first += 1
                continue
            yield number
            spoken = False
            while first < len(tokens) and tokens[first][0] < number.end:
                first += 1

    def _longest(self, text: str, tokens: list[tuple[int, int]], spoken: bool) -> PiiMatch | None:
        """The number that begins with the first token: the longest valid, or else possible, one."""
        for valid in (True, False):
            for _, end in reversed(tokens):
                begin, stop = _trim(text, tokens[0][0], end)
                if self._is_phone(text[begin:stop], spoken, valid):
                    return PiiMatch(begin, stop, "phone")
        return None

    def _is_phone(self, number: str, spoken: bool, valid: bool) -> bool:
        base = _EXTENSION.split(number)[0]
        digits = sum(c.isdigit() for c in base)
        if not 7 <= digits <= 16 or base.count("(") != base.count(")"):
            return False
        if prefix := _INTERNATIONAL.match(base):
            likely = digits >= 9 or spoken
            if likely and self._check("+" + base[prefix.end() :], None, valid):
                return True
            if "+" in prefix[0]:
                return False
        if _DATE.search(base) or _ISBN.match(base) or _DECIMAL.search(base):
            return False
        if _NORTH_AMERICAN.fullmatch(base):
            return True
        if spoken:
            return any(self._check(base, region, valid) for region in self._regions)
        grouped = digits < len(base) and not _THOUSANDS.fullmatch(base)
        if not valid or not grouped or _ZIP_OR_CLAUSE.fullmatch(base):
            return False
        return any(self._written_as_at_home(base, region) for region in self._regions)

    def _check(self, number: str, region: str | None, valid: bool) -> bool:
        check = self._library.is_valid_number if valid else self._library.is_possible_number
        parsed = self._parse(number, region)
        return parsed is not None and check(parsed)

    def _written_as_at_home(self, number: str, region: str) -> bool:
        """Whether it is valid, and has the trunk prefix 0 or the grouping that is usual there."""
        parsed = self._parse(number, region)
        if parsed is None or not self._library.is_valid_number(parsed):
            return False
        usual = self._library.format_number(parsed, self._library.PhoneNumberFormat.NATIONAL)
        return _TRUNK.match(number) is not None or _GROUP.findall(usual) == _GROUP.findall(number)

    def _parse(self, number: str, region: str | None):
        try:
            return self._library.parse(number, region)
        except self._library.NumberParseException:
            return None


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Trims separators at the end, and a bracket without its partner, off text[start:end]."""
    while start < end and text[end - 1] in " (./-\u00a0":
        end -= 1
    number = text[start:end]
    if number.startswith("(") and number.count("(") > number.count(")"):
        start += 1
    if number.endswith(")") and number.count(")") > number.count("("):
        end -= 1
    return start, end
