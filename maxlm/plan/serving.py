"""The cost of serving a model on a machine: its memory, how many sequences fit, how
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
from typing import Literal

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.config import DataConfig
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.plan.communication import list_collectives
from maxlm.plan.network import PlannedCollective
from maxlm.plan.predict import SAFE_FILL_RATIO, Machine, select_matmul_dtype
from maxlm.plan.search import list_divisors
from maxlm.plan.serving_cache import (
    CacheFormat,
    count_layer_caches,
    count_sequence_bytes,
    count_state_bytes,
    count_token_bytes,
    find_attention_cache,
)
from maxlm.plan.stacks import get_num_streams
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
    FRONTEND_PREFIX,
    MeshPartitioning,
    Number,
    RunWorkload,
    StepShape,
    TokensPerRow,
)
from maxlm.run.config import RunConfig
from maxlm.run.placement import place_run
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding import MeshConfig

WeightFormat = Literal["auto", "fp8", "int8"]
"""Matrices of layers; auto: the compute dtype. Tables, the head among them, are in that
anyway."""
ENGINE_WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("auto",)
"""Formats that maxlm's own engine has. The others are planned to compare with what
other engines publish."""
PREFILL_CHUNK = 2048
"""Most tokens of prompts that are computed at once."""
# Most rows of a replica that a plan looks at.
_MAX_ROWS = 8192


@dataclass(frozen=True)
class ServingOptions:
    """Requests to serve, all of the same lengths, and the times to serve them in."""

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
    mtp_drafts: int = 0
    """Tokens that modules of ``mtp`` guess, a step (the engine's
    ``speculation.kind=mtp``): their caches are counted, their time and gain are
    not."""

    @property
    def length(self) -> int:
        """Tokens of a finished request."""
        return self.prompt + self.new


def read_workload(
    config: RunConfig, machine: Machine, options: ServingOptions
) -> RunWorkload:
    """Reads the model of a run, but not its task. Raises MaxlmError: it is no decoder,
    requests are longer than its context, or it has no modules of ``mtp`` to guess
    with."""
    kind = config.model.transformer_type
    if kind != "decoder":
        message = f"serving is planned for decoders, not an {kind}"
        raise MaxlmError(
            message, where="model.architecture", fix="name a decoder's config"
        )
    if options.mtp_drafts and config.model.mtp is None:
        message = "the model has no modules that predict further tokens (model.mtp)"
        fix = "leave it out, or set model.mtp"
        raise MaxlmError(message, where="--mtp-drafts", fix=fix)
    limit = config.model.max_seq_len
    if options.length > limit:
        lengths = f"{options.prompt:,} + {options.new:,} tokens"
        message = f"{lengths} exceed the context of {limit:,}"
        fix = "make them shorter, or raise model.max_seq_len"
        raise MaxlmError(message, where="--prompt, --new", fix=fix)
    run = RunConfig(
        name=config.name,
        compute_dtype=config.compute_dtype,
        model=config.model,
        adapter=config.adapter,
        sharding=config.sharding,
        parallel=config.parallel,
        data=DataConfig(seq_len=options.prompt, batch_size=1),
    )
    platform = machine.topology.platform
    return RunWorkload(run, resolve_compute_dtype(run.compute_dtype, platform))


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
        devices = machine.topology.devices
        mesh = MeshConfig(data=devices // tensor, fsdp=1, tensor=tensor)
        run = work.config.model_copy(update={"mesh": mesh})
        platform = machine.topology.platform
        self.machine = machine
        self.options = options
        self.cache: CacheFormat = cache
        self.sizes = machine.resolve_mesh_sizes(run)
        dtype = resolve_compute_dtype(run.compute_dtype, platform)
        placed = place_run(run, self.sizes, dtype, for_training=False)
        assert isinstance(placed.model, Decoder)
        # As the model lies on this mesh; nothing is trained.
        rules = {
            "storage": placed.storage,
            "compute": placed.compute,
            "gradients": None,
            "optimizer": None,
        }
        sharding = run.sharding.model_copy(update=rules)
        self.work = copy(work)
        self.work.config = run.model_copy(update={"sharding": sharding})
        self.split = MeshPartitioning(self.work.config, self.sizes)

        mtp = placed.model.config.mtp
        # More guesses than modules are made by the last one.
        num_modules = 0 if mtp is None else min(mtp.num_modules, options.mtp_drafts)
        head_ways = prod(self.sizes[axis] for axis in placed.compute.heads)
        self.layer_caches = count_layer_caches(
            placed.model, cache, platform, head_ways, num_modules
        )
        """Caches of layers, and the number of layers that have each."""
        self.unsplit_caches = count_layer_caches(
            placed.model, cache, platform, num_mtp_modules=num_modules
        )
        """Those of a replica of one device, where no head is twice."""

        chip = machine.chip
        self.matmul_dtype = select_matmul_dtype(chip, work.dtype_bytes)
        if options.weights in chip.peak_flops:
            self.matmul_dtype = options.weights
        bandwidth = chip.read_bandwidth or chip.memory_bandwidth
        self.read_bandwidth = bandwidth * DECODE_EFFICIENCY[chip.family].reading
        """B/s in reading weights and caches."""

    @cached_property
    def weight_bytes(self) -> dict[str, float]:
        """Bytes of each parameter in use."""
        compute_itemsize = self.work.dtype_bytes
        has_quantized = self.options.weights != "auto"
        itemsize_of_role = {
            "matrix": 1 if has_quantized else compute_itemsize,
            "table": compute_itemsize,
            "vector": FP32,
        }
        sizes = {}
        for name, spec in self.work.specs.items():
            size = spec.size * itemsize_of_role[spec.role]
            sizes[name] = float(size / self._count_shards(spec.axes))
        return sizes

    def count_read_weight_bytes(self, rows: Number) -> Number:
        """Counts what a step of so many rows reads: all but tables of which it looks up
        rows, and but experts that none is sent to.

        As if each expert were as likely, a row misses one with a chance of 1 − k/E, and
        all rows do with that to the power of their number (Mixtral, arXiv 2401.04088).
        """
        work = self.work
        experts = work.experts
        met_share = 1.0
        if experts is not None:
            chosen = experts.experts_per_token / experts.num_experts
            met_share = 1 - (1 - chosen) ** rows
        looked_up = list(work.embedding_lookup_rates)
        if work.config.model.tie_embeddings:
            # The first table is the head too, which is read whole.
            looked_up = looked_up[1:]
        total = 0
        for name, size in self.weight_bytes.items():
            # A frontend runs once a prompt.
            if name in looked_up or name.startswith(FRONTEND_PREFIX):
                continue
            is_expert = "expert" in work.specs[name].axes
            total += size * (met_share if is_expert else work.count_reads(name))
        return total

    def _count_shards(self, axes: tuple[str | None, ...]) -> Number:
        return self.split.num_shards(self.split.compute, axes)

    def count_cache_bytes(self, length: int) -> float:
        """Counts the bytes of one sequence's caches."""
        return count_sequence_bytes(self.layer_caches, length, self._count_shards)

    def count_memory_bytes(self, rows: int) -> dict[str, float]:
        """Counts the bytes of so many rows at their full length, by what they are
        for."""
        model = self.work.config.model

        # Of each sequence: its logits in fp32, with what sampling makes of them, and
        # its caches.
        vocab_ways = float(self._count_shards(("vocab",)))
        logits_bytes = 2 * FP32 * model.vocab_size / vocab_ways
        cache_bytes = self.count_cache_bytes(self.options.length)
        sequence_bytes = logits_bytes + cache_bytes

        # A chunk of a prompt in a layer: the residual stream and its norms, and all
        # that the layer's matrices write.
        layer_width = max(
            self.split.local_non_residual_width(group)
            for group in self.work.matmul_layer_counts
        )
        streams_width = get_num_streams(model) * model.d_model
        elements_per_token = 4 * streams_width + 2 * float(layer_width)
        if model.layer_inputs is not None:
            # Made for all layers at once, of a row and a projection.
            elements_per_token += 3 * model.num_layers * model.layer_inputs.width
        bytes_per_token = elements_per_token * self.work.dtype_bytes
        chunk_tokens = min(self.options.prompt, PREFILL_CHUNK)
        return {
            "weights": sum(self.weight_bytes.values()),
            "working": chunk_tokens * bytes_per_token,
            "sequences": rows * sequence_bytes,
        }

    def count_max_rows(self) -> int:
        """Counts the sequences of a replica that fit."""
        parts = self.count_memory_bytes(1)
        usable_bytes = SAFE_FILL_RATIO * self.machine.chip.memory_bytes
        free_bytes = usable_bytes - parts["weights"] - parts["working"]
        return max(int(free_bytes / parts["sequences"]), 0)

    def _plan_pass(self, tokens: int, rows: Number) -> tuple[StepShape, StepTime]:
        """Plans the forward pass of so many tokens of so many rows on each replica,
        which gathers the logits of each row's last token."""
        config = self.work.config
        data = config.data.model_copy(update={"batch_size": rows * self.sizes["data"]})
        work = copy(self.work)
        work.config = config.model_copy(update={"data": data})
        work.tokens_per_row = TokensPerRow(tokens, tokens)
        shape = StepShape(
            work,
            self.sizes,
            micro_batches=1,
            remat="none",
            topology=self.machine.topology,
        )
        collectives = [
            collective
            for collective in list_collectives(shape)
            if collective.phase == "forward"
        ]
        logits = PlannedCollective(
            content="logits",
            kind="all-gather",
            axes=self.split.compute.vocab,
            whole_bytes=rows * config.model.vocab_size * FP32,
            count=1.0,
            phase="forward",
        )
        time = estimate_time(
            shape, self.machine, (*collectives, logits), dtype=self.matmul_dtype
        )
        return shape, time

    def estimate_prefill_seconds(self, prompts: Number = 1) -> Number:
        """Estimates a forward pass over so many prompts of each replica, to their first
        tokens."""
        chip = self.machine.chip
        efficiency = EFFICIENCY[chip.family]
        length = self.options.prompt
        shape, time = self._plan_pass(length, prompts)

        # Seconds of computing. Logits are computed of each prompt's last token alone:
        # those of the others are taken off.
        matmul_rate = chip.peak_flops[self.matmul_dtype] * efficiency.matmul
        bandwidth = chip.memory_bandwidth * efficiency.memory
        loss_products = count_device_flops(shape).loss / matmul_rate
        loss_traffic = estimate_elementwise_bytes(shape).loss / bandwidth
        share_of_other_tokens = 1 - 1 / length
        saved = share_of_other_tokens * (loss_products + loss_traffic)
        computing = time.forward - saved

        # Seconds of reading weights, and of communication, a part of which hides behind
        # the longer of the two.
        read_bytes = self.count_read_weight_bytes(prompts * length)
        reading = read_bytes / self.read_bandwidth
        busy = np.maximum(reading, computing)
        hidden = np.minimum(time.communication * efficiency.hidden, busy)
        exposed = time.communication - hidden
        overhead = DECODE_EFFICIENCY[chip.family].step_seconds
        return busy + exposed + overhead

    def estimate_decode_seconds(self, rows: Number) -> dict[str, Number]:
        """Estimates the seconds of a step that adds a token to every row: its parts,
        and in all."""
        chip = self.machine.chip
        efficiency = EFFICIENCY[chip.family]
        dtype = self.matmul_dtype
        # Attention is in bf16 where other products are in 8 bits.
        attention_dtype = "bf16" if dtype in ("fp8", "int8") else dtype
        matmul_rate = chip.peak_flops[dtype] * efficiency.matmul
        attention_rate = chip.peak_flops[attention_dtype] * efficiency.matmul
        bandwidth = chip.memory_bandwidth * efficiency.memory

        shape, time = self._plan_pass(1, rows)
        # Seconds of reading weights, and of multiplying by them.
        flops = count_device_flops(shape)
        weight_reading = self.count_read_weight_bytes(rows) / self.read_bandwidth
        products = (flops.forward + flops.loss) / matmul_rate

        # Seconds of reading caches, and of attention over them.
        # On average a row has its prompt and half of its answer.
        context = self.options.prompt + -(-self.options.new // 2)
        # The states of recurrences are written as well as read.
        cache_bytes = self.count_cache_bytes(context)
        cache_bytes += count_state_bytes(self.layer_caches, self._count_shards)
        cache_reading = rows * cache_bytes / self.read_bandwidth
        attention = rows * self._count_attention_flops(context) / attention_rate

        # Seconds of element-wise maps, and of what layers state beside products.
        elementwise_bytes = estimate_elementwise_bytes(shape)
        traffic = (elementwise_bytes.forward + elementwise_bytes.loss) / bandwidth
        # A token at a time makes no products of matrices.
        extra = count_extra_forward_flops(shape) / chip.vector_flops
        parts = {
            "weights": np.maximum(weight_reading, products),
            "cache": np.maximum(cache_reading, attention),
            "traffic": traffic + extra,
            "communication": time.communication,
            "overhead": DECODE_EFFICIENCY[chip.family].step_seconds,
        }
        return {**parts, "total": sum(parts.values())}

    def _count_attention_flops(self, context: int) -> float:
        """Counts one row's FLOPs of attention over its cache. Latent attention
        multiplies by the vectors that it keeps twice, as keys and as values (arXiv
        2405.04434, section 2.1.2)."""
        heads_of_stack = {stack.name: stack.heads() for stack in self.work.stacks}
        head_ways = float(self._count_shards(("heads",)))
        flops = 0.0
        for layer, num_layers in self.layer_caches.items():
            heads = heads_of_stack[layer.stack]
            if heads is None:
                continue
            width = heads.head_dim + heads.value_dim
            cache = find_attention_cache(layer.specs)
            if cache is not None and cache.value is None:
                # Latent attention: the value is the key's vector without its rotary
                # part.
                key_width = jax.tree.leaves(cache.key)[0].shape[-1]
                width = 2 * key_width - heads.shared_key_dim
            num_seen = min(context, layer.window or context)
            # A product and a sum for each element of the keys and values seen.
            flops += 2 * num_layers * heads.num_heads * width * num_seen / head_ways
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
    machine: JsonObject
    devices: int
    mesh: dict[str, int]
    cache: CacheFormat
    options: ServingOptions
    memory: dict[str, float]
    """Bytes of a device: by part, their ``total``, and the ``limit``."""
    token_cache_bytes: float
    """Bytes that one more token takes before a window is full, each head once."""
    sequence_cache_bytes: float
    """Bytes of a finished request's caches, each head once."""
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
    chip = machine.chip
    replicas = served.sizes["data"]
    max_rows = served.count_max_rows()
    max_tpot = (options.tpot_ms or np.inf) / 1e3
    curve_rows = min(max(max_rows, 1), _MAX_ROWS)
    point = _choose_point(served, curve_rows, max_tpot)
    # The fullest replica's.
    rows = -(-point.batch // replicas)
    memory = served.count_memory_bytes(rows)
    memory |= {"total": sum(memory.values()), "limit": chip.memory_bytes}
    ttft_seconds = float(served.estimate_prefill_seconds())
    meets_tpot = point.tpot_seconds <= max_tpot
    meets_ttft = 1e3 * ttft_seconds <= (options.ttft_ms or np.inf)
    # Rates at 1, 2, 4, ... rows of a replica, at the most that fit, and at the plan's.
    doubled = [replicas * 2**i for i in range(curve_rows.bit_length())]
    curve_batches = sorted({*doubled, replicas * curve_rows, point.batch})
    decode_efficiency = DECODE_EFFICIENCY[chip.family]._asdict()
    return ServingPlan(
        name=served.work.config.name,
        machine={**machine.to_json(), "decode": decode_efficiency},
        devices=machine.topology.devices,
        mesh=dict(served.sizes),
        cache=served.cache,
        options=options,
        memory=memory,
        token_cache_bytes=count_token_bytes(served.unsplit_caches),
        sequence_cache_bytes=count_sequence_bytes(
            served.unsplit_caches, options.length
        ),
        max_batch=max_rows * replicas,
        fits=point.batch <= max_rows * replicas,
        meets_targets=meets_tpot and meets_ttft,
        ttft_seconds=ttft_seconds,
        point=point,
        curve=list_serving_points(served, curve_batches),
    )


def _choose_point(served: ServedModel, max_rows: int, max_tpot: float) -> ServingPoint:
    """Chooses the number of sequences that is asked for, or that gives most tokens a
    second with at most ``max_tpot`` seconds between them; if none does, the least."""
    if served.options.batch is not None:
        return list_serving_points(served, [served.options.batch])[0]
    replicas = served.sizes["data"]
    batches = [replicas * rows for rows in range(1, max_rows + 1)]
    points = list_serving_points(served, batches)
    in_time = [point for point in points if point.tpot_seconds <= max_tpot]
    if not in_time:
        return points[0]
    return max(in_time, key=lambda point: point.tokens_per_second)


def list_serving_points(
    served: ServedModel, batches: Sequence[int]
) -> tuple[ServingPoint, ...]:
    """Lists serving at each number of sequences; replicas with unequal shares are as
    slow as the one with most."""
    rows = np.ceil(np.asarray(batches, float) / served.sizes["data"])
    time = served.estimate_decode_seconds(rows)
    # A token's share of the passes that compute all rows' prompts, several at once if
    # short.
    prompts_per_pass = np.clip(PREFILL_CHUNK // served.options.prompt, 1, rows)
    passes_per_token = rows / prompts_per_pass / served.options.new
    pass_seconds = served.estimate_prefill_seconds(prompts_per_pass)
    tpot = time["total"] + passes_per_token * pass_seconds
    # A figure that is the same at every number of sequences is a single number.
    columns = np.broadcast_arrays(tpot, *time.values())
    points: list[ServingPoint] = []
    for batch, *figures in zip(batches, *columns, strict=True):
        tpot_seconds, *part_seconds = (float(figure) for figure in figures)
        point = ServingPoint(
            batch=batch,
            tpot_seconds=tpot_seconds,
            tokens_per_second=batch / tpot_seconds,
            time=dict(zip(time, part_seconds, strict=True)),
        )
        points.append(point)
    return tuple(points)


def _get_rank(plan: ServingPlan) -> tuple[int, float]:
    """Returns the key that sorts plans, best first."""
    if plan.is_feasible:
        return 0, -plan.point.tokens_per_second
    if plan.fits:
        return 1, plan.point.tpot_seconds
    return 2, plan.memory["total"]


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
    plans: list[ServingPlan] = []
    refusal: MaxlmError | None = None
    replica_sizes = [tensor] if tensor else list_divisors(machine.topology.devices)
    for replica_size, cache in product(replica_sizes, caches):
        try:
            served = ServedModel(work, machine, options, replica_size, cache)
            plans.append(plan_served_model(served))
        except MaxlmError as error:
            refusal = error
    if refusal is not None and not plans:
        raise refusal
    message = None if refusal is None else str(refusal)
    return sorted(plans, key=_get_rank), message
