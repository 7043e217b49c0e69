"""``maxlm corpus``: from raw lines over labels to a token store, through the real entry point."""

import json

import pytest

from maxlm.cli.main import main

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
    texts = [ENGLISH * 3 + f"Number {i}." for i in range(8)] + [FRENCH * 4, "Too short.", ENGLISH]
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate([*texts, texts[2]])]
    documents = tmp_path / "raw.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "corpus", documents=documents))
    return path


def test_from_raw_lines_to_a_store(recipe, tmp_path, capfd):
    corpus, store, tokenizer = (str(tmp_path / name) for name in ("corpus", "store", "tokenizer"))
    assert main(["corpus", "run", str(recipe)]) == 0
    shown = capfd.readouterr()
    assert "language: 1 of 1 parts" in shown.err
    for line in ("all documents", "english", "long", "unique"):
        assert line in shown.out
    page = tmp_path / "page.html"
    assert main(["corpus", "report", corpus, "--out", str(page)]) == 0
    assert "broken 1" in page.read_text()
    assert main(["tokenizer", "train", corpus, "--vocab-size", "300", "--out", tokenizer]) == 0
    assert main(["corpus", "build", corpus, "--tokenizer", tokenizer, "--out", store]) == 0
    capfd.readouterr()
    assert main(["corpus", "info", store, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_documents"] == 8
    assert main(["corpus", "show", store, "3"]) == 0
    assert capfd.readouterr().out == ENGLISH * 3 + "Number 3."
    # The same store is found again, one of other rules is another store.
    build = ["corpus", "build", corpus, "--tokenizer", tokenizer, "--out", store]
    assert main(build) == 0
    assert main(["corpus", "run", str(recipe), "keep.long=heuristics.words >= 10"]) == 0
    assert main(build) == 2
    assert "the rules" in capfd.readouterr().err
    assert main([*build, "--force"]) == 0
    capfd.readouterr()
    assert main(["corpus", "info", store, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_documents"] == 9


def test_a_document_is_shown_with_its_labels(recipe, tmp_path, capfd):
    assert main(["corpus", "run", str(recipe)]) == 0
    capfd.readouterr()
    assert main(["corpus", "show", str(tmp_path / "corpus"), "d11"]) == 0
    shown = capfd.readouterr()
    assert shown.out == ENGLISH * 3 + "Number 2."
    assert "exact.of: d2\n" in shown.err
    assert "rule unique: dropped\n" in shown.err
    assert "rule long: kept\n" in shown.err
    assert main(["corpus", "show", str(tmp_path / "corpus"), "d99"]) == 2
    assert "no document 'd99'" in capfd.readouterr().err


def test_a_rule_can_be_tried(recipe, tmp_path, capfd):
    assert main(["corpus", "run", str(recipe)]) == 0
    corpus = str(tmp_path / "corpus")
    capfd.readouterr()
    assert main(["corpus", "report", corpus, "--keep", "long=heuristics.words > 1000"]) == 0
    assert "long" in capfd.readouterr().out
    assert main(["corpus", "report", corpus, "--keep", "long=heuristics.wrods > 10"]) == 2
    assert "did you mean heuristics.words" in capfd.readouterr().err
    assert main(["corpus", "report", corpus, "--keep", "heuristics.words > 10"]) == 2
    assert "has no name" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("keep.long=heuristics.wrods > 3", "did you mean heuristics.words"),
        ("stages.0.stage=langage", "stages.0"),
        ("engine=spark", "engine"),
        ("sources.0.documents=[/nowhere]", "/nowhere"),
        ("stages.1.name=exact", "two stages are called exact"),
    ],
)
def test_mistakes_end_in_one_line(recipe, tmp_path, capfd, setting, message):
    assert main(["corpus", "run", str(recipe), setting]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "corpus").exists()


def test_a_folder_without_a_corpus(tmp_path, capfd):
    assert main(["corpus", "report", str(tmp_path)]) == 2
    assert "there is no corpus here" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("run", "recipe.yaml"), ("report", "corpus"), ("show", "corpus", "d1")]
)
def test_without_the_packages(recipe, tmp_path, capfd, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "documents").mkdir(parents=True)
    (tmp_path / "corpus" / "corpus.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["corpus", *arguments]) == 2
    error = capfd.readouterr().err
    assert error == (
        f"error: {arguments[1]}: a corpus needs pyarrow, which is not installed; "
        "pip install 'maxlm[corpus]'\n"
    )
