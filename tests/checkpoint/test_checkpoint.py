"""Checkpoints: written on one layout and read on another, interrupted, broken, or not
ours."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from maxlm.checkpoint.config import CheckpointConfig
from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import check_same_settings, compute_fingerprints
from maxlm.config import MaxlmError
from maxlm.sharding import MeshConfig, make_mesh
from tests.errors import message
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
METADATA = {"config": {"model": {"d_model": 6}}, "loader": 3}


def make_state():
    """Parameters, AdamW's state over them and a step, as numpy; odd sizes, known
    values."""
    random = np.random.default_rng(7)

    def array(*shape):
        return random.normal(size=shape).astype(np.float32)

    params = {"embed": {"table": array(10, 8)}, "layers": {"up": array(3, 8, 14)}}
    opt_state = optax.scale_by_adam().init(params)
    opt_state = opt_state._replace(nu=jax.tree.map(lambda p: np.asarray(p**2), params))
    return {
        "params": params,
        "opt_state": jax.tree.map(np.asarray, (optax.EmptyState(), opt_state)),
        "step": np.int32(12),
    }


def on_one_device(state):
    return jax.tree.map(jnp.array, state)


def abstract(state):
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)


def save(folder, *steps):
    with FolderTier(folder, CheckpointConfig(every_steps=1)) as checkpoints:
        for step in steps:
            checkpoints.save(step, on_one_device(make_state()), METADATA)


def start(script, *args):
    return subprocess.Popen(
        [sys.executable, "-c", script, __file__, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finish(*processes):
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        assert out.endswith("done\n"), err[-3000:]


def pass_on(source, target):
    """Restores a checkpoint onto a mesh, checks every bit and layout, and saves what it
    got."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    want = make_state()
    specs = {  # By number of axes.
        0: PartitionSpec(),
        2: PartitionSpec("tensor", "fsdp"),
        3: PartitionSpec(None, "fsdp", "tensor"),
    }

    def describe(array):
        sharding = NamedSharding(mesh, specs[array.ndim])
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    template = jax.tree.map(describe, want)
    with FolderTier(source, read_only=True) as checkpoints:
        state = checkpoints.restore(None, template)
        params = checkpoints.restore(12, template["params"], "params")
    assert jax.tree.structure(state) == jax.tree.structure(want)

    def check(got, template, want):
        assert got.sharding == template.sharding
        for shard in got.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[shard.index])

    jax.tree.map(check, state, template, want)
    jax.tree.map(check, params, template["params"], want["params"])
    with FolderTier(target, CheckpointConfig()) as checkpoints:
        assert checkpoints.save(12, state, {"config": {}})


ON_TWO_PROCESSES = """
import jax, runpy, sys
_, here, source, target, port, process = sys.argv
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
runpy.run_path(here)["pass_on"](source, target)
print("done")
"""


@pytest.mark.more
@pytest.mark.heavy
def test_one_device_eight_devices_and_two_processes_read_each_others_bits(tmp_path):
    one = tmp_path / "one"
    eight = tmp_path / "eight"
    two = tmp_path / "two"
    save(one, 12)
    pass_on(one, eight)
    port = free_port()
    first = start(ON_TWO_PROCESSES, eight, two, port, 0)
    second = start(ON_TWO_PROCESSES, eight, two, port, 1)
    finish(first, second)
    want = make_state()
    for folder in (one, eight, two):
        with FolderTier(folder, read_only=True) as checkpoints:
            assert_same(checkpoints.restore(None, abstract(want)), want)


def test_keeps_the_newest_and_the_multiples(tmp_path):
    state = {"params": jnp.ones(2)}
    config = CheckpointConfig(every_steps=4, keep_last=2, keep_every=3)
    with FolderTier(tmp_path, config) as checkpoints:
        assert checkpoints.latest() is None
        assert [step for step in range(10) if checkpoints.is_due(step)] == [0, 4, 8]
        assert all(checkpoints.save(step, state, {}) for step in range(1, 9))
        assert not checkpoints.save(8, state, {})
        assert checkpoints.steps() == [3, 6, 7, 8]
        assert checkpoints.latest() == 8


def test_metadata_is_what_was_saved_with_step_versions_and_fingerprints(tmp_path):
    save(tmp_path, 3, 5)
    with FolderTier(tmp_path, read_only=True) as checkpoints:
        metadata = checkpoints.metadata()
    versions = metadata.pop("versions")
    fingerprints = metadata.pop("fingerprints")
    assert metadata == METADATA | {"step": 5}
    assert versions["jax"] == jax.__version__
    assert {"params.layers.up", "opt_state.1.mu.embed.table"} < fingerprints.keys()


def test_restores_parameters_alone_in_another_dtype(tmp_path):
    save(tmp_path, 1)
    want = make_state()["params"]
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), want)
    with FolderTier(tmp_path, read_only=True) as checkpoints:
        params = checkpoints.restore(None, template, "params")
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))


def test_missing_folder_or_step_is_an_error(tmp_path):
    missing = tmp_path / "missing"
    no_run = "missing: no checkpoints here; name a run that has saved"
    with pytest.raises(MaxlmError, match=no_run):
        FolderTier(missing, read_only=True)
    assert not missing.exists()
    with FolderTier(tmp_path / "run") as checkpoints:
        empty = f"{tmp_path}/run: no checkpoint here; train for longer"
        assert message(checkpoints.restore, 3, {}, "params") == empty
        checkpoints.save(2, {"params": jnp.ones(2)}, {})
        text = message(checkpoints.metadata, 3)
        assert text.endswith("no checkpoint of step 3; use one of 2")
    (tmp_path / "file").write_text("")
    no_folder = r"file/x: cannot keep checkpoints here \(.*; name a folder"
    with pytest.raises(MaxlmError, match=no_folder):
        FolderTier(tmp_path / "file" / "x")


