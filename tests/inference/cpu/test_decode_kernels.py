"""The engine's steps compute with the kernels for CPUs, and nothing else does."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.inference.cpu import CPU_KERNELS
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.sequences import ScheduledStep
from maxlm.inference.step import run_step
from maxlm.models.params import bind
from maxlm.parallel.decode_kernels import DecodeKernels

pytestmark = pytest.mark.usefixtures("cpu_kernels")

NUM_LAYERS = 2


@pytest.fixture
def wide(build_tiny, one_device_mesh):
    """A model with heads that fill vectors, as attention in C++ wants them."""
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    with jax.set_mesh(one_device_mesh):
        yield build_tiny("llama", one_device_mesh, attention=attention)


def count_calls(text: str) -> dict[str, int]:
    """Counts calls of kernels for CPUs in a lowered program."""
    names = re.findall(r"@maxlm\.(Cpu\w+)", text)
    return {name: names.count(name) for name in names}


def lower_step(engine: Engine, kernels: DecodeKernels | None) -> str:
    shape = engine._inputs.list_shapes()[0]
    assert shape.chunk_tokens == 0
    runner = engine._runner
    inputs = engine._inputs.build(
        ScheduledStep(), shape, engine.scheduler.page_tables, {}
    )
    spec = replace(runner.spec, kernels=kernels)
    lowered = run_step.lower(
        engine.model, spec, shape, runner.params, runner.state, inputs
    )
    return lowered.as_text()


@pytest.mark.heavy
def test_a_step_multiplies_and_attends_by_them(wide):
    """Queries, keys and values at once, their output, gate and up at once, down; and
    the head. Without the kernels it is XLA's."""
    engine = Engine(wide.model, wide.params, EngineConfig(max_sequences=2))
    assert engine._runner.spec.kernels is CPU_KERNELS
    assert count_calls(lower_step(engine, CPU_KERNELS)) == {
        "CpuMatmul": 4 * NUM_LAYERS + 1,
        "CpuPagedAttention": NUM_LAYERS,
    }
    assert count_calls(lower_step(engine, None)) == {}
    assert engine.model is wide.model
    assert engine.model.embedding.product is None


def test_forward_passes_and_gradients_are_xlas(wide):
    """Also of few rows, without a gradient, as in a held-out evaluation."""

    def loss(params, ids):
        bound = bind(wide.model, params)
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        hidden, _ = bound(ids, positions)
        return jnp.square(bound.logits(hidden)).sum()

    ids = np.ones((1, 4), np.int32)
    for function in (loss, jax.grad(loss)):
        text = jax.jit(function).lower(wide.params, ids).as_text()
        assert count_calls(text) == {}
