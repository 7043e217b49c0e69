"""Personal data: found, and masked in a new version of the text."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypedDict

import pyarrow as pa
from pydantic import Field, model_validator

from maxlm.corpus.pii import KINDS, Kind, PiiMatch, remove_overlaps
from maxlm.corpus.pii.addresses import find_emails, find_ips
from maxlm.corpus.pii.numbers import find_card_numbers, find_ibans, find_ssns
from maxlm.corpus.pii.phones import check_regions, find_phones
from maxlm.corpus.pii.secrets import find_credentials
from maxlm.corpus.stage import PerDocumentStage, RowLabelFn, RowLabels

# The least that a number of any kind has: five digits with little between them.
_DIGITS = re.compile(r"[0-9](?:[^0-9\n]{0,3}[0-9]){4}")
_SPAN = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("kind", pa.string()),
        ("masked_start", pa.int32()),
        ("masked_end", pa.int32()),
    ]
)


class PiiSpan(TypedDict):
    """A value of `_SPAN`: where personal data is in the text and in its masked
    version."""

    start: int
    end: int
    kind: Kind
    masked_start: int | None
    masked_end: int | None


class PiiStage(PerDocumentStage):
    """Finds e-mail addresses, telephone numbers, public IP addresses, IBANs, payment
    cards, US Social Security numbers, and keys and tokens, and puts a typed placeholder
    in their place.

    Patterns with what confirms them: checksums (Luhn, ISO 7064), registries of lengths
    and ranges, numbering plans (phonenumbers), top-level domains, words nearby. See
    `maxlm.corpus.pii`. Names and postal addresses are not looked for.

    Labels: `text`, the masked version, null where nothing is masked (no such label if
    `mask` is empty); how many there are of each kind and their sum, `count`; `spans`,
    in order: `start` and `end` count characters (code points) in the text before,
    `masked_start` and `masked_end` in the text after (null where the kind is not
    masked): each position of one has its place in the other.
    """

    stage: Literal["pii"] = "pii"
    mask: tuple[Kind, ...] = KINDS
    """The kinds to mask; the others are only counted. Empty: no new text."""
    placeholders: dict[Kind, str] = Field(default_factory=dict)
    """Text in place of each kind in `mask`; default: the kind in capitals, such as
    `<EMAIL>`."""
    regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "ES", "IT")
    """Countries (ISO 3166) whose telephone numbers are known as they are written at
    home; numbers with a country code are known from everywhere. Each costs time and a
    little precision."""

    version: ClassVar[int] = 3
    packages: ClassVar[tuple[str, ...]] = ("phonenumbers", "tldextract")

    @model_validator(mode="after")
    def _check(self) -> "PiiStage":
        unmasked = [kind for kind in self.placeholders if kind not in self.mask]
        if unmasked:
            kinds = ", ".join(unmasked)
            raise ValueError(f"placeholders for {kinds}, which mask does not name")
        return self

    def schema(self) -> pa.Schema:
        fields: list[tuple[str, pa.DataType]] = []
        if self.mask:
            fields.append(("text", pa.large_string()))
        fields.append(("count", pa.int32()))
        fields += [(kind, pa.int32()) for kind in KINDS]
        fields.append(("spans", pa.list_(_SPAN)))
        return pa.schema(fields)

    def make_row_label_fn(self) -> RowLabelFn:
        """Raises: MaxlmError: a region has no numbering plan."""
        check_regions(self.regions)
        placeholders = {kind: f"<{kind.upper()}>" for kind in self.mask}
        placeholders |= self.placeholders

        def label(text: str | None) -> RowLabels:
            matches = find_pii(text, self.regions) if text else []
            masked, spans = mask_pii(text or "", matches, placeholders)
            counts = Counter(match.kind for match in matches)
            return {
                "text": masked,
                "count": len(matches),
                **{kind: counts[kind] for kind in KINDS},
                "spans": spans,
            }

        return label


def find_pii(text: str, regions: Sequence[str]) -> list[PiiMatch]:
    """Finds the personal data of a text, in order and without overlaps; `regions` as in
    the stage's settings."""
    # What a kind must have is looked for first: that takes a fraction of the time.
    matches = list(find_credentials(text))
    if "@" in text:
        matches += find_emails(text)
    if _DIGITS.search(text):
        matches += find_card_numbers(text)
        matches += find_ssns(text)
        matches += find_ibans(text)
        matches += find_phones(text, regions)
    if "." in text or ":" in text:
        matches += find_ips(text)
    return remove_overlaps(matches)


def mask_pii(
    text: str, matches: list[PiiMatch], placeholders: Mapping[str, str]
) -> tuple[str | None, list[PiiSpan]]:
    """Returns the masked text, None if nothing is masked, and each match's place in
    both texts."""
    parts = []
    spans: list[PiiSpan] = []
    done = 0
    shift = 0  # How much further on a character is in the masked text.
    for start, end, kind in matches:
        masked_start = None
        masked_end = None
        placeholder = placeholders.get(kind)
        if placeholder is not None:
            parts += [text[done:start], placeholder]
            masked_start = start + shift
            masked_end = masked_start + len(placeholder)
            done = end
            shift = masked_end - end
        spans.append(
            {
                "start": start,
                "end": end,
                "kind": kind,
                "masked_start": masked_start,
                "masked_end": masked_end,
            }
        )
    if not parts:
        return None, spans
    return "".join([*parts, text[done:]]), spans
