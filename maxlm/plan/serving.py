"""The cost of serving a model on a machine: what is held, how many sequences fit, how
long tokens take, and the search over splits.

A replica decodes its rows one token each a step, all of them for as long as a request
lives. A step takes, on a device, the longer of reading and of computing, for weights
and for caches apart:

    weights        bytes of what the step multiplies by / (bandwidth · reading), or FLOPs / rate
    cache          bytes of all rows' pages at half of their new tokens, likewise
    traffic        element-wise maps and logits
    communication  the all-reduces and gathers of tensor parallelism; nothing hides them
    overhead       host and launches

Prompts are computed between the steps, as a training step's forward pass is
(``plan/timing.py``): each token of a request waits for its share of all rows' prompts.
Peaks, links and the shares of them that products and collectives reach are the plan's
own; ``DECODE_EFFICIENCY`` stands for published runs (``benchmarks/plan_serving.py``).
Not counted: queues, uneven lengths, shared prefixes, speculation, and the time of a
tokenizer.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, Literal

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.config import DataConfig
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.plan.communication import list_collectives
from maxlm.plan.network import PlannedCollective
from maxlm.plan.predict import FILL, Machine, select_matmul_dtype
from maxlm.plan.search import list_divisors
from maxlm.plan.serving_cache import (
    CacheFormat,
    count_layer_caches,
    count_sequence_bytes,
    count_token_bytes,
)
from maxlm.plan.timing import (
    DECODE_EFFICIENCY,
    EFFICIENCY,
    StepTime,
    count_device_flops,
    count_extra_forward_flops,
    estimate_elementwise_bytes,
    estimate_time,
)
from maxlm.plan.workload import (
    FP32,
    MeshPartitioning,
    Number,
    RunWorkload,
    StepShape,
    TokensPerRow,
)
from maxlm.run.config import RunConfig
from maxlm.run.placement import place_run
from maxlm.sharding import MeshConfig

WeightFormat = Literal["auto", "fp8", "int8"]
"""Matrices of layers; auto: the compute dtype. Tables, the head among them, are in that
anyway."""
ENGINE_WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("auto",)
"""Formats that maxlm's own engine has. The others are planned to compare with what
other engines publish."""
PREFILL_CHUNK = 2048
"""Most tokens of prompts that are computed at once."""
# Rows of a replica beyond which no plan looks.
_MOST_ROWS = 8192


@dataclass(frozen=True)
class ServingOptions:
    """Requests to serve, all of the same lengths, and what is asked of serving them."""

    prompt: int = 512
    """Tokens of a request's prompt."""
    new: int = 128
    """Tokens of its answer."""
    weights: WeightFormat = "auto"
    batch: int | None = None
    """Sequences on all devices together; None: as many as fit and are in time, and at
    least one a replica."""
    ttft_ms: float | None = None
    """Longest time to a prompt's first token."""
    tpot_ms: float | None = None
    """Longest time between a sequence's tokens."""

    @property
    def length(self) -> int:
        return self.prompt + self.new


def read_workload(
    config: RunConfig, machine: Machine, options: ServingOptions
) -> RunWorkload:
    """Reads the model of a run, but not its task. Raises MaxlmError: it is no decoder,
    or requests are longer than its context."""
    kind, limit = config.model.transformer_type, config.model.max_seq_len
    if kind != "decoder":
        what = f"serving is planned for decoders, not an {kind}"
        fix = "name a decoder's config"
        raise MaxlmError(what, where="model.architecture", fix=fix)
    if options.length > limit:
        what = f"{options.prompt:,} + {options.new:,} tokens exceed the context of {limit:,}"
        fix = "make them shorter, or raise model.max_seq_len"
        raise MaxlmError(what, where="--prompt, --new", fix=fix)
    kept = ("name", "compute_dtype", "model", "adapter", "sharding", "parallel")
    data = DataConfig(seq_len=options.prompt, batch_size=1)
    run = RunConfig(**{key: getattr(config, key) for key in kept}, data=data)
    return RunWorkload(
        run, resolve_compute_dtype(run.compute_dtype, machine.topology.platform)
    )


