"""A plan counts what layers of every kind do: by hand; as the compiled step does it,
see test_against_compiled.py."""

from dataclasses import replace
from math import inf

import jax.numpy as jnp
import pytest

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.plan.layout import compute_run_layout
from maxlm.plan.machine import Machine
from maxlm.plan.memory import list_layer_working_sets
from maxlm.plan.predict import plan_run
from maxlm.plan.search import search_layouts
from maxlm.plan.timing import (
    EFFICIENCY,
    count_attention_score_bytes,
    count_attention_scores,
    count_device_flops,
    count_recurrence_products,
)
from maxlm.plan.topology import parse_topology
from maxlm.plan.workload import RunWorkload, StepShape
from maxlm.run.config import RunConfig
from maxlm.sharding import MESH_AXES
from tests.plan.architectures import run

SEQ = 448
ALONE = dict.fromkeys(MESH_AXES, 1)


def preset(name: str, task: str, *settings: str) -> RunConfig:
    usual = [f"data.seq_len={SEQ}", "data.batch_size=64", f"task.kind={task}"]
    return load_config(RunConfig, name, [*usual, *settings]).value


def test_deepseek_by_hand():
    """DeepSeek-V2-Lite: 27 layers, of which the first has an MLP."""
    d = 2048
    heads = 16
    rank = 512
    rotary = 64
    plain = 128
    value = 128
    attention = (
        d * heads * (plain + rotary)  # queries
        + d * (rank + rotary)  # the narrow vector, the shared keys
        + rank * heads * (plain + value)
        + heads * value * d
    )
    expert = 3 * d * 1408
    router = d * 64
    dense = 3 * d * 10944
    table = 102400 * d
    norms = 27 * (2 * d + rank) + d
    met = 27 * attention + dense + 26 * (router + (6 + 2) * expert)
    layout = compute_run_layout(preset("deepseek_v2_lite", "clm"), ALONE)
    assert layout.active_parameters == met + norms + 2 * table
    assert (
        layout.parameters
        == layout.active_parameters + 26 * (64 - 6) * expert
        == 15_706_484_224
    )
    # Scores of queries and keys, and of weights and values, forward and twice backward.
    pairs = 27 * SEQ * heads * 3 * 2 * (plain + rotary + value)
    assert layout.flops_per_token_full_attention == 6 * (met + table) + pairs
    assert layout.flops_per_token == 6 * (met + table) + pairs / 2
    # Nothing is masked in an encoder.
    both_ways = compute_run_layout(preset("bert_base", "mlm"), ALONE)
    assert both_ways.flops_per_token == both_ways.flops_per_token_full_attention


def test_an_encoder_and_a_decoder_by_hand():
    """T5 small: six layers each, and rows of so many tokens."""
    config = preset("t5_small", "ul2", "task.encoder_len=464", "task.decoder_len=312")
    layout = compute_run_layout(config, ALONE)
    d = 512
    heads = 8 * 64
    projection = d * heads
    mlp = 2 * d * 2048
    # With the decoder's keys and values.
    of_inputs = 6 * (4 * projection + mlp) + 6 * 2 * projection
    of_outputs = 6 * (4 * projection + mlp) + 6 * 2 * projection + 32128 * d
    # (queries, keys, whether half of them are masked)
    looks = [(464, 464, False), (312, 312, True), (312, 464, False)]
    weights = 6 * (464 * of_inputs + 312 * of_outputs)
    for masked_share, flops_per_token in (
        (0.5, layout.flops_per_token),
        (1.0, layout.flops_per_token_full_attention),
    ):
        pairs = sum(
            queries * keys * (masked_share if masked else 1)
            for queries, keys, masked in looks
        )
        row = weights + 3 * 6 * 4 * heads * pairs
        assert flops_per_token * SEQ == pytest.approx(row, rel=1e-12)


def work(config: RunConfig) -> RunWorkload:
    return RunWorkload(config, jnp.float32)


def device_flops(work: RunWorkload):
    return count_device_flops(StepShape(work, ALONE, 1, "full"))


@pytest.mark.parametrize(("name", "products"), [("cpux8", 1), ("h100x8", 3)])
def test_products_of_a_recurrence_are_no_vector_work(name, products):
    """All that lightning attention states are products, of which a kernel makes three
    in bf16."""
    config = run("lightning", "dp")
    machine = Machine.from_name(name)

    def plan_traffic(vector_flops: float, peak_flops: float) -> float:
        chip = replace(
            machine.chip,
            vector_flops=vector_flops,
            peak_flops=dict.fromkeys(machine.chip.peak_flops, peak_flops),
            page_allocation_bandwidth=inf,
        )
        plan = plan_run(config, replace(machine, chip=chip))
        return float(plan.time.traffic)

    assert plan_traffic(1.0, 1e12) == plan_traffic(1e12, 1e12)
    shape = plan_run(config, machine).shape
    flops = products * sum(count_recurrence_products(shape))
    rate = EFFICIENCY[machine.chip.family].matmul * 1e6
    slow = plan_traffic(1.0, 1e6) - plan_traffic(1.0, 1e30)
    assert slow == pytest.approx(flops / rate)


