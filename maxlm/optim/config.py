"""Settings of optimizers, and their kinds."""

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import Field

from maxlm.config import Config
from maxlm.config.registry import RegisteredConfig, Registry


class OptimizerConfig(Config):
    """Settings by which gradients become updates."""

    kind: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """adamw: two fp32 moments a parameter (8 bytes). lion: the sign of one moment (4
    bytes); wants a learning rate 3–10× lower and a weight decay as much higher.
    adafactor: a factored second moment (about 0 bytes) and no first. muon: one moment
    (4 bytes), orthogonalised, on hidden matrices, at the cost of `ns_steps` × 3 matrix
    products each; AdamW on all else."""
    b1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (adamw; muon's AdamW); of lion's interpolation."""
    b2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment (adamw; muon's AdamW); of lion's moment, whose paper
    has 0.99."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to adamw's denominator: gradients well below it no longer move a
    parameter."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Share of a parameter's value taken off each step, times the learning rate; on
    matrices, embeddings and the output head, never on norm scales, biases or sinks."""
    clip_norm: float | None = Field(default=1.0, ge=0)
    """Gradients with a larger global norm are scaled down to it; 0 or null: never."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon: decay of its (Nesterov) moment."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Muon: Newton–Schulz iterations; fewer leave singular values further from 1."""
    update_rms: float = Field(default=0.2, gt=0)
    """Muon: root mean square of a full-rank update before the learning rate. 0.2 is
    about AdamW's, so that both use one learning rate and weight decay (arXiv
    2502.16982, section 2.2)."""
    decay_exponent: float = Field(default=0.8, gt=0, le=1)
    """Adafactor: its second moment decays by 1 - t^-exponent at step t."""
    rule_step: float = Field(default=1e-3, ge=0)
    """Step of parameters that learn by a rule, the selection biases of routers,
    whatever the learning rate; DeepSeek-V3 has 0.001, and 0 for the last of its
    tokens."""


OPTIMIZERS = Registry[Any](
    "optimizer",
    {
        "adamw": "maxlm.optim.moments:ADAMW",
        "lion": "maxlm.optim.moments:LION",
        "adafactor": "maxlm.optim.factored:ADAFACTOR",
        "muon": "maxlm.optim.muon:MUON",
    },
)
"""A :class:`~maxlm.optim.kinds.RegisteredOptimizer` by kind."""
AnyOptimizerConfig = Annotated[
    OptimizerConfig,
    RegisteredConfig(
        OPTIMIZERS, OptimizerConfig, default="adamw", get_config=attrgetter("config")
    ),
]
