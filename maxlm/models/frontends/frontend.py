"""Frontends: what turns inputs other than tokens into vectors of the residual stream.

A row stays a row of tokens. Where a vector stands, the row has the frontend's
placeholder token: packing, positions, document starts and caches see a token like any
other, and only its embedding is another. The vectors of a row stand in the order of
its placeholders.

An *item* is what a frontend reads at once: an image, a patch of one, a frame of sound,
a vector that another model computed. Each takes ``vectors_per_item`` placeholders.

Shapes: B batch, S sequence, D model, I items of a row.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.batch_source import BatchArraySpec

ItemArrays = Mapping[str, np.ndarray]
"""Arrays [I, ...] of some items, by name."""
ARRAY_PREFIX = "frontend."
"""Begins the names of a frontend's arrays in a batch, where a task has its own."""
VECTOR_NUMBERS = f"{ARRAY_PREFIX}vector_numbers"
"""A batch's array of :attr:`InputVectors.numbers`."""


class InputVectors(NamedTuple):
    """Vectors in place of some tokens' embeddings."""

    values: jax.Array
    """[..., N, D], in any float dtype."""
    numbers: jax.Array
    """int32 [..., S]: which of its row's vectors stands at each token, counted from 1;
    0: the token's own embedding."""


class ItemArraySpec(NamedTuple):
    """One of a frontend's arrays, as every item has it."""

    shape: tuple[int, ...]
    """Shape of an item's entry; a row's items come before it."""
    dtype: DTypeLike = np.float32


@dataclass(frozen=True)
class FrontendCosts:
    """Costs of a frontend, as it states them for the plan. How large its matrices are
    follows from their declarations."""

    rows_per_item: float
    """Rows that each matrix multiplies, of an item: of an image its patches, if all of
    them go through."""
    extra_flops: float = 0.0
    """Forward FLOPs of an item beside matrices, such as those of attention's
    scores."""


