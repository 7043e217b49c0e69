"""An adapter's folder of PEFT's, read for a model whose tensors have published names.

What the settings mean and what the file holds must be the same modules: PEFT passes
over what it finds no place for, and leaves fresh what it finds no tensors for, with a
warning at most.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maxlm.adapters.ia3 import Ia3Adapter
from maxlm.adapters.lora import LoraAdapter
from maxlm.adapters.virtual_tokens import PrefixAdapter, PromptAdapter, from_peft
from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.families.names import ParamSlice, TensorEntry
from maxlm.huggingface.files import StoredTensor, list_file_tensors, read_tensor
from maxlm.huggingface.peft.settings import (
    CONFIG,
    IA3,
    MERGE,
    PREFIX_TUNING,
    PeftSettings,
    read_peft_settings,
)
from maxlm.huggingface.peft.sites import (
    IA3_PARTS,
    IA3_TENSOR,
    LORA_PARTS,
    TABLE_PARTS,
    AdapterSite,
    Arrays,
    MapSite,
    ModuleCatalog,
    find_saved_modules,
    find_target_sites,
    list_modules,
    matches_pattern,
)
from maxlm.models.adapters import Adapter
from maxlm.models.architectures import ModelConfig
from maxlm.models.params import Params, flatten_names

TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"
VIRTUAL = ".virtual"
OUR_TOKEN_ROWS = "token_rows"
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
_OTHER_BASE = "name the base that the adapter was made for"
_WRITE_AGAIN = f"{_OTHER_BASE}, or write it again with PEFT's save_pretrained"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was read, for a base that is still to be."""

    adapter: Adapter
    arrays: Arrays
    """Its arrays by canonical name. Magnitudes of DoRA are whole here: the base's norms
    are to be taken from them."""
    base_values: Mapping[ParamSlice, np.ndarray] = field(default_factory=dict)
    """Parameters of the base, or slices of them, that the file holds trained."""
    principal_ranks: Mapping[ParamSlice, int] = field(default_factory=dict)
    """With PiSSA: the singular values that each matrix of the base gave away."""

    @property
    def changes_base(self) -> bool:
        """Whether the base beside it is another than the published one."""
        return self.adapter.changes_base or bool(self.base_values)


def read_peft_adapter(
    folder: Path, config: ModelConfig, specs: Params, entries: Iterable[TensorEntry]
) -> PeftAdapter:
    """Reads an adapter for a model with declarations ``specs``, published as
    ``entries``. Raises MaxlmError: settings that PEFT or maxlm refuses, tensors that
    settings and model do not mean, tensors that are missing."""
    settings = read_peft_settings(folder / CONFIG, list_task_types(config))
    stored = _list_tensors(folder)
    if settings.num_virtual_tokens:
        return _read_virtual_tokens(settings, stored, config, specs, folder)
    catalog = list_modules(entries)
    reader = _AdapterReader(settings, catalog, stored, folder)
    return reader.read(specs)


def list_task_types(config: ModelConfig) -> tuple[str | None, ...]:
    """Returns PEFT's names of what a model is for; None: not said. The first is
    written."""
    if config.transformer_type == "encoder_decoder":
        return "SEQ_2_SEQ_LM", None
    if config.transformer_type == "encoder":
        return None, "FEATURE_EXTRACTION"
    if "score" in config.heads:
        return "SEQ_CLS", None
    return "CAUSAL_LM", None


def _list_tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / TENSORS
    if not path.exists() and (folder / PICKLE).exists():
        problem = f"{PICKLE} is a pickle, which can run any code when it is read"
        fix = (
            "only if you trust it, load it with PEFT and write it with save_pretrained"
        )
        raise MaxlmError(problem, where=str(folder / PICKLE), fix=fix)
    return list_file_tensors(path)


