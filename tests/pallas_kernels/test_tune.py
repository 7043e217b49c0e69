"""Blocks from the table are valid for whom they are given to; the search finds the
cheapest; bad requests end with a line."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_cycles import bench, tune, tuning
from benchmarks.kernel_cycles.tuning import Problem
from pallas_kernels import chips
from pallas_kernels.attention import tpu, tpu_blocks, tuned
from pallas_kernels.attention.params import validate_arguments
from pallas_kernels.attention.tpu_blocks import (
    FORWARD,
    PASSES,
    AttentionSizes,
    TpuBlocks,
)
from pallas_kernels.chips import CHIPS

V5P = CHIPS["v5p"]
PROBLEM = Problem(FORWARD, 128, 128, 4096, "causal", "bfloat16", 8)
BLOCKS = TpuBlocks(1024, 512, 256, 128, 2, False)


def entry(chip="v5p", blocks=BLOCKS, **changes: str | int):
    return PROBLEM._replace(**changes).entry(chip, blocks, 1000, "jax 0")


def sizes(S=4096, T=None, H=128, Hv=128, width=2):
    return AttentionSizes(S, S if T is None else T, H, Hv, width, width)


def bytes_needed(blocks: TpuBlocks, direction: str, at: AttentionSizes) -> int:
    """Of VMEM for the smallest run of keys."""
    return tpu_blocks.vmem_bytes(direction, blocks, at, blocks.k)


def test_every_entry_of_the_table_fits_its_chip():
    entries = tuned.load_table()
    for one in entries:
        blocks = TpuBlocks(**one.blocks)
        problem = Problem(
            one.direction, *one.head_sizes, one.seq, one.mask, one.dtype, one.heads
        )
        tpu_blocks.check_blocks(blocks)
        chip = CHIPS[one.chip]
        assert bytes_needed(blocks, one.direction, problem.sizes) < chip.vmem_bytes
        assert one.seq % blocks.q == one.seq % blocks.k == 0
        assert 0 < one.cost < math.inf
        assert one.made_with
        problem.segment_ids()
        # The row that a program of this shape would ask for.
        assert (
            tuned.find_tuned_blocks(chip, one.direction, problem.sizes, one.mask_kind)
            == blocks
        )
    assert tuned.format_table(entries) == tuned.TABLE.read_text()


tables = st.lists(
    st.builds(
        entry,
        direction=st.sampled_from(PASSES),
        seq=st.sampled_from([512, 4096, 32768]),
        mask=st.sampled_from(["causal", "window:1000", "segments:8"]),
        blocks=st.builds(
            lambda q, k, tq, tk: TpuBlocks(q, min(q, k), min(q, tq), min(q, k, tk)),
            *[st.sampled_from([128, 256, 512, 1024, 2048, 8192])] * 2,
            *[st.sampled_from([128, 256, 512])] * 2,
        ),
    ),
    max_size=8,
)


@settings(max_examples=100)
@given(
    tables,
    st.sampled_from(PASSES),
    st.integers(1, 40_000),
    st.integers(1, 40_000),
    st.sampled_from(["causal", "window:1024", "segments"]),
)
def test_what_the_table_gives_is_valid_for_these_lengths(table, direction, S, T, kind):
    blocks = tuned.find_tuned_blocks(V5P, direction, sizes(S, T), kind, table)
    if blocks is None:  # most tables have nothing for it
        return
    tpu_blocks.check_blocks(blocks)
    assert bytes_needed(blocks, direction, sizes(S, T)) < V5P.vmem_bytes
    for n, size in ((S, blocks.q), (T, blocks.k)):
        padded, least = -(-n // size) * size, -(-n // 128) * 128
        assert padded <= least * 10 / 9
    assert (direction, kind, blocks._asdict()) in [
        (e.direction, e.mask_kind, e.blocks) for e in table
    ]


def test_kinds_of_masks():
    x = jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32)
    ids = np.ones((1, 8), np.int32)

    def kind(causal=True, window=None, segment_ids=None):
        operands, params = validate_arguments(
            x, x, x, causal=causal, window=window, segment_ids=segment_ids
        )
        return tuned.name_mask_kind(params, operands)

    assert kind() == tuned.parse_mask_kind("causal") == "causal"
    assert kind(causal=False) == tuned.parse_mask_kind("full") == "full"
    assert kind(window=1000) == tuned.parse_mask_kind("window:700") == "window:1024"
    assert kind(window=1) == "window:1"
    assert (
        kind(segment_ids=(ids, ids))
        == tuned.parse_mask_kind("segments:8")
        == "segments"
    )


@pytest.mark.parametrize("direction", PASSES)
def test_the_kernel_takes_the_tables_blocks(direction, monkeypatch):
    small = TpuBlocks(128, 128, 128, 128)
    problem = Problem(direction, 64, 64, 512, "window:100", "float32", 1)
    monkeypatch.setattr(
        tuned, "load_table", lambda: (problem.entry("v4", small, 1, ""),)
    )
    seen = []
    known = tpu.count_keys_in_vmem
    monkeypatch.setattr(
        tpu,
        "count_keys_in_vmem",
        lambda of, ours, *rest: seen.append(ours) or known(of, ours, *rest),
    )
    run = problem.attention(None)

    def on_tpu(*arrays):
        return run(*arrays)

    monkeypatch.setattr(chips, "get_platform", lambda: "tpu")
    jax.eval_shape(on_tpu, *problem.operands())
    assert seen == [small]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (tune, "--chip v9", "invalid choice: 'v9'"),
        (tune, "--chip v5p --mask segments:7", "7 segments do not divide 4096 tokens"),
        (tune, "", "name a TPU with --chip"),
        (bench, "--mask diagonal", "mask 'diagonal'"),
        (
            bench,
            "--all --seq 77",
            "no shape of --all has head size, sequence and mask None, 77",
        ),
        (bench, f"--cache {__file__}", "test_tune.py: File exists"),
    ],
)
def test_bad_requests_end_with_2_and_a_line(
    command, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(command, "has_compiler", lambda: True)
    monkeypatch.setattr(tuning, "measure", None)
    try:
        code = command.main(arguments.split())
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
