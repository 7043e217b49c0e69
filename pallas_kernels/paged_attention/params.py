"""Parameters and operands of a paged attention, and their checks."""

from collections.abc import Hashable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.attention.params import accumulation_dtype
from pallas_kernels.kernel_types import Interpret


class QuantizedPages(NamedTuple):
    """Pages of integers: x = codes · scale + zero (KIVI, Liu et al. 2024, arXiv
    2402.02750: keys per channel, values per token)."""

    codes: jax.Array
    """int8 [P, K, page, H]; or 4 bits each, 0 to 15, as uint8 [P, K, page // 2, H]:
    byte row j holds token j in its low and token j + page // 2 in its high half."""
    scale: jax.Array
    """Float; of keys [P, K, H], a channel over a page's tokens; of values [P, K, page],
    a token."""
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
        return self.page_arrays["k_codes"].shape[1]

    @property
    def page_arrays(self) -> dict[str, jax.Array]:
        """Arrays of pages by side ("k", "v") and part ("codes", "scale", "zero")."""
        arrays = {}
        for side, pages in (("k", self.keys), ("v", self.values)):
            if isinstance(pages, QuantizedPages):
                parts = pages._asdict()
            else:
                parts = {"codes": pages}
            for part, array in parts.items():
                if array is not None:
                    arrays[f"{side}_{part}"] = array
        return arrays


class PagedParams(NamedTuple):
    """Static options and sizes. A score is cap·tanh(scale·q·k / cap) − slope·(i − j) +
    bias[j − i], then masked."""

    num_uniform: int
    """The first rows, with ``queries_each`` queries each."""
    queries_each: int
    value_dim: int
    """Hv; where it is an argument's, 0: not given."""
    scale: float
    soft_cap: float | None
    window: int | None
    dtype: DTypeLike
    """Dtype of the output."""
    block_sizes: Hashable | None = None
    """Blocks of the implementation; None: its choice."""
    interpret: Interpret = False
    page_size: int = 0
    """Tokens of a page, as its array says."""
    chunk: int | None = None
    """Positions of a chunk, whose tokens alone see each other."""

    @property
    def num_uniform_queries(self) -> int:
        return self.num_uniform * self.queries_each

    def find_first_key(self, positions: jax.Array) -> jax.Array:
        """Returns the first keys, int32, that a window and a chunk let queries at these
        positions see."""
        first = jnp.zeros_like(positions)
        if self.window is not None:
            first = jnp.maximum(first, positions - self.window + 1)
        if self.chunk is not None:
            first = jnp.maximum(first, positions - lax.rem(positions, self.chunk))
        return first


class PagedKernel(Protocol):
    """An implementation: a module beside this one, or a caller's own."""

    def supports(self, operands: PagedOperands, params: PagedParams) -> bool:
        """Returns whether it computes this, by shapes, dtypes and which arrays there
        are."""
        ...

    def forward(
        self, operands: PagedOperands, params: PagedParams
    ) -> tuple[jax.Array, jax.Array]:
        """Computes (o, lse) of :func:`~pallas_kernels.paged_attention.paged_attention`
        for validated arguments that it supports."""
        ...


