"""A stage of the corpus pipeline as an external package writes it: the share of a
document's characters that are digits."""

import json
from typing import ClassVar, Literal

import pyarrow as pa
import pytest
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.config.keys import COMMAND_LINE
from maxlm.config.layers import SettingsTree
from maxlm.config.load import validate_config
from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.recipe import RecipeConfig
from maxlm.corpus.run import run_recipe
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels
from maxlm.corpus.stages import STAGES
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents


@STAGES.register("digits")
class DigitsStage(PerDocumentStage):
    """Label: `share`, of the characters, null of an empty document; digits below
    `smallest` count as none."""

    stage: Literal["digits"] = "digits"
    smallest: int = Field(default=0, ge=0, le=9)

    label_types: ClassVar[LabelTypes] = {"share": pa.float64()}

    def make_row_label_fn(self) -> RowLabelFn:
        digits = frozenset("0123456789"[self.smallest :])

        def label(text: str) -> RowLabels:
            if not text:
                return {}
            return {"share": sum(letter in digits for letter in text) / len(text)}

        return label


TEXTS = ["1984", "no number", "in 2024: 7 of 9", "0000 is nothing", "a1"]


def make_recipe(folder, **digits) -> RecipeConfig:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "text.jsonl").write_text("\n".join(lines))
    settings = {
        "sources": [{"name": "text", "documents": [str(folder / "text.jsonl")]}],
        "out": str(folder / "corpus"),
        "stages": [{"stage": "digits", **digits}],
        "keep": {"few_digits": "digits.share < 0.4"},
        # One worker is this process, which knows the stage.
        "workers": 1,
    }
    return validate_config(RecipeConfig, SettingsTree(settings, {(): COMMAND_LINE}))


def test_its_labels_select_documents(tmp_path):
    corpus = run_recipe(make_recipe(tmp_path, smallest=1))
    assert OpenCorpus.open(corpus).labels["digits.share"] == pa.float64()
    source = SourceConfig(documents=(str(corpus),))
    texts = [document.text.decode() for document in read_documents(source)]
    # "1984" and "a1" have 4 of 4 and 1 of 2; zeros count as none.
    assert texts == ["no number", "in 2024: 7 of 9", "0000 is nothing"]


def test_unknown_stages_and_settings_are_refused(tmp_path):
    with pytest.raises(MaxlmError, match=r"smallest"):
        make_recipe(tmp_path, smallest=10)
    with pytest.raises(MaxlmError, match=r"stages.0.stage must be .*'digits'"):
        make_recipe(tmp_path, stage="digit")
