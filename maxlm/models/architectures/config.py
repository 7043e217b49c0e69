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

from jax.typing import DTypeLike
from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures.mtp import MtpConfig, make_mtp_run
from maxlm.models.architectures.pattern import (
    LONGEST_SINGLE_PERIOD,
    FeedForwardChoice,
    KindName,
    LayerKind,
    LayerRun,
    LayerStack,
    MixerChoice,
    PatternEntry,
    PatternLayer,
    find_repeats,
    make_run,
    make_shortest_run,
    suggest_kind,
)
from maxlm.models.architectures.shrink import PartShrinker
from maxlm.models.blocks import (
    BlockConfig,
    BlockKindChoice,
    Placement,
    ReadsSharedBlock,
    find_attention,
    normalizes_itself,
)
from maxlm.models.frontends import FrontendChoice
from maxlm.models.layer_inputs import LayerInputsConfig
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
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules

# A type checker takes it for anything: most of what reads it is only there where a model
# has attention.
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


STACKS = ("first_layers", "layers", "last_layers")
"""Names that runs of layers may have, and the stacks of those with one."""


def strip_stack_name(name: str, stack: str = "") -> str:
    """Returns a parameter's name without its stack's: ``layers.full.mlp.up`` →
    ``mlp.up``; of any stack with a run of its own: ``first_layers.mlp.up`` →
    ``mlp.up``."""
    if stack:
        return name.removeprefix(f"{stack}.")
    return ".".join(word for word in name.split(".") if word not in STACKS)


