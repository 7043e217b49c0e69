"""A step is the optimizer's update for the mean loss over all counted tokens, however
it is cut into micro-batches."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maxlm.config import MaxlmError
from maxlm.models.params import declare, param_specs
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.optimizer import make_optimizer
from maxlm.optim.state import TrainState, select_trainable
from maxlm.optim.step import evaluate_step, train_step
from maxlm.tasks import ClmTask, TaskModels
from maxlm.tasks.task import Average
from tests.models import building

RATE, DECAY = 0.05, 0.9


class Line(nnx.Module):
    """y = slope · x + 1, whose every gradient is known."""

    def __init__(self):
        self.slope = declare((1,), (None,), jax.nn.initializers.zeros, "vector")


def squares(models, batch, key):
    error = models.trained.slope[...] * batch["tokens"] + 1.0 - batch["targets"]
    weights = batch["weights"]
    noise = jax.random.uniform(key)
    is_large = abs(error) > 1
    sums = {
        "tokens": weights.sum(),
        "absolute": (abs(error) * weights).sum(),
        "large": Average((abs(error) * is_large).sum(), is_large.sum() * 1.0),
        "noise": noise,
    }
    return (weights * error**2).sum(), sums


def add_up(state, metrics):
    return {name: value + metrics["loss"] for name, value in state.items()}


def task_of(loss) -> Any:
    return SimpleNamespace(
        loss=loss,
        prepare_batch=lambda models, batch, key: batch,
        update_state=add_up,
    )


def line_state(ema=None, step=3):
    params = {"slope": jnp.array([0.5])}
    return TrainState(jnp.int32(step), params, optax.sgd(RATE).init(params), ema)


def step_line(state, batch, **settings):
    inputs = {
        "model": Line(),
        "task": task_of(squares),
        "optimizer": optax.sgd(RATE),
        "schedule": lambda step: RATE * step,
        "seed": 0,
        **settings,
    }
    return train_step(state, batch, **inputs)


def line_batch(micro):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, micro, 6 // micro, 4)).astype(np.float32)
    weights = random.random((micro, 6 // micro, 4)).astype(np.float32)
    weights[0, 0] = 0.0  # micro-batches then count for unequal shares
    return {"tokens": x, "targets": y, "weights": weights}


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_loss_update_and_metrics_follow_their_formulas(micro):
    batch = line_batch(micro)
    average = {"slope": jnp.array([2.0])}
    state, metrics = step_line(line_state(ema=average), batch, ema_decay=DECAY)

    x, y, w = (
        batch[name].astype(np.float64) for name in ("tokens", "targets", "weights")
    )
    error = 0.5 * x + 1 - y
    gradient = (w * 2 * error * x).sum() / w.sum()
    slope = 0.5 - RATE * gradient
    assert int(state.step) == 4
    assert float(state.params["slope"][0]) == pytest.approx(slope, rel=1e-6)
    assert float(state.ema["slope"][0]) == pytest.approx(
        DECAY * 2 + (1 - DECAY) * slope, rel=1e-6
    )
    assert metrics.pop("noise") > 0
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "loss": (w * error**2).sum() / w.sum(),
            "absolute": (w * abs(error)).sum() / w.sum(),
            "large": abs(error)[abs(error) > 1].mean(),
            "batch_tokens": w.sum(),
            "learning_rate": RATE * 3,
            "grad_norm": abs(gradient),
            "param_norm": abs(slope),
            "update_norm": abs(RATE * gradient),
            "skipped": 0.0,
        },
        rel=1e-6,
    )


def test_a_batch_that_counts_nothing_changes_nothing():
    batch = line_batch(2)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = step_line(line_state(), batch)
    assert state.ema is None
    assert float(state.params["slope"][0]) == 0.5
    assert float(metrics["loss"]) == float(metrics["batch_tokens"]) == 0.0


def test_randomness_is_a_function_of_seed_and_step():
    def noise(step, seed=0):
        return float(
            step_line(line_state(step=step), line_batch(1), seed=seed)[1]["noise"]
        )

    assert noise(1) == noise(1)
    assert len({noise(1), noise(2), noise(1, seed=1)}) == 3


def test_evaluation_sums_without_learning():
    state = line_state()
    batch = {k: v[0] for k, v in line_batch(1).items()}
    sums = evaluate_step(state.params, {}, batch, model=Line(), task=task_of(squares))
    error = 0.5 * batch["tokens"] + 1 - batch["targets"]
    assert float(sums["absolute"]) == pytest.approx(
        (batch["weights"] * abs(error)).sum(), rel=1e-5
    )
    large = abs(error)[abs(error) > 1]
    assert float(sums["large"]) == pytest.approx(large.sum(), rel=1e-5)
    assert float(sums["count_of_large"]) == len(large)


def test_the_task_s_own_state_follows_each_step_that_counts():
    state = replace(line_state(), task={"total": jnp.float32(0.25)})
    after, metrics = step_line(state, line_batch(2))
    assert float(after.task["total"]) == pytest.approx(0.25 + float(metrics["loss"]))
    batch = line_batch(2)
    batch["targets"][0, 1, 2] = np.nan
    skipped, metrics = step_line(state, batch)
    assert float(metrics["skipped"]) == 1
    assert float(skipped.task["total"]) == 0.25


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.heavy
def test_micro_batches_change_nothing_for_a_decoder(one_device_mesh):
    config = building.LLAMA_GQA
    random = np.random.default_rng(3)
    weights = random.random((4, 11)) < [[0.9], [0.1], [0.6], [0.0]]
    tokens, targets, _ = building.tokens_and_targets(config.vocab_size, (4, 11))
    batch = {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.ones((4, 11), np.int32),
        "positions": np.tile(np.arange(11, dtype=np.int32), (4, 1)),
        "weights": weights.astype(np.float32),
    }
    with jax.set_mesh(one_device_mesh):
        params = building.on_devices(
            building.random_params(config, one_device_mesh),
            building.storage(config, one_device_mesh),
        )
        # Plain gradient descent: Adam would blow up the rounding of gradients near
        # zero.
        optimizer = optax.sgd(RATE)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), None)

        def step(state, batch):
            return train_step(
                state,
                batch,
                model=building.decoder(config, one_device_mesh),
                task=ClmTask(chunk_tokens=16),
                optimizer=optimizer,
                schedule=lambda _: RATE,
                seed=0,
            )

        step = jax.jit(step, compiler_options=building.QUICK)
        cut = {
            a: {k: v.reshape(a, 4 // a, 11) for k, v in batch.items()}
            for a in (1, 2, 4)
        }
        want, metrics = step(state, cut[1])
        for micro in (2, 4):
            got, other = step(state, cut[micro])
            jax.tree.map(assert_close, got, want)
            assert float(other["loss"]) == pytest.approx(
                float(metrics["loss"]), rel=1e-6
            )
    assert float(metrics["batch_tokens"]) == weights.sum()
    assert float(metrics["update_norm"]) > 1e-3


class TwoLines(nnx.Module):
    """y = first · x + second · x + 1."""

    def __init__(self):
        self.first, self.second = (
            declare((1,), (None,), jax.nn.initializers.zeros, "vector")
            for _ in range(2)
        )


def test_what_is_not_trained_stays_and_has_neither_optimizer_nor_part_in_norms():
    def loss(models, batch, key):
        slope = (
            models.trained.first[...]
            + models.trained.second[...]
            + models.frozen["other"]
        )
        return squares(TaskModels(SimpleNamespace(slope=slope)), batch, key)

    specs = param_specs(TwoLines())
    trained = select_trainable(specs, ["f*"])
    optimizer = make_optimizer(OptimizerConfig(), lambda _: RATE, trained)
    params = {"first": jnp.array([0.5]), "second": jnp.array([0.25])}
    opt_state = optimizer.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(opt_state)} == {(), (1,)}
    assert (
        len(jax.tree.leaves(opt_state)) == 2 * 1 + 2
    )  # two moments of one, two counts
    state = TrainState(
        jnp.int32(0), params, opt_state, params, {"line": {"slope": jnp.ones(1)}}
    )

    def run(frozen):
        task = task_of(
            lambda models, *rest: loss(
                TaskModels(models.trained, {"other": models.frozen["line"].slope[...]}),
                *rest,
            )
        )
        return step_line(
            state,
            line_batch(2),
            model=TwoLines(),
            task=task,
            optimizer=optimizer,
            trainable=trained,
            frozen_models=frozen,
            ema_decay=DECAY,
        )

    after, metrics = run({"line": Line()})
    assert float(after.params["second"][0]) == float(after.ema["second"][0]) == 0.25
    assert float(after.params["first"][0]) != 0.5
    assert float(after.frozen["line"]["slope"][0]) == 1.0
    assert float(metrics["param_norm"]) == pytest.approx(
        abs(float(after.params["first"][0]))
    )


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names():
    specs = param_specs(TwoLines())
    with pytest.raises(
        MaxlmError, match=r"train\.trainable: 'frist' matches .* such as first"
    ):
        select_trainable(specs, ["frist"])
    assert select_trainable(specs, ["*"]) == specs
