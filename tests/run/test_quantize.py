"""`maxlm quantize`: what is written is the model rounded, calibrated layer by layer, and
loads as any other run."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.models.params import (
    bind,
    flatten_names,
    init_params,
    is_leaf,
    merge_packed,
    param_specs,
)
from maxlm.quantization.config import QuantizationConfig
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.run.load import LoadedRun, load_model
from maxlm.run.quantize.calibration import CalibrationSettings, read_calibration_rows
from maxlm.run.quantize.program import quantize_model
from maxlm.sharding import AxisRules
from tests.train import tiny

TOKENS = np.random.default_rng(1).integers(0, 300, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory, text) -> Path:
    """A run of random parameters; of its feed-forward's inputs some are large."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    settings = tiny.settings(folder.parent, text)
    settings["model"]["mlp"] = {"d_ff": 96}
    config = RunConfig.model_validate(settings)
    specs = param_specs(config.model.build(rules=AxisRules(), dtype=np.float32))
    params = flatten_names(init_params(specs, jax.random.key(0)))
    scale = np.ones(32, np.float32)
    scale[::5] = 30
    params["layers.mlp_norm.scale"] *= scale
    writer = RunCheckpointWriter(folder / "checkpoints")
    for name, values in params.items():
        writer.declare(name, values.shape)
        writer.write(name, (), np.asarray(values))
    texts = [path.read_text() for path in sorted(Path(text).iterdir())]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), texts)
    tokenizer.save(folder / "tokenizer")
    writer.commit(
        {
            "config": config.model_dump(mode="json"),
            "tokenizer": tokenizer.fingerprint,
        }
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def compute_hidden(loaded: LoadedRun, rows: np.ndarray = TOKENS) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)

    @jax.jit
    def run(params, tokens):
        return bind(loaded.model, params)(tokens, positions)[0]

    with jax.set_mesh(loaded.mesh):
        return run(loaded.params, jnp.asarray(rows))


def measure_error(
    dense: LoadedRun, quantized: LoadedRun, rows: np.ndarray = TOKENS
) -> float:
    expected = compute_hidden(dense, rows)
    difference = compute_hidden(quantized, rows) - expected
    return float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(expected**2)))


@pytest.mark.heavy
def test_matrices_are_rounded_and_the_run_is_one_as_any_other(dense, tmp_path):
    quantized = quantize_model(dense, tmp_path / "small", "int8")
    assert quantized.notes == ()
    loaded = load_model(tmp_path / "small")
    original = load_model(dense)
    assert loaded.config.quantization is not None
    assert loaded.config.model == original.config.model
    assert loaded.tokenizer.fingerprint == original.tokenizer.fingerprint
    num_bytes = sum(array.nbytes for array in jax.tree.leaves(loaded.params))
    assert num_bytes == quantized.num_bytes
    assert quantized.num_params == sum(
        array.size for array in jax.tree.leaves(original.params)
    )

    # Each number is within half a step of an output's 255 (and the scale's rounding).
    values = flatten_names(merge_packed(loaded.params))
    packed = 0
    for name, expected in flatten_names(original.params).items():
        if not name.endswith(".kernel") or not name.startswith("layers."):
            np.testing.assert_array_equal(values[name], expected)
            continue
        packed += 1
        num_inputs = 2 if name == "layers.attention.out.kernel" else 1
        inputs = tuple(range(1, 1 + num_inputs))
        largest = np.abs(expected).max(axis=inputs, keepdims=True)
        error = np.abs(values[name] - expected)
        assert np.all(error <= largest / 255 * 1.01 + np.abs(expected) / 256)
    assert packed == 7
    assert measure_error(original, loaded) < 0.02

    # Products with codes are those with the values.
    plain = original.model
    difference = compute_hidden(loaded) - compute_hidden(
        LoadedRun(
            loaded.config, loaded.mesh, plain, merge_packed(loaded.params), None, 0
        )
    )
    assert float(jnp.abs(difference).max()) < 1e-5

    # As if it were loaded dense, and rounded on the way.
    config = QuantizationConfig(format="int8")
    on_the_way = flatten_names(load_model(dense, quantization=config).params)
    for name, array in flatten_names(loaded.params).items():
        np.testing.assert_array_equal(on_the_way[name], array)

    with pytest.raises(MaxlmError, match="is quantized already"):
        quantize_model(tmp_path / "small", tmp_path / "smaller", "int4-g32")


