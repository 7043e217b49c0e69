"""Lists of layers' kinds, as config.json has them, and patterns, as ours do."""

from collections.abc import Mapping, Sequence
from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read_pattern(kinds: Sequence[str], meaning: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The shortest pattern that gives a list of kinds, as settings of a decoder; none where all
    layers are as the model says.

    Args:
        meaning: of each kind, settings of ``LayerKind``.
    """
    period = next(
        n
        for n in range(1, len(kinds) + 1)
        if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))
    )
    pattern = [meaning[kind] for kind in kinds[:period]]
    return {"pattern": pattern} if any(pattern) else {}


def write_pattern(config: DecoderConfig) -> tuple[list[str], int | None]:
    """The kind of each layer by its window, and the window (None: no layer has one)."""
    kinds = [config.kinds[layer % len(config.kinds)] for layer in range(config.num_layers)]
    windows = [kind.window for kind in kinds]
    window = next((window for window in windows if window is not None), None)
    return [GLOBAL if window is None else LOCAL for window in windows], window
