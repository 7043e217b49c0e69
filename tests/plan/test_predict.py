"""A plan as a whole: facts that must hold of any run, and machines that are here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from maxlm.config import MaxlmError, load_config
from maxlm.plan.diff import compare_plans
from maxlm.plan.hardware import CHIPS, find_chip
from maxlm.plan.predict import Machine, plan_run
from maxlm.plan.timing import EFFICIENCY
from maxlm.run import RunConfig


def run(name: str, *settings: str) -> RunConfig:
    return load_config(RunConfig, name, settings).value


def test_products_follow_from_parameters_and_tokens_and_recomputing_trades_memory_for_time():
    """6 FLOPs a parameter and token without anything computed again, nearly 8 with."""
    plans = []
    for remat, factor in (("none", 3.0), ("mlp", 4.0), ("full", 4.0)):
        plan = plan_run(run("llama3_8b", f"model.remat={remat}"), Machine.from_name("v5p-128"))
        peak = 64 * CHIPS["v5p"].peak["bf16"]
        products = float(plan.time.products) * EFFICIENCY["tpu"].matmul * peak
        matrices = plan.layout.parameters - 128256 * 4096
        again = products / (2 * matrices * plan.layout.tokens_per_step)
        assert factor - (0.4 if remat != "mlp" else 1) < again <= factor
        plans.append(plan)
    memory = [float(plan.memory.total) for plan in plans]
    assert memory == sorted(memory, reverse=True)
    assert plans[0].step_seconds < plans[-1].step_seconds


def test_one_device_sends_nothing():
    plan = plan_run(run("gpt2", "data.batch_size=8"), Machine.from_name("v5e-1"))
    assert plan.sends == ()
    assert float(plan.time.communication) == float(plan.time.exposed) == 0


def test_a_pipeline_idles_as_its_schedule_says():
    config = run("llama2_7b", "mesh.stage=4", "train.micro_batches=8", "model.remat=none")
    time = plan_run(config, Machine.from_name("v5p-64")).time
    assert float(time.idle / time.total) == pytest.approx(3 / 11, rel=0.15)


def test_a_step_waits_for_new_memory_where_no_pool_holds_it():
    """As glibc's mallopt(3) has it: blocks of up to 32 MiB are kept, larger ones given back."""
    machine = Machine.from_name("v5e-1")
    slow = replace(machine, chip=replace(machine.chip, pages=1e9))
    seen = set()
    for seq_len in range(48, 256, 8):
        config = run("demo", "data.batch_size=16", f"data.seq_len={seq_len}")
        pool = plan_run(config, machine)
        memory = pool.memory
        new = float(memory.total - memory.parameters - memory.optimizer - memory.batch)
        waited = 1e9 * (plan_run(config, slow).step_seconds - pool.step_seconds)
        if new <= 2**25:
            assert waited == 0
        elif new >= 1.1 * 2**25:
            assert waited == pytest.approx(new, rel=1e-6)
        else:
            assert 0 < waited < new
        seen.add((new > 2**25) + (new >= 1.1 * 2**25))
    assert seen == {0, 1, 2}


def test_json_is_plain_and_whole():
    plan = plan_run(run("mixtral_8x7b", "mesh.expert=8"), Machine.from_name("v5p-128"))
    out = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    parts = {"parameters", "optimizer", "average", "batch", "gradients", "activations", "working"}
    assert sum(out["memory"][part] for part in parts) == pytest.approx(out["memory"]["total"])
    steps = ("products", "attention", "traffic", "exposed", "idle")
    assert sum(out["time"][part] for part in steps) == pytest.approx(out["time"]["step"])
    assert {c["kind"] for c in out["collectives"]} >= {"all-gather", "ragged-all-to-all"}
    assert all(c["sent_bytes"] > 0 and c["axes"] and c["link"] for c in out["collectives"])
    assert sum(c["seconds"] for c in out["collectives"]) == pytest.approx(
        out["time"]["communication"], rel=1e-3
    )


def test_a_v5e_exchanges_blocks_for_the_worst_case():
    """Its compiler refuses ragged exchanges (docs/performance.md)."""

    def rows(on: str) -> float:
        plan = plan_run(run("mixtral_8x7b", "mesh.expert=8"), Machine.from_name(on))
        return sum(s.sent_bytes for s in plan.sends if s.what.startswith("experts: "))

    assert rows("v5e-64") == pytest.approx(4 * rows("v6e-64"))


@pytest.mark.parametrize(
    ("on", "settings", "words"),
    [
        ("h100x16", ["mesh.fsdp=1", "mesh.tensor=16"], "tensor=16 would lie across hosts"),
        ("2xv5p-128", ["mesh.data=1"], "2 slices, but neither data=1 nor stage=1"),
        ("v5p-128", ["mesh.fsdp=100"], "needs 100 devices, 64 here"),
    ],
)
def test_a_mesh_that_the_machine_cannot_have(on, settings, words):
    with pytest.raises(MaxlmError, match=words):
        plan_run(run("llama2_7b", *settings), Machine.from_name(on))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_devices_are_recognised(kind, name):
    """By what JAX calls them."""
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    found = find_chip(SimpleNamespace(platform=platform, device_kind=kind))
    assert (found and found.name) == name


def tpu(coords, slice_index: int = 0):
    return SimpleNamespace(
        platform="tpu",
        device_kind="TPU v5",
        coords=coords,
        slice_index=slice_index,
        process_index=coords[0],
    )


def test_the_machine_that_is_here():
    places = [(x, y, z) for x in range(4) for y in range(4) for z in range(2)]
    found = Machine.from_devices([tpu(p, s) for s in range(2) for p in places])
    assert found.topology == Machine.from_name("2xv5p-64").topology
    kind = "NVIDIA H100 80GB HBM3"
    for a_process in (8, 1):
        gpus = [
            SimpleNamespace(platform="gpu", device_kind=kind, process_index=i // a_process)
            for i in range(16)
        ]
        assert Machine.from_devices(gpus).topology == Machine.from_name("h100x16").topology
    gpus[0].memory_stats = lambda: {"bytes_limit": 7}
    assert Machine.from_devices(gpus).chip.memory == 7
    assert Machine.from_devices(jax.devices()).topology.shape == (8,)
    assert Machine.from_devices([SimpleNamespace(platform="gpu", device_kind="Tesla T4")]) is None


def test_a_diff_says_what_changed():
    a, b = (
        plan_run(
            run("llama2_7b", f"model.remat={remat}", "data.batch_size=128"),
            Machine.from_name("v5p-64"),
        ).to_json()
        for remat in ("full", "mlp")
    )
    found = compare_plans(a, b)
    assert found["facts"] == {"remat": ["full", "mlp"]}
    assert found["mesh"] == found["parameters"] == found["communication"] == {}
    assert found["memory"]["activations"][1] > found["memory"]["activations"][0]
    assert set(found["time"]) >= {"products", "step", "mfu"}
    assert not any(compare_plans(a, a).values())
