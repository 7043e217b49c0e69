"""Batches from rows of dictionaries: prompts with answers, chosen and rejected ones, messages."""

from maxlm.data.rows.files import RowFile, open_rows
from maxlm.data.rows.source import RowSource, make_row_source

__all__ = ["RowFile", "RowSource", "make_row_source", "open_rows"]
