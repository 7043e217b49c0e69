"""Paged attention in float64 NumPy, written from the definition, a query at a time."""

import itertools
from typing import Unpack

import numpy as np

from pallas_kernels.attention.params import AttentionOptions
from tests.pallas_kernels import reference


def read_row(pages, table, length, *, per_channel):
    """float64 [length, K, H] of a row; quantized pages (codes, scale, zero) as they are
    defined."""
    return np.stack([_read_token(pages, table, t, per_channel) for t in range(length)])


def _read_token(pages, table, t, per_channel):
    if not isinstance(pages, tuple):
        size = pages.shape[2]
        return np.asarray(pages[table[t // size], :, t % size], np.float64)
    codes, scale, zero = (None if x is None else np.asarray(x) for x in pages)
    packed = codes.dtype == np.uint8
    half = codes.shape[2]
    page, at = divmod(t, half * 2 if packed else half)
    page = table[page]
    if packed:
        code = codes[page, :, at % half]
        code = code >> 4 if at >= half else code & 15
    else:
        code = codes[page, :, at]
    scale, zero = (
        0.0
        if x is None
        else np.float64(x[page] if per_channel else x[page, :, at, None])
        for x in (scale, zero)
    )
    return code.astype(np.float64) * scale + zero


def paged_attention(
    q, key_pages, value_pages, page_tables, kv_lengths, query_starts,
    *, key_limits=None, value_dim=None, scale=None, chunk=None, **options: Unpack[AttentionOptions],
):  # fmt: skip
    """o [T, N, Hv] and lse [T, N]; options are those of the reference of dense
    attention."""
    T, N, H = q.shape
    Hv = (
        value_dim
        or (value_pages[0] if isinstance(value_pages, tuple) else value_pages).shape[-1]
    )
    o = np.zeros((T, N, Hv))
    lse = np.full((T, N), -np.inf)
    limits = kv_lengths if key_limits is None else key_limits
    for r, (begin, end) in enumerate(itertools.pairwise(query_starts)):
        length, limit = int(kv_lengths[r]), int(min(kv_lengths[r], limits[r]))
        if begin == end or length == 0:
            continue
        if limit == 0:
            lse[begin:end] = (
                -np.inf if options.get("sinks") is None else options["sinks"]
            )
            continue
        k = read_row(key_pages, page_tables[r], limit, per_channel=True)
        v = k[..., :value_dim]
        if value_pages is not None:
            v = read_row(value_pages, page_tables[r], limit, per_channel=False)
        scale = H**-0.5 if scale is None else scale
        if chunk is None:
            results = reference.attention(
                q[begin:end][None], k[None], v[None],
                q_offset=length - (end - begin), scale=scale, **options,
            )  # fmt: skip
            o[begin:end], lse[begin:end] = results[0][0], results[1][0]
            continue
        for query in range(begin, end):  # with the keys of its chunk as the only ones
            position = length - (end - query)
            first = position // chunk * chunk
            results = reference.attention(
                q[query][None, None], k[None, first:], v[None, first:],
                q_offset=position - first, scale=scale, **options,
            )  # fmt: skip
            o[query], lse[query] = results[0][0, 0], results[1][0, 0]
    return o, lse