class Frontend(Protocol):
    """A module (``flax.nnx.Module``) whose parameters are ``frontend....`` of the
    model's.

    It may state its ``costs()``, a :class:`FrontendCosts`; otherwise its matrices
    multiply a row for each vector.
    """

    def encode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Maps items to vectors.

        Args:
            arrays: the config's ``item_arrays`` by name, [B, I, ...]: rows split over
                devices as a batch's are, items whole. Zeros pad rows with fewer items.

        Returns:
            [B, I · vectors_per_item, D] in the compute dtype, each item's one behind
            the other. They stand in place of tokens' embeddings after
            ``embedding_scale``, before positions and norms.
        """
        ...


class FrontendConfig(Config):
    """Base of frontends' configs. A subclass has a ``kind`` of its own, a Literal."""

    # A Literal of its own in each subclass, which no wider type than Any allows.
    kind: Any
    placeholder_id: int = Field(gt=0)
    """Token that stands where a vector does: a row of the model's table that no text
    has, such as one past the tokenizer's ids, or a special token; padding is 0."""
    max_items: int | None = Field(default=None, gt=0)
    """Most items in a row of a batch; null: as many as its tokens have places for.
    Every row's arrays have room for so many."""

    @property
    def vectors_per_item(self) -> int:
        """Vectors that :meth:`Frontend.encode` makes of an item."""
        return 1

    @abstractmethod
    def item_arrays(self) -> Mapping[str, ItemArraySpec]:
        """Returns the arrays that :meth:`Frontend.encode` reads, by name."""

    def count_items_per_row(self, seq_len: int) -> int:
        """Counts the items that a row of ``seq_len`` tokens has room for."""
        num_items = seq_len // self.vectors_per_item
        return min(num_items, self.max_items or num_items)

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        """Returns what a batch has besides a task's own arrays: ``item_arrays``, and
        ``VECTOR_NUMBERS``."""
        num_items = self.count_items_per_row(seq_len)
        arrays = {VECTOR_NUMBERS: BatchArraySpec.of_tokens(seq_len)}
        for name, array in self.item_arrays().items():
            shape = (num_items, *array.shape)
            arrays[f"{ARRAY_PREFIX}{name}"] = BatchArraySpec(
                shape, array.dtype, (None,) * len(shape), is_appended=True
            )
        return arrays

    def read_items(self, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Reads the items of a file's row, whose columns are named as the arrays; none
        where it has none of them. Raises MaxlmError: see :meth:`check_items`."""
        columns = {
            name: row[name] for name in self.item_arrays() if row.get(name) is not None
        }
        return self.check_items(columns) if columns else {}

    def check_items(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns ``item_arrays`` of some items, [I, ...], in their dtypes. Raises
        MaxlmError: one is missing, unknown or of another shape, no item."""
        specs = self.item_arrays()
        if arrays.keys() != specs.keys():
            message = f"model.frontend.kind={self.kind} reads {', '.join(specs)}, "
            message += f"there are {', '.join(arrays) or 'none'}"
            raise MaxlmError(message, fix="give these arrays")
        checked: dict[str, np.ndarray] = {}
        for name, spec in specs.items():
            array = _read_numbers(name, arrays[name]).astype(spec.dtype)
            if array.shape[1:] != spec.shape or not array.shape or not len(array):
                message = f"{name} has the shape {list(array.shape)}, and not "
                message += f"[items, {', '.join(map(str, spec.shape))}]"
                fix = "give an entry of that shape for each item"
                raise MaxlmError(message, where=name, fix=fix)
            checked[name] = array
        counts = {name: len(array) for name, array in checked.items()}
        if len(set(counts.values())) > 1:
            message = f"arrays of unlike numbers of items, {counts}"
            raise MaxlmError(message, fix="give each an entry for every item")
        return checked

    def count_vectors(self, items: ItemArrays) -> int:
        """Counts the vectors of some items."""
        if not items:
            return 0
        return len(next(iter(items.values()))) * self.vectors_per_item

    def place_items(
        self, tokens: Sequence[int], num_vectors: int, opening: Sequence[int] = ()
    ) -> list[int]:
        """Returns the index in ``tokens`` of each token of a text with placeholders for
        so many vectors; -1 for each placeholder.

        Where the text has a placeholder for every vector, these stay. One for every
        item becomes ``vectors_per_item``. A text without any has all of them at its
        beginning, behind the tokens of ``opening`` if it opens with these. Raises
        MaxlmError: it has another number of them.
        """
        num_placeholders = sum(token == self.placeholder_id for token in tokens)
        if not num_placeholders:
            opens_so = [*tokens[: len(opening)]] == [*opening]
            start = len(opening) if opens_so else 0
            return [*range(start), *[-1] * num_vectors, *range(start, len(tokens))]
        if num_placeholders == num_vectors:
            num_repeats = 1
        elif num_placeholders * self.vectors_per_item == num_vectors:
            num_repeats = self.vectors_per_item
        else:
            message = f"{num_placeholders} placeholders for {num_vectors} vectors"
            fix = "write one for each item, or for each vector"
            raise MaxlmError(message, fix=fix)
        indices: list[int] = []
        for index, token in enumerate(tokens):
            is_placeholder = token == self.placeholder_id
            indices += [-1] * num_repeats if is_placeholder else [index]
        return indices

    def number_vectors(self, tokens: np.ndarray) -> np.ndarray:
        """Returns ``VECTOR_NUMBERS`` of rows [..., S] whose placeholders all stand for
        vectors."""
        is_placeholder = tokens == self.placeholder_id
        numbers = np.cumsum(is_placeholder, axis=-1)
        return np.where(is_placeholder, numbers, 0).astype(np.int32)

    def shrunk(self, vocab_size: int) -> "FrontendConfig":
        """Returns the same for a table of at most so many rows."""
        placeholder_id = min(self.placeholder_id, vocab_size - 1)
        return self.model_copy(update={"placeholder_id": placeholder_id})


def get_frontend_costs(frontend: Frontend, config: FrontendConfig) -> FrontendCosts:
    """Returns a frontend's own ``costs()``, or those of one that states none."""
    count_costs: Callable[[], FrontendCosts] | None = getattr(frontend, "costs", None)
    if count_costs is None:
        return FrontendCosts(rows_per_item=config.vectors_per_item)
    return count_costs()


def _read_numbers(name: str, values: object) -> np.ndarray:
    """Returns nested lists of numbers, or an array, as an array."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unlike lengths
        array = None
    if array is None or not jnp.issubdtype(array.dtype, jnp.number):
        message = f"{name} is no array of numbers"
        raise MaxlmError(message, where=name, fix="give lists of equal lengths")
    return array


@dataclass(frozen=True)
class RegisteredFrontend:
    """A frontend by its kind.

    Args:
        config: a subclass of :class:`FrontendConfig`, for ``model.frontend``.
        build: called with the config and a
            :class:`~maxlm.models.build_context.BuildContext`.
    """

    config: type[FrontendConfig]
    build: Callable[..., Frontend]
