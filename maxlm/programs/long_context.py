"""``maxlm eval positions`` and ``maxlm eval passkey``: what a model makes of long contexts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import Tokenizer
from maxlm.evaluation.curves import compute_position_losses
from maxlm.evaluation.passkey import evaluate_passkey
from maxlm.inference.engine import Engine
from maxlm.inference.scoring import Scorer
from maxlm.programs.serve import load_chat_model, make_engine
from maxlm.runtime.progress import show_progress

ENGINE_TOKENS = 32_768
"""Tokens that sequences of an engine hold together, or one of them that is longer."""


def evaluate_position_losses(
    model: str,
    text: Path,
    *,
    length: int | None,
    num_windows: int,
    step: int | None = None,
    mesh: str | None = None,
) -> dict[int, float]:
    """Computes a model's mean loss by position (``compute_position_losses``) over windows of a text
    file of ``length`` tokens, by default its ``max_seq_len``."""
    engine = _load_engine(model, length, step, mesh)
    assert engine.tokenizer is not None
    windows = cut_windows(engine.tokenizer, text, engine.config.max_length, num_windows)
    with show_progress("windows") as progress:
        count = len(windows)
        on_progress = lambda done: progress(model, done, count)  # noqa: E731
        return compute_position_losses(Scorer(engine), windows, on_progress)


def cut_windows(tokenizer: Tokenizer, text: Path, length: int, count: int) -> list[list[int]]:
    """Returns up to ``count`` windows of a text file, each of ``length`` tokens with those that
    documents open with, evenly spread."""
    ids, prefix = tokenizer.encode(text.read_bytes()), tokenizer.prefix_ids
    room = length - len(prefix)
    if room < 2 or len(ids) < room:
        what = f"{len(ids):,} tokens give no window of {length:,}"
        raise MaxlmError(what, where=str(text), fix="use a longer text, or another --length")
    fitting = len(ids) // room
    count = min(count, fitting)
    starts = [i * fitting // count * room for i in range(count)]
    return [[*prefix, *ids[start : start + room]] for start in starts]


def evaluate_passkeys(
    model: str,
    lengths: Sequence[int],
    *options: Any,
    seed: int,
    step: int | None = None,
    mesh: str | None = None,
) -> list[list[float]]:
    """Evaluates a model by ``evaluate_passkey``."""
    engine = _load_engine(model, max(lengths), step, mesh)
    with show_progress("answers") as progress:
        on_progress = partial(progress, model)
        return evaluate_passkey(engine, lengths, *options, seed=seed, on_progress=on_progress)


def _load_engine(model: str, length: int | None, step: int | None, mesh: str | None) -> Engine:
    loaded = load_chat_model(model, step=step, mesh=mesh, template=None)
    length = length or loaded.config.model.max_seq_len
    sizes = [f"max_length={length}", f"max_sequences={max(1, min(16, ENGINE_TOKENS // length))}"]
    return make_engine(loaded, sizes, warm_up=False)
