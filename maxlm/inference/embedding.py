"""Embeddings of texts: hidden states pooled over tokens, without a cache."""

import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec, reshard

from maxlm.config import MaxlmError
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.params import Params, bind
from maxlm.sharding import AxisRules, bind_mesh

Pooling = Literal["mean", "last", "first"]
"""Over all tokens of a text; its last one (causal models); its first one ([CLS])."""

EmbeddingProgram = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Returns fp32 vectors [B, D] of int32 tokens [B, S] with lengths [B]."""
PaddedBatch = tuple[list[int], np.ndarray, np.ndarray]
"""Each row's index, int32 tokens [B, S] and lengths [B]; rows beyond the indices are
padding."""

_LONG = 512
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
            what = "embeddings need an encoder or a decoder alone, on a mesh with context=1"
            raise MaxlmError(what, where="embeddings", fix="use another model or mesh")
        self.max_length, self._model, self._params = max_length, model, params
        self._ways = prod(mesh.shape[axis] for axis in model.rules.batch)
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
        found = np.zeros((len(rows), self._model.config.d_model), np.float32)
        for batch, vectors in self.iterate_embeddings(rows, pooling):
            found[batch] = vectors
        return found

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
        return iterate_padded_batches(
            rows, self.max_length + num_virtual, self._ways, is_shared
        )

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
        found = np.zeros((len(rows), self._model.config.heads[name]), np.float32)
        for batch, values in self.iterate_embeddings(rows, "last", name):
            found[batch] = values
        return found


def iterate_padded_batches(
    rows: Sequence[Sequence[int]],
    max_length: int,
    num_ways: int,
    is_shared: Callable[[], bool] = lambda: False,
) -> Iterator[PaddedBatch]:
    """Yields rows in batches of few shapes, the longest ones first: widths are powers
    of two, and rows ``_ROWS`` or as few as the mesh splits (``num_ways``), for a single
    one while ``is_shared``."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        longest = len(rows[order[-1]])
        width = min(max(16, 1 << (longest - 1).bit_length()), max(max_length, longest))
        most = 1 if width > _LONG or is_shared() else _ROWS
        indices = [order.pop() for _ in range(min(len(order), most))]
        num_rows = -(-(1 if len(indices) == 1 else _ROWS) // num_ways) * num_ways
        tokens = np.zeros((num_rows, width), np.int32)
        lengths = np.ones(num_rows, np.int32)
        for place, index in enumerate(indices):
            lengths[place] = len(rows[index])
            tokens[place, : lengths[place]] = rows[index]
        yield indices, tokens, lengths


def compute_padded_states(
    forward: Callable[..., Any], rules: AxisRules, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns hidden states [B, S, D] of rows [B, S] with ``lengths`` [B] tokens each;
    the tokens' places [B, S], and the lengths [B, 1], as they are laid out."""
    by_row = rules.spec("batch", None)
    tokens = reshard(tokens, by_row)
    lengths = reshard(lengths, rules.spec("batch"))[:, None]
    places = jnp.broadcast_to(
        jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
    )
    places = reshard(places, by_row)
    segments = (places < lengths).astype(jnp.int32)
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
    bound: Any = bind(model, params)
    forward = bound.forward_without_head if isinstance(bound, Encoder) else bound
    hidden, places, lengths = compute_padded_states(
        forward, model.rules, tokens, lengths
    )
    first = model.num_virtual_tokens
    is_real = (places >= first) & (places < lengths)
    means = is_real / (lengths - first)
    weights = {"mean": means, "first": places == first, "last": places == lengths - 1}
    hidden = reshard(hidden.astype(jnp.float32), model.rules.spec("batch", None, None))
    pooled = jnp.einsum("bs,bsd->bd", weights[pooling].astype(jnp.float32), hidden)
    if head is not None:
        return reshard(bound.apply_head(head, pooled), PartitionSpec())
    pooled /= jnp.maximum(jnp.sqrt(jnp.sum(pooled**2, axis=-1, keepdims=True)), 1e-12)
    return reshard(pooled, PartitionSpec())
