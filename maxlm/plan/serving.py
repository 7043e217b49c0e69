"""The cost of serving a model on a machine: what is held, how many sequences fit, and how long
tokens take.

A replica decodes its rows one token each a step, all of them for as long as a request lives. A step
takes, on a device, the longer of reading and of computing, for weights and for caches apart:

    weights        bytes of what the step multiplies by / (bandwidth · reading), or FLOPs / rate
    cache          bytes of all rows' pages at half of their new tokens, likewise
    traffic        element-wise maps and logits
    communication  the all-reduces and gathers of tensor parallelism; nothing hides them
    overhead       host and launches

Prompts are computed between the steps, as a training step's forward pass is (``plan/timing.py``):
each token of a request waits for its share of all rows' prompts. Peaks, links and the shares of
them that products and collectives reach are the plan's own; ``DECODE_EFFICIENCY`` stands for
published runs (``benchmarks/plan_serving.py``). Not counted: queues, uneven lengths, shared
prefixes, speculation, and the time of a tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.config import DataConfig
from maxlm.models.architectures import Decoder
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.placement import place_model
from maxlm.plan.communication import list_collectives
from maxlm.plan.network import PlannedCollective
from maxlm.plan.predict import FILL, Machine, make_step_shape, select_matmul_dtype
from maxlm.plan.serving_cache import (
    CacheFormat,
    LayerCache,
    count_layer_caches,
    count_sequence_bytes,
)
from maxlm.plan.shape import StepShape
from maxlm.plan.timing import (
    EFFICIENCY,
    count_device_flops,
    count_extra_forward_flops,
    estimate_elementwise_bytes,
    estimate_time,
)
from maxlm.plan.workload import FP32, MeshPartitioning, Number, RunWorkload, TokensPerRow
from maxlm.run import RunConfig
from maxlm.sharding import MeshConfig

WeightFormat = Literal["auto", "fp8", "int8"]
"""Matrices of layers; auto: the compute dtype. Tables, the head among them, are in that anyway."""
PREFILL_CHUNK = 2048
"""Most tokens of prompts that are computed at once."""


class DecodeEfficiency(NamedTuple):
    """Shares of a machine's rates that decoding reaches."""

    reading: float
    """Share of the memory's bandwidth in reading weights and caches."""
    step_seconds: float
    """Seconds of a step that no device's work accounts for."""


DECODE_EFFICIENCY = {
    "tpu": DecodeEfficiency(0.62, 2e-3),
    "nvidia": DecodeEfficiency(0.85, 1e-3),
    "cpu": DecodeEfficiency(0.7, 1e-3),
}


@dataclass(frozen=True)
class ServingOptions:
    """Requests to serve, all of the same lengths, and what is asked of serving them."""

    prompt: int = 512
    """Tokens of a request's prompt."""
    new: int = 128
    """Tokens of its answer."""
    weights: WeightFormat = "auto"
    batch: int | None = None
    """Sequences on all devices together; None: as many as fit and are in time, and at least one a
    replica."""
    ttft_ms: float | None = None
    """Longest time to a prompt's first token."""
    tpot_ms: float | None = None
    """Longest time between a sequence's tokens."""

    @property
    def length(self) -> int:
        return self.prompt + self.new


def read_workload(config: RunConfig, machine: Machine, options: ServingOptions) -> RunWorkload:
    """Reads the model of a run, but not its task.

    Raises:
        MaxlmError: it is no decoder, or requests are longer than its context.
    """
    kind, limit = config.model.architecture, config.model.max_seq_len
    if kind != "decoder":
        what, fix = f"serving is planned for decoders, not an {kind}", "name a decoder's config"
        raise MaxlmError(what, where="model.architecture", fix=fix)
    if options.length > limit:
        what = f"{options.prompt:,} + {options.new:,} tokens exceed the context of {limit:,}"
        fix = "make them shorter, or raise model.max_seq_len"
        raise MaxlmError(what, where="--prompt, --new", fix=fix)
    kept = ("name", "compute_dtype", "model", "adapter", "sharding", "parallel")
    data = DataConfig(seq_len=options.prompt, batch_size=1)
    run = RunConfig(**{key: getattr(config, key) for key in kept}, data=data)
    dtype = resolve_compute_dtype(run.compute_dtype, machine.topology.platform)
    return RunWorkload.from_config(run, dtype)


