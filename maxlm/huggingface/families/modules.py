"""Modules that predict further tokens (``model.mtp``) in published files.

DeepSeek-V3's files have a module as one more layer behind the last, other families'
under names of their own. transformers leaves these tensors out when it loads a model,
and so out of what it saves, whose config.json still tells of them: how many modules a
model has is decided by the names in the files.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from maxlm.huggingface.families.names import NameTable, copy, linear
from maxlm.huggingface.families.reader import ConfigReader

LAYER = "model.layers.{layer}"
"""A layer of the families that have modules."""
_MOST_MODULES = 16
"""Modules that a model may have (``MtpConfig``)."""


def _take_last_layer(reader: ConfigReader, settings: dict[str, Any]) -> None:
    """Returns nothing: a module's layer is as the model's last."""


@dataclass(frozen=True)
class ModuleNames:
    """How a family's files name the modules that predict further tokens. Names hold
    ``{layer}``, the number of a layer behind the model's last, or ``{module}``, which
    counts from 0; parameters are named as within a module."""

    layer: str
    """Beginning of the names of a module's layer, in place of ``LAYER``."""
    table: NameTable
    """What a module has beside its layer."""
    count_key: str = "num_nextn_predict_layers"
    """Key of config.json with their number."""
    count_alias: str = "num_mtp_layers"
    """Another name of that key."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the model that files hold again for a module, by the copy's name."""
    marks: tuple[str, ...] = (f"{LAYER}.eh_proj.weight",)
    """Names by which a module is known: files with these have all its tensors."""
    suffixes: Mapping[str, str] = field(default_factory=dict)
    """Ends of names in a model's layer, and in a module's where they differ."""
    most: int = _MOST_MODULES
    """Modules that the names can tell apart."""
    read_layer: Callable[[ConfigReader, dict[str, Any]], Any] = _take_last_layer
    """Reads the settings of a module's layer, or its kind's name; None: that of the
    last layer. It is told the settings of the model, and may add kinds."""

    def make_table(self, layer_table: NameTable) -> NameTable:
        """Returns the table of all that modules have; ``layer_table``: the model's."""
        table = dict(self.table)
        for name, rule in layer_table.items():
            if name.startswith(f"{LAYER}."):
                table[self._name_in_module(name.removeprefix(LAYER))] = rule
        return table

    def _name_in_module(self, end: str) -> str:
        for usual, other in self.suffixes.items():
            if end.endswith(usual):
                end = end.removesuffix(usual) + other
        return self.layer + end

    def list_marks(self, num_modules: int, num_layers: int) -> list[str]:
        """Lists the names by which that many modules are known."""
        return [
            mark.format(layer=num_layers + module, module=module)
            for module in range(num_modules)
            for mark in self.marks
        ]

    def read(
        self, reader: ConfigReader, settings: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Reads settings of ``model.mtp`` from the names of tensors, and from
        config.json where that tells of fewer modules; None: there are none."""
        configured = reader.size(
            self.count_key, None, least=0, alias=self.count_alias, nullable=True
        )
        most = self.most if configured is None else min(configured, self.most)
        num_modules = self._count_in(reader.tensors, settings["num_layers"], most)
        if not num_modules:
            return None
        mtp: dict[str, Any] = {"num_modules": num_modules}
        layer = self.read_layer(reader, settings)
        if layer is not None:
            mtp["layer"] = layer
        return mtp

    def _count_in(self, names: Collection[str], num_layers: int, most: int) -> int:
        for module in range(most):
            marks = [
                mark.format(layer=num_layers + module, module=module)
                for mark in self.marks
            ]
            if not all(mark in names for mark in marks):
                return module
        return most

    def list_copies(
        self, num_modules: int, num_layers: int
    ) -> Mapping[str, tuple[str, ...]]:
        """Lists the copies of each tensor of the model that files hold for modules."""
        copies: dict[str, tuple[str, ...]] = {}
        for module in range(num_modules):
            for copy_name, name in self.copies.items():
                full_name = copy_name.format(layer=num_layers + module, module=module)
                copies[name] = (*copies.get(name, ()), full_name)
        return copies


def _map_module(join: str, token: str, hidden: str, output: str) -> NameTable:
    """Returns the entries of what a module has beside its layer, by their names. The map
    that joins both reads the embedding first, as ours does."""
    return {
        f"{join}.weight": linear("join.kernel"),
        f"{token}.weight": copy("token_norm.scale"),
        f"{hidden}.weight": copy("hidden_norm.scale"),
        f"{output}.weight": copy("output_norm.scale"),
    }


DEEPSEEK_MODULES = ModuleNames(
    LAYER,
    _map_module(
        f"{LAYER}.eh_proj",
        f"{LAYER}.enorm",
        f"{LAYER}.hnorm",
        f"{LAYER}.shared_head.norm",
    ),
    copies={
        f"{LAYER}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{LAYER}.shared_head.head.weight": "lm_head.weight",
    },
)
"""DeepSeek-V3's names (arXiv 2412.19437, its published files), which GLM's are too."""
FINAL_NORM_MODULES = ModuleNames(
    LAYER,
    _map_module(
        f"{LAYER}.eh_proj",
        f"{LAYER}.enorm",
        f"{LAYER}.hnorm",
        f"{LAYER}.final_layernorm",
    ),
)
"""The same without copies, and with another name of the norm behind the layer."""
APART = "mtp.layers.{module}"
"""A module's layer under :func:`map_modules_apart`."""


def map_modules_apart(
    read_layer: Callable[[ConfigReader, dict[str, Any]], Any],
    count_key: str,
    *marks: str,
) -> ModuleNames:
    """Returns the names of a module beside the model, as in Qwen3-Next's files, which
    have one; further ones would share its map and norms.

    Args:
        marks: further names by which it is known.
    """
    table = _map_module(
        "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"
    )
    return ModuleNames(
        APART,
        table,
        count_key=count_key,
        marks=("mtp.fc.weight", *marks),
        most=1,
        read_layer=read_layer,
    )