class ServedModel:
    """A model, as :func:`read_workload` returns it, split into replicas of ``tensor``
    devices. Bytes, FLOPs and seconds are of one device; rows are the sequences of one
    replica, a number or an array of them. Raises MaxlmError: it does not divide, or the
    machine cannot be laid out so.
    """

    def __init__(
        self,
        work: RunWorkload,
        machine: Machine,
        options: ServingOptions,
        tensor: int,
        cache: CacheFormat,
    ):
        mesh = MeshConfig(
            data=machine.topology.devices // tensor, fsdp=1, tensor=tensor
        )
        run = work.config.model_copy(update={"mesh": mesh})
        platform = machine.topology.platform
        self.machine, self.options = machine, options
        self.cache: CacheFormat = cache
        self.sizes = sizes = machine.mesh(run)
        dtype = resolve_compute_dtype(run.compute_dtype, platform)
        placed = place_run(run, sizes, dtype, for_training=False)
        assert isinstance(placed.model, Decoder)
        rules = {"storage": placed.storage, "compute": placed.compute}
        sharding = run.sharding.model_copy(
            update={"gradients": None, "optimizer": None, **rules}
        )
        self.work = copy(work)
        self.work.config = run.model_copy(update={"sharding": sharding})
        ways = prod(sizes[axis] for axis in placed.compute.heads)
        self.layer_caches = count_layer_caches(placed.model, cache, platform, ways)
        """Caches of layers, and the number of layers that have each."""
        self.unsplit_caches = count_layer_caches(placed.model, cache, platform)
        """Those of a replica of one device, where no head is twice."""
        self.split = MeshPartitioning(self.work.config, sizes)
        chip = machine.chip
        usual = select_matmul_dtype(chip, work.dtype_bytes)
        self.matmul_dtype = (
            options.weights if options.weights in chip.peak_flops else usual
        )
        reached = chip.read_bandwidth or chip.memory_bandwidth
        self.read_bandwidth = reached * DECODE_EFFICIENCY[chip.family].reading
        """B/s in reading weights and caches."""

    @cached_property
    def weight_bytes(self) -> dict[str, float]:
        """Bytes of each parameter in use."""
        table = self.work.dtype_bytes
        cast = {
            "table": table,
            "matrix": table if self.options.weights == "auto" else 1,
        }
        return {
            name: float(
                spec.size * cast.get(spec.role, FP32) / self._count_shards(spec.axes)
            )
            for name, spec in self.work.specs.items()
        }

    def count_read_weight_bytes(self, rows: Number) -> Number:
        """Counts what a step of so many rows reads: all but tables of which it looks up
        rows, and but experts that none is sent to, as if each were as likely (Mixtral,
        arXiv 2401.04088)."""
        work = self.work
        experts = self.work.experts
        met = 1.0
        unread = list(work.embedding_lookup_rates)[work.config.model.tie_embeddings :]
        if experts is not None:
            met = 1 - (1 - experts.experts_per_token / experts.num_experts) ** rows
        return sum(
            size * (met if "expert" in work.specs[name].axes else 1.0)
            for name, size in self.weight_bytes.items()
            if name not in unread
        )

    def _count_shards(self, axes: tuple[str | None, ...]) -> Number:
        return self.split.num_shards(self.split.compute, axes)

    def count_cache_bytes(self, length: int) -> float:
        """Counts the bytes of one sequence's caches."""
        return count_sequence_bytes(self.layer_caches, length, self._count_shards)

    def count_memory_bytes(self, rows: int) -> dict[str, float]:
        """Counts the bytes of so many rows at their full length, by what they are
        for."""
        model = self.work.config.model
        vocab = self._count_shards(("vocab",))
        # In fp32, with what sampling makes of them.
        logits = 2 * FP32 * model.vocab_size / float(vocab)
        each = logits + self.count_cache_bytes(self.options.length)
        # A chunk of a prompt in a layer: the residual stream and its norms, and all
        # that the layer's matrices write.
        within = max(
            self.split.local_non_residual_width(g)
            for g in self.work.matmul_layer_counts
        )
        width = (4 * model.d_model + 2 * float(within)) * self.work.dtype_bytes
        return {
            "weights": sum(self.weight_bytes.values()),
            "working": min(self.options.prompt, PREFILL_CHUNK) * width,
            "sequences": rows * each,
        }

    def count_max_rows(self) -> int:
        """Counts the sequences that fit."""
        weights, working, each = self.count_memory_bytes(1).values()
        left = FILL * self.machine.chip.memory_bytes - weights - working
        return max(int(left / each), 0)

    def _plan_pass(self, tokens: int, rows: Number) -> tuple[StepShape, StepTime]:
        """Plans the forward pass of so many tokens of so many rows on each replica,
        which gathers the logits of each row's last token."""
        config = self.work.config
        data = config.data.model_copy(update={"batch_size": rows * self.sizes["data"]})
        work = copy(self.work)
        work.config = config.model_copy(update={"data": data})
        work.tokens_per_row = TokensPerRow(tokens, tokens)
        shape = StepShape(work, self.sizes, 1, "none", self.machine.topology)
        sends = [c for c in list_collectives(shape) if c.phase == "forward"]
        axes = self.split.compute.vocab
        size = rows * config.model.vocab_size * FP32
        sends.append(
            PlannedCollective("logits", "all-gather", axes, size, 1.0, "forward")
        )
        return shape, estimate_time(
            shape, self.machine, tuple(sends), dtype=self.matmul_dtype
        )

    def estimate_prefill_seconds(self, prompts: Number = 1) -> Number:
        """Estimates a forward pass over so many prompts of each replica, to their first
        tokens."""
        chip = self.machine.chip
        own = EFFICIENCY[self.machine.chip.family]
        length, dtype = self.options.prompt, self.matmul_dtype
        shape, time = self._plan_pass(length, prompts)
        # Logits are computed of each prompt's last token alone.
        flops = count_device_flops(shape).loss / (chip.peak_flops[dtype] * own.matmul)
        logits = estimate_elementwise_bytes(shape).loss / (
            chip.memory_bandwidth * own.memory
        )
        read = self.count_read_weight_bytes(prompts * length) / self.read_bandwidth
        busy = np.maximum(read, time.forward - (1 - 1 / length) * (flops + logits))
        exposed = time.communication - np.minimum(time.communication * own.hidden, busy)
        return busy + exposed + DECODE_EFFICIENCY[chip.family].step_seconds

    def estimate_decode_seconds(self, rows: Number) -> dict[str, Number]:
        """Estimates the seconds of a step that adds a token to every row: its parts,
        and in all."""
        chip = self.machine.chip
        own = EFFICIENCY[self.machine.chip.family]
        dtype = self.matmul_dtype
        shape, time = self._plan_pass(1, rows)
        flops = count_device_flops(shape)
        moved = estimate_elementwise_bytes(shape)
        context = self.options.prompt + -(-self.options.new // 2)
        read = self.count_read_weight_bytes(rows) / self.read_bandwidth
        cached = rows * self.count_cache_bytes(context) / self.read_bandwidth
        attended = rows * self._count_attention_flops(context)
        attention_dtype = "bf16" if dtype in ("fp8", "int8") else dtype
        products = (flops.forward + flops.loss) / (chip.peak_flops[dtype] * own.matmul)
        traffic = (moved.forward + moved.loss) / (chip.memory_bandwidth * own.memory)
        parts = {
            "weights": np.maximum(read, products),
            "cache": np.maximum(
                cached, attended / (chip.peak_flops[attention_dtype] * own.matmul)
            ),
            "traffic": traffic + count_extra_forward_flops(shape) / chip.vector_flops,
            "communication": time.communication,
            "overhead": DECODE_EFFICIENCY[chip.family].step_seconds,
        }
        return {**parts, "total": sum(parts.values())}

    def _count_attention_flops(self, context: int) -> float:
        """Counts one row's FLOPs of attention over its cache. Latent attention
        multiplies by the vectors that it keeps twice, as keys and as values (arXiv
        2405.04434, section 2.1.2)."""
        heads = {stack.name: stack.heads() for stack in self.work.stacks}
        flops = 0.0
        for layer, num_layers in self.layer_caches.items():
            own = heads[layer.stack]
            if own is not None:
                width = own.head_dim + own.value_dim
                if layer.specs.value is None:  # it is a part of the key
                    vector = jax.tree.leaves(layer.specs.key)[0].shape[-1]
                    width = 2 * vector - own.shared_key_dim
                one = (
                    2
                    * num_layers
                    * own.num_heads
                    * width
                    * min(context, layer.window or context)
                )
                flops += one / float(self._count_shards(("heads",)))
        return flops


@dataclass(frozen=True)
class ServingPoint:
    """Serving at one number of sequences."""

    batch: int
    """Sequences on all devices together."""
    tpot_seconds: float
    """Seconds between a sequence's tokens, with the prompts computed in between."""
    tokens_per_second: float
    """New tokens of all sequences."""
    time: dict[str, float]
    """Seconds of a step's parts, and in all
    (:meth:`ServedModel.estimate_decode_seconds`)."""


@dataclass(frozen=True)
class ServingPlan:
    """A model served on one split; plain data but for classes like this one."""

    name: str
    machine: dict[str, Any]
    devices: int
    mesh: dict[str, int]
    cache: CacheFormat
    options: ServingOptions
    memory: dict[str, float]
    """Bytes of a device: parts, in all, and what there is."""
    token_cache_bytes: float
    """Bytes that one more token takes before a window is full, each head once."""
    sequence_cache_bytes: float
    """Bytes of a finished request's caches, likewise."""
    max_batch: int
    """Sequences that fit, on all devices together."""
    fits: bool
    meets_targets: bool
    ttft_seconds: float
    """Seconds to the first token of a prompt that is alone on its replica."""
    point: ServingPoint
    curve: tuple[ServingPoint, ...]

    @property
    def is_feasible(self) -> bool:
        return self.fits and self.meets_targets


def plan_served_model(served: ServedModel) -> ServingPlan:
    """Plans one split; too little memory is no error."""
    options = served.options
    machine = served.machine
    replicas = served.sizes["data"]
    most = served.count_max_rows()
    longest = (options.tpot_ms or np.inf) / 1e3
    rows = min(max(most, 1), _MOST_ROWS)
    if options.batch is None:
        points = list_serving_points(served, [replicas * n for n in range(1, rows + 1)])
        in_time = (point for point in points if point.tpot_seconds <= longest)
        point = max(
            in_time, key=lambda point: point.tokens_per_second, default=points[0]
        )
    else:
        (point,) = list_serving_points(served, [options.batch])
    doubled = (replicas * 2**i for i in range(rows.bit_length()))
    memory = served.count_memory_bytes(-(-point.batch // replicas))
    memory |= {"total": sum(memory.values()), "limit": machine.chip.memory_bytes}
    first = float(served.estimate_prefill_seconds())
    return ServingPlan(
        name=served.work.config.name,
        machine=machine.to_json()
        | {"decode": DECODE_EFFICIENCY[machine.chip.family]._asdict()},
        devices=machine.topology.devices,
        mesh=dict(served.sizes),
        cache=served.cache,
        options=options,
        memory=memory,
        token_cache_bytes=count_token_bytes(served.unsplit_caches),
        sequence_cache_bytes=count_sequence_bytes(
            served.unsplit_caches, options.length
        ),
        max_batch=most * replicas,
        fits=point.batch <= most * replicas,
        meets_targets=point.tpot_seconds <= longest
        and 1e3 * first <= (options.ttft_ms or np.inf),
        ttft_seconds=first,
        point=point,
        curve=list_serving_points(
            served, sorted({*doubled, replicas * rows, point.batch})
        ),
    )


def list_serving_points(
    served: ServedModel, batches: Sequence[int]
) -> tuple[ServingPoint, ...]:
    """Lists serving at each number of sequences; replicas with unequal shares are as
    slow as the one with most."""
    rows = np.ceil(np.asarray(batches, float) / served.sizes["data"])
    time = served.estimate_decode_seconds(rows)
    # A token's share of the passes that compute all rows' prompts, several at once if
    # short.
    together = np.clip(PREFILL_CHUNK // served.options.prompt, 1, rows)
    share = (
        rows / together / served.options.new * served.estimate_prefill_seconds(together)
    )
    tpot = time["total"] + share
    columns = (column.tolist() for column in np.broadcast_arrays(tpot, *time.values()))
    return tuple(
        ServingPoint(
            batch, seconds, batch / seconds, dict(zip(time, parts, strict=True))
        )
        for batch, seconds, *parts in zip(batches, *columns, strict=True)
    )


def _rank(plan: ServingPlan) -> tuple[int, float]:
    if plan.is_feasible:
        return 0, -plan.point.tokens_per_second
    return (1, plan.point.tpot_seconds) if plan.fits else (2, plan.memory["total"])


def search_serving(
    config: RunConfig,
    machine: Machine,
    options: ServingOptions = ServingOptions(),
    *,
    tensor: int | None = None,
    caches: Sequence[CacheFormat] = ("auto",),
) -> tuple[list[ServingPlan], str | None]:
    """Plans splits of all devices into replicas, with every cache. Raises MaxlmError:
    the model cannot be served, or cannot be split so at all; but not for too little
    memory.

    Args:
        tensor: devices of a replica; None: each number that divides the machine's.

    Returns:
        Plans that fit and are in time first, by tokens a second; then others that fit,
        by time per token; then those that need the fewest bytes. And why the last split
        that the model cannot have was refused.
    """
    work = read_workload(config, machine, options)
    devices = machine.topology.devices
    plans: list[ServingPlan] = []
    refusal: MaxlmError | None = None
    splits = [tensor] if tensor else list_divisors(devices)
    for split, cache in product(splits, caches):
        try:
            plans.append(
                plan_served_model(ServedModel(work, machine, options, split, cache))
            )
        except MaxlmError as error:
            refusal = error
    if refusal and not plans:
        raise refusal
    return sorted(plans, key=_rank), refusal and str(refusal)
