"""Runs a model's layers one after the other, on calibration rows.

Shapes: B rows, S tokens, D model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.config import MaxlmError
from maxlm.models.architectures.runs import LayerPlace, LayerRun
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.architectures.trunk import TokenInputs
from maxlm.models.params import (
    Params,
    bind,
    flatten_names,
    param_specs,
    take_stacked_layer,
)
from maxlm.models.scan import SharedKeys
from maxlm.quantization.recording import record_inputs

MapNames = tuple[str, ...]
"""The maps of a layer that read one input, by their names in it."""


class LayerBatch(NamedTuple):
    """Some rows between two layers."""

    x: jax.Array
    """[B, S, D], what the layer before returned."""
    keys: SharedKeys
    embeddings: jax.Array
    """[B, S, D], what has entered the first layer."""
    tokens: jax.Array
    """int [B, S]."""


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer whose turn it is."""

    number: int
    """Of all layers of the model, from 0."""
    run: LayerRun
    place: LayerPlace

    @property
    def stack_name(self) -> str:
        """What the names of its parameters begin with: ``layers``."""
        return self.place.stack.name


class LayerWalk:
    """A decoder's layers, and the rows that go through them.

    Args:
        params: all of the model's, dense, on ``mesh``.
        rows: int [N, S], tokens.
        batch_rows: rows of a batch.
    """

    def __init__(
        self,
        model: Decoder,
        params: Params,
        mesh: Mesh,
        rows: np.ndarray,
        batch_rows: int,
    ):
        if not isinstance(model, Decoder):
            message = "calibrating is implemented for decoders"
            fix = "use a scheme without calibration, such as int8"
            raise MaxlmError(message, where="model.architecture", fix=fix)
        self.model = model
        self.mesh = mesh
        self.params = params
        self.layers = [
            CalibratedLayer(number, run, place)
            for number, (run, place) in enumerate(_list_places(model))
        ]
        self.batches = [
            self._embed(rows[start : start + batch_rows])
            for start in range(0, len(rows), batch_rows)
        ]
        self._run = jax.jit(self._run_layer, static_argnames=("run", "place"))
        self._record = jax.jit(self._record_layer, static_argnames=("run", "place"))

    def count_bytes(self) -> int:
        """Counts the bytes of all layers' dense parameters."""
        arrays = flatten_names(self.params)
        stacks = tuple(f"{name}." for name in self.model.stacks)
        return sum(
            array.nbytes for name, array in arrays.items() if name.startswith(stacks)
        )

    def take_params(self, layer: CalibratedLayer) -> Params:
        """Returns a layer's dense parameters."""
        stack = self.params
        for name in layer.stack_name.split("."):
            stack = stack[name]
        return take_stacked_layer(stack, layer.place.index)

    def get_specs(self, layer: CalibratedLayer) -> Params:
        """Returns the declarations of a layer's stack."""
        return param_specs(self.model.stacks[layer.stack_name])

    def record(
        self, layer: CalibratedLayer, params: Params
    ) -> Iterator[dict[MapNames, jax.Array]]:
        """Yields for each batch the inputs of the layer's maps, [tokens, C] each."""
        for batch in self.batches:
            yield self._record(
                batch, params, self.params, run=layer.run, place=_first(layer)
            )

    def advance(self, layer: CalibratedLayer, params: Params) -> None:
        """Takes all rows through a layer with these parameters."""
        self.batches = [
            self._run(batch, params, self.params, run=layer.run, place=_first(layer))
            for batch in self.batches
        ]

    def run_first_batch(self, layer: CalibratedLayer, params: Params) -> jax.Array:
        """Returns what the layer makes of the first batch, [B, S, D]."""
        batch = self.batches[0]
        place = _first(layer)
        return self._run(batch, params, self.params, run=layer.run, place=place).x

    def _embed(self, rows: np.ndarray) -> LayerBatch:
        sharding = NamedSharding(self.mesh, self.model.rules.spec("batch", None))
        tokens = jax.device_put(rows, sharding)

        @jax.jit
        def embed(params: Params, tokens: jax.Array) -> jax.Array:
            bound = bind(self.model, params)
            positions = _make_positions(tokens)
            return bound.expand_streams(bound.embed(tokens, positions))

        x = embed(self.params, tokens)
        return LayerBatch(x, {}, x, tokens)

    def _run_layer(
        self,
        batch: LayerBatch,
        params: Params,
        all_params: Params,
        *,
        run: LayerRun,
        place: LayerPlace,
    ) -> LayerBatch:
        """Runs a layer with parameters ``params``; ``all_params`` are the model's, of
        which it may read what layers share."""
        model = bind(self.model, all_params)
        x, keys = model.run_one_layer(
            run,
            place,
            params,
            batch.x,
            TokenInputs(_make_positions(batch.tokens)),
            batch.keys,
            batch.embeddings,
        )
        return batch._replace(x=x, keys=keys)

    def _record_layer(
        self,
        batch: LayerBatch,
        params: Params,
        all_params: Params,
        *,
        run: LayerRun,
        place: LayerPlace,
    ) -> dict[MapNames, jax.Array]:
        specs = param_specs(self.model.stacks[place.stack.name])

        def run_layer(params: Params) -> LayerBatch:
            return self._run_layer(batch, params, all_params, run=run, place=place)

        _, inputs = record_inputs(run_layer, params, specs)
        return {
            names: x.reshape(x.shape[0] * x.shape[1], -1) for names, x in inputs.items()
        }


def _first(layer: CalibratedLayer) -> LayerPlace:
    """Returns the place of a layer's kind, the same for all layers that compute alike:
    one program runs them."""
    return layer.place._replace(index=0)


def _list_places(model: Decoder) -> Iterator[tuple[LayerRun, LayerPlace]]:
    for run in model.config.layer_runs:
        for place in run.iterate_places():
            yield run, place


def _make_positions(tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(positions, tokens.shape)
