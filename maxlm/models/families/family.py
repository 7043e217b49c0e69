"""A family of published models: its config.json and its tensor names, both ways."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.families.entries import TensorEntry
from maxlm.models.families.names import NameTable, list_entries
from maxlm.models.families.reader import ConfigReader


@dataclass(frozen=True)
class ModelFamily:
    """Everything is pure; nothing is allocated."""

    name: str
    model_type: str
    """As config.json has it."""
    architecture: str
    """The class that a converted checkpoint is for, first of config.json's architectures."""
    read: Callable[[ConfigReader], dict[str, Any]]
    """config.json → settings of a model's config."""
    write: Callable[[Any], dict[str, Any]]
    """A model's config → config.json, less what every family has."""
    table: Callable[[Any], NameTable]
    """A model's config → the names of its tensors."""
    ignored: Sequence[str] = ()
    """Patterns (``*.inv_freq``) of tensors that hold no parameter: buffers, other tasks' heads."""
    prefix: str = ""
    """Which names begin with, but for those of the head; some published files leave it out."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Ends of names, and how some published files spell them."""
    inert: Sequence[str] = ()
    """Further names in config.json that say nothing of the maths."""
    other_architectures: Sequence[str] = ()
    shape: str = "decoder"
    """The architecture of its models, as our configs name it."""

    def list_entries(self, config: Any, tensors: Iterable[str] = ()) -> list[TensorEntry]:
        """Lists every tensor of a model, and where it lies in ours.

        Args:
            tensors: names in files at hand, whose variants are followed.
        """
        there, found = frozenset(tensors), list_entries(config, self.table(config))
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
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.write(config),
        }

    def read_config(
        self, values: Mapping[str, Any], where: str, tensors: Iterable[str] = ()
    ) -> tuple[dict[str, Any], list[str]]:
        """Reads a config.json: returns a model's settings, and notes for the user.

        Args:
            tensors: names of those beside it.

        Raises:
            MaxlmError: a value that maxlm does not implement, or one that is missing.
        """
        reader = ConfigReader(values, where, frozenset(tensors))
        try:
            settings = self.read(reader)
            for key in ("initializer_range", "init_std"):
                if reader.has(key) and (std := reader.number(key, least=0)):
                    settings |= {"init_std": std}
            return settings, reader.finish(*self.inert)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A value of a kind that no published file has there.
            raise MaxlmError(
                f"a value cannot be made sense of ({error})",
                where=where,
                fix="compare it with the published model's",
            ) from error
