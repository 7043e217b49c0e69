"""Parameters and operands of an attention, and their checks."""

import math
from collections.abc import Hashable
from functools import reduce
from operator import and_
from typing import NamedTuple, Protocol, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.kernel_types import Interpret

Segments = tuple[jax.Array, jax.Array]
Offset = int | jax.Array
OutputArrays = tuple[jax.Array, jax.Array, jax.Array]
"""Log-sum-exps, deltas and the output's cotangent, which a backward pass reads."""


class AttentionOptions(TypedDict, total=False):
    """Options of an attention, each with its default where it is left out (None, unless
    said)."""

    causal: bool
    """Whether a query sees only keys of its own position and below; default True."""
    window: int | None
    """Number of last such keys that a query sees (1: itself alone); None: all. Causal
    only."""
    prefix: jax.Array | None
    """int [B]: keys at positions below are visible to all queries, whatever ``causal``
    and ``window`` say (Raffel et al. 2020, §3.2.1). Causal only."""
    q_offset: Offset
    """Position of the first query, default 0; others follow. A Python int lets an
    implementation leave out at compile time what the mask empties; a traced int scalar
    serves a shard that learns its place at run time."""
    k_offset: Offset
    """Position of the first key, likewise."""
    q_positions: jax.Array | None
    """int [B, S], or [1, S] for all rows alike: positions one by one, instead of an
    offset."""
    k_positions: jax.Array | None
    """int [B or 1, T], likewise."""
    segment_ids: Segments | None
    """int [B, S] and [B, T]; tokens attend within their own segment, 0 is padding."""
    scale: float | None
    """Factor on q·k; None: H ** -0.5."""
    soft_cap: float | None
    """Scores become cap·tanh(score / cap) (Gemma Team 2024, §2)."""
    slopes: jax.Array | None
    """fp32 [N]: scores lose slope·|distance| after scale and cap (Press et al. 2022,
    ALiBi)."""
    sinks: jax.Array | None
    """fp32 [N]: a logit beside the scores in each head's softmax, whose weight goes to
    no value (Xiao et al. 2024, §3.3, learned per head as in gpt-oss). −inf: none."""
    biases: jax.Array | None
    """fp32 [N, 2R + 1]: scores gain biases[n, clip(distance, −R, R) + R] after scale,
    cap and slopes, distance being the key's position less the query's (Raffel et al.
    2020, §2.1: T5's relative positions, each bucket written out). XLA alone has
    them."""
    backend: str | None
    """"tpu", "gpu" (or one of its kernels, "hopper", "triton") or "xla". None: by the
    platform of the program being traced, and XLA where its kernels do not support
    this."""
    block_sizes: Hashable | None
    """Block sizes of the kernels, hashable; None: their choice. XLA has none."""
    interpret: Interpret
    """Whether the kernel of a ``backend`` runs in Pallas's interpreter, on any device:
    True, or its parameters, hashable. For tests; default False."""


class AttentionParams(NamedTuple):
    """Static options. A score is cap·tanh(scale·q·k / cap) − slope·|i − j| + bias[j −
    i], then masked."""

    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    q_offset: int = 0
    """The first query's position, as far as it is static;
    ``AttentionOperands.q_offset`` adds."""
    k_offset: int = 0


class AttentionOperands(NamedTuple):
    """Queries, keys and values; what places them and what is added to scores, or
    None."""

    q: jax.Array
    """[B, S, N, H]."""
    k: jax.Array
    """[B, T, K, H]."""
    v: jax.Array
    """[B, T, K, Hv]."""
    q_positions: jax.Array | None = None
    """int32 [B or 1, S]; None: offset + 0..S-1."""
    k_positions: jax.Array | None = None
    """int32 [B or 1, T]; there where ``q_positions`` is."""
    q_offset: jax.Array | None = None
    """int32 scalar, where it is traced; None: ``AttentionParams.q_offset`` alone."""
    k_offset: jax.Array | None = None
    q_segments: jax.Array | None = None
    """int32 [B, S]; tokens attend within their own segment, 0 is padding."""
    k_segments: jax.Array | None = None
    """int32 [B, T]; there where ``q_segments`` is."""
    prefix: jax.Array | None = None
    """int32 [B]."""
    slopes: jax.Array | None = None
    """fp32 [N]."""
    sinks: jax.Array | None = None
    """fp32 [N]; only a forward pass reads it: log-sum-exps hold it afterwards."""
    biases: jax.Array | None = None
    """fp32 [N, 2R + 1]."""


