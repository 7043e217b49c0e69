"""The tokens that a model is calibrated on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.data.store.store import TokenStore
from maxlm.data.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class CalibrationSettings:
    """How much of a text calibrates a model."""

    source: str
    """A file or folder of text, JSONL or Parquet, or a token store."""
    num_rows: int = 128
    row_tokens: int = 512
    batch_rows: int = 8
    """Rows that a layer computes at once."""


def read_calibration_rows(
    settings: CalibrationSettings, tokenizer: Tokenizer, max_row_tokens: int
) -> np.ndarray:
    """Reads tokens int32 [rows, tokens]: documents one after the other, each as a store
    has it, with what the tokenizer puts before and behind. A shorter text gives fewer
    rows.

    Raises:
        MaxlmError: there is no such text, or it fills no row.
    """
    row_tokens = min(settings.row_tokens, max_row_tokens)
    max_tokens = settings.num_rows * row_tokens
    path = Path(settings.source)
    if (path / "manifest.json").exists():
        tokens = _read_store(path, max_tokens)
    else:
        tokens = _read_text(settings.source, tokenizer, max_tokens)
    num_rows = min(len(tokens) // row_tokens, settings.num_rows)
    if not num_rows:
        message = f"a text of {len(tokens):,} tokens, and a row has {row_tokens:,}"
        fix = "calibrate on more text, or set --calibration-length"
        raise MaxlmError(message, where=settings.source, fix=fix)
    return tokens[: num_rows * row_tokens].reshape(num_rows, row_tokens)


def _read_text(source: str, tokenizer: Tokenizer, max_tokens: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    num_tokens = 0
    for document in read_documents(SourceConfig(documents=(source,))):
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(document.text)]
        tokens = np.asarray([*ids, tokenizer.eos_id], np.int32)
        parts.append(tokens)
        num_tokens += len(tokens)
        if num_tokens >= max_tokens:
            break
    if not parts:
        return np.zeros(0, np.int32)
    return np.concatenate(parts)


def _read_store(path: Path, max_tokens: int) -> np.ndarray:
    store = TokenStore.open(path)
    return np.asarray(store.read(0, min(max_tokens, store.num_tokens)), np.int32)