@pytest.mark.more
def test_calibrated_schemes_are_nearer_and_go_on_after_the_last_layer(
    dense, text, tmp_path
):
    original = load_model(dense)
    settings = CalibrationSettings(text, num_rows=30, row_tokens=32, batch_rows=20)
    rows = read_calibration_rows(settings, original.tokenizer, 32)
    quantize = partial(quantize_model, dense)
    errors: dict[str, float] = {}
    for scheme in ("int3-g32", "gptq-int3-g32", "awq-int3-g32", "awq-gptq-int3-g32"):
        calibration = None if scheme == "int3-g32" else settings
        quantize(tmp_path / scheme, scheme, calibration=calibration)
        errors[scheme] = measure_error(original, load_model(tmp_path / scheme), rows)
    assert errors["gptq-int3-g32"] < 0.9 * errors["int3-g32"], errors
    assert errors["awq-int3-g32"] < 0.9 * errors["int3-g32"], errors
    assert errors["awq-gptq-int3-g32"] < errors["gptq-int3-g32"], errors

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "quantizing layers" and done == total // 2:
            raise Killed

    again = tmp_path / "again"
    with pytest.raises(Killed):
        quantize(again, "gptq-int3-g32", calibration=settings, progress=kill)
    assert not again.exists()
    assert [path.name for path in (tmp_path / "again.calibrated").glob("*.zip")] == [
        "layer-0000.zip"
    ]
    with pytest.raises(MaxlmError, match="layers of another model, scheme or text"):
        quantize(again, "awq-int3-g32", calibration=settings)
    quantize(again, "gptq-int3-g32", calibration=settings)
    first = load_model(tmp_path / "gptq-int3-g32").params
    assert jax.tree.all(jax.tree.map(np.array_equal, load_model(again).params, first))
    assert not (tmp_path / "again.calibrated").exists()


def test_what_no_block_divides_has_another_format(dense, tmp_path):
    quantized = quantize_model(
        dense, tmp_path / "small", "int4-g48", targets=("query", "down")
    )
    assert quantized.notes == (
        "no whole number of blocks of 1x96: layers.attention.query.kernel are int8",
    )
    specs = flatten_names(load_model(tmp_path / "small").params, is_leaf)
    formats = {
        name: leaf.form.format.name for name, leaf in specs.items() if is_leaf(leaf)
    }
    assert formats == {
        "layers.attention.query.kernel": "int8",
        "layers.mlp.down.kernel": "int4-g48",
    }


@pytest.mark.parametrize(
    ("scheme", "calibrate", "message"),
    [
        ("gptq-int4-g64x", "text", "int4-g64x; did you mean int4-g32?"),
        ("gtpq-int4-g64", None, "no scheme 'gtpq-int4-g64'; use one such as gptq-int4"),
        ("gptq-int4-g32", None, "gptq-int4-g32 is calibrated on a text; name a file"),
        ("int8", "text", "int8 reads no text; leave it out, or use gptq-int8"),
        ("gptq-nf4", "text", "nf4 is none; use nf4 alone, or int4-g128"),
        ("gptq-int4-g32", "short", "a text of 0 tokens, and a row has 32"),
    ],
)
def test_bad_input(dense, text, tmp_path, scheme, calibrate, message):
    short = tmp_path / "short.txt"
    short.write_text("")
    settings = None
    if calibrate is not None:
        source = text if calibrate == "text" else str(short)
        settings = CalibrationSettings(source)
    with pytest.raises(MaxlmError) as caught:
        quantize_model(dense, tmp_path / "small", scheme, calibration=settings)
    assert message in str(caught.value)
    assert not (tmp_path / "small").exists()


@pytest.mark.heavy
def test_a_quantized_run_is_exported_as_the_values_that_it_stands_for(dense, tmp_path):
    quantize_model(dense, tmp_path / "small", "nf4")
    convert(tmp_path / "small", tmp_path / "out", dtype="float32")
    again = load_model(tmp_path / "out").params
    values = merge_packed(load_model(tmp_path / "small").params)
    jax.tree.map(np.testing.assert_array_equal, again, values)
