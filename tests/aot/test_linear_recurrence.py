"""Linear recurrences compiled by the TPU's and the GPU's own compilers: every kind, both
passes; and memory that grows with the number of chunks alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from pallas_kernels.chips import CHIPS
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.params import RecurrenceOperands
from tests.aot.conftest import describe_device, read_kernels
from tests.pallas_kernels.recurrence_cases import KINDS

# B, T, H, N, K, V and tokens of a chunk; none of odd sizes is a tile.
SHAPES = {
    "bf16": ((1, 2048, 2, 4, 128, 128), 64, jnp.bfloat16),
    "bf16, long chunks, odd lengths": ((2, 700, 1, 2, 96, 130), 128, jnp.bfloat16),
    "fp32, odd sizes": ((2, 77, 2, 6, 20, 12), 32, jnp.float32),
    "fp32, wide": ((1, 1024, 1, 1, 256, 128), 64, jnp.float32),
}


GPUS = ("h100", "a100")


def compile_passes(
    chip: str, kind: str, shape: str, backend: str | None, tokens: int = 0
):
    """Compiles forward and backward; ``tokens`` replace those of the shape."""
    (B, T, H, N, K, V), chunk, dtype = SHAPES[shape]
    T = tokens or T
    by_channel, delta = KINDS[kind]
    if chip in GPUS:
        device = describe_device(f"{chip}x1")
        sharding = SingleDeviceSharding(device)
        # The card that Pallas lowers for; without it, that of this machine.
        card = AbstractDevice(device.device_kind, None, "gpu")
        use_mesh = use_abstract_mesh(AbstractMesh((), (), abstract_device=card))
    else:
        device = describe_device(CHIPS[chip].topology)
        mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Explicit,))
        sharding = NamedSharding(mesh, PartitionSpec())
        use_mesh = jax.set_mesh(mesh)
    like = partial(jax.ShapeDtypeStruct, sharding=sharding)
    operands = RecurrenceOperands(
        like((B, T, H, K), dtype),
        like((B, T, H, K), dtype),
        like((B, T, N, V), dtype),
        like((B, T, N, K) if by_channel else (B, T, N), jnp.float32),
        like((B, T, N), jnp.float32) if delta else None,
    )
    state = like((B, N, K, V), jnp.float32)
    starts = like((B, T), jnp.bool_)

    def run(operands, state, starts):
        def recur(operands, state):
            return linear_recurrence(
                *operands,
                initial_state=state,
                starts=starts,
                chunk_size=chunk,
                backend=backend,
            )

        results, pull = jax.vjp(recur, operands, state)
        return results, pull(results)

    with use_mesh:
        return jax.jit(run).lower(operands, state, starts).compile()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chip", CHIPS)
def test_both_passes_compile(chip, kind, shape):
    if (chip, shape) == ("v4", "fp32, wide") and KINDS[kind].by_channel:
        # Its 16 MB of VMEM do not hold a block with what the compiler spills.
        with pytest.raises(ValueError, match="no tpu kernel"):
            compile_passes(chip, kind, shape, "tpu")
        return
    text = compile_passes(chip, kind, shape, "tpu").as_text()
    assert sorted(read_kernels(chip, text)) == [
        "linear_recurrence_backward",
        "linear_recurrence_forward",
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", ["bf16", "fp32, odd sizes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("card", GPUS)
def test_both_passes_compile_for_gpus(card, kind, shape):
    """Chosen by the card."""
    text = compile_passes(card, kind, shape, None).as_text()
    for kernel in ("products", "states", "d_states", "gradients"):
        assert f"linear_recurrence_{kernel}" in text


@pytest.mark.parametrize("backend", ["tpu", "xla"])
@pytest.mark.parametrize("kind", ["kimi delta", "state space"])
def test_memory_grows_with_the_number_of_chunks_alone(kind, backend):
    """A token takes as many bytes at any length, and far fewer than a state."""
    # Some megabytes come and go: XLA keeps a few arrays in VMEM, and lays others into
    # the room of arrays that are no longer read or beside it, as their sizes fall. So
    # rows are long enough for a token's bytes to show.
    bytes_by_token = []
    for tokens in (16384, 65536):
        compiled = compile_passes("v5p", kind, "bf16", backend, tokens)
        temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        bytes_by_token.append(temporary_bytes / tokens)
    short, long = bytes_by_token
    assert long <= 1.1 * short
    state_bytes = 4 * 128 * 128 * 4
    assert long < state_bytes / 8
