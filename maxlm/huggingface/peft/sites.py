"""The places where PEFT puts adapters in a published model: which of its settings'
names mean which, the names of their tensors, and how these become our arrays and come
from them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.families.names import ParamSlice, TensorEntry
from maxlm.huggingface.peft.settings import MERGE, ModuleSettings, NamePattern, Names

Arrays = dict[str, np.ndarray]

# PEFT's names of an adapter's tensors behind the module's, and ours behind the
# parameter's.
LORA_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "lora_magnitude",
}
TABLE_PARTS = {
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "lora_magnitude",
}
IA3_TENSOR = "ia3_l"
IA3_PARTS = {IA3_TENSOR: "ia3"}
ALL_LINEAR = "all-linear"
# What experts and their routers were called as modules.
EXPERT_NAMES = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
# Modules without tensors, which a name might mean and PEFT refuses to adapt.
_BARE_MODULES = (
    "act",
    "act_fn",
    "dropout",
    "attn_dropout",
    "resid_dropout",
    "rotary_emb",
)


@dataclass(frozen=True)
class AdapterSite:
    """A map or a table that an adapter may stand at."""

    name: str
    """What patterns of ranks are matched with: a module, or a parameter of one."""
    prefix: str
    """What its tensors' names begin with, as ``model.layers.0.self_attn.q_proj``."""
    places: tuple[ParamSlice, ...]
    """Parameters of ours that it holds, in its own order."""

    def get_lora_shapes(self, rank: int) -> tuple[Shape, Shape]:
        """Returns the shapes of A and B there."""
        raise NotImplementedError

    def split_tensor(self, part: str, tensor: np.ndarray) -> list[np.ndarray]:
        """Splits a tensor there into an array a place, of the shape at its index."""
        raise NotImplementedError

    def join_lora(self, parts: Sequence[Arrays]) -> Arrays:
        """Joins A and B of each place (none: {}) into A, B and magnitudes there."""
        raise NotImplementedError


@dataclass(frozen=True)
class MapSite(AdapterSite):
    """A module with one matrix, or a table of tokens."""

    entry: TensorEntry

    @property
    def is_table(self) -> bool:
        return self.places[0].name.endswith(".table")

    @property
    def num_inputs(self) -> int:
        return prod(self.entry.input_shape)

    @property
    def num_outputs(self) -> int:
        return prod(self.entry.convert_outputs().shape)

    def get_lora_shapes(self, rank: int) -> tuple[Shape, Shape]:
        return (rank, self.num_inputs), (self.num_outputs, rank)

    def get_factor_shape(self, *, of_inputs: bool) -> Shape:
        """Returns the shape of IA3's factors there."""
        return (1, self.num_inputs) if of_inputs else (self.num_outputs, 1)

    def split_tensor(self, part: str, tensor: np.ndarray) -> list[np.ndarray]:
        split_outputs = self.entry.convert_outputs().split
        inputs = self.entry.input_shape
        # Inputs are the same for all places: [rank, inputs] → [*inputs, rank].
        if part == "lora_a":
            return [tensor.T.reshape(*inputs, -1)] * len(self.places)
        if part == "ia3" and len(tensor) == 1:
            return [tensor.reshape(inputs)] * len(self.places)
        # Outputs are those of all places: [outputs, rank] → [rank, *outputs] each.
        if part == "lora_b":
            pieces_by_rank = [split_outputs(column) for column in tensor.T]
            return [np.stack(pieces) for pieces in zip(*pieces_by_rank, strict=True)]
        return [*split_outputs(tensor.reshape(-1))]

    def join_lora(self, parts: Sequence[Arrays]) -> Arrays:
        join_outputs = self.entry.convert_outputs().join
        zeros = [np.zeros(shape, np.float32) for shape in self._output_shapes]
        # Places with an A of their own have ranks of their own, where the outputs of
        # the others are zeros.
        rows_of_a: list[np.ndarray] = []
        columns_of_b: list[np.ndarray] = []
        for a, place_indices in _group_by_input_map(parts):
            rank = a.shape[-1]
            rows_of_a.append(a.reshape(-1, rank).T)
            for rank_index in range(rank):
                pieces = [*zeros]
                for place_index in place_indices:
                    pieces[place_index] = parts[place_index]["lora_b"][rank_index]
                columns_of_b.append(join_outputs(pieces))
        joined = {
            "lora_a": np.concatenate(rows_of_a),
            "lora_b": np.stack(columns_of_b, axis=1),
        }
        if any("lora_magnitude" in arrays for arrays in parts):
            magnitudes = [arrays["lora_magnitude"] for arrays in parts]
            joined["lora_magnitude"] = join_outputs(magnitudes)
        return joined

    def join_factors(self, parts: Sequence[Arrays], *, of_inputs: bool) -> np.ndarray:
        """Joins IA3's factors; maps that have none there get ones."""
        if of_inputs:
            return parts[0]["ia3"].reshape(1, -1)
        ones = [np.ones(shape, np.float32) for shape in self._output_shapes]
        pieces = [
            arrays.get("ia3", one) for arrays, one in zip(parts, ones, strict=True)
        ]
        return self.entry.convert_outputs().join(pieces)[:, None]

    @property
    def _output_shapes(self) -> list[Shape]:
        num_input_dims = len(self.entry.input_shape)
        return [piece.shape[num_input_dims:] for piece in self.entry.pieces]


