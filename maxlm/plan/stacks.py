"""Costs of a model's stacks of layers: what each layer states of itself
(``models/costs.py``), joined with its parameters' declarations and with the tokens that
it sees."""

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from maxlm.models.architectures import Model
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.mtp import MTP
from maxlm.models.architectures.runs import (
    LayerRun,
    LayerStack,
    TrunkSpec,
    strip_stack_name,
)
from maxlm.models.blocks import Placement
from maxlm.models.costs import AttentionCosts, Branch, ExpertRouting, FeatureKind
from maxlm.models.params import (
    ParamSpec,
    flatten_names,
    param_specs,
    select_dense_specs,
)


@dataclass(frozen=True)
class Kernel:
    """One matrix of a layer, or of what is before layers and after."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_input_dims: int
    """Leading dimensions that are summed over; of an expert's, behind the first."""
    needs_raw_output: bool = False
    """Whether the backward pass needs the product as it was before a norm or a clip."""
    is_named_qkv: bool = False
    """Whether remat policies keep its product by the name "qkv"."""
    is_trained: bool = True
    """Whether it has a gradient."""
    is_scanned: bool = True
    """Whether its layer is run in a scan, whose backward pass gathers it again."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def output_features(self) -> FeatureKind:
        # A dimension of experts comes before the inputs, and is not counted as one.
        first_output = self.num_input_dims + ("expert" in self.axes)
        axes = set(self.axes[first_output:])
        if axes == {None}:
            return "whole"
        if "latent" in axes:
            return "latent"
        if axes & {"heads", "kv_heads", "head_dim"}:
            return "heads"
        return "mlp" if "mlp" in axes else "residual"


def make_kernel(
    name: str,
    spec: ParamSpec,
    trained_names: Set[str],
    needs_raw_output: bool = False,
    *,
    stack: str = "",
) -> Kernel:
    """Makes the kernel of one layer from the declaration of a whole stack's, of that
    name."""
    return Kernel(
        name=strip_stack_name(name, stack).removesuffix(".kernel"),
        shape=spec.shape[spec.num_layer_axes :],
        axes=spec.axes[spec.num_layer_axes :],
        num_input_dims=len(spec.contracting_dims),
        needs_raw_output=needs_raw_output,
        is_trained=name in trained_names,
        is_scanned=stack != MTP,
    )


@dataclass(frozen=True)
class MatmulGroup:
    """Matrices of one module that read the same input, in one program
    (``parallel/linear.py``)."""

    kernels: tuple[Kernel, ...]
    branch: Branch
    input_features: FeatureKind
    token_ratio: float
    """Tokens that it maps for each of the batch: an encoder may have more or fewer."""
    placement: Placement = "pre"
    """Placement of its layer's norms."""
    is_last_branch: bool = True
    """Whether no other branch follows its own in the layer."""
    is_beside_attention: bool = False
    """Whether it is of another mixer in a layer that has attention."""
    reads_attention_input: bool = True
    """Whether, beside attention, it reads what attention does, in the same branch."""
    shares_input: bool = False
    """Whether another group reads the same input."""
    sum_kept_as: str | None = None
    """Name by which remat policies keep what its products are added to."""
    is_in_stream_layout: bool = False
    """Whether its module says that tokens lie as in the residual stream."""
    is_input_detached: bool = False
    """See :class:`~maxlm.models.costs.MatrixGroup`."""

    @property
    def is_parallel_to_attention(self) -> bool:
        """Whether its branch joins the stream with attention's, and has the same
        gradient."""
        is_parallel = self.placement in ("parallel", "parallel_shared")
        return self.branch == "ffn" and is_parallel

    @property
    def joins_attention(self) -> bool:
        """Whether it reads attention's input, and its result is added to attention's."""
        return self.is_beside_attention and self.reads_attention_input

    @property
    def shares_norm(self) -> bool:
        """Whether its input is that of attention."""
        return self.is_parallel_to_attention and self.placement == "parallel_shared"

    @property
    def backward_needs_output(self) -> bool:
        """Whether the backward pass needs what the branch, of which this is the last
        group, adds: for a norm behind it, or for the branch after it."""
        if self.placement == "pre":
            return not self.is_last_branch
        # With the norm on the stream itself, the next layer's norm reads the last sum.
        return self.placement in ("sandwich", "post", "output", "normed")

    @property
    def name(self) -> str:
        kernels = ", ".join(kernel.name.rpartition(".")[2] for kernel in self.kernels)
        return f"{self.module}: {kernels}"

    @property
    def module(self) -> str:
        return self.kernels[0].name.rpartition(".")[0]

    @property
    def has_experts(self) -> bool:
        return "expert" in self.kernels[0].axes

    @property
    def is_dense_ffn(self) -> bool:
        """Whether the group makes the hidden layer of an FFN that every token
        passes."""
        return (
            self.branch == "ffn"
            and self.output_features == "mlp"
            and not self.has_experts
        )

    @property
    def size(self) -> int:
        return sum(kernel.size for kernel in self.kernels)

    @property
    def output_features(self) -> FeatureKind:
        return self.kernels[0].output_features

    @property
    def latent_width(self) -> int:
        """Width of the narrow latent vectors that it writes."""
        return sum(k.shape[-1] for k in self.kernels if k.output_features == "latent")


