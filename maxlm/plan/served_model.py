"""A model as an engine serves it on a machine: its memory, and the time of its steps.

A replica decodes its rows one token each a step, all of them for as long as a request
lives. A step takes, on a device, the longer of reading and of computing, for weights
and for caches apart:

    weights        bytes of what the step multiplies by / (bandwidth · reading), or FLOPs / rate
    cache          bytes of all rows' pages at half of their new tokens, likewise
    traffic        element-wise maps and logits
    communication  the all-reduces and gathers of tensor parallelism; nothing hides them
    overhead       host and launches

Prompts are computed between the steps, as a training step's forward pass is
(``plan/timing.py``). Peaks, links and the shares of them that products and collectives
reach are the plan's own; ``DECODE_EFFICIENCY`` stands for published runs
(``benchmarks/plan_serving.py``).
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.config import DataConfig
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.caches.config import CacheConfig
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.params import param_specs
from maxlm.plan.communication import list_collectives
from maxlm.plan.forward import count_forward_token_bytes
from maxlm.plan.machine import SAFE_FILL_RATIO, Machine, select_matmul_dtype
from maxlm.plan.network import PlannedCollective
from maxlm.plan.serving_cache import (
    CacheFormat,
    count_layer_caches,
    count_sequence_bytes,
    count_state_bytes,
    find_attention_cache,
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
    FRONTEND_PREFIX,
    MeshPartitioning,
    Number,
    RunWorkload,
    StepShape,
    TokensPerRow,
)
from maxlm.run.config import RunConfig
from maxlm.run.placement import place_run
from maxlm.run.quantize.formats import choose_formats
from maxlm.run.quantize.scheme import parse_scheme
from maxlm.sharding import AxisRules, MeshConfig

AUTO_WEIGHTS = "auto"
"""Weights as the run has them: quantized if it is, else in the compute dtype."""
PREFILL_CHUNK = 2048
"""Most tokens of prompts that are computed at once."""


@dataclass(frozen=True)
class ServingOptions:
    """Requests to serve, all of the same lengths, and the times to serve them in."""

    prompt: int = 512
    """Tokens of a request's prompt."""
    new: int = 128
    """Tokens of its answer."""
    weights: str = AUTO_WEIGHTS
    """Scheme of the layers' matrices (``maxlm quantize``), such as ``int4-g32`` or
    ``w8a8``; auto: as the run has them."""
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
    config = quantize_config(config, options.weights)
    return make_served_workload(config, machine.topology.platform, options.prompt)


def quantize_config(config: RunConfig, scheme_name: str) -> RunConfig:
    """Returns a run's config with its matrices quantized by a scheme. Raises
    MaxlmError: no such scheme, a run that is quantized already."""
    if scheme_name == AUTO_WEIGHTS:
        return config
    if config.quantization is not None:
        message = f"the run is quantized already ({config.quantization.format})"
        raise MaxlmError(message, where="--weights", fix="leave it out")
    specs = param_specs(config.model.build(rules=AxisRules(), dtype=jnp.float32))
    chosen = choose_formats(specs, parse_scheme(scheme_name), targets=None)
    return config.model_copy(update={"quantization": chosen.config})


def make_served_workload(
    config: RunConfig, platform: str, prompt_tokens: int
) -> RunWorkload:
    """Returns the costs of a run's model without its task, on rows of as many tokens as
    a prompt has."""
    run = RunConfig(
        name=config.name,
        compute_dtype=config.compute_dtype,
        model=config.model,
        adapter=config.adapter,
        quantization=config.quantization,
        sharding=config.sharding,
        parallel=config.parallel,
        data=DataConfig(seq_len=prompt_tokens, batch_size=1),
    )
    return RunWorkload(run, resolve_compute_dtype(run.compute_dtype, platform))


