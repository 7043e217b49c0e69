"""Costs of a layer, as each module states them of itself; the plan adds them up.

How large a module's matrices are and what they write follows from their declarations.
The module says which of them are multiplied with one input, and what that input is; and
what there is besides, such as scores of attention. A module without ``costs`` is
counted by :func:`group_matrices`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

from flax import nnx

from maxlm.models.params import flatten_names, param_specs, select_dense_specs

FeatureKind = Literal["residual", "memory", "latent", "heads", "mlp", "whole"]
"""Sides of matrices: the residual stream, an encoder's output, a narrow vector of
latent attention, heads, the hidden layer of an MLP, or a vector that no device
splits."""
Branch = Literal["mixer", "cross_attention", "ffn"]


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices that are multiplied with one input, in one program
    (``parallel/linear.py``)."""

    names: tuple[str, ...]
    """Names of the parameters within the module, such as ``query.kernel``."""
    input_features: FeatureKind = "residual"
    needs_raw_output: tuple[str, ...] = ()
    """Parameters whose products the backward pass needs as they were before a norm or a
    clip."""
    kept_products: tuple[str, ...] | None = None
    """Parameters whose products a mixer names "qkv" for remat policies
    (``models/remat.py``); None: those that write heads."""
    is_beside_attention: bool = False
    """Whether they are of another mixer in a layer that has attention."""
    reads_attention_input: bool = True
    """Whether, beside attention, they read what it reads, and their result is added to
    its."""
    shares_input: bool = False
    """Whether another group reads the same input, which crosses the wire for that
    one."""
    sum_kept_as: Literal["qkv", "mlp_up"] | None = None
    """Name by which remat policies keep the sum that its products are a term of; None:
    they are no term of another group's."""
    is_in_stream_layout: bool = False
    """Whether tokens lie as in the residual stream, in what they read and write."""
    is_input_detached: bool = False
    """Whether their input has no gradient of theirs; another group reads it too."""


@dataclass(frozen=True)
class AttentionCosts:
    """Heads of attention: each has a score for each pair of tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    kv_axis: str = "kv_heads"
    """Logical axis of the kv heads in use."""
    shared_key_dim: int = 0
    """Dimensions of a key that all heads share."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    chunk: int | None = None
    """Positions of a chunk, whose tokens alone see each other; None: all do."""
    gate_dim: int = 0
    """Numbers of a head's output gate; 0: it has none."""
    makes_keys: bool = True
    """Whether the layer makes keys and values, and does not read another's."""
    index_dim: int = 0
    """Numbers of an indexer's query, all its heads together with their weights, that
    each score of its takes; above 0, XLA computes attention to all tokens in training,
    not a kernel."""
    index_heads: int = 0
    """The indexer's heads."""