def test_checkpoint_of_another_model_is_refused_by_the_first_parameter_that_differs(
    tmp_path,
):
    save(tmp_path, 1)
    wider = make_state()
    wider["params"]["layers"]["up"] = np.ones((3, 8, 15), np.float32)
    more = make_state()
    more["params"]["head"] = np.ones((8, 10), np.float32)
    other = make_state() | {"opt_state": ()}
    with FolderTier(tmp_path, read_only=True) as checkpoints:
        for state, difference in (
            (wider, "model: params.layers.up is [3, 8, 14] in it, [3, 8, 15]"),
            (more, "model: params.head is absent in it, [8, 10]"),
            (
                other,
                "optimizer or training state: opt_state.1.count is [] in it, absent",
            ),
        ):
            assert message(checkpoints.restore, 1, abstract(state)) == (
                f"{tmp_path}/1: checkpoint of another {difference} in this run; use the "
                "config it was trained with, or another run folder"
            )
        del more["params"]["embed"]
        text = message(checkpoints.check_shapes, 1, abstract(more["params"]), "params")
        assert "params.embed.table is [10, 8] in it, absent in this run" in text


def test_layers_held_in_groups_are_stored_in_a_row_and_read_either_way(tmp_path, mesh):
    """Layer g · 4 + i is element [g, i]; stages hold the second axis here, the first on
    disk."""
    on = mesh(stage=2, fsdp=2)
    flat = np.arange(48, dtype=np.float32).reshape(8, 6)
    grouped_sharding = NamedSharding(on, PartitionSpec(None, "stage", "fsdp"))
    grouped = jax.device_put(flat.reshape(2, 4, 6), grouped_sharding)
    whole = NamedSharding(on, PartitionSpec(None))
    factor = jax.device_put(flat[:, 0].reshape(2, 4), whole)
    place_holder = jax.device_put(np.ones((1,)), NamedSharding(on, PartitionSpec()))
    state = {
        "params": {"layers": {"up": grouped}, "otherlayers": {"up": grouped}},
        "opt_state": {
            "mu": {"layers": {"up": grouped}},
            "v_row": {"layers": {"up": factor}},
        },
        "v": {"layers": {"up": place_holder}},
    }
    with FolderTier(tmp_path, layer_groups={"layers.up": (2, 4)}) as checkpoints:
        checkpoints.save(1, state, {})
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    # In a row only what is named layers; the rest is stored as it is.
    alone = jax.tree.map(np.asarray, state)
    alone["params"]["layers"]["up"] = flat
    alone["opt_state"]["mu"]["layers"]["up"] = flat
    alone["opt_state"]["v_row"]["layers"]["up"] = flat[:, 0]
    with FolderTier(tmp_path, read_only=True) as checkpoints:
        again = checkpoints.restore(1, template)
        assert_same(checkpoints.restore(1, abstract(alone)), alone)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert again["params"]["layers"]["up"].sharding == grouped_sharding


def test_a_different_config_is_refused_where_it_must_be_the_same():
    saved = {"model": {"layers": 2, "norm": {"eps": 1e-5}}, "seed": 1, "steps": 10}
    check_same_settings(saved, saved | {"steps": 20}, ["model", "seed"])
    check_same_settings(saved, saved | {"model_name": "x"}, ["model", "seed"])
    changed = {"model": {"layers": 3, "norm": {"eps": 1e-5}}, "seed": 2, "steps": 20}
    text = message(check_same_settings, saved, changed, ["model", "seed"], "runs/a")
    assert text == (
        "runs/a: the checkpoint was written with another config: model.layers=2 became "
        "3, seed=1 became 2; set them back, or train in another run folder"
    )


FINGERPRINTED = [(), (1,), (7,), (3, 5), (4, 6, 2), (0, 3)]
DTYPES = ["float32", "bfloat16", "int32", "uint32", "int8", "bool"]


def by_hand(array):
    """The formula of compute_fingerprints, in Python's integers."""
    factors = (2_654_435_761, 2_246_822_519, 3_266_489_917)
    total = 0
    for index in np.ndindex(array.shape):
        bits = int.from_bytes(np.asarray(array[index]).tobytes(), "little")
        place = sum(i * factor for i, factor in zip(index, factors, strict=False))
        place %= 2**32
        place = (place ^ (place >> 16)) * factors[1] % 2**32
        weight = (place ^ (place >> 13)) | 1
        total += bits * weight
    return total % 2**32


def test_fingerprints_equal_their_formula():
    random = np.random.default_rng(3)
    arrays = {}
    for shape in FINGERPRINTED:
        for dtype in DTYPES:
            values = jnp.asarray(random.normal(scale=50, size=shape))
            arrays[f"{shape} {dtype}"] = values.astype(dtype)
    want = {name: by_hand(np.asarray(array)) for name, array in arrays.items()}
    assert compute_fingerprints(arrays) == want


def test_fingerprints_are_the_same_for_every_layout(mesh):
    array = jax.random.normal(jax.random.key(0), (8, 4, 6))
    want = compute_fingerprints({"x": array})
    for axes, spec in (
        ({"data": 2, "tensor": 4}, ("data", "tensor")),
        ({"fsdp": 4, "tensor": 2}, (None, "fsdp", "tensor")),
        ({"data": 2}, ()),
    ):
        sharding = NamedSharding(mesh(**axes), PartitionSpec(*spec))
        placed = jax.device_put(array, sharding)
        assert compute_fingerprints({"x": placed}) == want
