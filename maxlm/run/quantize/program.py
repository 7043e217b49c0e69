"""Quantizes a run or a published model, as a run of its own."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.huggingface.packed_params import QuantizingWriter, list_matrix_forms
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import (
    Params,
    ParamSpec,
    flatten_names,
    join_path,
)
from maxlm.quantization.leaf import MatrixForm, QuantizedParam
from maxlm.run.config import RunConfig
from maxlm.run.convert import build_stored_specs, check_new_folder, make_new_folder
from maxlm.run.load import LoadedRun, load_model
from maxlm.run.quantize.calibration import CalibrationSettings, read_calibration_rows
from maxlm.run.quantize.formats import choose_formats
from maxlm.run.quantize.layers import LayerWalk
from maxlm.run.quantize.rounding import LayerQuantizer, check_format
from maxlm.run.quantize.scheme import Scheme, parse_scheme
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.progress import Progress, ignore_progress

CALIBRATED = "calibrated"
"""Begins the names of files of finished layers."""


@dataclass(frozen=True)
class QuantizedRun:
    """A run that is written."""

    folder: Path
    num_params: int
    """Numbers that matrices, tables and vectors have."""
    num_bytes: int
    """Bytes that they are stored in."""
    matrix_bits: float
    """Bits a number of quantized matrices, scales included."""
    notes: tuple[str, ...]


def quantize_model(
    source: str | Path,
    target: str | Path,
    scheme_name: str,
    *,
    targets: tuple[str, ...] | None = None,
    calibration: CalibrationSettings | None = None,
    step: int | None = None,
    progress: Progress = ignore_progress,
) -> QuantizedRun:
    """Writes a model with its matrices quantized, as a run of step 0: config,
    checkpoint, tokenizer. An adapter is merged first.

    Calibrated schemes take a layer after the other: beside the model there are two
    layers, the statistics of one, and what the rows are between two layers. Each layer
    is kept when it is done; the same command goes on after the last.

    Args:
        source: a run's folder, or a published model's.
        scheme_name: see :func:`~maxlm.run.quantize.scheme.parse_scheme`.
        targets: names of matrices; None: all linear maps of layers.
        calibration: the text that a calibrated scheme reads.
        step: which checkpoint of a run; None: the newest.

    Raises:
        MaxlmError: no such model, scheme or text; a model that is quantized already; a
            target that has files; inputs that are NaN or infinite.
    """
    target = Path(target)
    check_new_folder(target)
    scheme = parse_scheme(scheme_name)
    check_format(scheme)
    _check_calibration(scheme, calibration)
    loaded = load_model(source, step=step)
    if loaded.config.quantization is not None:
        message = f"it is quantized already ({loaded.config.quantization.format})"
        fix = "quantize the model that it was made of"
        raise MaxlmError(message, where=str(source), fix=fix)
    if loaded.config.adapter is not None:
        message = "its adapter cannot be merged"
        fix = "quantize its base, and tune that"
        raise MaxlmError(message, where=str(source), fix=fix)

    specs = build_stored_specs(loaded.config)
    chosen = choose_formats(specs, scheme, targets)
    train = loaded.config.train.model_copy(
        update={"start_from": None, "trainable": None, "ema_decay": None}
    )
    config = loaded.config.model_copy(
        update={
            "name": target.name,
            "folder": str(target.parent),
            "quantization": chosen.config,
            "train": train,
        }
    )
    files: list[LayerFile] = []
    work_folder = target.with_name(f"{target.name}.{CALIBRATED}")
    if scheme.is_calibrated:
        assert calibration is not None
        files = _calibrate(
            loaded, config, scheme, calibration, work_folder, source, progress
        )
    num_params, num_bytes, matrix_bits = _write_run(
        loaded, config, files, target, progress
    )
    shutil.rmtree(work_folder, ignore_errors=True)
    return QuantizedRun(target, num_params, num_bytes, matrix_bits, chosen.notes)


def _calibrate(
    loaded: LoadedRun,
    config: RunConfig,
    scheme: Scheme,
    calibration: CalibrationSettings,
    work_folder: Path,
    source: str | Path,
    progress: Progress,
) -> "list[LayerFile]":
    """Quantizes layer after layer, each into a file; returns these, in order."""
    model = loaded.model
    if not isinstance(model, Decoder):
        message = f"{scheme.name} is calibrated, which is implemented for decoders"
        fix = "use a scheme without a text, such as int8"
        raise MaxlmError(message, where="model.architecture", fix=fix)
    rows = read_calibration_rows(
        calibration, loaded.tokenizer, loaded.config.model.max_seq_len
    )
    description = {
        "source": str(Path(source).resolve()),
        "step": loaded.step,
        "scheme": scheme.name,
        "quantization": config.model_dump(mode="json")["quantization"],
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
    }
    _open_work_folder(work_folder, description)
    forms = list_matrix_forms(build_stored_specs(config))
    files: list[LayerFile] = []
    stage = "quantizing layers"
    with jax.set_mesh(loaded.mesh):
        walk = LayerWalk(
            model, loaded.params, loaded.mesh, rows, calibration.batch_rows
        )
        quantizer = LayerQuantizer(walk, scheme, forms)
        total_bytes = walk.count_bytes()
        for layer in walk.layers:
            path = work_folder / f"layer-{layer.number:04}.zip"
            file = LayerFile(path, layer.stack_name, layer.place.index)
            # As if layers were alike, in bytes as other stages are.
            done_bytes = total_bytes * layer.number // len(walk.layers)
            progress(stage, done_bytes, total_bytes)
            if path.exists():
                params = file.read_dense(walk.take_params(layer), forms)
            else:
                rounded = quantizer.quantize(layer)
                file.write(rounded.arrays)
                params = rounded.params
            if layer.number + 1 < len(walk.layers):
                walk.advance(layer, params)
            files.append(file)
    progress(stage, total_bytes, total_bytes)
    return files


@dataclass(frozen=True)
class LayerFile:
    """What is stored of a layer that is quantized: its arrays by their names in it."""

    path: Path
    stack_name: str
    index: int
    """Of the layer in its stack."""

    def write(self, arrays: Mapping[str, jax.Array]) -> None:
        """Writes the arrays' bytes; the file appears when it is complete."""
        with (
            convert_write_errors(self.path),
            replace_file(self.path) as part,
            zipfile.ZipFile(part, "w") as archive,
        ):
            for name, array in arrays.items():
                archive.writestr(name, np.asarray(array).tobytes())

    def read(self) -> dict[str, np.ndarray]:
        """Returns the arrays' bytes, uint8."""
        with zipfile.ZipFile(self.path) as archive:
            return {
                name: np.frombuffer(archive.read(name), np.uint8)
                for name in archive.namelist()
            }

    def read_dense(self, params: Params, forms: Mapping[str, MatrixForm]) -> Params:
        """Returns a layer's parameters with what its codes stand for, in place of
        ``params``."""
        contents = self.read()

        def restore(path: jax.tree_util.KeyPath, value: jax.Array) -> jax.Array:
            name = join_path(path)
            form = forms.get(f"{self.stack_name}.{name}")
            if form is None:
                array = contents[name].view(value.dtype).reshape(value.shape)
                return jnp.asarray(array)
            arrays = {
                plane: jnp.asarray(_shape_plane(contents[f"{name}.{plane}"], spec))
                for plane, spec in form.declare_planes().items()
            }
            return QuantizedParam(arrays, form).merge()

        return jax.tree_util.tree_map_with_path(restore, params)


