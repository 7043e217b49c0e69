"""Attention on a mesh: each device attends over its own rows and heads."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import reshard

from maxlm.config.errors import check_requirements
from maxlm.parallel import blocks, ulysses
from maxlm.parallel.context import (
    ContextMethod,
    HeadTerms,
    Segments,
    SequenceSplit,
    require_context,
)
from maxlm.parallel.local import axis_indices, axis_size, make_spec, map_shards
from maxlm.sharding import AxisRules
from pallas_kernels.attention import (
    attention_backward,
    attention_forward,
    compute_row_delta,
)


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rules: AxisRules,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | np.ndarray | None = None,
    biases: jax.Array | None = None,
    sinks: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    method: ContextMethod = "all_gather",
    balanced: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.attention.attention`` on a mesh, a device with its rows and
    heads.

    Communication only where the rules split the sequence
    (:mod:`maxlm.parallel.context`), for the gradients of ``biases`` and ``sinks``, and
    for those of kv heads that are whole on devices which split the query heads: where
    there are more such devices than kv heads, these are kept whole (``kv_heads: null``)
    and each device takes those that its own query heads read.

    Args: as there; q [B, S, N, H], k [B, T, K, H], v [B, T, K, Hv], segments [B, S] and
    [B, T],
        laid out by ``rules``; T may differ from S where the sequence is whole; slopes
        and sinks [N] and biases [N, 2R + 1] whole, or by heads; and, where the sequence
        is split,

        method: how the devices that share a sequence exchange it. balanced: rows stand
        in the balanced order of ``context.sequence_order_indices`` for the
            number of shards; masks compare places in the sequence, not in the arrays.

    Returns:
        [B, S, N, Hv] in v's dtype, laid out as q.

    Raises:
        MaxlmError: sizes that do not divide
            (:func:`~maxlm.parallel.context.require_context`).
        ValueError: k and v of another length than q, with a split sequence; shapes that
            do not belong together; a window without ``causal``; a cap not above 0.
    """
    axes = rules.mesh_axes("seq")
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    heads = (q.shape[2], k.shape[2])
    how = {"method": method, "balanced": balanced}
    check_requirements(
        require_context(q.shape[1], *heads, rules=rules, sizes=sizes, **how)
    )
    if axes and q.shape[1] != k.shape[1]:
        raise ValueError(
            "with a split sequence, attention is over the tokens of the batch alone"
        )
    split = SequenceSplit(axes, method, balanced, causal, window, scale, soft_cap)
    head_terms = HeadTerms(
        *(_by_heads(x, q.shape[2], rules) for x in (slopes, biases, sinks))
    )
    o: Any = _sharded(q, k, v, head_terms, segment_ids, rules, split)
    return o


def _by_heads(x: Any, num_heads: int, rules: AxisRules) -> jax.Array | None:
    """[N, ...] in fp32 or wider, each device with those of its query heads."""
    if x is None:
        return None
    if len(x) != num_heads:
        raise ValueError(
            f"slopes, biases or sinks of shape {x.shape} for {num_heads} query heads"
        )
    return reshard(
        jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), rules.spec("heads")
    )


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _sharded(q, k, v, head_terms, segments, rules, split):
    return _forward(q, k, v, head_terms, segments, rules, split)[0]


def _forward(q, k, v, head_terms, segments, rules, split):
    at = _Layout(rules, split, q, k)

    def local(q, k, v, head_terms, segments, numbers):
        k, v = at.own_heads(k, numbers), at.own_heads(v, numbers)
        if split.axes:
            run = ulysses if split.method == "ulysses" else blocks
            return run.attend_shard_forward(
                split, numbers["seq"][0], q, k, v, segments, head_terms
            )
        return attention_forward(q, k, v, **_whole(split, head_terms, segments))

    numbers = {name: axis_indices(axes) for name, axes in at.numbered.items()}
    o, lse = map_shards(
        local,
        in_specs=at.operands(head_terms, segments),
        out_specs=(at.queries, at.lse),
    )(q, k, v, head_terms, segments, numbers)
    # Named here and not outside: the backward pass wants both, or attention is computed
    # again.
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (q, k, v, head_terms, segments, o, lse)


