"""A family of published models: its config.json and its tensor names, both ways."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.families.fields import ConfigFields, put_nested, read_fields, write_fields
from maxlm.models.families.names import NameTable, TensorEntry, list_entries
from maxlm.models.families.reader import ConfigReader
from maxlm.models.families.rope import read_position_settings, write_position_settings


@dataclass(frozen=True)
class ModelFamily:
    """A family of published models, and how they map to ours. Pure; nothing is allocated."""

    name: str
    architecture: str
    """The class that a converted checkpoint is for, first of config.json's architectures."""
    fields: ConfigFields
    """The keys of config.json."""
    table: NameTable | Callable[[Any], NameTable]
    """The names of its tensors; some follow the model's config."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all its models have, by dotted path."""
    rope: Mapping[str, Any] | None = None
    """Arguments of ``read_position_settings``; None: no rotary positions, or ``read`` does."""
    read: Callable[[ConfigReader, dict[str, Any]], None] = lambda reader, settings: None
    """Reads into the settings what ``fields`` cannot say."""
    write: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Writes what ``read`` reads."""
    published_type: str | None = None
    """The family's ``model_type``, where that is not its name."""
    ignored: Sequence[str] = ()
    """Patterns (``*.inv_freq``) of tensors that hold no parameter: buffers, other tasks' heads."""
    prefix: str = ""
    """Prefix of all names but the head's; some published files leave it out."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Ends of names, and how some published files spell them."""
    inert: Sequence[str] = ()
    """Further names in config.json that say nothing of the maths."""
    init_key: str | None = "initializer_range"
    """The deviation of initial weights there."""
    other_architectures: Sequence[str] = ()
    shape: str = "decoder"
    """The architecture of its models, as our configs name it."""

    @property
    def model_type(self) -> str:
        """Name of the family in config.json."""
        return self.published_type or self.name

    def list_entries(self, config: Any, tensors: Iterable[str] = ()) -> list[TensorEntry]:
        """Lists every tensor of a model, and where it lies in ours; variants are followed of names
        in files at hand, ``tensors``."""
        table = self.table(config) if callable(self.table) else self.table
        there, found = frozenset(tensors), list_entries(config, table)
        if not there:
            return found
        bare = self.prefix and not any(name.startswith(self.prefix) for name in there)

        def spelt(name: str) -> str:
            plain = name.removeprefix(self.prefix) if bare else name
            for usual, other in self.spellings.items():
                if plain not in there and plain.endswith(usual):
                    return plain.removesuffix(usual) + other
            return plain

        return [
            replace(e, theirs=spelt(e.theirs), aliases=(*map(spelt, e.aliases),)) for e in found
        ]

    def write_config(self, config: Any) -> dict[str, Any]:
        """Returns a model's config.json."""
        values: dict[str, Any] = {"architectures": [self.architecture]}
        values |= {"model_type": self.model_type, **write_fields(config, self.fields)}
        if self.init_key:
            values[self.init_key] = config.init_std
        if self.rope is not None:
            latent = config.attention.latent
            turned = latent.rotary_dim if latent else config.attention.head_dim
            values |= write_position_settings(config.positions, turned)
        return values | self.write(config)

    def read_config(
        self, values: Mapping[str, Any], where: str, tensors: Iterable[str] = ()
    ) -> tuple[dict[str, Any], list[str]]:
        """Reads a config.json, with the names of the tensors beside it: returns a model's settings,
        and notes for the user.

        Raises:
            MaxlmError: a value that maxlm does not implement, or one that is missing.
        """
        reader = ConfigReader(values, where, frozenset(tensors))
        try:
            settings = self._read_settings(reader)
            return settings, reader.check_all_read(*self.inert)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A value of a kind that no published file has there.
            what = f"a value cannot be made sense of ({error})"
            fix = "compare it with the published model's"
            raise MaxlmError(what, where=where, fix=fix) from error

    def _read_settings(self, reader: ConfigReader) -> dict[str, Any]:
        settings: dict[str, Any] = {"architecture": self.shape}
        for path, value in self.fixed.items():
            put_nested(settings, path, value)
        read_fields(reader, self.fields, settings)
        width, attention = settings["d_model"], settings["attention"]
        heads = attention["num_heads"]
        attention = {"num_kv_heads": heads, "head_dim": width // heads, **attention}
        settings["attention"] = attention
        if "mlp" in settings:
            settings["mlp"].setdefault("d_ff", 4 * width)
        if self.rope is not None:
            turned = attention.get("latent", {}).get("rotary_dim", attention["head_dim"])
            settings["positions"] = read_position_settings(reader, turned, **self.rope)
        self.read(reader, settings)
        for key in ("initializer_range", "init_std"):
            if reader.has(key) and (std := reader.number(key, least=0)):
                settings["init_std"] = std
        return settings