def _shape_plane(contents: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Returns a layer's array of its bytes; ``spec``: that of all layers."""
    shape = spec.shape[spec.num_layer_axes :]
    return contents.view(jnp.dtype(spec.dtype)).reshape(shape)


def _open_work_folder(folder: Path, description: Mapping[str, object]) -> None:
    """Makes the folder of finished layers, or checks that what is there was made with
    the same settings."""
    path = folder / "settings.json"
    text = json.dumps(description, indent=2, sort_keys=True)
    with convert_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text)
    if path.read_text() != text:
        message = "layers of another model, scheme or text are here"
        fix = "remove the folder, or repeat the command that made it"
        raise MaxlmError(message, where=str(folder), fix=fix)


def _write_run(
    loaded: LoadedRun,
    config: RunConfig,
    files: Sequence[LayerFile],
    target: Path,
    progress: Progress,
) -> tuple[int, int, float]:
    """Writes the run; returns its numbers, its bytes, and bits a number of quantized
    matrices."""
    stored_specs = build_stored_specs(config)
    forms = list_matrix_forms(stored_specs)
    dense = flatten_names(loaded.params)
    num_params = sum(array.size for array in dense.values())
    calibrated_stacks = {file.stack_name for file in files}
    with make_new_folder(target) as folder:
        writer = RunCheckpointWriter(folder / "checkpoints")
        for name, spec in flatten_names(stored_specs).items():
            if _is_of_stack(name, calibrated_stacks):
                writer.declare(name, spec.shape, spec.num_layer_axes, spec.dtype)
        for file in files:
            contents = file.read()
            for name, spec in flatten_names(stored_specs).items():
                layer_name = name.removeprefix(f"{file.stack_name}.")
                if layer_name in contents and layer_name != name:
                    array = _shape_plane(contents[layer_name], spec)
                    lead = np.unravel_index(
                        file.index, spec.shape[: spec.num_layer_axes]
                    )
                    writer.write(name, tuple(map(int, lead)), array)
        quantizing = QuantizingWriter(writer, forms)
        done = 0
        for name, spec in flatten_names(
            build_stored_specs(_make_dense(config))
        ).items():
            array = dense[name]
            if not _is_of_stack(name, calibrated_stacks):
                num_lead = spec.num_layer_axes
                quantizing.declare(name, array.shape, num_lead)
                for index in np.ndindex(*array.shape[:num_lead]):
                    values = np.asarray(array[index], np.float32)
                    quantizing.write(name, index, values)
            done += array.size
            progress("writing", 4 * done, 4 * num_params)
        writer.commit(
            {
                "config": config.model_dump(mode="json"),
                "tokenizer": loaded.tokenizer.fingerprint,
            }
        )
        loaded.tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config))
    num_bytes = sum(spec.nbytes for spec in flatten_names(stored_specs).values())
    matrix_bytes = 0
    matrix_size = 0
    for form in forms.values():
        specs = form.declare_planes().values()
        matrix_bytes += sum(spec.nbytes for spec in specs)
        matrix_size += form.dense.size
    bits = 8 * matrix_bytes / matrix_size if matrix_size else 32.0
    return num_params, num_bytes, bits


def _is_of_stack(name: str, stacks: set[str]) -> bool:
    return any(name.startswith(f"{stack}.") for stack in stacks)


def _check_calibration(scheme: Scheme, calibration: CalibrationSettings | None) -> None:
    """Checks that a text is given where one is read."""
    if scheme.is_calibrated and calibration is None:
        message = f"{scheme.name} is calibrated on a text"
        fix = "name a file or folder of it: --calibrate DATA"
        raise MaxlmError(message, where="--calibrate", fix=fix)
    if calibration is not None and not scheme.is_calibrated:
        message = f"{scheme.name} reads no text"
        fix = f"leave it out, or use gptq-{scheme.format.name}"
        raise MaxlmError(message, where="--calibrate", fix=fix)


def _make_dense(config: RunConfig) -> RunConfig:
    """Returns the config of the model that is quantized."""
    return config.model_copy(update={"quantization": None, "adapter": None})