class TrunkSpec(NamedTuple):
    """A trunk's layers, and the tokens that their attention sees."""

    runs: tuple[LayerRun, ...]
    prefix: str = ""
    """Prefix of its parameters' names."""
    causal: bool = True
    """Whether tokens see those before them alone."""
    is_encoder: bool = False
    """Whether its tokens are an encoder's, beside a decoder's."""
    cross_attention: bool = False
    """Whether layers look at an encoder's output as well."""

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        return tuple(stack for run in self.runs for stack in run.stacks)

    @property
    def num_layers(self) -> int:
        return sum(run.num_layers for run in self.runs)


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
    mixer: MixerChoice | None = None
    """Another mixer in place of ``attention``, by the kind it is registered with, or
    none."""
    mlp: MlpConfig | None = None
    moe: MoeConfig | None = None
    """A mixture of experts in place of ``mlp``."""
    ffn: FeedForwardChoice | None = None
    """Another feed-forward in place of ``mlp`` and ``moe``, by the kind it is
    registered with; or none: layers are mixers alone (Mamba)."""
    dense_layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """Number of first layers that have ``mlp`` all the same (DeepSeek-V2 has one)."""
    kinds: Mapping[KindName, LayerKind] = {}
    """Kinds of layers by name, for ``pattern``: those that differ in more than window
    and positions need names, which their parameters have too."""
    pattern: tuple[PatternEntry, ...] = ()
    """Kinds of layers by turns, each by its name or its settings, such as five with a
    window and one without (Gemma 3), or three with a recurrence and one with attention
    (Qwen3-Next); none: all alike. A pattern as long as the model names every layer."""
    norm: NormConfig = NormConfig()
    placement: Placement = "pre"
    """Placement of norms: pre (x + f(norm(x))), post (norm(x + f(x)): BERT), sandwich
    (x + norm(f(norm(x))): Gemma 2), output (x + norm(f(x)): OLMo 2), normed
    (norm(x) + f(norm(x)): MiniMax-01), parallel
    (attention and MLP side by side, a norm each: Falcon-40B) or parallel_shared (with
    one norm for both: Falcon-7B, Phi-2)."""
    residual_scale: float = Field(default=1.0, gt=0)
    """Factor on what a branch adds to the residual stream (Granite)."""
    block: BlockKindChoice | None = None
    """Another way in which layers join the residual stream, or several of them, by the
    kind it is registered with; null: by ``placement`` alone."""
    layer_inputs: LayerInputsConfig | None = None
    """Inputs of each layer's own, from a second table of tokens (Gemma 3n); null:
    none."""
    layer_scale: bool = False
    """Multiply each layer's output by a learnt number (Gemma 4)."""
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
    frontend: FrontendChoice | None = None
    """Inputs beside tokens (patches of images, vectors of another model) and what turns
    them into vectors, by the kind it is registered with; null: tokens alone."""
    mtp: MtpConfig | None = None
    """Modules behind the layers that predict tokens further ahead, whose losses join
    the model's (DeepSeek-V3); null: none."""
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
        if self.attention is not None and self.mixer is not None:
            raise MaxlmError("both attention and mixer", fix="give one of them")
        if self.ffn and (self.mlp or self.moe):
            raise MaxlmError("ffn beside mlp or moe", fix="leave the others out")
        num_dense = self.dense_layers
        has_both = self.mlp is not None and self.moe is not None
        names_dense_kind = any(kind.ffn == "mlp" for kind in self.layer_kinds)
        if has_both and not num_dense and not names_dense_kind:
            raise MaxlmError(
                "both mlp and moe",
                fix="set one of them to null, or dense_layers above 0",
            )
        if num_dense and not has_both:
            raise MaxlmError(
                f"dense_layers={num_dense} stand before layers with experts",
                fix="give both mlp and moe, or set it to 0",
            )
        if num_dense >= self.num_layers:
            raise MaxlmError(
                f"dense_layers={num_dense} of num_layers={self.num_layers}",
                fix="leave some layers for the experts, or set moe to null",
            )
        if self.pattern and self.attention and self.attention.window is not None:
            raise MaxlmError(
                f"attention.window={self.attention.window} with a pattern",
                where="pattern",
                fix="give windows to its kinds of layers alone",
            )
        return self

    @model_validator(mode="after")
    def _frontend_fits(self) -> Self:
        frontend = self.frontend
        if frontend is None:
            return self
        if self.transformer_type != "decoder":
            raise MaxlmError(
                f"a frontend before an architecture={self.architecture}",
                where="frontend",
                fix="set it to null, or use a decoder",
            )
        if self.mtp is not None:
            # Its modules read the tokens that follow, and would read placeholders.
            message = "a frontend beside mtp, which reads tokens alone"
            raise MaxlmError(message, where="mtp", fix="set one of them to null")
        if frontend.placeholder_id >= self.vocab_size:
            message = f"{frontend.placeholder_id} is no row of the model's table, "
            message += f"vocab_size={self.vocab_size}"
            fix = "name one that no text has, or raise vocab_size"
            raise MaxlmError(message, where="frontend.placeholder_id", fix=fix)
        return self

    @model_validator(mode="after")
    def _kinds_fit(self) -> Self:
        unused = self.kinds.keys() - set(self.pattern)
        if unused:
            raise MaxlmError(
                f"kinds.{min(unused)} is not in the pattern",
                where="pattern",
                fix="name it there, or leave it out",
            )
        blocks_without_name = {
            layer.block
            for layer in self._list_period(is_dense=False)
            if not layer.kind_name
        }
        is_named = any(isinstance(entry, str) for entry in self.pattern)
        if len(blocks_without_name) + is_named > 1:
            raise MaxlmError(
                "kinds of layers of different modules without names",
                where="pattern",
                fix="give them names in model.kinds, and list these",
            )
        return self

    @model_validator(mode="after")
    def _shared_keys_fit(self) -> Self:
        made_by: dict[str, LayerKind] = {}
        for run in self.layer_runs:
            for name, kind in zip(run.kind_names, run.kinds, strict=True):
                if kind.keys_of is None:
                    attention = self.get_attention(kind)
                    if attention is not None and attention.shares_keys:
                        message = "shares_keys of a layer that does not say whose"
                        fix = "name their kind in its keys_of"
                        raise MaxlmError(message, where="kinds", fix=fix)
                    made_by[name] = kind
                    continue
                source = made_by.get(kind.keys_of)
                if source is None:
                    fix = "name a kind of layers that stand before it and make keys"
                    message = f"keys_of={kind.keys_of}, of which no layer stands before"
                    raise MaxlmError(message, where="kinds", fix=fix)
                self._check_shared_keys(kind, source)
        return self

    def _check_shared_keys(self, kind: LayerKind, source: LayerKind) -> None:
        """Raises MaxlmError: a kind reads keys that are not made as its own would
        be."""
        reader = self.get_attention(kind)
        maker = self.get_attention(source)
        fix = f"give it those of {kind.keys_of}"
        where = "kinds"
        if reader is None or maker is None or maker.latent is not None:
            message = f"keys_of={kind.keys_of}, which makes no keys of heads"
            raise MaxlmError(message, where=where, fix="name a kind with attention")
        sizes = (reader.num_kv_heads, reader.head_dim, reader.chunk)
        if sizes != (maker.num_kv_heads, maker.head_dim, maker.chunk):
            message = f"keys_of={kind.keys_of} with other kv heads than it reads"
            raise MaxlmError(message, where=where, fix=fix)
        if kind.window != source.window:
            message = f"keys_of={kind.keys_of} with another window"
            raise MaxlmError(message, where=where, fix=fix)
        if self.get_positions(kind) != self.get_positions(source):
            message = f"keys_of={kind.keys_of} with other positions"
            raise MaxlmError(message, where=where, fix=fix)

    @model_validator(mode="after")
    def _streams_fit(self) -> Self:
        needs = {"layer_inputs": self.layer_inputs, "block": self.block}
        for name, setting in needs.items():
            if setting is None:
                continue
            if self.transformer_type != "decoder":
                message = f"{name} of an architecture={self.architecture}"
                raise MaxlmError(
                    message, where=name, fix="set it to null, or use a decoder"
                )
            if self.mtp is not None:
                message = f"{name} beside mtp, whose modules have none"
                raise MaxlmError(message, where="mtp", fix="set one of them to null")
        return self

    @model_validator(mode="after")
    def _shared_blocks_fit(self) -> Self:
        for block in self.list_blocks():
            mixer = block.mixer
            if mixer is None or not normalizes_itself(mixer):
                continue
            if block.placement not in ("pre", "sandwich"):
                message = (
                    f"a mixer with a norm of its own, and placement={block.placement}"
                )
                raise MaxlmError(message, where="placement", fix="use pre or sandwich")
        first_of_name: dict[str, BlockConfig] = {}
        for block in self._list_blocks_with_shared():
            assert isinstance(block.mixer, ReadsSharedBlock)
            name = block.mixer.block
            first = first_of_name.setdefault(name, block)
            assert isinstance(first.mixer, ReadsSharedBlock)
            settings = (block.mixer.shared_settings, block.norm)
            if settings != (first.mixer.shared_settings, first.norm):
                message = (
                    f"layers of mixer.block={name} with unlike attention, mlp or norm"
                )
                fix = "give them the same, or other names of blocks"
                raise MaxlmError(message, where="kinds", fix=fix)
        if not first_of_name:
            return self
        if self.transformer_type != "decoder":
            message = f"a shared_block in an architecture={self.architecture}"
            raise MaxlmError(message, where="mixer", fix="use a decoder")
        if self.mtp is not None:
            message = "mtp beside a shared_block, which its modules cannot read"
            raise MaxlmError(message, where="mtp", fix="set it to null")
        if self.block is not None:
            message = "block beside a shared_block, which reads one residual stream"
            raise MaxlmError(message, where="block", fix="set it to null")
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        for kind in self.layer_kinds:
            self._check_positions(self.get_positions(kind), self.get_attention(kind))
        scheme = self.positions.kind
        pattern_positions = [
            kind.positions
            for kind in self.layer_kinds
            if kind.positions is not None and kind.positions.kind != "none"
        ]
        others = [
            positions.kind
            for positions in pattern_positions
            if positions.kind != scheme
        ]
        # Layers without positions may stand beside others, whichever the model says.
        if scheme == "none" and len(set(others)) < 2:
            others = []
            scheme = pattern_positions[0].kind if pattern_positions else scheme
        if others:
            raise MaxlmError(
                f"a pattern of other positions than {scheme}",
                where="pattern",
                fix="let all layers have one kind, or none",
            )
        if pattern_positions and scheme not in ("rope", "alibi"):
            raise MaxlmError(
                f"a pattern of positions of kind={scheme}, of which a model has one",
                where="pattern",
                fix="leave them out",
            )
        return self

    def _check_positions(
        self, positions: PositionsConfig, attention: AttentionConfig | None
    ) -> None:
        if attention is None:
            # A kind without attention beside others has no use for them.
            if self.pattern:
                return
            if positions.kind not in ("learned", "sinusoidal", "none"):
                raise MaxlmError(
                    f"positions.kind={positions.kind} without attention",
                    fix="use learned, sinusoidal or none",
                )
            return
        latent = attention.latent
        head_dim = attention.head_dim
        if latent is not None and positions.kind not in ("rope", "none"):
            raise MaxlmError(
                "latent attention turns queries", fix="use positions.kind=rope or none"
            )
        if latent is not None and positions.rotary_dim is not None:
            raise MaxlmError(
                f"positions.rotary_dim={positions.rotary_dim} with latent attention",
                fix="set attention.latent.rotary_dim alone",
            )
        if positions.kind != "rope":
            return
        if latent is not None:
            rotary_dim = latent.rotary_dim
        else:
            rotary_dim = positions.rotary_dim or head_dim
        if rotary_dim % 2:
            raise ValueError(f"rope needs an even head_dim, not {rotary_dim}")
        if rotary_dim > head_dim:
            raise MaxlmError(
                f"positions.rotary_dim={rotary_dim} of attention.head_dim={head_dim}",
                fix="turn at most all dimensions",
            )
        # Their base has the exponent R / (R − 2).
        scaling = positions.scaling
        if rotary_dim == 2 and isinstance(scaling, NtkScaling | DynamicNtkScaling):
            raise MaxlmError(
                f"scaling.kind={scaling.kind} of one pair of dimensions",
                fix="turn more of them, or use another scaling",
            )

    def build(
        self,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ) -> Any:
        """Builds the model; arguments as those of ``Transformer``."""
        raise NotImplementedError

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of layers, by turns; at least one."""
        if not self.pattern:
            window = self.attention.window if self.attention else None
            return (LayerKind(window=window),)
        return tuple(self._find_kind(entry) for entry in self.pattern)

    def _find_kind(self, entry: KindName | LayerKind) -> LayerKind:
        if isinstance(entry, LayerKind):
            return entry
        kind = self.kinds.get(entry)
        if kind is None:
            raise MaxlmError(
                f"pattern names {entry}, which is not among kinds",
                where="pattern",
                fix=suggest_kind(entry, self.kinds),
            )
        return kind

    def get_positions(self, kind: LayerKind) -> PositionsConfig:
        """Returns the positions of layers of a kind."""
        return kind.positions or self.positions

    def get_attention(self, kind: LayerKind) -> AttentionConfig | None:
        """Returns the attention of layers of a kind, by itself or within another mixer;
        None: they have none."""
        return find_attention(self._resolve_mixer(kind))

    def list_blocks(self) -> tuple[BlockConfig, ...]:
        """Lists what layers are built of, each once."""
        blocks = [stack.block for stack in self.layer_stacks]
        return tuple(dict.fromkeys(blocks))

    def list_mixers(self) -> tuple[Config, ...]:
        """Lists the mixers of layers, each once."""
        mixers = [block.mixer for block in self.list_blocks()]
        return tuple(dict.fromkeys(mixer for mixer in mixers if mixer is not None))

    def _list_blocks_with_shared(self) -> list[BlockConfig]:
        """Lists what layers with weights that others read too are built of."""
        blocks = self.list_blocks()
        return [block for block in blocks if isinstance(block.mixer, ReadsSharedBlock)]

    @property
    def shared_blocks(self) -> dict[str, BlockConfig]:
        """The modules of weights that several layers read, by name: of each, what the
        first of the layers is built of."""
        blocks: dict[str, BlockConfig] = {}
        for block in self._list_blocks_with_shared():
            assert isinstance(block.mixer, ReadsSharedBlock)
            blocks.setdefault(block.mixer.block, block)
        return blocks

    def get_shared_block(self, kind: LayerKind) -> str | None:
        """Returns the name of the shared module that layers of a kind read; None: they
        read none."""
        mixer = self._resolve_mixer(kind)
        return mixer.block if isinstance(mixer, ReadsSharedBlock) else None

    def list_attention(self) -> tuple[AttentionConfig, ...]:
        """Lists the attention of layers, each once."""
        configs = [find_attention(mixer) for mixer in self.list_mixers()]
        return tuple(dict.fromkeys(config for config in configs if config is not None))

    def _resolve_mixer(self, kind: LayerKind) -> Config | None:
        mixer = self._choose_mixer(kind)
        if kind.keys_of is None:
            return mixer
        if not isinstance(mixer, AttentionConfig) or mixer.latent is not None:
            raise MaxlmError(
                f"keys_of={kind.keys_of} for a mixer without keys and values of heads",
                where="kinds",
                fix="leave it out, or use attention",
            )
        # It has no maps to keys and values, so their norms have no part in it.
        return mixer.model_copy(update={"shares_keys": True})

    def _choose_mixer(self, kind: LayerKind) -> Config | None:
        if kind.attention is not None:
            if kind.mixer is not None:
                raise MaxlmError("both attention and mixer", fix="give one of them")
            return kind.attention
        mixer = kind.mixer or self.mixer
        if mixer == "none":
            return None
        if mixer is None and self.attention is None:
            raise MaxlmError("neither attention nor mixer", fix="give one of them")
        return mixer or self.attention

    def _resolve_ffn(self, kind: LayerKind, *, is_dense: bool) -> Config | None:
        if kind.mlp is not None:
            if kind.ffn is not None:
                raise MaxlmError("ffn beside mlp or moe", fix="leave the others out")
            return kind.mlp
        if kind.ffn == "none":
            return None
        if kind.ffn not in (None, "mlp", "moe"):
            return kind.ffn
        if kind.ffn is None and self.ffn is not None:
            return None if self.ffn == "none" else self.ffn
        # The first layers have the dense one in place of experts.
        is_mlp = kind.ffn == "mlp" or is_dense
        if kind.ffn is None and self.moe is None:
            is_mlp = True
        ffn = self.mlp if is_mlp else self.moe
        if ffn is None:
            name = kind.ffn if kind.ffn is not None else "mlp nor moe"
            message = (
                f"neither {name}" if kind.ffn is None else f"ffn={name}, but no {name}"
            )
            raise MaxlmError(message, fix="give one of them")
        return ffn

    def _resolve_layer(
        self, entry: KindName | LayerKind | None, *, is_dense: bool
    ) -> PatternLayer:
        """Returns what layers of a pattern's entry are made of; None: there is no
        pattern."""
        kind = self.layer_kinds[0] if entry is None else self._find_kind(entry)
        block = BlockConfig(
            mixer=self._resolve_mixer(kind),
            ffn=self._resolve_ffn(kind, is_dense=is_dense),
            norm=kind.norm or self.norm,
            placement=kind.placement or self.placement,
            residual_scale=self.residual_scale,
            mixer_scales=kind.mixer_scales,
            ffn_scales=kind.ffn_scales,
            layer_inputs=self.layer_inputs,
            scales_output=self.layer_scale,
            kind=self.block,
        )
        if block.mixer is None and block.ffn is None:
            raise MaxlmError(
                "a layer of neither mixer nor ffn", where="pattern", fix="give it one"
            )
        return PatternLayer(kind, block, entry if isinstance(entry, str) else "")

    def _list_period(self, *, is_dense: bool) -> list[PatternLayer]:
        entries = self.pattern or (None,)
        by_entry = {
            entry: self._resolve_layer(entry, is_dense=is_dense)
            for entry in dict.fromkeys(entries)
        }
        return [by_entry[entry] for entry in entries]

    @property
    def layer_runs(self) -> tuple[LayerRun, ...]:
        """The runs of layers, first to last. The main one, ``layers``, repeats its
        period as often as it goes; what stands before and after has its own, so that
        each is whole periods."""
        first_name, main_name, last_name = STACKS
        num_dense = self.dense_layers
        num_layers = self.num_layers
        experts_period = self._list_period(is_dense=False)
        length = len(experts_period)
        if num_dense:
            dense_period = self._list_period(is_dense=True)
            first = [dense_period[i % length] for i in range(num_dense)]
        else:
            first = []
        # The pattern goes on behind the dense layers; one longer than the model is cut.
        start = num_dense % length
        period = (experts_period[start:] + experts_period[:start])[
            : num_layers - num_dense
        ]
        num_periods, num_left = divmod(num_layers - num_dense, len(period))
        last = period[:num_left]

        are_unlike = len({layer.block for layer in period}) > 1
        is_list = num_periods == 1 and len(period) > LONGEST_SINGLE_PERIOD
        if are_unlike and is_list:
            # A list of all layers: some part of it may repeat all the same.
            layers = first + period + last
            repeats = find_repeats(layers)
            first = layers[: repeats.start]
            period = layers[repeats.start :][: repeats.period]
            num_periods = repeats.num_periods
            last = layers[repeats.stop :]

        runs = []
        if first:
            runs.append(make_shortest_run(first_name, first))
        runs.append(make_run(main_name, period, num_periods))
        if last:
            runs.append(make_shortest_run(last_name, last))
        return tuple(runs)

    def list_layer_numbers(self, stack_name: str) -> tuple[int, ...]:
        """Lists the places in the model, from 0 on, of a stack's layers."""
        places = (place for run in self.layer_runs for place in run.iterate_places())
        return tuple(
            number
            for number, place in enumerate(places)
            if place.stack.name == stack_name
        )

    @property
    def shared_kinds(self) -> frozenset[str]:
        """Names of the kinds whose keys and values other layers read."""
        kinds = (kind for run in self.layer_runs for kind in run.kinds)
        return frozenset(kind.keys_of for kind in kinds if kind.keys_of is not None)

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        """The stacks of layers of all runs."""
        return tuple(stack for run in self.layer_runs for stack in run.stacks)

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """All layers, in the order in which they are run."""
        return (TrunkSpec((*self.layer_runs, *self.mtp_runs)),)

    @property
    def mtp_runs(self) -> tuple[LayerRun, ...]:
        """The modules of ``mtp`` as a run of layers of the last kind, if there are
        any."""
        if self.mtp is None:
            return ()
        last = self.layer_runs[-1]
        block = last.stacks[last.turns[-1]].block
        return (make_mtp_run(self.mtp.num_modules, last.kinds[-1], block),)

    def score_scale(self, kind: LayerKind) -> float:
        """Returns the factor on q·k in layers of a kind; see ``YarnScaling.mscale``."""
        attention = self.get_attention(kind)
        if attention is None:
            return 1.0
        scale = attention.scale or attention.head_dim**-0.5
        scaling = self.get_positions(kind).scaling
        if not attention.latent or not isinstance(scaling, YarnScaling):
            return scale
        if scaling.mscale_all_dim:
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
        if self.moe is None:
            return 1.0
        return self.moe.experts_per_token / self.moe.num_experts

    def shrunk(
        self, *, vocab_size: int, num_layers: int, head_dim: int, seq_len: int
    ) -> Self:
        """Returns a small model of the same structure: the ratio of query to kv heads
        stays (up to 8), so do that of the FFN to the width, the kinds of layers (each
        once), ties, biases, norms, positions, gating and remat; experts are 8 at most,
        registered mixers and feed-forwards as they are; ``vocab_size`` and
        ``num_layers`` are upper bounds."""
        attention_configs = self.list_attention()
        d_model = 2 * head_dim
        old_head_dim = head_dim
        is_latent = False
        if attention_configs:
            attention = self.attention or attention_configs[0]
            old_head_dim = attention.head_dim
            is_latent = attention.latent is not None
            d_model = attention.shrunk(head_dim, seq_len).num_heads * head_dim
        shrinker = PartShrinker(
            head_dim,
            seq_len,
            d_model,
            old_head_dim=old_head_dim,
            old_d_model=self.d_model,
            is_latent=is_latent,
        )
        # Each kind once, so that a model of few layers has them all.
        pattern = tuple(
            entry if isinstance(entry, str) else shrinker.shrink_kind(entry)
            for entry in dict.fromkeys(self.pattern)
        )
        kinds = {name: shrinker.shrink_kind(kind) for name, kind in self.kinds.items()}
        # T5's, without which a narrow model's logits would hardly differ.
        scales_by_width = isclose(self.logit_scale, self.d_model**-0.5, rel_tol=1e-3)
        moe = None if self.moe is None else self.moe.limit_experts(8)
        vocab_size = min(self.vocab_size, vocab_size)
        frontend = self.frontend
        return self.model_copy(
            update={
                "vocab_size": vocab_size,
                "frontend": None if frontend is None else frontend.shrunk(vocab_size),
                "num_layers": min(self.num_layers, num_layers),
                "d_model": d_model,
                "max_seq_len": seq_len,
                "attention": shrinker.shrink_attention(self.attention),
                "mixer": shrinker.shrink_mixer(self.mixer),
                "mlp": shrinker.shrink_ffn(self.mlp),
                "moe": shrinker.shrink_ffn(moe),
                "dense_layers": min(self.dense_layers, 1),
                "kinds": kinds,
                "pattern": pattern,
                "positions": shrinker.shrink_positions(self.positions),
                "logit_scale": d_model**-0.5 if scales_by_width else self.logit_scale,
            }
        )
