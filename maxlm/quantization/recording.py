"""Collects the inputs of linear maps while a layer runs.

In the place of each kernel stands a leaf that computes what the kernel does, and tells a
recorder of the input that it is given. Any layer of any family is calibrated so,
without a word of it in the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax

from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    ShardedWeight,
    StoredParam,
    flatten_names,
    is_leaf,
)


class InputRecorder:
    """The inputs of the maps of one call, while it is traced."""

    def __init__(self) -> None:
        self.inputs: list[jax.Array] = []
        """[B, S, *inputs] each, in the order in which maps first read them."""
        self.readers: list[list[str]] = []
        """The names of the maps that read each of them."""

    def record(self, name: str, x: jax.Array) -> None:
        """Notes that a map is given x."""
        for index, known in enumerate(self.inputs):
            if known is x:
                self.readers[index].append(name)
                return
        self.inputs.append(x)
        self.readers.append([name])


@dataclass(frozen=True)
class RecordedParam(AdaptedParam):
    """A kernel whose inputs are recorded."""

    name: str = field(metadata={"static": True})
    recorder: InputRecorder = field(metadata={"static": True})

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        return reader.read(self.base)

    def prepare_input(self, x: jax.Array, reader: ParamReader) -> jax.Array:
        self.recorder.record(self.name, x)
        return x


jax.tree_util.register_dataclass(RecordedParam)


def record_inputs(
    run: Callable[[Params], StoredParam],
    params: Params,
    specs: Params,
) -> tuple[StoredParam, dict[tuple[str, ...], jax.Array]]:
    """Runs a function of parameters, and returns what it does and the inputs of all
    linear maps: [B, S, *inputs] by the names of the maps that read it. Under
    ``jax.jit``.

    Args:
        specs: the parameters' declarations, of matrices in one layer.
    """
    recorder = InputRecorder()
    flat_specs = flatten_names(specs, is_leaf)

    def add_recorder(path: jax.tree_util.KeyPath, param: StoredParam) -> StoredParam:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = flat_specs[name]
        is_kernel = isinstance(spec, ParamSpec) and name.endswith(".kernel")
        if not is_kernel:
            return param
        return RecordedParam(param, name, recorder)

    recorded = jax.tree_util.tree_map_with_path(add_recorder, params, is_leaf=is_leaf)
    result = run(recorded)
    inputs = {
        tuple(readers): x
        for readers, x in zip(recorder.readers, recorder.inputs, strict=True)
    }
    return result, inputs
