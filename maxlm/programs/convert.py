"""Published checkpoints to runs and back."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from pydantic import BaseModel

from maxlm.config import MaxlmError, differences, load, to_yaml
from maxlm.data.tokenizer import Tokenizer, export_tokenizer, import_tokenizer, load_tokenizer
from maxlm.huggingface.checkpoint import CheckpointReader, CheckpointWriter
from maxlm.huggingface.convert import Progress, export_tensors, import_tensors, silent
from maxlm.huggingface.dtypes import Dtypes
from maxlm.huggingface.files import stored_tensors
from maxlm.huggingface.writer import SHARD_BYTES
from maxlm.models.families import FAMILIES, family_of
from maxlm.models.families.family import Family
from maxlm.models.params import named, param_specs
from maxlm.objectives import ARCHITECTURES
from maxlm.run import RunConfig
from maxlm.sharding import AxisRules

# Settings of a model that say how it is trained or computed, not what it computes.
_ASIDE = (
    "remat",
    "init_std",
    "moe.balance_loss",
    "moe.z_loss",
    "moe.dispatch",
    "moe.capacity_factor",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# By the names that config.json has for number formats.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Converted:
    """What was done."""

    family: str
    folder: Path
    parameters: int
    dtype: str
    notes: list[str]
    """What is worth telling: settings with no counterpart, tensors left out."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Converted:
    """A Hugging Face folder to a run, or a run to a Hugging Face folder: whichever ``source`` is.

    Raises:
        MaxlmError: neither is there, or anything wrong with it.
    """
    source, target = Path(source), Path(target)
    if (source / "config.yaml").exists():
        how: dict[str, Any] = {"family": family, "dtype": dtype, "step": step}
        return to_published(source, target, shard_bytes=shard_bytes, progress=progress, **how)
    if (source / "config.json").exists():
        return to_run(source, target, progress=progress)
    raise MaxlmError(
        "no such folder" if not source.exists() else "neither config.json nor config.yaml here",
        where=str(source),
        fix="name a Hugging Face checkpoint's folder, or a run's such as runs/demo",
    )


def to_run(source: Path, target: Path, *, progress: Progress = silent) -> Converted:
    """A Hugging Face checkpoint as a run of step 0: config, checkpoint, tokenizer.

    Tensors are read, cast to fp32 and written one at a time; nothing is left behind by a failure.

    Raises:
        MaxlmError: a target that is not empty; a family or a setting that maxlm does not know;
            damaged, missing, extra or misshaped tensors; a tokenizer larger than the model.
    """
    _check_free(target)
    values = _read_json(source / "config.json")
    family = family_of(values, str(source / "config.json"))
    tensors = stored_tensors(source)
    settings, notes = family.settings(values, str(source / "config.json"), tensors)
    tokenizer = import_tokenizer(source) if _has_tokenizer(source) else None
    if tokenizer is None:
        notes.append("no tokenizer: there is no tokenizer.json or tokenizer.model beside it")
    config = _run_config(settings, target, tokenizer)
    _check_vocabulary(config, tokenizer, source)
    specs = named(param_specs(config.model.build(rules=AxisRules(), dtype=jnp.float32)))
    entries = family.entries(config.model, tensors)
    with _whole(target) as folder:
        with CheckpointWriter(folder / "checkpoints") as writer:
            dtypes = import_tensors(
                source, entries, specs, writer, progress, ignored=family.ignored
            )
            used = {name for entry in entries for name in (entry.theirs, *entry.aliases)}
            notes += [f"left out: {name}" for name in sorted(tensors.keys() - used)]
            writer.commit(
                {
                    "config": config.model_dump(mode="json"),
                    "tokenizer": tokenizer.fingerprint if tokenizer else None,
                    "published": {
                        "family": family.name,
                        "dtypes": dtypes.model_dump(),
                        "tokens": {key: values[key] for key in _TOKENS if key in values},
                    },
                }
            )
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config))
    parameters = sum(spec.size for spec in specs.values())
    return Converted(family.name, target, parameters, dtypes.default, notes)


