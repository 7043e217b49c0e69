"""Reports on a corpus: its figures, those of its rules, and examples, as numbers and as a page."""

from maxlm.corpus.report.lost import LostText, estimate_lost_text
from maxlm.corpus.report.page import write_report
from maxlm.corpus.report.summary import Summary, summarize

__all__ = ["LostText", "Summary", "estimate_lost_text", "summarize", "write_report"]
