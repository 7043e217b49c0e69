"""Blocks from the table are valid for whom they are given to; the search finds the cheapest; bad
requests end with a line."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_cycles import bench, tune, tuning
from benchmarks.kernel_cycles.static import CompileError
from benchmarks.kernel_cycles.tuning import Problem
from pallas_kernels.attention import dispatch, hopper, tpu, tpu_blocks, triton, tuned
from pallas_kernels.attention.params import validate_arguments
from pallas_kernels.attention.tpu_blocks import AttentionSizes, TpuBlocks
from pallas_kernels.attention.tuned import BACKWARD, FORWARD, PASSES
from pallas_kernels.chips import CHIPS

V5P = CHIPS["v5p"]
PROBLEM = Problem(FORWARD, 128, 128, 4096, "causal", "bfloat16", 8)
BLOCKS = TpuBlocks(1024, 512, 256, 128, 2, False)


def entry(chip="v5p", blocks=BLOCKS, **changes):
    return PROBLEM._replace(**changes).entry(chip, blocks, 1000, "jax 0")


def sizes(S=4096, T=None, H=128, Hv=128, width=2):
    return AttentionSizes(S, S if T is None else T, H, Hv, width, width)


def bytes_needed(blocks: TpuBlocks, direction: str, at: AttentionSizes) -> int:
    """Of VMEM for the smallest run of keys."""
    needed = (
        tpu_blocks.forward_vmem_bytes if direction == FORWARD else tpu_blocks.backward_vmem_bytes
    )
    return needed(blocks, at, blocks.k)


def test_every_entry_of_the_table_fits_its_chip():
    entries = tuned.load_table()
    for one in entries:
        blocks, problem = (
            TpuBlocks(**one.blocks),
            Problem(one.direction, *one.head_sizes, one.seq, one.mask, one.dtype, one.heads),
        )
        tpu_blocks.check_blocks(blocks)
        chip = CHIPS[one.chip]
        assert bytes_needed(blocks, one.direction, problem.sizes) < chip.vmem
        assert one.seq % blocks.q == one.seq % blocks.k == 0
        assert 0 < one.cost < math.inf
        assert one.made_with
        problem.segment_ids()
        # The row that a program of this shape would ask for.
        assert tuned.find_tuned_blocks(chip, one.direction, problem.sizes, one.kind) == blocks
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
    found = tuned.find_tuned_blocks(V5P, direction, sizes(S, T), kind, table)
    if found is None:  # most tables have nothing for it
        return
    tpu_blocks.check_blocks(found)
    assert bytes_needed(found, direction, sizes(S, T)) < V5P.vmem
    for n, size in ((S, found.q), (T, found.k)):
        padded, least = -(-n // size) * size, -(-n // 128) * 128
        assert padded <= least * 10 / 9
    assert (direction, kind, found._asdict()) in [(e.direction, e.kind, e.blocks) for e in table]


def test_the_nearest_sequence_whose_blocks_fit_decides():
    at = {seq: BLOCKS._replace(q=q) for seq, q in ((1024, 512), (8192, 1024), (65536, 2048))}
    table = [entry(seq=seq, blocks=blocks) for seq, blocks in at.items()]

    def found(S, **other):
        return tuned.find_tuned_blocks(V5P, FORWARD, sizes(S, **other), "causal", table)

    assert [found(S) for S in (1024, 2048, 4096, 16384, 60 * 1024)] == [
        at[seq] for seq in (1024, 1024, 8192, 8192, 65536)
    ]
    assert found(8192 + 512) == at[8192]  # 2 % of padding
    assert found(1024 + 512) == at[1024]  # blocks of 1,024 would pad a third
    assert found(640) is None
    for other in ({"H": 64}, {"Hv": 64}, {"width": 4}):
        assert found(4096, **other) is None
    for chip, direction, kind in [
        (CHIPS["v6e"], FORWARD, "causal"),
        (V5P, BACKWARD, "causal"),
        (V5P, FORWARD, "full"),
    ]:
        assert tuned.find_tuned_blocks(chip, direction, sizes(), kind, table) is None


def test_kinds_of_masks():
    x = jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32)
    ids = np.ones((1, 8), np.int32)

    def kind(**options):
        return tuned.name_mask_kind(*reversed(validate_arguments(x, x, x, **options)))

    assert kind() == tuned.parse_mask_kind("causal") == "causal"
    assert kind(causal=False) == tuned.parse_mask_kind("full") == "full"
    assert kind(window=1000) == tuned.parse_mask_kind("window:700") == "window:1024"
    assert kind(window=1) == "window:1"
    assert kind(segment_ids=(ids, ids)) == tuned.parse_mask_kind("segments:8") == "segments"


@pytest.mark.parametrize("direction", PASSES)
def test_the_kernel_takes_the_tables_blocks(direction, monkeypatch):
    small = TpuBlocks(128, 128, 128, 128)
    problem = Problem(direction, 64, 64, 512, "window:100", "float32", 1)
    monkeypatch.setattr(tuned, "load_table", lambda: (problem.entry("v4", small, 1, ""),))
    seen, known = [], tpu.count_keys_in_vmem
    monkeypatch.setattr(
        tpu, "count_keys_in_vmem", lambda blocks, *rest: seen.append(blocks) or known(blocks, *rest)
    )
    run = problem.attention(None)

    def on_tpu(*arrays):
        return run(*arrays)

    monkeypatch.setattr(dispatch, "get_platform", lambda: "tpu")
    jax.eval_shape(on_tpu, *problem.operands())
    assert seen == [small]


@given(st.data())
def test_the_search_finds_the_minimum_of_a_valley(data):
    """A cost that each axis lowers alone; candidates outside are impossible."""
    n = data.draw(st.integers(1, 4))
    low = data.draw(st.tuples(*[st.integers(0, 4)] * n))
    begin = data.draw(st.lists(st.tuples(*[st.integers(0, 4)] * n), min_size=1, max_size=2))
    weights = data.draw(st.tuples(*[st.integers(1, 5)] * n))

    def cost(at):
        if not all(0 <= x <= 4 for x in at):
            return math.inf
        return sum(w * abs(x - y) for w, x, y in zip(weights, at, low, strict=True))

    def axis(i):
        return lambda at: [(*at[:i], at[i] + step, *at[i + 1 :]) for step in (-1, 1)]

    assert tuning.descend(begin, [axis(i) for i in range(n)], cost, 1000) == (low, 0)


@given(
    st.sampled_from(PASSES),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([512, 4096, 32768]),
    st.sampled_from(sorted(CHIPS)),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_steps_of_the_search_are_sound_blocks(direction, head_dim, seq, chip, path):
    problem = Problem(direction, head_dim, head_dim, seq, "causal", "bfloat16", 8)
    ways = tuning.axes(problem, CHIPS[chip])
    (*_, at) = tuning.starts(problem, CHIPS[chip])
    for pick in path:
        neighbours = [blocks for way in ways for blocks in way(at)]
        assert at not in neighbours
        at = neighbours[pick % len(neighbours)]
        tpu_blocks.check_blocks(at)
        assert at.q % at.k == seq % at.q == 0
        assert bytes_needed(at, direction, problem.sizes) < CHIPS[chip].vmem


def test_what_is_found_is_printed_and_kept(monkeypatch, tmp_path, capsys):
    table = tmp_path / "tuned.json"
    table.write_text(tuned.format_table([entry(seq=512)]))
    monkeypatch.setattr(tuned, "TABLE", table)
    monkeypatch.setattr(tune, "has_compiler", lambda: True)
    wanted = TpuBlocks(512, 512, 256, 256)
    costs = {FORWARD: 100, BACKWARD: 300}

    def measure(spec, chip):
        blocks, costly = TpuBlocks(*spec.kwargs["blocks"]), costs[spec.kwargs["direction"]]
        _, arrays = tuning.program(**json.loads(json.dumps(spec.kwargs)))
        assert len(arrays) == (4 if costly == 100 else 7)  # with segment ids
        if blocks.tile_k == 128:
            raise CompileError("VMEM")
        distance = sum(abs(math.log2(a / b)) for a, b in zip(blocks[:4], wanted[:4], strict=True))
        loop = SimpleNamespace(spill_stores=9 * (blocks.ahead == 2))
        kernels = [SimpleNamespace(inner_loops=(loop, loop))]
        cycles = costly + 100 * int(distance) - 5 * (blocks.ahead == 2)  # faster, but it spills
        return SimpleNamespace(cycles=lambda: cycles, kernels=kernels)

    monkeypatch.setattr(tuning, "measure", measure)
    arguments = ["--seq", "4096", "--mask", "segments:8", "--most", "40"]
    tuned.load_table.cache_clear()
    try:
        assert tune.main(["--chip", "v6e", *arguments]) == 0
        assert table.read_text() == tuned.format_table([entry(seq=512)])
        assert (
            tune.main(["--all", "--head-dim", "128", "--chip", "v5p", *arguments, "--write"]) == 0
        )
        found = {
            (e.chip, e.direction): e for e in tuned.parse_table(table.read_text()) if e.seq == 4096
        }
        assert set(found) == {("v5p", direction) for direction in PASSES}
        for direction in PASSES:
            kept = found["v5p", direction]
            assert TpuBlocks(**kept.blocks)[:4] == wanted[:4]
            assert kept.blocks["ahead"] != 2
            assert kept.spills == 0
            assert (kept.cost, kept.mask, kept.heads) == (costs[direction], "segments:8", 8)
            # The next search begins there.
            problem = PROBLEM._replace(direction=direction, mask="segments:8")
            assert tuning.starts(problem, V5P)[0][:4] == wanted[:4]
    finally:
        tuned.load_table.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"  {tuple(TpuBlocks(**found['v5p', BACKWARD].blocks))}: 300 cycles, 0.2 µs, 0 spills"
        in lines
    )


def test_a_gpu_times_the_candidates_of_its_kernel(monkeypatch, tmp_path, capsys):
    """With XLA in the kernel's place: what is called, with what, and what is kept."""
    rule = triton.default_block_sizes(8, 4, jnp.bfloat16)
    tiles = [rule.forward._replace(q=q) for q in (16, 32)]
    asked = []

    def forward(*arrays, block_sizes, interpret):
        asked.append(block_sizes)
        if block_sizes.forward.q == 16:
            raise RuntimeError("out of shared memory\nand more")
        return dispatch.xla.forward(*arrays)

    table = tmp_path / "tuned.json"
    table.write_text("[]")
    monkeypatch.setattr(tuned, "TABLE", table)
    monkeypatch.setattr(triton, "forward", forward)
    monkeypatch.setattr(triton, "list_block_candidates", lambda *_: (rule, {"forward": tiles}))
    monkeypatch.setattr(dispatch, "get_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tuning, "microseconds", lambda *_, once=tuning.microseconds: once(*_, 1, 1))
    arguments = "--head-dim 8 --v-head-dim 4 --seq 64 --mask segments:2 --heads 2 --pass forward"
    assert tune.main([*arguments.split(), "--write"]) == 0
    assert asked == [rule, *(rule._replace(forward=t) for t in tiles)]
    assert "out of shared memory" in capsys.readouterr().out
    (kept,) = tuned.parse_table(table.read_text())
    assert kept.blocks["forward"] in (list(rule.forward), list(tiles[1]))
    assert kept.chip == f"{jax.devices()[0].device_kind}, triton"
    assert 0 < kept.cost < 1e7
    monkeypatch.setattr(dispatch, "get_platform", lambda: "cpu")
    assert tune.main(arguments.split()) == 2
    assert "no candidates for this backend" in capsys.readouterr().err


@pytest.mark.parametrize(("kernel", "head_dim"), [(triton, 64), (hopper, 64), (hopper, 256)])
@pytest.mark.parametrize("direction", PASSES)
def test_a_gpus_kernel_takes_the_tables_blocks(kernel, head_dim, direction, monkeypatch):
    """Every candidate survives the way through the table."""
    problem = Problem(direction, head_dim, head_dim, 512, "window:100", "bfloat16", 1)
    name = kernel.__name__.rpartition(".")[2]
    rule, fields = kernel.list_block_candidates(direction, head_dim, head_dim, jnp.bfloat16)
    q, _, v = problem.operands()[:3]
    operands, params = validate_arguments(q, q, v, window=70)
    assert kernel._chosen(direction, q, v, operands, params) == rule
    tried = [rule._replace(**{f: value}) for f, values in fields.items() for value in values]
    assert len(tried) > 4
    for sizes in tried:
        entry = problem.entry(tuned.name_gpu_kernel(name), sizes, 1, "")
        monkeypatch.setattr(
            tuned, "load_table", lambda entry=entry: tuned.parse_table(tuned.format_table([entry]))
        )
        assert kernel._chosen(direction, q, v, operands, params) == sizes
        assert kernel._chosen(direction, q, v, operands, params._replace(window=7)) == rule


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (tune, "--chip v9", "invalid choice: 'v9'"),
        (tune, "--chip v5p --seq 0", "not a positive whole number"),
        (tune, "--chip v5p --mask segments:7", "7 segments do not divide 4096 tokens"),
        (tune, "--chip v5p --all --seq 77", "no shape of --all"),
        (tune, "", "no candidates for this backend, cpu: name a TPU with --chip"),
        (bench, "--mask diagonal", "mask 'diagonal'"),
        (bench, "--all --seq 77", "no shape of --all has head size, sequence and mask None, 77"),
        (bench, "--all --kernel grouped_matmul", "--all has shapes of attention, none of"),
        (bench, f"--cache {__file__}", "test_tune.py: File exists"),
    ],
)
def test_bad_requests_end_with_2_and_a_line(command, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "has_compiler", lambda: True)
    monkeypatch.setattr(tuning, "measure", None)
    try:
        code = command.main(arguments.split())
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
