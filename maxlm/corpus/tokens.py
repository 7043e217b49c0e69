"""Words and symbols of running text, in every script, by a simplification of UAX #29.

- A *word* is a run of letters, marks and digits, over a single full stop, middle dot or underscore
  between two of them (e.g, snake_case) and a comma between digits (1,000). An apostrophe between
  two begins a word, as tokenizers for English and French have it: it 's, don 't, l 'homme.
- In scripts that put no spaces between words (Han, Hiragana, Thai, Lao, Khmer, Myanmar) each
  letter with its marks is a word.
- Every other visible character is a *symbol*; a run of the same one (`...`, `-----`) is one.
- Marks and format characters (joiners, soft hyphens, variation selectors) belong to what they
  follow, and are nothing after a space.
"""

import regex

from maxlm.corpus.characters import ALONE_RANGES

_ALONE = "".join(
    "-".join(f"\\U{int(code, 16):08x}" for code in each.split("-")) for each in ALONE_RANGES.split()
)
_LETTER = rf"[\p{{L}}\p{{N}}--[\p{{L}}&&[{_ALONE}]]]"
_REST = rf"[\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}--[\p{{L}}&&[{_ALONE}]]]"
_MARKS = r"[\p{M}\p{Cf}]*+"
WORD = regex.compile(rf"(?V1)[\p{{L}}&&[{_ALONE}]]{_MARKS}|{_LETTER}{_REST}*+")
"""A run of letters, marks and digits, or a letter of a script without spaces, with its marks."""
_TOKEN = regex.compile(
    rf"""(?V1)[\p{{L}}&&[{_ALONE}]]{_MARKS}
    | (?: (?<={_REST})['’] )? {_LETTER}{_REST}*+
      (?: (?: [._·] | (?<=\p{{Nd}}),(?=\p{{Nd}}) ) {_LETTER}{_REST}*+ )*
    | (?P<symbol>[^\s\x1c-\x1f\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}]){_MARKS} (?: (?P=symbol){_MARKS} )*""",
    regex.VERBOSE,
)


def split_tokens(text: str) -> list[str]:
    """Splits a text into words and symbols."""
    return [found[0] for found in _TOKEN.finditer(text)]


def is_word(token: str) -> bool:
    """Tells a word, which has a letter, mark or digit, from a symbol."""
    return token[0].isalnum() or token[1:2].isalnum()


def has_letter(token: str) -> bool:
    """Tells whether a word or symbol has a letter."""
    return token.isalpha() or any(map(str.isalpha, token))
