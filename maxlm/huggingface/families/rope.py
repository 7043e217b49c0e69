"""Rotary positions as config.json has them: rope_theta and rope_scaling, or
rope_parameters."""

from collections.abc import Mapping
from math import nextafter
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.positions import PositionsConfig

_SCALINGS = {
    "linear": "linear",
    "dynamic": "dynamic_ntk",
    "ntk": "dynamic_ntk",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}
"""Our kinds, by theirs; the first of several is written."""
_NO_NAME: Mapping[str, str] = {
    "ntk": "write it as a larger positions.theta: theta · factor^(d/(d−2))",
    "proportional": "convert a model of a family that has it",
}
"""What to do about kinds that have no name there."""


def read_position_settings(
    reader: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    partial: float | None = None,
    rope_reader: ConfigReader | None = None,
    original_positions: int | None = None,
) -> dict[str, Any]:
    """Returns settings of ``PositionsConfig``.

    Args:
        theta: where the file names none.
        partial: the share of dimensions that turn, where the file names none; None: the
            published code turns all, whatever it names.
        rope_reader: the nested mapping, where it has another place than usual.
        original_positions: see :func:`read_scaling`.
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
    scaling = read_scaling(
        rope_reader,
        reader.size("max_position_embeddings", None),
        original_positions,
    )
    size = int(head_dim * share)  # cut off, as in the published code
    settings: dict[str, Any] = {"kind": "rope", "theta": theta, "scaling": scaling}
    if size != head_dim:
        settings["rotary_dim"] = size
    return settings


def read_scaling(
    reader: ConfigReader,
    max_positions: int | None,
    original_positions: int | None = None,
) -> dict[str, Any] | None:
    """Returns settings of a scaling, None where there is none.

    Args:
        max_positions: stand for the original length where none is named.
        original_positions: the original length, where it is named elsewhere, which then
            counts before what is named here.
    """
    kind = reader.text("rope_type", "default", alias="type")
    if kind != "default" and kind not in _SCALINGS:
        fix = "linear, dynamic, yarn, llama3, longrope and default can be converted"
        raise MaxlmError(
            f"rope_type={kind!r} is not implemented", where=reader.where, fix=fix
        )
    if kind == "default":
        reader.ignore("factor")
        return None
    within = reader.size("original_max_position_embeddings", None)
    original = original_positions or within or max_positions
    if _SCALINGS[kind] == "longrope":
        return _read_longrope(reader, original, max_positions)
    settings: dict[str, Any] = {
        "kind": _SCALINGS[kind],
        "factor": reader.number("factor", least=1),
    }
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


def _read_longrope(
    reader: ConfigReader, original: int | None, max_positions: int | None
) -> dict[str, Any]:
    """Returns settings of LongRoPE, whose factor is by default the ratio of lengths."""
    ratio = None
    if original and max_positions:
        ratio = max(1.0, max_positions / original)
    settings = {
        "kind": "longrope",
        "factor": reader.number("factor", ratio, least=1),
        "original_length": original,
        "short_factors": reader.numbers("short_factor"),
        "long_factors": reader.numbers("long_factor"),
    }
    attention_factor = reader.number("attention_factor", None)
    if attention_factor is not None:
        settings["attention_factor"] = attention_factor
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
        raise MaxlmError(message, fix=_NO_NAME[scaling.kind])
    values = scaling.model_dump(
        exclude={"kind"}, exclude_none=True, exclude_defaults=True
    )
    if kind == "dynamic":
        del values["original_length"]
    elif "original_length" in values:
        values["original_max_position_embeddings"] = values.pop("original_length")
    if kind == "longrope":
        values["short_factor"] = list(values.pop("short_factors"))
        values["long_factor"] = list(values.pop("long_factors"))
    if kind == "llama3":  # no defaults there
        values |= scaling.model_dump(include={"low_freq_factor", "high_freq_factor"})
    return {"rope_type": kind, **values}


def read_positions_by_kind(
    reader: ConfigReader, head_dim: int, *, theta: float, local_theta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns settings of ``PositionsConfig`` of layers without and with a window:
    ``rope_parameters`` by the kind of layer, or the former's in ``rope_scaling``. The
    thetas are those of a file that names none."""
    by_kind = reader.read_nested("rope_parameters")
    local = by_kind.read_nested(LOCAL)
    if by_kind.has(GLOBAL):
        global_reader = by_kind.read_nested(GLOBAL)
    else:
        global_reader = reader.read_nested("rope_scaling")
    global_positions = read_position_settings(
        reader, head_dim, theta=theta, rope_reader=global_reader
    )
    local.read_implemented("partial_rotary_factor", 1.0, None)
    local_positions = {
        "kind": "rope",
        "theta": local.number("rope_theta", local_theta),
        "scaling": read_scaling(local, None),
    }
    return global_positions, local_positions


def write_positions_by_kind(config: TransformerConfig) -> dict[str, Any]:
    """Writes what :func:`read_positions_by_kind` reads."""

    def write_kind(positions: PositionsConfig) -> dict[str, Any]:
        scaling = write_scaling(positions) or {"rope_type": "default"}
        return {"rope_theta": positions.theta, **scaling}

    by_kind = {GLOBAL: write_kind(config.positions)}
    for kind in config.layer_kinds:
        if kind.window is not None:  # else all layers are global
            by_kind[LOCAL] = write_kind(config.get_positions(kind))
    return {"rope_parameters": by_kind}