def _backward(rules, split, saved, d_o):
    q, k, v, head_terms, segments, o, lse = saved
    at = _Layout(rules, split, q, k)

    def local(q, k, v, head_terms, segments, numbers, o, lse, d_o):
        own_k, own_v = at.own_heads(k, numbers), at.own_heads(v, numbers)
        if split.axes:
            run = ulysses if split.method == "ulysses" else blocks
            shard = split, numbers["seq"][0], q, own_k, own_v, segments, head_terms
            d_q, d_k, d_v, d_terms = run.attend_shard_backward(*shard, o, lse, d_o)
        else:
            options = _whole(split, head_terms, segments)
            delta = compute_row_delta(o, d_o)
            d_q, d_k, d_v, *d_biases = attention_backward(
                q, own_k, own_v, lse, delta, d_o, dtype=q.dtype, **options
            )
            d_terms = head_terms.compute_gradients(lse, delta, *d_biases)
        d_k, d_v = (at.all_heads(d, x, numbers) for d, x in ((d_k, k), (d_v, v)))
        d_terms = lax.psum(d_terms, at.tokens) if at.tokens else d_terms
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_terms

    numbers = {name: axis_indices(axes) for name, axes in at.numbered.items()}
    grads = map_shards(
        local,
        in_specs=(*at.operands(head_terms, segments), at.queries, at.lse, at.queries),
        out_specs=(at.queries, at.keys, at.keys, at.heads),
    )(q, k, v, head_terms, segments, numbers, o, lse, d_o)
    return *grads, None


_sharded.defvjp(_forward, _backward)


def _whole(
    split: SequenceSplit, head_terms: HeadTerms, segments: Segments
) -> dict[str, Any]:
    """Returns the kernel's arguments where the sequence is not split."""
    return {
        "segment_ids": segments,
        **split.mask_kwargs,
        **split.score_kwargs(head_terms),
    }


class _Layout:
    """Layouts of operands on devices."""

    def __init__(
        self, rules: AxisRules, split: SequenceSplit, q: jax.Array, k: jax.Array
    ):
        batch, seq, heads = (
            rules.mesh_axes(axis) for axis in ("batch", "seq", "heads")
        )
        whole_rows = split.axes and split.method == "ulysses"
        self.queries = rules.spec("batch", "seq", "heads", None)
        self.keys = rules.spec("batch", "seq", "kv_heads", None)
        self.rows, self.heads = rules.spec("batch", "seq"), rules.spec("heads")
        self.lse = make_spec(
            (batch, *(((), heads + seq) if whole_rows else (seq, heads)))
        )
        numbered = {"seq": seq, "heads": () if rules.mesh_axes("kv_heads") else heads}
        self.numbered = {name: axes for name, axes in numbered.items() if axes}
        """Axes along which a device needs its number: `seq`, and `heads` where kv heads
        are whole."""
        self.tokens = batch + seq
        """Axes along which devices have different queries."""
        self.num_kv_heads = k.shape[2]
        self.group = q.shape[2] // k.shape[2]
        """Query heads that read one kv head."""

    def operands(self, head_terms: HeadTerms, segments: Segments) -> tuple[Any, ...]:
        """Specs of q, k, v, heads' terms, segments, and the devices' numbers."""
        numbers = {name: make_spec((axes,)) for name, axes in self.numbered.items()}
        by_head = jax.tree.map(lambda _: self.heads, head_terms)
        rows = jax.tree.map(lambda _: self.rows, segments)
        return self.queries, self.keys, self.keys, by_head, rows, numbers

    def own_heads(self, x: jax.Array, numbers: dict[str, jax.Array]) -> jax.Array:
        """Returns, on shards, the kv heads [B, T, K, H] that this device's query heads
        read."""
        if "heads" not in self.numbered:
            return x
        first, count = self._own(numbers)
        return lax.dynamic_slice_in_dim(x, first, count, axis=2)

    def all_heads(
        self, d_own: jax.Array, x: jax.Array, numbers: dict[str, jax.Array]
    ) -> jax.Array:
        """Returns, on shards, the gradient of whole kv heads x, summed over devices,
        from that of each device's :meth:`own_heads`."""
        if "heads" not in self.numbered:
            return d_own
        first, _ = self._own(numbers)
        d_x = lax.dynamic_update_slice_in_dim(
            jnp.zeros(x.shape, d_own.dtype), d_own, first, axis=2
        )
        return lax.psum(d_x, self.numbered["heads"])

    def _own(self, numbers: dict[str, jax.Array]) -> tuple[jax.Array, int]:
        """The first kv head that this device reads, and how many. Never a part of a
        group beside another group's: ``require_context`` sees to it."""
        heads = self.num_kv_heads * self.group // axis_size(self.numbered["heads"])
        return numbers["heads"][0] * heads // self.group, max(heads // self.group, 1)
