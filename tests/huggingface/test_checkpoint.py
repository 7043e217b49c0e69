"""Checkpoints written by slices, restored by Orbax; saved by Orbax, read by slices."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.checkpoint.config import CheckpointConfig
from maxlm.checkpoint.folder import FolderTier
from maxlm.huggingface import arrays
from maxlm.huggingface.checkpoint import RunCheckpointReader, RunCheckpointWriter
from tests.errors import message

LEADS = {"embed.table": 0, "layers.norm": 1, "layers.up": 1, "layers.experts": 2}
SHAPES = {
    "embed.table": (10, 8),
    "layers.norm": (3, 7),
    "layers.up": (3, 8, 14),
    "layers.experts": (3, 4, 6, 2),
}


def make_params():
    random = np.random.default_rng(3)
    return {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def write(folder, step=0, metadata=None):
    params = make_params()
    writer = RunCheckpointWriter(folder, step=step)
    for name, lead in LEADS.items():
        writer.declare(name, SHAPES[name], lead)
        for index in np.ndindex(*SHAPES[name][:lead]):
            writer.write(name, index, params[name][index])
    writer.commit(metadata or {})
    return params


@pytest.mark.usefixtures("small_files")
def test_orbax_restores_what_was_written(tmp_path):
    want = unflatten_dict(write(tmp_path, metadata={"config": {"a": 1}}), sep=".")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want)
    with FolderTier(tmp_path) as keeper:
        assert keeper.steps() == [0]
        metadata = keeper.metadata()
        got = keeper.restore(None, abstract, "params")
        keeper.save(1, {"params": jax.tree.map(jnp.array, want)}, {})
        assert keeper.steps() == [0, 1], "a run goes on from it"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)
    assert metadata.pop("versions")["jax"] == jax.__version__
    assert metadata == {"step": 0, "config": {"a": 1}}


@pytest.mark.usefixtures("small_files")
def test_orbax_restores_it_onto_a_mesh_and_in_another_dtype(tmp_path, mesh):
    want = unflatten_dict(write(tmp_path), sep=".")
    eight = mesh(data=2, fsdp=2, tensor=2)
    specs = {2: P("tensor"), 3: P(None, "fsdp", "tensor"), 4: P(None, "fsdp")}

    def describe(x):
        spec = specs[x.ndim] if x.shape != (3, 7) else P()
        return jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16, sharding=NamedSharding(eight, spec)
        )

    templates = jax.tree.map(describe, want)
    with FolderTier(tmp_path, read_only=True) as keeper:
        got = keeper.restore(None, templates, "params")

    def check(got, template, want):
        assert got.sharding == template.sharding
        for shard in got.addressable_shards:
            expected = want[shard.index].astype(jnp.bfloat16)
            np.testing.assert_array_equal(shard.data, expected)

    jax.tree.map(check, got, templates, want)


def saved_by_orbax(folder, where, step=5):
    """Saved from a mesh, or from one device if ``where`` is None."""
    params = make_params()

    def put(x):
        if where is None or x.shape == (3, 7):
            return jnp.array(x)
        return jax.device_put(
            x, NamedSharding(where, P(*(None,) * (x.ndim - 2), "fsdp", "tensor"))
        )

    with FolderTier(folder, CheckpointConfig()) as keeper:
        state = {
            "params": {n: put(x) for n, x in params.items()},
            "step": np.int32(step),
        }
        keeper.save(step, state, {"config": {}})
    return params


@pytest.mark.parametrize("sharded", [False, True])
def test_decodes_what_orbax_saved_once_for_all_slices(
    tmp_path, mesh, monkeypatch, sharded
):
    want = saved_by_orbax(tmp_path, mesh(fsdp=2, tensor=2) if sharded else None)
    reads = []
    read_box = arrays.ZarrArray.read_box
    monkeypatch.setattr(
        arrays.ZarrArray,
        "read_box",
        lambda self, box: reads.append(box) or read_box(self, box),
    )
    reader = RunCheckpointReader(tmp_path)
    assert (reader.step, reader.shapes) == (5, SHAPES)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name, lead in LEADS.items():
        with reader.open_slice_reader(name, lead, scratch) as read:
            assert bool(list(scratch.iterdir())) == bool(lead)
            for index in np.ndindex(*SHAPES[name][:lead]):
                np.testing.assert_array_equal(read(index), want[name][index])
        assert not list(scratch.iterdir())
    pieces = 1 + (
        4 + 4 if sharded else 1 + 1
    )  # the norm is whole, the others in shards
    assert len(reads) == pieces


@pytest.mark.usefixtures("small_files")
def test_reads_slices_of_what_it_wrote_each_in_files_of_its_own(tmp_path):
    write(tmp_path, step=3)
    want = write(tmp_path, step=10)
    assert RunCheckpointReader(tmp_path).step == 10
    reader = RunCheckpointReader(tmp_path, 3)
    for name, lead in LEADS.items():
        with reader.open_slice_reader(name, lead, tmp_path / "unused") as read:
            for index in np.ndindex(*SHAPES[name][:lead]):
                np.testing.assert_array_equal(read(index), want[name][index])
        array = reader.open(name)
        assert array.shard_shape[:lead] == (1,) * lead
        assert math.prod(array.shard_shape) * 4 <= 200
        assert math.prod(array.chunk_shape) * 4 <= 64


def test_errors_name_the_folder_and_a_way_out(tmp_path):
    empty = f"{tmp_path}: no checkpoint here; name a run that has one"
    assert message(RunCheckpointReader, tmp_path) == empty
    write(tmp_path, step=4)
    assert message(RunCheckpointReader, tmp_path, 3) == (
        f"{tmp_path}: no checkpoint of step 3; use one of 4"
    )
    assert message(RunCheckpointReader, tmp_path, name="ema") == (
        f"{tmp_path}/4: it holds no ema; read another part of it"
    )


def test_damage_is_an_error(tmp_path):
    write(tmp_path)
    state = tmp_path / "0" / "state"
    reader = RunCheckpointReader(tmp_path)
    for path in (state / "params.layers.up" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(b"broken")
    assert "params.layers.up: array error" in message(
        reader.open("layers.up").read, (1,)
    )
    (state / "_METADATA").write_text(json.dumps({}))
    assert "_METADATA: damaged checkpoint (there is no tree_metadata)" in message(
        RunCheckpointReader, tmp_path
    )
