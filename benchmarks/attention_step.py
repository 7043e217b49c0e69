"""Our attention beside XLA's and jax's splash attention, in the training step of Llama
3 8B.

    python benchmarks/attention_step.py [CASE ...] [--list]

Needs the `tpu` extra, and no TPU. The shipped recipe, on v5p-64 in 4 micro-batches
(with one it does not fit), is compiled once a case, minutes each. Only attention
differs. The table has the step's memory on a device, as the compiler lays it out;
cycles of the final schedule of one layer's attention to a micro-batch, at a device's
shapes and one document a row; how often the compiled step runs each pass; and the time
of all these cycles at the chip's clock. Only kernels are counted, not their waits for
memory or operations beside them (copies, splash's sum of dQ). Splash uses the fastest
of the blocks that `kernel_cycles.bench` tries.

XLA's attention is not a kernel but a loop of many operations. Its column has a lower
bound instead of cycles: the bytes that it moves, at the chip's bandwidth.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from cases import add_cases, chosen, in_child
from jax.sharding import SingleDeviceSharding

from benchmarks.kernel_cycles.contests.blocks import tried
from benchmarks.kernel_cycles.static import CHIPS as STATIC
from benchmarks.kernel_cycles.static import Spec, measure
from benchmarks.kernel_cycles.static.peers import jax_splash_attention
from benchmarks.kernel_cycles.static.problems import Mask
from benchmarks.program_traffic import read_program_traffic
from maxlm.config.load import load_config
from maxlm.parallel.local import map_shards
from maxlm.parallel.terms import AttentionTerms
from maxlm.plan.compiled.cost import read_compiled_cost
from maxlm.plan.compiled.program import (
    CompiledStep,
    compile_step,
    get_topology_devices,
    has_compiler,
)
from maxlm.plan.hardware import CHIPS
from maxlm.plan.topology import parse_topology
from maxlm.run.config import RunConfig
from maxlm.sharding import AxisRules
from pallas_kernels.attention import attention, attention_backward, attention_forward

RUN = "runs/llama3_8b"
OVERRIDES = ["train.micro_batches=4"]
TOPOLOGY = "v5p-64"
CHIP = "v5p"
# The forward and the backward kernel, by what the compiled step calls them.
CASES: dict[str, tuple[str, ...]] = {
    "ours": ("/attention_forward/", "/attention_backward/"),
    "xla": (),
    "splash": ("/splash_mha_fwd", "/splash_mha_dkv"),
}
COLUMNS = (
    *(
        "attention",
        "temp, GiB",
        "arguments, GiB",
        "forward, M cycles",
        "backward, M cycles",
    ),
    *("forward runs", "backward runs", "ms a step"),
)
GIB = 1 << 30
MEGA = 1e6
MILLI = 1e-3

Program = tuple[Callable[..., Any], Sequence[Any]]


class MeasuredShape(NamedTuple):
    """Of one layer's attention to a micro-batch on a device."""

    rows: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: RunConfig) -> "MeasuredShape":
        """In this recipe all devices split the rows, and none the heads."""
        model: Any = config.model
        attention, devices = model.attention, parse_topology(TOPOLOGY).devices
        rows = config.data.batch_size // config.train.micro_batches // devices
        return cls(
            rows,
            config.data.seq_len,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
        )

    def operands(self) -> tuple[Any, ...]:
        """q, k, v, d_o, and segment ids by value: kernels look what these leave out."""
        q, k = (
            jax.ShapeDtypeStruct(
                (self.rows, self.seq, heads, self.head_dim), jnp.bfloat16
            )
            for heads in (self.heads, self.kv_heads)
        )
        return q, k, k, q, np.ones((self.rows, self.seq), np.int32)


def splash(q, k, v, segment_ids, *, blocks: dict[str, Sequence[int]]) -> jax.Array:
    """jax's as :func:`pallas_kernels.attention.attention`."""
    name = "attention"  # as our remat policies call what the backward pass wants
    heads, seq = q.shape[2], q.shape[1]
    attend = jax_splash_attention(
        Mask(), heads, seq, residual_checkpoint_name=name, **blocks
    )
    by_head = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return attend(*by_head, segment_ids).swapaxes(1, 2)


def splash_on_shards(
    q,
    k,
    v,
    terms: AttentionTerms,
    *,
    rules: AxisRules,
    segment_ids,
    blocks,
    **layout,
) -> jax.Array:
    """In the place of :func:`maxlm.parallel.attention.sharded_attention`. JAX
    differentiates it, which is as good where nothing crosses the wire."""
    assert terms.window is None
    assert not rules.mesh_axes("seq")
    queries, keys = (
        rules.spec("batch", "seq", heads, None) for heads in ("heads", "kv_heads")
    )
    specs = queries, keys, keys, rules.spec("batch", "seq")
    return map_shards(partial(splash, blocks=blocks), specs, queries)(
        q, k, v, segment_ids[0]
    )


def both_passes(*, shape: Sequence[int], blocks: Any) -> Program:
    """Of splash with these blocks; without, of ours."""

    def run(q, k, v, d_o, ids):
        def attend(q, k, v):
            if blocks:
                return splash(q, k, v, ids, blocks=blocks)
            return attention(q, k, v, segment_ids=(ids, ids))

        o, gradients = jax.vjp(attend, q, k, v)
        return o, gradients(d_o)

    return run, MeasuredShape(*shape).operands()


