"""What a task has a run do beside its training steps is counted: the engine's caches and
parameters as it holds them, the time of a rollout as a schedule takes it, passes by
their FLOPs; the verdict, the run's length and the search see all of them."""

import heapq
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from math import prod
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.inference.engine import make_cache_layout
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.model_runner import allocate_state
from maxlm.inference.params import prepare_params
from maxlm.models.caches.config import (
    CacheConfig,
    PagedCacheConfig,
    QuantizedCacheConfig,
)
from maxlm.models.caches.layout import list_paged_windows
from maxlm.models.params import param_specs
from maxlm.plan.diff import StoredPlan, compare_plans
from maxlm.plan.generation import ExpectedLengths, GenerationPlanner
from maxlm.plan.machine import Machine
from maxlm.plan.phases import GENERATION
from maxlm.plan.predict import RunPlan, plan_run
from maxlm.plan.search import search_layouts
from maxlm.plan.served_model import ServedModel, ServingOptions, make_served_workload
from maxlm.plan.show import format_fit_verdict, render_plan_tables
from maxlm.plan.timing import EFFICIENCY, count_frozen_forward_flops
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.sharding import MESH_AXES, MeshConfig
from maxlm.tasks import TASKS
from maxlm.tasks.extra_work import ExtraPass, GenerationWork, ScoringModel
from maxlm.tasks.text import ClmTask
from tests.plan import architectures

WORK = GenerationWork(
    num_sequences=96,
    max_prompt_tokens=9,
    max_new_tokens=20,
    max_sequences=6,
    page_size=4,
    prefill_tokens=16,
)


@TASKS.register("planned_work")
class PlannedTask(ClmTask):
    """A task from outside, which says what else it does."""

    work: ClassVar[GenerationWork | None] = None
    passes: ClassVar[tuple[ExtraPass, ...]] = ()
    frozen: ClassVar[Mapping[str, str | None]] = {}
    scoring: ClassVar[Mapping[str, ScoringModel]] = {}
    kind: Literal["planned_work"] = "planned_work"

    def generation(self, seq_len: int, batch_size: int) -> GenerationWork | None:
        return self.work

    def extra_passes(self) -> tuple[ExtraPass, ...]:
        return self.passes

    def frozen_models(self) -> Mapping[str, str | None]:
        return self.frozen

    def scoring_models(self) -> Mapping[str, ScoringModel]:
        return self.scoring


def run(name: str, *settings: str) -> RunConfig:
    settings = ("task.kind=planned_work", *settings)
    return load_config(RunConfig, name, settings).value


def plan(config: RunConfig, on: str) -> RunPlan:
    return plan_run(config, Machine.from_name(on))


def small(model: str, layout: str) -> RunConfig:
    config = architectures.run(model, layout).model_dump()
    config |= {"task": {"kind": "planned_work"}, "compute_dtype": "float32"}
    return RunConfig.model_validate(config)


def count_shard_bytes(tree: Any) -> int:
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def test_a_task_that_only_trains_has_no_other_phase():
    only = plan(run("gpt2", "data.batch_size=8"), "v5e-1")
    assert only.extra.phases == ()
    assert only.peak_bytes == float(only.memory.total)
    assert only.mean_step_seconds == only.longest_step_seconds == only.step_seconds


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "layout", "cache"),
    [
        ("pattern", "tp+sp", PagedCacheConfig()),
        ("latent", "fsdp", PagedCacheConfig()),
        pytest.param(
            "gqa_window",
            "tp+sp",
            QuantizedCacheConfig(kind="int8"),
            marks=pytest.mark.more,
        ),
        pytest.param(
            "delta_hybrid", "tp+sp", PagedCacheConfig(), marks=pytest.mark.more
        ),
        pytest.param(
            "gqa_window", "cp ulysses", PagedCacheConfig(), marks=pytest.mark.more
        ),
    ],
)
def test_caches_and_parameters_are_those_that_the_engine_holds(
    monkeypatch, model: str, layout: str, cache: CacheConfig
):
    work = replace(WORK, cache=cache, max_new_tokens=14)
    monkeypatch.setattr(PlannedTask, "work", work)
    config = small(model, layout)
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    cost = GenerationPlanner(config, None).plan(sizes)

    mesh_config = config.mesh
    if sizes["context"] > 1:
        mesh = {"data": sizes["data"] * sizes["context"], "context": 1}
        mesh_config = config.mesh.model_copy(update=mesh)
    devices = jax.devices()[: prod(sizes.values())]
    setup = set_up_run(
        config.model_copy(update={"mesh": mesh_config}), devices, for_training=False
    )
    served = setup.model
    engine = EngineConfig(
        max_sequences=6, max_length=23, page_size=4, prefill_tokens=16, cache=cache
    )
    windows = list_paged_windows(served, cache)
    num_shards = prod(setup.mesh.shape[axis] for axis in served.rules.batch)
    layout_of_caches = make_cache_layout(engine, windows, num_shards, "tpu", 0)
    head_ways = prod(setup.mesh.shape[axis] for axis in served.rules.heads)
    layout_of_caches = replace(layout_of_caches, head_ways=head_ways)
    with jax.set_mesh(setup.mesh):
        state = jax.eval_shape(lambda: allocate_state(served, layout_of_caches, 23))
        assert cost.memory["caches"] == count_shard_bytes(state)
        whole = NamedSharding(setup.mesh, PartitionSpec())
        zeros = jax.tree.map(
            lambda spec: jax.device_put(np.zeros(spec.shape, spec.dtype), whole),
            param_specs(served),
        )
        copy = prepare_params(served, zeros, setup.mesh)
    planned_copy = cost.memory["parameters as the engine reads them"]
    assert planned_copy == count_shard_bytes(copy)


