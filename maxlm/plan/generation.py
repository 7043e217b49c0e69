"""What a task's generation costs on the mesh that trains: memory while the engine runs,
and the time of a rollout.

All sequences of a shard of the batch take turns in the engine's rows. With S sequences
that get m tokens on average and M at most, in R rows, the last one ends after about

    steps = S · m / R + (M − m)

steps (list scheduling: the work spread over all rows, and the tail of the longest
sequence), in which S · m / steps rows run on average. A step's time is nearly linear in
these (``plan/served_model.py``), so that the mean tells the sum. Prompts are computed
beside, each once for the sequences that share it. Not counted: time that rewards and an
environment take, and that of the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp

from maxlm.config import MaxlmError
from maxlm.inference.engine_config import EngineConfig
from maxlm.models.caches.layout import list_paged_windows
from maxlm.plan.forward import count_head_bytes, count_layer_weight_bytes
from maxlm.plan.machine import Machine
from maxlm.plan.served_model import (
    ServedModel,
    ServingOptions,
    make_served_workload,
)
from maxlm.plan.workload import Number, RunWorkload
from maxlm.run.config import RunConfig
from maxlm.sharding import mesh_sizes
from maxlm.sharding.mesh import fold_for_generation
from maxlm.tasks.extra_work import GenerationWork


@dataclass(frozen=True)
class GenerationCost:
    """A rollout on one mesh, or on each of many: bytes and seconds of one device."""

    memory: dict[str, Number]
    """Bytes while the engine runs, beside what is stored between steps, by part."""
    cache_bytes: Number
    """Bytes of the engine's caches, which are among these."""
    seconds: dict[str, Number]
    """Seconds of a rollout, by part; empty: no machine was named."""


@dataclass(frozen=True)
class ExpectedLengths:
    """Lengths that a user expects of a rollout's sequences on average, where the task
    does not know them; None: as the task says."""

    prompt: float | None = None
    """Tokens of a prompt."""
    new: float | None = None
    """Tokens of an answer."""

    def set_in(self, work: GenerationWork) -> GenerationWork:
        """Returns a task's work with these lengths. Raises MaxlmError: they are longer
        than the task allows."""
        for option, expected, longest in (
            ("--prompt", self.prompt, work.max_prompt_tokens),
            ("--new", self.new, work.max_new_tokens),
        ):
            if expected is not None and expected > longest:
                message = (
                    f"{expected:,} tokens on average, and the task has {longest:,} "
                )
                message += "at most"
                raise MaxlmError(message, where=option, fix="lower it")
        return replace(
            work,
            mean_prompt_tokens=self.prompt or work.mean_prompt_tokens,
            mean_new_tokens=self.new or work.mean_new_tokens,
        )


