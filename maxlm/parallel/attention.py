"""Attention on a mesh: each device attends over its own rows and heads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard

from maxlm.config.errors import check_requirements
from maxlm.parallel import blocks, ulysses
from maxlm.parallel.batch_invariance import ScoreTerms, attend_rows_in_order
from maxlm.parallel.context import (
    ContextMethod,
    Segments,
    SequenceSplit,
    require_context,
)
from maxlm.parallel.local import axis_indices, axis_size, make_spec, map_shards
from maxlm.parallel.terms import AttentionTerms, HeadTerms
from maxlm.sharding import AxisRules
from pallas_kernels.attention import (
    attention_backward,
    attention_forward,
    compute_row_delta,
)

DeviceIndices = dict[str, jax.Array]
"""A device's number, int32 [1], along the axes of `seq` and of `heads`, where it is
needed."""


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    terms: AttentionTerms = AttentionTerms(),
    *,
    rules: AxisRules,
    causal: bool = True,
    segment_ids: Segments = None,
    method: ContextMethod = "all_gather",
    balanced: bool = False,
    batch_invariant: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.attention.attention`` on a mesh, a device with its rows and
    heads.

    Communication only where the rules split the sequence
    (:mod:`maxlm.parallel.context`), for the gradients of biases and sinks, and for
    those of kv heads that are whole on devices which split the query heads: where there
    are more such devices than kv heads, these are kept whole (``kv_heads: null``) and
    each device takes those that its own query heads read.

    Args:
        q: [B, S, N, H], laid out by ``rules``, as k, v and segments are.
        k, v: [B, T, K, H] and [B, T, K, Hv]; T may differ from S where the sequence is
            whole.
        terms: arrays whole, or split by heads.
        segment_ids: int [B, S] and [B, T].
        method: how the devices that share a sequence exchange it.
        balanced: whether rows stand in the balanced order of
            ``context.sequence_order_indices`` for the number of shards; masks compare
            places in the sequence, not in the arrays.
        batch_invariant: add up in one order, as
            :mod:`~maxlm.parallel.batch_invariance` says, where rows are whole and
            causal and no bias is learnt.

    Returns:
        [B, S, N, Hv] in v's dtype, laid out as q.

    Raises:
        MaxlmError: sizes that do not divide
            (:func:`~maxlm.parallel.context.require_context`).
        ValueError: k and v of another length than q, with a split sequence; shapes that
            do not belong together; a window without ``causal``; a cap not above 0.
    """
    seq_axes = rules.mesh_axes("seq")
    seq_len = q.shape[1]
    num_heads = q.shape[2]
    num_kv_heads = k.shape[2]
    check_requirements(
        require_context(
            seq_len,
            num_heads,
            num_kv_heads,
            rules=rules,
            sizes=dict(jax.sharding.get_abstract_mesh().shape),
            method=method,
            balanced=balanced,
        )
    )
    if seq_axes and seq_len != k.shape[1]:
        raise ValueError(
            "with a split sequence, attention is over the tokens of the batch alone"
        )
    split = SequenceSplit(
        seq_axes,
        method,
        balanced,
        causal,
        terms.window,
        terms.scale,
        terms.soft_cap,
        batch_invariant=batch_invariant and causal and terms.biases is None,
    )
    head_terms = HeadTerms(
        *(_split_by_heads(term, num_heads, rules) for term in terms.by_head)
    )
    return _sharded(q, k, v, head_terms, segment_ids, rules, split)


def _split_by_heads(
    term: jax.Array | np.ndarray | None, num_heads: int, rules: AxisRules
) -> jax.Array | None:
    """Returns [N, ...] in fp32 or wider, each device with those of its query heads."""
    if term is None:
        return None
    if len(term) != num_heads:
        raise ValueError(
            f"slopes, biases or sinks of shape {term.shape} for {num_heads} query heads"
        )
    wide = jnp.promote_types(term.dtype, jnp.float32)
    return reshard(jnp.asarray(term, wide), rules.spec("heads"))


# One program on shards forward, one backward, so that this file decides what crosses
# the wire (local.py).


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _sharded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_terms: HeadTerms,
    segments: Segments,
    rules: AxisRules,
    split: SequenceSplit,
) -> jax.Array:
    return _forward(q, k, v, head_terms, segments, rules, split)[0]


def _forward(q, k, v, head_terms, segments, rules, split):
    layouts = _Layouts(rules, split, q, k)

    def local(q, k, v, head_terms, segments, device_indices):
        k = layouts.select_kv_heads(k, device_indices)
        v = layouts.select_kv_heads(v, device_indices)
        if not split.axes:
            if split.batch_invariant:
                scale = split.scale or q.shape[-1] ** -0.5
                score_terms = ScoreTerms(
                    scale, split.soft_cap, head_terms.slopes, head_terms.sinks
                )
                return attend_rows_in_order(
                    q, k, v, score_terms, segments=segments, window=split.window
                )
            options = split.kernel_options(head_terms, segments)
            return attention_forward(q, k, v, **options)
        program = ulysses if split.method == "ulysses" else blocks
        return program.attend_shard_forward(
            split, device_indices["seq"][0], q, k, v, segments, head_terms
        )

    o, lse = map_shards(
        local,
        in_specs=layouts.operand_specs(head_terms, segments),
        out_specs=(layouts.queries, layouts.lse),
    )(q, k, v, head_terms, segments, layouts.make_device_indices())
    # Named here and not outside: the backward pass wants both, or attention is computed
    # again.
    o = checkpoint_name(o, "attention")
    lse = checkpoint_name(lse, "attention")
    return o, (q, k, v, head_terms, segments, o, lse)


