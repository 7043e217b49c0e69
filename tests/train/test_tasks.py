"""Encoders, and encoders with decoders, through the one loop, on any mesh."""

from typing import Any

import jax
import numpy as np
import pytest

from maxlm.models.params import bind, flatten_names
from maxlm.run.config import RunConfig
from maxlm.run.setup import RunSetup, open_training_batches, set_up_run
from maxlm.sharding import bind_mesh
from maxlm.tasks import TaskModels
from maxlm.train.smoke import make_counting_batch_source, train_digits_tokenizer
from tests.models.building import QUICK, change, on_devices

pytestmark = pytest.mark.heavy

SEQ_LEN, STEPS = 48, 3
BLOCK = {
    "vocab_size": 160,
    "num_layers": 2,
    "d_model": 24,
    "max_seq_len": 96,
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6},
    "mlp": {"d_ff": 40, "activation": "gelu_tanh"},
}
ENCODER = BLOCK | {
    "architecture": "encoder",
    "placement": "post",
    "final_norm": False,
    "positions": {"kind": "learned"},
    "norm": {"kind": "layernorm", "bias": True},
    "embedding_norm": True,
    "token_types": 2,
    "head_activation": "gelu",
    "head_bias": True,
    "tie_embeddings": True,
}
BOTH = BLOCK | {
    "architecture": "encoder_decoder",
    "encoder_layers": 3,
    "positions": {"kind": "relative", "buckets": 8, "max_distance": 20},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlm": (ENCODER, {"kind": "mlm", "share": 0.3, "whole_words": True}),
    "span_corruption": (
        BOTH,
        {"kind": "span_corruption", "mean_span": 2.0, "sentinels": 40},
    ),
}


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def prepared(kind: str, **mesh: int) -> RunSetup:
    model, task = CASES[kind]
    run = RunConfig.model_validate(
        {
            "compute_dtype": "float32",
            "model": model,
            "task": task,
            "data": {"seq_len": SEQ_LEN, "batch_size": 8, "workers": 0},
            "mesh": {"data": 1, "fsdp": 1} | mesh,
            "train": {"steps": STEPS, "micro_batches": 2, "ema_decay": 0.9},
            "optimizer": {"kind": "adamw"},
            "schedule": {"learning_rate": 1e-2, "warmup_steps": 0, "kind": "constant"},
        }
    )
    return set_up_run(run, jax.devices()[: int(np.prod([*mesh.values(), 1]))])


def trained(setup: RunSetup) -> tuple[Any, list[float]]:
    """The state after the last step, and the losses of all. The step is compiled once,
    takes its state's memory, and hands it back laid out as it was."""
    state = setup.init_train_state()
    step = setup.jit_train_step()
    losses = []
    source = make_counting_batch_source(setup.config, train_digits_tokenizer())
    with open_training_batches(setup, source, 0) as batches:
        for batch in batches:
            before = state
            state, metrics = step(state, batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == setup.shardings
            losses.append(float(metrics["loss"]))
    assert step.__wrapped__._cache_size() == 1
    return state, losses


@pytest.mark.more
@pytest.mark.parametrize("kind", ["mlm", "span_corruption"])
def test_a_mesh_trains_as_one_device_does(kind):
    alone, losses = trained(prepared(kind))
    spread, same = trained(prepared(kind, data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    ours = flatten_names(spread.params)
    for name, value in flatten_names(alone.params).items():
        np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["mlm", "span_corruption"])
def test_gradients_are_slopes_of_the_loss(kind):
    """Along random directions of each parameter, by central differences."""
    setup = prepared(kind)
    source = make_counting_batch_source(setup.config, train_digits_tokenizer())
    with open_training_batches(setup, source, 0) as batches:
        batch = {name: array[0] for name, array in next(batches).items()}

    def loss(params, batch):
        models = TaskModels(bind(setup.model, params))
        value, sums = setup.config.task.loss(models, batch, jax.random.key(0))
        return value / sums["tokens"]

    random = np.random.default_rng(0)

    def draw(path, spec):
        """Far from the start, where biases and scales matter too."""
        return (path[-1].key == "scale") + 0.2 * random.standard_normal(spec.shape)

    params = jax.tree_util.tree_map_with_path(draw, setup.specs)
    step = bind_mesh(
        setup.mesh, jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    )

    def at(params):
        return step(on_devices(params, setup.shardings.params), batch)

    size = 2e-2
    for name, gradient in flatten_names(jax.device_get(at(params)[1])).items():
        direction = np.sign(gradient) / np.sqrt(gradient.size)
        slope = np.vdot(direction, gradient)
        assert slope > 0, name
        moved = (size * direction, -size * direction)
        up, down = (
            float(at(change(params, name, lambda p, by=by: p + by))[0]) for by in moved
        )
        assert (up - down) / (2 * size) == pytest.approx(slope, rel=0.03, abs=2e-4), (
            name
        )
