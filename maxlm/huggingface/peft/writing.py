"""A run's adapter, written as PEFT's folder: all that was trained, or a line that says
what PEFT has no form for."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.adapters.ia3 import Ia3Adapter, Ia3Param
from maxlm.adapters.lora import LoraAdapter, TokenRowsParam
from maxlm.adapters.virtual_tokens import PrefixAdapter, PromptAdapter, to_peft
from maxlm.config import MaxlmError
from maxlm.huggingface.checkpoint import ReadSlice, RunCheckpointReader
from maxlm.huggingface.families.names import ParamSlice, TensorEntry
from maxlm.huggingface.peft.importing import to_matrix
from maxlm.huggingface.peft.reading import (
    OUR_TOKEN_ROWS,
    PREFIX,
    PROMPT,
    TENSORS,
    TOKEN_ROWS,
    VIRTUAL,
    list_task_types,
    refuse_tensors,
)
from maxlm.huggingface.peft.settings import (
    CONFIG,
    IA3,
    LORA,
    PREFIX_TUNING,
    PROMPT_TUNING,
)
from maxlm.huggingface.peft.sites import (
    EXPERT_NAMES,
    IA3_PARTS,
    IA3_TENSOR,
    LORA_PARTS,
    TABLE_PARTS,
    AdapterSite,
    Arrays,
    ExpertsSite,
    MapSite,
    ModuleCatalog,
    find_layer,
    list_modules,
    nest_experts,
)
from maxlm.models.adapters import Adapter
from maxlm.models.architectures import ModelConfig
from maxlm.models.params import Params, ParamSpec, flatten_names, is_leaf
from maxlm.models.targets import split_dims

_PARTS = {*LORA_PARTS.values(), *IA3_PARTS.values()}
_MERGED = "convert the merged model (without --adapter)"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter in a run's checkpoint, and all that is known of how it was trained."""

    adapter: Adapter
    config: ModelConfig
    specs: Params
    """Declarations of the model without it."""
    checkpoint: RunCheckpointReader
    trained_base: frozenset[str] = frozenset()
    """Names, as the checkpoint has them, of parameters of the base that were trained
    too."""
    start: RunCheckpointReader | None = None
    """The base before PiSSA took its principal part; None: it is not there any more."""


