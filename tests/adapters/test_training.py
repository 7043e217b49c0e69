"""Runs that train an adapter."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.huggingface.checkpoint import RunCheckpointReader
from maxlm.models.params import flatten_names, select_base_params
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig, list_base_models
from maxlm.run.load import load_run
from maxlm.run.setup import set_up_run
from maxlm.run.warm_start import init_or_warm_start_state
from maxlm.sharding import MESH_AXES
from maxlm.tasks import TASKS, ClmTask, TaskModels
from maxlm.train.program import train_model
from tests.train import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]

SPREAD = {"data": 2, "fsdp": 2, "tensor": 2}
ADAPTERS = {
    "lora": {"kind": "lora", "rank": 4},
    "dora": {
        "kind": "lora",
        "rank": 4,
        "dora": True,
        "targets": ["query", "mlp.*", "embedding"],
    },
    "ia3": {"kind": "ia3"},
    "houlsby": {"kind": "bottleneck"},
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
}


@TASKS.register("test_reference")
class FrozenReferenceTask(ClmTask):
    """Cross-entropy beside that of the model that training starts from."""

    kind: Literal["test_reference"] = "test_reference"  # pyright: ignore

    def frozen_models(self) -> Mapping[str, str | None]:
        return {"reference": None}

    def loss(self, models: TaskModels, batch: Any, key: jax.Array) -> Any:
        total, sums = super().loss(models, batch, key)
        other, _ = super().loss(TaskModels(models.frozen["reference"]), batch, key)
        return total, sums | {"reference": other}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make_config(tmp_path, text):
    def make(
        name: str, mesh: Mapping[str, int], folder: Path = tmp_path, **parts: tiny.Part
    ) -> RunConfig:
        settings = tiny.settings(folder, text) | {
            "name": name,
            "mesh": {"fsdp": 1, **mesh},
        }
        settings["data"]["heldout_fraction"] = 0
        settings |= {"train": {"steps": 3}, "checkpoint": {"every_steps": 3}}
        settings |= {
            "sharding": {"max_unsharded": 1},
            "reporting": {"tensorboard": False},
        }
        return RunConfig.model_validate(settings | parts)

    return make


@pytest.fixture
def train(monkeypatch):
    """``train(config)``: trains on as many devices as the config's mesh has."""
    everyone = jax.devices()

    def run(config: RunConfig) -> Any:
        devices = everyone[: prod(config.mesh.model_dump().values())]
        monkeypatch.setattr(jax, "devices", lambda *_: devices)
        return train_model(config, say=lambda _: None)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """Runs that tests have in common, by name."""
    return {"folder": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def train_once(make_config, train, trained):
    """``train_once(name, mesh, **parts)``: a run that no other test changes."""

    def run(name: str, mesh: Mapping[str, int], **parts: tiny.Part) -> Any:
        if name not in trained:
            config = make_config(name, mesh, folder=trained["folder"], **parts)
            trained[name] = train(config)
        return trained[name]

    return run


@pytest.fixture
def base(train_once) -> Any:
    """A run without an adapter, to start from."""
    return train_once("start", SPREAD)


@pytest.fixture
def train_beside_reference(train_once, base):
    """``train_beside_reference(adapter)``: a run, and parts of its config."""

    def run(name: str) -> tuple[Any, dict[str, Any]]:
        parts: dict[str, Any] = {
            "adapter": ADAPTERS[name],
            "task": {"kind": "test_reference"},
        }
        parts["train"] = {"steps": 3, "start_from": str(base.folder)}
        return train_once(f"reference-{name}", SPREAD, **parts), parts

    return run


def read_losses(run: Any) -> list[float]:
    return [record["loss"] for record in tiny.read_metrics(run.folder)]


def are_equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


# The layouts of SFT and DPO with LoRA are in tests/train/test_parity.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "lora", "ia3", "houlsby"])
def test_a_mesh_trains_the_adapter_alone_as_one_device_does(
    make_config, train, base, name
):
    start = {"train": {"steps": 3, "start_from": str(base.folder)}}
    one = train(make_config("one", {}, adapter=ADAPTERS[name], **start))
    spread = train(make_config("spread", SPREAD, adapter=ADAPTERS[name], **start))
    np.testing.assert_allclose(read_losses(spread), read_losses(one), rtol=2e-5)
    for expected, sharded in zip(
        *(jax.tree.leaves(r.state.params) for r in (one, spread)), strict=True
    ):
        np.testing.assert_allclose(sharded, expected, atol=3e-4)
    began = init_or_warm_start_state(spread.setup).params
    names = flatten_names(base.state.params)
    assert are_equal(select_base_params(spread.state.params), base.state.params)
    trained = {
        n for n, s in flatten_names(spread.setup.trainable).items() if s is not None
    }
    assert trained == set(flatten_names(began)) - {
        f"{n}.base" if f"{n}.base" in flatten_names(began) else n for n in names
    }
    changed = flatten_names(
        jax.tree.map(lambda a, b: bool((a != b).any()), spread.state.params, began)
    )
    assert all(changed[name] for name in trained)
    goes_on = train(make_config("goes_on", SPREAD, **start))
    assert read_losses(goes_on)[0] == read_losses(spread)[0]  # bit for bit

    # A run that is used has the adapter merged, where it can be.
    loaded = load_run(spread.folder)
    assert (loaded.config.adapter is None) == (name != "houlsby")
    adapter_arrays = [
        name for name in flatten_names(loaded.params) if name.endswith(".adapter_up")
    ]
    assert bool(adapter_arrays) == (name == "houlsby")


@pytest.mark.slow
def test_pipelines_and_context_train_it_too(make_config, train):
    adapter = ADAPTERS["dora"]
    want = read_losses(train(make_config("one", {}, adapter=adapter)))
    train_settings = {"steps": 3, "micro_batches": 2}
    for mesh in ({"stage": 2, "tensor": 2}, {"context": 2, "fsdp": 2}):
        run = train(
            make_config("-".join(mesh), mesh, adapter=adapter, train=train_settings)
        )
        np.testing.assert_allclose(read_losses(run), want, rtol=2e-5)


@pytest.mark.more
@pytest.mark.parametrize(
    "name", ["lora", pytest.param("pissa", marks=pytest.mark.slow)]
)
def test_the_reference_is_the_base_without_parameters_of_its_own(
    make_config, train, train_beside_reference, base, name
):
    run, parts = train_beside_reference(name)
    memory = plan_run(run.setup.config, sizes=dict.fromkeys(MESH_AXES, 1)).memory
    losses = [r["reference"] for r in tiny.read_metrics(run.folder)]
    if name == "pissa":  # the base is not the start
        assert set(run.state.frozen) == {"reference"}
        assert memory.frozen > 0
    else:
        assert not run.state.frozen
        assert memory.frozen == 0
        del parts["adapter"]
        plain = train(make_config("plain", SPREAD, **parts))
        want = [r["reference"] for r in tiny.read_metrics(plain.folder)]
        np.testing.assert_allclose(losses, want, rtol=1e-6)
    assert read_losses(run)[0] == pytest.approx(losses[0], rel=1e-5)
    assert read_losses(run)[-1] < losses[-1]
    # An adapter that began before this run belongs to its start.
    again = {
        "train": {"steps": 1, "start_from": str(run.folder)},
        "adapter": ADAPTERS[name],
    }
    assert not list_base_models(make_config("again", SPREAD, **parts | again))


@pytest.mark.more
def test_a_base_rests_in_bfloat16(make_config, train, train_beside_reference, base):
    """Matrices and tables do, in checkpoints too; the merged kernels are in float32."""
    adapter = ADAPTERS["lora"] | {"base_dtype": "bfloat16"}
    start: dict[str, Any] = {"steps": 3, "start_from": str(base.folder)}
    run = train(make_config("half", SPREAD, adapter=adapter, train=start))
    base_params = flatten_names(select_base_params(run.state.params))
    for name, want in flatten_names(base.state.params).items():
        want = want if "norm" in name else want.astype(jnp.bfloat16)
        assert base_params[name].dtype == want.dtype, name
        np.testing.assert_array_equal(base_params[name], want)
    other, _ = train_beside_reference("lora")
    np.testing.assert_allclose(read_losses(run), read_losses(other), rtol=1e-3)
    goes_on = {"steps": 1, "start_from": str(run.folder)}
    again = train(make_config("again", SPREAD, adapter=adapter, train=goes_on))
    assert are_equal(
        select_base_params(again.state.params), select_base_params(run.state.params)
    )

    kernel = "layers.mlp.up.kernel"
    stored = RunCheckpointReader(run.folder / "checkpoints")
    read = stored.open(f"{kernel}.base").read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, base_params[kernel].astype(np.float32))
    a, b = (stored.open(f"{kernel}.lora_{side}").read() for side in "ab")
    merged = flatten_names(load_run(run.folder).params)[kernel]
    np.testing.assert_allclose(merged, read + 16 / 4 * a @ b, atol=1e-6)

    patterns = {"train": start | {"trainable": ["*.lora_*", "layers.mlp.up.*"]}}
    with pytest.raises(MaxlmError, match="is trained, and stored in bfloat16"):
        train(make_config("refused", SPREAD, adapter=adapter, **patterns))


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_optimizer_and_gradients_are_the_trained_parameters_alone(make_config, name):
    config = make_config("run", {}, adapter=ADAPTERS[name])
    layout = plan_run(config, sizes=dict.fromkeys(MESH_AXES, 1)).layout
    setup = set_up_run(config, jax.devices()[:1])
    trained = sum(s.size for s in jax.tree.leaves(setup.trainable) if s is not None)
    state = jax.tree.leaves(setup.abstract_state.opt_state)
    moments = sum(array.size * array.dtype.itemsize for array in state)
    assert 0 < trained < 0.5 * layout.parameters
    assert moments <= 1.05 * 2 * 4 * trained
    assert layout.optimizer_bytes + layout.gradient_bytes <= 1.05 * 3 * 4 * trained