def _read_virtual_tokens(
    settings: PeftSettings,
    stored: Mapping[str, StoredTensor],
    config: ModelConfig,
    specs: Params,
    folder: Path,
) -> PeftAdapter:
    strange = [name for name in stored if name != PROMPT]
    refuse_tensors("tensors that PEFT would pass over", strange, folder)
    if PROMPT not in stored:
        refuse_tensors("the file lacks", [PROMPT], folder)
    kind = PrefixAdapter if settings.peft_type == PREFIX_TUNING else PromptAdapter
    adapter = kind(num_virtual_tokens=settings.num_virtual_tokens)
    adapted = flatten_names(adapter.adapt(specs))
    shapes = {
        name: spec.shape for name, spec in adapted.items() if name.endswith(VIRTUAL)
    }
    if settings.peft_type == PREFIX_TUNING:
        # Keys and values [layers, n, K, H].
        _, _, num_heads, head_dim = next(iter(shapes.values()))
        sizes = {
            "num_layers": config.num_layers,
            "num_attention_heads": num_heads,
            "token_dim": num_heads * head_dim,
        }
    else:
        sizes = {"token_dim": config.d_model}
    for name, size in sizes.items():
        stored_size = getattr(settings, name)
        if stored_size not in (None, size):
            problem = f"{name}={stored_size}, and {size} in this model"
            raise MaxlmError(problem, where=str(settings.path), fix=_OTHER_BASE)
    vectors = _read_values(stored[PROMPT])
    return PeftAdapter(adapter, from_peft(vectors, shapes, config.embedding_scale))


