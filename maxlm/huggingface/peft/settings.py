"""``adapter_config.json``, read and checked: each key that PEFT 0.21 writes, with its
default.

What PEFT refuses is refused here. So is what would make PEFT another model than maxlm:
a key that maxlm has no word for, unless its value says that it is off.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.runtime.json_files import read_json_object

CONFIG = "adapter_config.json"
LORA = "LORA"
IA3 = "IA3"
PREFIX_TUNING = "PREFIX_TUNING"
PROMPT_TUNING = "PROMPT_TUNING"
PEFT_TYPES = (LORA, IA3, PREFIX_TUNING, PROMPT_TUNING)

MERGE = "merge it with PEFT (merge_and_unload) and convert the model"
_SAVE_AGAIN = "write it again with save_pretrained"
_CORRECT = "correct it, or write the adapter again with PEFT's save_pretrained"

# Notes of who wrote the file and how; no maths.
_NOTES = (
    *("peft_type", "auto_mapping", "base_model_name_or_path", "inference_mode"),
    *("peft_version", "revision", "runtime_config"),
)
# Each switches on another computation, unless it is null.
_OTHER_LORA_KINDS = (
    *(
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "eva_config",
        "kasa_config",
    ),
    *("layer_replication", "lora_ga_config", "megatron_config", "monteclora_config"),
    *("use_bdlora", "velora_config"),
)
# Ways to begin that leave the base as it is, and the one that maxlm repeats.
_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa")
_BIASES = ("none", "all", "lora_only")

Names = tuple[str, ...]
NamePattern = str | Names
"""A regular expression of whole names, or names and ends of names behind a dot."""


@dataclass(frozen=True)
class ModuleSettings:
    """The choice of modules, as PEFT matches their names."""

    target_modules: NamePattern = ()
    exclude_modules: NamePattern = ()
    feedforward_modules: NamePattern = ()
    """Of IA3: those whose inputs are scaled."""
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: Names = ()
    target_parameters: Names = ()
    modules_to_save: Names = ()
    """Ends of the names of modules that the file holds whole."""


@dataclass(frozen=True)
class PeftSettings:
    """An ``adapter_config.json`` that maxlm implements."""

    path: Path
    peft_type: str
    task_type: str | None = None
    modules: ModuleSettings = ModuleSettings()
    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    dora: bool = False
    pissa: bool = False
    dropout: float = 0.0
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Rows of tables that the file holds, by the table's name; "" is that of the
    input."""
    num_virtual_tokens: int = 0
    num_layers: int | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None

    def get_rank(self, name: str) -> int:
        """Returns the rank of a module, or of a parameter, by its name."""
        for pattern, rank in self.rank_pattern.items():
            if _matches(pattern, name):
                return rank
        return self.rank

    def compute_scale(self, name: str) -> float:
        """Returns what A · B of a module is multiplied by."""
        alphas = [
            alpha
            for pattern, alpha in self.alpha_pattern.items()
            if _matches(pattern, name)
        ]
        alpha = alphas[0] if alphas else self.alpha
        rank = self.get_rank(name)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def read_peft_settings(path: Path, task_types: Sequence[str | None]) -> PeftSettings:
    """Reads the settings of an adapter for a model with one of ``task_types``. Raises
    MaxlmError with the first key that PEFT refuses or that maxlm has no word for."""
    values = read_json_object(path, _SAVE_AGAIN)
    if "peft_type" not in values:
        problem = "no settings of a PEFT adapter (a JSON object with peft_type)"
        raise MaxlmError(problem, where=str(path), fix=_SAVE_AGAIN)
    if values["peft_type"] not in PEFT_TYPES:
        problem = f"peft_type={values['peft_type']!r} is not implemented"
        raise MaxlmError(problem, where=str(path), fix=MERGE)
    reader = _SettingsReader(values, path)
    reader.skip(*_NOTES)
    task_type = reader.read_choice("task_type", task_types, None)
    if values["peft_type"] == LORA:
        settings = _read_lora(reader, task_type)
    elif values["peft_type"] == IA3:
        settings = _read_ia3(reader, task_type)
    else:
        settings = _read_virtual_tokens(reader, task_type, values["peft_type"])
    reader.check_all_read()
    return settings


