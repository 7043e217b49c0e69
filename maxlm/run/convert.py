"""Published checkpoints to runs and back; adapters of either kind."""

import copy
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from pydantic import ValidationError

from maxlm.checkpoint.reading import read_metadata
from maxlm.config import MaxlmError, SettingOrigin
from maxlm.config.keys import join_key
from maxlm.config.layers import SettingsTree
from maxlm.config.load import load_config, validate_config
from maxlm.config.show import compare_configs, to_yaml
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.load import export_tokenizer, import_tokenizer, load_tokenizer
from maxlm.huggingface.checkpoint import (
    CheckpointReader,
    MergedCheckpointReader,
    ParamWriter,
    RunCheckpointReader,
    RunCheckpointWriter,
)
from maxlm.huggingface.convert import export_tensors, import_tensors
from maxlm.huggingface.families import FAMILIES, find_family
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import TensorEntry, drop_copies
from maxlm.huggingface.files import SHARD_BYTES, TensorDtypes
from maxlm.huggingface.gguf.file_types import parse_file_type
from maxlm.huggingface.gguf.writing import write_gguf_model
from maxlm.huggingface.model_files import (
    ModelFiles,
    is_gguf_path,
    is_model_path,
    open_model_files,
)
from maxlm.huggingface.packed_params import (
    DequantizedReader,
    QuantizingWriter,
    list_matrix_forms,
)
from maxlm.huggingface.peft.importing import AdaptedParamWriter, list_trained_names
from maxlm.huggingface.peft.reading import PeftAdapter, read_peft_adapter
from maxlm.huggingface.peft.settings import CONFIG as PEFT_CONFIG
from maxlm.huggingface.peft.writing import TrainedAdapter, write_peft_adapter
from maxlm.models.adapters import count_virtual_tokens
from maxlm.models.architectures import ModelConfig
from maxlm.models.params import Params, ParamSpec, flatten_names, param_specs
from maxlm.models.transforms import build_transformed_model
from maxlm.optim.state import list_added_names, select_trainable
from maxlm.quantization.config import QuantizationConfig
from maxlm.run.config import RunConfig
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.progress import Progress, ignore_progress
from maxlm.sharding import AxisRules
from maxlm.tasks import list_task_kinds
from maxlm.tasks.sft import SftTask

# Settings of a model that say how it is trained or computed, not what it computes; a
# published config has no word for them, and need not.
_TRAINING_SETTINGS = (
    "remat",
    "init_std",
    "mtp.loss_weight",
    "moe.balance_loss",
    "moe.z_loss",
    "moe.dispatch",
    "moe.capacity_factor",
)
_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# By the names that config.json has for number formats.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class ConversionResult:
    """A conversion that is done."""

    family: str
    folder: Path
    num_params: int
    dtype: str
    """The format of most tensors, as safetensors names it ("BF16")."""
    notes: list[str]
    """Notes for the user: settings with no counterpart, tensors left out."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face folder or a GGUF file, understood; its tensors are not read
    yet."""

    files: ModelFiles
    family: ModelFamily
    config: RunConfig
    """A run that goes on from these weights."""
    specs: Mapping[str, ParamSpec]
    """Declarations of all parameters, by canonical name."""
    entries: list[TensorEntry]
    tokenizer: Tokenizer | None
    notes: list[str]
    """Notes for the user; the import adds some."""

    def import_tensors(
        self, writer: ParamWriter, progress: Progress = ignore_progress
    ) -> TensorDtypes:
        """Writes all parameters as fp32, one in memory at a time; returns the formats
        they had."""
        shapes = {name: spec.shape for name, spec in self.specs.items()}
        dtypes = import_tensors(
            self.files.tensors,
            self.entries,
            shapes,
            writer,
            progress,
            where=str(self.files.path),
            ignored=self.family.list_ignored_tensors(self.config.model),
            warn=self.notes.append,
        )
        used: set[str] = set()
        for entry in self.entries:
            used |= {entry.theirs, *entry.aliases, *entry.copies}
        left_out = sorted(self.files.tensors.keys() - used)
        self.notes.extend(self.family.describe_left_out(self.config.model, left_out))
        return dtypes


