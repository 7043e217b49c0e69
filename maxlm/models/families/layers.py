"""Lists of layers' kinds, as config.json has them, and patterns, as ours do."""

from collections.abc import Mapping, Sequence
from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.reader import ConfigReader

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read_pattern(
    reader: ConfigReader, usual: Sequence[str], meaning: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Returns the shortest pattern that gives ``layer_types``, as settings of a decoder; none where
    all layers are as the model says.

    Args:
        usual: each layer's kind where there is no such list.
        meaning: of each kind, settings of ``LayerKind``.

    Raises:
        MaxlmError: a kind that is not implemented, or a list that is not one of all layers.
    """
    kinds = reader.get("layer_types", None) or usual
    if not isinstance(kinds, Sequence) or len(kinds) != len(usual):
        raise MaxlmError(
            f"layer_types does not name the kinds of {len(usual)} layers",
            where=reader.where,
            fix="take it from the published model",
        )
    for kind in kinds:
        if kind not in [*meaning]:
            raise MaxlmError(
                f"layer_types has {kind!r}, which is not implemented",
                where=reader.where,
                fix=f"only {' and '.join(meaning)} can be converted",
            )
    period = next(
        n
        for n in range(1, len(kinds) + 1)
        if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))
    )
    pattern = [meaning[kind] for kind in kinds[:period]]
    return {"pattern": pattern} if any(pattern) else {}


def write_pattern(config: DecoderConfig) -> tuple[list[str], int | None]:
    """Returns the kind of each layer by its window, and the window (None: no layer has one)."""
    kinds = [config.kinds[layer % len(config.kinds)] for layer in range(config.num_layers)]
    windows = [kind.window for kind in kinds]
    window = next((window for window in windows if window is not None), None)
    return [GLOBAL if window is None else LOCAL for window in windows], window
