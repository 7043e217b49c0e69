"""Pipeline schedules: every micro-batch once a stage and in order, the bubble of the
formula, and 1F1B's memory, which does not grow with the number of micro-batches."""

from fractions import Fraction
from itertools import pairwise, product
from math import prod
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.parallel.pipeline import _backward_turn, _circular_turn, bubble_ratio
from maxlm.plan.compiled.cost import COLLECTIVES
from maxlm.plan.compiled.hlo import Computation, HloModule, parse_hlo
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import batch_sharding
from maxlm.run.setup import set_up_run
from maxlm.sharding import bind_mesh
from tests.models.building import QUICK

STAGES = st.integers(2, 6)
ROUNDS = st.integers(1, 5)
"""Micro-batches are as many times the stages."""


def schedule_circular(stages: int, micro: int, groups: int = 1) -> np.ndarray:
    """The program's forward passes: int [ticks, stages, 2], (micro-batch, group), −1
    idle."""
    ticks = np.arange(micro * groups + stages - 1)[:, None]
    *slots, works = _circular_turn(
        ticks, np.arange(stages)[None], stages, micro, groups
    )
    return np.where(works[..., None], np.stack(slots, axis=-1), -1)


def schedule_1f1b(stages: int, micro: int) -> np.ndarray:
    """int [ticks, stages, 2], the micro-batch of each stage's forward and backward
    pass."""
    ticks, stage = np.arange(micro + 2 * (stages - 1))[:, None], np.arange(stages)[None]
    slots = np.stack([ticks - stage, _backward_turn(ticks, stage, stages)], axis=-1)
    return np.where((slots >= 0) & (slots < micro), slots, -1)


def when(slots: np.ndarray) -> dict[tuple[int, ...], int]:
    """The tick in which each (stage, *work) is done; no two ticks do the same."""
    done = {}
    for tick, row in enumerate(slots):
        for stage, work in enumerate(row):
            if (work >= 0).all():
                key = (stage, *work.tolist())
                assert key not in done
                done[key] = tick
    return done


@given(stages=STAGES, rounds=ROUNDS, groups=st.integers(1, 4))
def test_circular_does_everything_once_and_in_order(stages, rounds, groups):
    micro = stages * rounds
    done = when(schedule_circular(stages, micro, groups))
    assert set(done) == set(product(range(stages), range(micro), range(groups)))
    for (stage, batch, group), tick in done.items():
        if stage > 0:
            before = done[stage - 1, batch, group]
        elif group > 0:
            before = done[stages - 1, batch, group - 1]
        else:
            continue
        # Sent at the end of a tick, taken up in the next: a stage keeps nothing that
        # waits.
        assert tick == before + 1


@given(stages=STAGES, rounds=ROUNDS)
def test_1f1b_does_everything_once_and_in_order(stages, rounds):
    micro = stages * rounds
    slots = schedule_1f1b(stages, micro)
    forward, backward = when(slots[..., :1]), when(slots[..., 1:])
    assert set(forward) == set(backward) == set(product(range(stages), range(micro)))
    for (stage, batch), tick in forward.items():
        assert stage == 0 or tick == forward[stage - 1, batch] + 1
    for (stage, batch), tick in backward.items():
        if stage == stages - 1:
            assert tick == forward[stage, batch]
        else:
            assert tick == backward[stage + 1, batch] + 1
    # The phases that lack one kind of pass: what the program's three scans assume.
    assert (slots[: stages - 1, :, 1] == -1).all()
    assert (slots[len(slots) - stages + 1 :, :, 0] == -1).all()


