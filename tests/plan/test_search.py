"""The search is the plan, many times over: it misses nothing better, and what it finds
trains."""

from itertools import product
from math import inf, prod
from typing import get_args

import pytest
import yaml

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.models.remat import RematPolicy
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.plan.search import format_run_yaml, list_divisors, search_layouts
from maxlm.run.config import RunConfig


def run(name: str = "gpt2_medium", **settings) -> RunConfig:
    return load_config(RunConfig, name, [f"{k}={v}" for k, v in settings.items()]).value


def brute_force(config: RunConfig, machine: Machine) -> float:
    """The quickest step of every mesh of data, fsdp, tensor and stage, one by one,
    through everything that a run checks."""
    best = inf
    n = machine.topology.devices
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    residuals = (["context"], ["context", "tensor"])
    for data, tensor, stage, micro, remat, residual in product(
        divisors, divisors, divisors, (1, 2, 8), get_args(RematPolicy), residuals
    ):
        if n % (data * tensor * stage):
            continue
        settings = config.model_dump()
        settings["mesh"] = {"data": data, "tensor": tensor, "stage": stage}
        settings["train"]["micro_batches"] = micro
        settings["model"]["remat"] = remat
        settings["sharding"]["compute"]["residual"] = residual
        try:
            plan = plan_run(RunConfig.model_validate(settings), machine)
        except MaxlmError:
            continue
        if plan.fits and not plan.barely_fits:
            best = min(best, plan.step_seconds or inf)
    return best


def test_divisors_of_a_large_number_are_those_of_a_count():
    for n in (1, 2, 36, 97, 1024):
        assert list_divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
    assert len(list_divisors(10**9)) == 100  # (9 + 1)², of 2⁹ · 5⁹


@pytest.mark.more
@pytest.mark.heavy
def test_nothing_better_is_missed():
    config = run(**{"data.batch_size": 32})
    machine = Machine.from_name("h100x4")
    result = search_layouts(config, machine, top=3)
    assert result.best[0].seconds <= brute_force(config, machine) * (1 + 1e-9) < inf
    assert (
        result.num_tried
        >= result.num_divisible
        >= result.num_fitting
        >= len(result.best)
    )


@pytest.mark.parametrize(
    ("name", "on"), [("mixtral_8x7b", "v5e-256"), ("llama3_8b", "h100x64")]
)
def test_what_is_found_is_a_plan(name, on):
    config = run(name)
    machine = Machine.from_name(on)
    result = search_layouts(config, machine, top=5)
    assert len(result.best) == 5
    assert [c.seconds for c in result.best] == sorted(c.seconds for c in result.best)
    for candidate in result.best:
        plan = plan_run(candidate.apply(config), machine)
        assert plan.fits
        assert prod(candidate.sizes.values()) == machine.topology.devices
        assert plan.step_seconds == pytest.approx(candidate.seconds, rel=1e-9)
        assert float(plan.memory.total) == pytest.approx(candidate.memory, rel=1e-9)
        assert (
            plan.layout.tokens_per_step == config.data.batch_size * config.data.seq_len
        )


def test_the_snippet_is_the_candidate(tmp_path):
    source = tmp_path / "own.yaml"
    file = tmp_path / "found.yaml"
    mine = {"include": "llama3_8b", "mesh": {"tensor": 8}}
    mine["data"] = {"sources": [{"name": "a", "documents": ["x"], "weight": 1.0}]}
    source.write_text(yaml.safe_dump(mine))
    settings = {
        "data.batch_size": 256,
        "data.sources.0.weight": 2.0,
        "optimizer.kind": "lion",
    }
    config = run(str(source), **settings)
    machine = Machine.from_name("v5p-64")
    for best in search_layouts(config, machine, top=3).best:
        applied = best.apply(config)
        file.write_text(format_run_yaml(applied, str(source)))
        assert load_config(RunConfig, file).value == applied
        assert yaml.safe_load(file.read_text())["include"] == str(source)


@pytest.mark.heavy
def test_slices_are_crossed_by_data_or_stages_alone():
    machine = Machine.from_name("2xv5e-16")
    result = search_layouts(run(**{"data.batch_size": 64}), machine, top=20)
    assert len(result.best) == 20
    assert all(
        c.sizes["data"] % 2 == 0 or c.sizes["stage"] % 2 == 0 for c in result.best
    )
