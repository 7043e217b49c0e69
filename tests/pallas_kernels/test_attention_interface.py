"""attention() refuses what does not belong together, and runs on the kernels of its platform."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import attention as kernel
from pallas_kernels.attention import dispatch, hopper, hopper_backward, triton
from pallas_kernels.attention.params import validate_arguments
from pallas_kernels.chips import get_platform

SHAPES = (2, 3, 4, 6), (2, 5, 2, 6), (2, 5, 2, 7)


def refused(q=SHAPES[0], k=SHAPES[1], v=SHAPES[2], **options) -> str:
    """By all three functions, before anything is lowered."""
    q, k, v = (np.zeros(shape, np.float32) for shape in (q, k, v))
    lse = np.zeros(q.shape[:3], np.float32)
    saved = (lse, lse, np.zeros((*q.shape[:3], v.shape[-1]), np.float32))
    errors = set()
    for function, operands in (
        (kernel.attention, (q, k, v)),
        (kernel.attention_forward, (q, k, v)),
        (kernel.attention_backward, (q, k, v, *saved)),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            jax.eval_shape(lambda *x, function=function: function(*x, **options), *operands)
        errors.add(str(error.value))
    assert len(errors) == 1
    return errors.pop()


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": (1, 5, 2, 6)},
        {"q": (2, 3, 4, 5)},
    ],
)
def test_shapes_that_do_not_belong_together(wrong):
    q, k, v = (wrong.get(name, x) for name, x in zip("qkv", SHAPES, strict=True))
    assert refused(**wrong) == f"q {q}, k {k} and v {v} do not belong together"


def ints(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_ids": (ints(2, 5), ints(2, 5))}, "segment_ids of queries of shape (2, 5)"),
        ({"q_positions": ints(3)}, "q_positions of shape (3,): these sizes want (2, 3) or (1, 3)"),
        ({"prefix": ints(1)}, "prefix of shape (1,): these sizes want (2,)"),
        ({"slopes": ints(2)}, "slopes of shape (2,): these sizes want (4,)"),
        ({"biases": ints(4, 6)}, "biases of shape (4, 6): these sizes want (4, an odd number)"),
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


def test_kernels_asked_for_by_name_must_support_the_sizes(monkeypatch):
    monkeypatch.setattr(dispatch, "_module", lambda name: Kernel(name, supported=False))
    for backend in ("tpu", "gpu", "hopper", "triton"):
        assert refused(backend=backend).startswith(
            f"no {backend} kernel for q float32 (2, 3, 4, 6), k float32 (2, 5, 2, 6), "
            "v float32 (2, 5, 2, 7) with AttentionParams(causal=True"
        )


@pytest.mark.parametrize("backend", ["tpu", "hopper", "triton"])
def test_learned_biases_are_for_xla_alone(backend):
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    biases = jnp.zeros((2, 7))
    choose = partial(dispatch.choose_backend, backend, q, q, q)
    assert choose(*validate_arguments(q, q, q)) == backend
    with pytest.raises(ValueError, match=f"no {backend} kernel"):
        choose(*validate_arguments(q, q, q, biases=biases))
    assert (
        dispatch.choose_backend(None, q, q, q, *validate_arguments(q, q, q, biases=biases)) == "xla"
    )


class Kernel:
    """Records what it is asked to do, and gives its name's length everywhere."""

    def __init__(self, name: str, *, supported: bool):
        self.value, self.supported, self.options = len(name), supported, []

    def supports(self, q, k, v, operands, params):
        return self.supported

    def forward(self, q, k, v, operands, params, dtype, **options):
        self.options.append(options)
        o = jnp.full((*q.shape[:3], v.shape[3]), self.value, dtype)
        return o, jnp.zeros(q.shape[:3], jnp.float32)

    def backward(self, q, k, v, lse, delta, d_o, operands, params, dtype, **options):
        self.options.append(options)
        return tuple(jnp.full(x.shape, self.value, dtype) for x in (q, k, v))


def device(platform, kind):
    return AbstractDevice(device_kind=kind, num_cores=1, platform=platform)


H100, A100 = device("gpu", "NVIDIA H100 80GB HBM3"), device("cuda", "NVIDIA A100-SXM4-80GB")


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
    kernels = {x: Kernel(x, supported=x not in unsupported) for x in ("tpu", "hopper", "triton")}
    monkeypatch.setattr(dispatch, "_module", kernels.__getitem__)
    q, k, v = (np.zeros(shape, np.float32) for shape in SHAPES)
    mesh = AbstractMesh((1,), ("data",), abstract_device=target)

    def run(q, k, v):
        o, pull = jax.vjp(lambda *x: kernel.attention(*x, block_sizes=(8, 9)), q, k, v)
        return o, *pull(o)

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(run, q, k, v)
    for name, used in kernels.items():
        wanted = 2 * [{"block_sizes": (8, 9), "interpret": False}] if name == chosen else []
        assert used.options == wanted


def test_without_a_mesh_it_is_the_default_device_that_chooses(monkeypatch):
    assert get_platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert get_platform() == "tpu"
    for cpu in ("cpu", jax.devices("cpu")[1]):
        with jax.default_device(cpu):
            assert get_platform() == "cpu"


def test_a_kernel_asked_for_gets_its_options_and_gives_the_results(monkeypatch):
    tpu = Kernel("tpu", supported=True)
    monkeypatch.setattr(dispatch, "_module", {"tpu": tpu}.__getitem__)
    q, k, v = (np.zeros(shape, np.float32) for shape in SHAPES)
    options = {"backend": "tpu", "block_sizes": 5, "interpret": True}
    o, pull = jax.vjp(lambda *x: kernel.attention(*x, **options), q, k, v)
    for x in (o, *pull(o)):
        np.testing.assert_array_equal(x, 3)
    assert tpu.options == 2 * [{"block_sizes": 5, "interpret": True}]


TILES = triton.TritonTiles(64, 64, 4, 1)


@pytest.mark.parametrize(
    ("backend", "sizes", "message"),
    [
        (
            "triton",
            (64, 64),
            "block_sizes=(64, 64): not a pallas_kernels.attention.triton.TritonBlockSi",
        ),
        (
            "triton",
            triton.TritonBlockSizes(TILES, TILES._replace(k=48), TILES),
            "block_sizes of 64 queries, 48 keys, 4 warps, 1 stages: powers of two",
        ),
        (
            "hopper",
            hopper.HopperBlockSizes(
                hopper.HopperForwardBlocks(96, 2), hopper_backward.HopperBackwardBlocks(64, 64, 2)
            ),
            "block_sizes: HopperForwardBlocks(k=96, stages=2): multiples of 64, a stage or more",
        ),
        (
            "hopper",
            hopper.HopperBlockSizes(
                hopper.HopperForwardBlocks(64, 2), triton.TritonBlockSizes(TILES, TILES, TILES)
            ),
            "block_sizes: backward TritonBlockSizes(forward=Tri",
        ),
    ],
)
def test_block_sizes_that_are_another_kernels_or_none(backend, sizes, message):
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)

    def results(q):
        attend = partial(kernel.attention, backend=backend, block_sizes=sizes)
        o, pull = jax.vjp(attend, q, q, q)
        return pull(o)

    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(results, q)
