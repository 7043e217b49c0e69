"""A model's stacks of layers as costs are counted: what each layer states of itself
(``models/costs.py``), joined with its parameters' declarations and with the tokens that it sees."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from maxlm.models.architectures import Model
from maxlm.models.architectures.config import strip_stack_name
from maxlm.models.costs import AttentionCosts, Branch, BranchCosts, ExpertCosts, FeatureKind
from maxlm.models.params import ParamSpec, flatten_names, param_specs, select_base_params


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
    own = strip_stack_name(name).removesuffix(".kernel")
    how = len(spec.contracting_dims), needs_raw_output, name in trained_names
    return Kernel(own, shape, axes, *how)


@dataclass(frozen=True)
class MatmulGroup:
    """Matrices of one module that read the same input, in one program (``parallel/linear.py``)."""

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
        """Whether the group makes the hidden layer of an FFN that every token passes."""
        return self.branch == "ffn" and self.output_features == "mlp" and not self.has_experts

    @property
    def size(self) -> int:
        return sum(kernel.size for kernel in self.kernels)

    @property
    def output_features(self) -> FeatureKind:
        return self.kernels[0].output_features

    @property
    def input_width(self) -> int:
        """Width of the input; not for experts."""
        return prod(self.kernels[0].shape[: self.kernels[0].num_input_dims])

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


@dataclass(frozen=True)
class Stack:
    """Layers whose parameters lie in one stack."""

    name: str
    num_layers: int
    period: int
    """Layers that one turn of the scan runs."""
    specs: Mapping[str, ParamSpec]
    base_specs: Mapping[str, ParamSpec]
    """``specs`` without what an adapter adds."""
    branches: tuple[BranchCosts, ...]
    matmul_groups: tuple[MatmulGroup, ...]
    """Matrix products by name; without what an adapter adds, like the router."""
    adapter_kernels: tuple[Kernel, ...]
    """Matrices that an adapter adds."""
    router: Kernel | None
    attention_layer_counts: Counter[AttentionShape]
    """Number of layers of each shape."""
    token_ratio: float
    """Tokens that go through for each of the batch."""

    @property
    def cross_attention(self) -> bool:
        return any(branch.branch == "cross_attention" for branch in self.branches)

    def heads(self, branch: Branch = "mixer") -> AttentionCosts | None:
        return next((own.costs.attention for own in self.branches if own.branch == branch), None)

    @property
    def experts(self) -> ExpertCosts | None:
        return next((own.costs.experts for own in self.branches if own.costs.experts), None)


def list_stacks(
    model: Model, seq_len: int, encoder_len: int, trained_names: Set[str]
) -> Iterator[Stack]:
    """Lists all stacks, in the order in which they are run, of rows of ``encoder_len`` tokens in an
    encoder beside ``seq_len`` in its decoder; ``trained_names``: the base's parameters that have
    gradients."""
    tree, encoder_rate = param_specs(model), encoder_len / seq_len
    all_specs, base_specs = flatten_names(tree), flatten_names(select_base_params(tree))
    biased = model.config.positions.kind == "relative"
    for trunk in model.config.trunks:
        length, rate = (encoder_len, encoder_rate) if trunk.is_encoder else (seq_len, 1.0)
        for part in trunk.stacks:
            name = f"{trunk.prefix}{part.name}"
            branches = model.trunks[trunk.prefix].stacks[part.name].costs()
            specs, base = (
                {n: spec for n, spec in each.items() if n.startswith(f"{name}.")}
                for each in (all_specs, base_specs)
            )
            attention: Counter[AttentionShape] = Counter()
            router = None
            for branch in branches:
                heads, experts = branch.costs.attention, branch.costs.experts
                if heads and branch.branch == "cross_attention":
                    own = AttentionShape(length, encoder_len, False, None, heads, rate)
                    attention[own] += part.num_layers
                elif heads:
                    for kind in part.kinds:
                        seen = trunk.causal, kind.window, heads, rate, biased
                        own = AttentionShape(length, length, *seen)
                        attention[own] += part.num_layers // len(part.kinds)
                if experts:
                    path = f"{name}.{branch.module}.{experts.router}"
                    router = make_kernel(path, base[path], trained_names)
            yield Stack(
                name=name,
                num_layers=part.num_layers,
                period=len(part.kinds),
                specs=specs,
                base_specs=base,
                branches=branches,
                matmul_groups=_list_matmuls(
                    name, branches, base, trained_names, rate, encoder_rate
                ),
                adapter_kernels=tuple(
                    make_kernel(n, spec, specs.keys())
                    for n, spec in specs.items()
                    if spec.role == "matrix" and all(spec is not own for own in base.values())
                ),
                router=router,
                attention_layer_counts=attention,
                token_ratio=rate,
            )


def _list_matmuls(
    stack: str,
    branches: Sequence[BranchCosts],
    specs: Mapping[str, ParamSpec],
    trained_names: Set[str],
    rate: float,
    encoder_rate: float,
) -> tuple[MatmulGroup, ...]:
    """Joins the groups of matrices of one stack with their declarations."""
    groups, missing = [], {name for name, spec in specs.items() if spec.role == "matrix"}
    for branch in branches:
        for group in branch.costs.matrices:
            kernels = []
            for own in sorted(group.names):
                name = f"{stack}.{branch.module}.{own}"
                raw = own in group.needs_raw_output
                kernels.append(make_kernel(name, specs[name], trained_names, raw))
                missing.discard(name)
            tokens = encoder_rate if group.input_features == "memory" else rate
            groups.append(MatmulGroup(tuple(kernels), branch.branch, group.input_features, tokens))
    if missing:
        raise ValueError(f"the costs of its module leave out the matrix {min(missing)}")
    return tuple(sorted(groups, key=lambda group: group.kernels[0].name.split(".")))
