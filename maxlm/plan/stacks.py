"""A model's stacks of layers as costs are counted: what each layer states of itself
(``models/costs.py``), joined with its parameters' declarations and with the tokens that
it sees."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from maxlm.models.architectures import Model
from maxlm.models.architectures.config import LayerStack, TrunkSpec, strip_stack_name
from maxlm.models.costs import AttentionCosts, Branch, ExpertCosts, FeatureKind
from maxlm.models.params import (
    ParamSpec,
    flatten_names,
    param_specs,
    select_base_params,
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
    is_trained: bool = True
    """Whether it has a gradient."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def output_features(self) -> FeatureKind:
        axes = set(self.axes[self.num_input_dims + ("expert" in self.axes) :])
        if "latent" in axes:
            return "latent"
        if axes & {"heads", "kv_heads", "head_dim"}:
            return "heads"
        return "mlp" if "mlp" in axes else "residual"


def make_kernel(
    name: str, spec: ParamSpec, trained_names: Set[str], needs_raw_output: bool = False
) -> Kernel:
    """Makes a layer's own part of a stack of matrices."""
    shape, axes = spec.shape[spec.num_layer_axes :], spec.axes[spec.num_layer_axes :]
    how = len(spec.contracting_dims), needs_raw_output, name in trained_names
    return Kernel(strip_stack_name(name).removesuffix(".kernel"), shape, axes, *how)


@dataclass(frozen=True)
class MatmulGroup:
    """Matrices of one module that read the same input, in one program
    (``parallel/linear.py``)."""

    kernels: tuple[Kernel, ...]
    branch: Branch
    input_features: FeatureKind
    token_ratio: float
    """Tokens that it maps for each of the batch: an encoder may have more or fewer."""

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


class AttentionShape(NamedTuple):
    """Attention whose scores are of the same pairs of tokens in a row."""

    query_len: int
    key_len: int
    causal: bool
    window: int | None
    heads: AttentionCosts
    token_ratio: float
    """Queries for each token of the batch."""
    biased: bool = False
    """Whether scores gain learnt biases by distance."""


class Stack:
    """Layers whose parameters lie in one stack.

    Args:
        seq_len: tokens of a row in a decoder.
        encoder_len: tokens of a row in an encoder beside it.
        trained_names: the base's parameters that have gradients.
    """

    def __init__(
        self,
        model: Model,
        trunk: TrunkSpec,
        part: LayerStack,
        seq_len: int,
        encoder_len: int,
        trained_names: Set[str],
    ):
        self.name = f"{trunk.prefix}{part.name}"
        self.num_layers = part.num_layers
        self.period = len(part.kinds)
        """Layers that one turn of the scan runs."""
        encoder_rate = encoder_len / seq_len
        length, rate = (
            (encoder_len, encoder_rate) if trunk.is_encoder else (seq_len, 1.0)
        )
        self.token_ratio = rate
        """Tokens that go through for each of the batch."""
        tree = param_specs(model)
        self.specs, self.base_specs = (
            {
                n: spec
                for n, spec in flatten_names(each).items()
                if n.startswith(f"{self.name}.")
            }
            for each in (tree, select_base_params(tree))
        )
        """All parameters, and those without what an adapter adds."""
        self.branches = model.trunks[trunk.prefix].stacks[part.name].costs()
        self.cross_attention = any(
            own.branch == "cross_attention" for own in self.branches
        )
        self.matmul_groups = self._list_matmuls(trained_names, encoder_rate)
        """Matrix products by name; without what an adapter adds, like the router."""
        self.adapter_kernels = tuple(
            make_kernel(n, spec, self.specs.keys())
            for n, spec in self.specs.items()
            if spec.role == "matrix"
            and all(spec is not own for own in self.base_specs.values())
        )
        """Matrices that an adapter adds."""
        self.experts: ExpertCosts | None = None
        self.router: Kernel | None = None
        self.attention_layer_counts: Counter[AttentionShape] = Counter()
        """Number of layers of each shape."""
        biased = model.config.positions.kind == "relative"
        for branch in self.branches:
            heads, experts = branch.costs.attention, branch.costs.experts
            if heads and branch.branch == "cross_attention":
                own = AttentionShape(length, encoder_len, False, None, heads, rate)
                self.attention_layer_counts[own] += part.num_layers
            elif heads:
                for kind in part.kinds:
                    seen = trunk.causal, kind.window, heads, rate, biased
                    own = AttentionShape(length, length, *seen)
                    self.attention_layer_counts[own] += part.num_layers // len(
                        part.kinds
                    )
            if experts:
                path = f"{self.name}.{branch.module}.{experts.router}"
                self.router = make_kernel(path, self.base_specs[path], trained_names)
                self.experts = experts

    def heads(self, branch: Branch = "mixer") -> AttentionCosts | None:
        return next(
            (own.costs.attention for own in self.branches if own.branch == branch), None
        )

    def _list_matmuls(
        self, trained_names: Set[str], encoder_rate: float
    ) -> tuple[MatmulGroup, ...]:
        groups = []
        specs = self.base_specs
        missing = {name for name, spec in specs.items() if spec.role == "matrix"}
        for branch in self.branches:
            for group in branch.costs.matrices:
                kernels = []
                for own in sorted(group.names):
                    name = f"{self.name}.{branch.module}.{own}"
                    raw = own in group.needs_raw_output
                    kernels.append(make_kernel(name, specs[name], trained_names, raw))
                    missing.discard(name)
                reads = group.input_features
                tokens = encoder_rate if reads == "memory" else self.token_ratio
                groups.append(MatmulGroup(tuple(kernels), branch.branch, reads, tokens))
        if missing:
            raise ValueError(
                f"the costs of its module leave out the matrix {min(missing)}"
            )
        return tuple(sorted(groups, key=lambda group: group.kernels[0].name.split(".")))