def _read_lora(reader: "_SettingsReader", task_type: str | None) -> PeftSettings:
    init = reader.read_choice("init_lora_weights", _LORA_INITS, True, MERGE)
    # Checked alone: the file's biases say which were trained.
    reader.read_choice("bias", _BIASES, "none")
    for name in ("lora_bias", "use_qalora", "ensure_weight_tying"):
        reader.require_off(name, reader.read_flag(name))
    for name in _OTHER_LORA_KINDS:
        if name == "eva_config" and init == "eva":
            reader.skip(name)  # It says how the weights began.
        else:
            reader.require_off(name, reader.take(name, None) is not None)
    # Of modules PEFT sets it by their class.
    fan_in_fan_out = reader.read_flag("fan_in_fan_out")
    reader.skip("loftq_config", "megatron_core", "qalora_group_size")
    dropout = reader.read_number("lora_dropout", 0.0)
    if not 0 <= dropout <= 1:
        reader.refuse("lora_dropout", dropout, "no probability")
    modules = reader.read_lora_modules()
    dora = reader.read_flag("use_dora")
    for key, value in (
        ("fan_in_fan_out", fan_in_fan_out),
        ("lora_dropout", dropout),
        ("use_dora", dora),
    ):
        if modules.target_parameters and value:
            reader.refuse(key, value, "nothing that PEFT has for target_parameters")
    rank = reader.read_count("r", 8)
    if init == "orthogonal" and rank % 2:
        reader.refuse(
            "r", rank, "odd, and init_lora_weights=orthogonal wants an even rank"
        )
    return PeftSettings(
        reader.path,
        LORA,
        task_type,
        modules,
        rank=rank,
        alpha=reader.read_positive("lora_alpha", 8),
        rank_pattern=reader.read_patterns("rank_pattern", is_count=True),
        alpha_pattern=reader.read_patterns("alpha_pattern", is_count=False),
        rank_stabilized=reader.read_flag("use_rslora"),
        dora=dora,
        pissa=init == "pissa",
        dropout=float(dropout),
        token_indices=reader.read_token_indices("trainable_token_indices"),
    )


def _read_ia3(reader: "_SettingsReader", task_type: str | None) -> PeftSettings:
    reader.read_flag("fan_in_fan_out")
    reader.read_flag("init_ia3_weights", True)
    feedforward = reader.read_name_pattern("feedforward_modules")
    modules = replace(reader.read_modules(), feedforward_modules=feedforward)
    return PeftSettings(reader.path, IA3, task_type, modules)


def _read_virtual_tokens(
    reader: "_SettingsReader", task_type: str | None, peft_type: str
) -> PeftSettings:
    if task_type is None:
        reader.refuse(
            "task_type", None, "not said: PEFT then gives the model no virtual tokens"
        )
    if peft_type == PREFIX_TUNING:
        # The file holds what the network between gave, so these two say nothing of it.
        reader.read_flag("prefix_projection")
        reader.skip("encoder_hidden_size")
    else:
        inits = ("RANDOM", "SAMPLE_VOCAB")
        reader.read_choice("prompt_tuning_init", inits, "RANDOM")
        reader.skip("prompt_tuning_init_text", "tokenizer_name_or_path")
        reader.require_off(
            "tokenizer_kwargs", reader.take("tokenizer_kwargs", None) is not None
        )
    reader.read_choice("num_transformer_submodules", (1, None), None)
    saved = reader.read_names("modules_to_save")
    reader.require_off("modules_to_save", bool(saved))
    return PeftSettings(
        reader.path,
        peft_type,
        task_type,
        num_virtual_tokens=reader.read_count("num_virtual_tokens", None),
        num_layers=reader.read_size("num_layers"),
        token_dim=reader.read_size("token_dim"),
        num_attention_heads=reader.read_size("num_attention_heads"),
    )