def get_num_streams(config: TransformerConfig) -> int:
    """Returns the number of a model's residual streams."""
    return 1 if config.block is None else config.block.num_streams


class AttentionShape(NamedTuple):
    """Attention whose scores are of the same pairs of tokens in a row."""

    query_len: int
    key_len: int
    causal: bool
    window: int | None
    heads: AttentionCosts
    token_ratio: float
    """Queries for each token of the batch."""
    has_biases: bool = False
    """Whether scores gain learnt biases by distance."""


class StackCosts:
    """Costs of the layers whose parameters lie in one stack: parameters, matrix
    products, attention and experts.

    Args:
        seq_len: tokens of a row in a decoder.
        encoder_len: tokens of a row in an encoder beside it.
        trained_names: the base's parameters that have gradients.

    Raises:
        ValueError: a module's ``costs()`` leave out one of its matrices.
    """

    def __init__(
        self,
        model: Model,
        trunk: TrunkSpec,
        run: LayerRun,
        part: LayerStack,
        seq_len: int,
        encoder_len: int,
        trained_names: Set[str],
    ):
        self.name = f"{trunk.prefix}{part.name}"
        self.first_stack_of_run = f"{trunk.prefix}{run.stacks[0].name}"
        """Which scan runs its layers, by turns with those of other stacks."""
        self.num_layers = part.num_layers
        self.period = len(part.kinds)
        """Layers that one turn of the scan takes from the stack."""
        self.placement: Placement = part.block.placement
        self.num_streams = get_num_streams(model.config)
        """Arrays of the residual stream's width that layers hand on."""
        encoder_rate = encoder_len / seq_len
        self.token_ratio = encoder_rate if trunk.is_encoder else 1.0
        """Tokens that go through for each of the batch."""
        tree = param_specs(model)
        self.specs = self._select_own(flatten_names(tree))
        """All parameters."""
        all_base_specs = flatten_names(select_dense_specs(tree))
        self.base_specs = self._select_own(all_base_specs)
        """Parameters without those that an adapter adds."""
        self.branches = model.trunks[trunk.prefix].stacks[part.name].costs()
        self.num_branches = len(self.branches)
        self.cross_attention = any(
            branch.branch == "cross_attention" for branch in self.branches
        )
        self.shared_names = frozenset(
            f"{trunk.prefix}{branch.module}"
            for branch in self.branches
            if branch.is_shared
        )
        """Modules whose weights its layers read and lie outside of all stacks."""
        self.matmul_groups = self._list_matmuls(
            trunk, trained_names, encoder_rate, all_base_specs
        )
        """Matrix products by name; without what an adapter adds, like the router."""
        self.adapter_kernels = self._list_adapter_kernels(
            flatten_names(tree), all_base_specs
        )
        """Matrices that an adapter adds."""
        self.experts: ExpertRouting | None = None
        self.router: Kernel | None = None
        for branch in self.branches:
            experts = branch.costs.experts
            if experts is not None:
                path = f"{self.name}.{branch.module}.{experts.router}"
                self.router = make_kernel(
                    path, self.base_specs[path], trained_names, stack=self.name
                )
                self.experts = experts
        has_biases = model.config.positions.kind == "relative"
        self.attention_layer_counts = self._count_attention_layers(
            trunk, part, seq_len, encoder_len, has_biases
        )
        """Number of layers of each shape."""

    def heads(self, branch: Branch = "mixer") -> AttentionCosts | None:
        """Returns the heads of one of a layer's branches; None: it has no such branch,
        or no attention in it."""
        for costs in self.branches:
            if costs.branch == branch:
                return costs.costs.attention
        return None

    def _select_own(self, specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
        """Selects the parameters of this stack from all of a model's."""
        prefix = f"{self.name}."
        return {name: spec for name, spec in specs.items() if name.startswith(prefix)}

    def _list_adapter_kernels(
        self, specs: Mapping[str, ParamSpec], base_specs: Mapping[str, ParamSpec]
    ) -> tuple[Kernel, ...]:
        # By identity: an adapter's matrix may be declared like one of the base's.
        base = {id(spec) for spec in base_specs.values()}
        modules = tuple(f"{name}." for name in (self.name, *self.shared_names))
        added = {
            name: spec
            for name, spec in specs.items()
            if name.startswith(modules)
            and spec.role == "matrix"
            and id(spec) not in base
        }
        return tuple(
            make_kernel(name, spec, added.keys(), stack=self.name)
            for name, spec in added.items()
        )

    def _count_attention_layers(
        self,
        trunk: TrunkSpec,
        part: LayerStack,
        seq_len: int,
        encoder_len: int,
        has_biases: bool,
    ) -> Counter[AttentionShape]:
        query_len = encoder_len if trunk.is_encoder else seq_len
        layers_per_kind = part.num_layers // len(part.kinds)
        counts: Counter[AttentionShape] = Counter()
        for branch in self.branches:
            heads = branch.costs.attention
            if heads is None:
                continue
            if branch.branch == "cross_attention":
                attention = AttentionShape(
                    query_len=query_len,
                    key_len=encoder_len,
                    causal=False,
                    window=None,
                    heads=heads,
                    token_ratio=self.token_ratio,
                )
                counts[attention] += part.num_layers
                continue
            for kind in part.kinds:
                attention = AttentionShape(
                    query_len=query_len,
                    key_len=query_len,
                    causal=trunk.causal,
                    window=kind.window,
                    heads=heads,
                    token_ratio=self.token_ratio,
                    has_biases=has_biases,
                )
                counts[attention] += layers_per_kind
        return counts

    def _list_matmuls(
        self,
        trunk: TrunkSpec,
        trained_names: Set[str],
        encoder_rate: float,
        specs: Mapping[str, ParamSpec],
    ) -> tuple[MatmulGroup, ...]:
        groups = []
        missing = {
            name for name, spec in self.base_specs.items() if spec.role == "matrix"
        }
        has_ffn = any(
            branch.branch == "ffn" and not branch.is_shared for branch in self.branches
        )
        for branch in self.branches:
            is_last_branch = branch.branch == "ffn" or not has_ffn
            if branch.is_shared:
                # The layer's own maps read what it gives.
                is_last_branch = False
            path = f"{self.name}.{branch.module}"
            if branch.is_shared:
                path = f"{trunk.prefix}{branch.module}"
            for matrices in branch.costs.matrices:
                kernels = []
                for matrix in sorted(matrices.names):
                    name = f"{path}.{matrix}"
                    kernel = make_kernel(
                        name,
                        specs[name],
                        trained_names,
                        needs_raw_output=matrix in matrices.needs_raw_output,
                        stack=self.name,
                    )
                    kept_names = matrices.kept_products
                    is_kept = kernel.output_features == "heads"
                    if kept_names is not None:
                        is_kept = matrix in kept_names
                    kernels.append(replace(kernel, is_named_qkv=is_kept))
                    missing.discard(name)
                reads_encoder = matrices.input_features == "memory"
                group = MatmulGroup(
                    kernels=tuple(kernels),
                    branch=branch.branch,
                    input_features=matrices.input_features,
                    token_ratio=encoder_rate if reads_encoder else self.token_ratio,
                    placement=self.placement,
                    is_last_branch=is_last_branch,
                    is_beside_attention=matrices.is_beside_attention,
                    reads_attention_input=matrices.reads_attention_input,
                    shares_input=matrices.shares_input,
                    sum_kept_as=matrices.sum_kept_as,
                    is_in_stream_layout=matrices.is_in_stream_layout,
                    is_input_detached=matrices.is_input_detached,
                )
                groups.append(group)
        if missing:
            raise ValueError(
                f"the costs of its module leave out the matrix {min(missing)}"
            )
        return tuple(sorted(groups, key=lambda group: group.kernels[0].name.split(".")))
