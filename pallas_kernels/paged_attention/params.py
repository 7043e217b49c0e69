"""Parameters and operands of a paged attention, and their checks."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class QuantizedPages(NamedTuple):
    """Pages of integers: x = codes · scale + zero (KIVI, Liu et al. 2024, arXiv 2402.02750: keys
    per channel, values per token)."""

    codes: jax.Array
    """int8 [P, K, page, H]; or 4 bits each, 0 to 15, as uint8 [P, K, page // 2, H]: byte row j
    holds token j in its low and token j + page // 2 in its high half."""
    scale: jax.Array
    """Float; of keys [P, K, H], a channel over a page's tokens; of values [P, K, page], a token."""
    zero: jax.Array | None
    """Values of code 0, shaped as ``scale``; None: symmetric codes."""


Pages = jax.Array | QuantizedPages


class PagedOperands(NamedTuple):
    """Arrays of a call."""

    q: jax.Array
    """[T, N, H]."""
    keys: Pages
    """[P, K, page, H]."""
    values: Pages | None
    """[P, K, page, Hv]; None: the first features of the keys."""
    page_tables: jax.Array
    """int32 [R, M]."""
    kv_lengths: jax.Array
    """int32 [R]."""
    query_starts: jax.Array
    """int32 [R + 1]."""
    key_limits: jax.Array
    """int32 [R], at most ``kv_lengths``."""
    slopes: jax.Array | None = None
    """fp32 [N]."""
    sinks: jax.Array | None = None
    """fp32 [N]."""
    biases: jax.Array | None = None
    """fp32 [N, 2R + 1]."""

    @property
    def num_kv_heads(self) -> int:
        """K."""
        keys = self.keys
        return keys.codes.shape[1] if isinstance(keys, QuantizedPages) else keys.shape[1]


class PagedParams(NamedTuple):
    """Static options and sizes. A score is cap·tanh(scale·q·k / cap) − slope·(i − j) + bias[j − i],
    then masked."""

    num_uniform: int
    """The first rows, with ``queries_each`` queries each."""
    queries_each: int
    page_size: int
    value_dim: int
    scale: float
    soft_cap: float | None
    window: int | None
    dtype: Any
    """Dtype of the output."""
    block_sizes: Any = None
    """Blocks of the implementation; None: its choice."""
    interpret: Any = False

    @property
    def num_uniform_queries(self) -> int:
        return self.num_uniform * self.queries_each


def validate_arguments(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages | None,
    page_tables: jax.Array,
    kv_lengths: jax.Array,
    query_starts: jax.Array,
    key_limits: jax.Array | None,
    learned: dict[str, jax.Array | None],
    uniform_rows: tuple[int, int],
    value_dim: int | None,
    **options: Any,
) -> tuple[PagedOperands, PagedParams]:
    """Checks the arguments of :func:`~pallas_kernels.paged_attention.paged_attention` and returns
    them in two parts.

    Raises:
        ValueError: as there.
    """
    keys, page_size = _check_pages("key_pages", key_pages, per_channel=True)
    if q.ndim != 3 or q.shape[2] != keys[3] or q.shape[1] % keys[1]:
        raise ValueError(f"q {q.shape} and key_pages {keys} do not belong together")
    if (value_pages is None) != (value_dim is not None):
        raise ValueError("either value_pages or value_dim says what the values are")
    if value_pages is None:
        if not 0 < (value_dim or 0) <= keys[3]:
            raise ValueError(f"value_dim={value_dim} of keys with {keys[3]} features")
    else:
        values, value_page_size = _check_pages("value_pages", value_pages, per_channel=False)
        if values[:2] != keys[:2] or value_page_size != page_size:
            raise ValueError(f"key_pages {keys} and value_pages {values} do not belong together")
        value_dim = values[3]
    R, rows, each = len(kv_lengths), *uniform_rows
    if not 0 <= rows <= R or each < (rows > 0) or rows * each > len(q):
        raise ValueError(f"uniform_rows={uniform_rows} of {R} rows and {len(q)} queries")
    key_limits = kv_lengths if key_limits is None else key_limits
    own = {
        "page_tables": (page_tables, (R, page_tables.shape[-1])),
        "kv_lengths": (kv_lengths, (R,)),
        "query_starts": (query_starts, (R + 1,)),
        "key_limits": (key_limits, (R,)),
    }
    for name, (x, shape) in own.items():
        if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} {x.dtype} {x.shape}: want int32 {shape}")
    N, wide = q.shape[1], accumulation_dtype(q)
    for name, x in learned.items():
        by_distance = name == "biases"
        if x is not None and (
            x.shape[:1] != (N,)
            or x.ndim != 1 + by_distance
            or (by_distance and x.shape[1] % 2 == 0)
        ):
            raise ValueError(
                f"{name} {x.shape}: want {'(N, an odd number)' if by_distance else (N,)}"
            )
    window, soft_cap, scale = options["window"], options["soft_cap"], options.pop("scale")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: windows look back, 1 key or more")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be above 0")
    tables, lengths, starts, limits = (jnp.asarray(x, jnp.int32) for x, _ in own.values())
    added = {name: None if x is None else jnp.asarray(x, wide) for name, x in learned.items()}
    limits = jnp.minimum(lengths, limits)
    pages = key_pages, value_pages
    operands = PagedOperands(q, *pages, tables, lengths, starts, limits, **added)
    scale = 1 / math.sqrt(keys[3]) if scale is None else scale
    assert value_dim is not None
    return operands, PagedParams(rows, each, page_size, value_dim, scale, **options)


def _check_pages(name: str, pages: Pages, *, per_channel: bool) -> tuple[tuple[int, ...], int]:
    """Returns pages' shape [P, K, page, H], and the tokens of a page."""
    if not isinstance(pages, QuantizedPages):
        if pages.ndim != 4 or not jnp.issubdtype(pages.dtype, jnp.floating):
            raise ValueError(f"{name} {pages.dtype} {pages.shape}: want floats [P, K, page, H]")
        return pages.shape, pages.shape[2]
    codes, *rest = pages
    if codes.ndim != 4 or codes.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(f"{name} {codes.dtype} {codes.shape}: want int8 or uint8 [P, K, page, H]")
    P, K, page, H = codes.shape
    page *= 2 if codes.dtype == jnp.uint8 else 1
    shape = (P, K, H) if per_channel else (P, K, page)
    for x in rest:
        if x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise ValueError(f"scale or zero of {name} {x.dtype} {x.shape}: want floats {shape}")
    return (P, K, page, H), page


def accumulation_dtype(x: jax.Array) -> Any:
    """Returns the dtype of sums: fp32, or float64 for operands in it."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dequantize(pages: QuantizedPages, *, per_channel: bool, dtype: Any) -> jax.Array:
    """Returns gathered pages' numbers, [..., page, H].

    Args:
        pages: any leading dimensions; their scales have the same.
        per_channel: as keys; else per token, as values.
    """
    axis = -2 if per_channel else -1
    x = unpack_codes(pages.codes).astype(dtype)
    x *= jnp.expand_dims(pages.scale.astype(dtype), axis)
    return x if pages.zero is None else x + jnp.expand_dims(pages.zero.astype(dtype), axis)


def unpack_codes(codes: jax.Array) -> jax.Array:
    """Returns a code an element, [..., page, H]."""
    if codes.dtype == jnp.int8:
        return codes
    return jnp.concatenate([codes & 15, codes >> 4], axis=-2)
