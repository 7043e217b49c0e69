"""A stack of layers differentiated one by one: JAX's own gradients, and nothing kept
twice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.parallel.layers import LayerTurn, scan_layers

L, B, D = 6, 3, 7


def layer(layer_params, carry, context, shared):
    x, total = carry
    x = x + shared
    shift, scale = context
    y = jnp.tanh(x @ layer_params["w"] + shift) * scale + layer_params["b"]
    return x + y, total + jnp.sum(y**2)


def other(layer_params, carry, context, shared):
    """A layer of another kind with the same parameters."""
    x, total = carry
    return x - 2 * shared + jnp.sin(x @ layer_params["w"]) * context[1] - layer_params[
        "b"
    ], total


def inputs():
    """Parameters of six layers, x, what layers share and their context."""
    draw = np.random.default_rng(0).standard_normal
    params = {"w": draw((L, D, D)) / D**0.5, "b": draw((L, D))}
    x = draw((B, D))
    context = (draw((B, D)), draw((B, 1)))
    values = params, x, 0.1 * draw((B, D)), context
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), values)


def make_turn(stack, run, cast=lambda layer: layer):
    """A turn that records nothing."""
    return LayerTurn(stack, lambda *arrays: (run(*arrays), None), cast)


def by_scan(layers, params, x, shared, context, cast=lambda layer: layer):
    carry = x, jnp.zeros(())
    turns = [make_turn(0, layer, cast) for layer in layers]
    (out, total), _ = scan_layers(turns, [params], carry, context, shared=shared)
    return jnp.sum(jnp.sin(out)) + 0.5 * total


def unrolled(layers, params, x, shared, context):
    carry = x, jnp.zeros(())
    for number in range(L):
        layer_params = jax.tree.map(lambda a, n=number: a[n], params)
        carry = layers[number % len(layers)](layer_params, carry, context, shared)
    return jnp.sum(jnp.sin(carry[0])) + 0.5 * carry[1]


KINDS = {
    "alike": [layer],
    "recomputed": [jax.checkpoint(layer)],
    "by turns": [layer, other, jax.checkpoint(layer)],
}


@pytest.mark.heavy
@pytest.mark.parametrize("kinds", KINDS)
def test_gradients_are_those_of_layers_written_out(kinds):
    grads = partial(jax.value_and_grad, argnums=(0, 1, 2))
    got = jax.jit(grads(partial(by_scan, KINDS[kinds])))(*inputs())
    want = grads(partial(unrolled, KINDS[kinds]))(*inputs())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)
    assert np.abs(got[1][2]).max() > 0.1


def narrow(layer_params, carry, context, shared):
    """A layer with parameters of its own shape."""
    x, total = carry
    gate = jax.nn.sigmoid(x @ layer_params["gate"])
    return x + gate * jnp.cos(x + shared) * context[1], total - jnp.sum(gate)


@pytest.mark.heavy
def test_unlike_layers_by_turns_are_those_written_out():
    """Periods of two layers of one stack, one of another, and one of the first again:
    six and two layers."""
    params, x, shared, context = inputs()
    draw = np.random.default_rng(1).standard_normal
    others = {"gate": jnp.asarray(draw((2, D, 1)), jnp.float32)}
    order = [(0, layer), (0, jax.checkpoint(layer)), (1, narrow), (0, other)]
    turns = [make_turn(stack, run) for stack, run in order]

    def by_scan(params, others, x, shared):
        carry = x, jnp.zeros(())
        stacks = [params, others]
        (out, total), _ = scan_layers(turns, stacks, carry, context, shared=shared)
        return jnp.sum(jnp.sin(out)) + 0.5 * total

    def written_out(params, others, x, shared):
        carry = x, jnp.zeros(())
        taken = [0, 0]
        for stack, run in order * 2:
            index = taken[stack]
            taken[stack] += 1
            tree = (params, others)[stack]
            layer_params = {name: array[index] for name, array in tree.items()}
            carry = run(layer_params, carry, context, shared)
        return jnp.sum(jnp.sin(carry[0])) + 0.5 * carry[1]

    arguments = (params, others, x, shared)
    grads = partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    got = jax.jit(grads(by_scan))(*arguments)
    want = grads(written_out)(*arguments)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)
    assert np.abs(got[1][1]["gate"]).max() > 0.1


@pytest.mark.parametrize("remat", [False, True])
def test_parameters_and_context_are_not_kept_again(remat):
    """What the forward scan stacks for the backward one is of activations' shapes."""
    layers = [jax.checkpoint(layer) if remat else layer]
    jaxpr = jax.make_jaxpr(jax.grad(partial(by_scan, layers), argnums=(0, 1)))(
        *inputs()
    )
    forward, backward = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    stacked = [
        v.aval.shape for v in forward.outvars[2:]
    ]  # after the carry: x and total
    assert stacked
    assert set(stacked) <= {(L, B, D), (L,)}
    if remat:
        assert stacked.count((L, B, D)) == 1  # each layer's input alone
    assert backward.params["reverse"]


def test_the_program_does_not_grow_with_depth():
    def size(depth: int) -> int:
        params, *others = inputs()
        deep = jax.tree.map(lambda a: jnp.concatenate([a] * depth), params)
        lowered = jax.jit(jax.grad(partial(by_scan, [layer]))).lower(deep, *others)
        return len(lowered.as_text().splitlines())

    assert size(1) == size(8)


def test_gradients_are_held_in_the_dtype_that_a_layer_computes_in():
    """bf16 until all layers are through, fp32 at the end, and the same as with the cast
    within."""

    def cast(layer_params):
        return layer_params | {"w": layer_params["w"].astype(jnp.bfloat16)}

    args = inputs()
    loss = partial(by_scan, [layer], cast=cast)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(*args)
    backward = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"][-1]
    stacked = {v.aval.shape: v.aval.dtype for v in backward.outvars if v.aval.ndim > 2}
    assert stacked == {(L, D, D): jnp.bfloat16}
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*args)
    assert {g.dtype for g in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    within = jax.grad(
        partial(
            unrolled, [lambda layer_params, *rest: layer(cast(layer_params), *rest)]
        ),
        argnums=(0, 1),
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-2, atol=2e-2), got, within(*args)
    )


@pytest.mark.heavy
def test_a_shared_gradient_is_summed_in_its_own_dtype():
    """Of 600 layers that each give 1: a sum in bf16 would stop at 256."""
    params = {"w": jnp.ones((600, 1))}

    def add_shared(layer_params, carry, context, shared):
        assert shared.dtype == jnp.bfloat16
        return carry + (layer_params["w"].astype(shared.dtype) * shared)

    def total(shared):
        turns = [make_turn(0, add_shared)]
        carry = jnp.zeros(1, jnp.bfloat16)
        out, _ = scan_layers(
            turns,
            [params],
            carry,
            None,
            shared=shared,
            cast_shared=lambda shared: shared.astype(jnp.bfloat16),
        )
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))(jnp.zeros(1))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, [600.0])
