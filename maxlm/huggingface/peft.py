"""PEFT's folders of an adapter: adapter_config.json and adapter_model.safetensors.

A further kind has its tensors in ``_PARTS``, and its settings in ``_read_settings`` and
``_write_settings``.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.adapters import Ia3Adapter, LoraAdapter, PrefixAdapter, PromptAdapter
from maxlm.adapters.targets import split_dims
from maxlm.adapters.virtual_tokens import from_peft, to_peft
from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.checkpoint import RunCheckpointReader
from maxlm.huggingface.convert import ParamWriter
from maxlm.huggingface.files import list_file_tensors, read_tensor
from maxlm.models.adapters import Adapter
from maxlm.models.architectures import ModelConfig
from maxlm.models.families.names import TensorEntry
from maxlm.models.params import Params, ParamSpec, flatten_names, is_leaf
from maxlm.runtime.json_files import read_json_object

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PROMPT, _VIRTUAL = "prompt_embeddings", ".virtual"
_VIRTUAL_KINDS = {"PREFIX_TUNING": PrefixAdapter, "PROMPT_TUNING": PromptAdapter}
_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_embedding_A": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "lora_magnitude",
    "ia3_l": "ia3",
}
# Settings that change what an adapter computes, and that maxlm has no word for.
_REFUSED = (
    *("modules_to_save", "lora_bias", "layers_to_transform", "target_parameters"),
    *("trainable_token_indices", "use_qalora", "alora_invocation_tokens", "layer_replication"),
)
# Initialisations that leave the base as it is, and the one that maxlm repeats.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa")
Arrays = dict[str, np.ndarray]


def read_peft_adapter(
    folder: Path, config: ModelConfig, specs: Params, entries: Iterable[TensorEntry]
) -> tuple[Adapter, Arrays]:
    """Reads an adapter for a model with declarations ``specs``, published as ``entries``, and its
    arrays by canonical name, DoRA's magnitudes as they are; raises MaxlmError naming the tensors
    that do not fit the model."""
    values, modules = _read_config(folder / CONFIG), _list_modules(entries)
    if values["peft_type"] in _VIRTUAL_KINDS:
        return _read_virtual_tokens(folder, values, config, specs)
    found: dict[str, Arrays] = {}
    strange = []
    for name, stored in list_file_tensors(folder / TENSORS).items():
        plain = name.removeprefix(_PREFIX)
        part = next((part for part in _PARTS if plain.endswith(f".{part}")), "")
        module = plain.removesuffix(f".{part}")
        if part and module in modules and _fits(modules[module], _PARTS[part], stored.shape):
            tensor = read_tensor(stored, np.dtype(np.float32), lossy=True)
            found.setdefault(module, {})[_PARTS[part]] = tensor
        elif part or not ("embed" in plain or ".base_layer." in plain):  # the base's, saved again
            strange.append(f"{name} {list(stored.shape)}")
    _refuse(strange, folder)
    adapter = _read_settings(values, modules, found, folder)
    leaves = flatten_names(adapter.adapt(specs))
    added = {n: s for n, s in leaves.items() if n.rpartition(".")[2] in _PARTS.values()}
    arrays = {name: np.full(spec.shape, np.nan, np.float32) for name, spec in added.items()}
    for module, parts in found.items():
        for part, tensor in parts.items():
            if part == "lora_b" and isinstance(adapter, LoraAdapter):
                tensor = tensor * (_read_scale(values, module, tensor.shape[1]) / adapter.scale)
            split = _split_tensor(modules[module], part, tensor)
            for place, value in zip(modules[module].ours, split, strict=True):
                array = arrays[f"{place.name}.{part}"][place.index]
                array[...] = 0  # of ranks that this module does not have
                array[tuple(map(slice, value.shape))] = value
    _refuse([f"{n} (not in every layer)" for n, x in arrays.items() if np.isnan(x).any()], folder)
    return adapter, arrays


def write_peft_adapter(
    folder: Path,
    adapter: Adapter,
    config: ModelConfig,
    specs: Params,
    checkpoint: RunCheckpointReader,
    entries: Iterable[TensorEntry],
) -> int:
    """Writes a run's adapter for a base with declarations ``specs``, published as ``entries``;
    returns the number of its parameters."""
    from safetensors.numpy import save_file

    if isinstance(adapter, PrefixAdapter | PromptAdapter):
        tensors, values = _convert_virtual_tokens(adapter, checkpoint, config)
    elif isinstance(adapter, LoraAdapter | Ia3Adapter):
        tensors, values = _convert_modules(adapter, specs, checkpoint, entries, folder)
    else:
        what, fix = f"PEFT has no file of adapter.kind={adapter.kind}", "use the run itself"
        raise MaxlmError(what, where=str(checkpoint.folder), fix=fix)
    values |= {"task_type": "CAUSAL_LM", "inference_mode": True}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return sum(tensor.size for tensor in tensors.values())


def _convert_modules(
    adapter: LoraAdapter | Ia3Adapter,
    specs: Params,
    checkpoint: RunCheckpointReader,
    entries: Iterable[TensorEntry],
    scratch_folder: Path,
) -> tuple[Arrays, dict[str, Any]]:
    where = str(checkpoint.folder)
    modules, kernels, arrays = _list_modules(entries), flatten_names(specs), dict[str, Arrays]()
    leaves = flatten_names(adapter.adapt(specs), is_leaf)
    for name in checkpoint.shapes:
        leaf, _, part = name.rpartition(".")
        if part in _PARTS.values():
            arrays.setdefault(leaf, {})[part] = checkpoint.open(name).read()
    for name, parts in arrays.items():
        if "lora_magnitude" in parts:
            norms = _read_norms(checkpoint, name, kernels[name], scratch_folder)
            parts["lora_magnitude"] = parts["lora_magnitude"] + norms
    published = {place.name for entry in modules.values() for place in entry.ours}
    _refuse([name for name in arrays if name not in published], checkpoint.folder)
    tensors, ranks, inputs = Arrays(), dict[str, int](), []
    for module, entry in modules.items():
        own = [
            {part: array[place.index] for part, array in arrays.get(place.name, {}).items()}
            for place in entry.ours
        ]
        if not any(own):
            continue
        _refuse_fused(adapter, module, own, where)
        of_inputs = getattr(leaves[entry.ours[0].name], "of_inputs", False)
        joined = _join_module(entry, own, of_inputs)
        table = entry.ours[0].name.endswith(".table")
        for part, tensor in joined.items():
            names = [n for n, ours in _PARTS.items() if ours == part]
            name = f"{_PREFIX}{module}.{names[-1] if table else names[0]}"
            tensors[name] = np.ascontiguousarray(tensor)
        ranks[module] = len(joined.get("lora_a", ()))
        inputs += [module] if of_inputs else []
    return tensors, _write_settings(adapter, modules, ranks, inputs)


def _convert_virtual_tokens(
    adapter: PrefixAdapter | PromptAdapter, checkpoint: RunCheckpointReader, config: ModelConfig
) -> tuple[Arrays, dict[str, Any]]:
    names = [name for name in checkpoint.shapes if name.endswith(_VIRTUAL)]
    arrays = {name: checkpoint.open(name).read() for name in names}
    values = {"peft_type": f"{adapter.kind.upper()}_TUNING", "token_dim": config.d_model}
    values |= {"num_virtual_tokens": adapter.num_virtual_tokens, "num_layers": config.num_layers}
    values["num_transformer_submodules"] = 1
    if isinstance(adapter, PrefixAdapter):
        heads, size = arrays[names[0]].shape[2:]
        values |= {"num_attention_heads": heads, "token_dim": heads * size}
    return {_PROMPT: np.ascontiguousarray(to_peft(arrays, config.embedding_scale))}, values


def _read_virtual_tokens(
    folder: Path, values: Mapping[str, Any], config: ModelConfig, specs: Params
) -> tuple[Adapter, Arrays]:
    stored = list_file_tensors(folder / TENSORS)
    _refuse([*stored] if [*stored] != [_PROMPT] else [], folder)
    adapter = _VIRTUAL_KINDS[values["peft_type"]](num_virtual_tokens=values["num_virtual_tokens"])
    leaves = flatten_names(adapter.adapt(specs)).items()
    shapes = {name: spec.shape for name, spec in leaves if name.endswith(_VIRTUAL)}
    vectors = read_tensor(stored[_PROMPT], np.dtype(np.float32), lossy=True)
    return adapter, from_peft(vectors, shapes, config.embedding_scale)


class AdaptedParamWriter:
    """Writes an adapter's arrays, and the parameters of a model without it as its base."""

    def __init__(self, inner: ParamWriter, adapter: Adapter, specs: Params, arrays: Arrays):
        adapted = flatten_names(adapter.adapt(specs), is_leaf)
        self._leaves = {name for name, held in adapted.items() if is_leaf(held)}
        self._inner, self._adapter, self._arrays = inner, adapter, arrays
        self._specs = flatten_names(specs)

    def declare(self, name: str, shape: Shape, num_lead_axes: int = 0) -> None:
        self._inner.declare(self._rename(name), shape, num_lead_axes)

    def write(self, name: str, lead_index: Shape, values: np.ndarray) -> None:
        adapter = self._adapter
        if name in self._leaves and isinstance(adapter, LoraAdapter):
            matrix = _to_matrix(values, self._specs[name], len(lead_index))
            if adapter.changes_base:
                u, s, vt = np.linalg.svd(matrix, full_matrices=False)
                matrix = (u[:, adapter.rank :] * s[adapter.rank :]) @ vt[adapter.rank :]
                values = matrix.reshape(values.shape)
            if adapter.dora:
                magnitude = self._arrays[f"{name}.lora_magnitude"][lead_index]
                magnitude -= np.linalg.norm(matrix, axis=0).reshape(magnitude.shape)
        self._inner.write(self._rename(name), lead_index, values)

    def finish(self) -> None:
        """Writes the adapter's arrays, when its base is written."""
        for name, array in self._arrays.items():
            self._inner.declare(name, array.shape)
            self._inner.write(name, (), array)

    def _rename(self, name: str) -> str:
        return f"{name}.base" if name in self._leaves else name


