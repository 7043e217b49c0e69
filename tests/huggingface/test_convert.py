"""Import and export: every bit of a tensor comes back, and tables that do not fit are
refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import read_metadata
from maxlm.huggingface.checkpoint import RunCheckpointReader, RunCheckpointWriter
from maxlm.huggingface.convert import export_tensors, import_tensors
from maxlm.huggingface.families.names import ParamSlice, TensorEntry
from maxlm.huggingface.files import (
    NUMPY,
    SafetensorsWriter,
    TensorDtypes,
    list_stored_tensors,
    read_tensor,
)
from maxlm.runtime.progress import ignore_progress
from tests.errors import message

V, D, L, E, F = 11, 6, 3, 2, 10


SHAPES = {
    "embedding.table": (V, D),
    "head.kernel": (D, V),
    "layers.query": (L, D, D),
    "layers.key": (L, D, 2),
    "layers.up": (L, E, D, F),
    "layers.down": (L, E, F, D),
    "layers.norm": (L, D),
    "final_norm": (D,),
}


def table():
    """Transposed, fused, stacked and shifted tensors; one per layer, per expert, and
    alone."""
    entries = [
        TensorEntry("embed", (V, D), (ParamSlice("embedding.table"),)),
        TensorEntry(
            "head",
            (V, D),
            (ParamSlice("head.kernel"),),
            lambda x: (x.T,),
            lambda p: p[0].T,
        ),
        TensorEntry(
            "norm",
            (D,),
            (ParamSlice("final_norm"),),
            lambda x: (x + 1,),
            lambda p: p[0] - 1,
        ),
    ]
    for i in range(L):
        entries += [
            TensorEntry(
                f"h.{i}.qk",
                (D + 2, D),
                (ParamSlice("layers.query", (i,)), ParamSlice("layers.key", (i,))),
                lambda x: (x[:D].T, x[D:].T),
                lambda parts: np.concatenate([part.T for part in parts]),
            ),
            TensorEntry(f"h.{i}.down", (E, F, D), (ParamSlice("layers.down", (i,)),)),
            TensorEntry(f"h.{i}.norm", (D,), (ParamSlice("layers.norm", (i,)),)),
        ]
        entries += [
            TensorEntry(f"h.{i}.{e}.up", (D, F), (ParamSlice("layers.up", (i, e)),))
            for e in range(E)
        ]
    return entries


def tensors(dtype="BF16", **others):
    random = np.random.default_rng(5)
    values = {}
    for entry in table():
        kind = NUMPY[others.get(entry.theirs, dtype)]
        values[entry.theirs] = (
            random.normal(size=entry.shape).astype(np.float32).astype(kind)
        )
    # A shift by one must be exact for the test of bits; these are sixteenths.
    values["norm"] = (random.integers(-16, 16, D) / 16).astype(values["norm"].dtype)
    return values


def save(folder, values, shard_bytes=10**9):
    names = {dtype: name for name, dtype in NUMPY.items()}
    kinds = {name: (names[value.dtype], value.shape) for name, value in values.items()}
    folder.mkdir(parents=True)
    writer = SafetensorsWriter(folder, kinds, shard_bytes)
    for name, value in values.items():
        writer.write(name, value)
    return folder


def test_values_that_are_no_numbers_are_counted(tmp_path):
    values = tensors()
    lines = []
    imported(save(tmp_path / "clean", values), tmp_path / "a", warn=lines.append)
    assert lines == []
    values["h.1.down"][1, 2:5, 3] = np.nan, np.inf, -np.inf
    values["h.2.norm"][0] = np.nan
    imported(save(tmp_path / "theirs", values), tmp_path / "b", warn=lines.append)
    assert lines == [
        "warning: 4 values are NaN or infinite, the first of them in h.1.down"
    ]


def imported(
    theirs,
    checkpoints,
    entries=None,
    ignored=(),
    warn=lambda line: None,
    progress=ignore_progress,
):
    writer = RunCheckpointWriter(checkpoints)
    dtypes = import_tensors(
        list_stored_tensors(theirs),
        entries or table(),
        SHAPES,
        writer,
        progress,
        where=str(theirs),
        ignored=ignored,
        warn=warn,
    )
    writer.commit({"safetensors": dtypes.model_dump()})
    return dtypes


def export(
    reader, dtypes, folder, shard_bytes=10**9, progress=ignore_progress, lossy=False
):
    folder.mkdir()
    export_tensors(reader, table(), dtypes, folder, shard_bytes, progress, lossy=lossy)
    return load(folder)


def load(folder):
    return {
        name: read_tensor(stored)
        for name, stored in list_stored_tensors(folder).items()
    }


def same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (
            want[name].dtype,
            want[name].shape,
        )
        assert got[name].tobytes() == want[name].tobytes(), name


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_every_bit_comes_back(tmp_path, dtype):
    want = tensors(dtype, norm="F32", embed="F16")
    want["embed"][0] = [np.inf, -np.inf, np.nan, -0.0, 0.0, 6e-8]
    dtypes = imported(save(tmp_path / "theirs", want, 500), tmp_path / "checkpoints")
    assert {name: NUMPY[dtypes.get_dtype(name)] for name in want} == {
        n: v.dtype for n, v in want.items()
    }
    reader = RunCheckpointReader(tmp_path / "checkpoints")
    assert (
        TensorDtypes.model_validate(read_metadata(reader.folder)["safetensors"])
        == dtypes
    )
    same_bits(export(reader, dtypes, tmp_path / "again", 500), want)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2


def test_parameters_are_what_the_table_says(tmp_path):
    theirs = {name: value.astype(np.float32) for name, value in tensors().items()}
    imported(save(tmp_path / "theirs", tensors()), tmp_path / "ours")
    reader = RunCheckpointReader(tmp_path / "ours")
    assert reader.shapes == SHAPES
    got = {name: reader.open(name).read() for name in SHAPES}
    np.testing.assert_array_equal(got["head.kernel"], theirs["head"].T)
    np.testing.assert_array_equal(got["final_norm"], theirs["norm"] + 1)
    for i in range(L):
        np.testing.assert_array_equal(got["layers.query"][i], theirs[f"h.{i}.qk"][:D].T)
        np.testing.assert_array_equal(got["layers.key"][i], theirs[f"h.{i}.qk"][D:].T)
        np.testing.assert_array_equal(got["layers.down"][i], theirs[f"h.{i}.down"])
        for e in range(E):
            np.testing.assert_array_equal(
                got["layers.up"][i, e], theirs[f"h.{i}.{e}.up"]
            )


def test_what_training_saved_is_exported(tmp_path):
    want = {n: v.astype(np.float32) for n, v in tensors().items()}
    imported(save(tmp_path / "theirs", want), tmp_path / "ours")
    reader = RunCheckpointReader(tmp_path / "ours")
    params = {name: jnp.array(reader.open(name).read()) for name in SHAPES}
    state = {
        "params": params,
        "step": np.int32(7),
        "ema": jax.tree.map(lambda x: 2 * x, params),
    }
    with FolderTier(tmp_path / "run") as keeper:
        keeper.save(7, state, {})
    f32 = TensorDtypes(default="F32")
    same_bits(export(RunCheckpointReader(tmp_path / "run"), f32, tmp_path / "a"), want)
    got = export(RunCheckpointReader(tmp_path / "run", name="ema"), f32, tmp_path / "b")
    np.testing.assert_array_equal(got["head"], 2 * want["head"])
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["model.safetensors"]


def test_rounding_is_refused_unless_asked(tmp_path):
    imported(save(tmp_path / "theirs", tensors("F32")), tmp_path / "ours")
    reader = RunCheckpointReader(tmp_path / "ours")
    bf16 = TensorDtypes(default="BF16")
    text = message(export, reader, bf16, tmp_path / "a")
    assert "its float32 values would be rounded to bfloat16" in text
    got = export(reader, bf16, tmp_path / "b", lossy=True)
    want = {
        name: value.astype(ml_dtypes.bfloat16) for name, value in tensors("F32").items()
    }
    same_bits(got, want)

    imported(
        save(tmp_path / "exact64", tensors("F64", embed="F32")), tmp_path / "exact"
    )
    folder64 = save(tmp_path / "sixty-four", tensors() | {"head": np.full((V, D), 0.1)})
    text = message(imported, folder64, tmp_path / "more")
    assert text.startswith("head: its float64 values would be")


def test_progress_counts_bytes_to_the_end(tmp_path):
    there, back = [], []
    folder = save(tmp_path / "theirs", tensors())
    imported(folder, tmp_path / "ours", progress=lambda *call: there.append(call))
    reader = RunCheckpointReader(tmp_path / "ours")
    dtypes = TensorDtypes(default="BF16")
    export(reader, dtypes, tmp_path / "a", progress=lambda *call: back.append(call))
    total = sum(value.nbytes for value in tensors().values())
    for calls in (there, back):
        _, done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(set(done))
        assert done[-1] == total
        assert set(totals) == {total}
        assert len(done) == len(tensors())


def refused(tmp_path, values, entries=None, ignored=()):
    """Why an import is refused; nothing may have been written."""
    folder = save(tmp_path / "theirs", values)
    ours = tmp_path / "ours"
    text = message(imported, folder, ours, entries, ignored)
    assert not ours.exists(), "refused before anything was written"
    return text.replace(str(folder), "FOLDER")


def test_buffers_may_be_ignored(tmp_path):
    values = tensors() | {
        "h.0.rotary.inv_freq": np.ones(3),
        "h.mask": np.ones(3, np.int64),
    }
    ignored = ("*.inv_freq", "h.mask")
    imported(save(tmp_path / "a", values), tmp_path / "b", ignored=ignored)
    text = refused(tmp_path, values, ignored=("*.inv_freq",))
    assert "hold h.mask, which this model does not use" in text
    text = refused(tmp_path / "c", tensors() | {"norm": np.ones(D, np.int8)})
    assert "norm is stored as I8, so quantized" in text


def aliased():
    entries = table()
    return [
        replace(e, aliases=("tied", "again")) if e.theirs == "embed" else e
        for e in entries
    ]


def test_a_tied_tensor_may_be_stored_again(tmp_path):
    values = tensors()
    both = values | {"tied": values["embed"], "again": values["embed"]}
    other = {
        ("tied" if name == "embed" else name): value for name, value in values.items()
    }
    for i, stored in enumerate((values, both, other)):
        imported(save(tmp_path / f"a{i}", stored), tmp_path / f"b{i}", aliased())
        table_ = RunCheckpointReader(tmp_path / f"b{i}").open("embedding.table").read()
        np.testing.assert_array_equal(table_, values["embed"].astype(np.float32))


@pytest.mark.parametrize("change", ["value", "dtype"])
def test_a_tied_tensor_that_differs_is_refused(tmp_path, change):
    values = tensors()
    other = values["embed"].astype(
        np.float32 if change == "dtype" else values["embed"].dtype
    )
    other[-1, -1] += change == "value"
    text = refused(tmp_path, values | {"tied": other}, aliased())
    reason = "differs from embed, which this model ties it to; set tie_word_embeddings to false"
    assert text.startswith(f"FOLDER/model.safetensors: tied {reason}")


def test_each_parameter_is_filled_once(tmp_path):
    def without(theirs):
        return [entry for entry in table() if entry.theirs != theirs]

    values = tensors()
    more = {"x": values["h.1.down"], **values}
    down = TensorEntry("x", (E, F, D), (ParamSlice("layers.down", (1,)),))
    cases = {
        "layers.up[1][0]: nothing fills it": without("h.1.0.up"),
        "embedding.table: nothing fills it": without("embed"),
        "layers.down[1]: filled twice or not there": [*table(), down],
        "layers.down[3]: filled twice or not there": [
            *table(),
            replace(down, ours=(ParamSlice("layers.down", (L,)),)),
        ],
        "layers.sideways: this model has no such parameter": [
            *table(),
            replace(down, ours=(ParamSlice("layers.sideways", (1,)),)),
        ],
    }
    for i, (text, entries) in enumerate(cases.items()):
        (tmp_path / str(i)).mkdir()
        assert refused(tmp_path / str(i), more, entries).split("; check")[0] == text
