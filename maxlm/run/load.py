"""Models to use: of runs, and published ones.

A run is used with the moving average of its parameters where it has one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from numpy.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.huggingface.gguf.library import SUFFIX
from maxlm.huggingface.model_files import is_gguf_path, is_model_path
from maxlm.huggingface.peft.settings import CONFIG as PEFT_CONFIG
from maxlm.models.adapters import merge_adapter
from maxlm.models.architectures import Model
from maxlm.models.params import (
    PackedParam,
    Params,
    StoredParam,
    bind_specs,
    flatten_names,
    get_base,
    is_leaf,
    is_packed,
    join_path,
)
from maxlm.quantization.config import QuantizationConfig
from maxlm.run.config import RunConfig
from maxlm.run.convert import (
    AdaptedHuggingFaceModel,
    HuggingFaceModel,
    open_adapted_model,
    open_huggingface_model,
)
from maxlm.run.setup import RunSetup, set_up_run
from maxlm.run.warm_start import open_checkpoints, pack_array
from maxlm.runtime.json_files import read_json_object
from maxlm.sharding import MeshConfig, count_min_devices


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it."""

    config: RunConfig
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int


def load_run(
    folder: str | Path,
    *,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    merge: bool = True,
) -> LoadedRun:
    """Loads the parameters of a run's checkpoint (default: the newest), whatever mesh
    wrote them, on ``mesh`` (default: one device). ``merge``: adapters that can be are
    merged into the base."""
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        message = "no run here (no config.yaml)"
        raise MaxlmError(message, where=str(folder), fix="name a folder like runs/demo")
    config = load_config(RunConfig, folder / "config.yaml").value
    setup = _set_up_to_use(config, mesh)
    with open_checkpoints(folder, step) as (tier, _, name):
        step = tier.latest() if step is None else step
        params = tier.restore(step, setup.abstract_state.params, name)
    loaded = LoadedRun(
        setup.config,
        setup.mesh,
        setup.model,
        params,
        load_tokenizer(folder / "tokenizer"),
        step or 0,
    )
    return _merge_loaded_adapter(loaded, setup.specs) if merge else loaded


def _merge_loaded_adapter(loaded: LoadedRun, specs: Params) -> LoadedRun:
    """A model with its adapter merged, where it has one that can be."""
    config = loaded.config
    if config.adapter is None:
        return loaded
    with jax.set_mesh(loaded.mesh):
        specs, params = merge_adapter(specs, loaded.params)
    # Maps that cannot be merged stay beside the base, and the adapter with them.
    flat_specs = flatten_names(specs, is_leaf)
    stays = any(get_base(spec) is not spec for spec in flat_specs.values())
    if not stays:
        config = config.model_copy(update={"adapter": None})
    model = bind_specs(loaded.model, specs)
    return replace(loaded, config=config, model=model, params=params)


def load_model(
    folder: str | Path,
    *,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    quantization: QuantizationConfig | None = None,
) -> LoadedRun:
    """Loads a model to use: a run's, as :func:`load_run` does; a Hugging Face folder's
    (config.json, safetensors, tokenizer) or a GGUF file's; or that of an adapter of
    PEFT's, merged, where its base is here too. Of all but runs nothing is written.
    ``quantization``: formats that matrices are rounded to on the way, a parameter after
    the other. Raises MaxlmError: a folder that is none of these, a tokenizer that is
    missing, a damaged file, a model that is quantized already."""
    loaded = _load_dense_or_stored(folder, step, mesh)
    if quantization is None:
        return loaded
    return _quantize_loaded(loaded, quantization)


def _quantize_loaded(loaded: LoadedRun, quantization: QuantizationConfig) -> LoadedRun:
    """Returns a model with matrices rounded to number formats; the dense arrays are
    gone then."""
    config = loaded.config
    if config.quantization is not None:
        message = f"the model is quantized already ({config.quantization.format})"
        raise MaxlmError(message, where="quantization", fix="leave it out")
    config = config.model_copy(update={"quantization": quantization})
    setup = set_up_run(config, [*loaded.mesh.devices.flat], for_training=False)
    dense = flatten_names(loaded.params)
    packed = flatten_names(setup.specs, is_packed)
    values: list[StoredParam] = []
    for name, spec in packed.items():
        array = dense.pop(name)
        if isinstance(spec, PackedParam):
            array = pack_array(setup, spec, array)
        values.append(array)
    structure = jax.tree.structure(setup.specs, is_leaf=is_packed)
    params = jax.tree.unflatten(structure, values)
    return replace(loaded, config=config, model=setup.model, params=params)


