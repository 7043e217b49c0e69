"""Random tiny models of transformers, one or more a family, with unusual sizes:
cases.yaml."""

import random
from pathlib import Path
from typing import Any

from tests.models.published import read_models
from tests.parity.drawn import draw_settings

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (values.pop("architecture"), values)
    for name, values in read_models(Path(__file__).with_name("cases.yaml")).items()
}


STATE_SPACE = (
    *("mixer.A_log", "mixer.dt_bias", "mixer.dt_proj.bias"),
    *("mamba.A_log", "mamba.dt_bias", "mamba.dt_proj.bias", "mamba.dt_proj_bias"),
)
"""Ends of the names of a state space's parameters that have a range of their own."""

STATE_SPACE_MAPS = (
    *("mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight"),
    *("mamba.in_proj.weight", "mamba.x_proj.weight", "mamba.dt_proj.weight"),
    *("mamba.x_proj_weight", "mamba.dt_proj_weight"),
)


def get_case(name: str) -> tuple[str, dict[str, Any]]:
    """A class of transformers and the arguments of its config: a case's, or of
    ``CASE@N`` the same with the Nth sizes drawn for it; of ``CASE@narrowN``, with
    layers' inputs of few numbers."""
    case, _, seed = name.partition("@")
    architecture, settings = CASES[case]
    if seed:
        is_narrow = seed.startswith("narrow")
        draw = random.Random(seed)
        settings = draw_settings(architecture, settings, draw, is_narrow=is_narrow)
    return architecture, settings


def build(name: str, seed: int = 0) -> Any:
    """A model in fp32 whose every parameter matters: norms and biases are not at their
    start."""
    import torch
    import transformers

    architecture, settings = get_case(name)
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return randomize(
        cls(config).eval(), untie=settings.get("tie_word_embeddings") is False
    )


def randomize(model: Any, *, untie: bool = False) -> Any:
    """A new model, with every parameter drawn from torch's generator.

    Args:
        untie: give T5 an output head of its own, which transformers ties and published
            weights do not.
    """
    import torch

    if untie and hasattr(model, "shared"):
        model.lm_head.weight = torch.nn.Parameter(
            torch.empty_like(model.lm_head.weight)
        )
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        # Biases that experts are chosen with are no parameters there.
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape))
            if name.endswith("layer_scalar"):
                buffer.copy_(1 + 0.3 * torch.randn(buffer.shape))
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            if name.endswith(STATE_SPACE_MAPS):
                # What a state holds and shows is a product of three maps' results.
                spread *= 0.5
            if "shared_trans" in name and ("q_proj" in name or "k_proj" in name):
                # Zamba's scores are larger by √2: softmax would be near a choice of one,
                # which magnifies rounding.
                spread *= 0.5
            if "adapter_list" in name:
                # A term beside another map, which is a product of two.
                spread *= 0.4
            noise = spread * torch.randn(parameter.shape)
            if name.endswith(STATE_SPACE):
                # Rates and steps as they begin, about: others leave nothing of a state,
                # or let it grow without bound.
                parameter.add_(0.2 * noise)
                continue
            one = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(noise + (1 if one else 0))
    return model
