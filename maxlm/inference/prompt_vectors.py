"""Vectors that stand in place of some of a prompt's tokens: a frontend's, or those that
a request gives."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, reshard
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.inference.generative_model import GenerativeModel
from maxlm.inference.requests import GenerationRequest
from maxlm.models.params import Params, bind


@dataclass(frozen=True, eq=False)
class PromptVectors:
    """Vectors in place of some of a sequence's tokens."""

    places: np.ndarray
    """int [n]: indices of the tokens in the sequence, ascending."""
    values: np.ndarray
    """[n, d_model] in the compute dtype."""
    cache_ids: Mapping[int, int]
    """By place, the id by which the prefix tree knows a vector, which no token has and
    no other vector: a digest of its values."""


class PromptEncoder:
    """Makes the vectors of requests, on the mesh of a model's parameters.

    Args:
        model: that the engine runs.
        get_params: returns its parameters as steps read them.
        accepts_embeddings: whether requests may give vectors to a model without a
            frontend.
    """

    def __init__(
        self,
        model: GenerativeModel,
        get_params: Callable[[], Params],
        mesh: Mesh,
        num_shards: int,
        *,
        accepts_embeddings: bool,
    ):
        self.frontend = model.config.frontend
        self.is_used = self.frontend is not None or accepts_embeddings
        """Whether any request may have vectors."""
        self._model = model
        self._get_params = get_params
        self._mesh = mesh
        self._num_shards = num_shards

    def encode(self, request: GenerationRequest) -> PromptVectors | None:
        """Returns the vectors of a request's prompt; None: it has none. Raises
        MaxlmError: they do not belong to the model, or to the prompt."""
        where = f"request {request.request_id}"
        try:
            return self._encode(request)
        except MaxlmError as error:
            raise MaxlmError(error.message, where=where, fix=error.fix) from None

    def _encode(self, request: GenerationRequest) -> PromptVectors | None:
        places = self._find_places(request)
        if request.items is not None and request.embeddings is not None:
            raise MaxlmError("both items and embeddings", fix="give one of them")
        if request.items is not None:
            values = self._encode_items(request.items)
        elif request.embeddings is not None:
            values = self._check_embeddings(request.embeddings)
        else:
            values = np.zeros((0, self._model.config.d_model))
        if len(values) != len(places):
            message = f"{len(values)} vectors for {len(places)} places in the prompt"
            fix = "give one for each placeholder token"
            raise MaxlmError(message, fix=fix)
        if not len(places):
            return None
        num_virtual = self._model.num_virtual_tokens
        return make_prompt_vectors(
            [num_virtual + place for place in places], values, self._model.dtype
        )

    def _find_places(self, request: GenerationRequest) -> Sequence[int]:
        """Returns the tokens of the prompt that vectors stand for."""
        tokens = request.prompt_tokens
        places = request.embedding_places
        if places is None:
            if self.frontend is None:
                return ()
            placeholder_id = self.frontend.placeholder_id
            return [i for i, token in enumerate(tokens) if token == placeholder_id]
        if [*places] != sorted({*places} & {*range(len(tokens))}):
            message = f"embedding_places are no ascending indices below {len(tokens)}"
            raise MaxlmError(message, fix="name tokens of the prompt")
        return places

    def _check_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        if not self.is_used:
            message = "embeddings for a model without a frontend"
            fix = "set accepts_embeddings=true in the engine's config"
            raise MaxlmError(message, fix=fix)
        width = self._model.config.d_model
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            message = (
                f"embeddings of shape {[*embeddings.shape]}, model.d_model={width}"
            )
            raise MaxlmError(message, fix=f"give them as [n, {width}]")
        return embeddings

    def _encode_items(self, items: Mapping[str, np.ndarray]) -> np.ndarray:
        """Runs the frontend; returns [n, d_model]."""
        frontend = self.frontend
        if frontend is None:
            message = f"items ({', '.join(items)}) for a model without a frontend"
            raise MaxlmError(message, fix="leave them out")
        arrays = frontend.check_items(items)
        num_items = len(next(iter(arrays.values())))
        # Powers of two: few sizes, hence few compilations.
        num_padded = 1 << (num_items - 1).bit_length()
        # Every shard of the batch computes the same.
        padded = {
            name: np.broadcast_to(
                np.pad(
                    array,
                    [(0, num_padded - num_items), *[(0, 0)] * (array.ndim - 1)],
                ),
                (self._num_shards, num_padded, *array.shape[1:]),
            )
            for name, array in arrays.items()
        }
        with jax.set_mesh(self._mesh):
            vectors = np.asarray(encode_items(self._model, self._get_params(), padded))
        return vectors[0, : num_items * frontend.vectors_per_item]


@partial(jax.jit, static_argnums=0)
def encode_items(
    model: GenerativeModel, params: Params, arrays: Mapping[str, jax.Array]
) -> jax.Array:
    """Returns a frontend's vectors [D, N, d_model] of items [D, I, ...], whole on every
    device."""
    by_shard = model.rules.spec("batch")
    arrays = {name: reshard(array, by_shard) for name, array in arrays.items()}
    return reshard(bind(model, params).encode_items(arrays), PartitionSpec())


def make_prompt_vectors(
    places: Sequence[int], values: np.ndarray, dtype: DTypeLike
) -> PromptVectors:
    """Returns vectors at some places of a sequence, in a compute dtype."""
    values = np.ascontiguousarray(values.astype(jax.dtypes.canonicalize_dtype(dtype)))
    cache_ids: dict[int, int] = {}
    for place, vector in zip(places, values, strict=True):
        digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
        # Negative, as no token is.
        cache_ids[place] = -1 - int.from_bytes(digest, "big")
    return PromptVectors(np.asarray(places, np.int64), values, cache_ids)


class ChunkVectors:
    """Puts chunks' vectors on the devices.

    Args:
        width: d_model.
        sharding: of arrays whose first axis is the batch's shards.
    """

    def __init__(self, width: int, dtype: DTypeLike, sharding: NamedSharding):
        self._width = width
        self._dtype = jax.dtypes.canonicalize_dtype(dtype)
        self._sharding = sharding
        self._zeros: dict[tuple[int, int], jax.Array] = {}

    def allocate(self, num_shards: int, num_tokens: int) -> np.ndarray:
        """Returns an array [D, C, d_model] of zeros, to write vectors into."""
        return np.zeros((num_shards, num_tokens, self._width), self._dtype)

    def put(self, values: np.ndarray) -> jax.Array:
        """Puts an array of :meth:`allocate` on the devices."""
        return jax.device_put(values, self._sharding)

    def get_zeros(self, num_shards: int, num_tokens: int) -> jax.Array:
        """Returns such an array of zeros, which are sent once: most steps have no
        vector."""
        shape = (num_shards, num_tokens)
        if shape not in self._zeros:
            self._zeros[shape] = self.put(self.allocate(num_shards, num_tokens))
        return self._zeros[shape]
