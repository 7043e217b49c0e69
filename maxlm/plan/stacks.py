"""A model's stacks of layers as costs are counted: what each layer states of itself
(``models/costs.py``), joined with its parameters' declarations and with the tokens that it sees.

Layers of several stacks that have the same map count as so many of one kind.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from maxlm.models.architectures import Model
from maxlm.models.architectures.config import strip_stack
from maxlm.models.costs import Branch, BranchCosts, ExpertCosts, HeadCosts, Side
from maxlm.models.params import ParamSpec, flatten_names, param_specs, select_base


@dataclass(frozen=True)
class Kernel:
    """One matrix of a layer, or of what is before layers and after."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int
    """Leading dimensions that are summed over; of an expert's, behind the first."""
    needed_raw: bool = False
    """Whether the backward pass needs its product as it was before a norm or a clip."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def writes(self) -> Side:
        axes = set(self.axes[self.inputs + ("expert" in self.axes) :])
        if "latent" in axes:
            return "latent"
        if axes & {"heads", "kv_heads", "head_dim"}:
            return "heads"
        return "mlp" if "mlp" in axes else "residual"


@dataclass(frozen=True)
class Map:
    """Matrices of one module that read the same input, in one program (``parallel/linear.py``)."""

    name: str
    kernels: tuple[Kernel, ...]
    branch: Branch
    reads: Side
    experts: bool
    """Whether tokens choose among these, which lie in one array."""
    depth: int
    """Layers that have it."""
    rate: float = 1.0
    """Tokens that it maps for each of the batch: an encoder may have more or fewer."""

    @property
    def size(self) -> int:
        return sum(kernel.size for kernel in self.kernels)

    @property
    def writes(self) -> Side:
        return self.kernels[0].writes

    @property
    def module(self) -> str:
        return self.name.partition(":")[0]

    @property
    def width(self) -> int:
        """Width of what it reads; not of experts'."""
        return prod(self.kernels[0].shape[: self.kernels[0].inputs])


class Pairs(NamedTuple):
    """Layers whose attention has scores of the same pairs of tokens."""

    layers: float
    queries: int
    """Tokens of a row that look, ..."""
    keys: int
    """... and tokens that they look at."""
    causal: bool
    window: int | None
    heads: HeadCosts
    rate: float = 1.0
    """Tokens that look for each of the batch."""
    biased: bool = False
    """Whether scores gain learnt biases by distance."""


@dataclass(frozen=True)
class Stack:
    """Layers whose parameters lie in one stack."""

    name: str
    depth: int
    period: int
    """Layers that one turn of the scan runs."""
    specs: Mapping[str, ParamSpec]
    base_specs: Mapping[str, ParamSpec]
    """The same without what an adapter adds: what a step computes is counted of these."""
    maps: tuple[Map, ...]
    pairs: tuple[Pairs, ...]
    rate: float
    """Tokens that go through for each of the batch."""
    is_encoder: bool
    """Whether these are an encoder's, beside a decoder's."""
    branches: tuple[BranchCosts, ...]

    @property
    def cross_attention(self) -> bool:
        """Whether they look at an encoder's output as well."""
        return any(branch.branch == "cross_attention" for branch in self.branches)

    def heads(self, branch: Branch = "mixer") -> HeadCosts | None:
        """The heads of attention in a branch; None: it has none."""
        return next((own.costs.heads for own in self.branches if own.branch == branch), None)

    @property
    def experts(self) -> ExpertCosts | None:
        return next((own.costs.experts for own in self.branches if own.costs.experts), None)

    @property
    def router(self) -> Kernel | None:
        """The router of its experts; None: it has none."""
        for own in self.branches:
            if own.costs.experts:
                name = f"{self.name}.{own.module}.{own.costs.experts.router}"
                return make_kernel(name, self.base_specs[name])
        return None


def list_stacks(model: Model, seq_len: int, encoder_len: int) -> tuple[Stack, ...]:
    """Lists all stacks, in the order in which they are run.

    Args:
        encoder_len: tokens in a row of an encoder's, beside ``seq_len`` of its decoder's.
    """
    return tuple(_stacks(model, seq_len, encoder_len))


