"""The settings of a transformer, and the layers that follow from them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PositiveInt

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures.mtp import MtpConfig, make_mtp_run
from maxlm.models.architectures.pattern import (
    FeedForwardChoice,
    KindName,
    LayerKind,
    MixerChoice,
    PatternEntry,
    suggest_kind,
)
from maxlm.models.architectures.runs import (
    LayerRun,
    LayerStack,
    PatternLayer,
    make_runs,
)
from maxlm.models.blocks import (
    BlockConfig,
    BlockKindChoice,
    Placement,
    ReadsSharedBlock,
    find_attention,
)
from maxlm.models.frontends import FrontendChoice
from maxlm.models.layer_inputs import LayerInputsConfig
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.moe import MoeConfig
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.remat import RematPolicy

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


class TransformerSettings(Config):
    """Settings of layers between an embedding and an output head."""

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

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of layers, by turns; at least one."""
        if not self.pattern:
            window = self.attention.window if self.attention else None
            return (LayerKind(window=window),)
        return tuple(self._find_kind(entry) for entry in self.pattern)

    def list_all_kinds(self) -> tuple[LayerKind, ...]:
        """Lists the kinds of layers, and that of ``mtp``'s modules if they name one."""
        if self.mtp is None or self.mtp.layer is None:
            return self.layer_kinds
        return (*self.layer_kinds, self._find_kind(self.mtp.layer, "mtp.layer"))

    def _find_kind(
        self, entry: KindName | LayerKind, where: str = "pattern"
    ) -> LayerKind:
        if isinstance(entry, LayerKind):
            return entry
        kind = self.kinds.get(entry)
        if kind is None:
            raise MaxlmError(
                f"{where} names {entry}, which is not among kinds",
                where=where,
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
        """Lists what layers are built of, those of ``mtp``'s modules included, each
        once."""
        runs = (*self.layer_runs, *self.mtp_runs)
        blocks = [stack.block for run in runs for stack in run.stacks]
        return tuple(dict.fromkeys(blocks))

    def list_mixers(self) -> tuple[Config, ...]:
        """Lists the mixers of layers, each once."""
        mixers = [block.mixer for block in self.list_blocks()]
        return tuple(dict.fromkeys(mixer for mixer in mixers if mixer is not None))

    def list_blocks_with_shared(self) -> list[BlockConfig]:
        """Lists what layers with weights that others read too are built of."""
        blocks = self.list_blocks()
        return [block for block in blocks if isinstance(block.mixer, ReadsSharedBlock)]

    @property
    def shared_blocks(self) -> dict[str, BlockConfig]:
        """The modules of weights that several layers read, by name: of each, what the
        first of the layers is built of."""
        blocks: dict[str, BlockConfig] = {}
        for block in self.list_blocks_with_shared():
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

    def list_period(self, *, is_dense: bool) -> list[PatternLayer]:
        """Lists the layers of the pattern, once. ``is_dense``: as they are among the
        first ``dense_layers``."""
        entries = self.pattern or (None,)
        by_entry = {
            entry: self._resolve_layer(entry, is_dense=is_dense)
            for entry in dict.fromkeys(entries)
        }
        return [by_entry[entry] for entry in entries]

    @property
    def layer_runs(self) -> tuple[LayerRun, ...]:
        """The runs of layers, first to last."""
        num_dense = self.dense_layers
        period = self.list_period(is_dense=False)
        length = len(period)
        first: list[PatternLayer] = []
        if num_dense:
            dense_period = self.list_period(is_dense=True)
            first = [dense_period[i % length] for i in range(num_dense)]
        # The pattern goes on behind the dense layers.
        start = num_dense % length
        period = period[start:] + period[:start]
        return make_runs(first, period, self.num_layers - num_dense)

    @property
    def mtp_runs(self) -> tuple[LayerRun, ...]:
        """The modules of ``mtp`` as a run of layers, if there are any."""
        mtp = self.mtp
        if mtp is None:
            return ()
        if mtp.layer is not None:
            layer = self._resolve_layer(mtp.layer, is_dense=False)
        else:
            last = self.layer_runs[-1]
            block = last.stacks[last.turns[-1]].block
            layer = PatternLayer(last.kinds[-1], block, kind_name="")
        return (make_mtp_run(mtp.num_modules, layer),)

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
