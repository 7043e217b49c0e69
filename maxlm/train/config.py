"""How long a run is, and how often it looks up from its work."""

from pydantic import Field

from maxlm.config import Config


class TrainConfig(Config):
    steps: int = Field(default=1000, gt=0)
    """Optimizer updates in the whole run."""
    micro_batches: int = Field(default=1, gt=0)
    """Parts a batch is taken in, one after the other: activation memory falls by as much, the
    result stays the same."""
    start_from: str | None = None
    """A run's folder, such as `maxlm convert` makes, whose parameters (and tokenizer, if none is
    named) this run starts from; null: from random ones. The optimizer starts anew."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the parameters with this decay (4 bytes a parameter)
    and evaluate with it; null: none."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out text; 0: only at the end."""
    eval_batches: int = Field(default=16, gt=0)
    """Batches of one such evaluation; the one at the end reads all held-out text."""


class CheckpointConfig(Config):
    """When checkpoints are written, and which are kept."""

    every_steps: int = Field(default=500, ge=0)
    """Steps between checkpoints; 0: only where the run stops."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep also, for good, those at multiples of this many steps; null: none."""
    asynchronous: bool = True
    """true: training goes on while files are written, for one more copy of the state in host
    memory. false: it waits for them."""