@dataclass(frozen=True)
class ExpertRouting:
    """Experts of a layer, of which a token passes some; what they cost follows from
    their matrices."""

    router: str
    """Name of the router's parameter within the module."""
    experts_per_token: int
    num_experts: int
    capacity_factor: float | None
    """Room of an expert over its equal share; None: it takes all that come."""
    has_shared: bool
    """Whether a dense layer beside them reads the same input."""
    gates_shared: bool = False
    """Whether that layer's output is multiplied by a gate."""
    input_dim: int | None = None
    """Width of the rows that experts read and write; None: d_model."""


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer of a module."""

    matrices: tuple[MatrixGroup, ...] = ()
    attention: AttentionCosts | None = None
    experts: ExpertRouting | None = None
    extra_flops: float = 0.0
    """Forward FLOPs a token beside matrices and scores, such as those of a
    recurrence."""
    product_flops: float = 0.0
    """Those of ``extra_flops`` that are matrix products in fp32, such as a chunk's with
    itself."""
    flops_axes: tuple[str, ...] = ()
    """Logical axes that these, and ``working_elements``, are split over."""
    shared_elements: float = 0.0
    """Elements a token of arrays that all devices which split these have whole, and
    whose gradients are summed over them, such as what all channels of a recurrence
    read."""
    exchanged_elements: float = 0.0
    """Elements, in fp32 and split over ``flops_axes``, that devices which share a
    sequence exchange of each of its runs: what a run does to a state."""
    halo_elements: float = 0.0
    """The same in the compute dtype: last inputs of a run that convolutions read in the
    next one."""
    reduced_elements: float = 0.0
    """Numbers a token, in fp32, that devices which split ``flops_axes`` add up, such as
    the mean square of a norm over all heads."""
    saved_elements: float = 0.0
    """Elements a token, in the compute dtype and split over ``flops_axes``, of arrays
    that remat policies keep by the name "attention": a recurrence's output."""
    state_elements: float = 0.0
    """Elements, in fp32 and split likewise, of a state, of which they keep one for every
    ``state_tokens`` of a run, or for a shorter run."""
    state_tokens: int = 1
    intermediate_elements: float = 0.0
    """Elements a token, in the compute dtype and split likewise, of other arrays that
    the backward pass needs: kept without remat, otherwise made again while the module
    is differentiated."""
    working_elements: float = 0.0
    """Elements a token, in fp32 and split likewise, of arrays that are alive beside all
    these while the module is differentiated."""
    block_elements: float = 0.0
    """The same of arrays that are there for ``block_tokens`` of each row at a time, where
    no TPU's kernel has them on the chip."""
    block_tokens: int = 0
    chunk_tokens: int = 1
    """Tokens of the chunks that a block consists of, whose matrices are smaller where a
    run is shorter."""
    kernel_elements: float = 0.0
    """The same as ``working_elements``, of a TPU's kernel."""


class BranchCosts(NamedTuple):
    """Costs of one of a layer's branches of the residual stream, or of a part of it."""

    branch: Branch
    module: str
    """Its module's name within the layer; where layers share it, within the trunk."""
    costs: LayerCosts
    is_shared: bool = False
    """Whether its weights lie outside of the layers' stacks, and other layers read them
    too."""


def get_costs(module: object) -> LayerCosts:
    """Returns a module's own ``costs()``, or those of its matrices by their
    declarations."""
    count_costs: Callable[[], LayerCosts] | None = getattr(module, "costs", None)
    if count_costs is None:
        return LayerCosts(group_matrices(cast(nnx.Module, module)))
    return count_costs()


def prefix_names(module: str, groups: Iterable[MatrixGroup]) -> tuple[MatrixGroup, ...]:
    """Returns groups of a submodule's matrices by their names in the module."""

    def prefix(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{module}.{name}" for name in names)

    return tuple(
        replace(
            group,
            names=prefix(group.names),
            needs_raw_output=prefix(group.needs_raw_output),
            kept_products=(
                None if group.kept_products is None else prefix(group.kept_products)
            ),
        )
        for group in groups
    )


def list_branch_costs(
    branch: Branch, name: str, module: object
) -> tuple[BranchCosts, ...]:
    """Lists costs of a branch by its parts, as a module's own ``branch_costs()`` has
    them: those of a mixer with a feed-forward in it, or with weights that layers
    share."""
    list_parts: Callable[[str], tuple[BranchCosts, ...]] | None
    list_parts = getattr(module, "branch_costs", None)
    if list_parts is None:
        return (BranchCosts(branch, name, get_costs(module)),)
    return list_parts(name)


def group_matrices(module: nnx.Module) -> tuple[MatrixGroup, ...]:
    """Groups a module's matrices by submodule and input: heads or an MLP's hidden
    layer, where their axes say so, otherwise the residual stream."""
    groups: dict[tuple[str, FeatureKind], list[str]] = {}
    specs = flatten_names(select_dense_specs(param_specs(module)))
    for name, spec in specs.items():
        if spec.role != "matrix":
            continue
        input_axes = {spec.axes[dim] for dim in spec.contracting_dims}
        features: FeatureKind = "residual"
        if "heads" in input_axes:
            features = "heads"
        elif "mlp" in input_axes:
            features = "mlp"
        elif "latent" in input_axes:
            features = "latent"
        submodule = name.removesuffix(".kernel").rpartition(".")[0]
        groups.setdefault((submodule, features), []).append(name)
    return tuple(
        MatrixGroup(tuple(names), features) for (_, features), names in groups.items()
    )
