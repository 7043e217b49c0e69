"""Longer contexts for a pretrained model, by scaling of its rotary positions."""

from typing import Literal

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures import ModelConfig
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.layers.rope import LinearScaling, NtkScaling, Scaling, YarnScaling


class ContextExtensionConfig(Config):
    """Changes of a pretrained model that training goes on from."""

    extend_to: int | None = Field(default=None, gt=0)
    """Tokens of context to extend the model to, from its ``max_seq_len``: sets that,
    ``positions.scaling`` and, where it is not given, ``data.seq_len``. null: the model
    as it is."""
    extend_by: Literal["yarn", "ntk", "linear"] = "yarn"
    """Scaling of RoPE, by the ratio of the lengths."""


def extend_context(model: ModelConfig, tune: ContextExtensionConfig) -> ModelConfig:
    """Returns the model with the context of ``tune.extend_to`` tokens; one that was
    extended so before, as in a run's config.yaml, is returned as it is.

    All layers' positions are scaled, but those that a pattern gives to layers whose
    window lies within the original length: they see no longer distances than before.
    Raises MaxlmError: positions other than RoPE, a length that is no longer, another
    scaling."""
    length = tune.extend_to
    if length is None:
        return model
    where = "tune.extend_to"
    original = model.max_seq_len
    kind = model.positions.kind
    if kind != "rope":
        raise MaxlmError(
            f"positions.kind={kind} have no RoPE to scale",
            where=where,
            fix="set model.max_seq_len alone",
        )
    scaling = model.positions.scaling
    if scaling is not None:
        if original == length:
            unscaled_length = round(length / scaling.factor)
            if scaling == _make_scaling(model, unscaled_length, tune):
                return model
        raise MaxlmError(
            f"the model has a scaling already: kind={scaling.kind}, "
            f"factor={scaling.factor:g}, max_seq_len={original:,}",
            where=where,
            fix="set model.positions.scaling to null and model.max_seq_len to the "
            "length before it",
        )
    if length <= original:
        raise MaxlmError(
            f"{length:,} tokens are no more than model.max_seq_len={original:,}",
            where=where,
            fix="give a larger number, or leave it out",
        )

    scaling = _make_scaling(model, original, tune)

    def extend_kind(kind: LayerKind) -> LayerKind:
        positions = kind.positions
        sees_further = kind.window is None or kind.window > original
        has_rope = positions is not None and positions.kind == "rope"
        if positions is not None and has_rope and sees_further:
            positions = positions.model_copy(update={"scaling": scaling})
        return kind.model_copy(update={"positions": positions})

    pattern = tuple(
        entry if isinstance(entry, str) else extend_kind(entry)
        for entry in model.pattern
    )
    changes = {
        "max_seq_len": length,
        "positions": model.positions.model_copy(update={"scaling": scaling}),
        "kinds": {name: extend_kind(kind) for name, kind in model.kinds.items()},
        "pattern": pattern,
    }
    return type(model).model_validate({**dict(model), **changes})


def _make_scaling(
    model: ModelConfig, original_length: int, tune: ContextExtensionConfig
) -> Scaling:
    assert tune.extend_to is not None
    factor = tune.extend_to / original_length
    if tune.extend_by == "linear":
        return LinearScaling(factor=factor)
    if tune.extend_by == "ntk":
        return NtkScaling(factor=factor)
    is_latent = any(attention.latent for attention in model.list_attention())
    # Latent attention has dimensions that do not turn: all of a score is sharpened, as
    # DeepSeek's.
    mscale = 1.0 if is_latent else None
    return YarnScaling(
        factor=factor,
        original_length=original_length,
        mscale=mscale,
        mscale_all_dim=mscale,
    )
