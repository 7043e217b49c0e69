"""The settings of a transformer: what decoders, encoders and both together have in
common."""

from collections.abc import Mapping
from math import isclose
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeAlias,
)

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from maxlm.config import Config, MaxlmError
from maxlm.models.blocks import FeedForwardConfig, MixerConfig, Placement
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.moe import MoeConfig
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.rope import (
    DynamicNtkScaling,
    NtkScaling,
    YarnScaling,
    compute_yarn_mscale,
)
from maxlm.models.remat import RematPolicy

if TYPE_CHECKING:
    OptionalAttention: TypeAlias = Any
else:
    OptionalAttention = AttentionConfig | None


MAX_LAYERS = 10_000
"""Most layers that a model may have. Code that prices, names or compiles layers walks
over them, so a mistyped number must end here. The deepest published transformer has
1,000 (DeepNet, arXiv:2203.00555); ten times as many is past any use."""

LayerCount = Annotated[int, Field(gt=0, le=MAX_LAYERS)]

HeadName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class LayerKind(Config):
    """Settings in which one layer of a pattern differs from the others."""

    window: int | None = Field(default=None, gt=0)
    """Keys that its attention sees; null: all before it."""
    positions: PositionsConfig | None = None
    """Positions in place of the model's."""


class LayerStack(NamedTuple):
    """A run of layers whose parameters lie in one stack."""

    name: str
    num_layers: int
    kinds: tuple[LayerKind, ...]
    """Kinds of its layers, by turns; ``num_layers`` is a multiple of their number."""
    dense: bool
    """Whether layers have ``mlp``, not ``moe``."""


STACKS = ("first_layers", "layers", "last_layers")
"""Names that parts may have."""


def strip_stack_name(name: str) -> str:
    """Returns a parameter's name without its stack's: ``first_layers.mlp.up`` →
    ``mlp.up``."""
    return ".".join(word for word in name.split(".") if word not in STACKS)


class TrunkSpec(NamedTuple):
    """A trunk's layers, and the tokens that their attention sees."""

    stacks: tuple[LayerStack, ...]
    prefix: str = ""
    """Prefix of its parameters' names."""
    causal: bool = True
    """Whether tokens see those before them alone."""
    is_encoder: bool = False
    """Whether its tokens are an encoder's, beside a decoder's."""
    cross_attention: bool = False
    """Whether layers look at an encoder's output as well."""

    @property
    def num_layers(self) -> int:
        return sum(part.num_layers for part in self.stacks)


