"""Longer contexts for a pretrained model, by scaling of its rotary positions."""

from typing import Literal

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures import ModelConfig
from maxlm.models.layers.rope import LinearScaling, NtkScaling, Scaling, YarnScaling


class TuneConfig(Config):
    """Changes of a pretrained model that training goes on from."""

    extend_to: int | None = Field(default=None, gt=0)
    """Tokens of context to extend the model to, from its ``max_seq_len``: sets that,
    ``positions.scaling`` and, where it is not given, ``data.seq_len``. null: the model
    as it is."""
    extend_by: Literal["yarn", "ntk", "linear"] = "yarn"
    """Scaling of RoPE, by the ratio of the lengths."""


def extend_context(model: ModelConfig, tune: TuneConfig) -> ModelConfig:
    """Returns the model with the context of ``tune.extend_to`` tokens; one that was
    extended so before, as in a run's config.yaml, is returned as it is.

    All layers' positions are scaled, but those that a pattern gives to layers whose
    window lies within the original length: they see no longer distances than before.
    Raises MaxlmError: positions other than RoPE, a length that is no longer, another
    scaling."""
    length = tune.extend_to
    original = model.max_seq_len
    where = "tune.extend_to"
    if length is None:
        return model
    kind = model.positions.kind
    if kind != "rope":
        what = f"positions.kind={kind} have no RoPE to scale"
        fix = "set model.max_seq_len alone"
        raise MaxlmError(what, where=where, fix=fix)
    if found := model.positions.scaling:
        if original == length and found == _make_scaling(
            model, round(length / found.factor), tune
        ):
            return model
        what = f"the model has a scaling already: kind={found.kind}, factor={found.factor:g}, "
        what += f"max_seq_len={original:,}"
        fix = "set model.positions.scaling to null and model.max_seq_len to the length before it"
        raise MaxlmError(what, where=where, fix=fix)
    if length <= original:
        what = f"{length:,} tokens are no more than model.max_seq_len={original:,}"
        raise MaxlmError(what, where=where, fix="give a larger number, or leave it out")
    scaling = _make_scaling(model, original, tune)
    pattern = []
    for layer in model.pattern:
        own = layer.positions
        if own is not None and (layer.window is None or layer.window > original):
            own = own.model_copy(update={"scaling": scaling})
        pattern.append(layer.model_copy(update={"positions": own}))
    changes = {
        "max_seq_len": length,
        "positions": model.positions.model_copy(update={"scaling": scaling}),
        "pattern": tuple(pattern),
    }
    return type(model).model_validate({**dict(model), **changes})


def _make_scaling(
    model: ModelConfig, original_length: int, tune: TuneConfig
) -> Scaling:
    assert tune.extend_to is not None
    factor = tune.extend_to / original_length
    if tune.extend_by == "linear":
        return LinearScaling(factor=factor)
    if tune.extend_by == "ntk":
        return NtkScaling(factor=factor)
    # Latent attention has dimensions that do not turn: all of a score is sharpened, as
    # DeepSeek's.
    m = (
        1.0
        if model.attention is not None and model.attention.latent is not None
        else None
    )
    own = {"factor": factor, "original_length": original_length}
    return YarnScaling.model_validate(own | {"mscale": m, "mscale_all_dim": m})
