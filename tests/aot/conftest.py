"""A small model's training step, compiled by the TPU's and the GPU's own compilers;
skipped where those are not installed (``make test-aot`` installs the TPU's)."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxlm.plan.compiled.program import get_topology_devices, has_compiler
from maxlm.plan.topology import parse_topology
from maxlm.run.config import RunConfig
from pallas_kernels.chips import CHIPS

MACHINES = ("v5p:4x4x4", "v5e:16x16", "v6e:8x8", "h100:8x8")
# Wide enough that a shard of 256 still fills the tiles of a TPU: smaller ones it
# gathers by other means, and shallow and short, for quick compiles.
LAYERS, D, SEQ = 2, 4096, 256
FF, VOCAB = 2 * D, 2 * D
MATRIX_BYTES = 2 * D * D
"""The smallest matrix of a layer, in bf16."""


def small_run(
    rows_per_device: int = 1,
    devices: int = 1,
    model_changes: dict[str, Any] | None = None,
    width: int = D,
    **top: Any,
) -> RunConfig:
    """A Llama of two layers whose every dimension divides over any axis of these
    machines; in a pipeline of four, and as many rows as its micro-batches want."""
    heads = width // 128
    piped = top.get("train") is not None
    rows_per_device *= 4 if piped else 1
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 2 * width,
                "num_layers": 2 * LAYERS if piped else LAYERS,
                "d_model": width,
                "max_seq_len": SEQ,
                "attention": {
                    "num_heads": heads,
                    "num_kv_heads": heads,
                    "head_dim": 128,
                },
                "mlp": {"d_ff": 2 * width},
                "remat": "full",
                **(model_changes or {}),
            },
            "data": {"seq_len": SEQ, "batch_size": rows_per_device * devices},
            **top,
        }
    )


def describe_device(name: str) -> Any:
    """One device of a machine that is not here, as its compiler describes it."""
    topology = parse_topology(name)
    if not has_compiler(topology.platform):
        pytest.skip("the compiler is not installed")
    return get_topology_devices(topology)[0]


# A machine's steps in one worker.
@pytest.fixture(
    scope="session",
    params=[pytest.param(m, marks=pytest.mark.xdist_group(m)) for m in MACHINES],
)
def machine(request) -> str:
    if not has_compiler(parse_topology(request.param).platform):
        pytest.skip("the compiler is not installed")
    return request.param


def attention_operands(
    shape: tuple[int, ...], dtype: Any, names: tuple[str, ...], sharding: Any
) -> tuple[Any, ...]:
    """Operands q, k, v and d_o, and those of the options that are arrays; ``shape`` is
    B, S, T, N, K, H, Hv."""
    B, S, T, N, K, H, Hv = shape
    like = partial(jax.ShapeDtypeStruct, sharding=sharding)
    options = {
        "segment_ids": (like((B, S), jnp.int32), like((B, T), jnp.int32)),
        "q_offset": like((), jnp.int32),
        "k_offset": like((), jnp.int32),
        "prefix": like((B,), jnp.int32),
        "slopes": like((N,), jnp.float32),
        "sinks": like((N,), jnp.float32),
    }
    q = like((B, S, N, H), dtype)
    k = like((B, T, K, H), dtype)
    v = like((B, T, K, Hv), dtype)
    d_o = like((B, S, N, Hv), dtype)
    return q, k, v, d_o, {name: options[name] for name in names}


def read_kernels(chip: str, text: str) -> list[str]:
    """The names of the Pallas kernels in a TPU program's text, each within the VMEM
    that it asks for."""
    names = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call', line)
            limit, used = (
                re.search(
                    rf'"{key}":\[{{"memory_space":"1","offset":"\d+","size":"(\d+)"',
                    line,
                )
                for key in ("scoped_memory_configs", "used_scoped_memory_configs")
            )
            assert name
            assert used
            # A kernel that asks for no share has the compiler's default one.
            limit_bytes = int(limit[1]) if limit else CHIPS[chip].vmem_bytes
            assert 0 < int(used[1]) <= limit_bytes <= CHIPS[chip].vmem_bytes
            names.append(name[1])
    return names
