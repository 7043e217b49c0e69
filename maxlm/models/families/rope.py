"""Rotary positions as config.json has them: rope_theta and rope_scaling, or rope_parameters."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.families.reader import Reader
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.rope import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
)


def read_positions(reader: Reader, head_dim: int, *, theta: float = 10_000.0) -> dict[str, Any]:
    """Settings of ``PositionsConfig``.

    Args:
        theta: where the file names none.
    """
    own = reader.get("rope_parameters", None)
    values = dict(own if own is not None else reader.get("rope_scaling", None) or {})
    given = reader.get("rope_theta", None), values.pop("rope_theta", None)
    theta = next((value for value in reversed(given) if value is not None), theta)
    share = reader.get("partial_rotary_factor", None), values.pop("partial_rotary_factor", None)
    share = next((value for value in reversed(share) if value is not None), 1.0)
    where = f"{reader.where}: {'rope_scaling' if own is None else 'rope_parameters'}"
    scaling = read_scaling(Reader(values, where), reader.get("max_position_embeddings", None))
    size = int(head_dim * share)
    found: dict[str, Any] = {"kind": "rope", "theta": float(theta), "scaling": scaling}
    return found | ({"rotary_dim": size} if size != head_dim else {})


def read_scaling(reader: Reader, max_positions: int | None) -> dict[str, Any] | None:
    """Settings of a scaling; None where there is none.

    Args:
        max_positions: what stands for the original length where none is named.
    """
    kind = reader.either("rope_type", "type", default="default")
    if kind == "default":
        reader.finish("factor")
        return None
    found: dict[str, Any] = {"factor": float(reader.get("factor"))}
    original = reader.get("original_max_position_embeddings", None) or max_positions
    if kind == "linear":
        found["kind"] = "linear"
    elif kind in ("dynamic", "ntk"):
        # There the length is max_position_embeddings, whatever else is written.
        found |= {"kind": "dynamic_ntk", "original_length": max_positions}
    elif kind == "yarn":
        found |= {"kind": "yarn", "original_length": original}
        for key in ("beta_fast", "beta_slow"):
            found |= {key: float(value)} if (value := reader.get(key, None)) else {}
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            found |= {key: float(value)} if (value := reader.get(key, None)) else {}
        found |= {"truncate": bool(reader.get("truncate", True))}
    elif kind == "llama3":
        found |= {"kind": "llama3", "original_length": original}
        for key in ("low_freq_factor", "high_freq_factor"):
            found[key] = float(reader.get(key))
    else:
        raise MaxlmError(
            f"rope_type={kind!r} is not implemented",
            where=reader.where,
            fix="linear, dynamic, yarn, llama3 and default can be converted",
        )
    reader.finish()
    return found


def write_positions(positions: PositionsConfig, head_dim: int) -> dict[str, Any]:
    """The inverse of :func:`read_positions`."""
    found: dict[str, Any] = {"rope_theta": positions.theta}
    if positions.rotary_dim is not None:
        found["partial_rotary_factor"] = positions.rotary_dim / head_dim
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
