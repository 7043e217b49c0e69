"""The engine: continues many prompts together, each as if it were alone.

A step is one dispatch (:mod:`maxlm.inference.step`): sequences that decode, and chunks of prompts.
The scheduler says who takes part, and keeps the pages of the caches; the engine sends its plan to
the devices, and turns the tokens that come back into outputs. All sizes are from a short list, so
that nothing compiles after :meth:`Engine.warm_up`.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.cache_updates import (
    MAX_PAGE_COPIES,
    allocate_state,
    copy_pages,
    copy_rows,
    encode_row,
)
from maxlm.inference.engine_inputs import InputBuilder
from maxlm.inference.grammar import GrammarCompiler, GrammarMatcher
from maxlm.inference.params import prepare_params
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob
from maxlm.inference.sampling import MAX_STOP_IDS
from maxlm.inference.scheduler import Scheduler
from maxlm.inference.scheduler_config import SchedulerConfig, count_pages
from maxlm.inference.sequences import ScheduledStep
from maxlm.inference.sequences import Sequence as RunningSequence
from maxlm.inference.speculation import (
    DraftModel,
    PromptLookupConfig,
    SpeculationConfig,
    check_speculation,
    look_up_prompt,
    prepare_draft_model,
)
from maxlm.inference.step import StepOutputs, StepSizes, run_step
from maxlm.inference.text import TextStream
from maxlm.models.architectures import Encoder, EncoderDecoder, Model
from maxlm.models.caches import (
    QUANTIZED_PAGE_SIZE,
    CacheConfig,
    CacheLayout,
    PagedCacheConfig,
    choose_feature_multiple,
    has_row_caches,
    has_unit,
    list_paged_windows,
)
from maxlm.models.params import Params


class EngineConfig(SchedulerConfig):
    """Settings of the engine."""

    dispatch_seconds: float = Field(default=0.05, gt=0)
    """Time that a dispatch of several steps may take, about: a request that comes meanwhile waits
    for its end."""
    speculation: SpeculationConfig | None = None
    """Guess several tokens a step; null: none."""
    cache: CacheConfig = PagedCacheConfig()
    """How keys and values are kept: all of them, in fewer bits, or a part. All but ``paged`` are
    lossy, share no prefixes, and depend a little on the chunks that a prompt is computed in."""

    @model_validator(mode="before")
    @classmethod
    def _set_page_size(cls, settings: Any) -> Any:
        """A page is a group with a scale of its own in int8 and int4: larger ones cost less."""
        cache = settings.get("cache")
        kind = cache.get("kind") if isinstance(cache, dict) else getattr(cache, "kind", None)
        if kind in ("int8", "int4"):
            return {"page_size": QUANTIZED_PAGE_SIZE, **settings}
        return settings


class EngineStats(NamedTuple):
    """Counts of what the engine holds, and has done since its start."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    """Pages that no sequence holds, those of prefixes that are kept included."""
    prompt_tokens_total: int
    cached_prompt_tokens_total: int
    """Tokens of prompts whose cache was there already."""
    generated_tokens_total: int
    preemptions_total: int
    steps_total: int
    drafted_tokens_total: int
    accepted_tokens_total: int
    """Guessed tokens that the model drew too."""
    compilations_total: int


@dataclass(eq=False)
class _Output:
    """A sequence's output so far."""

    text: TextStream | None
    prompt_logprobs: list[TokenLogprob] | None = None
    started: bool = False
    branching: bool = False


