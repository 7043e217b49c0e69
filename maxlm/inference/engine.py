"""The engine: continues many prompts together, each as if it were alone.

A step is one dispatch (:mod:`maxlm.inference.step`): sequences that decode, and chunks
of prompts. The scheduler says who takes part, and keeps the pages of the caches; the
engine sends its plan to the devices, and turns the tokens that come back into outputs.
All sizes are from a short list, so that nothing compiles after :meth:`Engine.warm_up`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.adapter_slots import AdapterSlots, LoraWeights
from maxlm.inference.background_compiler import BackgroundCompiler
from maxlm.inference.banned_sequences import (
    BannedSequencesMatcher,
    CombinedMatcher,
    TokenMatcher,
)
from maxlm.inference.cpu import choose_decode_kernels
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.engine_inputs import InputBuilder
from maxlm.inference.generative_model import (
    GenerativeModel,
    check_batch_invariant,
    require_generative,
)
from maxlm.inference.grammar import GrammarCompiler
from maxlm.inference.model_runner import (
    MAX_PAGE_COPIES,
    ModelRunner,
    count_compilations,
    describe_arrays,
)
from maxlm.inference.outputs import OutputBuilder
from maxlm.inference.prompt_vectors import ChunkVectors, PromptEncoder
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.inference.sampling import MAX_STOP_IDS
from maxlm.inference.scheduler import Scheduler
from maxlm.inference.sequences import RunningSequence, ScheduledStep
from maxlm.inference.speculation import (
    DraftModel,
    MtpDraftsConfig,
    PromptLookupConfig,
    check_speculation,
    count_drafting_modules,
    look_up_prompt,
)
from maxlm.inference.step_arrays import (
    EngineSpec,
    StepInputs,
    StepOutputs,
    StepSizes,
)
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.routes import list_expert_layers
from maxlm.models.caches.layout import (
    CacheLayout,
    choose_feature_multiple,
    has_row_caches,
    has_unit,
    list_paged_windows,
)
from maxlm.models.params import Params
from maxlm.parallel.batch_invariance import BATCH_INVARIANT_KERNELS
from maxlm.runtime.progress import Progress, ignore_progress


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
    """Dispatches, the empty ones of :meth:`Engine.warm_up` included."""
    drafted_tokens_total: int
    accepted_tokens_total: int
    """Guessed tokens that the model drew too."""
    compilations_total: int


class Engine:
    """Continues prompts on the mesh that the parameters lie on.

    Args:
        model: a decoder, or an encoder with one.
        params: of the model, in any layout.
        tokenizer: for texts, stop strings and grammars; None: tokens alone.
        vocab_size: ids that may be drawn; default: the tokenizer's, else the model's.
        draft: the model that ``config.speculation`` names, on the same mesh.
        mesh: to generate on; default: that of the parameters.

    Attributes:
        config: as given, with ``max_length`` cut to the positions that the model has.

    Raises:
        MaxlmError: a model that cannot continue text, a mesh that splits the sequence,
            or a draft model that cannot guess for this one.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        draft: DraftModel | None = None,
        mesh: Mesh | None = None,
    ):
        model = require_generative(model)
        if config.batch_invariant:
            check_batch_invariant(model, config.cache)
        if model.rules.seq:
            message = f"the sequence is split over {' and '.join(model.rules.seq)}"
            fix = "generate on a mesh with context=1"
            raise MaxlmError(message, where="mesh", fix=fix)
        if config.record_routes:
            _require_experts(model)
        self.model = model
        self.tokenizer = tokenizer
        self.mesh: Mesh = mesh or jax.tree.leaves(params)[0].sharding.mesh
        if not vocab_size:
            if tokenizer is not None:
                vocab_size = tokenizer.vocab_size
            else:
                vocab_size = model.config.vocab_size
        self.vocab_size = vocab_size
        self.num_shards = prod(self.mesh.shape[axis] for axis in model.rules.batch)
        """Shards of the rows: each has its share of them, and pages of its own."""

        # Lengths. Users count tokens without virtual ones; the scheduler and the
        # devices count all that stand in a row.
        num_virtual = model.num_virtual_tokens
        max_row_length = config.max_length + num_virtual
        position_limit = model.config.position_limit
        if position_limit is not None:
            max_row_length = min(max_row_length, position_limit)
        max_length = max_row_length - num_virtual
        self.config = config.model_copy(update={"max_length": max_length})
        row_config = config.model_copy(update={"max_length": max_row_length})

        # Caches: pages, and where layers have a state by row (or an encoder's output)
        # rows.
        num_mtp_modules = count_drafting_modules(model, config.speculation)
        windows = list_paged_windows(model, config.cache, num_mtp_modules)
        platform = self.mesh.devices.flat[0].platform
        layout = make_cache_layout(
            row_config, windows, self.num_shards, platform, num_mtp_modules
        )
        num_drafts = 0 if config.speculation is None else config.speculation.num_drafts
        num_mtp_drafts = num_drafts if num_mtp_modules else 0
        self._spec = EngineSpec(
            layout,
            windows,
            max_row_length,
            self.vocab_size,
            num_mtp_drafts=num_mtp_drafts,
            kernels=(
                BATCH_INVARIANT_KERNELS
                if config.batch_invariant
                else choose_decode_kernels(platform)
            ),
            batch_invariant=config.batch_invariant,
            shares_params=config.shares_params,
            record_routes=config.record_routes,
        )
        cache_specs = model.cache_specs(layout)
        has_encoder = isinstance(model, EncoderDecoder)
        has_row_state = has_unit(cache_specs, "row")
        self._has_rows_to_copy = has_row_state or has_encoder
        self.scheduler = Scheduler(
            row_config,
            windows,
            num_shards=self.num_shards,
            decoder_start_id=model.config.start_id if has_encoder else None,
            has_row_state=has_row_state,
            num_virtual_tokens=num_virtual,
            # Behind a step's last token the last module reads its own guesses.
            num_lookahead_tokens=num_mtp_drafts - num_mtp_modules,
        )

        # Models on the devices: the one that is run, and the one that drafts for it.
        speculation = config.speculation
        draft_model = None if draft is None else require_generative(draft.model)
        if speculation is not None:
            check_speculation(model, draft_model, layout)
        with jax.set_mesh(self.mesh):
            self._adapters = AdapterSlots(
                model, config.max_adapters, config.max_adapter_rank
            )
            self._runner = ModelRunner(
                model, params, self._spec, self.mesh, self._adapters.arrays or None
            )
            self._draft_runner = None
            if draft is not None and draft_model is not None:
                draft_spec = replace(self._spec, record_routes=False)
                self._draft_runner = ModelRunner(
                    draft_model, draft.params, draft_spec, self.mesh
                )
        self._runners = [self._runner]
        if self._draft_runner is not None:
            self._runners.append(self._draft_runner)

        self._prompt_encoder = PromptEncoder(
            model,
            lambda: self._runner.params,
            self.mesh,
            self.num_shards,
            accepts_embeddings=config.accepts_embeddings,
        )
        chunk_vectors = None
        if self._prompt_encoder.is_used:
            by_shard = NamedSharding(self.mesh, model.rules.spec("batch"))
            chunk_vectors = ChunkVectors(model.config.d_model, model.dtype, by_shard)

        # What goes to the devices, and what becomes of the tokens that come back.
        self._inputs = InputBuilder(
            row_config,
            self.num_shards,
            model.config.vocab_size,
            num_drafts=num_drafts,
            all_rows=has_row_caches(cache_specs) or has_encoder,
            adapters=self._adapters,
            chunk_vectors=chunk_vectors,
            num_mtp_modules=num_mtp_modules,
        )
        self._grammars: GrammarCompiler | None = None
        self._outputs = OutputBuilder(tokenizer)
        self._aborted: list[SequenceOutput] = []
        """Outputs of aborted sequences, for the next step to return."""

        self._num_steps = 0
        self._num_drafted = 0
        self._num_accepted = 0
        # Until one is timed, a dispatch may have all its steps.
        self._step_seconds = config.dispatch_seconds / config.decode_steps
        """Estimated seconds of one decode step."""
        self._compiler: BackgroundCompiler[StepSizes] | None = None
        """Compiles behind the steps, after :meth:`warm_up_in_background`."""

    def add_request(
        self, request: GenerationRequest, *, branching: bool = False
    ) -> None:
        """Takes a request; its outputs come from :meth:`step`. ``branching``: one token
        a step and no text, for :meth:`branch` to be called between. Raises MaxlmError
        where it can never run here: too long, a token that the model does not have, a
        stop string without a tokenizer, vectors that do not fit the prompt. Items of
        the model's frontend are encoded at once."""
        where = f"request {request.request_id}"
        vocab_size = self.model.config.vocab_size
        for token in chain(request.prompt_tokens, *request.continuations):
            if not 0 <= token < vocab_size:
                message = (
                    f"token {token} is outside the model's vocabulary of {vocab_size}"
                )
                fix = "use the tokenizer that the model was trained with"
                raise MaxlmError(message, where=where, fix=fix)
        if request.routes and not self.config.record_routes:
            message = "it asks for routes, which the engine does not record"
            fix = "set record_routes=true in the engine's config"
            raise MaxlmError(message, where=where, fix=fix)
        if self.tokenizer is None and (request.stop_strings or request.grammar):
            message = "stop strings and grammars need a tokenizer"
            fix = "give the engine one, or use stop_token_ids"
            raise MaxlmError(message, where=where, fix=fix)
        matcher = self._make_matcher(request)
        stop_ids = {
            token for token in request.stop_token_ids if 0 <= token < vocab_size
        }
        if self.tokenizer is not None and not request.ignore_eos:
            stop_ids |= set(self.tokenizer.stop_ids)
        if len(stop_ids) > MAX_STOP_IDS:
            message = (
                f"{len(stop_ids)} tokens end the output; there is room for "
                f"{MAX_STOP_IDS}"
            )
            raise MaxlmError(message, where=where, fix="name fewer in stop_token_ids")
        continued = self.continues_text(request.prompt_tokens)
        # An adapter that is loaded again under a name shares no pages with the last.
        cache_key = None
        if request.adapter is not None:
            cache_key = self._adapters.get_load_number(request.adapter)
        vectors = self._prompt_encoder.encode(request)
        for sequence in self.scheduler.add(request, cache_key, vectors):
            sequence.is_branching = branching
            if branching:  # the caller replaces sequences after every token
                sequence.needs_host = True
            sequence.stop_ids = tuple(sorted(stop_ids))
            self._outputs.add(sequence, matcher, continued=continued)

    def _make_matcher(self, request: GenerationRequest) -> TokenMatcher | None:
        """Returns what says which tokens may come next, or None: all may."""
        matchers: list[TokenMatcher] = []
        if request.grammar is not None and self.tokenizer is not None:
            if self._grammars is None:
                self._grammars = GrammarCompiler(self.tokenizer)
            matchers.append(self._grammars.compile(request.grammar))
        if request.banned_sequences:
            matchers.append(BannedSequencesMatcher(request.banned_sequences))
        if not matchers:
            return None
        if len(matchers) == 1:
            return matchers[0]
        stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
        return CombinedMatcher(matchers, stop_ids)

    def continues_text(self, prompt_tokens: Sequence[int]) -> bool:
        """Whether an output's first word follows others, rather than opening a text."""
        if self.tokenizer is None or isinstance(self.model, EncoderDecoder):
            return False
        opening_ids = {self.tokenizer.bos_id, *self.tokenizer.prefix_ids}
        return not set(prompt_tokens) <= opening_ids

    def branch(self, request_id: str, branches: Sequence[tuple[int, int]]) -> list[int]:
        """Replaces the sequences of a request by branches of them, between steps; see
        :meth:`Scheduler.branch`. Returns the index of each branch's sequence."""
        sequences = self.scheduler.branch(request_id, branches)
        self._outputs.branch(sequences)
        return [sequence.index for sequence in sequences]

    def abort(self, request_id: str) -> None:
        """Ends a request, and frees what it holds; unknown ids are ignored. Its
        sequences' last outputs, with ``finish_reason`` "abort", come from the next
        step."""
        for sequence in self.scheduler.abort(request_id):
            self._outputs.forget(sequence)
            output = SequenceOutput(
                request_id, sequence.index, [], finish_reason="abort"
            )
            self._aborted.append(output)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return bool(self._aborted) or self.has_unfinished_requests

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether sequences run, or wait to."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self, *, limit_seconds: bool = True) -> list[SequenceOutput]:
        """Runs one dispatch; returns what it added to sequences, nothing where none was
        waiting. ``limit_seconds``: whether it ends after about
        ``config.dispatch_seconds``; otherwise it has as many steps as
        ``config.decode_steps`` allows."""
        outputs = self._aborted
        self._aborted = []
        max_steps = None
        if limit_seconds:
            steps_in_time = self.config.dispatch_seconds / self._step_seconds
            max_steps = max(1, round(steps_in_time))
        if self._spec.num_mtp_drafts:
            # Each step guesses what the next one verifies.
            max_steps = 1
        # Drafts come first: the scheduler reserves pages for them.
        drafts = self._plan_drafts()
        plan = self.scheduler.schedule(max_steps)
        if plan is None:
            return outputs
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self._update_caches(plan)
            self._draw_drafts(plan, drafts)
            shape = self._inputs.choose_shape(plan)
            result = self._run(plan, shape)
        result = jax.device_get(result)
        if not plan.prefill:
            # A dispatch that compiles takes far longer than the next ones will. An
            # estimate may therefore at most double from one to the next; a lower one is
            # taken at once.
            seconds = (time.perf_counter() - start) / plan.num_steps
            self._step_seconds = min(seconds, 2 * self._step_seconds)
        return outputs + self._collect(plan, shape, result)

    def run(
        self, requests: Iterable[GenerationRequest], *, stream: bool = False
    ) -> Iterator[SequenceOutput]:
        """Yields outputs of some requests as they come, until all have ended.
        ``stream``: keep dispatches to ``dispatch_seconds``, for who reads along;
        otherwise they are as long as ``decode_steps`` allows, once no request waits for
        another's end."""
        for request in requests:
            self.add_request(request)
        while self.has_work:
            has_waiting = bool(self.scheduler.waiting)
            yield from self.step(limit_seconds=stream or has_waiting)

    def set_params(self, params: Params, draft_params: Params | None = None) -> None:
        """Generates with other parameters from the next step on.

        Sequences that run go on over the caches that they have (an update in flight);
        nothing else is kept of the parameters before: computed prefixes are dropped,
        and what a frontend made of prompts is made again. Loaded adapters stay, beside
        the new parameters.

        Args:
            params: of the same model, as a training step leaves them (fp32, stacked, in
                their storage layout), on the engine's mesh or on another one. With
                ``config.shares_params`` the engine reads these arrays themselves: call
                :meth:`release_params` before a training step takes them.
            draft_params: of the draft model; None: its own stay.

        Raises:
            MaxlmError: parameters of another model, on another mesh where they are to
                be shared, or of a draft model that there is none of.
        """
        if draft_params is not None and self._draft_runner is None:
            message = "parameters of a draft model, and the engine has none"
            raise MaxlmError(message, where="draft_params", fix="leave them out")
        with jax.set_mesh(self.mesh):
            self._runner.set_params(params)
            if draft_params is not None and self._draft_runner is not None:
                self._draft_runner.set_params(draft_params)
        self.scheduler.change_params()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.request.items is not None:
                sequence.vectors = self._prompt_encoder.encode(sequence.request)

    def release_params(self) -> None:
        """Lets go of the model's parameters, and of what was made of them, so that their
        memory is free or theirs alone who also has them; steps are errors until
        :meth:`set_params`."""
        self._runner.release_params()

    def release_caches(self) -> None:
        """Frees the caches until the next step. Sequences that run wait, and are then
        computed anew; computed prefixes are dropped."""
        self.scheduler.vacate_caches()
        for runner in self._runners:
            runner.release_state()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of loaded adapters."""
        return tuple(self._adapters.loaded)

    def load_adapter(self, name: str, weights: LoraWeights) -> None:
        """Loads a LoRA adapter for requests with its name; others go on meanwhile.
        Raises MaxlmError: no slot is free or fits it, a name that is taken, another
        base's adapter."""
        with jax.set_mesh(self.mesh):
            self._adapters.load(name, weights)

    def unload_adapter(self, name: str) -> None:
        """Frees an adapter's slot; raises MaxlmError while requests use it."""
        self._adapters.get_load_number(name)
        sequences = [*self.scheduler.running, *self.scheduler.waiting]
        requests = [sequence.request for sequence in sequences]
        users = {request.request_id for request in requests if request.adapter == name}
        if users:
            message = f"{len(users)} requests use it"
            fix = "wait until they end, or abort them"
            raise MaxlmError(message, where=f"adapter {name}", fix=fix)
        del self._adapters.loaded[name]

    def warm_up(self, on_progress: Progress = ignore_progress) -> None:
        """Compiles every program that steps may need, but for encoders; none is
        compiled later."""
        no_work = ScheduledStep(num_steps=0)
        self._inputs.is_warm = True
        with jax.set_mesh(self.mesh):
            self._adapters.warm_up()
            shapes = self._inputs.list_shapes()
            for number, shape in enumerate(shapes):
                on_progress("compiling", number, len(shapes))
                self._run(no_work, shape)
            on_progress("compiling", len(shapes), len(shapes))
            for runner in self._runners:
                runner.copy_pages([])
                if self._has_rows_to_copy:
                    runner.copy_rows([])

    def warm_up_in_background(self) -> None:
        """Starts to compile every program that steps may need in a thread of its own,
        and returns at once: steps compile theirs themselves where its turn has not
        come. Ends with :meth:`close`."""
        self._inputs.is_warm = True
        # The thread may not build inputs itself: steps change, meanwhile, what they are
        # built from.
        no_work = ScheduledStep(num_steps=0)
        page_tables = self.scheduler.page_tables
        inputs: dict[StepSizes, StepInputs] = {}
        for shape in self._inputs.list_shapes():
            arrays = self._inputs.build(no_work, shape, page_tables, {})
            inputs[shape] = describe_arrays(arrays)

        def compile_program(shape: StepSizes) -> None:
            with jax.set_mesh(self.mesh):
                self._runner.compile(shape, inputs[shape])
                if self._draft_runner is not None:
                    draft_inputs = inputs[shape]._replace(
                        chunk_vectors=None, chunk_vector_numbers=None
                    )
                    self._draft_runner.compile(shape, draft_inputs)

        self._compiler = BackgroundCompiler(compile_program, inputs)
        self._compiler.start()

    @property
    def num_programs_left(self) -> int:
        """Programs that :meth:`warm_up_in_background` has still to compile; may be read
        in any thread."""
        return self._compiler.num_left if self._compiler is not None else 0

    def close(self) -> None:
        """Ends what :meth:`warm_up_in_background` started, once its current program is
        compiled."""
        if self._compiler is not None:
            self._compiler.stop()

    @property
    def params(self) -> Params:
        """The model's parameters as steps read them (:func:`prepare_params`)."""
        return self._runner.params

    def stats(self) -> EngineStats:
        """Returns counts for monitoring."""
        scheduler = self.scheduler
        # Page 0 of each pool is padding.
        num_pages = self.num_shards * sum(count - 1 for count in scheduler.num_pages)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_pages=num_pages,
            num_free_pages=scheduler.count_available_pages(),
            prompt_tokens_total=self._outputs.num_prompt_tokens,
            cached_prompt_tokens_total=self._outputs.num_cached_tokens,
            generated_tokens_total=self._outputs.num_generated_tokens,
            preemptions_total=scheduler.num_preemptions,
            steps_total=self._num_steps,
            drafted_tokens_total=self._num_drafted,
            accepted_tokens_total=self._num_accepted,
            compilations_total=count_compilations(),
        )

    def _run(self, plan: ScheduledStep, shape: StepSizes) -> StepOutputs:
        """Runs a step, and keeps the draft model's caches up to the model's."""
        if self._compiler is not None:
            # Its thread leaves this program alone from now on.
            self._compiler.claim(shape)
        inputs = self._inputs.build(
            plan, shape, self.scheduler.page_tables, self._outputs.matchers
        )
        outputs = self._runner.run(shape, inputs)
        self._num_steps += 1
        # Where there are drafts, drawing them has put these tokens in its caches.
        if self._draft_runner is not None and not plan.drafts:
            # It reads placeholders in place of vectors, which are the model's own.
            inputs = inputs._replace(chunk_vectors=None, chunk_vector_numbers=None)
            self._draft_runner.run(shape, inputs)
        return outputs

    def _plan_drafts(self) -> dict[RunningSequence, list[int]]:
        """Sets ``num_drafts``, for which the scheduler reserves pages, of each sequence
        that decodes. Returns the drafts: those that the prompt or the last step tells,
        or zeros as many as the draft model may guess (:meth:`_draw_drafts`)."""
        config = self.config.speculation
        drafts: dict[RunningSequence, list[int]] = {}
        if config is None:
            return drafts
        for sequence in self.scheduler.running:
            # The model always draws one token more than are guessed.
            num_drafts = min(config.num_drafts, sequence.num_tokens_left - 1)
            if not sequence.is_decoding or num_drafts < 1 or sequence.is_branching:
                continue
            if isinstance(config, PromptLookupConfig):
                draft = look_up_prompt(sequence.tokens, config)[:num_drafts]
            elif isinstance(config, MtpDraftsConfig):
                draft = sequence.next_drafts[:num_drafts]
            else:
                draft = [0] * num_drafts  # the draft model overwrites them
            if draft:
                drafts[sequence] = draft
                sequence.num_drafts = len(draft)
        return drafts

    def _draw_drafts(
        self, plan: ScheduledStep, drafts: dict[RunningSequence, list[int]]
    ) -> None:
        """Puts drafts of a plan's rows into it, as many as these have pages for; with a
        draft model, guesses them."""
        plan.drafts = {}
        for row in plan.decode:
            num_drafts = row.num_tokens - 1
            if row.sequence in drafts and num_drafts > 0:
                plan.drafts[row.sequence] = drafts[row.sequence][:num_drafts]
        if self._draft_runner is None or not plan.drafts:
            return
        if plan.prefill:
            # To guess takes several steps, of which no program has chunks too. In this
            # dispatch the draft model only reads along.
            plan.decode = [row._replace(num_tokens=1) for row in plan.decode]
            plan.drafts = {}
            return
        # One step more than there are drafts, so that the last of them is in the draft
        # model's cache as well.
        num_steps = max(row.num_tokens for row in plan.decode)
        draft_plan = replace(plan, num_steps=num_steps, drafts={})
        shape = self._inputs.choose_shape(draft_plan)
        inputs = self._inputs.build(
            draft_plan, shape, self.scheduler.page_tables, matchers={}
        )
        outputs = self._draft_runner.run(shape, inputs)
        tokens = np.asarray(outputs.tokens)  # [steps, shards, rows]
        for sequence, draft in plan.drafts.items():
            drawn = tokens[: len(draft), sequence.shard, sequence.row]
            draft[:] = drawn.tolist()

    def _update_caches(self, plan: ScheduledStep) -> None:
        """Does what comes before a step: copies, and encoders."""
        for runner in self._runners:
            for start in range(0, len(plan.page_copies), MAX_PAGE_COPIES):
                runner.copy_pages(plan.page_copies[start : start + MAX_PAGE_COPIES])
            if plan.row_copies and self._has_rows_to_copy:
                runner.copy_rows(plan.row_copies)
        for sequence in plan.encode:
            self._runner.encode(sequence)

    def _collect(
        self, plan: ScheduledStep, shape: StepSizes, result: StepOutputs
    ) -> list[SequenceOutput]:
        """Takes a step's tokens; returns each sequence's output."""
        for chunk, tokens in self._inputs.read_prompts(result, plan):
            self._outputs.take_prompt(chunk, tokens)
        for sequence, guesses in self._inputs.read_drafts(result, shape, plan):
            sequence.next_drafts = guesses
        outputs: dict[RunningSequence, SequenceOutput] = {}
        for sequence, tokens in self._inputs.read_results(result, shape, plan).items():
            outputs[sequence] = self._outputs.take(sequence, tokens)
            draft = plan.drafts.get(sequence)
            if draft:
                self._num_drafted += len(draft)
                # Behind the accepted ones stands a token that the model drew itself.
                self._num_accepted += len(tokens) - 1
        new_tokens = {
            sequence: output.token_ids for sequence, output in outputs.items()
        }
        num_read = {row.sequence: len(new_tokens[row.sequence]) for row in plan.decode}
        for sequence, routes in self._inputs.read_routes(result, shape, plan):
            sequence.record_routes(routes[: num_read.get(sequence)])
        for sequence, output in outputs.items():
            if sequence.request.routes:
                output.routes = np.stack(self._outputs.take_routes(sequence))
        self.scheduler.finish_step(plan, new_tokens)
        for sequence, output in outputs.items():
            if output.finish_reason is not None:
                self.scheduler.finish(sequence)
                self._outputs.forget(sequence)
        return [*outputs.values()]


def _require_experts(model: GenerativeModel) -> None:
    """Raises MaxlmError: a model without routes to record."""
    if isinstance(model, EncoderDecoder) or not list_expert_layers(model.config):
        message = "record_routes for a model that is no decoder with experts"
        raise MaxlmError(message, where="engine.record_routes", fix="set it to false")


def make_cache_layout(
    config: EngineConfig,
    windows: tuple[int | None, ...],
    num_shards: int,
    platform: str,
    num_mtp_modules: int,
) -> CacheLayout:
    """Returns the sizes of caches; those that depend on one model's heads are still
    their defaults."""
    num_pages = dict(zip(windows, config.count_pages(windows), strict=True))
    window_pages = [count for window, count in num_pages.items() if window is not None]
    num_window_pages = max(window_pages, default=None)
    # Without a layer that sees everything there are windows' pages alone, if any.
    num_full_pages = num_pages.get(None, num_window_pages or 0)
    return CacheLayout(
        num_shards=num_shards,
        num_rows=config.max_sequences,
        num_pages=num_full_pages,
        page_size=config.page_size,
        num_window_pages=num_window_pages,
        cache=config.cache,
        feature_multiple=choose_feature_multiple(platform),
        num_mtp_modules=num_mtp_modules,
    )
