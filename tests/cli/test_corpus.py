"""``maxlm corpus``: from raw lines over labels to a token store, through the real entry
point."""

import json

import pytest

RECIPE = """
out: {out}
workers: 1
sources:
  - {{name: web, documents: ["{documents}"]}}
stages:
  - stage: language
  - stage: heuristics
  - stage: exact
keep:
  english: language.name == "en"
  long: heuristics.words >= 20
  unique: not exact.duplicate
"""
ENGLISH = "The river runs through the old town, and in the evening people walk along its banks. "
FRENCH = "La rivière traverse la vieille ville, et le soir les gens se promènent sur ses rives. "


@pytest.fixture
def recipe(tmp_path):
    texts = [ENGLISH * 3 + f"Number {i}." for i in range(8)] + [
        FRENCH * 4,
        "Too short.",
        ENGLISH,
    ]
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate([*texts, texts[2]])]
    documents = tmp_path / "raw.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "corpus", documents=documents))
    return path


def test_from_raw_lines_to_a_store(recipe, tmp_path, run):
    corpus, store, tokenizer = (
        str(tmp_path / name) for name in ("corpus", "store", "tokenizer")
    )
    code, out, err = run("corpus", "run", recipe)
    assert code == 0
    assert "language: 1 of 1 parts" in err
    assert [name in out for name in ("all documents", "english", "long", "unique")] == [
        True
    ] * 4
    lost = "text lost: 0 (of 1 documents dropped as copies and 0 passages cut)"
    assert lost in out
    page = tmp_path / "page.html"
    code, out, _ = run("corpus", "report", corpus, "--out", page)
    assert (code, lost in out) == (0, True)
    assert "broken 1" in page.read_text()
    assert lost in page.read_text()
    train = run("tokenizer", "train", corpus, "--vocab-size", "300", "--out", tokenizer)
    assert train.code == 0
    build = ["corpus", "build", corpus, "--tokenizer", tokenizer, "--out", store]
    code, out, _ = run(*build)
    assert (code, lost in out) == (0, True)
    assert json.loads(run("corpus", "info", store, "--json").out)["num_documents"] == 8
    assert run("corpus", "show", store, "3").out == ENGLISH * 3 + "Number 3."
    # The same store is found again, one of other rules is another store.
    assert run(*build).code == 0
    assert run("corpus", "run", recipe, "keep.long=heuristics.words >= 10").code == 0
    code, _, err = run(*build)
    assert (code, "the rules" in err) == (2, True)
    assert run(*build, "--force").code == 0
    assert json.loads(run("corpus", "info", store, "--json").out)["num_documents"] == 9


def test_a_document_is_shown_with_its_labels_and_a_rule_can_be_tried(
    recipe, tmp_path, run
):
    corpus = tmp_path / "corpus"
    assert run("corpus", "run", recipe).code == 0
    _, out, err = run("corpus", "show", corpus, "d11")
    assert out == ENGLISH * 3 + "Number 2."
    lines = err.splitlines()
    assert {"exact.of: d2", "rule unique: dropped", "rule long: kept"} <= {*lines}
    assert "no document 'd99'" in run("corpus", "show", corpus, "d99").err
    report = ["corpus", "report", corpus, "--keep"]
    code, out, _ = run(*report, "long=heuristics.words > 1000")
    assert (code, "long" in out) == (0, True)
    for rule, words in (
        ("long=heuristics.wrods > 10", "did you mean heuristics.words"),
        ("heuristics.words > 10", "has no name"),
    ):
        code, _, err = run(*report, rule)
        assert (code, words in err) == (2, True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("keep.long=heuristics.wrods > 3", "did you mean heuristics.words"),
        ("stages.0.stage=langage", "stages.0"),
        ("sources.0.documents=[/nowhere]", "/nowhere"),
        ("stages.1.name=exact", "two stages are called exact"),
    ],
)
def test_mistakes_end_in_one_line(recipe, tmp_path, check_refused, setting, message):
    check_refused(tmp_path, ["corpus", "run", str(recipe), setting], f"...{message}...")


@pytest.mark.parametrize(
    "arguments",
    [("run", "recipe.yaml"), ("report", "corpus"), ("show", "corpus", "d1")],
)
def test_without_the_packages(recipe, tmp_path, check_refused, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "documents").mkdir(parents=True)
    (tmp_path / "corpus" / "corpus.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f"{arguments[1]}: a corpus needs pyarrow, which is not installed; "
    check_refused(
        tmp_path, ["corpus", *arguments], f"{message}pip install 'maxlm[corpus]'"
    )


def test_a_perplexity_model_is_trained_and_calibrated(tmp_path, run, check_refused):
    words = ENGLISH.lower().replace(",", "").replace(".", "").split()
    texts = [
        " ".join(words[i % 7 :] + words[: i % 11]) + f" w{i % 5}" for i in range(60)
    ]
    text = tmp_path / "prose.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    model = tmp_path / "en"
    fallback = [
        "--set",
        "ngrams.discount_fallback=[0.5,1,1.5]",
        "--set",
        "ngrams.order=3",
    ]
    train = ["corpus", "train-perplexity", text, "--out", model, *fallback]
    code, out, _ = run(*train, "--set", "hold_out=2")
    assert code == 0
    assert out.startswith("30 documents, ")
    assert "perplexities of 30 reference documents: 5%: " in out
    before = json.loads((model / "cutoffs.json").read_text())
    sample = ["--reference", text]
    calibrate = ["corpus", "calibrate-perplexity"]
    assert "of 60 reference" in run(*calibrate, model, *sample).out
    after = json.loads((model / "cutoffs.json").read_text())
    assert (after["reference_documents"], after["model_sha256"]) == (
        60,
        before["model_sha256"],
    )
    percentiles = ["--set", "percentiles=[0,100]"]
    out = run(
        *calibrate, model / "model.arpa", *sample, *percentiles, "--out", tmp_path / "b"
    ).out
    low, high = json.loads((tmp_path / "b" / "cutoffs.json").read_text())["cutoffs"]
    assert low < after["cutoffs"][0] < after["cutoffs"][1] < high
    assert (
        f"head up to {low:,.1f}, tail beyond {high:,.1f}\nthe model: {tmp_path / 'b'}\n"
        in out
    )
    arpa = str(model / "model.arpa")
    message = f"{arpa}: this is no model's folder; name a folder ... with --out"
    check_refused(model, [*calibrate, arpa, *map(str, sample)], message)
