"""Numbers of accounts and people that carry a checksum or a fixed form: cards, IBANs,
US SSNs."""

import re
from collections.abc import Iterator

from maxlm.corpus.pii import COUNTED_THING, PiiMatch, get_preceding_words

# The issuers' number ranges (ISO/IEC 7812): first digits, and how many digits in all.
_ISSUERS = (
    (r"4", (16,)),  # Visa; its 13 digits of old are an EAN today
    (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
    (r"3[47]", (15,)),  # American Express
    (r"6011|64[4-9]|65", (16,)),  # Discover
    (r"35(?:2[89]|[3-8])", (16,)),  # JCB
    (r"2131|1800", (15,)),  # JCB, older
    (r"30[0-59]|36|3[89]", (14,)),  # Diners Club
    (r"62", (16, 19)),  # UnionPay
    (r"50|5[6-8]|63|67", (16,)),  # Maestro
)
_CARD = re.compile(
    r"[1-6][0-9]{3}"
    r"(?:[0-9]{10,15}|([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{6}\1[0-9]{4,5}))"
)
_DIGITS = re.compile(r"[0-9]+")
_GROUP_AFTER = re.compile(r"[ -][0-9][0-9A-Fa-f]{3}(?!\w)")
_SSN = re.compile(
    r"[0-8][0-9]{2}(?:-[0-9]{2}-|(?P<plain> ?)[0-9]{2}(?P=plain))[0-9]{4}(?!\d)"
)
_SSN_WORDS = re.compile(r"\bssns?\b|social.security|\btax(?:payer)?.id|\bitin\b")
# "No." and "id" alone may be a person's.
_THING = re.compile(r"(?!id|no|nr|n°|№)")
_CALLS = re.compile(
    r"(?:phone|fax|\b(?:tel|mobile|cell))[\s.:#-]*(?:no|number)?[\s.:#-]*$"
)
# Printed in advertisements; the SSA voided them.
_VOID_SSNS = ("078051120", "219099999")

# Countries by the length of their IBANs (SWIFT's IBAN Registry).
_IBAN_COUNTRIES = """
    15 NO; 16 BE; 18 DK FI FK FO GL NL SD; 19 MK SI; 20 AT BA EE KZ LT LU MN XK; 21 CH HR LI LV;
    22 BG BH CR DE GB GE IE ME RS VA; 23 AE GI IL IQ OM SO TL; 24 AD CZ ES MD PK RO SA SE SK TN VG;
    25 LY PT ST; 26 IS TR; 27 BI DJ FR GR IT MC MR SM; 28 AL AZ BY CY DO GT HN HU LB NI PL SV;
    29 BR EG PS QA UA; 30 JO KW MU YE; 31 MT SC; 32 LC; 33 RU"""
_IBAN_LENGTHS = {
    country: int(length)
    for length, *countries in map(str.split, _IBAN_COUNTRIES.split(";"))
    for country in countries
}
_IBAN = re.compile(
    r"[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,29}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)"
)
_WORD = re.compile(r"[A-Z0-9]+")
_GOES_ON = re.compile(r"\w|[-.,/]\d")


def _is_inside(text: str, start: int, end: int) -> bool:
    """Tells whether text[start:end] is only a part of a longer word or number."""
    before = text[max(0, start - 2) : start][::-1]  # Read away from it.
    return _GOES_ON.match(before) is not None or _GOES_ON.match(text, end) is not None


def find_card_numbers(text: str) -> Iterator[PiiMatch]:
    """Finds payment cards by issuers' ranges and lengths, and Luhn's check digit
    (ISO/IEC 7812-1).

    One number in ten has that check digit by chance, so those after "order" and the
    like are none; nor are those with groups of digits both before them and after, which
    are of a table.
    """
    position = 0
    is_refused = False
    while match := _CARD.search(text, position):
        start, end = match.span()
        follows_refused = is_refused and start == position + 1
        is_in_table = follows_refused and _GROUP_AFTER.match(text, end)
        digits = match[0].replace(" ", "").replace("-", "")
        is_refused = bool(
            is_in_table
            or _is_inside(text, start, end)
            or not _is_card(digits)
            or COUNTED_THING.search(get_preceding_words(text, start))
        )
        if is_refused:
            position = _find_end(_DIGITS, text, start)
        else:
            yield PiiMatch(start, end, "card")
            position = end


def _find_end(group: re.Pattern[str], text: str, start: int) -> int:
    """Returns the end of the group that begins at `start`; `start` + 1 if none does."""
    match = group.match(text, start)
    return match.end() if match else start + 1


def _is_card(digits: str) -> bool:
    is_of_issuer = any(
        len(digits) in lengths and re.match(prefix, digits)
        for prefix, lengths in _ISSUERS
    )
    has_several_digits = len(set(digits)) > 1
    return is_of_issuer and has_several_digits and _has_luhn_digit(digits)


def _has_luhn_digit(digits: str) -> bool:
    """Tells whether the last digit is Luhn's check digit of those before."""
    # From the right, every other digit is doubled, and the digits of that are added.
    total = sum(map(int, digits[-1::-2]))
    for digit in digits[-2::-2]:
        total += sum(divmod(2 * int(digit), 10))
    return total % 10 == 0


def find_ssns(text: str) -> Iterator[PiiMatch]:
    """Finds US Social Security numbers: with dashes, or after words that say so.

    With dashes, those after "part no.", "tel." and the like are none, unless such words
    say so too. The SSA never gives out area 000, 666 or 900-999, group 00, serial 0000.
    """
    for match in _SSN.finditer(text):
        start, end = match.span()
        digits = re.sub(r"\D", "", match[0])
        area = digits[:3]
        group = digits[3:5]
        serial = digits[5:]
        is_void = area in ("000", "666") or group == "00" or serial == "0000"
        if is_void or digits in _VOID_SSNS:
            continue
        before = text[max(0, start - 1) : start]
        if before in ("-", "+", "#", "$") or _is_inside(text, start, end):
            continue
        words = get_preceding_words(text, start)
        says_so = _SSN_WORDS.search(words)
        has_dashes = match["plain"] is None
        if says_so or (has_dashes and not _names_other_number(words)):
            yield PiiMatch(start, end, "ssn")


def _names_other_number(words: str) -> bool:
    """Tells whether the words before a number say that it is no person's."""
    thing = COUNTED_THING.search(words)
    if thing and _THING.match(thing[0]):
        return True
    return _CALLS.search(words) is not None


def find_ibans(text: str) -> Iterator[PiiMatch]:
    """Finds IBANs (ISO 13616): the country's length, and remainder 1 modulo 97 (ISO
    7064)."""
    position = 0
    while match := _IBAN.search(text, position):
        start = match.start()
        length = _IBAN_LENGTHS.get(match[0][:2], 0)
        # In groups of four the pattern may run on into the next word.
        is_grouped = match[0][4:5] == " "
        num_spaces = (length - 1) // 4 if is_grouped else 0
        end = start + length + num_spaces
        compact = text[start:end].replace(" ", "")
        is_whole = end <= match.end() and len(compact) == length > 0
        if is_whole and not _is_inside(text, start, end) and _is_iban(compact):
            yield PiiMatch(start, end, "iban")
            position = end
        else:
            position = _find_end(_WORD, text, start)


def _is_iban(compact: str) -> bool:
    # The country and its check digits go to the end, letters become 10 to 35.
    moved = compact[4:] + compact[:4]
    number = "".join(str(int(character, 36)) for character in moved)
    return int(number) % 97 == 1