def write_peft_adapter(
    folder: Path, run: TrainedAdapter, entries: Iterable[TensorEntry]
) -> tuple[int, list[str]]:
    """Writes a run's adapter for a base that is published as ``entries``; returns the
    number of its parameters, and notes for the user. Raises MaxlmError: something was
    trained that no file of PEFT's can hold."""
    from safetensors.numpy import save_file

    with ExitStack() as stack:
        catalog = list_modules(entries)
        writer = _AdapterFile(run, catalog, folder, stack)
        if isinstance(run.adapter, PrefixAdapter | PromptAdapter):
            writer.add_virtual_tokens(run.adapter)
        elif isinstance(run.adapter, LoraAdapter):
            writer.add_lora(run.adapter)
        elif isinstance(run.adapter, Ia3Adapter):
            writer.add_ia3()
        else:
            problem = f"PEFT has no file of adapter.kind={run.adapter.kind}"
            raise MaxlmError(
                problem, where=str(run.checkpoint.folder), fix="use the run itself"
            )
        writer.add_trained_base()
    save_file(writer.tensors, folder / TENSORS, {"format": "pt"})
    text = json.dumps(writer.settings, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", "utf-8")
    num_params = sum(tensor.size for tensor in writer.tensors.values())
    return num_params, writer.notes


class _AdapterFile:
    """The tensors and settings of a file in the making. Parameters of the run are
    opened once, in ``stack``: each may be decoded into a file in the folder ``scratch``
    until then."""

    def __init__(
        self,
        run: TrainedAdapter,
        catalog: ModuleCatalog,
        scratch: Path,
        stack: ExitStack,
    ):
        self._run = run
        self._catalog = catalog
        self._scratch = scratch
        self._stack = stack
        self._readers: dict[str, ReadSlice] = {}
        self._where = run.checkpoint.folder
        self._leaves = flatten_names(run.adapter.adapt(run.specs), is_leaf)
        self._specs: dict[str, ParamSpec] = flatten_names(run.specs)
        self._adapted: list[str] = []
        self.tensors: Arrays = {}
        task_type, *_ = list_task_types(run.config)
        self.settings: dict[str, Any] = {
            "inference_mode": True,
            "task_type": task_type,
        }
        self.notes: list[str] = []

    def add_virtual_tokens(self, adapter: PrefixAdapter | PromptAdapter) -> None:
        config = self._run.config
        checkpoint = self._run.checkpoint
        names = [name for name in checkpoint.shapes if name.endswith(VIRTUAL)]
        arrays = {name: checkpoint.open(name).read() for name in names}
        is_prefix = isinstance(adapter, PrefixAdapter)
        self.settings |= {
            "peft_type": PREFIX_TUNING if is_prefix else PROMPT_TUNING,
            "token_dim": config.d_model,
            "num_virtual_tokens": adapter.num_virtual_tokens,
            "num_layers": config.num_layers,
            "num_transformer_submodules": 1,
        }
        if is_prefix:
            # Keys and values [layers, n, K, H]: PEFT counts kv heads.
            num_heads, head_dim = arrays[names[0]].shape[2:]
            self.settings["num_attention_heads"] = num_heads
            self.settings["token_dim"] = num_heads * head_dim
        vectors = to_peft(arrays, config.embedding_scale)
        self.tensors[PROMPT] = np.ascontiguousarray(vectors)

    def add_ia3(self) -> None:
        input_names: list[str] = []
        arrays = self._read_arrays()
        # An adapter that was never trained keeps all its modules.
        is_fresh = all(np.all(parts["ia3"] == 1) for parts in arrays.values())
        for site in self._catalog.sites.values():
            parts = self._take_site(site, arrays)
            if not any(parts):
                continue
            leaf = self._leaves[site.places[0].name]
            of_inputs = isinstance(leaf, Ia3Param) and leaf.of_inputs
            factors = site.join_factors(parts, of_inputs=of_inputs)
            if np.all(factors == 1) and not is_fresh:
                continue  # a layer that the adapter leaves as it is
            self._put(f"{site.prefix}.{IA3_TENSOR}", factors)
            self._adapted.append(site.name)
            if of_inputs:
                input_names.append(site.name)
        self.settings |= {
            "peft_type": IA3,
            "target_modules": self._shorten(self._adapted),
            "feedforward_modules": self._shorten(input_names),
        }

    def add_lora(self, adapter: LoraAdapter) -> None:
        arrays = self._read_arrays()
        rank = adapter.rank
        is_pissa = adapter.changes_base
        if is_pissa and self._run.start is not None:
            # PEFT repeats the decomposition, which rounding turns a little. The
            # difference from the start is exact, of twice the rank, beside a base that
            # stays as it is.
            self._add_initial_parts(adapter, arrays)
            rank *= 2
            is_pissa = False
        elif is_pissa:
            self.notes.append(
                "PiSSA without the run that it started from: PEFT takes the principal "
                "part out of the base again, and its logits may differ by some 1e-4"
            )

        # Tensors of each module, and its rank.
        ranks: dict[str, int] = {}
        for site in self._list_adapted_sites(arrays):
            parts = self._take_site(site, arrays)
            self._check_fused(adapter, site, parts, is_pissa=is_pissa)
            if adapter.dora:
                for place, array in zip(site.places, parts, strict=True):
                    norms = self._read_norms(place)
                    array["lora_magnitude"] = array["lora_magnitude"] + norms
            joined = site.join_lora(parts)
            site_rank = joined["lora_a"].shape[0]
            if isinstance(site, ExpertsSite):
                site_rank //= site.num_experts  # all experts' A, one above the other
            ranks[site.name] = site_rank
            self._put_lora(site, joined)

        # Modules are named by target_modules, experts and routers by target_parameters.
        catalog = self._catalog
        self._adapted = [name for name in ranks if name in catalog.sites]
        parameters = [name for name in ranks if name not in catalog.sites]
        experts = self._shorten(
            [name for name in parameters if name in catalog.experts]
        )
        routers = [name for name in parameters if name in catalog.routers]
        self.settings["target_parameters"] = [*experts, *routers] or None
        self._write_lora_settings(adapter, ranks, rank, is_pissa=is_pissa)
        self._put_token_rows(adapter)

    def _list_sites(self) -> list[AdapterSite]:
        catalog = self._catalog
        # A router is adapted as a parameter: by the name of its tensor, behind the
        # module's prefix.
        routers = [
            MapSite(name, name.removesuffix(".weight"), site.places, site.entry)
            for name, site in catalog.routers.items()
        ]
        return [*catalog.sites.values(), *catalog.experts.values(), *routers]

    def _list_adapted_sites(self, arrays: Mapping[str, Arrays]) -> list[AdapterSite]:
        """Lists the sites that the adapter has arrays for: modules and routers, then
        experts."""
        sites = [
            site for site in self._list_sites() if any(self._take_site(site, arrays))
        ]
        maps = [site for site in sites if isinstance(site, MapSite)]
        experts = [site for site in sites if isinstance(site, ExpertsSite)]
        return [*maps, *nest_experts(experts)]

    def _read_arrays(self) -> dict[str, Arrays]:
        """Reads the adapter's arrays by their parameter, and checks that PEFT has a
        place for each."""
        arrays: dict[str, Arrays] = {}
        for name in self._run.checkpoint.shapes:
            owner, _, part = name.rpartition(".")
            if part in _PARTS:
                array = self._run.checkpoint.open(name)
                arrays.setdefault(owner, {})[part] = array.read()
        published = {place.name for site in self._list_sites() for place in site.places}
        strange = [name for name in arrays if name not in published]
        refuse_tensors("PEFT has no module of", strange, self._where, _MERGED)
        return arrays

    def _take_site(
        self, site: AdapterSite, arrays: Mapping[str, Arrays]
    ) -> list[Arrays]:
        """An adapter's arrays at each place of a site, without what is padding; {}:
        none."""
        is_expert = isinstance(site, ExpertsSite)
        site_parts: list[Arrays] = []
        for place in site.places:
            stacked = arrays.get(place.name, {})
            parts = {part: array[place.index] for part, array in stacked.items()}
            if "lora_a" in parts:
                parts = _trim_rank(parts, is_expert=is_expert)
            site_parts.append(parts)
        return site_parts

    def _check_fused(
        self,
        adapter: LoraAdapter,
        site: AdapterSite,
        parts: Sequence[Arrays],
        *,
        is_pissa: bool,
    ) -> None:
        """Refuses what has no counterpart where several of our maps are one module
        there."""
        if len(parts) == 1:
            return
        has_partial_dora = adapter.dora and not all(parts)
        if is_pissa or has_partial_dora:
            raise MaxlmError(
                f"{site.name} holds several of our maps, and PiSSA or DoRA of some has "
                "no counterpart",
                where=str(self._where),
                fix=_MERGED,
            )

    def _put(self, name: str, tensor: np.ndarray) -> None:
        self.tensors[f"{PREFIX}{name}"] = np.ascontiguousarray(tensor, np.float32)

    def _put_lora(self, site: AdapterSite, joined: Arrays) -> None:
        is_table = isinstance(site, MapSite) and site.is_table
        part_names = TABLE_PARTS if is_table else LORA_PARTS
        for theirs, ours in part_names.items():
            if ours in joined:
                self._put(f"{site.prefix}.{theirs}", joined[ours])

    def _write_lora_settings(
        self,
        adapter: LoraAdapter,
        ranks: Mapping[str, int],
        rank: int,
        *,
        is_pissa: bool,
    ) -> None:
        last_names = {name.rpartition(".")[2] for name in self._adapted}
        if self._catalog.experts and last_names & {*EXPERT_NAMES}:
            raise MaxlmError(
                "PEFT takes gate_proj, up_proj and down_proj of a model with routed "
                "experts for the experts'",
                where=str(self._where),
                fix=_MERGED,
            )

        # Modules of another rank than `r` are named by patterns.
        names_by_rank: dict[int, list[str]] = {}
        for name, site_rank in ranks.items():
            names_by_rank.setdefault(site_rank, []).append(name)
        rank_pattern: dict[str, int] = {}
        for site_rank, names in names_by_rank.items():
            if site_rank != rank:
                short_names = self._shorten(names, among=[*ranks])
                rank_pattern |= dict.fromkeys(short_names, site_rank)

        # All have our one scale = alpha / rank, or alpha / √rank.
        power = 0.5 if adapter.rank_stabilized else 1
        alpha_pattern = {
            name: adapter.scale * site_rank**power
            for name, site_rank in rank_pattern.items()
        }
        self.settings |= {
            "peft_type": LORA,
            "r": rank,
            "lora_alpha": adapter.scale * rank**power,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_rslora": adapter.rank_stabilized,
            "use_dora": adapter.dora,
            "lora_dropout": adapter.dropout,
            "init_lora_weights": "pissa" if is_pissa else True,
        }
        self.settings |= self._choose_targets()

    def _choose_targets(self) -> dict[str, Any]:
        """Says which modules are adapted, by layers where these are the same modules of
        some."""
        layer_by_name = {name: find_layer(name, ()) for name in self._catalog.sites}
        adapted_layers = {layer_by_name[name] for name in self._adapted}
        last_names = {name.rpartition(".")[2] for name in self._adapted}
        of_all_layers = [
            name for name in layer_by_name if name.rpartition(".")[2] in last_names
        ]
        of_these_layers = [
            name for name in of_all_layers if layer_by_name[name] in adapted_layers
        ]
        all_have_layers = None not in adapted_layers
        are_some_layers = len(of_these_layers) < len(of_all_layers)
        are_same_modules = {*of_these_layers} == {*self._adapted}
        if all_have_layers and are_some_layers and are_same_modules:
            layers = sorted(layer for layer in adapted_layers if layer is not None)
            return {
                "target_modules": sorted(last_names),
                "layers_to_transform": layers,
            }
        return {"target_modules": self._shorten(self._adapted)}

    def _put_token_rows(self, adapter: LoraAdapter) -> None:
        catalog = self._catalog
        ids = [*adapter.token_ids]
        if not ids:
            return
        modules = [catalog.input_table]
        head = catalog.head  # none of its own where it is tied to the table
        if adapter.token_head and head is not None and head in catalog.sites:
            modules.append(head)
        for module in modules:
            name = catalog.sites[module].places[0].name
            rows = self._run.checkpoint.open(f"{name}.{OUR_TOKEN_ROWS}").read()
            self._put(f"{module}.{TOKEN_ROWS}", rows)
        vocab_size = self._run.config.vocab_size
        self.notes.append(
            f"rows of tokens up to {max(ids)} are trained: a base with fewer is first "
            f"given them by resize_token_embeddings({vocab_size})"
        )
        # A list means rows of the input's table alone.
        by_module = dict.fromkeys(modules, ids)
        self.settings["trainable_token_indices"] = (
            by_module if len(modules) > 1 else ids
        )

    def add_trained_base(self) -> None:
        """Adds the parameters of the base that were trained: as whole modules, or,
        where a module is adapted too or tied to another, under the name that PEFT's
        model has for the tensor."""
        run = self._run
        if not run.trained_base:
            return
        catalog = self._catalog
        trained = self._list_trained_tensors()

        # Tensors by their module.
        modules: dict[str, list[str]] = {}
        for name in trained:
            module = name.rpartition(".")[0]
            modules.setdefault(module, []).append(name)

        whole_modules: list[str] = []
        has_biases = False
        for module, names in modules.items():
            if module in self._adapted:
                for name in names:
                    kind = name.rpartition(".")[2]
                    self._put(f"{module}.base_layer.{kind}", self._read_tensor(name))
                    has_biases = has_biases or kind == "bias"
            elif any(catalog.tensors[name].aliases for name in names):
                for name in names:
                    self._put(name, self._read_tensor(name))
            elif all(name.endswith(".bias") for name in names):
                self._put(names[0], self._read_tensor(names[0]))
                has_biases = True
            else:
                # What of a whole module was not trained is written too.
                whole_modules.append(module)
                for name in catalog.tensors:
                    if name.rpartition(".")[0] == module:
                        self._put(name, self._read_tensor(name))

        if whole_modules:
            short_names = self._shorten(whole_modules, by_dots=False)
            self.settings["modules_to_save"] = short_names
        if has_biases and self.settings["peft_type"] == LORA:
            self.settings["bias"] = "all"

    def _list_trained_tensors(self) -> list[str]:
        """Lists the published tensors that trained parameters of the base are in.
        Raises MaxlmError where PEFT's file cannot hold some of them."""
        run = self._run
        catalog = self._catalog
        trained = [
            name
            for name, entry in catalog.tensors.items()
            if any(self._name_base(place) in run.trained_base for place in entry.ours)
        ]
        written: set[str] = set()
        for name in trained:
            places = catalog.tensors[name].ours
            written |= {self._name_base(place) for place in places}
        refuse_tensors(
            "trained, and no file of PEFT's holds them",
            [*run.trained_base - written],
            self._where,
            _MERGED,
        )
        if isinstance(run.adapter, PrefixAdapter | PromptAdapter):
            refuse_tensors(
                "PEFT saves no modules beside virtual tokens",
                trained,
                self._where,
                _MERGED,
            )
        with_rows = [
            name for name in trained if self._has_token_rows(catalog.tensors[name])
        ]
        refuse_tensors(
            "trained whole beside rows of its tokens", with_rows, self._where, _MERGED
        )
        return trained

    def _has_token_rows(self, entry: TensorEntry) -> bool:
        return isinstance(self._leaves[entry.ours[0].name], TokenRowsParam)

    def _name_base(self, place: ParamSlice) -> str:
        return f"{place.name}.base" if is_leaf(self._leaves[place.name]) else place.name

    def _read_base(self, place: ParamSlice) -> np.ndarray:
        """A slice of a parameter of the base, as the run has it."""
        name = self._name_base(place)
        if name not in self._readers:
            opened = self._run.checkpoint.open_slice_reader(
                name, len(place.index), self._scratch
            )
            self._readers[name] = self._stack.enter_context(opened)
        return self._readers[name](place.index)

    def _read_tensor(self, name: str) -> np.ndarray:
        """A tensor of the base, as the run has it."""
        entry = self._catalog.tensors[name]
        return entry.join([self._read_base(place) for place in entry.ours])

    def _shorten(
        self, names: Sequence[str], among: Sequence[str] = (), *, by_dots: bool = True
    ) -> list[str]:
        """Returns the shortest ends of some modules' names that mean no others, where
        PEFT looks for ends of names: behind a dot, or (``by_dots=False``) anywhere."""
        catalog = self._catalog
        known = among or [*catalog.modules, *catalog.experts, *catalog.routers]
        chosen = {*names}
        dot = "." if by_dots else ""

        def means_others(end: str) -> bool:
            others = (name for name in known if name not in chosen)
            return any(name.endswith(dot + end) for name in others)

        short_names: set[str] = set()
        for name in names:
            end = name.rpartition(".")[2]
            short_names.add(name if means_others(end) else end)
        return sorted(short_names)

    def _read_norms(self, place: ParamSlice) -> np.ndarray:
        """Norms of a layer's weights of each output in the base, [*outputs]."""
        spec = self._specs[place.name]
        _, output_start = split_dims(spec)
        matrix = to_matrix(self._read_base(place), spec, len(place.index))
        norms = np.linalg.norm(matrix, axis=0)
        return norms.reshape(spec.shape[output_start:]).astype(np.float32)

    def _add_initial_parts(
        self, adapter: LoraAdapter, arrays: Mapping[str, Arrays]
    ) -> None:
        """Adds to A and B, with the opposite sign, what they began as: the base's own
        principal part, which is what the start has more than the base. Then
        start + scale · A' · B' = base + scale · A · B, of twice the rank."""
        start = self._run.start
        assert start is not None
        rank = adapter.rank
        for name, parts in arrays.items():
            spec = self._specs[name]
            if not spec.contracting_dims:
                continue  # PiSSA takes nothing from tables.
            num_lead_dims, _ = split_dims(spec)
            a_shape = parts["lora_a"].shape
            b_shape = parts["lora_b"].shape
            initial_a = np.empty(a_shape, np.float32)
            negative_b = np.empty(b_shape, np.float32)
            open_start = start.open_slice_reader(name, num_lead_dims, self._scratch)
            open_base = self._run.checkpoint.open_slice_reader(
                f"{name}.base", num_lead_dims, self._scratch
            )
            with open_start as read_start, open_base as read_base:
                # Each layer's [inputs, outputs] = u · s · vt, split between both.
                for index in np.ndindex(*spec.shape[:num_lead_dims]):
                    difference = read_start(index).astype(np.float64) - read_base(index)
                    matrix = to_matrix(difference, spec, num_lead_dims) / adapter.scale
                    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
                    root = np.sqrt(s[:rank])
                    a = u[:, :rank] * root
                    b = -root[:, None] * vt[:rank]
                    initial_a[index] = a.reshape(a_shape[num_lead_dims:])
                    negative_b[index] = b.reshape(b_shape[num_lead_dims:])
            parts["lora_a"] = np.concatenate([parts["lora_a"], initial_a], axis=-1)
            parts["lora_b"] = np.concatenate(
                [parts["lora_b"], negative_b], axis=num_lead_dims
            )


def _trim_rank(parts: Arrays, *, is_expert: bool) -> Arrays:
    """Leaves out ranks whose A and B are both zero, which nothing ever trains: padding
    of layers that have lower ranks than others, or none ({})."""
    a = parts["lora_a"]
    b = parts["lora_b"]
    rank = a.shape[-1]
    # Of experts [E, inputs, rank] and [E, rank, outputs], of maps [*inputs, rank] and
    # [rank, ...].
    rank_dim_of_b = 1 if is_expert else 0
    columns_of_a = a.reshape(-1, rank)
    rows_of_b = np.moveaxis(b, rank_dim_of_b, 0).reshape(rank, -1)
    is_used = np.any(columns_of_a, axis=0) | np.any(rows_of_b, axis=1)
    if not is_used.any():
        has_magnitudes = np.any(parts.get("lora_magnitude", 0))
        if not has_magnitudes:
            return {}
        is_used[0] = True  # The magnitudes alone were trained.
    trimmed_b = np.compress(is_used, b, axis=rank_dim_of_b)
    return parts | {"lora_a": a[..., is_used], "lora_b": trimmed_b}
