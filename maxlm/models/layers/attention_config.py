"""Settings of attention.

Shapes: D model, N query heads, K kv heads, H head dim.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError

QkNormForm = Literal["head", "per_head", "all_heads", "weightless"]


class LatentConfig(Config):
    """Latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): keys and values of all
    heads come from one narrow vector a token, which is all that generation keeps.

    ``head_dim`` is then the size of query and key heads: the first ``head_dim −
    rotary_dim`` dimensions have no positions, RoPE turns the last ``rotary_dim``.
    """

    q_rank: int | None = Field(default=None, gt=0)
    """Width that queries are squeezed through; null: they are not."""
    kv_rank: int = Field(gt=0)
    """Width of the vector that keys and values come from."""
    rotary_dim: int = Field(gt=0)
    """Dimensions of a head that RoPE turns; all heads share that part of the key."""
    value_dim: int = Field(gt=0)
    """Size of a value head."""
    norm_eps: float | None = Field(default=None, gt=0)
    """``norm.eps`` of the norms of narrow vectors; null: the model's (Kimi Linear's
    differs)."""


class TemperatureConfig(Config):
    """Queries grow with the logarithm of their position, so that softmax stays sharp
    over many keys (Nakanishi 2025, arXiv 2501.19399, as Llama 4's published code has
    it): q · (1 + scale · ln(1 + ⌊(position + offset) / length⌋))."""

    scale: float = Field(default=0.1, gt=0)
    length: int = Field(default=8192, gt=0)
    """Positions from one step of the temperature to the next; nothing changes before
    the first step."""
    offset: int = Field(default=1, ge=0)
    """Llama 4 counts a sequence's first token as 1, Ministral 3 as 0."""