def validate_arguments(
    operands: PagedOperands, params: PagedParams
) -> tuple[PagedOperands, PagedParams]:
    """Checks the arguments of :func:`~pallas_kernels.paged_attention.paged_attention`
    and returns them in the kernels' dtypes, with the sizes that follow from the pages.

    Raises:
        ValueError: as there.
    """
    q = operands.q
    value_pages = operands.values
    value_dim = params.value_dim

    # Queries and pages.
    keys = _check_pages("key_pages", operands.keys, per_channel=True)
    if q.ndim != 3 or q.shape[2] != keys[3] or q.shape[1] % keys[1]:
        raise ValueError(f"q {q.shape} and key_pages {keys} do not belong together")
    if (value_pages is None) != (value_dim != 0):
        raise ValueError("either value_pages or value_dim says what the values are")
    if value_pages is None:
        if not 0 < value_dim <= keys[3]:
            raise ValueError(f"value_dim={value_dim} of keys with {keys[3]} features")
    else:
        values = _check_pages("value_pages", value_pages, per_channel=False)
        if values[:3] != keys[:3]:
            raise ValueError(
                f"key_pages {keys} and value_pages {values} do not belong together"
            )
        value_dim = values[3]

    # Rows.
    R = len(operands.kv_lengths)
    num_uniform = params.num_uniform
    queries_each = params.queries_each
    min_queries = 1 if num_uniform else 0
    fits = num_uniform * queries_each <= len(q)
    if not 0 <= num_uniform <= R or queries_each < min_queries or not fits:
        raise ValueError(
            f"uniform_rows={(num_uniform, queries_each)} of {R} rows and {len(q)} "
            f"queries"
        )
    page_tables = operands.page_tables
    kv_lengths = _check_integers("kv_lengths", operands.kv_lengths, (R,))
    key_limits = _check_integers("key_limits", operands.key_limits, (R,))
    checked = operands._replace(
        page_tables=_check_integers(
            "page_tables", page_tables, (R, page_tables.shape[-1])
        ),
        kv_lengths=kv_lengths,
        query_starts=_check_integers("query_starts", operands.query_starts, (R + 1,)),
        key_limits=jnp.minimum(kv_lengths, key_limits),
        slopes=_check_head_terms("slopes", operands.slopes, q),
        sinks=_check_head_terms("sinks", operands.sinks, q),
        biases=_check_biases(operands.biases, q),
    )

    # Options.
    window = params.window
    soft_cap = params.soft_cap
    if window is not None and window < 1:
        raise ValueError(f"window={window}: windows look back, 1 key or more")
    if params.chunk is not None and params.chunk < 1:
        raise ValueError(f"chunk={params.chunk}: a chunk has 1 position or more")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be above 0")
    params = params._replace(page_size=keys[2], value_dim=value_dim)
    return checked, params


def _check_integers(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} {x.dtype} {x.shape}: want int32 {shape}")
    return jnp.asarray(x, jnp.int32)


def _check_head_terms(name: str, x: jax.Array | None, q: jax.Array) -> jax.Array | None:
    if x is None:
        return None
    N = q.shape[1]
    if x.shape != (N,):
        raise ValueError(f"{name} {x.shape}: want {(N,)}")
    return jnp.asarray(x, accumulation_dtype(q))


def _check_biases(x: jax.Array | None, q: jax.Array) -> jax.Array | None:
    if x is None:
        return None
    if x.ndim != 2 or x.shape[0] != q.shape[1] or x.shape[1] % 2 == 0:
        raise ValueError(f"biases {x.shape}: want (N, an odd number)")
    return jnp.asarray(x, accumulation_dtype(q))


def _check_pages(name: str, pages: Pages, *, per_channel: bool) -> tuple[int, ...]:
    """Returns pages' shape [P, K, page, H], ``page`` in tokens."""
    if not isinstance(pages, QuantizedPages):
        if pages.ndim != 4 or not jnp.issubdtype(pages.dtype, jnp.floating):
            raise ValueError(
                f"{name} {pages.dtype} {pages.shape}: want floats [P, K, page, H]"
            )
        return pages.shape
    codes, *rest = pages
    if codes.ndim != 4 or codes.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(
            f"{name} {codes.dtype} {codes.shape}: want int8 or uint8 [P, K, page, H]"
        )
    P, K, page, H = codes.shape
    if codes.dtype == jnp.uint8:
        # A byte has two tokens.
        page *= 2
    shape = (P, K, H) if per_channel else (P, K, page)
    for x in rest:
        if x is None:
            continue
        if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"scale or zero of {name} {x.dtype} {x.shape}: want floats {shape}"
            )
    return P, K, page, H


def dequantize(
    pages: QuantizedPages, *, per_channel: bool, dtype: DTypeLike
) -> jax.Array:
    """Returns gathered pages' numbers, [..., page, H].

    Args:
        pages: any leading dimensions; their scales have the same.
        per_channel: as keys; else per token, as values.
    """
    axis = -2 if per_channel else -1
    x = pages.codes
    if x.dtype == jnp.uint8:  # two codes a byte
        x = jnp.concatenate([x & 15, x >> 4], axis=-2)
    # x = codes · scale + zero.
    x = x.astype(dtype)
    scale = jnp.expand_dims(pages.scale.astype(dtype), axis)
    x *= scale
    if pages.zero is None:
        return x
    zero = jnp.expand_dims(pages.zero.astype(dtype), axis)
    return x + zero
