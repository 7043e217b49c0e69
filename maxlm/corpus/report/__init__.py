"""Reports on a corpus: its figures, those of its rules, and examples, as numbers and as a page."""

from maxlm.corpus.report.page import write_report
from maxlm.corpus.report.summary import CorpusSummary, summarize_corpus

__all__ = ["CorpusSummary", "summarize_corpus", "write_report"]