def place_served_model(
    work: RunWorkload,
    machine: Machine,
    options: ServingOptions,
    tensor: int,
    cache: CacheFormat = "auto",
) -> "ServedModel":
    """Splits what :func:`read_workload` returns into replicas of ``tensor`` devices.

    Raises:
        MaxlmError: it does not divide, or the machine cannot be laid out so.
    """
    mesh = MeshConfig(data=machine.topology.devices // tensor, fsdp=1, tensor=tensor)
    run = work.config.model_copy(update={"mesh": mesh})
    sizes = machine.mesh(run)
    dtype = resolve_compute_dtype(run.compute_dtype, machine.topology.platform)
    how = (run.model, run.sharding, run.parallel, sizes, dtype)
    placed = place_model(*how, training=None, adapter=run.adapter)
    assert isinstance(placed.model, Decoder)
    sharding = run.sharding.model_copy(update={"compute": placed.compute})
    work = replace(work, config=run.model_copy(update={"sharding": sharding}))
    layers = count_layer_caches(placed.model, cache, machine.topology.platform)
    return ServedModel(work, machine, options, sizes, cache, layers)


@dataclass(frozen=True)
class ServedModel:
    """A model on one split. Bytes, FLOPs and seconds are of one device; rows are the sequences of
    one replica, a number or an array of them."""

    work: RunWorkload
    machine: Machine
    options: ServingOptions
    sizes: Mapping[str, int]
    cache: CacheFormat
    layer_caches: Mapping[LayerCache, int]
    """Caches of layers, and the number of layers that have each."""

    @property
    def split(self) -> MeshPartitioning:
        return MeshPartitioning(self.work.config, self.sizes)

    @property
    def matmul_dtype(self) -> str:
        chip, weights = self.machine.chip, self.options.weights
        has_products = weights in chip.peak_flops  # of this dtype
        return weights if has_products else select_matmul_dtype(chip, self.work.dtype_bytes)

    @property
    def read_bandwidth(self) -> float:
        """B/s in reading weights and caches."""
        chip = self.machine.chip
        return chip.memory_bandwidth * DECODE_EFFICIENCY[chip.family].reading

    @cached_property
    def weight_bytes(self) -> dict[str, float]:
        """Bytes of each parameter in use."""
        cast = {"matrix": self.work.dtype_bytes, "table": self.work.dtype_bytes}
        if self.options.weights != "auto":
            cast["matrix"] = 1
        return {
            name: float(spec.size * cast.get(spec.role, FP32) / self._count_shards(spec.axes))
            for name, spec in self.work.specs.items()
        }

    def count_read_weight_bytes(self, rows: Number) -> Number:
        """Counts what a step of so many rows reads: all but tables of which it looks up rows, and
        but experts that none is sent to, as if each were as likely (Mixtral, arXiv 2401.04088)."""
        work, experts, met = self.work, self.work.experts, 1.0
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
        """Counts the bytes of so many rows at their full length, by what they are for."""
        model, vocab = self.work.config.model, self._count_shards(("vocab",))
        # In fp32, with what sampling makes of them.
        logits = 2 * FP32 * model.vocab_size / float(vocab)
        each = logits + self.count_cache_bytes(self.options.length)
        # A chunk of a prompt in a layer: the residual stream and its norms, and all that the
        # layer's matrices write.
        within = max(self.split.local_non_residual_width(g) for g in self.work.matmul_layer_counts)
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

    def _plan_pass(
        self, tokens: int, rows: Number
    ) -> tuple[StepShape, tuple[PlannedCollective, ...]]:
        """Makes the forward pass of so many tokens of so many rows on each replica, which gathers
        the logits of each row's last token."""
        config = self.work.config
        data = config.data.model_copy(update={"batch_size": rows * self.sizes["data"]})
        config = config.model_copy(update={"data": data})
        work = replace(self.work, config=config, tokens_per_row=TokensPerRow(tokens, tokens))
        shape = make_step_shape(work, self.sizes, 1, "none", self.machine)
        sends, size = list_collectives(shape), rows * config.model.vocab_size * FP32
        axes = self.split.compute.vocab
        logits = PlannedCollective("logits", "all-gather", axes, size, 1.0, "forward")
        return shape, (*(c for c in sends if c.phase == "forward"), logits)

    def estimate_prefill_seconds(self, prompts: Number = 1) -> Number:
        """Estimates a forward pass over so many prompts of each replica, to their first tokens."""
        chip, own = self.machine.chip, EFFICIENCY[self.machine.chip.family]
        length, dtype = self.options.prompt, self.matmul_dtype
        shape, sends = self._plan_pass(length, prompts)
        time = estimate_time(shape, self.machine, sends, dtype=dtype)
        # Logits are computed of each prompt's last token alone.
        flops = count_device_flops(shape).loss / (chip.peak_flops[dtype] * own.matmul)
        logits = estimate_elementwise_bytes(shape).loss / (chip.memory_bandwidth * own.memory)
        busy = time.forward - (1 - 1 / length) * (flops + logits)
        read = self.count_read_weight_bytes(prompts * length) / self.read_bandwidth
        busy = np.maximum(busy, read)
        exposed = time.communication - np.minimum(time.communication * own.hidden, busy)
        return busy + exposed + DECODE_EFFICIENCY[chip.family].step_seconds

    def estimate_prefill_share_seconds(self, rows: Number) -> Number:
        """Estimates a token's share of the passes in which the prompts of all rows are computed,
        several at once where they are short."""
        together = np.clip(PREFILL_CHUNK // self.options.prompt, 1, rows)
        return rows / together / self.options.new * self.estimate_prefill_seconds(together)

    def estimate_decode_seconds(self, rows: Number) -> dict[str, Number]:
        """Estimates the seconds of a step that adds a token to every row: its parts, and in all."""
        chip, own = self.machine.chip, EFFICIENCY[self.machine.chip.family]
        dtype, (shape, sends) = self.matmul_dtype, self._plan_pass(1, rows)
        flops, moved = count_device_flops(shape), estimate_elementwise_bytes(shape)
        context = self.options.prompt + -(-self.options.new // 2)
        read = self.count_read_weight_bytes(rows) / self.read_bandwidth
        cached = rows * self.count_cache_bytes(context) / self.read_bandwidth
        attended = rows * self._count_attention_flops(context)
        attention_dtype = "bf16" if dtype in ("fp8", "int8") else dtype
        products = (flops.forward + flops.loss) / (chip.peak_flops[dtype] * own.matmul)
        traffic = (moved.forward + moved.loss) / (chip.memory_bandwidth * own.memory)
        parts = {
            "weights": np.maximum(read, products),
            "cache": np.maximum(cached, attended / (chip.peak_flops[attention_dtype] * own.matmul)),
            "traffic": traffic + count_extra_forward_flops(shape) / chip.vector_flops,
            "communication": estimate_time(shape, self.machine, sends, dtype=dtype).communication,
            "overhead": DECODE_EFFICIENCY[chip.family].step_seconds,
        }
        return {**parts, "total": sum(parts.values())}

    def _count_attention_flops(self, context: int) -> float:
        """Counts one row's FLOPs of attention over its cache. Latent attention multiplies by the
        vectors that it keeps twice, as keys and as values (arXiv 2405.04434, section 2.1.2)."""
        heads, flops = {stack.name: stack.heads() for stack in self.work.stacks}, 0.0
        for layer, num_layers in self.layer_caches.items():
            if (own := heads[layer.stack]) is not None:
                width = own.head_dim + own.value_dim
                if layer.specs.value is None:  # it is a part of the key
                    vector = jax.tree.leaves(layer.specs.key)[0].shape[-1]
                    width = 2 * vector - own.shared_key_dim
                tokens = min(context, layer.window or context)
                flops += 2 * num_layers * own.num_heads * width * tokens
        return flops / float(self._count_shards(("heads",)))
