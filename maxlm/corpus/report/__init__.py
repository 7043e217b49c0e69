"""What a corpus is, what its rules take from it, and examples of both: numbers, then a page."""

from maxlm.corpus.report.lost import LostText, count_lost
from maxlm.corpus.report.page import write_report
from maxlm.corpus.report.summary import Summary, summarize

__all__ = ["LostText", "Summary", "count_lost", "summarize", "write_report"]