class _SettingsReader:
    """Takes keys out of a config one by one, and names those that are left."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.path = path
        self._left = dict(values)

    def refuse(self, key: str, value: object, reason: str, fix: str = _CORRECT) -> None:
        """Raises MaxlmError for a value, by default for one that PEFT refuses too."""
        shown = json.dumps(value) if not isinstance(value, float) else str(value)
        raise MaxlmError(
            f"{key}={shown[:60]} is {reason}", where=str(self.path), fix=fix
        )

    def require_off(self, key: str, is_on: bool) -> None:
        if is_on:
            raise MaxlmError(
                f"{key} is not implemented", where=str(self.path), fix=MERGE
            )

    def skip(self, *keys: str) -> None:
        for key in keys:
            self._left.pop(key, None)

    def take(self, key: str, default: object) -> Any:
        return self._left.pop(key, default)

    def check_all_read(self) -> None:
        """Refuses keys that no reader knows, but for those whose values switch nothing
        on."""
        strange = sorted(key for key, value in self._left.items() if value)
        if strange:
            names = ", ".join(strange[:4])
            problem = f"unknown to maxlm: {names}"
            raise MaxlmError(
                problem, where=str(self.path), fix=f"remove it if it is off, or {MERGE}"
            )

    def read_flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not (value is None or isinstance(value, bool)):
            self.refuse(key, value, "neither true nor false")
        return bool(value)

    def read_choice(
        self, key: str, choices: Sequence[object], default: object, fix: str = _CORRECT
    ) -> Any:
        value = self.take(key, default)
        # 1 is equal to True and no choice.
        if not any(
            value == choice and type(value) is type(choice) for choice in choices
        ):
            known = ", ".join(json.dumps(choice) for choice in choices)
            self.refuse(key, value, f"not implemented (known are {known})", fix)
        return value

    def read_number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, value, "no number")
        if not math.isfinite(value):
            self.refuse(key, value, "not finite")
        return value

    def read_positive(self, key: str, default: float) -> float:
        value = self.read_number(key, default)
        if value <= 0:
            self.refuse(key, value, "not above 0")
        return float(value)

    def read_count(self, key: str, default: int | None) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(key, value, "no whole number above 0")
        return value

    def read_size(self, key: str) -> int | None:
        return None if self._left.get(key) is None else self.read_count(key, None)

    def read_names(self, key: str) -> Names:
        value = self.take(key, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(
            isinstance(name, str) for name in value
        ):
            self.refuse(key, value, "no list of names")
        return tuple(value)

    def read_name_pattern(self, key: str) -> NamePattern:
        value = self._left.get(key)
        if not isinstance(value, str):
            return self.read_names(key)
        self.skip(key)
        self._check_expression(key, value)
        return value

    def read_patterns(self, key: str, *, is_count: bool) -> dict[str, Any]:
        """Reads numbers by regular expression; null is refused by PEFT."""
        patterns = self.take(key, {})
        if not isinstance(patterns, dict):
            self.refuse(key, patterns, "no object of numbers by name")
        numbers: dict[str, Any] = {}
        for pattern, value in patterns.items():
            self._check_expression(key, pattern)
            self._left[key] = value
            numbers[pattern] = (
                self.read_count(key, 1) if is_count else self.read_positive(key, 1)
            )
        return numbers

    def read_token_indices(self, key: str) -> dict[str, tuple[int, ...]]:
        value = self.take(key, None)
        if value is None:
            return {}
        tables = value if isinstance(value, dict) else {"": value}
        for indices in tables.values():
            is_list = isinstance(indices, list) and all(type(i) is int for i in indices)
            if not is_list or not indices or len({*indices}) < len(indices):
                self.refuse(key, value, "no list of different tokens' ids")
        return {name: tuple(indices) for name, indices in tables.items()}

    def read_modules(self) -> ModuleSettings:
        """Reads the choice of modules that all kinds have."""
        return ModuleSettings(
            target_modules=self.read_name_pattern("target_modules"),
            exclude_modules=self.read_name_pattern("exclude_modules"),
            modules_to_save=self.read_names("modules_to_save"),
        )

    def read_lora_modules(self) -> ModuleSettings:
        """Reads the choice of modules, layers and parameters."""
        chosen = self.read_modules()
        for key in ("layers_to_transform", "layers_pattern"):
            if (
                isinstance(chosen.target_modules, str)
                and self._left.get(key) is not None
            ):
                reason = f"an expression, beside {key}"
                self.refuse("target_modules", chosen.target_modules, reason)
        if (
            self._left.get("layers_pattern")
            and self._left.get("layers_to_transform") is None
        ):
            reason = "set, and layers_to_transform is not"
            self.refuse("layers_pattern", self._left["layers_pattern"], reason)
        pattern = self.read_name_pattern("layers_pattern")
        patterns = (pattern,) if isinstance(pattern, str) else pattern
        for text in patterns:
            self._check_expression("layers_pattern", text)
        return replace(
            chosen,
            layers_to_transform=self._read_layers("layers_to_transform"),
            layers_pattern=tuple(text for text in patterns if text),
            target_parameters=self.read_names("target_parameters"),
        )

    def _read_layers(self, key: str) -> tuple[int, ...] | None:
        value = self.take(key, None)
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in layers):
            self.refuse(key, value, "no list of layers' numbers")
        return tuple(layers) or None

    def _check_expression(self, key: str, text: str) -> None:
        try:
            re.compile(text)
        except re.error as error:
            self.refuse(key, text, f"no regular expression ({error})")
