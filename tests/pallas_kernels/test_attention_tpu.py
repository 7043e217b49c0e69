"""The TPU attention kernels, in the interpreter, equal a float64 NumPy softmax."""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention as kernel
from pallas_kernels.attention import tpu
from pallas_kernels.attention.params import AttentionOptions
from pallas_kernels.attention.tpu_blocks import (
    BACKWARD,
    FORWARD,
    AttentionSizes,
    TpuBlocks,
    TpuBlockSizes,
    vmem_bytes,
)
from pallas_kernels.chips import CHIPS
from tests.pallas_kernels import reference
from tests.pallas_kernels.cases import Case, check, compiled
from tests.pallas_kernels.reference import operands

# Forward and backward; block of queries, of keys, tiles; tiles ahead, behind; pace.
SMALL = TpuBlockSizes(TpuBlocks(128, 128, 128, 128), TpuBlocks(128, 128, 128, 128))
HIGH = TpuBlockSizes(
    TpuBlocks(256, 128, 128, 128, 1, 0, 3), TpuBlocks(256, 128, 128, 128, 2, 1)
)
WIDE = TpuBlockSizes(
    TpuBlocks(128, 256, 128, 128, 2, 2), TpuBlocks(128, 256, 128, 128, 3, 2, 2)
)
WHOLE = TpuBlockSizes(
    TpuBlocks(256, 256, 128, 256, 2, 1, 4), TpuBlocks(256, 256, 256, 128, 1, 0)
)
# Sums are of the weights as bf16: each is off by 2^-8 of itself at most, and so is
# their sum.
BF16_SUMS = 2.0**-8
# Memory that nobody wrote holds NaN, and reads past the end of an array are errors.
POISONED = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def check_tpu(
    case: Case, blocks: TpuBlockSizes, interpret: Any = POISONED, **bounds: float
) -> None:
    options = {"backend": "tpu", "block_sizes": blocks, "interpret": interpret}
    forward = partial(kernel.attention_forward, **options)
    check(
        forward,
        partial(kernel.attention_backward, **options),
        case,
        lse_rounding=BF16_SUMS,
        **bounds,
    )


ALL = {"window": 150, "prefix": True, "packed": True, "soft_cap": 2.0, "slopes": True}
CASES = {
    "everything": (
        Case((2, 260, 300, 2, 1, 6, 9), place="static", sinks=True, **ALL),
        HIGH,
    ),
    "everything, traced": (
        Case((2, 130, 150, 2, 1, 6, 9), place="traced", sinks=True, **ALL),
        SMALL,
    ),
    "bf16": (
        Case((1, 200, 300, 2, 1, 9, 5), "bfloat16", packed=True, sinks=True),
        WIDE,
    ),
    "both ways, wide heads": (
        Case((1, 130, 257, 1, 1, 130, 140), causal=False, slopes=True),
        WHOLE,
    ),
    "a query": (Case((2, 1, 100, 1, 1, 8, 8), place="traced", prefix=True), SMALL),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference_and_memory_that_nobody_wrote_is_never_read(name):
    check_tpu(*CASES[name])


@pytest.mark.heavy
def test_half_precision_costs_no_more_than_in_plain_attention():
    case = Case((1, 256, 256, 2, 1, 32, 32), "bfloat16", soft_cap=5.0)
    check_tpu(case, WHOLE, interpret=True, rounding=0)


# Documents of one block and of several; one that ends within a block; and positions
# that the program does not know.
DOCUMENTS = [
    ((128, 128, 256), True, False),
    ((300,), False, False),
    ((300,), True, True),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("lengths", "causal", "traced"), DOCUMENTS)
def test_documents_that_fill_blocks(lengths, causal, traced):
    q, k, v = operands(1, sum(lengths), sum(lengths), 2, 1, 8)
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    options = {"causal": causal, "segment_ids": (ids, ids)}
    options |= {
        name: np.array(7, np.int32) for name in ("q_offset", "k_offset") if traced
    }
    attend = partial(
        kernel.attention_forward, backend="tpu", block_sizes=SMALL, interpret=POISONED
    )
    results = compiled(attend)(q, k, v, **options)
    for result, want in zip(
        results, reference.attention(q, k, v, **options), strict=True
    ):
        np.testing.assert_allclose(result, want, atol=1e-5)


PARTS = {
    "far window": (Case((1, 100, 300, 1, 1, 8, 8), window=250, place="static"), 128),
    "prefix, traced": (
        Case(
            (2, 200, 300, 2, 1, 8, 8),
            prefix=True,
            packed=True,
            sinks=True,
            place="traced",
        ),
        256,
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [pytest.param("far window", marks=pytest.mark.more), "prefix, traced"]
)
def test_keys_that_vmem_does_not_hold_go_in_parts(monkeypatch, name):
    """Forward and backward, each on a chip whose VMEM holds just so many keys."""
    case, keys = PARTS[name]
    parts = []
    taken = tpu._list_key_parts
    monkeypatch.setattr(
        tpu, "_list_key_parts", lambda *x: parts.append(taken(*x)) or parts[-1]
    )

    def on_chip_with_room(function, direction, blocks, out_bytes):
        _, S, T, _, _, H, Hv = case.shape
        sizes = AttentionSizes(S, T, H, Hv, jnp.dtype(case.dtype).itemsize, out_bytes)
        room = int(vmem_bytes(direction, blocks, sizes, keys) / 0.85) + 9
        chip = CHIPS["v4"]._replace(vmem_bytes=room)

        def run(*operands, **options: Unpack[AttentionOptions]):
            monkeypatch.setattr(tpu, "get_chip", lambda: chip)
            return function(
                *operands,
                **options,
                backend="tpu",
                block_sizes=SMALL,
                interpret=POISONED,
            )

        return run

    itemsize = jnp.dtype(case.dtype).itemsize
    check(
        on_chip_with_room(kernel.attention_forward, FORWARD, SMALL.forward, itemsize),
        on_chip_with_room(kernel.attention_backward, BACKWARD, SMALL.backward, 4),
        case,
        lse_rounding=BF16_SUMS,
    )
    assert [len(x) for x in parts] == 2 * [-(-case.shape[2] // keys)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TpuBlocks(100, 128, 128, 128), r"\(100, .*, 0\): sizes are multiples"),
        (TpuBlocks(256, 256, 512, 128), r"\(256, .*, 0\): tiles do not divide"),
        (
            TpuBlocks(8192, 8192, 512, 512),
            r"sizes 64 and 128 take \d+ .* a v4 has 16777216",
        ),
    ],
)
def test_blocks_that_no_kernel_has(wrong, message):
    """Refused by the pass that they are for, before anything is lowered."""
    q, v, row = (jnp.zeros((1, 300, 2, *last)) for last in ((64,), (128,), ()))
    good = SMALL.forward
    for function, arrays, refused, allowed in (
        (kernel.attention_forward, (q, q, v), (wrong, good), (good, wrong)),
        (
            kernel.attention_backward,
            (q, q, v, row, row, v),
            (good, wrong),
            (wrong, good),
        ),
    ):
        run = partial(function, backend="tpu", block_sizes=TpuBlockSizes(*allowed))
        jax.eval_shape(run, *arrays)
        run = partial(function, backend="tpu", block_sizes=TpuBlockSizes(*refused))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, *arrays)