@given(stages=STAGES, rounds=ROUNDS, groups=st.integers(1, 4))
def test_the_idle_share_of_the_tables_is_the_formula(stages, rounds, groups):
    micro = stages * rounds

    def idle(slots: np.ndarray) -> Fraction:
        return Fraction(int((slots < 0).sum()), slots.size)

    circular = idle(schedule_circular(stages, micro, groups))
    assert circular == Fraction(stages - 1, micro * groups + stages - 1)
    assert bubble_ratio("circular", stages, micro, groups) == pytest.approx(
        float(circular)
    )
    gpipe = idle(schedule_circular(stages, micro))
    assert bubble_ratio("gpipe", stages, micro) == pytest.approx(float(gpipe))
    # Of 1F1B's ticks the first S − 1 are forward and the last S − 1 backward passes
    # alone.
    slots = schedule_1f1b(stages, micro)
    both = slots[: micro + stages - 1, :, 0], slots[stages - 1 :, :, 1]
    assert idle(np.stack(both)) == Fraction(stages - 1, micro + stages - 1)
    assert bubble_ratio("1f1b", stages, micro) == pytest.approx(
        float(idle(np.stack(both)))
    )


def compiled_step(schedule: str, micro_batches: int, **mesh: int) -> Any:
    """A training step on two stages, and as many devices of each as ``mesh`` says."""
    config = RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 16,
                "num_layers": 4,
                "d_model": 32,
                "max_seq_len": 64,
                "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
                "mlp": {"d_ff": 32},
            },
            "data": {"seq_len": 64, "batch_size": 4 * micro_batches},
            "mesh": {"fsdp": 1, "stage": 2, **mesh},
            "parallel": {"schedule": schedule},
            "sharding": {"max_unsharded": 1.0},
            "train": {"micro_batches": micro_batches},
            "compute_dtype": "float32",
        }
    )
    setup = set_up_run(config, jax.devices()[: 2 * prod(mesh.values())])
    sharding = batch_sharding(setup.placed.compute, setup.mesh)
    shape = (micro_batches, 4, 64)
    integers = ("tokens", "targets", "positions", "segment_ids")
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in {
            **dict.fromkeys(integers, "int32"),
            "weights": "float32",
        }.items()
    }
    step = setup.jit_train_step().__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    lowered = bind_mesh(setup.mesh, step.lower)(setup.abstract_state, batch)
    return lowered.compile(compiler_options=QUICK)


def temp_bytes(schedule: str, micro_batches: int) -> int:
    """Of a compiled step, beside its arguments and results."""
    return compiled_step(schedule, micro_batches).memory_analysis().temp_size_in_bytes


@pytest.mark.more
@pytest.mark.heavy
def test_only_1f1bs_memory_is_flat():
    """From 4 to 32 micro-batches of one size. GPipe keeps every input of a stage: of 28
    micro-batches more, [4, 64, 32] in fp32."""
    few, many = (temp_bytes("1f1b", micro) for micro in (4, 32))
    assert many <= 1.1 * few
    few, many = (temp_bytes("gpipe", micro) for micro in (4, 32))
    assert many >= few + 28 * 4 * 64 * 32 * 4


@pytest.mark.more
@pytest.mark.heavy
def test_1f1bs_loops_wait_for_each_other():
    """XLA:CPU runs what is independent side by side, and virtual devices would come to
    the collectives of two of them in different orders."""
    module = parse_hlo(compiled_step("1f1b", 4, fsdp=2).as_text())
    body, loops = (
        max(  # of a tick with both passes; the first and the last tick are unrolled
            (
                (body, loops_with_collectives(body, module))
                for body in module.computations.values()
                if body is not module.entry
            ),
            key=lambda candidate: len(candidate[1]),
        )
    )
    assert len(loops) == 3  # through layers: forward, forward once more, backward
    for earlier, later in pairwise(loops):
        assert earlier in what_it_needs(later, body)


def loops_with_collectives(body: Computation, module: HloModule) -> list[str]:
    """Names of its loops in the order they run."""

    def communicates(computation: Computation) -> bool:
        return any(i.opcode in COLLECTIVES for i in computation.instructions.values())

    return [
        i.name
        for i in body.instructions.values()
        if i.opcode == "while"
        and communicates(module.computations[i.called_computations("body")[0]])
    ]


def what_it_needs(name: str, body: Computation) -> set[str]:
    """Names of all instructions that one depends on."""
    names = set()
    new = [name]
    while new:
        operands = set(body.instructions[new.pop()].operands) - names
        names |= operands
        new.extend(operands)
    return names
