"""Keys of config.json beside settings of ours: one table, read in both directions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

from maxlm.config import Config, MaxlmError
from maxlm.huggingface.families.reader import MAX_SIZE, REQUIRED, ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.architectures.settings import MAX_LAYERS

MixerT = TypeVar("MixerT", bound=Config)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""Our names of them, by those in config.json; the first of several is written."""


@dataclass(frozen=True)
class ConfigField:
    """A key of config.json."""

    read: Callable[[ConfigReader, str], Any]
    """Maps the reader and the key to our value; None: our config's default."""
    ours: str = ""
    """Setting that the key holds, as a dotted path; "": none, it is only checked."""
    write: Callable[[Any], Any] | None = None
    """Maps a model's config to the key's value; None: it is not written."""


ConfigFields = Mapping[str, ConfigField]
"""Fields by key; one of a nested mapping is ``attn_config.clip_qkv``."""


def map_size(
    ours: str,
    default: object = REQUIRED,
    *,
    least: int = 1,
    most: int = MAX_SIZE,
    alias: str = "",
    nullable: bool = False,
) -> ConfigField:
    """Declares a number of things or dimensions; the arguments are those of
    :meth:`ConfigReader.size`."""

    def read(reader: ConfigReader, key: str) -> int | None:
        return reader.size(
            key, default, least=least, most=most, alias=alias, nullable=nullable
        )

    return ConfigField(read, ours, attrgetter(ours))


def map_layer_count(
    ours: str, default: object = REQUIRED, *, alias: str = ""
) -> ConfigField:
    """Declares a number of layers. What reads and names them walks over all: the limit
    of a model's config holds before that."""
    return map_size(ours, default, most=MAX_LAYERS, alias=alias)


def map_number(
    ours: str,
    default: object = REQUIRED,
    *,
    least: int | None = None,
    nullable: bool = False,
) -> ConfigField:
    """Declares a finite number; the arguments are those of
    :meth:`ConfigReader.number`."""

    def read(reader: ConfigReader, key: str) -> float | None:
        return reader.number(key, default, least=least, nullable=nullable)

    return ConfigField(read, ours, attrgetter(ours))


def map_flag(ours: str, default: bool) -> ConfigField:
    """Declares true or false."""

    def read(reader: ConfigReader, key: str) -> bool:
        return reader.flag(key, default)

    return ConfigField(read, ours, attrgetter(ours))


def require_value(
    *allowed: object, ours: str = "", always_write: bool = False
) -> ConfigField:
    """Declares a key of which these values alone are implemented; the first is
    usual."""

    def read(reader: ConfigReader, key: str) -> Any:
        return reader.read_implemented(key, *allowed)

    def write(config: TransformerConfig) -> object:
        return allowed[0]

    is_written = bool(ours) or always_write
    return ConfigField(read, ours, write if is_written else None)


def map_inverse(ours: str, default: object = REQUIRED) -> ConfigField:
    """Declares a number that divides what our setting multiplies."""
    get_factor = attrgetter(ours)

    def read(reader: ConfigReader, key: str) -> float:
        return 1 / reader.number(key, default)

    def write(config: TransformerConfig) -> float:
        # Published divisors have few digits; two divisions have rounded them.
        return round(1 / get_factor(config), 9)

    return ConfigField(read, ours, write)


def map_activation(ours: str, default: str) -> ConfigField:
    """Declares an activation's name; ``default`` is a name of Hugging Face's."""

    get_activation = attrgetter(ours)

    def read(reader: ConfigReader, key: str) -> str:
        return read_activation(reader, key, default)

    def write(config: TransformerConfig) -> str:
        return to_hf_activation(get_activation(config))

    return ConfigField(read, ours, write)


def map_balance_loss(
    default: float, per_token: str = "num_experts_per_tok"
) -> ConfigField:
    """Declares a balance loss's coefficient, for shares that sum to ``per_token``; ours
    to 1."""

    def read(reader: ConfigReader, key: str) -> float:
        coefficient = reader.number(key, default, least=0)
        experts_per_token = reader.size(per_token)
        return coefficient * experts_per_token

    def write(config: TransformerConfig) -> float:
        assert config.moe is not None
        return config.moe.balance_loss / config.moe.experts_per_token

    return ConfigField(read, "moe.balance_loss", write)


def map_sizes(
    num_layers: str, d_model: str, max_seq_len: str, num_heads: str
) -> ConfigFields:
    """Declares the sizes that every model has, by their keys."""
    return {
        "vocab_size": map_size("vocab_size"),
        num_layers: map_layer_count("num_layers"),
        d_model: map_size("d_model"),
        max_seq_len: map_size("max_seq_len"),
        num_heads: map_size("attention.num_heads"),
    }


SIZES = map_sizes(
    "num_hidden_layers", "hidden_size", "max_position_embeddings", "num_attention_heads"
)
"""Sizes under the names that most families have."""


def find_mixer(config: TransformerConfig, mixer_class: type[MixerT]) -> MixerT:
    """Returns the mixer of a class that layers of a model have. Raises MaxlmError: none
    has one."""
    for mixer in config.list_mixers():
        if isinstance(mixer, mixer_class):
            return mixer
    raise MaxlmError(
        f"a model without layers of {mixer_class.__name__.removesuffix('Config')}",
        fix="write it under another family",
    )


