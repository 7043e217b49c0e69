"""Embeddings of texts: hidden states pooled over tokens, without a cache."""

import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec, reshard

from maxlm.config import MaxlmError
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.aux import Aux
from maxlm.models.params import Params, bind
from maxlm.sharding import AxisRules, bind_mesh

Pooling = Literal["mean", "last", "first"]
"""Over all tokens of a text; its last one (causal models); its first one ([CLS])."""

EmbeddingProgram = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Returns fp32 vectors [B, D] of int32 tokens [B, S] with lengths [B]."""
ForwardPass = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Aux]]
"""Returns hidden states [B, S, D] of tokens, positions and segments [B, S]."""
PaddedBatch = tuple[list[int], np.ndarray, np.ndarray]
"""Each row's index, int32 tokens [B, S] and lengths [B]; rows beyond the indices are
padding."""

_LONG = 512
"""Tokens of the longest rows that are computed several at once."""
_ROWS = 8
"""Rows of a call of at most ``_LONG`` tokens a row; longer ones go one by one."""


class Embedder:
    """Embeds token ids with a model, in a few shapes that are compiled once each:
    widths are powers of two, and rows ``_ROWS`` or as few as the mesh splits.
    ``params`` lie on ``mesh``, as loaded or as the engine lays them out; a text has
    ``max_length`` tokens at most. Raises MaxlmError: a model with an encoder and a
    decoder, or a sequence split over devices."""

    def __init__(self, model: Model, params: Params, mesh: Mesh, max_length: int):
        if isinstance(model, EncoderDecoder) or mesh.shape["context"] > 1:
            message = (
                "embeddings need an encoder or a decoder alone, on a mesh with "
                "context=1"
            )
            fix = "use another model or mesh"
            raise MaxlmError(message, where="embeddings", fix=fix)
        self.max_length = max_length
        self._model = model
        self._params = params
        # Shards of the batch, over which a batch's rows must divide.
        self._num_shards = prod(mesh.shape[axis] for axis in model.rules.batch)
        self._mesh = mesh
        self._lock = threading.Lock()
        self._programs: dict[
            tuple[tuple[int, ...], Pooling, str | None], EmbeddingProgram
        ] = {}

    def embed(
        self, rows: Sequence[Sequence[int]], pooling: Pooling | None = None
    ) -> np.ndarray:
        """Returns fp32 vectors [len(rows), D] of length 1.

        Args:
            rows: token ids of each text, 1 to ``max_length``.
            pooling: default: mean for encoders; last for causal models, whose last
                token alone has seen all.
        """
        embeddings = np.zeros((len(rows), self._model.config.d_model), np.float32)
        for indices, vectors in self.iterate_embeddings(rows, pooling):
            embeddings[indices] = vectors
        return embeddings

    def iterate_embeddings(
        self,
        rows: Sequence[Sequence[int]],
        pooling: Pooling | None = None,
        head: str | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yields some texts' indices and vectors, one dispatch after the other, as
        :meth:`embed` returns them, or what a head says of them."""
        for indices, tokens, lengths in self.iterate_batches(rows):
            program = self.compile_program(tokens.shape, pooling, head)
            yield indices, program(tokens, lengths)[: len(indices)]

    def iterate_batches(
        self,
        rows: Sequence[Sequence[int]],
        is_shared: Callable[[], bool] = lambda: False,
    ) -> Iterator[PaddedBatch]:
        """Yields the batches that :meth:`compile_program` makes programs for, without
        computing.

        Args:
            is_shared: whether others wait for the devices, asked before each batch: it
                then has one row, whose dispatch is short.
        """
        num_virtual = self._model.num_virtual_tokens
        rows = [[0] * num_virtual + [*row] for row in rows]
        max_length = self.max_length + num_virtual
        return iterate_padded_batches(rows, max_length, self._num_shards, is_shared)

    def compile_program(
        self,
        shape: tuple[int, ...],
        pooling: Pooling | None = None,
        head: str | None = None,
    ) -> EmbeddingProgram:
        """Returns what embeds batches of a shape [B, S], compiled once. It may be
        called in any thread; the devices go on with what they do."""
        pooling = pooling or ("mean" if isinstance(self._model, Encoder) else "last")
        key = (shape, pooling, head)
        program = self._programs.get(key)
        if program is not None:  # without waiting for another's compilation
            return program
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self._compile(*key)
            return self._programs[key]

    def _compile(
        self, shape: tuple[int, ...], pooling: Pooling, head: str | None
    ) -> EmbeddingProgram:
        jitted = jax.jit(_embed, static_argnums=(0, 1, 5))
        tokens = np.zeros(shape, np.int32)
        lengths = np.ones(shape[:1], np.int32)
        with jax.set_mesh(self._mesh):
            lowered = jitted.lower(
                self._model, pooling, self._params, tokens, lengths, head
            )
        compiled = bind_mesh(self._mesh, lowered.compile())
        return lambda tokens, lengths: np.asarray(
            compiled(self._params, tokens, lengths)
        )

    def apply_head(self, rows: Sequence[Sequence[int]], name: str) -> np.ndarray:
        """Returns what one of the model's further heads says at each text's last token,
        fp32 [len(rows), width]."""
        width = self._model.config.heads[name]
        values = np.zeros((len(rows), width), np.float32)
        for indices, batch_values in self.iterate_embeddings(rows, "last", name):
            values[indices] = batch_values
        return values


