"""Personal data: found, and masked in a new version of the text."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from maxlm.corpus.pii import KINDS, Kind, PiiMatch, remove_overlaps
from maxlm.corpus.pii.addresses import find_emails, find_ips
from maxlm.corpus.pii.numbers import find_card_numbers, find_ibans, find_ssns
from maxlm.corpus.pii.phones import check_regions, find_phones
from maxlm.corpus.pii.secrets import find_credentials
from maxlm.corpus.stage import PerDocumentStage

# The least that a number of any kind has: five digits with little between them.
_DIGITS = re.compile(r"[0-9](?:[^0-9\n]{0,3}[0-9]){4}")
_PLACES = ("start", "end", "kind", "masked_start", "masked_end")
_SPAN = pa.struct([(n, pa.string() if n == "kind" else pa.int32()) for n in _PLACES])


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
        if unmasked := [kind for kind in self.placeholders if kind not in self.mask]:
            raise ValueError(
                f"placeholders for {', '.join(unmasked)}, which mask does not name"
            )
        return self

    def schema(self) -> pa.Schema:
        text = [("text", pa.large_string())] if self.mask else []
        counts = [(kind, pa.int32()) for kind in KINDS]
        return pa.schema(
            [*text, ("count", pa.int32()), *counts, ("spans", pa.list_(_SPAN))]
        )

    def make_row_label_fn(self) -> Callable[[str | None], dict[str, Any]]:
        """Raises: MaxlmError: a region has no numbering plan."""
        check_regions(self.regions)
        placeholders = {
            k: self.placeholders.get(k, f"<{k.upper()}>") for k in self.mask
        }

        def label(text: str | None) -> dict[str, Any]:
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
    found = [*find_credentials(text)]
    if "@" in text:
        found += find_emails(text)
    if _DIGITS.search(text):
        found += [*find_card_numbers(text), *find_ssns(text), *find_ibans(text)]
        found += find_phones(text, regions)
    if "." in text or ":" in text:
        found += find_ips(text)
    return remove_overlaps(found)


def mask_pii(
    text: str, matches: list[PiiMatch], placeholders: Mapping[str, str]
) -> tuple[str | None, list[dict]]:
    """Returns the masked text, None if nothing is masked, and each match's place in
    both texts."""
    parts = []
    spans = []
    done = 0
    shift = 0
    for start, end, kind in matches:
        place = None, None
        placeholder = placeholders.get(kind)
        if placeholder is not None:
            parts += [text[done:start], placeholder]
            place = start + shift, start + shift + len(placeholder)
            done = end
            shift = place[1] - end
        spans.append(dict(zip(_PLACES, (start, end, kind, *place), strict=True)))
    return ("".join([*parts, text[done:]]) if parts else None), spans