def _list_modules(entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    """Maps and tables by the name of their module; routed experts have none of their own."""
    return {
        entry.theirs.removesuffix(".weight"): entry
        for entry in entries
        if entry.theirs.endswith(".weight") and len(entry.ours[0].index) < 2
    }


def _fits(entry: TensorEntry, part: str, shape: Shape) -> bool:
    inputs, outputs = prod(entry.input_shape), prod(entry.convert_outputs().shape)
    if part == "ia3":
        return shape in ((outputs, 1), (1, inputs))
    return {"lora_a": shape[1:] == (inputs,), "lora_b": shape[:-1] == (outputs,)}.get(
        part, shape == (outputs,)
    )


def _split_tensor(entry: TensorEntry, part: str, tensor: np.ndarray) -> list[np.ndarray]:
    """Returns the arrays of a module's tensor, one for each of our maps."""
    split = entry.convert_outputs().split
    if part == "lora_a" or (part == "ia3" and len(tensor) == 1):
        own = tensor.T.reshape(*entry.input_shape, *([-1] if part == "lora_a" else []))
        return [own] * len(entry.ours)
    if part == "lora_b":
        return [np.stack(own) for own in zip(*map(split, tensor.T), strict=True)]
    return [*split(tensor.reshape(-1))]


def _join_module(entry: TensorEntry, own: Sequence[Arrays], of_inputs: bool) -> Arrays:
    """Returns a module's tensors, of arrays of each of our maps; those of several maps that are one
    module there stand in a block each."""
    join = entry.convert_outputs().join
    shapes = [piece.shape[len(entry.input_shape) :] for piece in entry.pieces]
    used = [i for i, parts in enumerate(own) if parts]
    if of_inputs:
        return {"ia3": own[0]["ia3"].reshape(1, -1)}
    if "ia3" in own[used[0]]:
        ones = (np.ones(shape, np.float32) for shape in shapes)
        return {"ia3": join([p.get("ia3", one) for p, one in zip(own, ones, strict=True)])[:, None]}
    empty = [np.zeros(shape, np.float32) for shape in shapes]
    columns = [
        join([column if j == i else rest for j, rest in enumerate(empty)])
        for i in used
        for column in own[i]["lora_b"]
    ]
    rows = [own[i]["lora_a"].reshape(-1, own[i]["lora_a"].shape[-1]).T for i in used]
    joined = {"lora_a": np.concatenate(rows), "lora_b": np.stack(columns, 1)}
    if "lora_magnitude" in own[0]:
        joined["lora_magnitude"] = join([parts["lora_magnitude"] for parts in own])
    return joined


def _read_norms(
    checkpoint: RunCheckpointReader, name: str, spec: ParamSpec, scratch_folder: Path
) -> np.ndarray:
    """Norms of a base's weights of each output, [layers, *outputs]."""
    lead, end = split_dims(spec)
    norms = np.empty((*spec.shape[:lead], *spec.shape[end:]), np.float32)
    with checkpoint.open_slice_reader(f"{name}.base", lead, scratch_folder) as read:
        for index in np.ndindex(*spec.shape[:lead]):
            matrix = _to_matrix(read(index), spec, lead)
            norms[index] = np.linalg.norm(matrix, axis=0).reshape(spec.shape[end:])
    return norms


def _to_matrix(values: np.ndarray, spec: ParamSpec, num_lead_axes: int) -> np.ndarray:
    """A layer's kernel as [inputs, outputs]."""
    inputs = split_dims(spec)[1] - num_lead_axes
    return values.reshape(prod(values.shape[:inputs]), -1)


def _read_config(path: Path) -> dict[str, Any]:
    fix = "write it again with save_pretrained"
    values = read_json_object(path, fix)
    kind = values.get("peft_type")
    if kind is None:
        what = "no settings of a PEFT adapter: there is no peft_type"
        raise MaxlmError(what, where=str(path), fix=fix)
    fix = "merge it with PEFT (merge_and_unload) and convert the model"
    if kind not in ("LORA", "IA3", *_VIRTUAL_KINDS):
        raise MaxlmError(f"peft_type {kind} is not implemented", where=str(path), fix=fix)
    bad = [f"{key}={values[key]!r}" for key in _REFUSED if values.get(key)]
    bad += [f"bias={values['bias']!r}"] if values.get("bias", "none") != "none" else []
    init = values.get("init_lora_weights")
    bad += [f"init_lora_weights={init!r}"] if init not in _INITS else []
    if bad:
        raise MaxlmError(f"{', '.join(bad)} is not implemented", where=str(path), fix=fix)
    return values


def _read_scale(values: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = (values.get("alpha_pattern") or {}).items()
    own = (alpha for key, alpha in patterns if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = next(own, values["lora_alpha"])
    return alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _read_settings(
    values: Mapping[str, Any],
    modules: Mapping[str, TensorEntry],
    found: Mapping[str, Arrays],
    folder: Path,
) -> Adapter:
    def name_targets(chosen: Iterable[str]) -> tuple[str, ...]:
        names = (place.name for module in chosen for place in modules[module].ours)
        return tuple(dict.fromkeys(re.sub(r"\.(kernel|table)$", "", name) for name in names))

    if values["peft_type"] == "IA3":
        inputs = {m for m, parts in found.items() if len(parts["ia3"]) == 1}
        outputs = [module for module in found if module not in inputs]
        scaled = [module for module in found if module in inputs]
        return Ia3Adapter(targets=name_targets(outputs), input_targets=name_targets(scaled))
    lacking = [m for m, parts in found.items() if not {"lora_a", "lora_b"} <= {*parts}]
    _refuse([f"{module} (one of A and B alone)" for module in lacking], folder)
    adapter = LoraAdapter(
        rank=max(len(parts["lora_a"]) for parts in found.values()),
        alpha=values["lora_alpha"],
        rank_stabilized=bool(values.get("use_rslora")),
        dora=bool(values.get("use_dora")),
        init="pissa" if values.get("init_lora_weights") == "pissa" else "default",
        targets=name_targets(found),
    )
    for module in found:
        _refuse_fused(adapter, module, [{"": np.empty(0)}] * len(modules[module].ours), str(folder))
    return adapter


def _write_settings(
    adapter: LoraAdapter | Ia3Adapter,
    modules: Mapping[str, TensorEntry],
    ranks: Mapping[str, int],
    inputs: Sequence[str],
) -> dict[str, Any]:
    """Settings of an adapter of modules with ``ranks``; of ``inputs`` the inputs are scaled."""

    def shorten(names: Iterable[str]) -> list[str]:
        names = {*names}
        ends = {name: name.rpartition(".")[2] for name in modules}
        others = {end for name, end in ends.items() if name not in names}
        return sorted({name if ends[name] in others else ends[name] for name in names})

    values: dict[str, Any] = {"target_modules": shorten(ranks)}
    if isinstance(adapter, Ia3Adapter):
        return values | {"peft_type": "IA3", "feedforward_modules": shorten(inputs)}
    other = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    power = 0.5 if adapter.rank_stabilized else 1
    return values | {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "rank_pattern": other,
        "alpha_pattern": {n: adapter.alpha * (r / adapter.rank) ** power for n, r in other.items()},
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.dora,
        "init_lora_weights": "pissa" if adapter.changes_base else True,
    }


def _refuse(names: Sequence[str], folder: Path) -> None:
    if names:
        shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        what = f"tensors that do not fit this model: {shown}"
        raise MaxlmError(what, where=str(folder), fix="name the base that the adapter was made for")


def _refuse_fused(adapter: Adapter, module: str, own: Sequence[Arrays], where: str) -> None:
    """Refuses what has no counterpart where several of our maps are one module there."""
    if isinstance(adapter, LoraAdapter) and len(own) > 1:
        partly = adapter.dora and not all(own)
        if adapter.changes_base or partly:
            what = (
                f"{module} holds several of our maps, and PiSSA or DoRA of some has no counterpart"
            )
            raise MaxlmError(what, where=where, fix="convert the merged model")