class Engine:
    """Continues prompts on the mesh that the parameters lie on.

    Args:
        model: a decoder, or an encoder with one.
        params: of the model, in any layout.
        tokenizer: for texts, stop strings and grammars; None: tokens alone.
        vocab_size: ids that may be drawn; default: the tokenizer's, else the model's.
        draft: the model that ``config.speculation`` names, on the same mesh.

    Raises:
        MaxlmError: a model that cannot continue text, a mesh that splits the sequence, or a draft
            model that cannot guess for this one.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        draft: DraftModel | None = None,
    ):
        _check_model(model)
        self.model: Any = model
        self.config, self.tokenizer = _limit_length(config, model), tokenizer
        self.mesh = jax.tree.leaves(params)[0].sharding.mesh
        self.vocab_size = vocab_size or (tokenizer or model.config).vocab_size
        self._params = prepare_params(model, params)
        self.num_shards = prod(self.mesh.shape[axis] for axis in model.rules.batch)
        windows = list_paged_windows(model, config.cache)
        pages = dict(zip(windows, count_pages(self.config, windows), strict=True))
        narrow = [count for window, count in pages.items() if window is not None]
        self._windows = windows
        self._layout = CacheLayout(
            self.num_shards,
            self.config.max_sequences,
            pages.get(None, max(narrow, default=0)),
            self.config.page_size,
            max(narrow, default=None),
            self.config.cache,
            choose_feature_multiple(self.mesh.devices.flat[0].platform),
        )
        specs = model.cache_specs(self._layout)
        self._has_row_arrays = has_unit(specs, "row")
        self.scheduler = self._make_scheduler()
        encodes = isinstance(model, EncoderDecoder)
        self._copies_rows = self._has_row_arrays or encodes
        speculation = self.config.speculation
        self._inputs = InputBuilder(
            self.config,
            self.num_shards,
            model.config.vocab_size,
            num_drafts=speculation.num_drafts if speculation else 0,
            all_rows=has_row_caches(specs) or encodes,
        )
        sizes = self._layout, self.config.max_length
        with jax.set_mesh(self.mesh):
            self._state = allocate_state(model, *sizes)
            self._draft_state = allocate_state(draft.model, *sizes) if draft else None
        self._draft = None
        if speculation is not None:
            check_speculation(model, self._layout)
        if draft is not None:
            self._draft = prepare_draft_model(draft, model, self._layout)
        self._grammars: GrammarCompiler | None = None
        self._matchers: dict[RunningSequence, GrammarMatcher] = {}
        self._outputs: dict[RunningSequence, _Output] = {}
        self._ended: list[SequenceOutput] = []
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = self._steps = 0
        self._drafted = self._accepted = 0
        self._step_seconds = self.config.dispatch_seconds / self.config.decode_steps

    def add_request(self, request: GenerationRequest, *, branching: bool = False) -> None:
        """Takes a request; its outputs come from :meth:`step`.

        Args:
            branching: one token a step and no text, for :meth:`branch` to be called between.

        Raises:
            MaxlmError: it can never run here: too long, a token that the model does not have, a
                stop string without a tokenizer.
        """
        self._check_request(request)
        matcher = None
        if request.grammar is not None and self.tokenizer is not None:
            self._grammars = self._grammars or GrammarCompiler(self.tokenizer)
            matcher = self._grammars.compile(request.grammar)
        stops = set(request.stop_token_ids)
        if self.tokenizer is not None and not request.ignore_eos:
            stops |= set(self.tokenizer.stop_ids)
        if len(stops) > MAX_STOP_IDS:
            what = f"{len(stops)} tokens end the output; there is room for {MAX_STOP_IDS}"
            where = f"request {request.request_id}"
            raise MaxlmError(what, where=where, fix="name fewer in stop_token_ids")
        continued = self.continues_text(request.prompt_tokens)
        for sequence in self.scheduler.add(request):
            text = None
            sequence.needs_host |= branching
            if self.tokenizer is not None and not branching:
                text = TextStream(self.tokenizer, request.stop_strings, continued=continued)
            sequence.stop_ids = tuple(sorted(stops))
            if matcher is not None:
                self._matchers[sequence] = matcher.copy()
            self._outputs[sequence] = _Output(text, branching=branching)

    def branch(self, request_id: str, branches: Sequence[tuple[int, int]]) -> list[int]:
        """Replaces the sequences of a request by branches of them, between steps (beam search).

        Args:
            branches: index of the sequence that each goes on from, and the token in place of its
                last one; those that none goes on from end.

        Returns:
            The index of each branch's sequence.
        """
        sequences = self.scheduler.branch(request_id, branches)
        made = {each: _Output(None, started=True, branching=True) for each in sequences}
        outputs = (made | self._outputs).items()
        self._outputs = {each: own for each, own in outputs if each.state != "finished"}
        return [sequence.index for sequence in sequences]

    def abort(self, request_id: str) -> None:
        """Ends a request, and frees what it holds; unknown ids are ignored. Its sequences' last
        outputs, with ``finish_reason`` "abort", come from the next step."""
        for sequence in self.scheduler.abort(request_id):
            self._forget(sequence)
            output = SequenceOutput(request_id, sequence.index, [], finish_reason="abort")
            self._ended.append(output)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return bool(self._ended or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[SequenceOutput]:
        """Runs one dispatch; returns what it added to sequences, nothing where none was waiting."""
        outputs, self._ended = self._ended, []
        drafts = self._plan_drafts()
        most = max(1, int(self.config.dispatch_seconds / self._step_seconds))
        plan = self.scheduler.schedule(most)
        if plan is None:
            return outputs
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self._update_caches(plan)
            drafts = self._draw_drafts(plan, drafts)
            shape = self._inputs.choose_shape(plan, has_drafts=bool(drafts))
            result = self._run(plan, shape, drafts)
        result = jax.device_get(result)
        if not plan.prefill:
            # A step that compiles is no measure: estimates go up by degrees, and down at once.
            seconds = (time.perf_counter() - start) / plan.num_steps
            self._step_seconds = min(seconds, 2 * self._step_seconds)
        return outputs + self._collect(plan, shape, drafts, result)

    def run(self, requests: Iterable[GenerationRequest]) -> Iterator[SequenceOutput]:
        """Yields outputs of some requests as they come, until all have ended."""
        for request in requests:
            self.add_request(request)
        while self.has_work:
            yield from self.step()

    def warm_up(self) -> None:
        """Compiles every program that steps may need."""
        empty = ScheduledStep(num_steps=0)
        with jax.set_mesh(self.mesh):
            for shape in self._inputs.list_shapes():
                self._run(empty, shape, {})
            copies = self._inputs.stack_page_copies([], self._windows, self._layout)
            self._copy_pages(copies)
            if self._copies_rows:
                self._copy_rows([])

    @property
    def params(self) -> Params:
        """The model's parameters as steps read them (:func:`prepare_params`)."""
        return self._params

    def stats(self) -> EngineStats:
        """Returns counts for monitoring."""
        scheduler = self.scheduler
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            self.num_shards * sum(count - 1 for count in scheduler.num_pages),
            scheduler.count_available_pages(),
            self._prompt_tokens,
            self._cached_tokens,
            self._generated_tokens,
            scheduler.num_preemptions,
            self._steps,
            self._drafted,
            self._accepted,
            count_compilations(),
        )

    def _make_scheduler(self) -> Scheduler:
        start = getattr(self.model.config, "start_id", None)
        return Scheduler(
            self.config,
            self._windows,
            num_shards=self.num_shards,
            decoder_start_id=start if isinstance(self.model, EncoderDecoder) else None,
            has_row_state=self._has_row_arrays,
        )

    def _run(
        self, plan: ScheduledStep, shape: StepSizes, drafts: Mapping[RunningSequence, list[int]]
    ) -> StepOutputs:
        """Runs a step, and keeps the draft model's caches up to the model's."""
        tables = self.scheduler.page_tables
        inputs = self._inputs.build(plan, shape, tables, drafts, self._matchers)
        sizes = shape, self._layout, self._windows, self.vocab_size
        self._state, outputs = run_step(self.model, *sizes, self._params, self._state, inputs)
        self._steps += 1
        if self._draft is not None and not drafts:
            own = self._draft.params, self._draft_state
            self._draft_state, _ = run_step(self._draft.model, *sizes, *own, inputs)
        return outputs

    def _plan_drafts(self) -> dict[RunningSequence, list[int]]:
        """Says how many tokens are guessed for each sequence that decodes; these tokens, as far as
        they are known before pages are."""
        config, drafts = self.config.speculation, {}
        if config is None:
            return drafts
        for sequence in self.scheduler.running:
            most = min(config.num_drafts, sequence.num_tokens_left - 1)
            if sequence.num_to_compute != 1 or most < 1 or self._outputs[sequence].branching:
                continue
            draft = [0] * most
            if isinstance(config, PromptLookupConfig):
                draft = look_up_prompt(sequence.tokens, config)[:most]
            if draft:
                drafts[sequence], sequence.num_drafts = draft, len(draft)
        return drafts

    def _draw_drafts(
        self, plan: ScheduledStep, drafts: dict[RunningSequence, list[int]]
    ) -> dict[RunningSequence, list[int]]:
        """Returns the guessed tokens of a plan's rows, as many as these have pages for."""
        drafts = {
            row.sequence: drafts[row.sequence][: row.num_tokens - 1]
            for row in plan.decode
            if row.sequence in drafts and row.num_tokens > 1
        }
        if self._draft is None or not drafts:
            return drafts
        if plan.prefill:  # one program fewer; the draft model then only reads along
            plan.decode = [row._replace(num_tokens=1) for row in plan.decode]
            return {}
        # A step more than there are drafts, so that the last of them is in the cache as well.
        longest = max(row.num_tokens for row in plan.decode)
        alone = replace(plan, prefill=[], num_steps=longest)
        shape = self._inputs.choose_shape(alone, has_drafts=False)
        inputs = self._inputs.build(alone, shape, self.scheduler.page_tables, {}, {})
        sizes = shape, self._layout, self._windows, self.vocab_size
        own = self._draft.params, self._draft_state
        self._draft_state, result = run_step(self._draft.model, *sizes, *own, inputs)
        tokens = np.asarray(result.tokens)
        return {
            each: tokens[: len(draft), each.shard, each.row].tolist()
            for each, draft in drafts.items()
        }

    def _forget(self, sequence: RunningSequence) -> None:
        self._outputs.pop(sequence, None)
        self._matchers.pop(sequence, None)

    def _update_caches(self, plan: ScheduledStep) -> None:
        """Does what comes before a step: copies, and encoders."""
        D, R = self.num_shards, self.config.max_sequences
        for start in range(0, len(plan.page_copies), MAX_PAGE_COPIES):
            some = plan.page_copies[start : start + MAX_PAGE_COPIES]
            self._copy_pages(self._inputs.stack_page_copies(some, self._windows, self._layout))
        if plan.row_copies and self._copies_rows:
            self._copy_rows(plan.row_copies)
        sizes = self._layout, self.config.max_length
        for sequence in plan.encode:
            own = sequence.encoder_tokens
            tokens = np.zeros((D, round_up_to_bucket(len(own), self.config.max_length)), np.int32)
            lengths, rows = np.zeros(D, np.int32), np.full(D, R, np.int32)
            tokens[sequence.shard, : len(own)] = own
            lengths[sequence.shard], rows[sequence.shard] = len(own), sequence.row
            given = self._params, self._state, tokens, lengths, rows
            self._state = encode_row(self.model, *sizes, *given)

    def _copy_pages(self, copies: Any) -> None:
        self._state = copy_pages(self.model, self._layout, self._state, copies)
        if self._draft is not None:
            own = self._draft.model, self._layout, self._draft_state
            self._draft_state = copy_pages(*own, copies)

    def _copy_rows(self, copies: Sequence[tuple[int, int, int]]) -> None:
        shape = self.num_shards, self.config.max_sequences
        sources = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        for shard, source, destination in copies:
            sources[shard, destination] = source
        sizes = self._layout, self.config.max_length
        self._state = copy_rows(self.model, *sizes, self._state, sources)
        if self._draft is not None:
            own = self._draft.model, *sizes, self._draft_state
            self._draft_state = copy_rows(*own, sources)

    def _collect(
        self,
        plan: ScheduledStep,
        shape: StepSizes,
        drafts: Mapping[RunningSequence, list[int]],
        result: StepOutputs,
    ) -> list[SequenceOutput]:
        """Takes a step's tokens; returns each sequence's output."""
        decoded, prefilled, outputs = [], [], []
        for row in plan.decode:
            draft = drafts.get(row.sequence, [])
            tokens = self._inputs.read_row(result, shape, row, draft)
            self._drafted += len(draft)
            self._accepted += len(tokens) - 1 if draft else 0
            taken = self._take(row.sequence, tokens)
            decoded.append(taken.token_ids)
            outputs.append(taken)
        for place, chunk in enumerate(plan.prefill):
            if chunk.sequence.request.prompt_logprobs is not None:
                self._take_prompt(chunk, self._inputs.read_prompt(result, plan, place))
            if chunk.samples:
                taken = self._take(
                    chunk.sequence, [self._inputs.read_chunk(result, shape, plan, place)]
                )
                outputs.append(taken)
                prefilled.append(taken.token_ids[0])
            else:
                prefilled.append(None)
        sequences = [row.sequence for row in plan.decode]
        sequences += [chunk.sequence for chunk in plan.prefill if chunk.samples]
        self.scheduler.finish_step(plan, decoded, prefilled)
        for sequence, output in zip(sequences, outputs, strict=True):
            if output.finish_reason is not None:
                self.scheduler.finish(sequence)
                self._forget(sequence)
        return outputs

    def _take(self, sequence: RunningSequence, tokens: Sequence[TokenLogprob]) -> SequenceOutput:
        """Makes the output of a sequence's new tokens, up to the one that ends it."""
        request, own = sequence.request, self._outputs[sequence]
        taken = SequenceOutput(request.request_id, sequence.index, [])
        if not own.started:
            own.started = True
            taken.num_cached_tokens = sequence.num_cached_tokens
            if request.prompt_logprobs is not None:
                taken.prompt_logprobs = own.prompt_logprobs or []
            self._prompt_tokens += sequence.num_prompt_tokens
            self._cached_tokens += sequence.num_cached_tokens
        left, text = sequence.num_tokens_left, []
        for token in tokens:
            taken.token_ids.append(token.token_id)
            if request.top_logprobs is not None:
                taken.logprobs.append(token._replace(top=token.top[: request.top_logprobs]))
            if token.token_id in sequence.stop_ids:
                taken.finish_reason, taken.stop_match = "stop", token.token_id
                break
            if (matcher := self._matchers.get(sequence)) is not None:
                matcher.accept(token.token_id)
            if own.text is not None:
                piece, taken.stop_match = own.text.push(token.token_id)
                text.append(piece)
                if taken.stop_match is not None:
                    taken.finish_reason = "stop"
                    break
            if matcher is not None and matcher.is_finished:
                taken.finish_reason = "stop" if matcher.error is None else "abort"
                break
            if len(taken.token_ids) == left:
                taken.finish_reason = "length"
                break
        if taken.finish_reason and own.text is not None and not isinstance(taken.stop_match, str):
            piece, stop = own.text.flush()
            text.append(piece)
            if stop is not None:
                taken.finish_reason, taken.stop_match = "stop", stop
        taken.text = "".join(text)
        self._generated_tokens += len(taken.token_ids)
        return taken

    def _take_prompt(self, chunk: Any, tokens: Sequence[TokenLogprob]) -> None:
        own = self._outputs[chunk.sequence]
        if own.started:
            return  # computed again after a preemption
        if own.prompt_logprobs is None or chunk.start == 0:
            own.prompt_logprobs = []
        count = chunk.sequence.request.prompt_logprobs
        own.prompt_logprobs += [token._replace(top=token.top[:count]) for token in tokens]

    def continues_text(self, prompt_tokens: Sequence[int]) -> bool:
        """Whether an output's first word follows others, rather than opening a text."""
        if self.tokenizer is None or isinstance(self.model, EncoderDecoder):
            return False
        return not {*prompt_tokens} <= {self.tokenizer.bos_id, *self.tokenizer.prefix_ids}

    def _check_request(self, request: GenerationRequest) -> None:
        where, vocab = f"request {request.request_id}", self.model.config.vocab_size
        wrong = next((t for t in request.prompt_tokens if not 0 <= t < vocab), None)
        if wrong is not None:
            what = f"token {wrong} is outside the model's vocabulary of {vocab}"
            fix = "use the tokenizer that the model was trained with"
            raise MaxlmError(what, where=where, fix=fix)
        if self.tokenizer is None and (request.stop_strings or request.grammar):
            what = "stop strings and grammars need a tokenizer"
            raise MaxlmError(what, where=where, fix="give the engine one, or use stop_token_ids")


def _check_model(model: Model) -> None:
    if isinstance(model, Encoder):
        what = "an encoder names masked tokens; it does not continue text"
        raise MaxlmError(what, where="engine", fix="use a decoder, or an encoder with a decoder")
    if model.rules.seq:
        what = f"the sequence is split over {' and '.join(model.rules.seq)}"
        raise MaxlmError(what, where="mesh", fix="generate on a mesh with context=1")


def _limit_length(config: EngineConfig, model: Model) -> EngineConfig:
    """The config with no longer sequences than the model has positions for."""
    limit = model.config.position_limit
    if limit is None or config.max_length <= limit:
        return config
    return config.model_copy(update={"max_length": limit})


def round_up_to_bucket(n: int, limit: int) -> int:
    """Rounds n up to a power of two from 16 on, ``limit`` at most: few distinct sizes, hence few
    compilations."""
    return min(max(16, 1 << (n - 1).bit_length()), limit)


def count_compilations() -> int:
    """Returns how many programs steps have been compiled to, by all engines of this process."""
    programs: Any = run_step, copy_pages, copy_rows, encode_row
    return sum(program._cache_size() for program in programs)