class AttentionConfig(Config):
    """Heads of attention, and how their scores become weights."""

    kind: ClassVar[str] = "attention"

    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads: num_heads for multi-head, 1 for multi-query, between for
    grouped (smaller caches, a little less quality)."""
    head_dim: int = Field(gt=0)
    value_head_dim: int | None = Field(default=None, gt=0)
    """Size of a value head; null: head_dim (MiMo-V2's are narrower)."""
    bias: bool = False
    """Offsets on the projections to queries, keys and values (GPT-2, Qwen2)."""
    out_bias: bool | None = None
    """Offsets on the projection back; null: as ``bias``."""
    window: int | None = Field(default=None, gt=0)
    """Tokens that a token sees: itself and the window − 1 before it (Mistral's sliding
    window); cost then grows with the window, not the sequence. null: all before it."""
    scale: float | None = Field(default=None, gt=0)
    """Factor on q·k; null: head_dim^−0.5."""
    soft_cap: float | None = Field(default=None, gt=0)
    """Scores become cap·tanh(score / cap) (Gemma 2, Grok-1)."""
    qk_norm: bool = False
    """Normalise queries and keys, by the model's kind of norm (Qwen3, Gemma 3)."""
    qk_norm_form: QkNormForm = "head"
    """What ``qk_norm`` normalises over, and its weights: head (each head by itself, with
    [H] weights that all heads share: Qwen3), per_head (the same with [N, H] weights:
    Cohere), all_heads (N·H numbers at once, [N, H] weights: OLMo 2, MiniMax-M2; under
    tensor parallelism one more sum over devices) or weightless (each head by itself:
    Llama 4)."""
    qk_norm_after_rope: bool = False
    """Normalise queries and keys behind RoPE, not before (Hunyuan, Llama 4)."""
    value_norm: bool = False
    """Normalise each value head, by the model's kind of norm without weights (Gemma
    4)."""
    keys_as_values: bool = False
    """Values are the keys as they are before norm and RoPE; there is no map to values
    (Gemma 4's global layers)."""
    shares_keys: bool = False
    """Attend to the keys and values of an earlier layer (Gemma 3n): the layer has no
    maps to its own, nor norms of them."""
    chunk: int | None = Field(default=None, gt=0)
    """Positions are cut into chunks of so many, and a token sees those of its own chunk
    alone, at or before it (Llama 4); null: the sequence is one chunk."""
    temperature: TemperatureConfig | None = None
    """Growth of queries with their positions; null: none."""
    output_gate: Literal["element", "head"] | None = None
    """Multiply attention's output, before the projection back, by the sigmoid of one
    more map of the layer's input (Qiu et al. 2025, arXiv 2505.06708): one number for
    each element (Qwen3-Next) or for each head; null: none."""
    clip: float | None = Field(default=None, gt=0)
    """Cut queries, keys and values off at ± this (DBRX)."""
    sinks: bool = False
    """A learnt logit of each query head beside the scores in its softmax, whose weight
    goes to no token, so that a head can leave a token as it is (gpt-oss)."""
    latent: LatentConfig | None = None

    @model_validator(mode="after")
    def _heads_divide(self):
        num_heads = self.num_heads
        num_kv_heads = self.num_kv_heads
        if num_heads % num_kv_heads:
            raise MaxlmError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}",
                fix="let every kv head serve as many query heads as the others",
            )
        shares_values = self.keys_as_values or self.shares_keys
        if self.value_head_dim is not None and shares_values:
            raise MaxlmError(
                "value_head_dim with keys_as_values or shares_keys",
                fix="leave it out: values are of the keys' size there",
            )
        if self.latent is None:
            return self
        if self.value_head_dim is not None:
            raise MaxlmError(
                "value_head_dim beside latent", fix="set latent.value_dim alone"
            )
        if num_kv_heads != num_heads:
            raise MaxlmError(
                f"latent attention with num_kv_heads={num_kv_heads} of {num_heads} heads",
                fix="every query head has its own keys there: set it to num_heads",
            )
        rotary_dim = self.latent.rotary_dim
        if rotary_dim >= self.head_dim:
            raise MaxlmError(
                f"latent.rotary_dim={rotary_dim} of head_dim={self.head_dim}",
                fix="leave some dimensions without positions",
            )
        if self.qk_norm or self.clip:
            raise MaxlmError(
                "latent attention with qk_norm or clip", fix="leave them out"
            )
        if self.value_norm or self.keys_as_values or self.shares_keys:
            raise MaxlmError(
                "latent attention with value_norm, keys_as_values or shares_keys",
                fix="leave them out",
            )
        return self

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns attention of the same kind with small heads, for a smoke run of
        sequences of ``seq_len``: the ratio of query to kv heads stays, up to 8, and
        windows and chunks are a quarter of a sequence."""
        group_size = min(self.num_heads // self.num_kv_heads, 8)
        # Multi-query stays multi-query; two heads stand for any other number.
        num_kv_heads = 1 if self.num_kv_heads == 1 else 2
        short = max(2, seq_len // 4)
        temperature = self.temperature
        if temperature is not None:
            temperature = temperature.model_copy(update={"length": short})
        latent = self.latent
        if latent is not None:
            latent = latent.model_copy(
                update={
                    "q_rank": None if latent.q_rank is None else head_dim,
                    "kv_rank": head_dim,
                    "rotary_dim": head_dim // 2,
                    "value_dim": head_dim,
                }
            )
        return self.model_copy(
            update={
                "num_heads": group_size * num_kv_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "value_head_dim": self._shrink_value(head_dim),
                "window": None if self.window is None else short,
                "chunk": None if self.chunk is None else short,
                "temperature": temperature,
                "latent": latent,
            }
        )

    def _shrink_value(self, head_dim: int) -> int | None:
        """Returns the size of a value head where others are ``head_dim``: the ratio
        stays."""
        if self.value_head_dim is None:
            return None
        return max(1, head_dim * self.value_head_dim // self.head_dim)

    @property
    def gate_dim(self) -> int:
        """Numbers of a head's output gate; 0: it has none."""
        if self.output_gate is None:
            return 0
        return 1 if self.output_gate == "head" else self.value_dim

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        if self.latent is not None:
            return self.latent.value_dim
        return self.value_head_dim or self.head_dim