def _backward(rules, split, saved, d_o):
    q, k, v, head_terms, segments, o, lse = saved
    layouts = _Layouts(rules, split, q, k)

    def local(q, k, v, head_terms, segments, device_indices, o, lse, d_o):
        local_k = layouts.select_kv_heads(k, device_indices)
        local_v = layouts.select_kv_heads(v, device_indices)
        if split.axes:
            program = ulysses if split.method == "ulysses" else blocks
            d_q, d_k, d_v, d_terms = program.attend_shard_backward(
                split,
                device_indices["seq"][0],
                q,
                local_k,
                local_v,
                segments,
                head_terms,
                o,
                lse,
                d_o,
            )
        else:
            options = split.kernel_options(head_terms, segments)
            delta = compute_row_delta(o, d_o)
            d_q, d_k, d_v, *d_biases = attention_backward(
                q, local_k, local_v, lse, delta, d_o, dtype=q.dtype, **options
            )
            d_terms = head_terms.compute_gradients(lse, delta, *d_biases)
        d_k = layouts.sum_kv_heads(d_k, k, device_indices)
        d_v = layouts.sum_kv_heads(d_v, v, device_indices)
        if layouts.token_axes:
            d_terms = lax.psum(d_terms, layouts.token_axes)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_terms

    gradients = map_shards(
        local,
        in_specs=(
            *layouts.operand_specs(head_terms, segments),
            layouts.queries,
            layouts.lse,
            layouts.queries,
        ),
        out_specs=(layouts.queries, layouts.keys, layouts.keys, layouts.heads),
    )(q, k, v, head_terms, segments, layouts.make_device_indices(), o, lse, d_o)
    return *gradients, None


_sharded.defvjp(_forward, _backward)


class _Layouts:
    """Layouts of operands on devices."""

    def __init__(
        self, rules: AxisRules, split: SequenceSplit, q: jax.Array, k: jax.Array
    ):
        batch_axes = rules.mesh_axes("batch")
        seq_axes = rules.mesh_axes("seq")
        head_axes = rules.mesh_axes("heads")
        self.queries = rules.spec("batch", "seq", "heads", None)
        self.keys = rules.spec("batch", "seq", "kv_heads", None)
        self.rows = rules.spec("batch", "seq")
        self.heads = rules.spec("heads")
        if split.axes and split.method == "ulysses":
            # Ulysses keeps whole rows and splits heads over the sequence's axes too.
            self.lse = make_spec((batch_axes, (), head_axes + seq_axes))
        else:
            self.lse = make_spec((batch_axes, seq_axes, head_axes))

        self.indexed_axes: dict[str, tuple[str, ...]] = {}
        """Axes along which a device needs its number: `seq`, and `heads` where kv heads
        are whole."""
        if seq_axes:
            self.indexed_axes["seq"] = seq_axes
        if head_axes and not rules.mesh_axes("kv_heads"):
            self.indexed_axes["heads"] = head_axes
        self.token_axes = batch_axes + seq_axes
        """Axes along which devices have different queries."""
        self.num_heads = q.shape[2]
        self.group_size = q.shape[2] // k.shape[2]
        """Query heads that read one kv head."""

    def make_device_indices(self) -> DeviceIndices:
        return {name: axis_indices(axes) for name, axes in self.indexed_axes.items()}

    def operand_specs(
        self, head_terms: HeadTerms, segments: Segments
    ) -> tuple[
        PartitionSpec,
        PartitionSpec,
        PartitionSpec,
        HeadTerms,
        Segments,
        dict[str, PartitionSpec],
    ]:
        """Returns the specs of q, k, v, heads' terms, segments, and the devices'
        numbers."""
        index_specs = {
            name: make_spec((axes,)) for name, axes in self.indexed_axes.items()
        }
        term_specs = jax.tree.map(lambda _: self.heads, head_terms)
        segment_specs = jax.tree.map(lambda _: self.rows, segments)
        return (
            self.queries,
            self.keys,
            self.keys,
            term_specs,
            segment_specs,
            index_specs,
        )

    def select_kv_heads(self, x: jax.Array, device_indices: DeviceIndices) -> jax.Array:
        """Returns, on shards, the kv heads [B, T, K, H] that this device's query heads
        read."""
        if "heads" not in self.indexed_axes:
            return x
        first, count = self._find_kv_heads(device_indices)
        return lax.dynamic_slice_in_dim(x, first, count, axis=2)

    def sum_kv_heads(
        self, d_local: jax.Array, x: jax.Array, device_indices: DeviceIndices
    ) -> jax.Array:
        """Returns, on shards, the gradient of whole kv heads x, summed over devices,
        from that of each device's :meth:`select_kv_heads`."""
        if "heads" not in self.indexed_axes:
            return d_local
        first, _ = self._find_kv_heads(device_indices)
        zeros = jnp.zeros(x.shape, d_local.dtype)
        d_x = lax.dynamic_update_slice_in_dim(zeros, d_local, first, axis=2)
        return lax.psum(d_x, self.indexed_axes["heads"])

    def _find_kv_heads(self, device_indices: DeviceIndices) -> tuple[jax.Array, int]:
        """Returns the first kv head that this device reads, and how many. Never a part
        of a group beside another group's: ``require_context`` sees to it."""
        num_devices = axis_size(self.indexed_axes["heads"])
        heads_per_device = self.num_heads // num_devices
        first_head = device_indices["heads"][0] * heads_per_device
        count = max(heads_per_device // self.group_size, 1)
        return first_head // self.group_size, count