class AttentionCall(NamedTuple):
    """Everything static about one call."""

    params: AttentionParams
    backend: str
    """Name of the module here that implements it."""
    dtype: DTypeLike
    """Dtype of the results."""
    block_sizes: Hashable | None = None
    """Blocks of the implementation's kernels; None: its choice."""
    interpret: Interpret = False


class AttentionKernel(Protocol):
    """An implementation: a module beside this one."""

    def supports(self, operands: AttentionOperands, params: AttentionParams) -> bool:
        """Returns whether it computes this, by shapes, dtypes and which arrays there
        are."""
        ...

    def forward(
        self, operands: AttentionOperands, call: AttentionCall
    ) -> tuple[jax.Array, jax.Array]:
        """Computes o and lse of :func:`~pallas_kernels.attention.attention_forward`."""
        ...

    def backward(
        self, operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
    ) -> tuple[jax.Array, ...]:
        """Computes the gradients of
        :func:`~pallas_kernels.attention.attention_backward`."""
        ...


def validate_arguments(
    q: jax.Array, k: jax.Array, v: jax.Array, **options: Unpack[AttentionOptions]
) -> tuple[AttentionOperands, AttentionParams]:
    """Checks the arguments of :func:`~pallas_kernels.attention.attention`, with the
    errors that it names, and returns them in two parts."""
    unknown = options.keys() - AttentionOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options of attention: {', '.join(sorted(unknown))}")
    causal = options.get("causal", True)
    window = options.get("window")
    scale = options.get("scale")
    soft_cap = options.get("soft_cap")
    biases = options.get("biases")
    q_positions = options.get("q_positions")
    k_positions = options.get("k_positions")
    prefix = options.get("prefix")
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes} are not [batch, sequence, heads, head size] each")
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    if k.shape[0] != B or k.shape[:3] != v.shape[:3] or k.shape[3] != H:
        raise ValueError(f"{shapes} do not belong together")
    if N % K:
        raise ValueError(f"{N} query heads do not divide over {K} kv heads")
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window={window} with causal={causal}: windows look back, 1 key or more"
        )
    if prefix is not None and not causal:
        raise ValueError("a prefix without causal: every query sees every key already")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be above 0")
    if biases is not None and (np.ndim(biases) != 2 or np.shape(biases)[1] % 2 == 0):
        raise ValueError(
            f"biases of shape {np.shape(biases)}: want ({N}, an odd number)"
        )
    q_segments, k_segments = options.get("segment_ids") or (None, None)
    static_q_offset, q_offset = _split_offset(
        "q", options.get("q_offset", 0), q_positions
    )
    static_k_offset, k_offset = _split_offset(
        "k", options.get("k_offset", 0), k_positions
    )
    wide = accumulation_dtype(q)
    q_positions = _check_array("q_positions", q_positions, jnp.int32, (B, S), (1, S))
    k_positions = _check_array("k_positions", k_positions, jnp.int32, (B, T), (1, T))
    # Where one side has positions one by one, the other has them too.
    if q_positions is None and k_positions is not None:
        first = sum_offsets(static_q_offset, q_offset)
        q_positions = (jnp.arange(S, dtype=jnp.int32) + first)[None]
    if k_positions is None and q_positions is not None:
        first = sum_offsets(static_k_offset, k_offset)
        k_positions = (jnp.arange(T, dtype=jnp.int32) + first)[None]
    num_biases = 0 if biases is None else np.shape(biases)[-1]
    operands = AttentionOperands(
        q=q,
        k=k,
        v=v,
        q_positions=q_positions,
        k_positions=k_positions,
        q_offset=q_offset,
        k_offset=k_offset,
        q_segments=_check_array(
            "segment_ids of queries", q_segments, jnp.int32, (B, S)
        ),
        k_segments=_check_array("segment_ids of keys", k_segments, jnp.int32, (B, T)),
        prefix=_check_array("prefix", prefix, jnp.int32, (B,)),
        slopes=_check_array("slopes", options.get("slopes"), wide, (N,)),
        sinks=_check_array("sinks", options.get("sinks"), wide, (N,)),
        biases=_check_array("biases", biases, wide, (N, num_biases)),
    )
    scale = 1 / math.sqrt(H) if scale is None else scale
    params = AttentionParams(
        causal, window, soft_cap, scale, static_q_offset, static_k_offset
    )
    return operands, params