@dataclass(frozen=True)
class ExpertsSite(AdapterSite):
    """A parameter of transformers' with all experts of a layer, [E, outputs, inputs];
    gates and the maps beside them are one. A is [rank · E, inputs] there, expert by
    expert, and B [outputs, rank · E], rank by rank (``ParamWrapper`` of PEFT)."""

    num_experts: int
    num_inputs: int
    sizes: tuple[int, ...]
    """Outputs of each place."""

    def get_lora_shapes(self, rank: int) -> tuple[Shape, Shape]:
        columns = rank * self.num_experts
        return (columns, self.num_inputs), (sum(self.sizes), columns)

    def split_tensor(self, part: str, tensor: np.ndarray) -> list[np.ndarray]:
        """Splits A into [E, inputs, rank], B into [E, rank, outputs] a place."""
        if part == "lora_a":
            # [E · rank, inputs] → [E, inputs, rank].
            a = tensor.reshape(self.num_experts, -1, self.num_inputs).transpose(0, 2, 1)
            return [a] * len(self.places)
        # [outputs of all places, rank · E] → [E, rank, outputs of all places].
        b = tensor.reshape(len(tensor), -1, self.num_experts).transpose(2, 1, 0)
        return np.split(b, np.cumsum(self.sizes)[:-1], axis=-1)

    def join_lora(self, parts: Sequence[Arrays]) -> Arrays:
        a_by_rank: list[np.ndarray] = []  # [E, rank, inputs]
        b_by_rank: list[np.ndarray] = []  # [E, rank, outputs of all places]
        starts = np.cumsum((0, *self.sizes))
        num_outputs = starts[-1]
        for a, place_indices in _group_by_input_map(parts):
            rank = a.shape[-1]
            b = np.zeros((self.num_experts, rank, num_outputs), np.float32)
            for place_index in place_indices:
                outputs = slice(starts[place_index], starts[place_index + 1])
                b[..., outputs] = parts[place_index]["lora_b"]
            a_by_rank.append(a.transpose(0, 2, 1))
            b_by_rank.append(b)
        joined_a = np.concatenate(a_by_rank, axis=1).reshape(-1, self.num_inputs)
        joined_b = np.concatenate(b_by_rank, axis=1).transpose(2, 1, 0)
        return {"lora_a": joined_a, "lora_b": joined_b.reshape(num_outputs, -1)}


def _group_by_input_map(parts: Sequence[Arrays]) -> list[tuple[np.ndarray, list[int]]]:
    """Returns each A with the indices of the places that have it: those of one module
    of PEFT's share one, those that were trained here have one each."""
    groups: list[tuple[np.ndarray, list[int]]] = []
    for place_index, arrays in enumerate(parts):
        if not arrays:
            continue
        for a, place_indices in groups:
            if np.array_equal(a, arrays["lora_a"]):
                place_indices.append(place_index)
                break
        else:
            groups.append((arrays["lora_a"], [place_index]))
    return groups


@dataclass(frozen=True)
class ModuleCatalog:
    """The modules of a published model, by the names that PEFT sees."""

    sites: Mapping[str, MapSite]
    """Maps and tables."""
    experts: Mapping[str, ExpertsSite]
    """Parameters of experts, by their name behind the module's."""
    routers: Mapping[str, MapSite]
    """Routers, which are no linear modules but have a parameter ``weight``."""
    tensors: Mapping[str, TensorEntry]
    """All tensors but those of experts."""
    head: str | None
    """The module of the output's logits."""
    modules: frozenset[str] = field(default=frozenset())
    """All modules with tensors, and those that hold some."""

    @property
    def input_table(self) -> str:
        """The name of the table of tokens."""
        tables = (name for name, site in self.sites.items() if site.is_table)
        return next(tables)


