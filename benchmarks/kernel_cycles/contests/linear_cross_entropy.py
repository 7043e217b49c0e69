"""The linear cross-entropy: the loss alone, and with both gradients. XLA's form has no kernels,
and its time is mostly memory's, which is not counted here."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cycles.contests.contest import OWN, Benchmark, Contender, Pass
from benchmarks.kernel_cycles.static.measure import Spec

_LOSS, _GRADIENT = "loss", "loss + gradient"


def own(
    *, gradient: bool, tokens: int, d: int, vocab: int
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """This package's, of a table [V, D]."""
    from pallas_kernels.linear_cross_entropy import loss_and_gradients

    def run(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        sums, gradients = loss_and_gradients(
            hidden, table.T, targets, weights, gradient=gradient, implementation="tpu"
        )
        return sums if gradients is None else (sums, gradients[0], gradients[1].T)

    struct = jax.ShapeDtypeStruct
    return run, (
        struct((tokens, d), jnp.bfloat16),
        struct((vocab, d), jnp.bfloat16),
        struct((tokens,), jnp.int32),
        struct((tokens,), jnp.float32),
    )


def linear_cross_entropy(options: argparse.Namespace) -> Benchmark:
    tokens, d, vocab = options.tokens, options.d, options.vocab
    problem = {"tokens": tokens, "d": d, "vocab": vocab}
    # Whether sums are scaled again hangs on the logits: counted as if they always were.
    programs = {
        name: [Spec(f"{__name__}:own", problem | {"gradient": gradient}, assume_runs=True)]
        for name, gradient in ((_LOSS, False), (_GRADIENT, True))
    }
    title = (
        f"linear_cross_entropy, tokens {tokens}, D {d}, vocabulary {vocab}, bf16, as if sums were "
        "scaled again at every block (an upper bound)"
    )
    product = 2 * tokens * d * vocab
    # Logits; the gradients of the hidden states and of the head.
    passes = [Pass(_LOSS, product), Pass(_GRADIENT, 3 * product)]
    return Benchmark(title, [Contender(OWN, programs)], passes)
