"""How arrays come to a Triton kernel."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.attention.triton_program import (
    TritonProgram,
    TritonStatics,
    TritonTiles,
    pad_head_size,
    round_up,
)


class TritonKernelCall:
    """A kernel's named inputs and their specs. Each program's window is whole sequences of its own
    row of the batch and head, with their last block filled up; kernels mask what lies outside."""

    def __init__(
        self,
        operands: AttentionOperands,
        params: AttentionParams,
        tiles: TritonTiles,
        sizes,
        group,
        interpret,
        *,
        per_query,
        table,
    ):
        S, T, H, Hv = sizes
        self.inputs: dict[str, jax.Array] = {}
        self.specs: list[pl.BlockSpec] = []
        self.group = group
        masked = gpu_blocks.needs_mask(params, operands, T if per_query else tiles.k, tiles.k)
        self.statics = TritonStatics(params, tiles, S, T, H, Hv, group, masked, interpret)
        if masked:
            self.add("visits", table, lambda x: self._per_row(x, x.shape[1:]))
        if params.causal or operands.slopes is not None:
            for name, offset, block in (
                ("q", operands.q_offset, tiles.q),
                ("k", operands.k_offset, tiles.k),
            ):
                positions = getattr(operands, f"{name}_positions")
                self.add(f"{name}_positions", positions, self.tokens(block))
                if positions is None and offset is not None:
                    self.add(f"{name}_offset", jnp.asarray(offset, jnp.int32)[None], self.whole)
        if operands.q_segments is not None:
            self.add("q_segments", operands.q_segments, self.tokens(tiles.q))
            self.add("k_segments", operands.k_segments, self.tokens(tiles.k))
        self.add("prefix", operands.prefix, self.whole)
        self.add("slopes", operands.slopes, self.whole)

    def add(self, name: str, x: jax.Array | None, spec) -> None:
        if x is not None:
            self.inputs[name] = x
            self.specs.append(spec(x))

    def __call__(self, kernel, grid, shapes, specs):
        names = tuple(self.inputs)
        tiles = self.statics.tiles

        def body(*refs):
            inputs = dict(zip(names, refs[: len(names)], strict=True))
            kernel(TritonProgram(inputs, self.statics), *refs[len(names) :])

        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=self.specs,
            out_specs=specs,
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=self.statics.interpret,
            name=kernel.__name__.strip("_"),
        )(*self.inputs.values())

    # Specs by what an array is, of grids (blocks, heads, rows of the batch).

    def whole(self, x) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda i, n, b: (0,) * len(x.shape))

    def _per_row(self, x, shape) -> pl.BlockSpec:
        rest = (0,) * len(shape)
        shared = x.shape[0] == 1
        return pl.BlockSpec((None, *shape), lambda i, n, b: (0 if shared else b, *rest))

    def tokens(self, block: int):
        """[B or 1, length]"""
        return lambda x: self._per_row(x, (round_up(x.shape[1], block),))

    def heads(self, block: int):
        """[B, length, heads, H], of the program's head."""
        return lambda x: self._head_spec(x, block, 1)

    def shared_heads(self, block: int):
        """Likewise, of the kv head that the program's query head reads."""
        return lambda x: self._head_spec(x, block, self.group)

    def _head_spec(self, x, block: int, share: int) -> pl.BlockSpec:
        shape = None, round_up(x.shape[1], block), None, pad_head_size(x.shape[3])
        return pl.BlockSpec(shape, lambda i, n, b: (b, 0, lax.div(n, share), 0))

    def groups(self, block: int):
        """[B, length, N, H] → [length, group, H] of the program's kv head."""

        def spec(x):
            shape = None, round_up(x.shape[1], block), self.group, pad_head_size(x.shape[3])
            return pl.BlockSpec(shape, lambda i, n, b: (b, 0, n, 0))

        return spec

    def rows(self, block: int):
        """[B, N, S]"""

        def spec(x):
            shape = None, None, round_up(x.shape[2], block)
            return pl.BlockSpec(shape, lambda i, n, b: (b, n, 0))

        return spec

    def group_rows(self, block: int):
        """[B, N, S] → [group, S]"""

        def spec(x):
            shape = None, self.group, round_up(x.shape[2], block)
            return pl.BlockSpec(shape, lambda i, n, b: (b, n, 0))

        return spec