def list_modules(entries: Iterable[TensorEntry]) -> ModuleCatalog:
    """Lists the modules of a published model with these tensors."""
    sites: dict[str, MapSite] = {}
    routers: dict[str, MapSite] = {}
    tensors: dict[str, TensorEntry] = {}
    # Experts' tensors by (feed-forward's module, kind of map).
    stacks: dict[tuple[str, str], list[TensorEntry]] = {}
    head = None
    for entry in entries:
        module = entry.theirs.rpartition(".")[0]
        place = entry.ours[0]
        if len(place.index) > 1:
            # An expert's map: the module of all experts, and which of its maps.
            block = module.rpartition(".experts.")[0]
            kind = place.name.rpartition(".")[2]
            stacks.setdefault((block, kind), []).append(entry)
            continue
        tensors[entry.theirs] = entry
        is_table = place.name == "embedding.table"
        is_vector = entry.pieces[0].num_input_dims == 0 and not is_table
        if not entry.theirs.endswith(".weight") or is_vector:
            continue
        site = MapSite(module, module, entry.ours, entry)
        if place.name.endswith(".router"):
            routers[f"{_rename_block(module)}.weight"] = site
        else:
            sites[module] = site
        if place.name in ("head.kernel", "heads.score.kernel"):
            head = module
    experts = _list_experts(stacks)
    modules = {name.rpartition(".")[0] for name in tensors}
    modules |= {site.prefix for site in experts.values()}
    # "model.layers.0.mlp" lies in "model.layers.0", "model.layers" and "model".
    parents: set[str] = set()
    for name in modules:
        parents |= {name[: dot.start()] for dot in re.finditer(r"\.", name)}
    return ModuleCatalog(
        sites=sites,
        experts=experts,
        routers=routers,
        tensors=tensors,
        head=head,
        modules=frozenset(modules | parents),
    )


def _rename_block(name: str) -> str:
    """The name of Mixtral's feed-forward in transformers 5, where files have an older
    one."""
    return name.replace(".block_sparse_moe", ".mlp")


def _list_experts(
    stacks: Mapping[tuple[str, str], Sequence[TensorEntry]],
) -> dict[str, ExpertsSite]:
    sites: dict[str, ExpertsSite] = {}
    for block in dict.fromkeys(block for block, _ in stacks):
        module = f"{_rename_block(block)}.experts"
        for name, kinds in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            if any((block, kind) not in stacks for kind in kinds):
                continue
            # The first expert's map of each kind; all experts' have its shape.
            first_entries = [stacks[block, kind][0] for kind in kinds]
            places = []
            for entry in first_entries:
                param_slice = entry.ours[0]
                layer_index = param_slice.index[:1]  # of all experts
                places.append(ParamSlice(param_slice.name, layer_index))
            shapes = [entry.pieces[0].shape for entry in first_entries]
            key = f"{module}.{name}"
            sites[key] = ExpertsSite(
                name=key,
                prefix=module,
                places=tuple(places),
                num_experts=len(stacks[block, kinds[0]]),
                num_inputs=prod(shapes[0][:-1]),
                sizes=tuple(shape[-1] for shape in shapes),
            )
    return sites


def find_target_sites(
    chosen: ModuleSettings, catalog: ModuleCatalog, where: str
) -> list[AdapterSite]:
    """Finds the sites that settings mean. Raises MaxlmError where they mean none, or
    what cannot be adapted, as PEFT does."""
    if catalog.experts:
        _check_named_apart(chosen, where)
    sites: list[AdapterSite] = []
    for name in sorted(catalog.modules):
        if not is_targeted(chosen, name, catalog):
            continue
        if name not in catalog.sites:
            problem = f"target_modules means {name}, which is no linear map or table of tokens"
            raise MaxlmError(problem, where=where, fix="name maps such as q_proj")
        sites.append(catalog.sites[name])
    if not isinstance(chosen.target_modules, str):
        bare = {*chosen.target_modules} & {*_BARE_MODULES}
        if bare:
            problem = f"target_modules means {min(bare)}, which is no linear map"
            raise MaxlmError(problem, where=where, fix="name maps such as q_proj")
    sites += _find_parameter_sites(chosen.target_parameters, catalog, where)
    if not sites:
        problem = "target_modules and target_parameters mean no map of this model"
        raise MaxlmError(
            problem, where=where, fix="name the base that the adapter was made for"
        )
    return sites


