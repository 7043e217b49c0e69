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


def get_case(name: str) -> tuple[str, dict[str, Any]]:
    """A class of transformers and the arguments of its config: a case's, or of
    ``CASE@N`` the same with the Nth sizes drawn for it."""
    case, _, seed = name.partition("@")
    architecture, settings = CASES[case]
    if seed:
        settings = draw_settings(architecture, settings, random.Random(seed))
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
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            noise = spread * torch.randn(parameter.shape)
            one = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(noise + (1 if one else 0))
    return model