def _stacks(model: Model, seq_len: int, encoder_len: int) -> Iterator[Stack]:
    tree, inputs = param_specs(model), encoder_len / seq_len
    both = flatten_names(tree), flatten_names(select_base(tree))
    biased = model.config.positions.kind == "relative"
    for trunk in model.config.trunks:
        blocks = model.trunks[trunk.prefix].parts
        length, rate = (encoder_len, inputs) if trunk.is_encoder else (seq_len, 1.0)
        for part in trunk.parts:
            name, branches = f"{trunk.prefix}{part.name}", blocks[part.name].costs()
            own, base = (
                {n: s for n, s in specs.items() if n.startswith(f"{name}.")} for specs in both
            )
            pairs = []
            for branch in branches:
                if not (heads := branch.costs.heads):
                    continue
                if branch.branch == "cross_attention":
                    pairs.append(Pairs(part.depth, length, encoder_len, False, None, heads, rate))
                    continue
                layers = part.depth / len(part.kinds)
                one = Pairs(layers, length, length, trunk.causal, None, heads, rate, biased)
                pairs += [one._replace(window=kind.window) for kind in part.kinds]
            maps = _maps(name, branches, base, part.depth, rate, inputs)
            yield Stack(
                name=name,
                depth=part.depth,
                period=len(part.kinds),
                specs=own,
                base_specs=base,
                maps=maps,
                pairs=merge_pairs(pairs),
                rate=rate,
                is_encoder=trunk.is_encoder,
                branches=branches,
            )


def _maps(
    stack: str,
    branches: Iterable[BranchCosts],
    specs: Mapping[str, ParamSpec],
    depth: int,
    rate: float,
    encoder_rate: float,
) -> tuple[Map, ...]:
    """Joins the groups of matrices of one stack with their declarations.

    Raises:
        ValueError: costs that leave a matrix out.
    """
    maps, missing = [], {name for name, spec in specs.items() if spec.role == "matrix"}
    for branch in branches:
        for group in branch.costs.matrices:
            kernels = []
            for own in sorted(group.names):
                name = f"{stack}.{branch.module}.{own}"
                kernel = make_kernel(name, specs[name])
                kernels.append(replace(kernel, needed_raw=own in group.needed_raw))
                missing.discard(name)
            module = kernels[0].name.rpartition(".")[0]
            map_ = Map(
                name=f"{module}: {', '.join(each.name.rpartition('.')[2] for each in kernels)}",
                kernels=tuple(kernels),
                branch=branch.branch,
                reads=group.reads,
                experts="expert" in kernels[0].axes,
                depth=depth,
                rate=encoder_rate if group.reads == "memory" else rate,
            )
            maps.append(map_)
    if missing:
        raise ValueError(f"the costs of its module leave out the matrix {min(missing)}")
    return tuple(sorted(maps, key=lambda each: each.kernels[0].name.split(".")))


def make_kernel(name: str, spec: ParamSpec) -> Kernel:
    """A layer's own part of a stack of matrices."""
    own = strip_stack(name).removesuffix(".kernel")
    return Kernel(own, spec.shape[spec.lead :], spec.axes[spec.lead :], len(spec.contract))


def merge_maps(maps: Iterable[Map]) -> tuple[Map, ...]:
    """Each map once, with the layers of all that are equal."""
    depths: dict[Map, int] = {}
    for map_ in maps:
        alike = replace(map_, depth=0)
        depths[alike] = depths.get(alike, 0) + map_.depth
    return tuple(replace(map_, depth=depth) for map_, depth in depths.items())


def merge_pairs(pairs: Iterable[Pairs]) -> tuple[Pairs, ...]:
    """The same of pairs."""
    layers: dict[Pairs, float] = {}
    for own in pairs:
        alike = own._replace(layers=0)
        layers[alike] = layers.get(alike, 0) + own.layers
    return tuple(own._replace(layers=count) for own, count in layers.items())
