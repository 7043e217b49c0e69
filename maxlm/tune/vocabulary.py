"""A vocabulary that grows for new special tokens: a base whose tables have rows for
them."""

from math import gcd
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maxlm.adapters.lora import LoraAdapter
from maxlm.checkpoint.reading import read_metadata
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import CHAT_TOKENS
from maxlm.data.tokenizer.extend import extend_tokenizer
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.huggingface.checkpoint import (
    RunCheckpointReader,
    RunCheckpointWriter,
    copy_param,
)
from maxlm.models.params import ParamSpec, flatten_names, param_specs
from maxlm.run.config import RunConfig
from maxlm.run.convert import make_new_folder, open_run_checkpoint
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding import AxisRules

_LARGEST_MULTIPLE = 128
"""Most that a grown table's size is rounded up to a multiple of."""


def grow_vocabulary(config: RunConfig) -> RunConfig:
    """Returns the config on a base whose tokenizer has
    ``tokenizer.extra_special_tokens`` and those of ``tokenizer.chat``. Where the base's
    lacks some, such a base is made in FOLDER/NAME/grown, which later starts find there;
    LoRA then trains their rows too. Raises MaxlmError: a tokenizer that cannot be
    extended, or a base with an adapter of its own."""
    start = config.train.start_from
    special_tokens = config.tokenizer.extra_special_tokens
    if config.tokenizer.chat:
        special_tokens += CHAT_TOKENS[config.tokenizer.chat]
    if start is None or config.tokenizer.path is not None or not special_tokens:
        return config
    base = load_tokenizer(Path(start, "tokenizer"))
    tokenizer = extend_tokenizer(base, special_tokens)
    if tokenizer is base:
        return config
    target = Path(config.folder, config.name, "grown")
    if jax.process_index() == 0 and not (target / "config.yaml").exists():
        num_rows = tokenizer.vocab_size + config.task.num_ids_to_reserve
        write_grown_run(Path(start), target, base, tokenizer, num_rows)
    multihost_utils.sync_global_devices(str(target))
    grown = load_config(RunConfig, target / "config.yaml").value
    model = config.model.model_copy(update={"vocab_size": grown.model.vocab_size})
    train = config.train.model_copy(update={"start_from": str(target)})
    adapter = config.adapter
    if isinstance(adapter, LoraAdapter) and not adapter.token_ids:
        new_ids = [
            token_id
            for token, token_id in tokenizer.special.ids.items()
            if token not in base.special.ids
        ]
        # A head that is not the table has rows of its own to train.
        trained_rows = {
            "token_ids": tuple(sorted(new_ids)),
            "token_head": not model.tie_embeddings,
        }
        adapter = adapter.model_copy(update=trained_rows)
    return config.model_copy(
        update={"model": model, "train": train, "adapter": adapter}
    )


def compute_grown_size(old_size: int, num_rows: int) -> int:
    """Computes the rows of a table with ``num_rows`` at least: as many as before where
    that is enough, for many tables have more rows than their tokenizer ids, else
    rounded up so that the table still divides over the devices that it divided over."""
    if num_rows <= old_size:
        return old_size
    multiple = gcd(old_size, _LARGEST_MULTIPLE)
    return -(-num_rows // multiple) * multiple


def write_grown_run(
    source: Path, target: Path, old: Tokenizer, tokenizer: Tokenizer, num_rows: int
) -> None:
    """Writes a run's newest parameters as a run of step 0 whose tables have at least
    ``num_rows`` rows. The rows of new tokens, and those behind them, begin as the mean
    of the rows that the old tokenizer has ids for, as transformers does (Hewitt 2021):
    a softmax over the old tokens changes little. Rows that the table had to spare were
    never trained, and begin so too."""
    config, reader = open_run_checkpoint(source, None)
    if config.adapter is not None:
        message = "its vocabulary cannot grow: the run has an adapter"
        fix = "merge it (maxlm convert RUN TARGET --merge), and tune TARGET"
        raise MaxlmError(message, where=str(source), fix=fix)
    size = compute_grown_size(config.model.vocab_size, num_rows)
    model = config.model.model_copy(update={"vocab_size": size})
    old_model = config.model.build(rules=AxisRules(), dtype=jnp.float32)
    specs = flatten_names(param_specs(old_model))
    metadata = read_metadata(reader.folder)
    published = metadata.get("published") or {}
    origin = {key: published[key] for key in ("family", "tokens") if key in published}
    grown_config = config.model_copy(update={"model": model, "name": target.name})
    with make_new_folder(target) as folder:
        writer = RunCheckpointWriter(folder / "checkpoints")
        for name, spec in specs.items():
            _copy_param(reader, writer, name, spec, old.vocab_size, size, folder)
        grown_metadata: JsonObject = {
            "config": grown_config.model_dump(mode="json"),
            "tokenizer": tokenizer.fingerprint,
        }
        if origin:
            grown_metadata["published"] = origin
        writer.commit(grown_metadata)
        tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(grown_config))


def _copy_param(
    reader: RunCheckpointReader,
    writer: RunCheckpointWriter,
    name: str,
    spec: ParamSpec,
    num_old_ids: int,
    size: int,
    scratch: Path,
) -> None:
    """Copies a parameter, a layer at a time, or one with a vocabulary whole and
    grown."""
    if "vocab" not in spec.axes:
        copy_param(reader, writer, name, spec.num_layer_axes, scratch)
        return
    vocab_axis = spec.axes.index("vocab")
    values = grow_table(reader.open(name).read(), vocab_axis, num_old_ids, size)
    writer.declare(name, values.shape)
    writer.write(name, (), values)


def grow_table(
    values: np.ndarray, axis: int, num_old_ids: int, size: int
) -> np.ndarray:
    """Returns a table or a head, fp32, with ``size`` rows along ``axis``; those from
    ``num_old_ids`` on are the mean of those before."""
    rows = np.moveaxis(values, axis, 0)[:num_old_ids]
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    grown = np.empty((size, *rows.shape[1:]), np.float32)
    grown[:num_old_ids] = rows
    grown[num_old_ids:] = mean
    return np.ascontiguousarray(np.moveaxis(grown, 0, axis))
