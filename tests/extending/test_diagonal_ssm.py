"""A diagonal state-space mixer with a recurrent cache, as an external package writes
it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from maxlm.config import Config, MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.blocks import MIXERS, RegisteredMixer
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheArraySpec, RecurrentCache, SplitArray
from maxlm.models.costs import LayerCosts, group_matrices
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import NormConfig
from maxlm.models.params import (
    bind,
    declare,
    flatten_names,
    materialize,
    param_specs,
)
from maxlm.plan.compiled.compare import count_step_products
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.plan.serving_cache import count_layer_caches, count_sequence_bytes
from maxlm.plan.timing import count_extra_forward_flops
from maxlm.run.config import RunConfig
from maxlm.run.placement import require_run_trainable
from maxlm.sharding import AxisRules
from maxlm.train.program import train_model
from maxlm.train.smoke import shrink_config
from tests.models.building import LLAMA_GQA, draw_params
from tests.plan.test_against_compiled import compiled, sent
from tests.train import tiny

WIDTH = 10


class DiagonalSsmConfig(Config):
    kind: Literal["diagonal_ssm"] = "diagonal_ssm"
    width: int = WIDTH


def find_starts(segment_ids):
    """Bool [B, S]: the first token of each document of a packed row; None of a row that
    is one."""
    if segment_ids is None:
        return None
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return segment_ids != before


def advance(state, tokens, live, decay, starts=None):
    """Runs the recurrence over T tokens: state [n, F], their values [n, T, F], live and
    starts bool [n, T]. A token that is not live leaves the state as it is; a start sets
    it to zero first, so that nothing of the document before it is left."""
    (values,) = tokens
    if starts is None:
        starts = jnp.zeros_like(live)

    def step(state, token):
        value, live, start = token
        before = jnp.where(start[:, None], 0.0, state)
        after = decay * before + (1 - decay) * value.astype(jnp.float32)
        state = jnp.where(live[:, None], after, state)
        return state, state

    state, states = lax.scan(step, state, (values.swapaxes(0, 1), live.T, starts.T))
    return state, states.swapaxes(0, 1).astype(values.dtype)


class DiagonalSsm(nnx.Module):
    """``h[t] = a · h[t-1] + (1 - a) · up(x[t])``, ``y = out(h · silu(gate(x)))``; h is
    zero where a document begins."""

    name = "ssm"

    def __init__(
        self, config: DiagonalSsmConfig, norm: NormConfig, context: BuildContext
    ):
        del norm
        self.width = config.width
        self.rules = context.rules
        residual = {"embed": context.d_model}
        state = {"mlp": config.width}
        self.up = Linear(residual, state, context, bias=False)
        self.gate = Linear(residual, state, context, bias=False)
        self.out = Linear(state, residual, context, bias=False)
        self.decay = declare(
            (config.width,), ("mlp",), jax.nn.initializers.ones, "vector"
        )

    def __call__(self, x, inputs, cache):
        up, gate = project(x, self.up, self.gate)
        decay = jax.nn.sigmoid(materialize(self.decay, self.rules, jnp.float32))

        if cache is None:
            state = jnp.zeros_like(up[:, 0], jnp.float32)
            live = jnp.ones(up.shape[:2], bool)
            starts = find_starts(inputs.segment_ids)
            _, y = advance(state, (up,), live, decay, starts)
        else:
            y, cache = cache.run(
                advance,
                [SplitArray(up, ("mlp",))],
                inputs.batch,
                self.rules,
                params=[SplitArray(decay, ("mlp",))],
                output_axes=("mlp",),
            )
        y = self.out(y * jax.nn.silu(gate), seq_axis="residual")
        return MixerOutput(y, cache)

    def cache_spec(self, layout, window):
        shape = layout.num_shards, layout.num_rows, self.width
        return RecurrentCache(
            CacheArraySpec(shape, ("batch", None, "mlp"), jnp.float32)
        )

    def costs(self):
        return LayerCosts(
            group_matrices(self), extra_flops=3 * self.width, flops_axes=("mlp",)
        )


REGISTERED = RegisteredMixer(DiagonalSsmConfig, DiagonalSsm)
MIXERS.register("diagonal_ssm", REGISTERED)

MIXER = {"kind": "diagonal_ssm", "width": WIDTH}
OWN = {
    "attention": None,
    "mixer": MIXER,
    "positions": {"kind": "none"},
    "init_std": 0.4,
}
CONFIG = DecoderConfig.model_validate(LLAMA_GQA.model_dump() | OWN)


@pytest.fixture
def model():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield CONFIG.build(rules=AxisRules(), dtype=jnp.float32)


def test_its_config_reads_back_and_its_parameters_are_declared(model):
    assert DecoderConfig.model_validate(CONFIG.model_dump()) == CONFIG
    assert isinstance(CONFIG.mixer, DiagonalSsmConfig)
    prefix = "layers.ssm."
    all_names = flatten_names(param_specs(model))
    names = [name for name in all_names if name.startswith(prefix)]
    own_names = ("decay", "gate.kernel", "out.kernel", "up.kernel")
    assert names == [f"{prefix}{name}" for name in own_names]


def test_a_packed_row_is_its_documents_apart(model):
    """Documents of 9, 1 and 14 tokens in a row of 32 with padding, and each in a row of
    its own."""
    params = jax.tree.map(jnp.float32, draw_params(param_specs(model)))
    random = np.random.default_rng(0)
    documents = [random.integers(0, 31, length) for length in (9, 1, 14)]

    def pack(documents):
        row = np.zeros((3, 1, 32), np.int32)
        end = 0
        for number, document in enumerate(documents, 1):
            span = np.s_[end : end + len(document)]
            end += len(document)
            row[0, 0, span] = document
            row[1, 0, span] = np.arange(len(document))
            row[2, 0, span] = number
        return row

    @jax.jit
    def read(params, row):
        tokens, positions, segment_ids = row
        return bind(model, params)(tokens, positions, segment_ids)[0][0]

    together = np.asarray(read(params, pack(documents)))[:24]
    apart = [read(params, pack([document]))[: len(document)] for document in documents]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=0, atol=1e-6)


@pytest.mark.heavy
def test_generation_equals_the_full_forward_pass(model):
    """More prompts than rows, in chunks that end anywhere; rows are used again, and
    forked."""
    params = jax.tree.map(jnp.float32, draw_params(param_specs(model)))
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 31, n).tolist() for n in (1, 19, 6, 11)]
    config = EngineConfig(
        max_sequences=2, max_length=32, prefill_tokens=8, decode_steps=3
    )
    engine = Engine(model, params, config)
    outputs = {}
    assert {x.shape for x in jax.tree.leaves(engine._runner.state)} == {(1, 2, WIDTH)}
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    requests = [
        GenerationRequest(
            str(i), tuple(prompt), greedy, num_sequences=1 + i % 2, top_logprobs=0
        )
        for i, prompt in enumerate(prompts)
    ]
    for output in engine.run(requests):
        key = (int(output.request_id), output.sequence_index)
        tokens = outputs.setdefault(key, [])
        tokens += zip(output.token_ids, output.logprobs, strict=True)

    @jax.jit
    def read(params, text):
        bound = bind(model, params)
        places = jnp.arange(32, dtype=jnp.int32)[None]
        return jax.nn.log_softmax(bound.logits(bound(text, places)[0]))

    assert len(outputs) == 6
    for (number, _), output in outputs.items():
        prompt = prompts[number]
        tokens = [token for token, _ in output]
        text = np.zeros((1, 32), np.int32)
        text[0, : len(prompt) + 8] = [*prompt, *tokens]
        rows = np.asarray(read(params, text))[0, len(prompt) - 1 :][:8]
        assert rows.argmax(-1).tolist() == tokens
        logprobs = [one.logprob for _, one in output]
        np.testing.assert_allclose(logprobs, rows.max(-1), rtol=0, atol=1e-5)


LAYERS, D, FF, F, VOCAB, SEQ = 2, 32, 64, 16, 304, 32


def make_run(folder: Path, **top: Any) -> RunConfig:
    settings = tiny.settings(folder, str(folder / "text"))
    settings["data"]["heldout_fraction"] = 0
    settings["model"] |= {
        "attention": None,
        "mixer": {"kind": "diagonal_ssm", "width": F},
        "positions": {"kind": "none"},
    }
    settings["optimizer"] = {"kind": "adamw"}
    return RunConfig.model_validate(settings | top)


@pytest.mark.parametrize("stated", [True, False])
def test_the_plan_counts_its_parameters_flops_and_cache(stated, tmp_path, monkeypatch):
    """A mixer that states no costs is counted by its matrices."""
    if not stated:
        monkeypatch.delattr(DiagonalSsm, "costs")
    matrices = LAYERS * (3 * D * F + 3 * D * FF)
    norms = (2 * LAYERS + 1) * D
    plan = plan_run(make_run(tmp_path), Machine.from_name("h100x1"))
    assert plan.layout.parameters == matrices + norms + LAYERS * F + 2 * VOCAB * D
    recurrence = LAYERS * 3 * F if stated else 0
    assert plan.layout.flops_per_token == 6 * (matrices + VOCAB * D) + 3 * recurrence
    assert count_extra_forward_flops(plan.shape) == recurrence * 8 * SEQ
    groups = [group.name for group in plan.shape.work.matmul_layer_counts]
    assert "ssm: gate, up" in groups
    assert "a layer's mixer" in plan.memory.working_sets
    assert (plan.step_seconds or 0) > 0
    model: Any = make_run(tmp_path).model.build(rules=AxisRules(), dtype=jnp.bfloat16)
    caches = count_layer_caches(model)
    for length in (7, 4096):
        # One state in fp32, however long the sequence.
        assert count_sequence_bytes(caches, length) == LAYERS * F * 4


@pytest.mark.heavy
@pytest.mark.usefixtures("compiled_once")
def test_the_plan_counts_what_the_compiled_step_multiplies_and_sends(tmp_path):
    shape, cost, _ = compiled(make_run(tmp_path, mesh={"fsdp": 4, "tensor": 2}))
    assert count_step_products(shape).total_flops == cost.matmul_flops
    ours = sent(shape)
    theirs = cost.wire_by_kind_and_axes()
    for key, size in theirs.items():
        if size > 0.1 * sum(theirs.values()):
            assert ours[key] == pytest.approx(size, rel=0.03), key


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.usefixtures("compiled_once")
def test_it_trains_and_resumes_as_any_model_does(tmp_path):
    tiny.write_text(tmp_path / "text")
    parts = {"mesh": {"fsdp": 4, "tensor": 2}, "reporting": {"tensorboard": False}}
    short = make_run(tmp_path, train={"steps": 2}, **parts)
    assert train_model(short, say=lambda _: None).start_step == 0
    long = make_run(tmp_path, train={"steps": 4}, **parts)
    again = train_model(long, say=lambda _: None)
    assert again.start_step == 2
    assert int(again.state.step) == 4
    saved = (again.folder / "config.yaml").read_text()
    assert "diagonal_ssm" in saved


@pytest.mark.parametrize("axis", ["context", "stage"])
def test_a_mesh_that_it_does_not_declare_is_refused(axis, tmp_path):
    config = make_run(tmp_path, mesh={axis: 2}, train={"steps": 1, "micro_batches": 2})
    axes = ("data", "fsdp", "expert", "tensor", "context", "stage")
    sizes = dict.fromkeys(axes, 1) | {axis: 2}
    with pytest.raises(MaxlmError) as caught:
        train_model(config, say=lambda _: None)
    meaning = {
        "context": "splits rows and reorders their tokens",
        "stage": "runs all micro-batches [M, B, ...] together through a pipeline",
    }[axis]
    assert str(caught.value) == (
        f"mesh.{axis}: {axis}=2 {meaning}, and model.mixer.kind=diagonal_ssm does not "
        "say that it supports this; set it to 1, or if it does, register it in MIXERS "
        f"with '{axis}' among mesh_axes"
    )
    assert not list(require_unmet(config, sizes | {axis: 1}))
    assert len(list(require_unmet(config, sizes))) == 1
    try:
        MIXERS.register("diagonal_ssm", replace(REGISTERED, mesh_axes=(axis,)))
        assert not list(require_unmet(config, sizes))
    finally:
        MIXERS.register("diagonal_ssm", REGISTERED)


def require_unmet(config, sizes):
    """The requirements that a mesh does not meet."""
    requirements = require_run_trainable(config, sizes, config.train.micro_batches)
    return (requirement for requirement in requirements if not requirement.is_met)


def test_its_run_shrinks_to_a_small_one_for_a_smoke_test(tmp_path):
    model = shrink_config(make_run(tmp_path), 8).model
    assert model.attention is None
    assert model.mixer == DiagonalSsmConfig(width=F)
