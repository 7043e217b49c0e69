"""Random texts for comparing tokenizers."""

import random

_WHITE = " \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u2028\u3000\u200b"
_PIECES = (
    "the", " The", "don't", "DON'T", "'ſ", "we'll", "I'VE", "camelCaseHTML", "12345", "١٢٣", "²½",
    "größer", "e\u0301", "\u0301\u0300", "ﬁ", "Ａ", "İ", "ß", "猫が好き", "ก็", "हिन्दी", "한글",
    "\u1100\u1161", "👩\u200d👩\u200d👧", "🇩🇪", "<|endoftext|>", "<|im_start|>", "</s>", "[UNK]",
    "##ing", "▁", "▁▁", "Ġ", "<0x41>", "\0", "\ufffd", "\ufeff", "\u202e", "...", "!?\n\n",
    "//\r\n", "  \n", "\r\r\n", "_a_b_", "x=y;", "\u2019s",
)  # fmt: skip


def fuzz_texts(count: int, seed: int = 0) -> list[str]:
    """Random valid texts: code points of all planes, words, blanks, and runs of one of
    them."""
    chance = random.Random(seed)

    def char() -> str:
        plane = chance.choice((0, 0, 0, 1, 2, 3, 14, 15, 16))
        code = plane * 0x10000 + chance.randrange(0x10000)
        if plane == 0 and chance.random() < 0.7:
            code = chance.randrange(chance.choice((0x80, 0x250, 0x700, 0x3100)))
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ue000"

    def part() -> str:
        kind = chance.random()
        if kind < 0.35:
            return chance.choice(_PIECES)
        if kind < 0.6:
            return char()
        if kind < 0.85:
            return "".join(chance.choices(_WHITE, k=chance.randrange(1, 6)))
        if kind < 0.9:
            return chance.choice((char(), chance.choice(_PIECES))) * chance.randrange(
                2, 60
            )
        return chr(chance.randrange(0x20, 0x7F)) * chance.randrange(1, 4)

    return [
        "".join([part() for _ in range(chance.randrange(25))]) for _ in range(count)
    ]


def long_texts(length: int = 100_000) -> list[str]:
    """Runs that make regular expressions and merges work hard."""
    chars = (
        "a",
        " ",
        "\t\n",
        "a ",
        "!",
        "1",
        "猫",
        "e\u0301",
        "\U0010ffff",
        "aB",
        "\0",
    )
    return [char * (length // len(char)) for char in chars] + ["x" + " " * length + "y"]
