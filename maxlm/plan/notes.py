"""Notes on how a run is parallel, one line each."""

from collections.abc import Iterator, Mapping

from maxlm.models.placement import PlacedModel
from maxlm.parallel.pipeline import bubble_ratio
from maxlm.run import RunConfig
from maxlm.sharding import MESH_AXES


def list_layout_notes(
    config: RunConfig,
    placed: PlacedModel,
    sizes: Mapping[str, int],
    links: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Lists notes on how a run is parallel.

    Args:
        links: what each mesh axis runs over, where devices are at hand.
    """
    rules, parallel, attention = placed.compute, config.parallel, config.model.attention

    def ways(axes: tuple[str, ...]) -> str:
        return " · ".join(f"{axis}={sizes[axis]}" for axis in axes)

    used = [axis for axis in MESH_AXES if sizes[axis] > 1]
    if used:
        named = (f"{ways((a,))} ({links[a]})" if links else ways((a,)) for a in used)
        yield f"devices, from the slowest links to the fastest: {' → '.join(named)}"
    # Parameters, gradients and optimizer state are split that the maths wants whole.
    at_rest = {
        "parameters": placed.storage,
        "gradients": placed.gradients,
        "optimizer state": placed.optimizer,
    }
    split = {
        name: tuple(axis for axis in rest.embed if axis not in rules.embed)
        for name, rest in at_rest.items()
    }
    kept = [f"{name} over {ways(axes)}" for name, axes in split.items() if axes]
    if kept:
        replicas = f", {sizes['data']} replicas over data" if sizes["data"] > 1 else ""
        yield f"ZeRO-{len(kept)}: {', '.join(kept)}{replicas}"
    if more := rules.residual[len(rules.seq) :]:
        yield f"sequence parallel: residual stream and norms split over {ways(more)} as well"
    if rules.seq:
        balanced = parallel.balance_sequence
        order = "an early and a late part each" if balanced else "in its own order"
        yield (
            f"context parallel: the sequence over {ways(rules.seq)}, {order}; "
            f"attention by {parallel.context}"
        )
    whole_kv_heads = rules.heads and rules.kv_heads != rules.heads
    if whole_kv_heads and attention is not None and not attention.latent:
        yield (
            f"{attention.num_kv_heads} kv heads are whole on every device of {ways(rules.heads)}, "
            "each of which computes them all and reads those of its own query heads"
        )
    stages, micro = sizes["stage"], config.train.micro_batches
    if stages > 1:
        groups = parallel.layer_groups if parallel.schedule == "circular" else 1
        layers = config.model.num_layers // (stages * groups)
        held = f"{groups} groups of {layers} layers" if groups > 1 else f"{layers} layers"
        idle = bubble_ratio(parallel.schedule, stages, micro, groups)
        yield (
            f"pipeline: {parallel.schedule}, {stages} stages of {held}, {micro} micro-batches, "
            f"{idle:.1%} of the time idle"
        )
    if config.optimizer.kind == "muon" and (placed.optimizer.embed or placed.optimizer.mlp):
        # The compiler gathers what it likes.
        yield "what Muon's orthogonalisation gathers over devices is not among the bytes sent"
