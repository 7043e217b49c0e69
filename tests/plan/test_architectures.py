"""A plan counts what layers of every kind do: by hand; as the compiled step does it,
see test_against_compiled.py."""

import jax.numpy as jnp
import pytest

from maxlm.config import MaxlmError, load_config
from maxlm.plan.layout import compute_run_layout
from maxlm.plan.memory import list_layer_working_sets
from maxlm.plan.predict import Machine
from maxlm.plan.search import search_layouts
from maxlm.plan.timing import (
    attention_score_bytes,
    count_attention_scores,
    count_device_flops,
)
from maxlm.plan.topology import parse_topology
from maxlm.plan.workload import RunWorkload, StepShape
from maxlm.run.config import RunConfig
from maxlm.sharding import MESH_AXES
from tests.plan.architectures import run

SEQ = 448
ALONE = dict.fromkeys(MESH_AXES, 1)


def preset(name: str, task: str, *settings: str) -> RunConfig:
    own = [f"data.seq_len={SEQ}", "data.batch_size=64", f"task.kind={task}"]
    return load_config(RunConfig, name, [*own, *settings]).value


def test_deepseek_by_hand():
    """DeepSeek-V2-Lite: 27 layers, of which the first has an MLP."""
    d, heads, rank, rotary, plain, value = 2048, 16, 512, 64, 128, 128
    attention = (
        d * heads * (plain + rotary)  # queries
        + d * (rank + rotary)  # the narrow vector, the shared keys
        + rank * heads * (plain + value)
        + heads * value * d
    )
    expert, router, dense, table = 3 * d * 1408, d * 64, 3 * d * 10944, 102400 * d
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
    projection, mlp = d * heads, 2 * d * 2048
    of_inputs = (
        6 * (4 * projection + mlp) + 6 * 2 * projection
    )  # the decoder's keys and values
    own = 6 * (4 * projection + mlp) + 6 * 2 * projection + 32128 * d
    # (queries, keys, whether half of them are masked)
    looks = [(464, 464, False), (312, 312, True), (312, 464, False)]
    for count, got in (
        (2, layout.flops_per_token),
        (1, layout.flops_per_token_full_attention),
    ):
        pairs = sum(q * k / (count if masked else 1) for q, k, masked in looks)
        row = 6 * (464 * of_inputs + 312 * own) + 3 * 6 * 4 * heads * pairs
        assert got * SEQ == pytest.approx(row, rel=1e-12)


def work(name: str, **changes) -> RunWorkload:
    return RunWorkload(run(name, "dp", **changes), jnp.float32)


def device_flops(own: RunWorkload):
    return count_device_flops(StepShape(own, ALONE, 1, "full"))


def test_layers_over_the_last_pattern_count_like_others():
    """Eight layers, kinds by turns of three: windows 7, 5, none."""
    whole, more = work("pattern"), work("pattern", num_layers=8)
    assert [s.name for s in more.stacks] == ["layers", "last_layers"]
    assert {own.window: n for own, n in more.attention_layer_counts.items()} == {
        7: 3,
        5: 3,
        None: 2,
    }
    assert [*more.matmul_layer_counts.values()] == [8] * len(whole.matmul_layer_counts)
    assert device_flops(more).forward == pytest.approx(
        device_flops(whole).forward * 8 / 6
    )


def test_windows_by_turns_cost_less_than_none():
    long = {"max_seq_len": 4096, "num_layers": 6}
    config = run("pattern", "dp", **long)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"seq_len": 4096})}
    )
    model = config.model
    kinds = [kind.model_copy(update={"window": None}) for kind in model.pattern]
    plain = config.model_copy(
        update={"model": model.model_copy(update={"pattern": tuple(kinds[-1:])})}
    )
    by_turns, all_see = (
        device_flops(RunWorkload(c, jnp.float32)).attention_forward
        for c in (config, plain)
    )
    # Of 16 tiles a window sees its own alone; without one, all before it: 17 / 32.
    own = (
        (256 * 256 + 15 * 256 * (256 + 6)) / 4096**2,
        (256 * 256 + 15 * 256 * 260) / 4096**2,
    )
    assert by_turns / all_see == pytest.approx(
        (sum(own) + 17 / 32) / (3 * 17 / 32), rel=1e-6
    )


def test_no_kernel_adds_learnt_biases():
    """On a TPU scores with them go through memory, and a tile of them is held;
    cross-attention's, which have none, stay on the chip."""

    def on_tpu(kind: str) -> StepShape:
        own = work("encoder_decoder", positions={"kind": kind})
        return StepShape(own, ALONE, 1, "full", parse_topology("v5p-2"))

    plain, biased = on_tpu("rope"), on_tpu("relative")
    assert (
        count_device_flops(biased).attention_forward
        == count_device_flops(plain).attention_forward
    )
    assert attention_score_bytes(plain) == (0, 0)
    # Its share of all scores: an encoder of two layers beside a decoder of four.
    crossing = 4 * 16 * 32 / (2 * 32 * 32 + 4 * 16 * 16 + 4 * 16 * 32)
    assert count_attention_scores(biased, fused=True) == pytest.approx(
        crossing * count_attention_scores(plain, fused=True)
    )
    whole = StepShape(biased.work, ALONE, 1, "full")  # no kernel at all
    got, most = (attention_score_bytes(shape)[0] for shape in (biased, whole))
    assert got == pytest.approx((1 - crossing) * most)
    tiles = {
        phase: parts["scores of a tile"]
        for phase, parts in list_layer_working_sets(
            biased, biased.work.stacks[-1]
        ).items()
        if "scores of a tile" in parts
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


@pytest.mark.parametrize("model", ["latent", "encoder_decoder"])
def test_a_search_proposes_nothing_that_is_refused(model):
    """Every candidate that divides passes the run's own checks."""
    config = run(model, "dp")
    found = search_layouts(config, Machine.from_name("h100x2"), top=10_000)
    assert len(found.best) == found.num_fitting > 0, found.last_refusal
