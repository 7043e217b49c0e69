"""What a task has a run do beside its training steps, as a plan counts it before the run
starts: plain numbers, no arrays."""

from dataclasses import dataclass, field

from maxlm.models.caches.config import CacheConfig, PagedCacheConfig
from maxlm.sharding import MeshConfig


@dataclass(frozen=True)
class ExtraPass:
    """Forward passes over rows of batches, outside the training step."""

    name: str
    """What they compute, in words."""
    model: str | None = None
    """The model, a name of :meth:`Task.frozen_models`; None: the trained one."""
    passes_per_step: float = 1.0
    """Passes over as many rows as a step's batch has, a step on average: 0.5 where rows
    are passed over once and trained on twice."""
    batches_at_once: int = 1
    """Steps' batches that lie on the devices together while it runs."""
    makes_logits: bool = True
    """Whether it makes the logits of every token."""


@dataclass(frozen=True)
class ScoringModel:
    """A model of another run that scores the sequences of a rollout. It stays on its
    devices for as long as the run lasts, with its parameters as they are stored."""

    run: str
    """Folder of the run."""
    mesh: MeshConfig | None = None
    """The devices that it is spread over; None: one."""


@dataclass(frozen=True)
class GenerationWork:
    """Sequences that the trained model writes with the engine before some training
    steps: a rollout. Bounds count for memory; what is expected, for time."""

    num_sequences: int
    """Sequences of a rollout, on all devices together."""
    max_prompt_tokens: int
    """Tokens of the longest prompt."""
    max_new_tokens: int
    """Tokens that a sequence may get."""
    steps_per_rollout: int = 1
    """Training steps that a rollout serves."""
    mean_prompt_tokens: float | None = None
    """Tokens of a prompt on average; None: as long as the longest."""
    mean_new_tokens: float | None = None
    """Tokens that a sequence gets on average; None: as many as it may."""
    sequences_per_prompt: int = 1
    """Sequences that share a prompt, which is computed once for them."""
    max_sequences: int | None = None
    """Sequences that run together on each shard of the batch, the engine's
    ``max_sequences``; None: all of the shard."""
    room_tokens: int | None = None
    """Tokens that the engine has room for in a sequence, its ``max_length``; None: those
    of the longest."""
    num_pages: int | None = None
    """Pages of the engine's caches in each shard; None: enough for all sequences."""
    page_size: int = 16
    """Tokens of a page of the engine's caches."""
    prefill_tokens: int = 512
    """Tokens of prompts in a step of the engine."""
    cache: CacheConfig = field(default_factory=PagedCacheConfig)
    """How the engine keeps keys and values."""
    shares_params: bool = False
    """Whether the engine reads the trainer's parameters as they are stored, and holds
    no copy of its own."""
    keeps_caches: bool = False
    """Whether the caches stay on the devices while the trainer runs."""
    mesh: MeshConfig | None = None
    """Mesh of the same devices that generates; None: the run's own, the axes that split
    layers and sequences given to ``data``
    (:func:`~maxlm.sharding.mesh.fold_for_generation`)."""

    @property
    def expected_prompt_tokens(self) -> float:
        """Tokens of a prompt on average."""
        mean = self.mean_prompt_tokens
        return self.max_prompt_tokens if mean is None else mean

    @property
    def expected_new_tokens(self) -> float:
        """Tokens that a sequence gets on average."""
        mean = self.mean_new_tokens
        return self.max_new_tokens if mean is None else mean

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_tokens + self.max_new_tokens
