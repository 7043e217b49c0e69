"""A family of published models: its config.json and its tensor names, both ways."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from maxlm.config import Config, MaxlmError
from maxlm.huggingface.families.fields import (
    ConfigFields,
    put_nested,
    read_fields,
    write_fields,
)
from maxlm.huggingface.families.modules import ModuleNames
from maxlm.huggingface.families.names import (
    NameTable,
    TensorEntry,
    linear,
    list_entries,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import (
    read_position_settings,
    write_position_settings,
)
from maxlm.huggingface.quantized import CONFIG_KEY
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.moe import MoeConfig

_HEAD = "lm_head.weight"
_DEFAULT_LABELS = 2
"""Labels of a classifier in transformers whose config.json names none."""
_MOST_FURTHER_LAYERS = 4
"""Layers that predict further tokens; published models have up to three."""
_SCORE_HEAD = {"score.weight": linear("heads.score.kernel")}


def _check_tensor_count(
    config: TransformerConfig, table: NameTable, num_tensors: int
) -> None:
    """Checks that files can hold the tensors of a model's layers and experts, before
    they are listed one by one: a number in a config.json costs its author nothing."""
    moe = config.moe
    layers = config.num_layers
    described = f"{layers:,} layers"
    fewest = layers
    if moe is not None and any("{expert}" in name for name in table):
        layers = sum(
            stack.num_layers
            for stack in config.layer_stacks
            if isinstance(stack.block.ffn, MoeConfig)
        )
        described = f"{moe.num_experts:,} experts in each of {layers:,} layers"
        fewest = layers * moe.num_experts
    if fewest > num_tensors:
        message = f"{described}, where the files hold {num_tensors:,} tensors"
        fix = "take config.json and all files from the published model"
        raise MaxlmError(message, where="config.json", fix=fix)


def _read_quantization(reader: ConfigReader) -> str | None:
    """Checks how tensors are stored (``huggingface/quantized.py``); returns the name of
    the method, None: plainly."""
    if not reader.has(CONFIG_KEY):
        return None
    quantization = reader.read_nested(CONFIG_KEY)
    method = quantization.choice("quant_method", ("mxfp4", "fp8"), "")
    for key in ("modules_to_not_convert", "ignored_layers", "scale_fmt"):
        quantization.ignore(key)  # which the files say themselves
    if method == "fp8":
        quantization.ignore("weight_block_size")  # read with the files
        quantization.read_implemented("fmt", "e4m3", "float8_e4m3fn")
        # How an engine multiplies; here weights are bf16.
        quantization.ignore("activation_scheme")
    return method


@dataclass(frozen=True)
class ModelFamily:
    """A family of published models, and how they map to ours. Pure; nothing is
    allocated."""

    name: str
    hf_architecture: str
    """The class that a converted checkpoint is for, first of config.json's
    architectures."""
    fields: ConfigFields
    """The keys of config.json."""
    name_table: NameTable | Callable[[Any], NameTable]
    """The names of its tensors; some follow the model's config."""
    fixed_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all its models have, by dotted path."""
    rope_kwargs: Mapping[str, Any] | None = None
    """Arguments of ``read_position_settings``; None: no rotary ones, or ``read_extra``
    does."""
    read_extra: Callable[[ConfigReader, dict[str, Any]], None] = (
        lambda reader, settings: None
    )
    """Reads into the settings what ``fields`` cannot say."""
    write_extra: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Writes what ``read_extra`` reads."""
    hf_model_type: str | None = None
    """The family's ``model_type``, where that is not its name."""
    ignored_tensors: Sequence[str] = ()
    """Patterns (``*.inv_freq``) of tensors that hold no parameter: buffers, other
    tasks' heads."""
    layers_for_more_tokens: str = ""
    """Name of a layer, with ``{layer}`` for its number, where files may hold layers
    behind the last that predict further tokens: those that ``modules`` does not read
    are left out."""
    modules: ModuleNames | None = None
    """The names of modules that predict further tokens; None: they are not read."""
    prefix: str = ""
    """Prefix of all names but the head's; some published files leave it out."""
    suffix_aliases: Mapping[str, str] = field(default_factory=dict)
    """Ends of names, and how some published files spell them."""
    ignored_keys: Sequence[str] = ()
    """Further names in config.json that say nothing of the maths."""
    init_std_key: str | None = "initializer_range"
    """The deviation of initial weights there."""
    other_hf_architectures: Sequence[str] = ()
    other_model_types: Sequence[str] = ()
    """Other values of ``model_type`` in files of the same class, which are written
    under the usual one."""
    architecture: str = "decoder"
    """The architecture of its models, as our configs name it."""

    @property
    def model_type(self) -> str:
        """Name of the family in config.json."""
        return self.hf_model_type or self.name

    @property
    def hf_classifier(self) -> str:
        """The class of reward models, which have a head beside a decoder's."""
        name = self.hf_architecture.removesuffix("ForCausalLM").removesuffix(
            "LMHeadModel"
        )
        return f"{name}ForSequenceClassification"

    def list_entries(
        self, config: TransformerConfig, published_names: Iterable[str] = ()
    ) -> list[TensorEntry]:
        """Lists every tensor of a model, and where it lies in ours; variants are
        followed of names in files at hand, ``published_names``."""
        if callable(self.name_table):
            table = self.name_table(config)
        else:
            table = self.name_table
        stored_names = frozenset(published_names)
        if stored_names:
            _check_tensor_count(config, table, len(stored_names))
        module_table = None if self.modules is None else self.modules.make_table(table)
        entries = list_entries(config, {**table, **_SCORE_HEAD}, module_table)
        entries = self._add_copies(config, entries)
        if not stored_names:
            return entries
        has_prefix = any(name.startswith(self.prefix) for name in stored_names)

        def spell(name: str) -> str:
            """Returns a name as these files spell it."""
            plain = name if has_prefix else name.removeprefix(self.prefix)
            for usual, other in self.suffix_aliases.items():
                if plain not in stored_names and plain.endswith(usual):
                    return plain.removesuffix(usual) + other
            return plain

        spelled: list[TensorEntry] = []
        for entry in entries:
            name = spell(entry.theirs)
            aliases = tuple(spell(alias) for alias in entry.aliases)
            spelled.append(replace(entry, theirs=name, aliases=aliases))
        return spelled

    def _add_copies(
        self, config: TransformerConfig, entries: Sequence[TensorEntry]
    ) -> list[TensorEntry]:
        """Returns entries with the copies that files hold for modules of ``mtp``."""
        if self.modules is None or config.mtp is None:
            return list(entries)
        copies = self.modules.list_copies(config.mtp.num_modules, config.num_layers)
        extended: list[TensorEntry] = []
        for entry in entries:
            # A tied head is another name of the table.
            names = (entry.theirs, *entry.aliases)
            entry_copies = tuple(
                copy_name for name in names for copy_name in copies.get(name, ())
            )
            extended.append(replace(entry, copies=entry_copies))
        return extended

    def list_module_marks(self, config: TransformerConfig) -> list[str]:
        """Lists names of tensors by which files with a model's modules of ``mtp`` are
        known, as :meth:`read_config` looks for them."""
        if self.modules is None or config.mtp is None:
            return []
        return self.modules.list_marks(config.mtp.num_modules, config.num_layers)

    def list_ignored_tensors(self, config: TransformerConfig) -> list[str]:
        """Lists patterns of tensors that may be there without being used."""
        return [*self.ignored_tensors, *self._list_further_layers(config)]

    def describe_left_out(
        self, config: TransformerConfig, names: Iterable[str]
    ) -> list[str]:
        """Describes tensors that were not used, for the user: one by one, but layers
        that predict further tokens each in a line."""
        notes: list[str] = []
        others = list(names)
        for pattern in self._list_further_layers(config):
            matched = [name for name in others if fnmatchcase(name, pattern)]
            others = [name for name in others if name not in matched]
            if matched:
                layer = f"{pattern.removesuffix('.*')} ({len(matched)} tensors)"
                notes.append(f"left out: {layer}, which predicts further tokens")
        return [*(f"left out: {name}" for name in others), *notes]

    def _list_further_layers(self, config: TransformerConfig) -> list[str]:
        """Lists patterns of layers behind the last, and behind those that ``modules``
        reads, which predict further tokens."""
        if not self.layers_for_more_tokens:
            return []
        first = config.num_layers
        if self.modules is not None and config.mtp is not None:
            first += config.mtp.num_modules
        return [
            f"{self.layers_for_more_tokens.format(layer=layer)}.*"
            for layer in range(first, first + _MOST_FURTHER_LAYERS)
        ]

    def find_missing_part(self, config: TransformerConfig) -> str | None:
        """Finds a part of a model's config that all models of the family have and this
        one does not, as "attention.latent"; None: it has them all, and
        :meth:`write_config` can read what it writes."""
        field_paths = (field.ours for field in self.fields.values())
        for path in (*field_paths, *self.fixed_settings):
            part = config
            parents = path.split(".")[:-1]
            for depth, name in enumerate(parents, 1):
                if isinstance(part, Mapping):
                    part = part.get(name)
                else:
                    # A mixer of another kind may not have it.
                    part = getattr(part, name, None)
                # A choice may be a name where other models have settings.
                if not isinstance(part, Config | Mapping):
                    return ".".join(parents[:depth])
        return None

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """Returns a model's config.json."""
        values: dict[str, Any] = {"architectures": [self.hf_architecture]}
        if [*config.heads] == ["score"]:
            labels = range(config.heads["score"])
            values["architectures"] = [self.hf_classifier]
            values["id2label"] = {str(i): f"LABEL_{i}" for i in labels}
            values["label2id"] = {f"LABEL_{i}": i for i in labels}
        values["model_type"] = self.model_type
        values |= write_fields(config, self.fields)
        if self.init_std_key:
            values[self.init_std_key] = config.init_std
        if self.rope_kwargs is not None:
            latent = config.attention.latent
            # Latent attention turns dimensions that are apart from the head's own.
            rotary_size = latent.rotary_dim if latent else config.attention.head_dim
            values |= write_position_settings(config.positions, rotary_size)
        if self.modules is not None:
            mtp = config.mtp
            values[self.modules.count_key] = 0 if mtp is None else mtp.num_modules
        return values | self.write_extra(config)

    def read_config(
        self,
        hf_config: Mapping[str, Any],
        source: str,
        tensor_names: Iterable[str] = (),
    ) -> tuple[dict[str, Any], list[str]]:
        """Reads a config.json, with the names of the tensors beside it: returns a
        model's settings, and notes for the user. Raises MaxlmError: a value that maxlm
        does not implement, or one that is missing."""
        reader = ConfigReader(hf_config, source, frozenset(tensor_names))
        settings = self._read_settings(reader)
        notes: list[str] = []
        method = _read_quantization(reader)
        if method is not None:
            notes.append(f"weights in {method} are read as bf16")
        notes += reader.check_all_read(*self.ignored_keys)
        if "heads" in settings and self._lacks_language_head(reader.tensors):
            notes.append(
                f"no {_HEAD}, as in a classifier of transformers: read as a tied model"
            )
        return settings, notes

    def _lacks_language_head(self, tensor_names: frozenset[str]) -> bool:
        """Whether files with these tensors are a classifier's as transformers saves it:
        its class drops the language head, whatever ``tie_word_embeddings`` still says
        of the base. The model is then read as a tied one, which has no head of its own
        either. Families whose config cannot say that it is tied could not be written
        again, and are left alone."""
        field = self.fields.get("tie_word_embeddings")
        can_be_tied = field is not None and isinstance(field.write, attrgetter)
        return (
            can_be_tied and "score.weight" in tensor_names and _HEAD not in tensor_names
        )

    def _read_settings(self, reader: ConfigReader) -> dict[str, Any]:
        settings: dict[str, Any] = {"architecture": self.architecture}
        for path, value in self.fixed_settings.items():
            put_nested(settings, path, value)
        read_fields(reader, self.fields, settings)
        if self.hf_classifier in reader.names("architectures"):
            num_labels = len(reader.mapping("id2label")) or _DEFAULT_LABELS
            settings["heads"] = {"score": num_labels}
            if self._lacks_language_head(reader.tensors):
                settings["tie_embeddings"] = True
        # Sizes that follow from others where the file does not name them.
        d_model = settings["d_model"]
        attention = settings.get("attention", {})
        if attention:
            num_heads = attention["num_heads"]
            defaults = {"num_kv_heads": num_heads, "head_dim": d_model // num_heads}
            attention = defaults | attention
            settings["attention"] = attention
        if "mlp" in settings:
            settings["mlp"].setdefault("d_ff", 4 * d_model)
        if self.rope_kwargs is not None:
            latent = attention.get("latent", {})
            rotary_size = latent.get("rotary_dim", attention["head_dim"])
            settings["positions"] = read_position_settings(
                reader, rotary_size, **self.rope_kwargs
            )
        self.read_extra(reader, settings)
        if self.modules is not None:
            mtp = self.modules.read(reader, settings)
            if mtp is not None:
                settings["mtp"] = mtp
        for key in ("initializer_range", "init_std"):
            if not reader.has(key):
                continue
            std = reader.number(key, least=0)
            if std > 0:  # else our default: weights that begin as zeros cannot train
                settings["init_std"] = std
        return settings
