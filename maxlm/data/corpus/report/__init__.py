"""What a corpus is, what its rules take from it, and examples of both: numbers, then a page."""

from maxlm.data.corpus.report.page import write_report
from maxlm.data.corpus.report.summary import Summary, summarize

__all__ = ["Summary", "summarize", "write_report"]
