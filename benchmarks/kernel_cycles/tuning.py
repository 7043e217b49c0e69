"""How fast attention is with given blocks, and the search for the fastest.

For a TPU, which need not be here, the compiler's final schedule is counted
(:mod:`benchmarks.kernel_cycles.static`).
"""

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cycles.static import CompileError, Spec, measure
from benchmarks.kernel_cycles.static.problems import Mask
from pallas_kernels.attention import attention_backward, attention_forward, tuned
from pallas_kernels.attention.tpu_blocks import (
    FORWARD,
    AttentionSizes,
    TpuBlocks,
    TpuBlockSizes,
    check_blocks,
    choose_blocks_by_rule,
)
from pallas_kernels.attention.tuned import TunedEntry
from pallas_kernels.chips import TpuChip

_SPILLS_COST = 0.25
SIZES, TILES = (256, 2048), (128, 512)
"""Least and most, of blocks and of tiles, that a search tries on a TPU."""


class Problem(NamedTuple):
    """Attention of one row to itself, in one direction."""

    direction: str
    head_dim: int
    v_head_dim: int
    seq: int
    mask: str
    """causal, full, window:TOKENS or segments:COUNT."""
    dtype: str
    heads: int

    @property
    def sizes(self) -> AttentionSizes:
        width = jnp.dtype(self.dtype).itemsize
        return AttentionSizes(
            self.seq, self.seq, self.head_dim, self.v_head_dim, width, width
        )

    @property
    def kind(self) -> str:
        return tuned.parse_mask_kind(self.mask)

    def options(self) -> dict[str, Any]:
        """Of attention, but for segments.

        Raises:
            ValueError: an unknown mask, segments that do not divide the sequence.
        """
        if self.mask == tuned.FULL:
            return {"causal": False}
        return {"window": Mask.parse(self.mask).window}

    def segment_ids(self) -> np.ndarray | None:
        """int32 [1, seq].

        Raises:
            ValueError: as :meth:`options`.
        """
        if self.mask == tuned.FULL:
            return None
        ids = Mask.parse(self.mask).segment_ids(self.seq)
        return None if ids is None else ids[None]

    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v; and lse, delta, d_o for the backward pass."""

        def of(*last: int, dtype: str = self.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (1, self.seq, self.heads, *last), jnp.dtype(dtype)
            )

        qkv = of(self.head_dim), of(self.head_dim), of(self.v_head_dim)
        if self.direction == FORWARD:
            return qkv
        return (*qkv, of(dtype="float32"), of(dtype="float32"), of(self.v_head_dim))

    def attention(self, block_sizes: Any) -> Callable[..., Any]:
        """Of the operands, and segment ids where there are any."""
        options = self.options() | {"block_sizes": block_sizes}
        if self.direction == FORWARD:
            function = attention_forward
            count = 3
        else:
            function = partial(attention_backward, dtype=jnp.dtype(self.dtype))
            count = 6

        def run(*arrays: jax.Array) -> Any:
            ids = arrays[count:]
            return function(
                *arrays[:count],
                segment_ids=(ids[0], ids[0]) if ids else None,
                **options,
            )

        return run

    def entry(
        self,
        chip: str,
        blocks: Any,
        cost: float,
        made_with: str,
        spills: int | None = None,
    ) -> TunedEntry:
        """Of the table."""
        return TunedEntry(
            chip=chip,
            direction=self.direction,
            head_sizes=(self.head_dim, self.v_head_dim),
            seq=self.seq,
            mask=self.mask,
            dtype=self.dtype,
            blocks=blocks._asdict(),
            cost=cost,
            spills=spills,
            heads=self.heads,
            made_with=made_with,
        )

    def __str__(self) -> str:
        heads = f"{self.heads} heads of {self.head_dim}"
        if self.v_head_dim != self.head_dim:
            heads += f" and {self.v_head_dim}"
        return f"{self.direction} {self.seq} {self.mask}, {heads}, {self.dtype}"


def program(
    *, problem: Sequence[Any], blocks: Sequence[Any]
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """A problem with a TPU's blocks, as :class:`~benchmarks.kernel_cycles.static.Spec`
    wants it: the fields of both, in order.

    Operands and results are [row, head, token, ...], as they lie for the kernels:
    copies into that order, which are not counted, would take the compiler longer than
    the kernel does.
    """
    parsed_problem = Problem(*problem)
    tpu_blocks = TpuBlocks(*blocks)
    ids = parsed_problem.segment_ids()
    operands = parsed_problem.operands()
    run = parsed_problem.attention(TpuBlockSizes(tpu_blocks, tpu_blocks))

    def swapped(arrays: Any) -> Any:
        return jax.tree.map(lambda x: x.swapaxes(1, 2), arrays)

    def by_head(*arrays: jax.Array) -> Any:
        return swapped(run(*swapped(arrays[: len(operands)]), *arrays[len(operands) :]))

    shapes = [
        x.update(shape=(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]))
        for x in operands
    ]
    return by_head, shapes if ids is None else [*shapes, ids]


class Cost(NamedTuple):
    """Of a TPU's blocks, by the compiler's schedule."""

    cycles: float
    """Of the busiest core's kernels; infinitely many where the compiler refuses the
    blocks."""
    spills: int = 0
    """Registers that the bodies of the inner loops store away."""

    @property
    def rank(self) -> float:
        """What a search makes small. The schedule knows nothing of the transfers that
        share memory's ports with spilt registers: blocks without may take a little
        longer."""
        return self.cycles * (1 + _SPILLS_COST * (self.spills > 0))


def static_cost(problem: Problem, chip: TpuChip, blocks: TpuBlocks) -> Cost:
    """Compile a problem with a TPU's blocks and count."""
    arguments = {"problem": list(problem), "blocks": list(blocks)}
    spec = Spec(f"{__name__}:program", arguments)
    try:
        costs = measure(spec, chip.name)
    except CompileError:
        return Cost(math.inf)
    loops = (loop for kernel in costs.kernels for loop in kernel.inner_loops)
    return Cost(costs.cycles(), sum(loop.spill_stores for loop in loops))


