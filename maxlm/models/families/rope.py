"""Rotary positions as config.json has them: rope_theta and rope_scaling, or rope_parameters."""

from math import nextafter
from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.families.reader import ConfigReader
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.rope import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
)

_KINDS = ("default", "linear", "dynamic", "ntk", "yarn", "llama3")


def read_positions(
    reader: ConfigReader, head_dim: int, *, theta: float = 10_000.0, partial: float | None = None
) -> dict[str, Any]:
    """Returns settings of ``PositionsConfig``.

    Args:
        theta: where the file names none.
        partial: the share of dimensions that turn, where the file names none; None: the published
            code turns all, whatever it names.
    """
    own = reader.read_nested("rope_parameters" if reader.has("rope_parameters") else "rope_scaling")
    theta, share = own.number("rope_theta", reader.number("rope_theta", theta)), 1.0
    for source in (reader, own):
        if partial is None:
            source.require("partial_rotary_factor", 1.0, None)
        else:
            share = partial = source.number("partial_rotary_factor", partial)
    scaling = read_scaling(own, reader.get("max_position_embeddings", None))
    size = int(head_dim * share)  # cut off, as in the published code
    found: dict[str, Any] = {"kind": "rope", "theta": theta, "scaling": scaling}
    return found | ({"rotary_dim": size} if size != head_dim else {})


def read_scaling(reader: ConfigReader, max_positions: int | None) -> dict[str, Any] | None:
    """Returns settings of a scaling; None where there is none.

    Args:
        max_positions: what stands for the original length where none is named.

    Raises:
        MaxlmError: a kind that is not implemented, or a value that is no number.
    """
    kind = reader.get("rope_type", "default", also="type")
    if kind not in _KINDS:
        raise MaxlmError(
            f"rope_type={kind!r} is not implemented",
            where=reader.where,
            fix="linear, dynamic, yarn, llama3 and default can be converted",
        )
    if kind == "default":
        reader.get("factor", None)
        return None
    found: dict[str, Any] = {"factor": reader.number("factor", least=1)}
    original = reader.size("original_max_position_embeddings", None) or max_positions
    if kind == "linear":
        found["kind"] = "linear"
    elif kind == "yarn":
        found |= {"kind": "yarn", "original_length": original}
        for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            found |= {} if (value := reader.number(key, None, least=0)) is None else {key: value}
        found |= {"truncate": reader.require("truncate", True, False)}
    elif kind == "llama3":
        found |= {"kind": "llama3", "original_length": original}
        for key in ("low_freq_factor", "high_freq_factor"):
            found[key] = reader.number(key)
    else:
        # There the length is max_position_embeddings, whatever else is written.
        found |= {"kind": "dynamic_ntk", "original_length": max_positions}
    return found


def write_positions(positions: PositionsConfig, head_dim: int) -> dict[str, Any]:
    """The inverse of :func:`read_positions`."""
    found: dict[str, Any] = {"rope_theta": positions.theta}
    if (size := positions.rotary_dim) is not None:
        share = size / head_dim
        # Who reads it cuts the product off, which rounding can leave just below a whole number.
        found["partial_rotary_factor"] = (
            share if int(head_dim * share) == size else nextafter(share, 1)
        )
    scaling = write_scaling(positions)
    return found | ({"rope_scaling": scaling} if scaling else {})


def write_scaling(positions: PositionsConfig) -> dict[str, Any] | None:
    """The inverse of :func:`read_scaling`.

    Raises:
        MaxlmError: a scaling that config.json has no name for.
    """
    scaling: Any = positions.scaling
    if scaling is None:
        return None
    kinds = {
        LinearScaling: "linear",
        DynamicNtkScaling: "dynamic",
        YarnScaling: "yarn",
        Llama3Scaling: "llama3",
    }
    if type(scaling) not in kinds:
        raise MaxlmError(
            f"positions.scaling.kind={scaling.kind} has no name in config.json",
            fix="write it as a larger positions.theta: theta · factor^(d/(d−2))",
        )
    values = scaling.model_dump(exclude={"kind"}, exclude_none=True, exclude_defaults=True)
    if isinstance(scaling, DynamicNtkScaling):
        del values["original_length"]
    elif "original_length" in values:
        values["original_max_position_embeddings"] = values.pop("original_length")
    if isinstance(scaling, Llama3Scaling):  # no defaults there
        values |= scaling.model_dump(include={"low_freq_factor", "high_freq_factor"})
    return {"rope_type": kinds[type(scaling)], **values}
