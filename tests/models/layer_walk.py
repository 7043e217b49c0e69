"""A model's layers applied in a plain Python loop, for comparison with its scans."""

from typing import Any

import jax

from maxlm.models.architectures.transformer import Decoder
from maxlm.models.architectures.trunk import TokenInputs
from maxlm.models.params import Params, bind, get_values


def apply_layers_one_by_one(
    model: Decoder,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Computes hidden states [B, S, D], layer by layer in the order of the pattern, each
    with the keys and the input that it reads handed to it.

    To be called without ``jit``: each kind of layer is compiled once, however many
    layers it has.
    """

    @jax.jit
    def embed(params):
        bound = bind(model, params)
        x = bound.embed(tokens, positions)
        layer_inputs = None
        if bound.layer_inputs is not None:
            layer_inputs = bound.layer_inputs(tokens, x)
        return bound.expand_streams(x), layer_inputs

    x, layer_inputs = embed(params)
    stacks = bind(model, params).stacks
    last_keys = {}
    number = 0
    for run in model.config.layer_runs:
        contexts = model._list_contexts(run, TokenInputs(positions, segment_ids))
        compiled: dict[tuple[str, int], Any] = {}
        for place in run.iterate_places():
            kind = run.kinds[place.kind_index]
            sort = place.stack.name, place.kind_index
            if sort not in compiled:
                context = contexts[place.kind_index]
                inputs = model._make_attention_inputs(kind, context, None)
                compiled[sort] = compile_layer(model.stacks[place.stack.name], inputs)
            stack_params = get_values(stacks[place.stack.name])
            keys_to_read = None if kind.keys_of is None else last_keys[kind.keys_of]
            layer_input = None if layer_inputs is None else layer_inputs[number]
            x, keys = compiled[sort](
                stack_params, place.index, x, keys_to_read, layer_input
            )
            if kind.keys_of is None:
                last_keys[run.kind_names[place.kind_index]] = keys
            number += 1

    @jax.jit
    def normalise(params, x):
        return bind(model, params).apply_final_norm(x)

    return normalise(params, x)


def compile_layer(block, inputs) -> Any:
    """Returns a jitted ``(params of the stack, the layer's index in it, x, keys to read,
    layer input) -> (x, keys)``."""

    @jax.jit
    def apply(stack_params, index, x, keys_to_read, layer_input):
        params = jax.tree.map(lambda a: a[index], stack_params)
        read = inputs._replace(shared=keys_to_read)
        output = bind(block, params)(x, read, layer_input=layer_input)
        return output.x, output.keys_values

    return apply