Axis = Callable[[Any], Iterable[Any]]


def axes(problem: Problem, chip: TpuChip) -> list[Axis]:
    """Ways to change a TPU's blocks a step, those first that matter most."""

    def near(value: int, low: int, high: int) -> list[int]:
        return [n for n in (value // 2, value * 2) if low <= n <= high]

    def size(b: TpuBlocks) -> Iterator[TpuBlocks]:
        for n in near(b.q, *SIZES):
            k = max(b.k * n // b.q, SIZES[0])
            yield b._replace(q=n, k=k, tile_q=min(b.tile_q, n), tile_k=min(b.tile_k, k))

    def one(field: str, low: int, high: int) -> Axis:
        return lambda b: (
            b._replace(**{field: n}) for n in near(getattr(b, field), low, high)
        )

    # Forward, tiles of the same queries become one, whose keys end with its queries.
    joined = problem.direction == FORWARD and not problem.kind.startswith(tuned.WINDOW)

    def tile_k(b: TpuBlocks) -> Iterator[TpuBlocks]:
        for n in near(b.tile_k, *TILES):
            if not joined or max(n, b.tile_k) > b.tile_q:
                yield b._replace(tile_k=n)

    def tiles(b: TpuBlocks) -> Iterator[TpuBlocks]:
        # Smaller on one side alone often loses where smaller on both wins.
        for q, k in zip(
            near(b.tile_q, 64, 1024), near(b.tile_k, 64, 1024), strict=True
        ):
            if all(TILES[0] <= n <= TILES[1] for n in (q, k)):
                yield b._replace(tile_q=q, tile_k=k)

    ways = [
        tiles,
        size,
        one("tile_q", *TILES),
        tile_k,
        one("k", *SIZES),
        one("q", *SIZES),
        lambda b: (b._replace(ahead=n) for n in (1, 2, 3) if n != b.ahead),
        lambda b: (b._replace(behind=n) for n in (1, 2) if n != b.behind),
        lambda b: (b._replace(pace=n) for n in (0, 2, 3, 4) if n != b.pace),
    ]
    return [partial(_sound, problem, chip, way) for way in ways]


def _sound(
    problem: Problem, chip: TpuChip, way: Axis, blocks: TpuBlocks
) -> Iterator[TpuBlocks]:
    """Of the changed blocks, those worth compiling."""
    for changed in way(blocks):
        try:
            check_blocks(changed)
        except ValueError:
            continue
        # Blocks of more keys than queries would lose the edges of ``walk``.
        if changed.k <= changed.q and tuned.can_use_blocks(
            changed, chip, problem.direction, problem.sizes
        ):
            yield changed


def starts(problem: Problem, chip: TpuChip) -> list[TpuBlocks]:
    """Where a search begins: what the table has for the problem, or near it; and the
    rule."""
    tuned_blocks = tuned.find_tuned_blocks(
        chip, problem.direction, problem.sizes, problem.kind
    )
    rule = choose_blocks_by_rule(chip, problem.direction, problem.sizes)
    return [rule] if tuned_blocks in (None, rule) else [tuned_blocks, rule]


def descend(
    begin: Sequence[Any], axes: Sequence[Axis], cost: Callable[[Any], float], most: int
) -> tuple[Any, float]:
    """The cheapest that steps along one axis after the other lead to, and its cost.

    Args:
        begin: the cheapest of these is the first.
        axes: each gives a candidate's neighbours.
        cost: infinite where a candidate is impossible.
        most: candidates whose cost is asked.

    Raises:
        ValueError: all were impossible.
    """
    costs: dict[Any, float] = {}

    def best() -> Any:
        return min(costs, key=lambda candidate: costs[candidate])

    def ask(candidates: Iterable[Any]) -> None:
        for candidate in candidates:
            if candidate not in costs and len(costs) < most:
                costs[candidate] = cost(candidate)

    ask(begin)
    before = None
    while before != best() and len(costs) < most:
        before = best()
        for axis in axes:
            ask(axis(best()))
    if math.isinf(costs[best()]):
        raise ValueError(f"none of {', '.join(map(str, costs))} compiles")
    return best(), costs[best()]


def versions(*packages: str) -> str:
    """Of the packages that are installed, in words."""
    installed = []
    for package in packages:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(installed)
