"""The compiled step takes its state's memory, and hands it back laid out as it was."""

import jax
import numpy as np
import pytest

from maxlm.programs.feed import load_training_batches
from maxlm.programs.setup import set_up
from maxlm.programs.smoke import make_counting_source
from maxlm.run import RunConfig
from tests.programs import tiny


@pytest.fixture(autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_step_takes_the_memory_of_its_state_and_compiles_once():
    mesh = {"fsdp": 2, "tensor": 2}
    train = {"steps": 3, "micro_batches": 2, "ema_decay": 0.9}
    run = RunConfig.model_validate(tiny.settings("runs", "text", mesh=mesh, train=train))
    setup = set_up(run, jax.devices()[:4])
    with load_training_batches(setup, make_counting_source(run), 0) as batches:
        step, state = setup.step_function(), setup.init()
        for batch in batches:
            before = state
            state, metrics = step(state, batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == setup.shardings
        assert step.__wrapped__._cache_size() == 1
    assert int(state.step) == 3
    # Untrained, every token is about as likely as any other.
    assert float(metrics["loss"]) == pytest.approx(np.log(run.model.vocab_size), rel=0.3)
