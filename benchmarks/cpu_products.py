"""Time of a model's products of few rows on this CPU, as decoding has, fp32.

    python benchmarks/cpu_products.py [--rows 1 8 16 32 48] [--rounds 7]

The kernels are those of SmolLM2-135M's 30 layers (queries, keys and values as one; gate
and up as one), each with its own weights, so that they come from memory. It prints
medians in ms, of XLA's library, of the engine's kernel, of PyTorch, and the
time in which a plain sum reads as many bytes: no step with these products is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from maxlm.inference.cpu.library import load_library
from maxlm.inference.cpu.matmul import cpu_matmul

LAYERS, WIDTH, INNER = 30, 576, 1536
SHAPES = (WIDTH, 960), (WIDTH, WIDTH), (WIDTH, 2 * INNER), (INNER, WIDTH)


def run_layers(multiply, x, layers):
    for qkv, out, gate_up, down in layers:
        x = x + multiply(multiply(x, qkv)[:, :WIDTH], out)
        inner = multiply(x, gate_up)
        x = x + multiply(inner[:, :INNER] * inner[:, INNER:], down)
    return x


def time_median(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds; the first call warms up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16, 32, 48])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if load_library() is None:
        parser.error("no C++ compiler here: install one, or name it in CXX")
    random = np.random.default_rng(0)
    draw = lambda *shape: 0.02 * random.standard_normal(shape, np.float32)  # noqa: E731
    arrays = [[draw(*shape) for shape in SHAPES] for _ in range(LAYERS)]
    ours = jax.tree.map(jnp.asarray, arrays)
    # PyTorch's linear layers hold [outputs, inputs].
    theirs = [[torch.tensor(x.T.copy()) for x in layer] for layer in arrays]
    layers = {
        name: jax.jit(
            lambda x, layers, multiply=multiply: run_layers(multiply, x, layers)
        )
        for name, multiply in (("XLA", jnp.matmul), ("cpu_matmul", cpu_matmul))
    }
    flat = jnp.ones(sum(x.size for layer in arrays for x in layer), jnp.float32)
    total = jax.jit(jnp.sum)
    read = time_median(lambda: total(flat).block_until_ready(), args.rounds)
    print(f"reading {flat.nbytes / 1e6:.0f} MB: {read:.1f} ms")
    for rows in args.rows:
        x = draw(rows, WIDTH)
        x_jax = jnp.asarray(x)
        x_torch = torch.tensor(x)
        times = {}
        for name, run in layers.items():
            times[name] = time_median(
                lambda x=x_jax, run=run: run(x, ours).block_until_ready(), args.rounds
            )
        with torch.no_grad():
            times["PyTorch"] = time_median(
                lambda x=x_torch: run_layers(F.linear, x, theirs), args.rounds
            )
        line = ", ".join(f"{name} {ms:6.1f} ms" for name, ms in times.items())
        print(f"{rows:4} rows: {line}", flush=True)


if __name__ == "__main__":
    main()
