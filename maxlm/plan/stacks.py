"""A model's stacks of layers as costs are counted: which matrices of a layer are multiplied
together, what they read, and how many pairs of tokens its attention has scores for.

Layers of several stacks that have the same map count as so many of one kind.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

from maxlm.models.architectures.config import TransformerConfig, strip_stack
from maxlm.models.params import ParamSpec

Side = Literal["residual", "memory", "latent", "heads", "mlp"]
"""What maps read and write: the residual stream, an encoder's output, a narrow vector of latent
attention, heads, or the hidden layer of an MLP."""


@dataclass(frozen=True)
class Kernel:
    """One matrix of a layer, or of what is before layers and after."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int
    """Leading dimensions that are summed over; of an expert's, behind the first."""

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
    maps: tuple[Map, ...]
    pairs: tuple[Pairs, ...]
    rate: float
    """Tokens that go through for each of the batch."""
    is_encoder: bool
    """Whether these are an encoder's, beside a decoder."""
    cross_attention: bool
    """Whether they look at an encoder's output as well."""

    @property
    def experts(self) -> bool:
        return any(map_.experts for map_ in self.maps)


def list_stacks(
    model: TransformerConfig, specs: Mapping[str, ParamSpec], seq_len: int, encoder_len: int
) -> tuple[Stack, ...]:
    """All stacks, in the order in which they are run.

    Args:
        specs: of all of the model's parameters.
        encoder_len: tokens in a row of an encoder's, beside ``seq_len`` of its decoder's.
    """
    return tuple(_stacks(model, specs, seq_len, encoder_len))


def _stacks(
    model: TransformerConfig, specs: Mapping[str, ParamSpec], seq_len: int, encoder_len: int
) -> Iterator[Stack]:
    inputs = encoder_len / seq_len
    for trunk in model.trunks:
        length, rate = (encoder_len, inputs) if trunk.is_encoder else (seq_len, 1.0)
        for part in trunk.parts:
            name = f"{trunk.prefix}{part.name}"
            own = {n: s for n, s in specs.items() if n.startswith(f"{name}.")}
            biased = model.positions.kind == "relative"
            one = Pairs(1, length, length, trunk.causal, None, rate, biased)
            looks = [one._replace(window=kind.window) for kind in part.kinds]
            pairs = [p._replace(layers=part.depth / len(looks)) for p in looks]
            if trunk.cross_attention:
                pairs.append(Pairs(part.depth, length, encoder_len, False, None, rate))
            maps = tuple(_maps(own, part.depth, rate, inputs))
            what = (rate, trunk.is_encoder, trunk.cross_attention)
            yield Stack(name, part.depth, len(part.kinds), own, maps, merge_pairs(pairs), *what)


def _maps(
    specs: Mapping[str, ParamSpec], depth: int, rate: float, encoder_rate: float
) -> Iterator[Map]:
    """Groups the matrices of one stack."""
    groups: dict[tuple[str, Side, str], list[Kernel]] = {}
    for name, spec in specs.items():
        if spec.role == "matrix":
            kernel = make_kernel(name, spec)
            module = kernel.name.rpartition(".")[0]
            groups.setdefault((module, *_source(kernel, specs)), []).append(kernel)
    for (module, reads, _), kernels in groups.items():
        yield Map(
            name=f"{module}: {', '.join(kernel.name.rpartition('.')[2] for kernel in kernels)}",
            kernels=tuple(kernels),
            reads=reads,
            experts="expert" in kernels[0].axes,
            depth=depth,
            rate=encoder_rate if reads == "memory" else rate,
        )


def _source(kernel: Kernel, specs: Mapping[str, ParamSpec]) -> tuple[Side, str]:
    """Returns the side that a kernel reads; and of narrow vectors, the kernel that writes them."""
    if _reads_memory(kernel.name):
        return "memory", ""
    behind = {"query": "query_down", "key_up": "key_down", "value_up": "key_down"}
    before = behind.get(kernel.name.rpartition(".")[2], "")
    if any(name.endswith(f".{before}.kernel") for name in specs):
        return "latent", before
    inputs = set(kernel.axes[: kernel.inputs + ("expert" in kernel.axes)])
    return ("heads" if "heads" in inputs else "mlp" if "mlp" in inputs else "residual"), ""


def _reads_memory(name: str) -> bool:
    """Whether a parameter maps an encoder's output within a decoder's layers."""
    return name.removesuffix(".kernel").endswith(("cross.key", "cross.value"))


def has_encoder_inputs(name: str, model: TransformerConfig) -> bool:
    """Whether a parameter is multiplied with an encoder's tokens, beside a decoder's."""
    encoders = tuple(trunk.prefix for trunk in model.trunks if trunk.is_encoder)
    return name.startswith(encoders) or _reads_memory(name)


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