def test_shared_parameters_are_held_once(monkeypatch):
    settings = ("mesh.fsdp=8", "data.batch_size=64")
    work = replace(WORK, num_sequences=64, max_prompt_tokens=512, max_new_tokens=512)
    plans = []
    for shares_params in (False, True):
        shared = replace(work, shares_params=shares_params)
        monkeypatch.setattr(PlannedTask, "work", shared)
        plans.append(plan(run("llama3_8b", *settings), "h100x8").extra.phases[0])
    copied, shared = plans
    # The copy is in bf16 and whole: 2 bytes of each of 8.03 billion parameters.
    saved = copied.total_bytes - shared.total_bytes
    assert 0.85 * 16.06e9 < saved < 16.06e9
    # A step gathers all of them over NVLink, instead of reading them at 3.35 TB/s.
    assert shared.seconds["new tokens"] > 3 * copied.seconds["new tokens"]
    assert shared.seconds["engine's parameters"] == 0
    assert copied.seconds["engine's parameters"] > 0


def simulate(lengths: np.ndarray, rows: int, step_seconds: np.ndarray) -> float:
    """Seconds of steps in which each row takes the next sequence when its own ends;
    ``step_seconds`` [rows + 1], by the number of rows that run."""
    ends = [0] * rows
    active = np.zeros(int(lengths.sum()) + 1, int)
    for length in lengths.tolist():
        start = heapq.heappop(ends)
        active[start : start + length] += 1
        heapq.heappush(ends, start + length)
    return float(step_seconds[active[active > 0]].sum())


@pytest.mark.parametrize(
    ("sequences", "rows", "shortest"), [(61, 61, 200), (250, 24, 30), (96, 32, 599)]
)
def test_a_rollout_takes_as_long_as_its_schedule(
    monkeypatch, sequences: int, rows: int, shortest: int
):
    generator = np.random.default_rng(sequences)
    lengths = generator.integers(shortest, 601, sequences)
    lengths[generator.integers(sequences)] = 600
    work = GenerationWork(
        num_sequences=sequences,
        max_prompt_tokens=128,
        max_new_tokens=600,
        mean_new_tokens=float(lengths.mean()),
        max_sequences=rows,
    )
    monkeypatch.setattr(PlannedTask, "work", work)
    config = run("llama3_8b", "mesh.fsdp=1")
    machine = Machine.from_name("h100x1")
    sizes = dict.fromkeys(MESH_AXES, 1)
    planned = GenerationPlanner(config, machine).plan(sizes).seconds["new tokens"]

    options = ServingOptions(prompt=128, new=round(lengths.mean()))
    served = ServedModel(
        make_served_workload(config, "gpu", 128), machine, options, sizes, "auto"
    )
    by_rows = served.estimate_decode_seconds(np.arange(1.0, rows + 1))["total"]
    simulated = simulate(lengths, rows, np.concatenate([[0.0], by_rows]))
    assert planned == pytest.approx(simulated, rel=0.1)


