"""The text of HTML pages."""

import json
from collections.abc import Iterator
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from maxlm.corpus.extraction import Extractor
from maxlm.corpus.pages import Page
from maxlm.corpus.stage import Label, LabelStage

_GROUP_BYTES = 1 << 20


class ExtractStage(LabelStage):
    """The main text of each document that came as HTML: a new version of its text.

    Documents that came as text have null labels, and keep their text. The work is done in a child
    process of each worker, so that no page can stop or crash a run: see
    `maxlm.corpus.extraction`.

    Labels: `text`; `title`; `date` of publication, as YYYY-MM-DD, from the page's metadata;
    `language_hint`, what the page says its language is; `encoding`; `mode`, what found the text
    (`trafilatura` or `fast`); `status`: `ok`, or why there is no text: `empty`, `not_html`,
    `timeout`, `too_large`, `too_deep`, `broken`. Pages of over 256 elements inside each other are
    read the fast way, and those of over 3000 are `too_deep`.
    """

    stage: Literal["extract"] = "extract"
    mode: Literal["quality", "bulk"] = "quality"
    """`quality`: trafilatura, and the fast way where it fails. `bulk`: the fast way, resiliparse,
    for all: about a sixth of the time; more menus stay in."""
    markdown: bool = False
    """Text of trafilatura as Markdown: headings, emphasis, fences around code, and backslashes.
    Without it tables and the lines of code stay as well, and paragraphs are one line each."""
    seconds: float = Field(default=10, gt=0)
    """Processor time that one way may take for a page."""
    max_bytes: int = Field(default=1 << 23, gt=0)
    """Longer pages have no text. Trees take some hundred times as much memory."""

    version: ClassVar[int] = 3

    @property
    def reads(self) -> tuple[str, ...]:
        return ("html", "meta")

    def schema(self) -> pa.Schema:
        # Strings that are no categories are large: they are not counted by value.
        return pa.schema(
            [
                ("text", pa.large_string()),
                ("title", pa.large_string()),
                ("date", pa.large_string()),
                ("language_hint", pa.string()),
                ("encoding", pa.string()),
                ("status", pa.string()),
                ("mode", pa.string()),
            ]
        )

    def packages(self) -> tuple[str, ...]:
        return (
            ("trafilatura", "lxml", "resiliparse") if self.mode == "quality" else ("resiliparse",)
        )

    def open(self) -> Label:
        extractor = Extractor(self.mode == "quality", self.markdown, self.seconds)
        schema = self.schema()

        def label(batch: pa.RecordBatch) -> pa.RecordBatch:
            html, meta = batch.columns
            pages: list[Page | None] = [None] * batch.num_rows
            for rows in _groups(html, self.max_bytes, pages):
                charsets = [json.loads(meta[row].as_py() or "{}").get("charset") for row in rows]
                data = [html[row].as_py() for row in rows]
                found = extractor.read(list(zip(data, charsets, strict=True)))
                for row, page in zip(rows, found, strict=True):
                    pages[row] = page
            columns = [[page and getattr(page, name) for page in pages] for name in schema.names]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            return pa.RecordBatch.from_arrays(arrays, schema=schema)

        return label


def _lengths(html: pa.Array) -> list[int | None]:
    return pc.call_function("binary_length", [html]).to_pylist()


def _groups(html: pa.Array, max_bytes: int, pages: list[Page | None]) -> Iterator[list[int]]:
    """Rows with HTML to be read together; pages that are too large are marked in `pages`."""
    rows, size = [], 0
    for row, length in enumerate(_lengths(html)):
        if length is None:
            continue
        if length > max_bytes:
            pages[row] = Page("too_large")
            continue
        rows.append(row)
        size += length
        if size >= _GROUP_BYTES:
            yield rows
            rows, size = [], 0
    yield rows
