"""Promise: a policy with experts is trained on the experts that its tokens met in the
engine, in whatever turns and parts they were drawn; its routers learn, and models beside
it choose their own."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.inference.engine import Engine, EngineConfig
from maxlm.models.params import bind
from maxlm.rl.rollouts.packing import pack_samples
from maxlm.rl.rollouts.records import episodes_from_arrays, episodes_to_arrays
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.samples import Sample
from maxlm.rl.tasks.grpo import GrpoTask
from maxlm.tasks.task import TaskModels
from tests.inference.conftest import Tiny, build
from tests.models.building import QUICK
from tests.rl.rollouts.conftest import (
    TEMPERATURE,
    EchoEnvironment,
    by_name,
    make_config,
)

pytestmark = pytest.mark.heavy
LENGTH, SAMPLES = 128, 3


@pytest.fixture(scope="module")
def experts(one_device_mesh, chat_tokenizer) -> Tiny:
    config = {
        "vocab_size": chat_tokenizer.vocab_size,
        "num_layers": 3,
        "d_model": 20,
        "max_seq_len": LENGTH,
        "attention": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6},
        "mlp": {"d_ff": 28},
        "moe": {"num_experts": 7, "experts_per_token": 3, "d_ff": 10},
        "dense_layers": 1,
        "init_std": 0.2,
    }
    return build(config, one_device_mesh)


def with_other_routers(params: Any) -> Any:
    """The same model, but for routers that choose some other experts."""
    moe = params["layers"]["moe"]
    router = moe["router"]
    noise = np.random.default_rng(1).standard_normal(router.shape, np.float32)
    moved = jax.device_put(router + 0.003 * noise, router.sharding)
    moe = moe | {"router": moved}
    return params | {"layers": params["layers"] | {"moe": moe}}


@pytest.fixture(scope="module")
def rollout(experts, one_device_mesh, chat_tokenizer, prompts) -> SimpleNamespace:
    """Samples that were drawn while two processes went on with them, the second with
    other routers, whose routes so far are ``begun``."""
    config = EngineConfig(
        max_sequences=3,
        max_length=LENGTH,
        page_size=4,
        prefill_tokens=32,
        max_chunks=2,
        decode_steps=4,
        record_routes=True,
    )
    with jax.set_mesh(one_device_mesh):
        engine = Engine(experts.model, experts.params, config, chat_tokenizer)

        def open_sampler() -> RolloutSampler:
            return RolloutSampler(
                engine,
                chat_tokenizer,
                EchoEnvironment(),
                make_config(chat_tokenizer, {}),
                seed=3,
            )

        straight = [*open_sampler().sample(prompts, SAMPLES)]
        first = open_sampler()
        first.add(prompts, SAMPLES)
        samples = first.advance(14)
        arrays = episodes_to_arrays(first.list_unfinished())
        first.set_version(1)
        engine.set_params(with_other_routers(experts.params))
        rows = SimpleNamespace(take=lambda start, count: prompts[start : start + count])
        second = open_sampler()
        second.restore(episodes_from_arrays(arrays, rows))
        begun = {
            (e.sample.prompt.row_number, e.sample.number): [*e.sample.routes]
            for e in second.list_unfinished()
            if e.sample.routes
        }
        second.set_version(1)
        samples += second.advance()
    return SimpleNamespace(straight=straight, samples=samples, begun=begun)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def choose_routes(model, params, ids):
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    _, aux = bind(model, params)(ids, positions, record_routes=True)
    return aux.routes


def list_routes(tiny: Tiny, sample: Sample) -> np.ndarray:
    """The experts that a forward pass over a whole sample chooses."""
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(sample.tokens)] = sample.tokens
    routes = choose_routes(tiny.model, tiny.params, ids)
    return np.asarray(routes)[0, : len(sample.tokens)]


def test_samples_have_the_routes_of_their_tokens(experts, rollout, one_device_mesh):
    num_turns = [len(sample.turns) for sample in rollout.straight]
    assert max(num_turns) > 2
    with jax.set_mesh(one_device_mesh):
        for sample in rollout.straight:
            want = list_routes(experts, sample)
            # The engine has read all before the last token that it drew.
            last = np.flatnonzero(sample.is_sampled)[-1]
            assert len(sample.routes) >= last
            np.testing.assert_array_equal(sample.routes, want[: len(sample.routes)])

        assert rollout.begun
        samples = by_name(rollout.samples)
        num_other = 0
        for name, routes in rollout.begun.items():
            sample = samples[name]
            np.testing.assert_array_equal(sample.routes[: len(routes)], routes)
            want = list_routes(experts, sample)
            np.testing.assert_array_equal(routes, want[: len(routes)])
            later = np.array(sample.routes[len(routes) :])
            num_other += (later != want[len(routes) : len(sample.routes)]).sum()
        assert num_other


def test_replay_takes_the_routers_difference_away(experts, rollout, one_device_mesh):
    """Routers of the trainer that are not the engine's; and a reference, which has no
    routes."""
    task = GrpoTask.model_validate(
        {
            "rewards": [{"kind": "exact_match"}],
            "replay_routes": True,
            "kl_coef": 0.1,
            "epochs": 2,
            "rollouts": {"sampling": {"temperature": TEMPERATURE}},
        }
    )
    seq_len = LENGTH - 1
    (spec,) = task.list_model_arrays(experts.model.config, seq_len).values()
    samples = rollout.straight
    layout = task.make_layout(seq_len)
    batch = pack_samples(samples, layout, routes=spec)
    batch["advantages"] = batch["weights"]
    moved = with_other_routers(experts.params)

    def prepare(params, reference, batch):
        models = TaskModels(
            bind(experts.model, params),
            {"reference": bind(experts.model, reference)},
        )
        micro = {name: array[None] for name, array in batch.items()}
        return task.prepare_rollouts(models, micro, jax.random.key(0))

    def compute_loss(params, batch):
        models = TaskModels(bind(experts.model, params))
        total, sums = task.loss(models, batch, jax.random.key(0))
        return total, sums["expert_rerouted"]

    prepare = jax.jit(prepare, compiler_options=QUICK)
    differentiate = jax.jit(
        jax.value_and_grad(compute_loss, has_aux=True), compiler_options=QUICK
    )
    is_drawn = batch["weights"] > 0
    drawn_with = batch["sampled_log_probs"][is_drawn]
    alone = {name: array for name, array in batch.items() if name != "routes"}

    def compute(params, rows) -> dict[str, np.ndarray]:
        arrays = prepare(params, experts.params, rows)
        return {name: np.asarray(array[0]) for name, array in arrays.items()}

    with jax.set_mesh(one_device_mesh):
        same = compute(experts.params, batch)
        replayed = compute(moved, batch)
        chosen = compute(moved, alone)
        (_, rerouted), gradient = differentiate(moved, batch | same)
    np.testing.assert_allclose(
        same["old_log_probs"][is_drawn], drawn_with, rtol=1e-6, atol=1e-6
    )
    for arrays in (replayed, chosen):
        np.testing.assert_array_equal(
            arrays["reference_log_probs"], same["reference_log_probs"]
        )
    with_replay = np.abs(replayed["old_log_probs"][is_drawn] - drawn_with)
    without_replay = np.abs(chosen["old_log_probs"][is_drawn] - drawn_with)
    assert without_replay.mean() > 1.5 * with_replay.mean()
    assert without_replay.max() > 5 * with_replay.max()
    assert rerouted > 0
    router = np.asarray(gradient["layers"]["moe"]["router"])
    assert (np.abs(router).max(axis=(1, 2)) > 1e-3).all()
