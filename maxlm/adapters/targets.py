"""Declares what an adapter adds to a kernel."""

from dataclasses import replace

from maxlm.models.params import Initializer, ParamSpec
from maxlm.models.targets import split_dims


def declare_input_map(spec: ParamSpec, rank: int, init: Initializer) -> ParamSpec:
    """Declares a map from a kernel's inputs to ``rank`` numbers."""
    _, output_start = split_dims(spec)
    return replace(
        spec,
        shape=(*spec.shape[:output_start], rank),
        axes=(*spec.axes[:output_start], None),
        init=init,
    )


def declare_output_map(spec: ParamSpec, rank: int, init: Initializer) -> ParamSpec:
    """Declares a map from ``rank`` numbers to a kernel's outputs."""
    input_start, output_start = split_dims(spec)
    return replace(
        spec,
        shape=(*spec.shape[:input_start], rank, *spec.shape[output_start:]),
        axes=(*spec.axes[:input_start], None, *spec.axes[output_start:]),
        contracting_dims=(input_start,),
        init=init,
    )


def declare_vector(
    spec: ParamSpec, init: Initializer, *, of_inputs: bool = False
) -> ParamSpec:
    """Declares a number for each of a kernel's outputs, or inputs."""
    input_start, output_start = split_dims(spec)
    inputs = slice(input_start, output_start)
    outputs = slice(output_start, None)
    dims = inputs if of_inputs else outputs
    return replace(
        spec,
        shape=(*spec.shape[:input_start], *spec.shape[dims]),
        axes=(*spec.axes[:input_start], *spec.axes[dims]),
        role="vector",
        contracting_dims=(),
        init=init,
    )