def open_huggingface_model(source: Path, target: Path) -> HuggingFaceModel:
    """Reads the config, tokenizer and tensors' names of a Hugging Face folder or a GGUF
    file, as a run ``target``. Raises MaxlmError: files that are missing or damaged, a
    model that maxlm does not implement."""
    files = open_model_files(source)
    where = files.config_path
    family = find_family(files.values, str(where))
    settings, family_notes = family.read_config(files.values, str(where), files.tensors)
    config = _make_run_config(settings, target, where)
    notes = [*files.notes, *family_notes]
    with files.open_tokenizer_folder() as folder:
        tokenizer = _import_tokenizer(folder, config, notes)
    if tokenizer is not None:
        config = _add_tokenizer(config, target, tokenizer, notes)
    entries = family.list_entries(config.model, files.tensors)
    specs = flatten_names(_build_specs(config))
    return HuggingFaceModel(files, family, config, specs, entries, tokenizer, notes)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: bool = False,
    base: str | Path | None = None,
    quantization: str | None = None,
    progress: Progress = ignore_progress,
) -> ConversionResult:
    """Converts a Hugging Face folder or a GGUF file to a run, which takes no options, a
    PEFT folder and its base to a run, or a run to a Hugging Face or PEFT folder or to a
    GGUF file, whichever ``source`` and ``target`` are.

    Args:
        family: under whose names; None: that it came from, else the first that can say
            what the model computes.
        dtype: a key of ``DTYPES``, rounded to if need be; None: as the tensors came,
            else float32.
        step: which checkpoint; None: the newest.
        adapter: write a run's adapter alone, for PEFT; otherwise the merged model.
        base: the Hugging Face folder of the model that a PEFT adapter is for.
        quantization: the number formats of a GGUF file, by llama.cpp's name of its
            type ("q4_k_m"); None: f32.
    """
    source = Path(source)
    target = Path(target)
    writes_gguf = is_gguf_path(target)
    if quantization is not None and not writes_gguf:
        message = f"--quantization {quantization} says how a GGUF file is written"
        fix = "name a target that ends in .gguf, or leave it out"
        raise MaxlmError(message, where=str(target), fix=fix)
    file_type = parse_file_type(quantization or "f32")
    if writes_gguf:
        check_new_file(target)
    else:
        check_new_folder(target)
    is_run = (source / "config.yaml").exists()
    is_published = is_model_path(source)
    if not (is_run or is_published or (source / PEFT_CONFIG).exists()):
        message = "no such folder"
        if source.exists():
            message = "neither config.json nor config.yaml here"
        fix = "name a Hugging Face checkpoint's folder, or a run's such as runs/demo"
        raise MaxlmError(message, where=str(source), fix=fix)
    if writes_gguf and not is_run:
        message = "a GGUF file is written of a run, and this is a published checkpoint"
        fix = f"make it a run first: maxlm convert {source} runs/NAME"
        raise MaxlmError(message, where=str(source), fix=fix)

    # Options that say nothing of this kind of conversion.
    shard_gigabytes = None if shard_bytes == SHARD_BYTES else shard_bytes / 1e9
    unused: dict[str, str | float | None] = {}
    if adapter or writes_gguf or not is_run:
        unused |= {"dtype": dtype, "shard-gb": shard_gigabytes}
    if writes_gguf and adapter:
        fix = "leave out --adapter: the file gets the merged model"
        raise MaxlmError("a GGUF file of an adapter alone", where=str(target), fix=fix)
    if not is_run:
        unused |= {"family": family, "step": step}
    for name, value in unused.items():
        if value is None:
            continue
        if writes_gguf:
            reason = (
                "Hugging Face folders are written; of GGUF files --quantization does"
            )
        elif is_run:
            reason = "merged models are written, adapters in fp32"
        else:
            reason = "a run is written, and this is a published checkpoint"
        message = f"--{name} {value} says how {reason}"
        raise MaxlmError(message, where=str(source), fix="leave it out")

    if writes_gguf:
        return _export_gguf(source, target, family, step, file_type, progress)
    if is_run:
        return _export_run(
            source, target, family, dtype, step, shard_bytes, adapter, progress
        )
    if is_published:
        return import_run(source, target, progress)
    if base is None:
        fix = "name its base's folder: --base FOLDER"
        raise MaxlmError("an adapter without its base", where=str(source), fix=fix)
    return import_run(Path(base), target, progress, adapter_folder=source)


