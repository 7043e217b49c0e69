"""A small crawl, and the corpus that an unbroken run makes of it."""

import json
import random

import pytest

from maxlm.corpus.run import run_recipe
from tests.corpus.corpora import recipe

WORDS = (
    "the", "of", "and", "to", "in", "house", "river", "stone", "walks", "over", "under", "green",
)  # fmt: skip


@pytest.fixture(scope="session")
def crawl(tmp_path_factory):
    """A few hundred small documents in two sources, with copies and edited copies among
    them."""
    folder = tmp_path_factory.mktemp("crawl")
    chance = random.Random(5)
    texts = [
        " ".join(chance.choices(WORDS, k=chance.randint(5, 120))) for _ in range(240)
    ]
    texts[100:110] = texts[:10]
    texts[150:160] = [f"{text} indeed" for text in texts[20:30]]
    texts[200] = (
        "Écrivez à jean.dupont@example.org dès demain, s'il vous plaît, mes chers amis."
    )
    for name, part in (("web", texts[:200]), ("books", texts[200:])):
        rows = [{"text": text, "id": f"{name}-{i}"} for i, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return folder


@pytest.fixture(scope="session")
def whole(crawl, tmp_path_factory):
    return run_recipe(recipe(crawl, tmp_path_factory.mktemp("whole") / "corpus"))
