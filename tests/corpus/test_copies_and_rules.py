"""No text that rules drop as a duplicate, or cut as a repeat, is gone from what they
keep; and what is kept can be exported."""

import gzip
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from maxlm.cli.main import main
from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.recipe import RecipeConfig
from maxlm.corpus.run import run_recipe
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.data.store.store import TokenStore
from maxlm.data.tokenizer.load import load_tokenizer

SIZE = 8  # Words of a passage.
KEEP_BY = "heuristics.words"
NEAR = {"stage": "near", "keep_by": KEEP_BY}
PASSAGES = {"stage": "substring", "min_tokens": SIZE}
STAGES = [
    {"stage": "heuristics"},
    {"stage": "exact", "keep_by": KEEP_BY},
    {**NEAR, "where": "not exact.duplicate"},
    {**PASSAGES, "where": "not near.duplicate"},
]
KEEP = {
    "site": 'url != "bad"',
    "unique": "not exact.duplicate and not near.duplicate",
}


def prose(chance: random.Random, count: int) -> str:
    return " ".join(f"w{chance.randrange(10**6)}" for _ in range(count))


def crawl(seed: int) -> list[dict[str, str]]:
    """Documents with copies, edited copies and shared passages, of which a third is on
    a site that a rule drops, more often where they come first."""
    chance = random.Random(seed)
    passages = [prose(chance, chance.randint(SIZE, 30)) for _ in range(4)]
    passages += [
        f"{prose(chance, 5)} {passages[0]} {prose(chance, 6)}",
        "ha " * 20 + "ha",
    ]
    texts = []
    for _ in range(24):
        parts = [prose(chance, chance.randint(5, 40))]
        parts += chance.choices(passages, k=chance.randint(0, 3))
        chance.shuffle(parts)
        texts.append(" ".join(parts))
    for text in chance.choices(texts, k=30):
        words = text.split()
        kind = chance.randrange(4)
        if kind == 0:
            text = text.upper()
        elif kind == 1:
            words[chance.randrange(len(words))] = "edited"
            text = " ".join(words)
        elif kind == 2:
            words[0] = "begun"
            text = " ".join([*words, "so", "ended"])
        texts.append(text)
    rows = []
    for i, text in enumerate(texts):
        is_bad = chance.random() < 0.6 - i / 100
        rows.append({"id": f"d{i}", "text": text, "url": "bad" if is_bad else "good"})
    return rows


def make(folder: Path, rows: list[dict[str, str]], **changes) -> OpenCorpus:
    if not (folder / "web.jsonl").exists():
        (folder / "web.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    recipe = {
        "out": str(folder / "corpus"),
        "workers": 1,
        "shard_bytes": 6000,
        "sources": [{"name": "web", "documents": [str(folder / "web.jsonl")]}],
        "stages": STAGES,
        "keep": KEEP,
        "cut": ["substring.cuts"],
    }
    return OpenCorpus.open(run_recipe(RecipeConfig.model_validate(recipe | changes)))


def grams(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def read(corpus: OpenCorpus) -> dict[str, str]:
    source = SourceConfig(documents=(str(corpus.folder),))
    return {document.id: document.text.decode() for document in read_documents(source)}


@pytest.mark.parametrize("seed", range(3))
def test_no_text_is_lost_by_a_rule_that_drops_the_best_copy(tmp_path, seed):
    """By brute force: each document of the good site is kept or like a kept one, and
    each word of theirs is in a kept text."""
    rows = crawl(seed)
    taken = read(make(tmp_path, rows))
    originals = {row["id"]: row["text"] for row in rows}
    kept_grams = [grams(originals[name]) for name in taken]
    words = {word for text in taken.values() for word in text.lower().split()}
    good_rows = [row for row in rows if row["url"] == "good"]
    for row in good_rows:
        mine = grams(row["text"])
        assert any(len(mine & other) >= 0.8 * len(mine | other) for other in kept_grams)
        if row["id"] in taken:
            assert set(row["text"].lower().split()) <= words


def test_one_of_very_many_copies_stays_where_rules_drop_the_best(tmp_path):
    text = prose(random.Random(0), 30)
    # More than are compared by pairs.
    texts = [text if i % 2 else text.upper() for i in range(200)]
    sites = ["bad"] * 60 + ["good"] * 140
    rows = [{"id": f"d{i}", "text": t, "url": sites[i]} for i, t in enumerate(texts)]
    keep = {"site": KEEP["site"], "unique": "not near.duplicate"}
    stages = [NEAR | {"keep_by": None}]
    corpus = make(tmp_path, rows, stages=stages, keep=keep, cut=[])
    assert list(read(corpus)) == ["d60"]


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_an_export_is_what_the_store_is_built_from(tmp_path, to, capfd):
    rows = crawl(2)
    rows[7]["text"] += " write to jean.dupont@example.org"
    stages = [STAGES[0], {"stage": "language"}, {"stage": "pii"}, *STAGES[1:]]
    corpus = str(make(tmp_path, rows, stages=stages).folder)
    out = str(tmp_path / "out")
    store = str(tmp_path / "store")
    tokenizer = str(tmp_path / "tokenizer")
    train = ["tokenizer", "train", corpus, "--vocab-size", "300", "--out", tokenizer]
    assert main(train) == 0
    build = ["corpus", "build", corpus, "--tokenizer", tokenizer, "--out", store]
    assert main(build) == 0
    export = ["corpus", "export", corpus, "--to", to, "--out", out]
    capfd.readouterr()
    assert main(export) == 0
    printed = capfd.readouterr().out
    paths = sorted(Path(out).glob(f"*.{to}*"))
    assert f"{len(paths)} files" in printed
    if to == "jsonl":
        exported_rows = []
        for path in paths:
            lines = gzip.decompress(path.read_bytes()).splitlines()
            exported_rows += map(json.loads, lines)
        # Flags and time of the header: the same documents are the same bytes at any
        # time.
        assert {path.read_bytes()[3:8] for path in paths} == {bytes(5)}
    else:
        exported_rows = []
        for path in paths:
            exported_rows += pq.read_table(path).to_pylist()
        row_group = pq.ParquetFile(paths[0]).metadata.row_group(0)
        assert row_group.column(0).compression == "ZSTD"
    opened = TokenStore.open(store)
    codec = load_tokenizer(tokenizer)
    texts = [
        codec.decode_bytes(opened.text_tokens(i).tolist())
        for i in range(opened.num_documents)
    ]
    assert [row["text"].encode() for row in exported_rows] == texts
    assert any("<EMAIL>" in row["text"] for row in exported_rows)
    urls = {row["id"]: row["url"] for row in rows}
    assert all(
        row["url"] == urls[row["id"]] and row["language"] for row in exported_rows
    )
    # Of all documents each is counted once, by what became of it.
    counts = json.loads((Path(out) / "export.json").read_text())
    sources = opened.manifest.sources
    assert counts["documents"] == opened.num_documents == len(exported_rows)
    assert counts["dropped"] == sum(source.num_dropped for source in sources) > 20
    assert counts["empty"] == sum(source.num_left_out for source in sources)
    assert counts["documents"] + counts["dropped"] + counts["empty"] == len(rows)
    assert f"{counts['dropped']:,} dropped by rules" in printed
    assert main(export) == 2
    assert "there is an export here; choose another folder" in capfd.readouterr().err
    (tmp_path / ".out.exporting" / "new" / "of a killed export").mkdir(parents=True)
    assert main([*export, "--force"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
