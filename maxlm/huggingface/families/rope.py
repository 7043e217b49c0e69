"""Rotary positions as config.json has them: rope_theta and rope_scaling, or
rope_parameters."""

from math import nextafter
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.layers.positions import PositionsConfig

_SCALINGS = {
    "linear": "linear",
    "dynamic": "dynamic_ntk",
    "ntk": "dynamic_ntk",
    "yarn": "yarn",
    "llama3": "llama3",
}
"""Our kinds, by theirs; the first of several is written."""


def read_position_settings(
    reader: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    partial: float | None = None,
    rope_reader: ConfigReader | None = None,
) -> dict[str, Any]:
    """Returns settings of ``PositionsConfig``.

    Args:
        theta: where the file names none.
        partial: the share of dimensions that turn, where the file names none; None: the
            published code turns all, whatever it names.
        rope_reader: the nested mapping, where it has another place than usual.
    """
    usual = "rope_parameters" if reader.has("rope_parameters") else "rope_scaling"
    rope_reader = rope_reader or reader.read_nested(usual)
    theta = rope_reader.number("rope_theta", reader.number("rope_theta", theta))
    share = 1.0
    for source in (reader, rope_reader):
        if partial is None:
            source.read_implemented("partial_rotary_factor", 1.0, None)
        else:
            share = partial = source.number("partial_rotary_factor", partial, most=1)
    scaling = read_scaling(rope_reader, reader.size("max_position_embeddings", None))
    size = int(head_dim * share)  # cut off, as in the published code
    settings: dict[str, Any] = {"kind": "rope", "theta": theta, "scaling": scaling}
    if size != head_dim:
        settings["rotary_dim"] = size
    return settings


def read_scaling(
    reader: ConfigReader, max_positions: int | None
) -> dict[str, Any] | None:
    """Returns settings of a scaling, None where there is none; ``max_positions`` stand
    for the original length where none is named."""
    kind = reader.text("rope_type", "default", alias="type")
    if kind != "default" and kind not in _SCALINGS:
        fix = "linear, dynamic, yarn, llama3 and default can be converted"
        raise MaxlmError(
            f"rope_type={kind!r} is not implemented", where=reader.where, fix=fix
        )
    if kind == "default":
        reader.ignore("factor")
        return None
    settings: dict[str, Any] = {
        "kind": _SCALINGS[kind],
        "factor": reader.number("factor", least=1),
    }
    original = reader.size("original_max_position_embeddings", None) or max_positions
    if kind in ("yarn", "llama3"):
        settings["original_length"] = original
    elif kind != "linear":
        # There the length is max_position_embeddings, whatever else is written.
        settings["original_length"] = max_positions
    if kind == "yarn":
        for key in (
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ):
            value = reader.number(key, None, least=0)
            if value is not None:
                settings[key] = value
        settings["truncate"] = reader.read_implemented("truncate", True, False)
    elif kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            settings[key] = reader.number(key)
    return settings


def write_position_settings(
    positions: PositionsConfig, head_dim: int
) -> dict[str, Any]:
    """Writes what :func:`read_position_settings` reads."""
    values: dict[str, Any] = {"rope_theta": positions.theta}
    size = positions.rotary_dim
    if size is not None:
        share = size / head_dim
        # Who reads it cuts the product off, which rounding can leave just below a whole
        # number.
        exact = int(head_dim * share) == size
        values["partial_rotary_factor"] = share if exact else nextafter(share, 1)
    scaling = write_scaling(positions)
    if scaling:
        values["rope_scaling"] = scaling
    return values


def write_scaling(positions: PositionsConfig) -> dict[str, Any] | None:
    """Writes what :func:`read_scaling` reads."""
    scaling = positions.scaling
    if scaling is None:
        return None
    kind = next(
        (theirs for theirs, ours in _SCALINGS.items() if ours == scaling.kind), None
    )
    if kind is None:
        message = f"positions.scaling.kind={scaling.kind} has no name in config.json"
        raise MaxlmError(
            message,
            fix="write it as a larger positions.theta: theta · factor^(d/(d−2))",
        )
    values = scaling.model_dump(
        exclude={"kind"}, exclude_none=True, exclude_defaults=True
    )
    if kind == "dynamic":
        del values["original_length"]
    elif "original_length" in values:
        values["original_max_position_embeddings"] = values.pop("original_length")
    if kind == "llama3":  # no defaults there
        values |= scaling.model_dump(include={"low_freq_factor", "high_freq_factor"})
    return {"rope_type": kind, **values}
