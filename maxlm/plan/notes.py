"""Notes on a plan, one line each."""

from collections.abc import Mapping

from maxlm.models.placement import PlacedModel
from maxlm.parallel.pipeline import bubble_ratio
from maxlm.run import RunConfig
from maxlm.sharding import MESH_AXES


def list_layout_notes(
    config: RunConfig,
    placed: PlacedModel,
    sizes: Mapping[str, int],
    links: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Lists notes on how a run is parallel.

    Args:
        links: what each mesh axis runs over, where devices are at hand.
    """
    return tuple(
        line
        for line in (
            _mesh(sizes, links),
            _zero(placed, sizes),
            _sequence(placed, sizes),
            _context(config, placed, sizes),
            _kv_heads(config, placed, sizes),
            _pipeline(config, sizes),
            _muon(config, placed),
        )
        if line
    )


def _ways(axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    return " · ".join(f"{axis}={sizes[axis]}" for axis in axes)


def _mesh(sizes: Mapping[str, int], links: Mapping[str, str] | None) -> str | None:
    used = [axis for axis in MESH_AXES if sizes[axis] > 1]
    if not used:
        return None
    where = {axis: f" ({links[axis]})" if links else "" for axis in used}
    line = " → ".join(f"{axis}={sizes[axis]}{where[axis]}" for axis in used)
    return f"devices, from the slowest links to the fastest: {line}"


def _zero(placed: PlacedModel, sizes: Mapping[str, int]) -> str | None:
    """Where parameters, gradients and optimizer state are split that the maths wants whole."""
    whole = set(placed.compute.embed)
    parts = {
        "parameters": placed.storage,
        "gradients": placed.gradients,
        "optimizer state": placed.optimizer,
    }
    split = {
        name: tuple(axis for axis in rules.embed if axis not in whole)
        for name, rules in parts.items()
    }
    kept = [f"{name} over {_ways(axes, sizes)}" for name, axes in split.items() if axes]
    if not kept:
        return None
    kind = {3: "ZeRO-3", 2: "ZeRO-2", 1: "ZeRO-1"}[len(kept)]
    replicas = f", {sizes['data']} replicas over data" if sizes["data"] > 1 else ""
    return f"{kind}: {', '.join(kept)}{replicas}"


def _sequence(placed: PlacedModel, sizes: Mapping[str, int]) -> str | None:
    more = placed.compute.residual[len(placed.compute.seq) :]
    if not more:
        return None
    return f"sequence parallel: residual stream and norms split over {_ways(more, sizes)} as well"


def _context(config: RunConfig, placed: PlacedModel, sizes: Mapping[str, int]) -> str | None:
    if not placed.compute.seq:
        return None
    parallel = config.parallel
    order = "an early and a late part each" if parallel.balance_sequence else "in its own order"
    return (
        f"context parallel: the sequence over {_ways(placed.compute.seq, sizes)}, {order}; "
        f"attention by {parallel.context}"
    )


def _kv_heads(config: RunConfig, placed: PlacedModel, sizes: Mapping[str, int]) -> str | None:
    rules, attention = placed.compute, config.model.attention
    if attention is None or attention.latent:
        return None
    if not rules.heads or rules.kv_heads == rules.heads:
        return None
    return (
        f"{attention.num_kv_heads} kv heads are whole on every device of "
        f"{_ways(rules.heads, sizes)}, each of which computes them all and reads those of its own "
        "query heads"
    )


def _pipeline(config: RunConfig, sizes: Mapping[str, int]) -> str | None:
    stages, micro = sizes["stage"], config.train.micro_batches
    if stages == 1:
        return None
    own = config.parallel
    groups = own.layer_groups if own.schedule == "circular" else 1
    layers = config.model.num_layers // (stages * groups)
    held = f"{groups} groups of {layers} layers" if groups > 1 else f"{layers} layers"
    share = bubble_ratio(own.schedule, stages, micro, groups)
    return (
        f"pipeline: {own.schedule}, {stages} stages of {held}, {micro} micro-batches, "
        f"{share:.1%} of the time idle"
    )


def _muon(config: RunConfig, placed: PlacedModel) -> str | None:
    """Its iterations are left to the compiler, which gathers what it likes."""
    if config.optimizer.kind != "muon" or not (placed.optimizer.embed or placed.optimizer.mlp):
        return None
    return "what Muon's orthogonalisation gathers over devices is not among the bytes sent"