def test_a_pass_takes_the_time_of_its_products(monkeypatch):
    """On one device, of a wide model: 2 FLOPs a parameter and token."""
    passes = (
        ExtraPass("old log-probabilities", passes_per_step=0.5),
        ExtraPass("values", makes_logits=False),
        ExtraPass("reference", "reference", 0.25),
    )
    monkeypatch.setattr(PlannedTask, "passes", passes)
    monkeypatch.setattr(PlannedTask, "frozen", {"reference": None, "teacher": None})
    settings = ("model.num_layers=4", "mesh.fsdp=1", "data.batch_size=4")
    planned = plan(run("llama3_8b", *settings), "v5p-2")
    old, values, reference = planned.extra.phases
    tokens = planned.layout.tokens_per_step
    peak = planned.machine.chip.peak_flops["bf16"] * EFFICIENCY["tpu"].matmul
    head = 128256 * 4096
    layers = planned.layout.parameters - 2 * head
    whole = 2 * (layers + head) * tokens / peak
    assert whole < 2 * old.total_seconds < 1.35 * whole
    assert old.total_seconds == pytest.approx(2 * reference.total_seconds)
    without_head = 2 * layers * tokens / peak
    assert without_head < values.total_seconds < 1.35 * without_head
    assert [old.tokens, values.tokens] == [tokens / 2, tokens]
    # The reference is read there, and the teacher in every step.
    # With causal attention at half: two products of 4,096 numbers with 8,192 keys.
    attention = 4 * 2 * 2 * 4096 * 8192 / 2
    flops_per_token = 2 * (layers + head) + attention
    frozen_flops = count_frozen_forward_flops(planned.shape)
    assert frozen_flops == pytest.approx(flops_per_token * tokens, rel=1e-3)
    assert planned.memory.frozen == 2 * planned.memory.parameters


def test_models_that_score_stay_and_take_time(monkeypatch, tmp_path):
    """One of another size on one device, and one whose run is not there yet on two."""
    monkeypatch.setattr(
        PlannedTask,
        "work",
        replace(WORK, num_sequences=60, max_new_tokens=1015, steps_per_rollout=3),
    )
    settings = ("mesh.fsdp=4", "data.batch_size=20", "model.num_layers=2")
    config = run("llama3_8b", *settings)
    before = plan(config, "h100x4")
    folder = tmp_path / "reward"
    folder.mkdir()
    scorer = run("llama3_8b", "model.num_layers=3")
    (folder / "config.yaml").write_text(yaml.safe_dump(scorer.model_dump(mode="json")))
    models = {
        "trained": ScoringModel(str(folder)),
        "to_be": ScoringModel(str(tmp_path / "none"), MeshConfig(fsdp=2)),
    }
    monkeypatch.setattr(PlannedTask, "scoring", models)
    after = plan(config, "h100x4")

    table = 128256 * 4096
    layer = (before.layout.parameters - 2 * table - 4096) // 2
    params = {
        "trained": 3 * layer + 2 * table + 4096,
        "to_be": before.layout.parameters,
    }
    scoring_bytes = 4 * params["trained"] + 4 * params["to_be"] / 2
    assert after.memory.frozen - before.memory.frozen == pytest.approx(
        scoring_bytes, rel=1e-3
    )
    by_name = {phase.name: phase for phase in after.extra.phases}
    assert by_name.keys() == {
        GENERATION,
        "scores of trained",
        "scores of to_be (no run there: counted as the policy)",
    }
    for phase, old in zip(after.extra.phases, before.extra.phases, strict=False):
        assert phase.memory["frozen"] - old.memory["frozen"] == pytest.approx(
            scoring_bytes, 1e-3
        )
    # Rows of 9 + 1,015 tokens, a third of them a step, on one device.
    scores = by_name["scores of trained"]
    assert scores.tokens == 20 * 1024
    peak = (
        after.machine.chip.peak_flops["bf16"]
        * EFFICIENCY[after.machine.chip.family].matmul
    )
    seconds = 2 * 3 * layer * scores.tokens / peak
    assert seconds < scores.total_seconds < 1.35 * seconds
    assert after.mean_step_seconds > before.mean_step_seconds + scores.total_seconds


@pytest.fixture
def policy(monkeypatch) -> GenerationWork:
    """Of a rollout for four steps."""
    work = GenerationWork(
        num_sequences=512,
        max_prompt_tokens=300,
        max_new_tokens=700,
        mean_new_tokens=400,
        steps_per_rollout=4,
        sequences_per_prompt=8,
        keeps_caches=True,
    )
    monkeypatch.setattr(PlannedTask, "work", work)
    old = ExtraPass("log-probabilities of the policy", None, 0.5, batches_at_once=2)
    monkeypatch.setattr(PlannedTask, "passes", (old,))
    return work


def test_a_run_is_as_long_as_all_its_phases(policy):
    config = run("llama3_8b", "data.batch_size=128")
    planned = plan(config, "h100x16")
    generation, passes = planned.extra.phases
    extra_seconds = generation.total_seconds + passes.total_seconds
    assert planned.mean_step_seconds == planned.step_seconds + extra_seconds
    rollout_seconds = 4 * extra_seconds
    assert planned.longest_step_seconds == planned.step_seconds + rollout_seconds
    assert generation.tokens == 512 * 400 / 4
    hours = config.train.steps * planned.mean_step_seconds / 3600
    assert planned.run_hours == pytest.approx(hours / planned.goodput.best)
    # Caches stay where they are in every phase.
    caches = generation.memory["caches"]
    assert planned.memory.caches == passes.memory["caches"] == caches > 0

    out = json.loads(json.dumps(planned.to_json(), allow_nan=False))
    assert [phase["name"] for phase in out["phases"]] == [GENERATION, passes.name]
    for phase in out["phases"]:
        assert sum(phase["memory"].values()) == pytest.approx(phase["memory_total"])
        assert sum(phase["seconds"].values()) == pytest.approx(phase["seconds_total"])
    totals = [phase["memory_total"] for phase in out["phases"]]
    assert out["peak_bytes"] == max([*totals, out["memory"]["total"]])
    assert out["time"]["mean_step"] == planned.mean_step_seconds