def import_run(
    source: Path,
    target: Path,
    progress: Progress,
    adapter_folder: Path | None = None,
    quantization: QuantizationConfig | None = None,
) -> ConversionResult:
    """Writes a Hugging Face checkpoint, with a PEFT adapter or without, as a run of
    step 0: config, checkpoint, tokenizer.

    Tensors are read, cast to fp32 or rounded to the formats of ``quantization``, and
    written one at a time; nothing is left behind by a failure.
    """
    base = open_huggingface_model(source, target)
    opened: HuggingFaceModel | AdaptedHuggingFaceModel = base
    num_params = sum(spec.size for spec in base.specs.values())
    if adapter_folder is not None:
        opened = open_adapted_model(base, adapter_folder)
        num_params += sum(array.size for array in opened.peft.arrays.values())
    family = base.family
    config = opened.config.model_copy(update={"quantization": quantization})
    tokenizer = opened.tokenizer
    forms = list_matrix_forms(build_stored_specs(config))
    with make_new_folder(target) as folder:
        writer = RunCheckpointWriter(folder / "checkpoints")
        dtypes = opened.import_tensors(QuantizingWriter(writer, forms), progress)
        # Names of tensors vary among checkpoints of a family; an export writes, and
        # looks formats up by, the usual ones.
        stored_names = [entry.theirs for entry in base.entries]
        usual_names = [entry.theirs for entry in family.list_entries(config.model)]
        dtypes = dtypes.with_names(dict(zip(stored_names, usual_names, strict=True)))
        token_ids = {
            key: base.files.values[key]
            for key in _TOKEN_ID_KEYS
            if key in base.files.values
        }
        published: dict[str, Any] = {
            "family": family.name,
            "dtypes": dtypes.model_dump(),
            "tokens": token_ids,
        }
        copies = {name for entry in base.entries for name in entry.copies}
        missing_copies = copies - base.files.tensors.keys()
        if missing_copies:
            published["missing_copies"] = sorted(missing_copies)
        writer.commit(
            {
                "config": config.model_dump(mode="json"),
                "tokenizer": tokenizer.fingerprint if tokenizer else None,
                "published": published,
            }
        )
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config))
    return ConversionResult(family.name, target, num_params, dtypes.default, base.notes)


@dataclass(frozen=True)
class AdaptedHuggingFaceModel:
    """A Hugging Face folder and an adapter of PEFT's for it, understood."""

    base: HuggingFaceModel
    peft: PeftAdapter
    specs: Params
    """Declarations of the base's parameters."""
    config: RunConfig
    """A run that goes on from both, and trains what PEFT did."""
    tokenizer: Tokenizer | None
    """The adapter's own, or its base's."""

    def import_tensors(
        self, writer: ParamWriter, progress: Progress = ignore_progress
    ) -> TensorDtypes:
        """Writes all parameters as fp32, the adapter's too; returns the formats that
        the base's had."""
        adapted = AdaptedParamWriter(writer, self.peft, self.specs)
        dtypes = self.base.import_tensors(adapted, progress)
        adapted.finish()
        return dtypes


