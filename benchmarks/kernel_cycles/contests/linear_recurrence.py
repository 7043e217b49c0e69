"""Linear recurrences in chunks and their backward pass. XLA's form is no kernel, and has
its cycles counted by ``python -m benchmarks.linear_recurrence cycles``."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cycles.contests.contest import OWN, Benchmark, Contender, Pass
from benchmarks.kernel_cycles.static.measure import Spec

Program = tuple[Callable[..., Any], Sequence[Any]]

# Whether decays are by key channel, and whether there is a delta rule.
RECURRENCE_KINDS = {
    "state_space": (False, False),
    "gated_linear": (True, False),
    "gated_delta": (False, True),
    "kimi_delta": (True, True),
}


def own(
    *,
    kind: str,
    tokens: int,
    key_heads: int,
    value_heads: int,
    features: int,
    chunk_size: int,
    is_backward: bool,
    backend: str = "tpu",
) -> Program:
    """This package's, forward or also backward."""
    from pallas_kernels.linear_recurrence import linear_recurrence

    by_channel, is_delta = RECURRENCE_KINDS[kind]
    keys = jax.ShapeDtypeStruct((1, tokens, key_heads, features), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((1, tokens, value_heads, features), jnp.bfloat16)
    by_head = jax.ShapeDtypeStruct((1, tokens, value_heads), jnp.float32)
    channels = jax.ShapeDtypeStruct(values.shape, jnp.float32)
    log_decay = channels if by_channel else by_head
    arguments = [keys, keys, values, log_decay]
    if is_delta:
        arguments.append(by_head)

    def run(*operands: jax.Array) -> Any:
        def recur(*operands: jax.Array):
            return linear_recurrence(*operands, chunk_size=chunk_size, backend=backend)

        if not is_backward:
            return recur(*operands)
        results, pull = jax.vjp(recur, *operands)
        return pull(results)

    return run, arguments


def count_forward_flops(
    is_delta: bool, tokens: int, heads: int, features: int, chunk_size: int
) -> int:
    """Counts FLOPs of a forward pass that the formulas need at least (value heads apart,
    triangles as halves): weights and what they read, the state read and written; of the
    delta rule also keys on keys, what these take from the state and the inverse's
    product with values."""
    within_chunk = tokens * chunk_size * features
    with_state = 2 * tokens * features * features
    products = 2 * within_chunk + 2 * with_state
    if is_delta:
        products += 2 * within_chunk + with_state
    return heads * products


def linear_recurrence(options: argparse.Namespace) -> Benchmark:
    problem = {
        "kind": options.kind,
        "tokens": options.tokens,
        "key_heads": options.key_heads,
        "value_heads": options.value_heads,
        "features": options.features,
        "chunk_size": options.chunk_size,
    }
    programs = {
        name: [Spec(f"{__name__}:own", problem | {"is_backward": name == "backward"})]
        for name in ("forward", "backward")
    }
    _, is_delta = RECURRENCE_KINDS[options.kind]
    flops = count_forward_flops(
        is_delta,
        options.tokens,
        options.value_heads,
        options.features,
        options.chunk_size,
    )
    title = (
        f"linear_recurrence, {options.kind}, {options.tokens} tokens, "
        f"{options.key_heads} and {options.value_heads} heads of {options.features}, "
        f"chunks of {options.chunk_size}, bf16"
    )
    # Each product of the forward pass has two of its gradients.
    passes = [Pass("forward", flops, False), Pass("backward", 2 * flops, True)]
    return Benchmark(title, [Contender(OWN, programs)], passes)
