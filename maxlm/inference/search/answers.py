"""Answers that texts give, in a form that makes equal ones the same string."""

import re
from decimal import Decimal

_NUMBER = r"(?:(?<![\w.)])-)?(?:(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+"


def parse_last_number(text: str) -> str | None:
    """Returns a text's last number: "1,234.50" as "1234.5"."""
    found = re.findall(_NUMBER, text)
    return normalize_number(found[-1]) if found else None


def parse_gsm8k(text: str) -> str | None:
    """Returns the number behind the last ``####``, as solutions of GSM8K end (Cobbe et
    al. 2021, arXiv 2110.14168)."""
    _, mark, rest = text.rpartition("####")
    found = re.match(rf"\s*\$?\s*({_NUMBER})", rest) if mark else None
    return normalize_number(found[1]) if found else None


def parse_boxed(text: str) -> str | None:
    r"""Returns what the last complete ``\boxed{...}`` holds, without blanks at its ends."""
    answer = None
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        end = start.end()
        while end < len(text) and depth:
            escaped = text[end - 1] == "\\"
            depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
            end += 1
        if not depth:
            answer = text[start.end() : end - 1].strip()
    return answer


def parse_choice(text: str) -> str | None:
    """Returns the letter, A to J, that a text chooses: the last behind "answer is" or
    "answer:", else the last one in parentheses, else the last one that stands alone."""
    letter = r"\(?\**([A-J])\b(?!')"
    patterns = (
        rf"(?i:answer)\s*(?:(?i:is)\b\s*)?:?\s*\**{letter}",
        r"\(([A-J])\)",
        rf"\b{letter}",
    )
    for pattern in patterns:
        if found := re.findall(pattern, text):
            return found[-1]
    return None


def normalize_number(number: str) -> str:
    """Returns a decimal number without separators of thousands and zeros that say
    nothing."""
    value = Decimal(number.replace(",", ""))
    return f"{value.normalize():f}" if value else "0"
