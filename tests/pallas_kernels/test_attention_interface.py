"""attention() refuses what does not belong together, and runs on the kernels of its
platform."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import attention as kernel
from pallas_kernels.attention import api
from pallas_kernels.attention.params import AttentionOptions
from pallas_kernels.chips import get_platform

SHAPES = (2, 3, 4, 6), (2, 5, 2, 6), (2, 5, 2, 7)


def refused(
    q=SHAPES[0], k=SHAPES[1], v=SHAPES[2], **options: Unpack[AttentionOptions]
) -> str:
    """Before anything is lowered."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jax.eval_shape(
            lambda *x: kernel.attention(*x, **options),
            *(np.zeros(s, np.float32) for s in (q, k, v)),
        )
    return str(error.value)


def ints(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"k": (1, 5, 2, 6)},
            "q (2, 3, 4, 6), k (1, 5, 2, 6) and v (2, 5, 2, 7) do not belong",
        ),
        ({"q": (2, 3, 4, 5)}, "do not belong together"),
        (
            {"segment_ids": (ints(2, 5), ints(2, 5))},
            "segment_ids of queries of shape (2, 5)",
        ),
        (
            {"q_positions": ints(3)},
            "q_positions of shape (3,): these sizes want (2, 3) or (1, 3)",
        ),
        ({"prefix": ints(1)}, "prefix of shape (1,): these sizes want (2,)"),
        ({"slopes": ints(2)}, "slopes of shape (2,): these sizes want (4,)"),
        ({"biases": ints(4, 6)}, "biases of shape (4, 6): want (4, an odd number)"),
        ({"q": (2, 3, 3, 6)}, "3 query heads do not divide over 2 kv heads"),
        ({"q": (2, 3, 6)}, "are not [batch, sequence, heads, head size] each"),
        ({"window": 0}, "window=0 with causal=True: windows look back, 1 key or more"),
        ({"window": 3, "causal": False}, "window=3 with causal=False"),
        ({"prefix": ints(2), "causal": False}, "a prefix without causal"),
        ({"soft_cap": 0.0}, "soft_cap=0.0: it must be above 0"),
        ({"q_offset": ints(2)}, "q_offset is int32 (2,), not an int scalar"),
        ({"k_offset": 1.5}, "k_offset is float32 (), not an int scalar"),
        ({"q_offset": 1, "q_positions": ints(2, 3)}, "q_offset beside q_positions"),
        ({"backend": "abacus"}, "backend='abacus': known are tpu, gpu"),
    ],
)
def test_options_of_other_sizes_or_senses(options, message):
    assert message in refused(**options)


def test_a_typo_among_the_options():
    q = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(TypeError, match="unknown options of attention: windw"):
        kernel.attention(q, q, q, windw=4)


class RecordedKernel:
    """Records what it is asked to do, and gives its name's length everywhere."""

    def __init__(self, name: str, *, supported: bool):
        self.value = len(name)
        self.supported = supported
        self.calls = []

    def supports(self, operands, params):
        return self.supported

    def forward(self, operands, call):
        q, _, v, *_ = operands
        self.calls.append((call.backend, call.block_sizes, call.interpret))
        o = jnp.full((*q.shape[:3], v.shape[3]), self.value, call.dtype)
        return o, jnp.zeros(q.shape[:3], jnp.float32)

    def backward(self, operands, saved, call):
        self.calls.append((call.backend, call.block_sizes, call.interpret))
        return tuple(jnp.full(x.shape, self.value, call.dtype) for x in operands[:3])


def device(platform, kind):
    return AbstractDevice(device_kind=kind, num_cores=1, platform=platform)


H100, A100 = (
    device("gpu", "NVIDIA H100 80GB HBM3"),
    device("cuda", "NVIDIA A100-SXM4-80GB"),
)


@pytest.mark.parametrize(
    ("target", "unsupported", "chosen"),
    [
        (device("tpu", "TPU v5p"), (), "tpu"),
        (device("tpu", "TPU v5p"), ("tpu",), "xla"),
        (H100, (), "hopper"),
        (H100, ("hopper",), "triton"),
        (A100, (), "triton"),
        (None, (), "xla"),
    ],
)
def test_the_platform_of_the_mesh_in_use_chooses_the_kernel(
    monkeypatch, target, unsupported, chosen
):
    names = "tpu", "hopper", "triton", "xla"
    kernels = {x: RecordedKernel(x, supported=x not in unsupported) for x in names}
    monkeypatch.setattr(api, "_module", kernels.__getitem__)
    q, k, v = (np.zeros(shape, np.float32) for shape in SHAPES)
    mesh = AbstractMesh((1,), ("data",), abstract_device=target)

    def run(q, k, v):
        o, pull = jax.vjp(lambda *x: kernel.attention(*x, block_sizes=(8, 9)), q, k, v)
        return o, *pull(o)

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(run, q, k, v)
    for name, used in kernels.items():
        assert used.calls == (2 * [(name, (8, 9), False)] if name == chosen else [])


def test_without_a_mesh_it_is_the_default_device_that_chooses(monkeypatch):
    assert get_platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert get_platform() == "tpu"
    for cpu in ("cpu", jax.devices("cpu")[1]):
        with jax.default_device(cpu):
            assert get_platform() == "cpu"
