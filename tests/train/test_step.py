"""A step is the optimizer's update for the mean loss over all counted tokens, however it is cut
into micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maxlm.models.params import declare
from maxlm.tasks import ClmConfig
from maxlm.tasks.loss import name_tokens
from maxlm.train.state import TrainState
from maxlm.train.step import eval_step, train_step
from tests.models import building

RATE, DECAY = 0.05, 0.9


class Line(nnx.Module):
    """y = slope · x + 1, whose every gradient is known."""

    def __init__(self):
        self.slope = declare((1,), (None,), jax.nn.initializers.zeros, "vector")


def squares(model, batch, key):
    error = model.slope[...] * batch["tokens"] + 1.0 - batch["targets"]
    weights = batch["weights"]
    noise = jax.random.uniform(key)
    sums = {"tokens": weights.sum(), "absolute": (abs(error) * weights).sum(), "noise": noise}
    return (weights * error**2).sum(), sums


def line_state(ema=None, step=3):
    params = {"slope": jnp.array([0.5])}
    return TrainState(jnp.int32(step), params, optax.sgd(RATE).init(params), ema)


def step_line(state, batch, **settings):
    given = {
        "model": Line(),
        "loss": squares,
        "optimizer": optax.sgd(RATE),
        "schedule": lambda step: RATE * step,
        "seed": 0,
        **settings,
    }
    return train_step(state, batch, **given)


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

    x, y, w = (batch[name].astype(np.float64) for name in ("tokens", "targets", "weights"))
    error = 0.5 * x + 1 - y
    gradient = (w * 2 * error * x).sum() / w.sum()
    slope = 0.5 - RATE * gradient
    assert int(state.step) == 4
    assert float(state.params["slope"][0]) == pytest.approx(slope, rel=1e-6)
    assert float(state.ema["slope"][0]) == pytest.approx(DECAY * 2 + (1 - DECAY) * slope, rel=1e-6)
    assert metrics.pop("noise") > 0
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "loss": (w * error**2).sum() / w.sum(),
            "absolute": (w * abs(error)).sum() / w.sum(),
            "batch_tokens": w.sum(),
            "learning_rate": RATE * 3,
            "grad_norm": abs(gradient),
            "param_norm": abs(slope),
            "update_norm": abs(RATE * gradient),
            "skipped": 0.0,
        },
        rel=1e-6,
    )


def test_without_an_average_there_is_none():
    assert step_line(line_state(), line_batch(1))[0].ema is None


def test_a_batch_that_counts_nothing_changes_nothing():
    batch = line_batch(2)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = step_line(line_state(), batch)
    assert float(state.params["slope"][0]) == 0.5
    assert float(metrics["loss"]) == float(metrics["batch_tokens"]) == 0.0


def test_randomness_is_a_function_of_seed_and_step():
    def noise(step, seed=0):
        return float(step_line(line_state(step=step), line_batch(1), seed=seed)[1]["noise"])

    assert noise(1) == noise(1)
    assert len({noise(1), noise(2), noise(1, seed=1)}) == 3


def test_evaluation_sums_without_learning():
    state, batch = line_state(), {k: v[0] for k, v in line_batch(1).items()}
    sums = eval_step(state.params, batch, model=Line(), loss=squares)
    error = 0.5 * batch["tokens"] + 1 - batch["targets"]
    assert float(sums["absolute"]) == pytest.approx((batch["weights"] * abs(error)).sum(), rel=1e-5)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


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
        # Plain gradient descent: Adam would blow up the rounding of gradients near zero.
        optimizer = optax.sgd(RATE)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), None)

        def step(state, batch):
            return train_step(
                state,
                batch,
                model=building.decoder(config, one_device_mesh),
                loss=lambda *inputs: name_tokens(ClmConfig(chunk_tokens=16), *inputs),
                optimizer=optimizer,
                schedule=lambda _: RATE,
                seed=0,
            )

        step = jax.jit(step, compiler_options=building.QUICK)
        cut = {a: {k: v.reshape(a, 4 // a, 11) for k, v in batch.items()} for a in (1, 2, 4)}
        want, metrics = step(state, cut[1])
        for micro in (2, 4):
            got, other = step(state, cut[micro])
            jax.tree.map(assert_close, got, want)
            assert float(other["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(metrics["batch_tokens"]) == weights.sum()
    assert float(metrics["update_norm"]) > 1e-3