def open_adapted_model(base: HuggingFaceModel, folder: Path) -> AdaptedHuggingFaceModel:
    """Reads an adapter's folder for a base; raises MaxlmError as
    :func:`~maxlm.huggingface.peft.reading.read_peft_adapter` does."""
    config = base.config
    specs = _build_specs(config)
    entries = base.family.list_entries(config.model)
    peft = read_peft_adapter(folder, config.model, specs, entries)
    task = SftTask() if count_virtual_tokens(peft.adapter) else config.task
    trained = list_trained_names(peft, specs)
    train = config.train
    if trained:
        train = train.model_copy(update={"trainable": trained})
    changes = {"adapter": peft.adapter, "task": task, "train": train}
    config = config.model_copy(update=changes)
    tokenizer = import_adapter_tokenizer(
        folder, base.tokenizer, config.model.vocab_size
    )
    return AdaptedHuggingFaceModel(base, peft, specs, config, tokenizer)


def import_adapter_tokenizer(
    folder: Path, base: Tokenizer | None, num_embedding_rows: int
) -> Tokenizer | None:
    """Imports the tokenizer or the chat template that an adapter was trained with,
    where its folder has one, else returns the base's. Generation stops where the base's
    does too. Raises MaxlmError: the tokenizer has ids that the base's table has no rows
    for."""
    template = folder / "chat_template.jinja"
    names = ("tokenizer.json", "tokenizer.model")
    has_model = any((folder / name).exists() for name in names)
    says_roles = (folder / "tokenizer_config.json").exists()
    if base is not None and has_model and not says_roles:
        # No file says which tokens have roles: they are the base's where the vocabulary
        # is.
        path = folder / base.codec.file_name
        is_of_base = path.exists() and path.read_bytes() == base.codec.data
        has_model = not is_of_base
    if not has_model:
        if base is None or not template.exists():
            return base
        changed = copy.copy(base)
        changed.extra_files = base.extra_files | {template.name: template.read_bytes()}
        return changed
    tokenizer = import_tokenizer(folder, num_embedding_rows=num_embedding_rows)
    if tokenizer.vocab_size > num_embedding_rows:
        message = (
            f"the adapter's tokenizer has {tokenizer.vocab_size} ids, its base's table "
            f"{num_embedding_rows} rows"
        )
        fix = "resize the base as it was in training (resize_token_embeddings), and save it"
        raise MaxlmError(message, where=str(folder), fix=fix)
    if base is not None:
        # In the order of the adapter's, each once.
        stops = (*tokenizer.extra_stop_ids, *base.extra_stop_ids)
        tokenizer.extra_stop_ids = tuple(dict.fromkeys(stops))
    return tokenizer


def _export_run(
    source: Path,
    target: Path,
    family: str | None,
    dtype: str | None,
    step: int | None,
    shard_bytes: int,
    adapter: bool,
    progress: Progress,
) -> ConversionResult:
    """Writes a run's checkpoint as a folder for transformers, or its adapter alone for
    PEFT."""
    config, reader = open_run_checkpoint(source, step)
    model_family, published = find_run_family(config, reader, family)
    specs = _build_specs(config)
    entries = model_family.list_entries(config.model)
    missing_copies = published.get("missing_copies") or ()
    entries = drop_copies(entries, missing_copies)
    _check_stored_shapes(reader, config)
    tokenizer_folder = source / "tokenizer"
    tokenizer = None
    if tokenizer_folder.exists():
        tokenizer = load_tokenizer(tokenizer_folder)

    if adapter:
        if config.adapter is None:
            message = "this run has no adapter"
            raise MaxlmError(message, where=str(source), fix="leave out --adapter")
        trained = TrainedAdapter(
            config.adapter,
            config.model,
            specs,
            reader,
            find_trained_base(config, reader),
            _open_start(config),
        )
        with make_new_folder(target) as folder:
            count, notes = write_peft_adapter(folder, trained, entries)
            if tokenizer is not None:
                export_tokenizer(tokenizer, folder)
        return ConversionResult(model_family.name, target, count, "F32", notes)

    checkpoint = _read_dense(reader, config)
    # config.json: ids of special tokens are those of the model that the run came from,
    # else the tokenizer's.
    values = model_family.write_config(config.model)
    if tokenizer and not published.get("tokens"):
        stops = [*tokenizer.stop_ids]
        values["bos_token_id"] = tokenizer.bos_id
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        values["pad_token_id"] = tokenizer.pad_id
    values |= published.get("tokens") or {}
    dtypes = TensorDtypes.model_validate(published.get("dtypes") or {"default": "F32"})
    if dtype is not None:
        if dtype not in DTYPES:
            raise MaxlmError(
                f"no number format {dtype!r}", fix=f"use one of {', '.join(DTYPES)}"
            )
        dtypes = TensorDtypes(default=DTYPES[dtype])
    dtype_names = {stored: name for name, stored in DTYPES.items()}
    values["dtype"] = dtype_names.get(dtypes.default, "float32")
    # Rounding is an error unless a format was named, or the values were rounded before.
    may_round = dtype is not None or config.quantization is not None
    with make_new_folder(target) as folder:
        export_tensors(
            checkpoint,
            entries,
            dtypes,
            folder,
            shard_bytes,
            progress=progress,
            lossy=may_round,
        )
        if tokenizer is not None:
            export_tokenizer(tokenizer, folder)
        (folder / "config.json").write_text(
            json.dumps(values, indent=2, sort_keys=True) + "\n"
        )
    num_params = sum(spec.size for spec in flatten_names(specs).values())
    return ConversionResult(model_family.name, target, num_params, dtypes.default, [])


