"""What short chunks cost on a CPU: paged attention in C++ and in XLA by sizes of
blocks, and RoPE's cosines by layer.

    python benchmarks/cpu_attention.py

Sizes are SmolLM2-135M's: 30 layers, 9 heads of 64 over 3, fp32, pages of 16, a step of
512 tokens. Prints milliseconds, the least of five runs.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.models.layers.rope import compute_rotary, materialize_rotary, rotate
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.xla import XlaBlockSizes

LAYERS, PAGE, TOKENS = 30, 16, 512
# Queries of each row, and keys that each sees.
CASES = {
    "1 chunk of 512": ([512], 512),
    "4 of 100, 400 keys": ([100] * 4, 400),
    "28 of 15, 40 keys": ([15] * 28, 40),
}
SIZES = [XlaBlockSizes(q, k) for q, k in ((16, 64), (64, 64), (64, 128), (256, 512))]
WAYS = {"C++": {"backend": "cpu"}, "XLA": {"backend": "xla"}} | {
    f"XLA, {own.queries} queries, {own.keys} keys": {
        "backend": "xla",
        "block_sizes": own,
    }
    for own in SIZES
}


def measure(function, *arguments):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def measure_attention(counts, num_keys, way):
    rows = 32
    rng = np.random.default_rng(0)
    counts = np.pad(counts, (0, rows - len(counts)))
    lengths = np.where(counts > 0, num_keys, 0)
    starts = np.cumsum([0, *counts])
    tables = rng.permutation(rows * 32).reshape(rows, 32)
    keys, values = (
        rng.normal(size=(rows * 32, 3, PAGE, 64)).astype(np.float32) for _ in "kv"
    )

    @jax.jit
    def attend(q, *rest):
        layer = lambda _, q: paged_attention(q, *rest, **way)[0]  # noqa: E731
        return lax.fori_loop(0, LAYERS, layer, q)

    q = rng.normal(size=(TOKENS, 9, 64)).astype(np.float32)
    return measure(
        attend, *map(jnp.asarray, (q, keys, values, tables, lengths, starts))
    )


def measure_rope(hold):
    @jax.jit
    def turn(x, kernel, positions):
        rotary = hold(compute_rotary(positions, 64, 1e5))
        for _ in range(LAYERS):
            x = (rotate(x, rotary).reshape(TOKENS, -1) @ kernel).reshape(x.shape)
        return x

    x = jnp.ones((1, TOKENS, 12, 64))
    kernel = jnp.eye(768)
    return measure(turn, x, kernel, jnp.arange(TOKENS)[None])


def main():
    for name, way in WAYS.items():
        found = (
            f"{case} {measure_attention(*own, way):.0f}" for case, own in CASES.items()
        )
        print(f"{name:26} {'; '.join(found)}", flush=True)
    each, once = measure_rope(lambda rotary: rotary), measure_rope(materialize_rotary)
    print(f"turns and products: cosines in each layer {each:.0f}, once {once:.0f}")


if __name__ == "__main__":
    main()
