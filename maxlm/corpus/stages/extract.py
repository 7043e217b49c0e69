"""The text of HTML pages."""

import json
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.corpus.extraction import HtmlExtractorProcess
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels


class ExtractStage(PerDocumentStage):
    """The main text of each document that came as HTML: a new version of its text.

    Documents that came as text have null labels, and keep their text. The work is done
    in a child process of each worker, so that no page can stop or crash a run: see
    `maxlm.corpus.extraction`.

    Labels: `text`; `title`; `date` of publication, as YYYY-MM-DD, from the page's
    metadata; `language_hint`, what the page says its language is; `encoding`; `mode`,
    what found the text (`trafilatura` or `fast`); `status`: `ok`, or why there is no
    text: `empty`, `not_html`, `timeout`, `too_large`, `broken`. Elements that lie more
    than 200 deep in others, mostly since tags are not closed, lose their tags and keep
    their text.
    """

    stage: Literal["extract"] = "extract"
    mode: Literal["quality", "bulk"] = "quality"
    """`quality`: trafilatura, and the fast way where it fails. `bulk`: the fast way,
    resiliparse, for all: about a sixth of the time; more menus stay in."""
    markdown: bool = False
    """Text of trafilatura as Markdown: headings, emphasis, fences around code, and
    backslashes. Without it tables and the lines of code stay as well, and paragraphs
    are one line each."""
    seconds: float = Field(default=10, gt=0)
    """Processor time that one way may take for a page."""
    max_bytes: int = Field(default=1 << 23, gt=0)
    """Longer pages have no text. Trees take some hundred times as much memory."""

    document_columns: ClassVar[tuple[str, ...]] = ("html", "meta")
    label_types: ClassVar[LabelTypes] = {
        **dict.fromkeys(("text", "title", "date"), pa.large_string()),
        **dict.fromkeys(("language_hint", "encoding", "status", "mode"), pa.string()),
    }
    version: ClassVar[int] = 5
    packages: ClassVar[tuple[str, ...]] = ("trafilatura", "lxml", "resiliparse")

    def make_row_label_fn(self) -> RowLabelFn:
        extractor = HtmlExtractorProcess(
            use_trafilatura=self.mode == "quality",
            markdown=self.markdown,
            seconds=self.seconds,
        )

        def label(html: bytes | None, meta: str | None) -> RowLabels:
            if html is None:
                return {}
            if len(html) > self.max_bytes:
                return {"status": "too_large"}
            charset = json.loads(meta or "{}").get("charset")
            return vars(extractor.read(html, charset))  # Its fields are the labels.

        return label
