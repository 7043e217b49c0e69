"""Attention's kernels on this machine's GPU, beside cuDNN's and JAX's own Pallas
kernel.

    python benchmarks/attention_gpu.py [--repeats 20]

Needs an NVIDIA card and JAX's CUDA packages. For each shape (bf16, causal, 16,384
tokens, grouped and ungrouped heads) one table: median milliseconds of the forward and
of the backward pass, the share of the card's time that is cuDNN's (above 1: faster than
cuDNN), and TFLOP/s (4·H for each unmasked pair of query and key forward, 10·H
backward).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class OperandShape(NamedTuple):
    B: int
    S: int
    N: int
    K: int
    H: int


SHAPES = (
    OperandShape(4, 4096, 16, 16, 128),
    OperandShape(1, 16384, 16, 16, 128),
    OperandShape(4, 4096, 32, 8, 128),
    OperandShape(4, 4096, 32, 32, 64),
    OperandShape(1, 16384, 32, 32, 64),
)


def peers(shape: OperandShape) -> dict[str, Callable[..., Any]]:
    """Functions of (q, k, v), differentiable."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention as pallas

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )

    def jax_pallas(q, k, v):
        if shape.N != shape.K:
            k, v = (jnp.repeat(x, shape.N // shape.K, axis=2) for x in (k, v))
        scale = shape.H**-0.5
        blocks = pallas.BlockSizes(128, 64, 64, 64, 64, 64)
        return pallas.mha(
            q, k, v, None, sm_scale=scale, causal=True, block_sizes=blocks
        )

    return {"cuDNN": cudnn, "jax Pallas Triton": jax_pallas}


def ours(capability: str) -> dict[str, Callable[..., Any]]:
    """Likewise."""
    from pallas_kernels.attention import attention

    backends = {"Triton": "triton"} | (
        {"Hopper": "hopper"} if capability == "9.0" else {}
    )
    return {
        f"maxlm {name}": partial(attention, backend=x) for name, x in backends.items()
    }


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median over blocks of calls that are started ahead, so that no launch is waited
    for."""
    import jax

    calls = 10
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append((time.perf_counter() - began) / calls)
    return 1e3 * statistics.median(times)


def measure(
    attend: Callable[..., Any], operands: Any, d_o: Any, repeats: int
) -> tuple[Any, ...]:
    """(output, gradients, forward, backward): the last two in ms."""
    import jax

    forward = jax.jit(attend)
    o, pullback = jax.jit(partial(jax.vjp, attend))(*operands)
    backward = jax.jit(lambda pullback, d_o: pullback(d_o))
    grads = backward(pullback, d_o)
    return (
        o,
        grads,
        milliseconds(lambda: forward(*operands), repeats),
        milliseconds(lambda: backward(pullback, d_o), repeats),
    )


def table(shape: OperandShape, capability: str, repeats: int) -> None:
    import jax
    import jax.numpy as jnp

    B, S, N, K, H = shape
    shapes = (B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H)
    keys = jax.random.split(jax.random.key(0), 4)
    *operands, d_o = (
        jax.random.normal(key, operand_shape, jnp.bfloat16)
        for key, operand_shape in zip(keys, shapes, strict=True)
    )
    pairs = B * N * S * (S + 1) / 2
    print(f"\nB={B} S={S} heads={N}/{K} head_dim={H}, bf16, causal")
    print(
        f"{'':20}{'forward':>11}{'/ cuDNN':>9}{'TFLOP/s':>9}{'backward':>12}{'/ cuDNN':>9}",
        end="",
    )
    print(f"{'TFLOP/s':>9}{'furthest from cuDNN':>21}")
    first = None
    for name, attend in {**peers(shape), **ours(capability)}.items():
        try:
            o, grads, forward, backward = measure(attend, operands, d_o, repeats)
        except Exception as error:  # one that cannot run leaves the others' figures
            print(f"{name:20}{str(error).splitlines()[0][:80]}")
            continue
        first = first or (o, grads, forward, backward)
        apart = jax.tree.map(
            lambda x, y: float(jnp.max(jnp.abs(x.astype(jnp.float32) - y))),
            (o, grads),
            first[:2],
        )
        rates = (4 * H * pairs / forward / 1e9, 10 * H * pairs / backward / 1e9)
        print(
            f"{name:20}{forward:8.3f} ms{first[2] / forward:9.2f}{rates[0]:9.0f}"
            f"{backward:9.3f} ms{first[3] / backward:9.2f}{rates[1]:9.0f}"
            f"{max(jax.tree.leaves(apart)):21.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20, help="of ten calls each")
    repeats = parser.parse_args().repeats
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(
            f"no GPU here: JAX found {device.device_kind} ({device.platform}) alone"
        )
    print(f"{device.device_kind}, compute capability {device.compute_capability}")
    print(f"jax {jax.__version__}")
    for shape in SHAPES:
        table(shape, device.compute_capability, repeats)


if __name__ == "__main__":
    main()
