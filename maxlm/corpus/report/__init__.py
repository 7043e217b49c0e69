"""Reports on a corpus: its figures, those of its rules, and examples, as numbers and as a page."""

from maxlm.corpus.report.lost import LostText, count_lost
from maxlm.corpus.report.page import write_report
from maxlm.corpus.report.summary import Summary, summarize

__all__ = ["LostText", "Summary", "count_lost", "summarize", "write_report"]