class TransformerConfig(Config):
    """Layers between an embedding and an output head."""

    if TYPE_CHECKING:
        # Each architecture declares its own, with its name as the only value.
        architecture: Any

    transformer_type: ClassVar[Literal["decoder", "encoder", "encoder_decoder"]]
    """How tokens are read and written: what tasks, the engine and the server go by. An
    architecture of another name is used as one of these."""

    vocab_size: int = Field(gt=0)
    num_layers: LayerCount
    """Layers of the model, or of the decoder where there is an encoder too."""
    d_model: int = Field(gt=0)
    max_seq_len: int = Field(gt=0)
    """Longest sequence the model is meant for; the rows of a learned position table."""
    attention: OptionalAttention = None
    mixer: MixerConfig | None = None
    """Another mixer in place of ``attention``, by the kind it is registered with."""
    mlp: MlpConfig | None = None
    moe: MoeConfig | None = None
    """A mixture of experts in place of ``mlp``."""
    ffn: FeedForwardConfig | None = None
    """Another feed-forward in place of ``mlp`` and ``moe``, by the kind it is
    registered with."""
    dense_layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """Number of first layers that have ``mlp`` all the same (DeepSeek-V2 has one)."""
    pattern: tuple[LayerKind, ...] = ()
    """Kinds of layers by turns, such as five with a window and one without (Gemma 3);
    none: all alike."""
    norm: NormConfig = NormConfig()
    placement: Placement = "pre"
    """Placement of norms: pre (x + f(norm(x))), post (norm(x + f(x)): BERT), sandwich
    (x + norm(f(norm(x))): Gemma 2), parallel (attention and MLP side by side, a norm
    each: Falcon-40B) or parallel_shared (with one norm for both: Falcon-7B, Phi-2)."""
    final_norm: bool = True
    """Normalise the last layer's output."""
    positions: PositionsConfig = PositionsConfig()
    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor on token embeddings; Gemma has the root of d_model."""
    embedding_norm: bool = False
    """Normalise the embedding's sum (BLOOM, BERT)."""
    tie_embeddings: bool = False
    """Use the embedding table as the output head: fewer parameters, usual below a
    billion."""
    head_bias: bool = False
    """Offsets of the logits (Phi-2)."""
    logit_scale: float = Field(default=1.0, gt=0)
    """Factor on the logits, before the offsets (Grok-1)."""
    logit_cap: float | None = Field(default=None, gt=0)
    """Logits become cap·tanh(logit / cap) (Gemma 2)."""
    heads: Mapping[HeadName, PositiveInt] = {}
    """Further linear maps of the final hidden states, their widths by name, such as
    `score: 1` of a reward model."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights (truncated normal)."""
    remat: RematPolicy = "full"
    """Activations that the backward pass keeps: none (all but norms and activations,
    most memory), matmuls, mlp, attention, full (only each layer's input: least memory,
    one more forward pass)."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.attention is None) == (self.mixer is None):
            given = (
                "neither attention nor" if self.mixer is None else "both attention and"
            )
            raise MaxlmError(f"{given} mixer", fix="give one of them")
        dense = self.dense_layers
        both = self.mlp is not None and self.moe is not None
        if not (self.mlp or self.moe or self.ffn):
            raise MaxlmError("neither mlp nor moe", fix="give one of them")
        if self.ffn and (self.mlp or self.moe):
            raise MaxlmError("ffn beside mlp or moe", fix="leave the others out")
        if both and not dense:
            fix = "set one of them to null, or dense_layers above 0"
            raise MaxlmError("both mlp and moe", fix=fix)
        if dense and not both:
            what = f"dense_layers={dense} stand before layers with experts"
            raise MaxlmError(what, fix="give both mlp and moe, or set it to 0")
        if dense >= self.num_layers:
            what = f"dense_layers={dense} of num_layers={self.num_layers}"
            raise MaxlmError(
                what, fix="leave some layers for the experts, or set moe to null"
            )
        if dense and self.pattern:
            raise MaxlmError("dense_layers with a pattern", fix="leave one of them out")
        if self.pattern and self.attention and self.attention.window is not None:
            what = f"attention.window={self.attention.window} with a pattern"
            fix = "give windows to its kinds of layers alone"
            raise MaxlmError(what, where="pattern", fix=fix)
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        for kind in self.layer_kinds:
            self._check_positions(kind.positions or self.positions)
        scheme = self.positions.kind
        own = [kind.positions for kind in self.pattern]
        if any(positions and positions.kind != scheme for positions in own):
            what = f"a pattern of other positions than {scheme}"
            raise MaxlmError(what, where="pattern", fix="let all layers have one kind")
        if scheme not in ("rope", "alibi") and any(own):
            what = f"a pattern of positions of kind={scheme}, of which a model has one"
            raise MaxlmError(what, where="pattern", fix="leave them out")
        return self

    def _check_positions(self, positions: PositionsConfig) -> None:
        if self.attention is None:
            if positions.kind not in ("learned", "sinusoidal", "none"):
                what = f"positions.kind={positions.kind} without attention"
                raise MaxlmError(what, fix="use learned, sinusoidal or none")
            return
        latent, head, turned = (
            self.attention.latent,
            self.attention.head_dim,
            positions.rotary_dim,
        )
        if latent is not None and positions.kind != "rope":
            raise MaxlmError(
                "latent attention turns queries", fix="use positions.kind=rope"
            )
        if latent is not None and turned is not None:
            what = f"positions.rotary_dim={turned} with latent attention"
            raise MaxlmError(what, fix="set attention.latent.rotary_dim alone")
        if positions.kind != "rope":
            return
        size = latent.rotary_dim if latent else turned or head
        if size % 2:
            raise ValueError(f"rope needs an even head_dim, not {size}")
        if size > head:
            what = f"positions.rotary_dim={size} of attention.head_dim={head}"
            raise MaxlmError(what, fix="turn at most all dimensions")
        if size == 2 and isinstance(positions.scaling, NtkScaling | DynamicNtkScaling):
            what = f"scaling.kind={positions.scaling.kind} of one pair of dimensions"
            raise MaxlmError(what, fix="turn more of them, or use another scaling")

    def build(self, **kwargs: Any) -> Any:
        """Builds the model; ``kwargs``: arguments of ``Transformer``."""
        raise NotImplementedError

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of layers, by turns; at least one."""
        window = self.attention.window if self.attention else None
        return self.pattern or (LayerKind(window=window),)

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        """The stacks of layers, first to last. What a pattern leaves over at the end
        has its own, so that each is whole periods."""
        depth = self.num_layers - self.dense_layers
        dense = self.moe is None
        before, among, behind = STACKS
        first = LayerStack(before, self.dense_layers, self.layer_kinds, True)
        kinds = self.layer_kinds[:depth]
        rest = depth % len(kinds)
        main = LayerStack(among, depth - rest, kinds, dense)
        last = LayerStack(behind, rest, kinds[:rest], dense)
        return tuple(part for part in (first, main, last) if part.num_layers)

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """All layers, in the order in which they are run."""
        return (TrunkSpec(self.layer_stacks),)

    def score_scale(self, kind: LayerKind) -> float:
        """Returns the factor on q·k in layers of a kind; see ``YarnScaling.mscale``."""
        if self.attention is None:
            return 1.0
        scale = self.attention.scale or self.attention.head_dim**-0.5
        scaling = (kind.positions or self.positions).scaling
        if (
            self.attention.latent
            and isinstance(scaling, YarnScaling)
            and scaling.mscale_all_dim
        ):
            scale *= compute_yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale

    @property
    def position_limit(self) -> int | None:
        """Positions the model can run at; None: any, if not equally well past
        ``max_seq_len``."""
        return self.max_seq_len if self.positions.kind == "learned" else None

    @property
    def active_expert_fraction(self) -> float:
        """The share of a layer's routed experts that a token meets; 1 without
        experts."""
        return self.moe.experts_per_token / self.moe.num_experts if self.moe else 1.0

    def shrunk(
        self, *, vocab_size: int, num_layers: int, head_dim: int, seq_len: int
    ) -> Self:
        """Returns a small model of the same structure: the ratio of query to kv heads
        stays (up to 8), so do that of the FFN to the width, the kinds of layers (each
        once), ties, biases, norms, positions, gating and remat; experts are 8 at most,
        registered mixers and feed-forwards as they are; ``vocab_size`` and
        ``num_layers`` are upper bounds."""
        attention = self.attention
        small = None
        d_model = 2 * head_dim
        if attention is not None:
            small = attention.shrunk(head_dim, seq_len)
            d_model = small.num_heads * head_dim

        def narrowed(layer: Any) -> Any:
            if layer is None:
                return None
            d_ff = max(1, round(layer.d_ff / self.d_model * d_model / 8)) * 8
            return layer.model_copy(update={"d_ff": d_ff})

        def turned(positions: PositionsConfig | None) -> PositionsConfig | None:
            if positions is None or positions.rotary_dim is None:
                return positions
            share = positions.rotary_dim / (
                attention.head_dim if attention else head_dim
            )
            size = max(2, round(share * head_dim / 2) * 2)
            return positions.model_copy(update={"rotary_dim": size})

        window = max(2, seq_len // 4)
        pattern = tuple(
            LayerKind(window=kind.window and window, positions=turned(kind.positions))
            for kind in dict.fromkeys(self.pattern)
        )
        # T5's, without which a narrow model's logits would hardly differ.
        by_width = isclose(self.logit_scale, self.d_model**-0.5, rel_tol=1e-3)
        return self.model_copy(
            update={
                "vocab_size": min(self.vocab_size, vocab_size),
                "num_layers": min(self.num_layers, num_layers),
                "d_model": d_model,
                "max_seq_len": seq_len,
                "attention": small,
                "mlp": narrowed(self.mlp),
                "moe": narrowed(self.moe and self.moe.limit_experts(8)),
                "dense_layers": min(self.dense_layers, 1),
                "pattern": pattern,
                "positions": turned(self.positions),
                "logit_scale": d_model**-0.5 if by_width else self.logit_scale,
            }
        )
