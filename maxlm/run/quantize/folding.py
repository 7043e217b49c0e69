"""Factors of a map's inputs, divided out of what makes them.

Which parameter makes a map's inputs differs among families: a norm before it, a map whose
outputs are multiplied by an activation, values that attention adds up. A fold is found by
trying: factors go into the map and out of a candidate, and the layer must still return
what it did.

Letters: C inputs of a map, K kv heads, H head dim.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.models.params import Params, ParamSpec, flatten_names, is_leaf
from maxlm.models.targets import split_dims
from maxlm.run.quantize.layers import MapNames

TOLERANCE = 1e-3
"""Largest relative difference of a layer's output that is rounding."""
_LARGEST_FACTOR = 1.5
"""Of those that a fold is tried with."""


@dataclass(frozen=True)
class Fold:
    """Factors that can be moved between a parameter and the maps that read what it
    makes."""

    source: str
    """A norm's scale, or a kernel whose outputs are the maps' inputs."""
    readers: MapNames
    rule: Literal["scale", "one_plus_scale", "outputs"]
    """scale: the norm multiplies by it; one_plus_scale: by it and one (Gemma)."""
    group: int = 1
    """Consecutive blocks of inputs that one block of the source's outputs makes: query
    heads of a kv head."""
    block: int = 1
    """Inputs of such a block: a head's."""

    def tie_factors(self, factors: jax.Array) -> jax.Array:
        """Returns factors [C] that the source can have: the geometric mean of those
        that one of its outputs makes."""
        if self.group == 1:
            return factors
        blocks = jnp.log(factors).reshape(-1, self.group, self.block)
        means = jnp.exp(blocks.mean(1, keepdims=True))
        return jnp.broadcast_to(means, blocks.shape).reshape(-1)

    def apply(
        self, params: Params, specs: Mapping[str, ParamSpec], factors: jax.Array
    ) -> Params:
        """Returns a layer's parameters with the readers' inputs multiplied by factors
        [C], and what makes them divided.

        Args:
            specs: declarations of the layer's stack, by name.
        """
        flat = flatten_names(params, is_leaf)
        for name in self.readers:
            flat[name] = _scale_inputs(flat[name], specs[name], factors)
        source = flat[self.source]
        if self.rule == "scale":
            flat[self.source] = source / factors
        elif self.rule == "one_plus_scale":
            flat[self.source] = (1 + source) / factors - 1
        else:
            by_output = factors.reshape(-1, self.group, self.block)[:, 0].reshape(-1)
            spec = specs[self.source]
            flat[self.source] = _divide_outputs(source, spec, by_output)
        bias = self.source.rpartition(".")[0] + ".bias"
        if bias in flat:
            by_output = factors.reshape(-1, self.group, self.block)[:, 0]
            flat[bias] = flat[bias] / by_output.reshape(flat[bias].shape)
        structure = jax.tree.structure(params, is_leaf=is_leaf)
        return jax.tree.unflatten(structure, list(flat.values()))


def find_folds(
    run: Callable[[Params], jax.Array],
    params: Params,
    specs: Mapping[str, ParamSpec],
    reader_groups: Iterable[MapNames],
) -> dict[MapNames, Fold]:
    """Finds a fold for each group of maps that read one input, where there is one.

    Args:
        run: returns what the layer makes of some rows.
        params: the layer's.
        specs: declarations of its stack, by name.
    """
    expected = run(params)
    size = jnp.abs(expected).max()
    folds: dict[MapNames, Fold] = {}
    for readers in reader_groups:
        for fold in _list_candidates(readers, params, specs):
            num_inputs = _count_inputs(specs[readers[0]])
            factors = _draw_factors(num_inputs)
            folded = fold.apply(params, specs, fold.tie_factors(factors))
            difference = jnp.abs(run(folded) - expected).max() / size
            if float(difference) < TOLERANCE:
                folds[readers] = fold
                break
    return folds


def _list_candidates(
    readers: MapNames, params: Params, specs: Mapping[str, ParamSpec]
) -> Iterable[Fold]:
    """Yields folds whose shapes fit."""
    num_inputs = _count_inputs(specs[readers[0]])
    reader_spec = specs[readers[0]]
    input_start, output_start = split_dims(reader_spec)
    # Inputs of a head, where they are heads.
    block = reader_spec.shape[output_start - 1] if output_start - input_start > 1 else 1
    for name, value in flatten_names(params, is_leaf).items():
        spec = specs[name]
        if not isinstance(spec, ParamSpec) or name in readers:
            continue
        if name.endswith(".scale") and value.shape == (num_inputs,):
            yield Fold(name, readers, "scale")
            yield Fold(name, readers, "one_plus_scale")
        elif name.endswith(".kernel") and spec.role == "matrix":
            _, first_output = split_dims(spec)
            num_outputs = int(np.prod(spec.shape[first_output:]))
            group, rest = divmod(num_inputs, num_outputs)
            if rest == 0 and (group == 1 or num_outputs % block == 0):
                yield Fold(name, readers, "outputs", group, block)


def _draw_factors(num_inputs: int) -> jax.Array:
    random = np.random.default_rng(0)
    factors = random.uniform(1 / _LARGEST_FACTOR, _LARGEST_FACTOR, num_inputs)
    return jnp.asarray(factors, jnp.float32)


def _count_inputs(spec: ParamSpec) -> int:
    start, end = split_dims(spec)
    return int(np.prod(spec.shape[start:end]))


def _scale_inputs(kernel: jax.Array, spec: ParamSpec, factors: jax.Array) -> jax.Array:
    """Multiplies a layer's kernel [*inputs, *outputs] by factors of its inputs."""
    start, end = split_dims(spec)
    num_input_dims = end - start
    shape = (*kernel.shape[:num_input_dims], *(1,) * (kernel.ndim - num_input_dims))
    return kernel * factors.reshape(shape)


def _divide_outputs(
    kernel: jax.Array, spec: ParamSpec, factors: jax.Array
) -> jax.Array:
    """Divides a layer's kernel [*inputs, *outputs] by factors of its outputs."""
    start, end = split_dims(spec)
    return kernel / factors.reshape(kernel.shape[end - start :])