def _read_dense(reader: RunCheckpointReader, config: RunConfig) -> CheckpointReader:
    """Returns what reads the parameters of a checkpoint as a model without quantization
    and adapter has them."""
    checkpoint: CheckpointReader = reader
    forms = list_matrix_forms(build_stored_specs(config))
    if forms:
        checkpoint = DequantizedReader(checkpoint, forms)
    if config.adapter is not None:
        specs = _build_specs(config)
        checkpoint = MergedCheckpointReader(checkpoint, config.adapter, specs)
    return checkpoint


def _export_gguf(
    source: Path,
    target: Path,
    family: str | None,
    step: int | None,
    file_type: str,
    progress: Progress,
) -> ConversionResult:
    """Writes a run's checkpoint as a GGUF file, with its adapter merged; nothing is
    left behind by a failure."""
    config, reader = open_run_checkpoint(source, step)
    model_family, _ = find_run_family(config, reader, family)
    specs = _build_specs(config)
    _check_stored_shapes(reader, config)
    tokenizer_folder = source / "tokenizer"
    tokenizer = None
    if tokenizer_folder.exists():
        tokenizer = load_tokenizer(tokenizer_folder)
    checkpoint = _read_dense(reader, config)
    with make_new_file(target) as path:
        notes = write_gguf_model(
            path,
            checkpoint,
            model_family.list_entries(config.model),
            model_family.write_config(config.model),
            tokenizer,
            file_type,
            name=config.name,
            progress=progress,
        )
    num_params = sum(spec.size for spec in flatten_names(specs).values())
    return ConversionResult(model_family.name, target, num_params, file_type, notes)


def _check_stored_shapes(reader: RunCheckpointReader, config: RunConfig) -> None:
    """Checks that a checkpoint's arrays have the shapes of the run's model: one whose
    zarr.json is another's would be read as what it is not."""
    for name, spec in flatten_names(build_stored_specs(config)).items():
        stored = reader.shapes.get(name)
        if stored is not None and stored != spec.shape:
            message = (
                f"{name} is {list(stored)} there, {list(spec.shape)} in the run's model"
            )
            fix = "use another checkpoint: this one is damaged, or of another run"
            raise MaxlmError(message, where=str(reader.folder), fix=fix)


def find_trained_base(config: RunConfig, reader: RunCheckpointReader) -> frozenset[str]:
    """Finds the names of the parameters that were trained and are not the adapter's, by
    this run or by those that it started from with the same adapter."""
    assert config.adapter is not None
    adapted = config.adapter.adapt(_build_specs(config))
    names = [*flatten_names(adapted)]
    trained = {*flatten_names(select_trainable(adapted, config.train.trainable))}
    for pattern in read_metadata(reader.folder).get("trained_before", ()):
        trained |= {*fnmatch.filter(names, pattern)}
    return frozenset(trained - list_added_names(adapted))