def resolve_replica_mesh(
    work: RunWorkload, machine: Machine, tensor: int
) -> dict[str, int]:
    """Returns the mesh of replicas of ``tensor`` devices. Raises MaxlmError: the machine
    cannot be laid out so."""
    devices = machine.topology.devices
    mesh = MeshConfig(data=devices // tensor, fsdp=1, tensor=tensor)
    return machine.resolve_mesh_sizes(work.config.model_copy(update={"mesh": mesh}))


class ServedModel:
    """A model, as :func:`read_workload` returns it, on a mesh: replicas, which are the
    shards of the batch, of one device or several. Bytes, FLOPs and seconds are of one
    device; rows are the sequences of one replica, a number or an array of them. Raises
    MaxlmError: it does not divide.

    Args:
        sizes: mesh axis → devices.
        cache: format or settings of the caches.
        machine: where; None: bytes alone, as a TPU has them.
        shares_params: whether steps read the parameters of a trainer as they are
            stored, and gather and cast a layer's when its turn comes; otherwise they
            have a copy in the compute dtype and layout.
        page_size: tokens of a page of the caches; None: the format's own.
    """

    def __init__(
        self,
        work: RunWorkload,
        machine: Machine | None,
        options: ServingOptions,
        sizes: Mapping[str, int],
        cache: CacheFormat | CacheConfig,
        *,
        shares_params: bool = False,
        page_size: int | None = None,
    ):
        run = work.config
        platform = "tpu" if machine is None else machine.topology.platform
        self.machine = machine
        self.platform = platform
        self.options = options
        self.cache: CacheFormat | CacheConfig = cache
        self.shares_params = shares_params
        self.sizes = sizes
        dtype = resolve_compute_dtype(run.compute_dtype, platform)
        placed = place_run(run, sizes, dtype, for_training=False)
        assert isinstance(placed.model, Decoder)
        self.model = placed.model
        self.trainer_storage = placed.storage
        """Layout of a trainer's parameters on this mesh."""
        # As the model lies on this mesh; nothing is trained.
        rules = {
            "storage": placed.storage if shares_params else placed.compute,
            "compute": placed.compute,
            "gradients": None,
            "optimizer": None,
        }
        sharding = run.sharding.model_copy(update=rules)
        self.work = copy(work)
        self.work.config = run.model_copy(update={"sharding": sharding})
        self.split = MeshPartitioning(self.work.config, sizes)
        self.replicas = prod(sizes[axis] for axis in placed.compute.batch)
        """Shards of the batch: each has its own share of the sequences."""

        mtp = placed.model.config.mtp
        # More guesses than modules are made by the last one.
        num_modules = 0 if mtp is None else min(mtp.num_modules, options.mtp_drafts)
        self.head_ways = prod(sizes[axis] for axis in placed.compute.heads)
        self.layer_caches = count_layer_caches(
            placed.model, cache, platform, self.head_ways, num_modules, page_size
        )
        """Caches of layers, and the number of layers that have each."""
        self.unsplit_caches = count_layer_caches(
            placed.model,
            cache,
            platform,
            num_mtp_modules=num_modules,
            page_size=page_size,
        )
        """Those of a replica of one device, where no head is twice."""

    @property
    def _machine(self) -> Machine:
        assert self.machine is not None, "times need a machine"
        return self.machine

    @cached_property
    def matmul_dtype(self) -> str:
        """Key in ``Chip.peak_flops`` of the products."""
        chip = self._machine.chip
        quantization = self.work.config.quantization
        activations = None if quantization is None else quantization.activations
        # Products of codes, where activations are rounded too.
        if activations is not None and activations in chip.peak_flops:
            return activations
        return select_matmul_dtype(chip, self.work.dtype_bytes)

    @cached_property
    def read_bandwidth(self) -> float:
        """B/s in reading weights and caches."""
        chip = self._machine.chip
        bandwidth = chip.read_bandwidth or chip.memory_bandwidth
        return bandwidth * DECODE_EFFICIENCY[chip.family].reading

    @cached_property
    def weight_bytes(self) -> dict[str, float]:
        """Bytes of each parameter in use."""
        itemsize_of_role = {
            "matrix": self.work.dtype_bytes,
            "table": self.work.dtype_bytes,
            "vector": FP32,
        }
        sizes = {}
        for name, spec in self.work.specs.items():
            # Codes and scales stay in their own dtypes.
            if spec.role == "packed":
                size = spec.nbytes
            else:
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
            is_looked_up = any(
                name == table or name.startswith(f"{table}.") for table in looked_up
            )
            if is_looked_up or name.startswith(FRONTEND_PREFIX):
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
        # Of each sequence: its logits in fp32, with what sampling makes of them, and
        # its caches.
        logits_bytes = self.count_logits_bytes()
        cache_bytes = self.count_cache_bytes(self.options.length)
        sequence_bytes = logits_bytes + cache_bytes

        chunk_tokens = min(self.options.prompt, PREFILL_CHUNK)
        return {
            "weights": sum(self.weight_bytes.values()),
            "working": self.count_chunk_bytes(chunk_tokens),
            "sequences": rows * sequence_bytes,
        }

    def count_logits_bytes(self) -> float:
        """Counts the bytes of a sequence's logits in fp32, with what sampling makes of
        them."""
        vocab_ways = float(self._count_shards(("vocab",)))
        return 2 * FP32 * self.work.config.model.vocab_size / vocab_ways

    def count_chunk_bytes(self, tokens: int) -> float:
        """Counts the bytes of a chunk of prompts in a layer."""
        return tokens * float(count_forward_token_bytes(self.work, self.split))

    def count_max_rows(self) -> int:
        """Counts the sequences of a replica that fit."""
        parts = self.count_memory_bytes(1)
        usable_bytes = SAFE_FILL_RATIO * self._machine.chip.memory_bytes
        free_bytes = usable_bytes - parts["weights"] - parts["working"]
        return max(int(free_bytes / parts["sequences"]), 0)

    def _plan_pass(self, tokens: int, rows: Number) -> tuple[StepShape, StepTime]:
        """Plans the forward pass of so many tokens of so many rows on each replica,
        which gathers the logits of each row's last token."""
        config = self.work.config
        data = config.data.model_copy(update={"batch_size": rows * self.replicas})
        work = copy(self.work)
        work.config = config.model_copy(update={"data": data})
        work.tokens_per_row = TokensPerRow(tokens, tokens)
        shape = StepShape(
            work,
            self.sizes,
            micro_batches=1,
            remat="none",
            topology=self._machine.topology,
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
            shape, self._machine, (*collectives, logits), dtype=self.matmul_dtype
        )
        return shape, time

    def _estimate_cast_seconds(self) -> float:
        """Estimates the time to read shared parameters as they are stored, and to write
        them cast and then gathered; 0: a step reads a copy that is so already."""
        if not self.shares_params:
            return 0.0
        moved = 0.0
        for name, spec in self.work.specs.items():
            if name.startswith(FRONTEND_PREFIX):
                continue
            stored = spec.nbytes / self.split.num_shards(self.split.storage, spec.axes)
            cast = stored / jnp.dtype(spec.dtype).itemsize * self.work.dtype_bytes
            moved += stored + cast
            if self.split.num_shards(self.split.compute, spec.axes) < (
                self.split.num_shards(self.split.storage, spec.axes)
            ):
                moved += self.weight_bytes[name]
        chip = self._machine.chip
        bandwidth = chip.memory_bandwidth * EFFICIENCY[chip.family].memory
        return moved / bandwidth

    def estimate_prompts_seconds(
        self, prompts: Number, rows: Number, chunk_tokens: int = PREFILL_CHUNK
    ) -> Number:
        """Estimates the passes over so many prompts of each replica: several at once if
        they are short, of ``rows`` and ``chunk_tokens`` at most."""
        at_once = np.clip(chunk_tokens // self.options.prompt, 1, rows)
        return prompts / at_once * self.estimate_prefill_seconds(at_once)

    def estimate_copy_seconds(self) -> float:
        """Estimates the time to make the copy of a trainer's parameters that steps
        read: cast, gathered and written; 0: they are shared."""
        if self.shares_params:
            return 0.0
        machine = self._machine
        efficiency = EFFICIENCY[machine.chip.family]
        bandwidth = machine.chip.memory_bandwidth * efficiency.memory
        seconds = 0.0
        for name, spec in self.work.specs.items():
            stored_axes = {
                axis
                for logical in spec.axes
                for axis in self.trainer_storage.mesh_axes(logical)
            }
            axes_in_use = {
                axis
                for logical in spec.axes
                for axis in self.split.compute.mesh_axes(logical)
            }
            gathered_axes = tuple(
                axis for axis in self.sizes if axis in stored_axes - axes_in_use
            )
            size = self.weight_bytes[name]
            gather = machine.estimate_seconds(
                "all-gather", gathered_axes, size, self.split
            )
            stored = spec.nbytes / self.split.num_shards(
                self.trainer_storage, spec.axes
            )
            seconds += float(gather) / efficiency.network + (stored + size) / bandwidth
        return seconds

    def estimate_prefill_seconds(self, prompts: Number = 1) -> Number:
        """Estimates a forward pass over so many prompts of each replica, to their first
        tokens."""
        chip = self._machine.chip
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
        reading = read_bytes / self.read_bandwidth + self._estimate_cast_seconds()
        busy = np.maximum(reading, computing)
        hidden = np.minimum(time.communication * efficiency.hidden, busy)
        exposed = time.communication - hidden
        overhead = DECODE_EFFICIENCY[chip.family].step_seconds
        return busy + exposed + overhead

    def estimate_decode_seconds(self, rows: Number) -> dict[str, Number]:
        """Estimates the seconds of a step that adds a token to every row: its parts,
        and in all."""
        chip = self._machine.chip
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
        weight_reading = weight_reading + self._estimate_cast_seconds()
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