def _load_dense_or_stored(
    folder: str | Path, step: int | None, mesh: MeshConfig | None
) -> LoadedRun:
    folder = Path(folder)
    if (folder / "config.yaml").exists():
        return load_run(folder, step=step, mesh=mesh)
    is_adapter = (folder / PEFT_CONFIG).exists()
    if not (is_adapter or is_model_path(folder)):
        message = "no such folder"
        if folder.is_dir():
            message = "neither config.yaml nor config.json here"
        fix = "name a run's folder, such as runs/demo, or a Hugging Face checkpoint's"
        raise MaxlmError(message, where=str(folder), fix=fix)
    if step is not None:
        message = f"--step {step} names a run's checkpoint, and this is a published one"
        raise MaxlmError(message, where=str(folder), fix="leave it out")
    name = folder.resolve().name.removesuffix(SUFFIX).lstrip(".- ") or "model"
    base_folder = _find_adapter_base(folder) if is_adapter else folder
    opened: HuggingFaceModel | AdaptedHuggingFaceModel
    opened = open_huggingface_model(base_folder, Path("runs", name))
    if is_adapter:
        opened = open_adapted_model(opened, folder)
    if opened.tokenizer is None:
        message = "no tokenizer.json or tokenizer.model here"
        fix = "copy the checkpoint's here"
        if is_gguf_path(folder):
            message = "this GGUF file has no tokenizer"
            fix = "use one that has"
        raise MaxlmError(message, where=str(folder), fix=fix)
    setup = _set_up_to_use(opened.config, mesh)
    writer = _MemoryWriter()
    opened.import_tensors(writer)

    # Popped: the host holds each array only until the devices have it.
    def move_to_devices(path: jax.tree_util.KeyPath, sharding: Sharding) -> jax.Array:
        return jax.device_put(writer.arrays.pop(join_path(path)), sharding)

    params = jax.tree_util.tree_map_with_path(move_to_devices, setup.shardings.params)
    loaded = LoadedRun(
        setup.config, setup.mesh, setup.model, params, opened.tokenizer, 0
    )
    return _merge_loaded_adapter(loaded, setup.specs)


def _find_adapter_base(folder: Path) -> Path:
    """The folder of the model that an adapter of PEFT's says that it is for."""
    peft_config = read_json_object(folder / PEFT_CONFIG, "save the adapter again")
    base_name = peft_config.get("base_model_name_or_path")
    if isinstance(base_name, str) and base_name:
        base = Path(base_name).expanduser()
        if is_model_path(base):
            return base
    message = (
        f"its base, base_model_name_or_path={base_name!r}, is no Hugging Face folder "
        "here"
    )
    fix = f"make a run of both: maxlm convert {folder} runs/NAME --base FOLDER"
    raise MaxlmError(message, where=str(folder / PEFT_CONFIG), fix=fix)


class _MemoryWriter:
    def __init__(self):
        self.arrays: dict[str, np.ndarray] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.arrays[name] = np.empty(shape, dtype)

    def write(self, name: str, lead_index: tuple[int, ...], values: np.ndarray) -> None:
        self.arrays[name][lead_index] = values


def _set_up_to_use(config: RunConfig, mesh: MeshConfig | None) -> RunSetup:
    """Places a model on the first devices that ``mesh`` needs (default: one; with -1:
    all)."""
    config = config.model_copy(update={"mesh": mesh or MeshConfig()})
    devices = jax.devices() if mesh else jax.local_devices()[:1]
    if mesh and -1 not in mesh.model_dump().values():
        devices = devices[: count_min_devices(mesh)]
    return set_up_run(config, devices, for_training=False)
