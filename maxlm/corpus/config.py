"""The sources of a corpus recipe."""

from typing import ClassVar, Literal

from pydantic import Field

from maxlm.data.documents.config import FilesConfig


class CrawlSource(FilesConfig):
    """Files of raw documents."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The source that its documents are said to come from: web, code, books, ..."""
    url_field: str = "url"
    """The JSON key or Parquet column of a document's address, if there is one."""
    on_bad_bytes: Literal["replace", "skip"] = "replace"
    """What to do with text that is not valid UTF-8: put U+FFFD for each bad sequence, or leave out
    the whole document. HTML has encodings of its own, which extraction detects."""
    max_document_bytes: int = Field(default=64 << 20, gt=0)
    """Longer documents are skipped and counted, compressed ones by their decompressed size."""

    reads_html: ClassVar[bool] = True