class GenerationPlanner:
    """Plans a task's generation on one mesh after another.

    Args:
        machine: where; None: bytes alone.
        lengths: that are expected of sequences.

    Raises:
        MaxlmError: the model is no decoder, or sequences are longer than its context.
    """

    def __init__(
        self,
        config: RunConfig,
        machine: Machine | None,
        lengths: ExpectedLengths = ExpectedLengths(),
    ):
        work = config.task.generation(config.data.seq_len, config.data.batch_size)
        self.work: GenerationWork | None = work
        """What is generated; None: nothing."""
        self._machine = machine
        self._costs: dict[tuple[int, ...], GenerationCost | MaxlmError] = {}
        self._model_work: RunWorkload | None = None
        if work is None:
            return
        work = lengths.set_in(work)
        self.work = work
        kind = config.model.transformer_type
        if kind != "decoder":
            message = f"task.kind={config.task.kind} generates, which is planned for "
            message += f"decoders, not an {kind}"
            fix = "name a decoder's config"
            raise MaxlmError(message, where="model.architecture", fix=fix)
        limit = config.model.max_seq_len
        # The last token of a sequence is never read.
        if work.max_length > limit + 1:
            sizes = f"{work.max_prompt_tokens:,} + {work.max_new_tokens:,} tokens"
            message = f"sequences of {sizes} exceed the model's {limit:,}"
            fix = "make them shorter, or raise model.max_seq_len"
            raise MaxlmError(message, where=f"task.kind={config.task.kind}", fix=fix)
        platform = "tpu" if machine is None else machine.topology.platform
        prompt_tokens = max(1, round(work.expected_prompt_tokens))
        self._model_work = make_served_workload(config, platform, prompt_tokens)

    def plan(self, sizes: Mapping[str, int]) -> GenerationCost:
        """Plans a rollout on a run's mesh. Raises MaxlmError: it cannot generate."""
        work = self.work
        assert work is not None
        generation_sizes = fold_for_generation(sizes)
        if work.mesh is not None:
            generation_sizes = mesh_sizes(work.mesh, prod(sizes.values()))
        if work.shares_params and generation_sizes != dict(sizes):
            message = "the parameters lie on another mesh than the engine's"
            fix = "set shares_params=false: the engine then has a copy of its own"
            raise MaxlmError(message, where="shares_params", fix=fix)
        # Many meshes of a search generate on the same one.
        key = tuple(generation_sizes.values())
        cost = self._costs.get(key)
        if cost is None:
            try:
                cost = self._plan(work, generation_sizes)
            except MaxlmError as error:
                cost = error
            self._costs[key] = cost
        if isinstance(cost, MaxlmError):
            raise cost
        return cost

    def _plan(self, work: GenerationWork, sizes: Mapping[str, int]) -> GenerationCost:
        model_work = self._model_work
        assert model_work is not None
        options = ServingOptions(
            prompt=model_work.config.data.seq_len,
            new=max(1, round(work.expected_new_tokens)),
        )
        served = ServedModel(
            model_work,
            self._machine,
            options,
            sizes,
            work.cache,
            shares_params=work.shares_params,
            page_size=work.page_size,
        )
        share = -(-work.num_sequences // served.replicas)
        rows = min(work.max_sequences or share, share)
        cache_bytes = _count_cache_bytes(served, work, work.max_sequences or share)
        memory: dict[str, Number] = {
            "parameters as the engine reads them": _count_param_bytes(served),
            "caches": cache_bytes,
            "logits": rows * served.count_logits_bytes(),
            "a chunk of prompts": served.count_chunk_bytes(work.prefill_tokens),
        }
        seconds: dict[str, Number] = {}
        if self._machine is not None:
            seconds = _estimate_seconds(served, work, share, rows)
        return GenerationCost(memory, cache_bytes, seconds)


def _count_param_bytes(served: ServedModel) -> float:
    """Counts what steps read beside the parameters that are stored: a copy of them, or
    those of one layer and the head, gathered."""
    if not served.shares_params:
        return sum(served.weight_bytes.values())
    layer = count_layer_weight_bytes(served.work, served.split)
    return float(layer + count_head_bytes(served.work, served.split))


def _count_cache_bytes(
    served: ServedModel, work: GenerationWork, max_sequences: int
) -> float:
    """Counts the engine's caches, as it allocates them at once."""
    # Plans of other runs need no engine, which takes a while to import.
    from maxlm.inference.engine import make_cache_layout

    config = EngineConfig(
        max_sequences=max_sequences,
        max_length=work.room_tokens or work.max_length,
        num_pages=work.num_pages,
        page_size=work.page_size,
        prefill_tokens=work.prefill_tokens,
        cache=work.cache,
    )
    windows = list_paged_windows(served.model, work.cache)
    layout = make_cache_layout(config, windows, served.replicas, served.platform, 0)
    layout = replace(layout, head_ways=served.head_ways)
    size = 0.0
    for array in jax.tree.leaves(served.model.cache_specs(layout)):
        itemsize = jnp.dtype(array.dtype or served.model.dtype).itemsize
        num_shards = served.split.num_shards(served.split.compute, array.axes)
        size += prod(array.shape) * itemsize / float(num_shards)
    return size


def _estimate_seconds(
    served: ServedModel, work: GenerationWork, share: int, rows: int
) -> dict[str, Number]:
    """Estimates the seconds of a rollout's parts.

    Args:
        share: sequences of a shard of the batch.
        rows: of them that run together.
    """
    new_tokens = work.expected_new_tokens
    steps = share * new_tokens / rows + work.max_new_tokens - new_tokens
    mean_rows = share * new_tokens / steps
    decode = served.estimate_decode_seconds(mean_rows)
    prompts = max(1.0, share / work.sequences_per_prompt)
    prefill = served.estimate_prompts_seconds(prompts, prompts, work.prefill_tokens)
    return {
        "engine's parameters": served.estimate_copy_seconds(),
        "prompts": float(prefill),
        "new tokens": steps * float(decode["total"]),
    }