@pytest.mark.more
def test_dropout_is_the_same_on_any_mesh_and_new_in_each_step(make_config, train, base):
    start: dict[str, Any] = {"train": {"steps": 3, "start_from": str(base.folder)}}
    adapter = ADAPTERS["lora"] | {"dropout": 0.5}
    one = read_losses(train(make_config("one", {}, adapter=adapter, **start)))
    spread = read_losses(train(make_config("spread", SPREAD, adapter=adapter, **start)))
    np.testing.assert_allclose(spread, one, rtol=2e-5)
    plain = read_losses(
        train(make_config("plain", {}, adapter=ADAPTERS["lora"], **start))
    )
    assert one[0] == plain[0]  # B is zero
    assert abs(one[2] - plain[2]) > 1e-4 * plain[2]


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("circular", marks=pytest.mark.more),
        pytest.param("1f1b", marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_drops_inputs_too(make_config, train, base, schedule):
    start: dict[str, Any] = {
        "steps": 3,
        "start_from": str(base.folder),
        "micro_batches": 2,
    }
    parts = {"train": start, "parallel": {"schedule": schedule}}
    losses = {}
    for dropout in (0.0, 0.5):
        adapter = ADAPTERS["lora"] | {"dropout": dropout}
        name = f"{schedule}-{dropout}"
        run = train(
            make_config(name, {"stage": 2, "fsdp": 2}, adapter=adapter, **parts)
        )
        losses[dropout] = read_losses(run)
    assert losses[0.5][0] == losses[0.0][0]
    assert abs(losses[0.5][2] - losses[0.0][2]) > 1e-4 * losses[0.0][2]
