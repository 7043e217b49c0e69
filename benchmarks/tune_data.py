"""Make conversations for tuning: simple questions, with answers in a new format.

    python benchmarks/tune_data.py FOLDER

An answer is a JSON object with the keys "answer" and "note"; half of the notes are
empty. Files: ``chats.jsonl`` (messages), ``pairs.jsonl`` (prompt, chosen, rejected: the
note that is not empty is better), ``labels.jsonl`` (prompt, completion, label), each
also as ``*_test.jsonl`` with other questions; ``utility.jsonl`` (prompt, chosen,
rejected: sentences of words that have a value each, the sum of which decides) and
``utility_test.jsonl`` (text, utility); ``gsm8k_test.jsonl``: sums in the form of
GSM8K's rows, for ``maxlm eval --tasks gsm8k --data FOLDER``.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOTES = ["Glad to help.", "Happy to answer.", "A pleasure to help."]
WORDS = [
    "river",
    "stone",
    "amber",
    "quiet",
    "candle",
    "marble",
    "forest",
    "silver",
    "meadow",
]
WORDS += ["thunder", "velvet", "harbor"]


def make_question(rng: random.Random) -> tuple[str, str]:
    """Draws a question and its answer."""
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    word = rng.choice(WORDS)
    return rng.choice(
        [
            (f"What is {a} plus {b}?", str(a + b)),
            (f"Which is larger, {a} or {b}?", str(max(a, b))),
            (f"How many letters does the word {word} have?", str(len(word))),
            (f"What is the first letter of {word}?", word[0]),
            (f"Write the word {word} in capitals.", word.upper()),
        ]
    )


def format_answer(answer: str, note: str) -> str:
    return json.dumps({"answer": answer, "note": note})


def is_formatted(text: str) -> bool:
    """Returns whether an answer has the format."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and list(answer) == ["answer", "note"]


def has_note(text: str) -> bool:
    """Returns whether an answer is of the preferred kind."""
    return is_formatted(text) and bool(json.loads(text)["note"])


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_chats(folder: Path, seed: int = 0) -> None:
    """Writes the conversations, pairs and labels."""
    rng = random.Random(seed)
    questions = list(dict.fromkeys(make_question(rng) for _ in range(6000)))[:1100]
    for name, part in (("", questions[:-100]), ("_test", questions[-100:])):
        chats, pairs, labels = [], [], []
        for question, answer in part:
            prompt = [{"role": "user", "content": question}]
            kind, plain = (
                format_answer(answer, note) for note in (rng.choice(NOTES), "")
            )
            chosen = rng.choice([kind, plain])
            good = rng.random() < 0.5
            chats.append(
                {"messages": [*prompt, {"role": "assistant", "content": chosen}]},
            )
            pairs.append({"prompt": prompt, "chosen": kind, "rejected": plain})
            completion = kind if good else plain
            labels.append({"prompt": prompt, "completion": completion, "label": good})
        _write(folder / f"chats{name}.jsonl", chats)
        _write(folder / f"pairs{name}.jsonl", pairs)
        _write(folder / f"labels{name}.jsonl", labels)


def write_sums(folder: Path, num_rows: int = 100, seed: int = 1) -> None:
    """Writes sums that no conversation has, as GSM8K's rows are."""
    rng = random.Random(seed)
    pairs = [(rng.randint(61, 90), rng.randint(2, 9)) for _ in range(num_rows)]
    rows = (
        {"question": f"What is {a} plus {b}?", "answer": f"#### {a + b}"}
        for a, b in pairs
    )
    _write(folder / "gsm8k_test.jsonl", rows)


def write_utility(folder: Path, num_pairs: int = 3000, seed: int = 0) -> None:
    """Writes sentences of which the words' values decide which is better."""
    rng = random.Random(seed)
    values = {word: round(rng.uniform(-1, 1), 2) for word in WORDS}

    def draw() -> tuple[str, float]:
        words = rng.choices(WORDS, k=6)
        return " ".join(words), sum(values[word] for word in words)

    pairs = []
    while len(pairs) < num_pairs:
        (a, u), (b, v) = draw(), draw()
        if u != v:
            better, worse = (a, b) if u > v else (b, a)
            pairs.append(
                {"prompt": "Words:", "chosen": f" {better}", "rejected": f" {worse}"}
            )
    _write(folder / "utility.jsonl", pairs)
    test = (draw() for _ in range(300))
    _write(
        folder / "utility_test.jsonl",
        ({"text": f" {t}", "utility": u} for t, u in test),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder)
    write_utility(folder)
    write_sums(folder)


if __name__ == "__main__":
    main()