def test_layers_over_the_last_pattern_count_like_others():
    """Eight layers, kinds by turns of three: windows 7, 5, none."""
    whole = work(run("pattern", "dp"))
    more = work(run("pattern", "dp", num_layers=8))
    assert [stack.name for stack in more.stacks] == ["layers", "last_layers"]
    layers_by_window = {
        attention.window: layers
        for attention, layers in more.attention_layer_counts.items()
    }
    assert layers_by_window == {7: 3, 5: 3, None: 2}
    assert [*more.matmul_layer_counts.values()] == [8] * len(whole.matmul_layer_counts)
    assert device_flops(more).forward == pytest.approx(
        device_flops(whole).forward * 8 / 6
    )


def test_windows_by_turns_cost_less_than_none():
    config = run("pattern", "dp", max_seq_len=4096, num_layers=6)
    data = config.data.model_copy(update={"seq_len": 4096})
    config = config.model_copy(update={"data": data})
    last_kind = config.model.pattern[-1].model_copy(update={"window": None})
    plain_model = config.model.model_copy(update={"pattern": (last_kind,)})
    plain = config.model_copy(update={"model": plain_model})
    by_turns = device_flops(RunWorkload(config, jnp.float32)).attention_forward
    all_see = device_flops(RunWorkload(plain, jnp.float32)).attention_forward
    # Of 16 tiles a window sees its own alone; without one, all before it: 17 / 32.
    windowed_shares = (
        (256 * 256 + 15 * 256 * (256 + 6)) / 4096**2,
        (256 * 256 + 15 * 256 * 260) / 4096**2,
    )
    assert by_turns / all_see == pytest.approx(
        (sum(windowed_shares) + 17 / 32) / (3 * 17 / 32), rel=1e-6
    )


def test_no_kernel_adds_learnt_biases():
    """On a TPU scores with them go through memory, and a tile of them is held;
    cross-attention's, which have none, stay on the chip."""

    def on_tpu(kind: str) -> StepShape:
        workload = work(run("encoder_decoder", "dp", positions={"kind": kind}))
        return StepShape(workload, ALONE, 1, "full", parse_topology("v5p-2"))

    plain = on_tpu("rope")
    biased = on_tpu("relative")
    assert (
        count_device_flops(biased).attention_forward
        == count_device_flops(plain).attention_forward
    )
    assert count_attention_score_bytes(plain) == (0, 0)
    # Its share of all scores: an encoder of two layers beside a decoder of four.
    crossing = 4 * 16 * 32 / (2 * 32 * 32 + 4 * 16 * 16 + 4 * 16 * 32)
    assert count_attention_scores(biased, fused=True) == pytest.approx(
        crossing * count_attention_scores(plain, fused=True)
    )
    whole = StepShape(biased.work, ALONE, 1, "full")  # no kernel at all
    some_bytes, _ = count_attention_score_bytes(biased)
    all_bytes, _ = count_attention_score_bytes(whole)
    assert some_bytes == pytest.approx((1 - crossing) * all_bytes)
    working_sets = list_layer_working_sets(biased, biased.work.stacks[-1])
    tiles = {
        phase: arrays["scores of a tile"]
        for phase, arrays in working_sets.items()
        if "scores of a tile" in arrays
    }
    assert tiles["a layer's attention"] > 0 == tiles["a layer's cross-attention"]


@pytest.mark.parametrize(
    ("model", "axis", "words"),
    [
        ("latent", "stage", "but the first model.dense_layers=2 are unlike the others"),
        ("encoder_decoder", "stage", "but this is an encoder beside a decoder"),
        ("encoder_decoder", "context", "cross-attention looks at whole sequences"),
    ],
)
def test_what_layers_cannot_be_split_so_is_refused(model, axis, words):
    config = run(model, "dp")
    train = config.train.model_copy(update={"micro_batches": 2})
    with pytest.raises(MaxlmError, match=words):
        compute_run_layout(
            config.model_copy(update={"train": train}), ALONE | {axis: 2}
        )


@pytest.mark.heavy
@pytest.mark.more
@pytest.mark.parametrize("model", ["latent", "encoder_decoder"])
def test_a_search_proposes_nothing_that_is_refused(model):
    """Every candidate that divides passes the run's own checks."""
    config = run(model, "dp")
    result = search_layouts(config, Machine.from_name("h100x2"), top=10_000)
    assert len(result.best) == result.num_fitting > 0, result.last_refusal
