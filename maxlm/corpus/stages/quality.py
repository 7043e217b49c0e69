"""How much a text is like the good examples of a trained classifier."""

import hashlib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from maxlm.config import MaxlmError
from maxlm.corpus.classifier import TRAIN, load_classifier
from maxlm.corpus.stage import Label, LabelStage


class QualityStage(LabelStage):
    """The probability that a text is one of the positive examples a classifier was trained on
    (`maxlm.corpus.classifier`; the idea is GPT-3's, arXiv 2005.14165, appendix A).

    `score` is calibrated to the share of positive ones among the examples. Where that is another
    than in the corpus, its order stays right and its height does not. Null without any words.
    """

    stage: Literal["quality"] = "quality"

    model: Path
    """The classifier's file, as `maxlm corpus train-quality` writes it."""

    version: ClassVar[int] = 2

    def schema(self) -> pa.Schema:
        return pa.schema([("score", pa.float32())])

    def key(self) -> str:
        """Also of the model's content."""
        try:
            content = hashlib.sha256(self.model.read_bytes()).hexdigest()
        except OSError as error:
            what = f"cannot read the classifier {self.model}: {error.strerror}"
            raise MaxlmError(what, where=self.title, fix=f"train one: {TRAIN}") from error
        return hashlib.sha256(f"{super().key()} {content}".encode()).hexdigest()

    def open(self) -> Label:
        model = load_classifier(self.model, self.title)

        def label(batch: pa.RecordBatch) -> pa.RecordBatch:
            scores = model.predict(batch.column("text").to_pylist()).astype(np.float32)
            column = pa.array(scores, mask=np.isnan(scores))
            return pa.RecordBatch.from_arrays([column], schema=self.schema())

        return label

    def packages(self) -> tuple[str, ...]:
        return ("scikit-learn", "safetensors")
