"""Reports on a corpus: its figures, those of its rules, and examples, as numbers and as a page."""

from maxlm.corpus.report.page import write_report
from maxlm.corpus.report.summary import Summary, summarize

__all__ = ["Summary", "summarize", "write_report"]