class _AdapterReader:
    """Matches the tensors of a file with what its settings mean."""

    def __init__(
        self,
        settings: PeftSettings,
        catalog: ModuleCatalog,
        stored: Mapping[str, StoredTensor],
        folder: Path,
    ):
        self._settings = settings
        self._catalog = catalog
        self._stored = dict(stored)
        self._folder = folder
        where = str(settings.path)
        self._sites = find_target_sites(settings.modules, catalog, where)
        self._saved = find_saved_modules(settings.modules, catalog)

    def read(self, specs: Params) -> PeftAdapter:
        """Reads the adapter for a model with declarations ``specs``; see
        :func:`read_peft_adapter`."""
        strange = [name for name in self._stored if not name.startswith(PREFIX)]
        refuse_tensors(f"tensors without PEFT's prefix {PREFIX}", strange, self._folder)
        self._stored = {
            name.removeprefix(PREFIX): tensor for name, tensor in self._stored.items()
        }

        # Each takes its tensors out of those that are stored; nothing may be left.
        parts_by_site = {site.name: self._take_parts(site) for site in self._sites}
        token_ids, token_rows = self._take_token_rows()
        base_values = self._take_base_values()
        problem = "tensors that the settings or this model have no place for"
        left_over = [_describe(tensor) for tensor in self._stored.values()]
        refuse_tensors(problem, left_over, self._folder)

        if self._settings.peft_type == IA3:
            adapter = self._make_ia3_adapter()
        else:
            has_head_rows = len(token_rows) > 1
            adapter = self._make_lora_adapter(token_ids, token_head=has_head_rows)
        arrays = self._fill_arrays(adapter, specs, parts_by_site) | token_rows
        ranks = self._list_principal_ranks()
        overlap = [place.name for place in base_values if place in ranks]
        refuse_tensors("PiSSA beside a base of its own", overlap, self._folder)
        return PeftAdapter(adapter, arrays, base_values, ranks)

    def _list_principal_ranks(self) -> dict[ParamSlice, int]:
        """The ranks that PiSSA takes from the base; from tables PEFT takes none."""
        if not self._settings.pissa:
            return {}
        ranks: dict[ParamSlice, int] = {}
        for site in self._sites:
            is_table = isinstance(site, MapSite) and site.is_table
            if not is_table:
                ranks[site.places[0]] = self._settings.get_rank(site.name)
        return ranks

    def _take(self, name: str, shape: Shape) -> np.ndarray:
        """Takes a tensor out of those that are left."""
        stored = self._stored.pop(name, None)
        if stored is None:
            refuse_tensors(
                "the settings mean tensors that the file lacks", [name], self._folder
            )
            raise AssertionError
        if stored.shape != shape:
            problem = f"{name} is {[*stored.shape]}, and {[*shape]} by the settings and this model"
            raise MaxlmError(problem, where=str(self._folder), fix=_OTHER_BASE)
        return _read_values(stored)

    def _take_parts(self, site: AdapterSite) -> Arrays:
        settings = self._settings
        if settings.peft_type == IA3:
            assert isinstance(site, MapSite)
            of_inputs = matches_pattern(settings.modules.feedforward_modules, site.name)
            shape = site.get_factor_shape(of_inputs=of_inputs)
            return {"ia3": self._take(f"{site.prefix}.{IA3_TENSOR}", shape)}
        rank = settings.get_rank(site.name)
        is_table = isinstance(site, MapSite) and site.is_table
        shape_a, shape_b = site.get_lora_shapes(rank)
        shapes: dict[str, Shape] = {"lora_a": shape_a, "lora_b": shape_b}
        if settings.dora:
            shapes["lora_magnitude"] = shape_b[:1]
        names = TABLE_PARTS if is_table else LORA_PARTS
        their_names = {ours: theirs for theirs, ours in names.items()}
        return {
            part: self._take(f"{site.prefix}.{their_names[part]}", shape)
            for part, shape in shapes.items()
        }

    def _take_token_rows(self) -> tuple[tuple[int, ...], Arrays]:
        """Takes the trained rows of the table of tokens and of the head: their ids, and
        the arrays by name."""
        catalog = self._catalog
        arrays: Arrays = {}
        ids: tuple[int, ...] = ()
        for name, indices in self._settings.token_indices.items():
            modules = [module for module in catalog.sites if module.endswith(name)]
            if not name:
                module = catalog.input_table
            else:
                module = modules[0] if modules else name
            is_table_or_head = module in (catalog.input_table, catalog.head)
            is_known = is_table_or_head and len(modules) != 0
            has_same_ids = not ids or ids == indices
            is_target = any(site.name == module for site in self._sites)
            is_adapted_otherwise = is_target or module in self._saved
            if not is_known or not has_same_ids or is_adapted_otherwise:
                problem = (
                    f"trainable_token_indices of {module} is implemented for the table"
                    " of tokens and the head, with the same ids, where nothing else"
                    " adapts them"
                )
                raise MaxlmError(problem, where=str(self._settings.path), fix=MERGE)
            ids = indices
            site = catalog.sites[module]
            # A table maps tokens to vectors, a head vectors to tokens.
            if module == catalog.head:
                vocab_size = site.num_outputs
                width = site.num_inputs
            else:
                vocab_size = site.num_inputs
                width = site.num_outputs
            if not all(0 <= index < vocab_size for index in ids):
                raise MaxlmError(
                    f"trainable_token_indices={[*ids]}, and {module} has {vocab_size} "
                    "rows",
                    where=str(self._settings.path),
                    fix=_OTHER_BASE,
                )
            values = self._take(f"{module}.{TOKEN_ROWS}", (len(ids), width))
            arrays[f"{site.places[0].name}.{OUR_TOKEN_ROWS}"] = values
        table = catalog.sites[catalog.input_table].places[0].name
        if arrays and f"{table}.{OUR_TOKEN_ROWS}" not in arrays:
            problem = "trainable_token_indices of the head alone is not implemented"
            raise MaxlmError(problem, where=str(self._settings.path), fix=MERGE)
        return ids, arrays

    def _take_base_values(self) -> dict[ParamSlice, np.ndarray]:
        """Takes the base's tensors that the file holds: of modules that are saved
        whole, biases, and whatever else has the name that it has in PEFT's model, which
        reads it."""
        catalog = self._catalog
        adapted = {site.name for site in self._sites}
        values: dict[ParamSlice, np.ndarray] = {}
        for name, entry in catalog.tensors.items():
            module, _, kind = name.rpartition(".")
            is_saved = module in self._saved or any(
                module.startswith(f"{parent}.") for parent in self._saved
            )
            stored_name = name
            if module in adapted and not is_saved:
                stored_name = f"{module}.base_layer.{kind}"
            if stored_name not in self._stored and not is_saved:
                continue
            tensor = self._take(stored_name, entry.shape)
            self._check_tie(name, entry, is_saved=is_saved)
            pieces = entry.split(tensor)
            for place, piece in zip(entry.ours, pieces, strict=True):
                values[place] = np.asarray(piece, np.float32)
            # A tied tensor may be stored twice; another value under its second name is
            # left over, and so refused.
            for alias in entry.aliases:
                stored_again = self._stored.get(alias)
                if stored_again is None:
                    continue
                if np.array_equal(_read_values(stored_again), tensor):
                    del self._stored[alias]
        return values

    def _check_tie(self, name: str, entry: TensorEntry, *, is_saved: bool) -> None:
        """Refuses a copy of one of two modules that share a table: PEFT unties them."""
        if is_saved and entry.aliases:
            problem = f"modules_to_save of {name}, which this model ties to {entry.aliases[0]}"
            raise MaxlmError(problem, where=str(self._settings.path), fix=MERGE)

    def _make_ia3_adapter(self) -> Ia3Adapter:
        settings = self._settings.modules
        outputs: list[AdapterSite] = []
        inputs: list[AdapterSite] = []
        for site in self._sites:
            of_inputs = matches_pattern(settings.feedforward_modules, site.name)
            (inputs if of_inputs else outputs).append(site)
        return Ia3Adapter(
            targets=_name_targets(outputs), input_targets=_name_targets(inputs)
        )

    def _make_lora_adapter(
        self, token_ids: tuple[int, ...], *, token_head: bool
    ) -> LoraAdapter:
        settings = self._settings
        fused = [site for site in self._sites if len(site.places) > 1]
        if settings.pissa and fused:
            problem = f"PiSSA of {fused[0].name}, which is several maps here, is not implemented"
            raise MaxlmError(problem, where=str(settings.path), fix=MERGE)
        return LoraAdapter(
            rank=max(settings.get_rank(site.name) for site in self._sites),
            alpha=settings.alpha,
            rank_stabilized=settings.rank_stabilized,
            dora=settings.dora,
            init="pissa" if settings.pissa else "default",
            targets=_name_targets(self._sites),
            token_ids=token_ids,
            token_head=token_head,
            dropout=settings.dropout,
        )

    def _fill_arrays(
        self, adapter: Adapter, specs: Params, parts_by_site: Mapping[str, Arrays]
    ) -> Arrays:
        """Returns the adapter's arrays. Where layers or maps have none there, or lower
        ranks, they hold what changes nothing and stays so in training: zeros, of which
        both A and B are."""
        parts = {*LORA_PARTS.values(), *IA3_PARTS.values()}
        # NaN marks magnitudes that are not there: what they are is known when the base
        # is (``AdaptedParamWriter``).
        fills = {"ia3": 1.0, "lora_magnitude": np.nan}
        arrays: Arrays = {}
        for name, spec in flatten_names(adapter.adapt(specs)).items():
            part = name.rpartition(".")[2]
            if part in parts:
                arrays[name] = np.full(spec.shape, fills.get(part, 0.0), np.float32)

        for site in self._sites:
            for part, tensor in parts_by_site[site.name].items():
                if part == "lora_b" and isinstance(adapter, LoraAdapter):
                    # Our adapter has one scale; where a module has another, B has it.
                    scale = self._settings.compute_scale(site.name) / adapter.scale
                    tensor = tensor * np.float32(scale)
                pieces = site.split_tensor(part, tensor)
                for place, piece in zip(site.places, pieces, strict=True):
                    array = arrays[f"{place.name}.{part}"][place.index]
                    # A lower rank than the adapter's fills the first of its ranks.
                    filled = tuple(slice(size) for size in piece.shape)
                    array[filled] = piece
        return arrays


def _read_values(stored: StoredTensor) -> np.ndarray:
    values = read_tensor(stored, np.dtype(np.float32), lossy=True)
    if not np.isfinite(values).all():
        problem = f"{stored.name} holds values that are infinite or no numbers"
        raise MaxlmError(problem, where=str(stored.path), fix="train the adapter again")
    return values


def _describe(stored: StoredTensor) -> str:
    return f"{stored.name} {[*stored.shape]}"


def _name_targets(sites: Iterable[AdapterSite]) -> tuple[str, ...]:
    """Returns the names of maps as ``adapter.targets`` has them."""
    targets = [
        place.name.removesuffix(".kernel").removesuffix(".table")
        for site in sites
        for place in site.places
    ]
    return tuple(dict.fromkeys(targets))  # each once


def refuse_tensors(
    problem: str, names: Sequence[str], folder: Path, fix: str = _WRITE_AGAIN
) -> None:
    """Raises MaxlmError naming the first of some tensors, if there are any."""
    if not names:
        return
    ordered = sorted(names)
    shown = ", ".join(ordered[:4])
    if len(ordered) > 4:
        shown += f" and {len(ordered) - 4} more"
    raise MaxlmError(f"{problem}: {shown}", where=str(folder), fix=fix)