def to_published(
    source: Path,
    target: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Converted:
    """A run's checkpoint as a folder that transformers loads.

    Args:
        family: under whose names; None: that it came from, else the first that can say what the
            model computes.
        dtype: a key of ``DTYPES``, rounded to if need be; None: as the tensors came, else float32.
        step: which checkpoint; None: the newest.

    Raises:
        MaxlmError: no run, no checkpoint, a target that is not empty, a model that the family has
            no words for, values too large for the number format.
    """
    config = load(RunConfig, source / "config.yaml").value
    average = config.train.ema_decay is not None
    reader = CheckpointReader(source / "checkpoints", step, name="ema" if average else "params")
    published = reader.metadata().get("published") or {}
    chosen = _chosen(config.model, family or published.get("family"))
    values = chosen.config_json(config.model)
    home = source / "tokenizer"
    tokenizer = load_tokenizer(home) if home.exists() else None
    values |= published.get("tokens") or _tokens_of(tokenizer)
    entries = chosen.entries(config.model)
    kept = Dtypes.model_validate(published.get("dtypes") or {"default": "F32"})
    if dtype is not None:
        kept = Dtypes(default=_known_dtype(dtype))
    values["dtype"] = next((ours for ours, f in DTYPES.items() if f == kept.default), "float32")
    _check_free(target)
    how: dict[str, Any] = {"progress": progress, "lossy": dtype is not None}
    with _whole(target) as folder:
        export_tensors(reader, entries, kept, folder, shard_bytes, **how)
        if tokenizer is not None:
            export_tokenizer(home, folder)
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    specs = named(param_specs(config.model.build(rules=AxisRules(), dtype=jnp.float32)))
    parameters = sum(spec.size for spec in specs.values())
    return Converted(chosen.name, target, parameters, kept.default, [])


def _run_config(
    settings: Mapping[str, Any], target: Path, tokenizer: Tokenizer | None
) -> RunConfig:
    """A run that goes on from these weights, on text to be named."""
    objective = next(k for k, a in ARCHITECTURES.items() if a == settings["architecture"])
    seq_len = min(settings["max_seq_len"] * 2 // 3, 512)
    named_tokenizer: dict[str, Any] = {}
    if tokenizer is not None:
        named_tokenizer = {"kind": "huggingface", "path": str(target / "tokenizer")}
    return RunConfig.model_validate(
        {
            "name": target.name,
            "folder": str(target.parent),
            "model": settings,
            "tokenizer": named_tokenizer,
            "objective": {"kind": objective},
            "data": {"seq_len": max(seq_len, 1)},
        }
    )


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer | None, source: Path) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise MaxlmError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's table "
            f"{config.model.vocab_size} rows",
            where=str(source),
            fix="use the tokenizer that the model was trained with",
        )


def _chosen(model: BaseModel, name: str | None) -> Family:
    """The family of a name, or the first that can say what a model computes."""
    if name is not None:
        if name not in FAMILIES:
            raise MaxlmError(f"no family {name!r}", fix=f"known are {', '.join(FAMILIES)}")
        if fault := _lost(model, FAMILIES[name]):
            raise MaxlmError(
                f"{FAMILIES[name].architecture} has no word for {fault}",
                where="config.yaml: model",
                fix="name another --family, or change the model",
            )
        return FAMILIES[name]
    for family in FAMILIES.values():
        if _lost(model, family) is None:
            return family
    raise MaxlmError(
        "no published family computes what this model does",
        where="config.yaml: model",
        fix="--family NAME says what one of them has no word for",
    )


def _lost(model: BaseModel, family: Family) -> str | None:
    """What a family's config.json would not say of a model; None: nothing."""
    try:
        settings, _ = family.settings(family.config_json(model), family.name)
        again = type(model).model_validate(settings)
    except (MaxlmError, AssertionError, AttributeError, ValueError) as error:
        return str(error) or "its kind of layers"
    different = differences(model.model_dump(mode="json"), again.model_dump(mode="json"))
    for key, ours, _ in different:
        if not key.startswith(_ASIDE):
            return f"model.{key}={ours!r}"
    return None


def _tokens_of(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    if tokenizer is None:
        return {}
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    return dict(zip(_TOKENS, ids, strict=True))


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise MaxlmError(f"no number format {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MaxlmError("not an empty folder", where=str(target), fix="name a new one")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete."""
    part = target.with_name(f".{target.name}.part.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    made = [parent for parent in part.parents if not parent.exists()]
    try:
        part.mkdir(parents=True)
        yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    except OSError as error:
        raise MaxlmError(
            f"cannot write here ({error.strerror})",
            where=str(target),
            fix="free some space or rights, or name another folder",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty
            for parent in made:
                parent.rmdir()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MaxlmError(
            f"cannot be read ({error})", where=str(path), fix="download it again"
        ) from error
    if not isinstance(values, dict):
        raise MaxlmError("not a mapping", where=str(path), fix="download it again")
    return values
