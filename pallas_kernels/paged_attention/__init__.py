"""Attention over keys and values in pages, for decoding and chunks of prefill in one
call (Kwon et al. 2023, PagedAttention): kernels for TPUs and GPUs, and a form that any
XLA backend compiles.

Pages are [P, K, page, H], of which each row has those that its table names; int8 and
int4 pages are read as they are.
"""

from pallas_kernels.paged_attention.api import paged_attention, write_pages
from pallas_kernels.paged_attention.params import (
    PagedKernel,
    PagedOperands,
    PagedParams,
    QuantizedPages,
)

__all__ = [
    "PagedKernel",
    "PagedOperands",
    "PagedParams",
    "QuantizedPages",
    "paged_attention",
    "write_pages",
]