def _open_start(config: RunConfig) -> RunCheckpointReader | None:
    """The checkpoint of the run without an adapter that an adapter was begun on; None:
    there is none, or not any more."""
    while config.adapter is not None:
        start = config.train.start_from
        if start is None or not Path(start, "config.yaml").exists():
            return None
        config, reader = open_run_checkpoint(Path(start), None)
        if config.adapter is None:
            return reader
    return None


def open_run_checkpoint(
    source: Path, step: int | None
) -> tuple[RunConfig, RunCheckpointReader]:
    """A run's config, and its parameters to use."""
    config = load_config(RunConfig, source / "config.yaml").value
    name = "params" if config.train.ema_decay is None else "ema"
    return config, RunCheckpointReader(source / "checkpoints", step, name=name)


def find_run_family(
    config: RunConfig, reader: RunCheckpointReader, name: str | None = None
) -> tuple[ModelFamily, Mapping[str, Any]]:
    """The family of a name, else that which a run's parameters came from, else the
    first that can say what its model computes; and what the run knows of the model that
    they came from."""
    published = read_metadata(reader.folder).get("published") or {}
    model = config.model
    name = name or published.get("family")
    if name is None:
        for _, family in FAMILIES.items():
            if find_inexpressible_setting(model, family) is None:
                return family, published
        message = "no published family computes what this model does"
        fix = "--family NAME says what one of them has no word for"
        if config.adapter is not None:
            fix = "--merge writes it as a run with its adapter merged"
        raise MaxlmError(message, where="config.yaml: model", fix=fix)
    family = FAMILIES.find(name)
    if family is None:
        raise MaxlmError(f"no family {name!r}", fix=FAMILIES.suggest(name))
    fault = find_inexpressible_setting(model, family)
    if fault is not None:
        message = f"{family.hf_architecture} has no word for {fault}"
        fix = "name another --family, or change the model"
        raise MaxlmError(message, where="config.yaml: model", fix=fix)
    return family, published


def _build_specs(config: RunConfig) -> Params:
    """Declarations of a run's model, without its adapter."""
    return param_specs(config.model.build(rules=AxisRules(), dtype=jnp.float32))


def build_stored_specs(config: RunConfig) -> Params:
    """Returns declarations of what a run stores: quantized, and with its adapter."""
    model = build_transformed_model(
        config.model, config.transforms, rules=AxisRules(), dtype=jnp.float32
    )
    return param_specs(model)


