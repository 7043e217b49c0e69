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

from maxlm.inference.cpu import paged_attention as cpu_kernel
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
OPTIONS = {"C++": {"kernel": cpu_kernel}, "XLA": {"backend": "xla"}}
for size in SIZES:
    name = f"XLA, {size.queries} queries, {size.keys} keys"
    OPTIONS[name] = {"backend": "xla", "block_sizes": size}


def measure(function, *arguments):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def measure_attention(counts, num_keys, options):
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
        layer = lambda _, q: paged_attention(q, *rest, **options)[0]  # noqa: E731
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
    for name, options in OPTIONS.items():
        times = []
        for case, (counts, num_keys) in CASES.items():
            milliseconds = measure_attention(counts, num_keys, options)
            times.append(f"{case} {milliseconds:.0f}")
        print(f"{name:26} {'; '.join(times)}", flush=True)
    in_each_layer = measure_rope(lambda rotary: rotary)
    once = measure_rope(materialize_rotary)
    print(
        f"turns and products: cosines in each layer {in_each_layer:.0f}, once {once:.0f}"
    )


if __name__ == "__main__":
    main()
