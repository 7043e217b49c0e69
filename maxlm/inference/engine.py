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
from typing import Any, NamedTuple

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.adapter_slots import AdapterSlots, LoraWeights
from maxlm.inference.background_compiler import BackgroundCompiler
from maxlm.inference.banned_sequences import (
    BannedSequencesMatcher,
    CombinedMatcher,
    TokenMatcher,
)
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.engine_inputs import InputBuilder
from maxlm.inference.grammar import GrammarCompiler
from maxlm.inference.model_runner import (
    MAX_PAGE_COPIES,
    ModelRunner,
    count_compilations,
    describe_arrays,
)
from maxlm.inference.outputs import OutputBuilder
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.inference.sampling import MAX_STOP_IDS
from maxlm.inference.scheduler import Scheduler
from maxlm.inference.sequences import RunningSequence, ScheduledStep
from maxlm.inference.speculation import (
    DraftModel,
    PromptLookupConfig,
    check_speculation,
    look_up_prompt,
)
from maxlm.inference.step import StepInputs, StepOutputs, StepSizes
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.caches.layout import (
    CacheLayout,
    choose_feature_multiple,
    has_row_caches,
    has_unit,
    list_paged_windows,
)
from maxlm.models.params import Params
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
    ):
        if isinstance(model, Encoder):
            what = "an encoder names masked tokens; it does not continue text"
            fix = "use a decoder, or an encoder with a decoder"
            raise MaxlmError(what, where="engine", fix=fix)
        if model.rules.seq:
            what = f"the sequence is split over {' and '.join(model.rules.seq)}"
            raise MaxlmError(
                what, where="mesh", fix="generate on a mesh with context=1"
            )
        self.model: Any = model
        self.tokenizer = tokenizer
        num_virtual = model.num_virtual_tokens
        longest = config.max_length + num_virtual
        limit = model.config.position_limit
        if limit is not None:
            longest = min(longest, limit)
        self.config = config.model_copy(update={"max_length": longest - num_virtual})
        own_config = config.model_copy(update={"max_length": longest})
        self.mesh = jax.tree.leaves(params)[0].sharding.mesh
        self.vocab_size = vocab_size or (tokenizer or model.config).vocab_size
        self.num_shards = prod(self.mesh.shape[axis] for axis in model.rules.batch)
        windows = list_paged_windows(model, config.cache)
        pages = dict(zip(windows, own_config.count_pages(windows), strict=True))
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
        encodes = isinstance(model, EncoderDecoder)
        self.scheduler = Scheduler(
            own_config,
            self._windows,
            num_shards=self.num_shards,
            decoder_start_id=model.config.start_id if encodes else None,
            has_row_state=has_unit(specs, "row"),
            num_virtual_tokens=num_virtual,
        )
        self._copies_rows = has_unit(specs, "row") or encodes
        speculation = config.speculation
        if speculation is not None:
            check_speculation(model, draft and draft.model, self._layout)
        own = self._layout, self._windows, longest, self.vocab_size
        with jax.set_mesh(self.mesh):
            self._adapters = AdapterSlots(
                model, config.max_adapters, config.max_adapter_rank
            )
            self._runner = ModelRunner(
                model, params, *own, self._adapters.arrays or None
            )
            self._draft = ModelRunner(*draft, *own) if draft is not None else None
        self._runners = [self._runner, *filter(None, [self._draft])]
        self._inputs = InputBuilder(
            own_config,
            self.num_shards,
            model.config.vocab_size,
            num_drafts=speculation.num_drafts if speculation else 0,
            all_rows=has_row_caches(specs) or encodes,
            adapters=self._adapters,
        )
        self._grammars: GrammarCompiler | None = None
        self._outputs = OutputBuilder(tokenizer)
        self._ended: list[SequenceOutput] = []
        self._steps = self._drafted = self._accepted = 0
        self._step_seconds = self.config.dispatch_seconds / self.config.decode_steps
        self._compiler: BackgroundCompiler[StepSizes] | None = None

    def add_request(
        self, request: GenerationRequest, *, branching: bool = False
    ) -> None:
        """Takes a request; its outputs come from :meth:`step`. ``branching``: one token
        a step and no text, for :meth:`branch` to be called between. Raises MaxlmError
        where it can never run here: too long, a token that the model does not have, a
        stop string without a tokenizer."""
        where = f"request {request.request_id}"
        vocab = self.model.config.vocab_size
        tokens = chain(request.prompt_tokens, *request.continuations)
        wrong = next((t for t in tokens if not 0 <= t < vocab), None)
        if wrong is not None:
            what = f"token {wrong} is outside the model's vocabulary of {vocab}"
            fix = "use the tokenizer that the model was trained with"
            raise MaxlmError(what, where=where, fix=fix)
        if self.tokenizer is None and (request.stop_strings or request.grammar):
            what = "stop strings and grammars need a tokenizer"
            raise MaxlmError(
                what, where=where, fix="give the engine one, or use stop_token_ids"
            )
        matcher = self._make_matcher(request)
        stops = {token for token in request.stop_token_ids if 0 <= token < vocab}
        if self.tokenizer is not None and not request.ignore_eos:
            stops |= set(self.tokenizer.stop_ids)
        if len(stops) > MAX_STOP_IDS:
            what = (
                f"{len(stops)} tokens end the output; there is room for {MAX_STOP_IDS}"
            )
            raise MaxlmError(what, where=where, fix="name fewer in stop_token_ids")
        continued = self.continues_text(request.prompt_tokens)
        name = request.adapter
        key = None if name is None else self._adapters.get_load_number(name)
        for sequence in self.scheduler.add(request, key):
            sequence.is_branching = branching
            sequence.needs_host |= branching
            sequence.stop_ids = tuple(sorted(stops))
            self._outputs.add(sequence, matcher, continued=continued)

    def _make_matcher(self, request: GenerationRequest) -> TokenMatcher | None:
        """Returns what says which tokens may come next, or None: all may."""
        matchers: list[TokenMatcher] = []
        if request.grammar is not None and self.tokenizer is not None:
            self._grammars = self._grammars or GrammarCompiler(self.tokenizer)
            matchers.append(self._grammars.compile(request.grammar))
        if request.banned_sequences:
            matchers.append(BannedSequencesMatcher(request.banned_sequences))
        if len(matchers) > 1:
            stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
            return CombinedMatcher(matchers, stop_ids)
        return matchers[0] if matchers else None

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
            self._ended.append(output)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return bool(self._ended or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[SequenceOutput]:
        """Runs one dispatch; returns what it added to sequences, nothing where none was
        waiting."""
        return self._step(
            max(1, round(self.config.dispatch_seconds / self._step_seconds))
        )

    def _step(self, max_steps: int | None) -> list[SequenceOutput]:
        outputs = self._ended
        self._ended = []
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
            # A step that compiles is no measure: estimates go up by degrees, and down
            # at once.
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
            yield from (
                self.step() if stream or self.scheduler.waiting else self._step(None)
            )

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
        if count := len(
            {s.request.request_id for s in sequences if s.request.adapter == name}
        ):
            what = f"{count} requests use it"
            fix = "wait until they end, or abort them"
            raise MaxlmError(what, where=f"adapter {name}", fix=fix)
        del self._adapters.loaded[name]

    def warm_up(self, on_progress: Progress = ignore_progress) -> None:
        """Compiles every program that steps may need, but for encoders; none is
        compiled later."""
        empty = ScheduledStep(num_steps=0)
        self._inputs.is_warm = True
        with jax.set_mesh(self.mesh):
            self._adapters.warm_up()
            shapes = self._inputs.list_shapes()
            for number, shape in enumerate(shapes):
                on_progress("compiling", number, len(shapes))
                self._run(empty, shape)
            on_progress("compiling", len(shapes), len(shapes))
            for runner in self._runners:
                runner.copy_pages([])
                if self._copies_rows:
                    runner.copy_rows([])

    def warm_up_behind(self) -> None:
        """Starts to compile every program that steps may need in a thread of its own,
        and returns at once: steps compile theirs themselves where its turn has not
        come. Ends with :meth:`close`."""
        self._inputs.is_warm = True
        # Steps change what inputs are built from, so that they are described here and
        # now.
        empty = ScheduledStep(num_steps=0)
        tables = self.scheduler.page_tables
        inputs: dict[StepSizes, StepInputs] = {}
        for shape in self._inputs.list_shapes():
            inputs[shape] = describe_arrays(
                self._inputs.build(empty, shape, tables, {})
            )

        def compile_program(shape: StepSizes) -> None:
            with jax.set_mesh(self.mesh):
                for runner in self._runners:
                    runner.compile(shape, inputs[shape])

        self._compiler = BackgroundCompiler(compile_program, inputs)
        self._compiler.start()

    @property
    def num_programs_left(self) -> int:
        """Programs that :meth:`warm_up_behind` has still to compile; may be read in any
        thread."""
        return self._compiler.num_left if self._compiler is not None else 0

    def close(self) -> None:
        """Ends what :meth:`warm_up_behind` started, once its current program is
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
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            self.num_shards * sum(count - 1 for count in scheduler.num_pages),
            scheduler.count_available_pages(),
            self._outputs.num_prompt_tokens,
            self._outputs.num_cached_tokens,
            self._outputs.num_generated_tokens,
            scheduler.num_preemptions,
            self._steps,
            self._drafted,
            self._accepted,
            count_compilations(),
        )

    def _run(self, plan: ScheduledStep, shape: StepSizes) -> StepOutputs:
        """Runs a step, and keeps the draft model's caches up to the model's."""
        if self._compiler is not None:
            self._compiler.claim(shape)
        tables, matchers = self.scheduler.page_tables, self._outputs.matchers
        inputs = self._inputs.build(plan, shape, tables, matchers)
        outputs = self._runner.run(shape, inputs)
        self._steps += 1
        if self._draft is not None and not plan.drafts:
            self._draft.run(shape, inputs)
        return outputs

    def _plan_drafts(self) -> dict[RunningSequence, list[int]]:
        """Says how many tokens are guessed for each sequence that decodes; these
        tokens, as far as they are known before pages are."""
        config = self.config.speculation
        drafts = {}
        if config is None:
            return drafts
        for sequence in self.scheduler.running:
            most = min(config.num_drafts, sequence.num_tokens_left - 1)
            if not sequence.is_decoding or most < 1 or sequence.is_branching:
                continue
            draft = [0] * most
            if isinstance(config, PromptLookupConfig):
                draft = look_up_prompt(sequence.tokens, config)[:most]
            if draft:
                drafts[sequence], sequence.num_drafts = draft, len(draft)
        return drafts

    def _draw_drafts(
        self, plan: ScheduledStep, drafts: dict[RunningSequence, list[int]]
    ) -> None:
        """Guesses tokens of a plan's rows, as many as these have pages for."""
        plan.drafts = {
            row.sequence: drafts[row.sequence][: row.num_tokens - 1]
            for row in plan.decode
            if row.sequence in drafts and row.num_tokens > 1
        }
        if self._draft is None or not plan.drafts:
            return
        if plan.prefill:  # one program fewer; the draft model then only reads along
            plan.decode = [row._replace(num_tokens=1) for row in plan.decode]
            plan.drafts = {}
            return
        # A step more than there are drafts, so that the last of them is in the cache as
        # well.
        alone = replace(
            plan, num_steps=max(row.num_tokens for row in plan.decode), drafts={}
        )
        shape = self._inputs.choose_shape(alone)
        inputs = self._inputs.build(alone, shape, self.scheduler.page_tables, {})
        tokens = np.asarray(self._draft.run(shape, inputs).tokens)
        for each, draft in plan.drafts.items():
            draft[:] = tokens[: len(draft), each.shard, each.row].tolist()

    def _update_caches(self, plan: ScheduledStep) -> None:
        """Does what comes before a step: copies, and encoders."""
        for runner in self._runners:
            for start in range(0, len(plan.page_copies), MAX_PAGE_COPIES):
                runner.copy_pages(plan.page_copies[start : start + MAX_PAGE_COPIES])
            if plan.row_copies and self._copies_rows:
                runner.copy_rows(plan.row_copies)
        for sequence in plan.encode:
            self._runner.encode(sequence)

    def _collect(
        self, plan: ScheduledStep, shape: StepSizes, result: StepOutputs
    ) -> list[SequenceOutput]:
        """Takes a step's tokens; returns each sequence's output."""
        for chunk, tokens in self._inputs.read_prompts(result, plan):
            self._outputs.take_prompt(chunk, tokens)
        outputs: dict[RunningSequence, SequenceOutput] = {}
        for sequence, tokens in self._inputs.read_results(result, shape, plan).items():
            outputs[sequence] = self._outputs.take(sequence, tokens)
            if draft := plan.drafts.get(sequence):
                self._drafted += len(draft)
                self._accepted += len(tokens) - 1
        self.scheduler.finish_step(
            plan, {each: own.token_ids for each, own in outputs.items()}
        )
        for sequence, output in outputs.items():
            if output.finish_reason is not None:
                self.scheduler.finish(sequence)
                self._outputs.forget(sequence)
        return [*outputs.values()]

    def continues_text(self, prompt_tokens: Sequence[int]) -> bool:
        """Whether an output's first word follows others, rather than opening a text."""
        if self.tokenizer is None or isinstance(self.model, EncoderDecoder):
            return False
        return not {*prompt_tokens} <= {
            self.tokenizer.bos_id,
            *self.tokenizer.prefix_ids,
        }