def xla_pass(shape: MeasuredShape, backward: bool) -> Program:
    q, k, v, d_o, ids = shape.operands()
    sums = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)

    def run(*operands):
        *arrays, ids = operands
        options: Any = {"segment_ids": (ids, ids), "backend": "xla"}
        if backward:
            return attention_backward(*arrays, dtype=q.dtype, **options)
        return attention_forward(*arrays, **options)

    return run, (q, k, v, *((sums, sums, d_o) if backward else ()), ids)


class KernelPass(NamedTuple):
    """One run of the forward or of the backward pass."""

    cycles: float
    flops: int = 0
    """Of products outside of kernels."""


def kernel_passes(
    shape: MeasuredShape, blocks: Sequence[Any]
) -> tuple[list[KernelPass], dict[str, Any]]:
    """The fastest forward and backward pass, and their blocks; each of ``blocks`` has
    both's."""
    specs = [
        Spec("attention_step:both_passes", {"shape": shape, "blocks": b})
        for b in blocks
    ]
    measurements = [measure(spec, CHIP) for spec in specs]
    passes = []
    best = {}
    for name, backward in (("forward", False), ("backward", True)):
        cycles = [costs.cycles(backward=backward) for costs in measurements]
        least = min(cycles)
        passes.append(KernelPass(least))
        best[name] = (blocks[cycles.index(least)] or {}).get(name)
    return passes, best


def xla_bound(shape: MeasuredShape, backward: bool) -> KernelPass:
    """Cycles in which the chip's memory moves what this pass reads and writes."""
    function, arguments = xla_pass(shape, backward)
    on = SingleDeviceSharding(get_topology_devices(parse_topology(TOPOLOGY))[0])
    structs = (
        jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=on) for a in arguments
    )
    text: Any = jax.jit(function).lower(*structs).compile().as_text()
    cost = read_compiled_cost(text, {})
    seconds = read_program_traffic(text).memory_bytes / CHIPS[CHIP].memory_bandwidth
    return KernelPass(seconds * STATIC[CHIP].clock_hz, cost.attention_flops)


def row(case: str) -> tuple[list[str], str]:
    """Cells of the table, once the step is known to have this attention and no other; a
    note."""
    config = load_config(RunConfig, RUN, OVERRIDES).value
    shape = MeasuredShape.of(config)
    note = ""
    swaps = {}
    if case == "xla":
        passes = [xla_bound(shape, backward) for backward in (False, True)]
        for function in (attention_forward, attention_backward):
            name = f"maxlm.parallel.attention.{function.__name__}"
            swaps[name] = partial(function, backend="xla")
    elif case == "splash":
        sizes = tried("jax splash", shape.seq, shape.seq)
        pairs = zip(sizes.forward, sizes.backward, strict=True)
        passes, best = kernel_passes(
            shape, [{"forward": f, "backward": b} for f, (b,) in pairs]
        )
        note = "blocks of " + ", ".join(
            f"{'/'.join(map(str, b))} {n}" for n, b in best.items()
        )
        name = "maxlm.models.layers.attend.sharded_attention"
        swaps[name] = partial(splash_on_shards, blocks=best)
    else:
        passes, _ = kernel_passes(shape, [None])
    with ExitStack() as stack:
        for name, function in swaps.items():
            stack.enter_context(patch(name, function))
        step = compile_step(config, TOPOLOGY)
    model: Any = config.model
    runs = times_run(case, step, passes, model.num_layers * config.train.micro_batches)
    cycles = sum(
        times * kernel_pass.cycles
        for times, kernel_pass in zip(runs, passes, strict=True)
    )
    bound = "≥ " if case == "xla" else ""
    cells = [
        f"{step.compiled.memory_analysis().temp_size_in_bytes / GIB:.2f}",
        f"{step.compiled.memory_analysis().argument_size_in_bytes / GIB:.2f}",
        *(f"{bound}{kernel_pass.cycles / MEGA:.1f}" for kernel_pass in passes),
        *map(str, runs),
        f"{bound}{cycles / STATIC[CHIP].clock_hz / MILLI:,.0f}",
    ]
    return cells, note


def times_run(
    case: str, step: CompiledStep, passes: Sequence[KernelPass], layers: int
) -> list[int]:
    """Forward and backward passes in the compiled step, which has no other
    attention."""
    cost = step.read_cost()
    traffic = read_program_traffic(step.compiled.as_text())
    kernel_calls = [c for c in traffic.custom_calls if c.target == "tpu_custom_call"]
    runs = [
        sum(c.count for c in kernel_calls if name in c.op_name) for name in CASES[case]
    ]
    assert sum(runs) == sum(c.count for c in kernel_calls), kernel_calls
    if case == "xla":
        forward, backward = (kernel_pass.flops for kernel_pass in passes)
        times, rest = divmod(cost.attention_flops - layers * backward, forward)
        assert rest == 0, (cost.attention_flops, forward, backward)
        runs = [times, layers]
    else:
        assert cost.attention_flops == 0
    assert min(runs) >= layers, runs
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_cases(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = chosen(parser, args, CASES)
    if not has_compiler("tpu"):
        parser.error("no TPU compiler is installed: pip install 'maxlm[tpu]'")
    if args.child:
        print(json.dumps(row(*names)))
        return
    rows, notes = [], []
    for name in names:
        print(f"{name}: compiling, for minutes", file=sys.stderr, flush=True)
        began = perf_counter()
        # In a process of its own: JAX remembers what it traced, and so would the next
        # step.
        cells, note = in_child(__file__, name)
        print(f"{name}: {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        rows.append([name, *cells])
        notes += [f"{name}: {note}"] * bool(note)
    for line in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(line)} |")
    if notes:
        print("\n".join(["", *notes]))


if __name__ == "__main__":
    main()