def _check_named_apart(chosen: ModuleSettings, where: str) -> None:
    """Refuses what PEFT turns into parameters of experts where a model has some: it
    guesses which module was meant by a name that older versions of transformers had."""
    targets = chosen.target_modules
    if isinstance(targets, str):
        problem = f"target_modules={targets!r} on a model with routed experts"
    else:
        old_names = sorted(
            name for name in targets if name.rpartition(".")[2] in EXPERT_NAMES
        )
        if not old_names:
            return
        problem = f"target_modules means experts by {old_names[0]!r}"
    fix = "load and save it with PEFT, which then names target_parameters"
    raise MaxlmError(problem, where=where, fix=fix)


def _find_parameter_sites(
    targets: Names, catalog: ModuleCatalog, where: str
) -> list[AdapterSite]:
    """Finds the sites of parameters that are adapted themselves."""
    if not targets:
        return []
    chosen = [site for key, site in catalog.experts.items() if _ends_with(key, targets)]
    sites: list[AdapterSite] = [*nest_experts(chosen)]
    for key, site in catalog.routers.items():
        if _ends_with(key, targets):
            module = key.removesuffix(".weight")
            sites.append(MapSite(key, module, site.places, site.entry))
    for name in catalog.tensors:
        if _ends_with(name, targets) and _rename_block(name) not in catalog.routers:
            problem = f"target_parameters means {name}, which is not an expert's or a router's"
            raise MaxlmError(problem, where=where, fix=MERGE)
    return sites


def nest_experts(sites: Sequence[ExpertsSite]) -> list[ExpertsSite]:
    """Returns adapted parameters under the names of their tensors. PEFT wraps those of
    one module one in the other, in the order of the module's parameters: tensors of the
    inner one are named behind ``base_layer``."""
    outermost = {site.prefix: site for site in sites}
    nested: list[ExpertsSite] = []
    for site in sites:
        if outermost[site.prefix] is site:
            nested.append(site)
        else:
            nested.append(replace(site, prefix=f"{site.prefix}.base_layer"))
    return nested


def _ends_with(name: str, ends: NamePattern) -> bool:
    """Returns whether a name is one of some, or ends in one behind a dot."""
    return name in ends or any(name.endswith(f".{end}") for end in ends)


def matches_pattern(pattern: NamePattern, name: str) -> bool:
    """Returns whether PEFT's setting, an expression or a list, means a module."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return _ends_with(name, pattern)


def is_targeted(chosen: ModuleSettings, name: str, catalog: ModuleCatalog) -> bool:
    """Returns whether PEFT's settings mean a module (``check_target_module_exists``
    there)."""
    if chosen.exclude_modules and matches_pattern(chosen.exclude_modules, name):
        return False
    # PEFT leaves out what lies in a module that is saved whole, too.
    is_saved = any(
        re.match(rf"(^|.*\.){end}($|\..*)", name) for end in chosen.modules_to_save
    )
    if is_saved:
        return False
    targets = chosen.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        site = catalog.sites.get(name)
        return site is not None and not site.is_table and name != catalog.head
    if not matches_pattern(targets, name):
        return False
    if chosen.layers_to_transform is None:
        return True
    # An expression, or a name in full, means a module whatever its layer.
    if isinstance(targets, str) or name in targets:
        return True
    layer = find_layer(name, chosen.layers_pattern)
    return layer is not None and layer in chosen.layers_to_transform


def find_layer(name: str, patterns: Sequence[str]) -> int | None:
    """Returns the number of a module's layer: the first number in its name, or that
    behind a pattern; None: it lies in no layer."""
    if not patterns:
        # model.layers.0.self_attn.q_proj → 0; the last part is no layer.
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        return int(match["index"]) if match else None
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"])
    return None


def find_saved_modules(
    chosen: ModuleSettings, catalog: ModuleCatalog
) -> frozenset[str]:
    """Finds the modules that an adapter's file holds whole: PEFT takes every module
    whose name ends so, in the middle of a word too."""
    ends = chosen.modules_to_save
    return frozenset(
        name for name in catalog.modules if any(name.endswith(end) for end in ends)
    )