def combine_masks(
    params: AttentionParams,
    behind: jax.Array | None,
    in_prefix: jax.Array | None,
    segments: Segments | None,
    inside: jax.Array | None = None,
) -> jax.Array | None:
    """Returns which keys each query may see; None: all.

    Args:
        behind: queries' positions less keys'; read with a causal mask alone.
        in_prefix: whether a key is in the prefix.
        segments: of queries and of keys.
        inside: whether there is such a key.
    """
    conditions = []
    if params.causal:
        assert behind is not None
        visible = behind >= 0
        if params.window is not None:
            visible &= behind < params.window
        conditions.append(visible if in_prefix is None else visible | in_prefix)
    if segments is not None:
        q_segments, k_segments = segments
        conditions.append((q_segments == k_segments) & (q_segments != 0))
    if inside is not None:
        conditions.append(inside)
    return reduce(and_, conditions) if conditions else None


def accumulation_dtype(*operands: jax.Array) -> jnp.dtype:
    """Returns the dtype of scores and sums: fp32, or float64 where operands are."""
    return jnp.result_type(*operands, jnp.float32)


def sum_offsets(static: int, traced: jax.Array | None) -> Offset:
    """Returns the sum of an offset's static and traced part; an int where it is
    static."""
    return static if traced is None else static + traced


def merge_offsets(
    operands: AttentionOperands, params: AttentionParams
) -> AttentionOperands:
    """Moves static offsets into the operands' arrays, for kernels that read them there:
    without a prefix, which is counted from 0, only as far as queries' and keys'
    differ."""
    q_offset = params.q_offset
    k_offset = params.k_offset
    if operands.prefix is None:
        q_offset = q_offset - k_offset
        k_offset = 0

    def merge(static: int, traced: jax.Array | None) -> jax.Array | None:
        if not static:
            return traced
        return jnp.asarray(sum_offsets(static, traced), jnp.int32)

    return operands._replace(
        q_offset=merge(q_offset, operands.q_offset),
        k_offset=merge(k_offset, operands.k_offset),
    )


def _split_offset(
    side: str, offset: Offset, positions: jax.Array | None
) -> tuple[int, jax.Array | None]:
    """Splits an offset into its static and its traced part."""
    if isinstance(offset, (int, np.integer)):
        static = int(offset)
        traced = None
    else:
        static = 0
        traced = jnp.asarray(offset)
        if traced.shape or not jnp.issubdtype(traced.dtype, jnp.integer):
            raise ValueError(
                f"{side}_offset is {traced.dtype} {traced.shape}, not an int scalar"
            )
        traced = traced.astype(jnp.int32)
    if positions is not None and (static or traced is not None):
        raise ValueError(
            f"{side}_offset beside {side}_positions: positions are whole already"
        )
    return static, traced


def _check_array(
    name: str, x: jax.Array | None, dtype: DTypeLike, *shapes: tuple[int, ...]
) -> jax.Array | None:
    """Returns an array of one of these shapes in ``dtype``; None as it is."""
    if x is None:
        return None
    if jnp.shape(x) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name} of shape {jnp.shape(x)}: these sizes want {allowed}")
    return jnp.asarray(x, dtype)