def _make_run_config(
    settings: Mapping[str, Any], target: Path, where: Path
) -> RunConfig:
    """A run that goes on from these weights, on text to be named."""
    # No text is named yet: two thirds of the model's longest sequence, at most 512.
    seq_len = max(min(settings["max_seq_len"] * 2 // 3, 512), 1)
    tree = {
        "name": target.name,
        "folder": str(target.parent),
        "model": dict(settings),
        "task": {"kind": list_task_kinds(settings["architecture"])[0]},
        "data": {"seq_len": seq_len},
    }
    return validate_config(
        RunConfig, SettingsTree(tree, {(): SettingOrigin(str(where))})
    )


def _import_tokenizer(
    source: Path, config: RunConfig, notes: list[str]
) -> Tokenizer | None:
    """The tokenizer beside a model; adds to ``notes`` what is worth telling."""
    if not any(
        (source / name).exists() for name in ("tokenizer.json", "tokenizer.model")
    ):
        notes.append(
            "no tokenizer: there is no tokenizer.json or tokenizer.model beside it"
        )
        if (source / "generation_config.json").exists():
            notes.append("left out: generation_config.json")
        return None
    num_rows = config.model.vocab_size
    tokenizer = import_tokenizer(source, num_embedding_rows=num_rows)
    if tokenizer.vocab_size > num_rows:
        num_ids = import_tokenizer(source).vocab_size
        message = f"the tokenizer has {num_ids} ids, the model's table {num_rows} rows"
        fix = "use the tokenizer that the model was trained with"
        raise MaxlmError(message, where=str(source), fix=fix)
    for token in getattr(tokenizer.codec, "left_out", ()):
        notes.append(
            f"left out of the tokenizer: {token}, which the table has no row for"
        )
    return tokenizer


def _add_tokenizer(
    config: RunConfig, target: Path, tokenizer: Tokenizer, notes: list[str]
) -> RunConfig:
    """A run with its tokenizer and the reserved ids of its task."""
    task = config.task.with_special_tokens(tokenizer.special_tokens)
    values = config.model_dump() | {
        "tokenizer": {"kind": tokenizer.kind, "path": str(target / "tokenizer")},
        "task": task.model_dump(),
    }
    if tokenizer.vocab_size + task.num_ids_to_reserve > config.model.vocab_size:
        names = " and ".join(f"task.{name}" for name in task.reserved_ids)
        notes.append(
            f"to train it, name ids for task.kind={task.kind} in {names}: the "
            "tokenizer has none, and the table no rows to spare"
        )
    return RunConfig.model_validate(values)


def find_inexpressible_setting(model: ModelConfig, family: ModelFamily) -> str | None:
    """Returns a setting that a family's config.json cannot express; None: it can express
    all."""
    if model.architecture != family.architecture:
        return f"model.architecture={model.architecture}"
    missing = family.find_missing_part(model)
    if missing is not None:
        return f"a model without {missing}"
    try:
        # There and back: what differs afterwards was not expressed. That there are
        # modules of mtp, files say by the names of tensors.
        values = family.write_config(model)
        marks = family.list_module_marks(model)
        settings, _ = family.read_config(values, family.name, marks)
        reread_model = type(model).model_validate(settings)
    except MaxlmError as error:
        return error.message
    except ValidationError as error:
        return f"its model.{join_key(error.errors()[0]['loc'])}"
    settings_before = model.model_dump(mode="json")
    settings_after = reread_model.model_dump(mode="json")
    differences = [
        (key, value)
        for key, value, _ in compare_configs(settings_before, settings_after)
        if not key.startswith(_TRAINING_SETTINGS)
    ]
    if not differences:
        return None
    # What the model has says more than what it leaves out: a family without kinds of
    # layers lacks each of their nulls too.
    present = [(key, value) for key, value in differences if value is not None]
    key, value = (present or differences)[0]
    return f"model.{key}={value!r}"


def check_new_folder(target: Path) -> None:
    """Checks that a folder can be written: raises MaxlmError where it has files, or is
    the one that this runs in."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MaxlmError("not an empty folder", where=str(target), fix="name a new one")
    if target.resolve() == Path.cwd():
        message = "the folder that this runs in cannot be replaced"
        raise MaxlmError(message, where=str(target), fix="name another")


def check_new_file(target: Path) -> None:
    """Checks that there is no file yet. Raises MaxlmError."""
    if target.exists():
        raise MaxlmError("this file exists", where=str(target), fix="name a new one")


@contextmanager
def make_new_file(target: Path) -> Iterator[Path]:
    """Yields a path to write a file to, which gets its name when it is complete, or
    not at all."""
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        with convert_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(target) as path:
            yield path
    finally:
        with suppress(OSError):  # the first that is not empty
            for parent in missing_parents:
                parent.rmdir()


@contextmanager
def make_new_folder(target: Path) -> Iterator[Path]:
    """Makes a folder that appears under its name when it is complete, or not at all."""
    part = target.with_name(f".{target.name}.part.{os.getpid()}")
    missing_parents = [parent for parent in part.parents if not parent.exists()]
    try:
        with convert_write_errors(target):
            part.mkdir(parents=True)
            yield part
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty
            for parent in missing_parents:
                parent.rmdir()