def iterate_padded_batches(
    rows: Sequence[Sequence[int]],
    max_length: int,
    num_shards: int,
    is_shared: Callable[[], bool] = lambda: False,
) -> Iterator[PaddedBatch]:
    """Yields rows in batches of few shapes, the longest ones first: widths are powers
    of two, and rows ``_ROWS`` or as few as the mesh splits (``num_shards``), for a
    single one while ``is_shared``."""
    # Indices of rows, the longest last.
    waiting = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while waiting:
        longest = len(rows[waiting[-1]])
        # The next power of two from 16 on, but no more than the longest row may have.
        width = max(16, 1 << (longest - 1).bit_length())
        width = min(width, max(max_length, longest))
        goes_alone = width > _LONG or is_shared()
        max_rows = 1 if goes_alone else _ROWS
        indices = [waiting.pop() for _ in range(min(len(waiting), max_rows))]
        # Two shapes for each width: a single row, and _ROWS padded; both rounded up to
        # whole shards.
        num_rows = 1 if len(indices) == 1 else _ROWS
        num_rows = -(-num_rows // num_shards) * num_shards
        tokens = np.zeros((num_rows, width), np.int32)
        lengths = np.ones(num_rows, np.int32)
        for place, index in enumerate(indices):
            lengths[place] = len(rows[index])
            tokens[place, : lengths[place]] = rows[index]
        yield indices, tokens, lengths


def compute_padded_states(
    forward: ForwardPass, rules: AxisRules, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns hidden states [B, S, D] of rows [B, S] with ``lengths`` [B] tokens each;
    the tokens' places [B, S], and the lengths [B, 1], as they are laid out."""
    by_row = rules.spec("batch", None)
    tokens = reshard(tokens, by_row)
    lengths = reshard(lengths, rules.spec("batch"))[:, None]
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    places = reshard(jnp.broadcast_to(places, tokens.shape), by_row)
    segments = (places < lengths).astype(jnp.int32)
    # Padding stands at position 0, as in training.
    hidden, _ = forward(tokens, places * segments, segments)
    return hidden, places, lengths


def _embed(
    model: Model,
    pooling: Pooling,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    head: str | None,
) -> jax.Array:
    """Returns vectors [B, D] of rows [B, S] with ``lengths`` [B] tokens each, or what a
    head makes of them."""
    bound = bind(model, params)
    forward = bound.forward_without_head if isinstance(bound, Encoder) else bound
    hidden, places, lengths = compute_padded_states(
        forward, model.rules, tokens, lengths
    )
    # [B, S]: each token's weight in the pooled vector. Virtual tokens have none.
    first = model.num_virtual_tokens
    is_real = (places >= first) & (places < lengths)
    weights_by_pooling = {
        "mean": is_real / (lengths - first),
        "first": places == first,
        "last": places == lengths - 1,
    }
    hidden = reshard(hidden.astype(jnp.float32), model.rules.spec("batch", None, None))
    weights = weights_by_pooling[pooling].astype(jnp.float32)
    pooled = jnp.einsum("bs,bsd->bd", weights, hidden)
    replicated = PartitionSpec()
    if head is not None:
        return reshard(bound.apply_head(head, pooled), replicated)
    norm = jnp.sqrt(jnp.sum(pooled**2, axis=-1, keepdims=True))
    pooled /= jnp.maximum(norm, 1e-12)
    return reshard(pooled, replicated)