def map_in_mixer(
    path: str, mixer_class: type[Config], keys: ConfigFields
) -> ConfigFields:
    """Declares keys that hold settings of a mixer.

    Args:
        path: where the mixer's settings are in a model's, as ``kinds.mamba.mixer``.
        keys: settings as the mixer names them; what they write is asked of the mixer.
    """

    def place(field: ConfigField) -> ConfigField:
        write_setting = field.write
        ours = f"{path}.{field.ours}" if field.ours else ""
        if write_setting is None:
            return replace(field, ours=ours)

        def write(config: TransformerConfig) -> Any:
            return write_setting(find_mixer(config, mixer_class))

        return replace(field, ours=ours, write=write)

    return {key: place(field) for key, field in keys.items()}


def ignore_key(value: object = None) -> ConfigField:
    """Declares a key that says nothing of the maths; ``value`` is written, unless it is
    None."""

    def write(config: TransformerConfig) -> object:
        return value

    return ConfigField(
        lambda reader, key: reader.ignore(key), write=None if value is None else write
    )


def name_layers(settings: dict[str, Any], kinds: Sequence[str]) -> None:
    """Puts the shortest pattern of each layer's kind into a model's settings, whose
    ``kinds`` may have more of them."""
    period = find_period(kinds)
    settings["pattern"] = list(kinds[:period])
    settings["kinds"] = {
        kind: kind_settings
        for kind, kind_settings in settings["kinds"].items()
        if kind in kinds
    }


def refuse_pattern(problem: str) -> MaxlmError:
    """Returns the error of a pattern that a family's config.json cannot say."""
    return MaxlmError(
        problem, where="model.pattern", fix="convert to another family, or change it"
    )


def list_kind_names(config: TransformerConfig) -> list[str]:
    """Returns the name of each layer's kind, of a model all of whose kinds have names.
    Raises MaxlmError: a model without a pattern."""
    pattern = config.pattern
    if not pattern:
        raise MaxlmError(
            "a model without a pattern of layers", fix="write it under another family"
        )
    return [str(pattern[layer % len(pattern)]) for layer in range(config.num_layers)]


def find_period(kinds: Sequence[object]) -> int:
    """Returns the fewest layers whose kinds, repeated, give the list."""
    # Layers repeat after n if the list, shifted by n, is its own beginning; that holds
    # of the whole length at the latest.
    lengths = range(1, len(kinds) + 1)
    return next(n for n in lengths if kinds[n:] == kinds[:-n])


def read_activation(reader: ConfigReader, key: str, default: str) -> str:
    """Reads our name of an activation."""
    return ACTIVATIONS[reader.choice(key, ACTIVATIONS, default)]


def to_hf_activation(name: object) -> str:
    """Returns the inverse of :func:`read_activation`. Raises MaxlmError: a unit of its
    own, which has no name."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise MaxlmError(
        f"activation={name} has no name in config.json",
        fix="write it under a family that has it, such as gpt_oss",
    )


def read_fields(
    reader: ConfigReader, fields: ConfigFields, settings: dict[str, Any]
) -> None:
    """Reads all keys into nested settings."""
    for path, field in fields.items():
        *parents, key = path.split(".")
        section = reader
        for name in parents:
            section = section.read_nested(name)
        value = field.read(section, key)
        if field.ours and value is not None:
            put_nested(settings, field.ours, value)


def write_fields(config: TransformerConfig, fields: ConfigFields) -> dict[str, Any]:
    """Writes what :func:`read_fields` reads."""
    values: dict[str, Any] = {}
    for path, field in fields.items():
        if field.write is not None:
            put_nested(values, path, field.write(config))
    return values


def put_nested(tree: dict[str, Any], path: str, value: object) -> None:
    """Puts a value at a dotted path of nested mappings."""
    *parents, key = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[key] = value


def read_layer_types(
    reader: ConfigReader, default_kinds: Sequence[str], allowed: Collection[str]
) -> Sequence[str]:
    """Reads each layer's kind from ``layer_types``, or returns ``default_kinds`` where
    there is no such list. ``allowed``: the kinds that are implemented."""
    num_layers = len(default_kinds)
    kinds = reader.names("layer_types") or default_kinds
    if len(kinds) != num_layers:
        message = f"layer_types does not name the kinds of {num_layers} layers"
        raise MaxlmError(
            message, where=reader.where, fix="take it from the published model"
        )
    for kind in kinds:
        if kind not in allowed:
            fix = f"only {' and '.join(allowed)} can be converted"
            message = f"layer_types has {kind!r}, which is not implemented"
            raise MaxlmError(message, where=reader.where, fix=fix)
    return kinds


def make_pattern(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the shortest pattern that gives these settings of ``LayerKind``, one a
    layer, as settings of a decoder; none where all layers are as the model says."""
    pattern = list(layers[: find_period(layers)])
    return {"pattern": pattern} if any(pattern) else {}


def read_layer_pattern(
    reader: ConfigReader,
    default_kinds: Sequence[str],
    kind_settings: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Returns the pattern of ``layer_types``, as :func:`make_pattern` does;
    ``kind_settings``: of each kind, settings of ``LayerKind``."""
    kinds = read_layer_types(reader, default_kinds, kind_settings)
    return make_pattern([kind_settings[kind] for kind in kinds])


def list_layer_kinds(config: TransformerConfig) -> list[LayerKind]:
    """Lists every layer's kind."""
    kinds = config.layer_kinds
    return [kinds[layer % len(kinds)] for layer in range(config.num_layers)]


def write_layer_types(config: TransformerConfig) -> tuple[list[str], int | None]:
    """Returns the kind of each layer by its window, and the window (None: no layer has
    one)."""
    windows = [kind.window for kind in list_layer_kinds(config)]
    window = next((window for window in windows if window is not None), None)
    return [GLOBAL if window is None else LOCAL for window in windows], window