def test_tables_and_comparisons_show_the_phases(policy):
    config = run("llama3_8b", "data.batch_size=128")
    planned = plan(config, "h100x16")
    console = Console(width=100, record=True, file=StringIO())
    console.print(render_plan_tables(planned))
    text = console.export_text()
    times = text.partition("Time of a rollout and its steps")[2]
    shares = [float(share) for share in re.findall(r"(?m)^\S.* ([\d.]+)%", times)]
    # Generation, the pass, four steps, and all together.
    assert len(shares) == 4
    assert sum(shares[:3]) == pytest.approx(100, abs=0.2)
    assert "4 training steps" in times
    assert f"in phase '{planned.peak_phase}'" in text

    first = StoredPlan.model_validate(planned.to_json())
    fewer = plan(run("llama3_8b", "data.batch_size=64"), "h100x16")
    second = StoredPlan.model_validate(fewer.to_json())
    diff = compare_plans(first, second)
    pass_name = planned.extra.phases[1].name
    before, after = diff["time"][pass_name]
    assert before == pytest.approx(2 * after, rel=0.1)
    assert GENERATION not in diff["memory"]


def test_expected_lengths_shorten_a_rollout(policy):
    config = run("llama3_8b", "data.batch_size=128")
    machine = Machine.from_name("h100x16")
    seconds = {}
    for new in (100, 400, 700):
        lengths = ExpectedLengths(prompt=200, new=new)
        generation = plan_run(config, machine, lengths=lengths).extra.phases[0]
        seconds[new] = generation.total_seconds
        assert generation.tokens == 512 * new / 4
    assert seconds[100] < seconds[400] < seconds[700]
    with pytest.raises(MaxlmError, match=r"701 tokens on average.* 700 at most"):
        plan_run(config, machine, lengths=ExpectedLengths(new=701))


def test_a_run_whose_caches_do_not_fit_does_not_fit(monkeypatch, policy):
    config = run("llama3_8b", "data.batch_size=128")
    wide = replace(policy, max_sequences=700, keeps_caches=False)
    monkeypatch.setattr(PlannedTask, "work", wide)
    planned = plan(config, "h100x16")
    assert planned.memory.total < planned.memory_limit_bytes
    assert planned.peak_phase == GENERATION
    assert planned.fits is False
    assert "max_sequences" in format_fit_verdict(planned)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "shares_params", [True, pytest.param(False, marks=pytest.mark.more)]
)
def test_a_search_counts_rollouts(monkeypatch, policy, shares_params: bool):
    """Parameters that are gathered in every step of the engine are best not split, other
    than by tensor; training alone splits them."""
    work = replace(policy, shares_params=shares_params, keeps_caches=False)
    monkeypatch.setattr(PlannedTask, "work", work)
    config = run("llama3_8b", "data.batch_size=16", "model.num_layers=8")
    machine = Machine.from_name("h100x4")
    result = search_layouts(config, machine, top=2)
    for candidate in result.best:
        planned = plan_run(candidate.apply(config), machine)
        assert planned.mean_step_seconds == pytest.approx(candidate.seconds, rel=1e-9)
        assert planned.peak_bytes == pytest.approx(candidate.memory, rel=1e-9)
    best = result.best[0].sizes
    if shares_params:
        assert best["fsdp"] == best["context"] == best["stage"] == 1
    others = [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}]
    for mesh in others:
        other = config.model_copy(
            update={"mesh": config.mesh.model_copy(update={"data": 1, **mesh})}
        )
        assert plan_run(other, machine).mean_step_seconds >= result.best[0].seconds


@pytest.mark.parametrize(
    ("work", "settings", "words"),
    [
        (replace(WORK, shares_params=True), ("mesh.context=2",), "another mesh"),
        (replace(WORK, max_prompt_tokens=8000, max_new_tokens=194), (), "8,192"),
    ],
)
def test_what_cannot_be_generated(monkeypatch, work, settings, words):
    monkeypatch.setattr(PlannedTask, "work", work)
    with pytest.raises(MaxlmError, match=words):
        plan(run("llama3_8b", *settings), "h100x8")
