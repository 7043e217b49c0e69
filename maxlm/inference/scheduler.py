"""Which sequences run in the next step of the engine (continuous batching: Yu et al.
2022, Orca; paged memory: Kwon et al. 2023, arXiv 2309.06180)."""

from bisect import insort
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from maxlm.config import MaxlmError
from maxlm.inference.cache_rows import CacheRows
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.pages import count_spanned_pages
from maxlm.inference.prompt_vectors import PromptVectors
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.sequences import (
    DecodeRow,
    PrefillChunk,
    RowCopy,
    RunningSequence,
    ScheduledStep,
    get_order,
)


@dataclass(eq=False)
class Scheduler:
    """Decides what runs next: rows that decode first, then chunks of prompts in order
    of arrival.

    A sequence starts when a row is free and there are pages for its whole prompt, with
    one to spare for each running sequence. It waits for another one that is computing a
    prefix of it. Where a row that decodes gets no page, the youngest sequence of its
    shard is preempted: it waits again, and is computed anew. The oldest sequence of a
    shard always goes on.

    A request's first sequence computes the prompt but for its last token; the others
    fork there.

    `schedule` and `finish_step` alternate; `add`, `abort` and `finish` may come at any
    moment."""

    config: EngineConfig
    windows: tuple[int | None, ...]
    """Tokens that a token sees in each group of layers, itself included; None: all
    before it. Empty: caches are kept by row alone, and there are no pages."""
    num_shards: int = 1
    """Data shards."""
    decoder_start_id: int | None = None
    """First token of the decoder, where an encoder reads the prompt."""
    has_row_state: bool = False
    """Whether layers keep by row what cannot be taken back (recurrent states, evicting
    caches): no prefix is shared."""
    num_virtual_tokens: int = 0
    """Dummy tokens (0) to put before every prompt; ``config.max_length`` has them in
    it."""
    num_lookahead_tokens: int = 0
    """Tokens behind those of a step that get pages where there are free ones, to guess
    with."""

    def __post_init__(self) -> None:
        config = self.config
        windows = self.windows
        self.num_pages = config.count_pages(windows)
        """Pages of each group's pool in one shard, page 0 included."""
        shape = (self.num_shards, config.max_sequences, config.pages_per_sequence)
        self.page_tables = [np.zeros(shape, np.int32) for _ in windows]
        """For each group [shards, rows, pages of the longest sequence]; 0: no page.
        Changed in place."""
        self.waiting: list[RunningSequence] = []
        """Sequences without a row, the next to start first."""
        self.num_preemptions = 0
        self.params_version = 0
        """Number of the parameters that sequences start with from now on."""
        self._can_share = bool(windows) and not self.has_row_state
        if not self._can_share:
            config = config.model_copy(update={"prefix_cache": False})
        self._shards = [
            CacheRows(
                shard, config, windows, [table[shard] for table in self.page_tables]
            )
            for shard in range(self.num_shards)
        ]
        self._requests: dict[str, list[RunningSequence]] = {}
        self._counter = count()

    @property
    def running(self) -> list[RunningSequence]:
        """Sequences with a row, by shard, the oldest first."""
        return [sequence for shard in self._shards for sequence in shard.running]

    def add(
        self,
        request: GenerationRequest,
        cache_key: Hashable = None,
        vectors: PromptVectors | None = None,
    ) -> list[RunningSequence]:
        """Queue a request and return its sequences. Requests with different
        ``cache_key`` share no pages (other adapters). ``vectors``: in place of some of
        the prompt's tokens. Raises MaxlmError: it can never run."""
        encoder_tokens = ()
        tokens = request.prompt_tokens
        if self.decoder_start_id is not None:
            encoder_tokens = tokens
            tokens = (self.decoder_start_id,)
        num_virtual = self.num_virtual_tokens
        tokens = (0,) * num_virtual + tokens
        self._check(request, len(tokens))
        if request.request_id in self._requests:
            message = f"a request {request.request_id} is under way"
            raise MaxlmError(message, where="request_id", fix="use another")
        if request.continuations:
            # The last token of each is only looked up in what its predecessor predicts.
            prompts = [(*tokens, *tail[:-1]) for tail in request.continuations]
        else:
            prompts = [tokens] * request.num_sequences
        needs_host = request.grammar is not None or bool(request.banned_sequences)
        creations = [next(self._counter) for _ in range(request.num_sequences)]
        sequences = [
            RunningSequence(
                request,
                index,
                list(prompt),
                num_prompt_tokens=len(prompt),
                num_shared_tokens=len(tokens),
                order=(creations[0], creations[index]),
                encoder_tokens=encoder_tokens,
                cache_key=cache_key,
                params_version=self.params_version,
                num_virtual_tokens=num_virtual,
                vectors=vectors,
                needs_host=needs_host,
            )
            for index, prompt in enumerate(prompts)
        ]
        self._requests[request.request_id] = list(sequences)
        self.waiting += sequences
        return sequences

    def _check(self, request: GenerationRequest, num_prompt_tokens: int) -> None:
        """Refuse a request, with so many tokens of the decoder, virtual ones among
        them, that could not even run alone."""
        where = f"request {request.request_id}"
        config = self.config
        max_new_tokens = request.sampling.max_new_tokens
        if not request.prompt_tokens or request.num_sequences < 1:
            message = "a request needs a token to continue, and a sequence"
            fix = "give a prompt, and num_sequences of 1 or more"
            raise MaxlmError(message, where=where, fix=fix)
        continuations = request.continuations
        if continuations:
            is_whole = all(continuations)
            has_sequences = request.num_sequences == len(continuations)
            if not (is_whole and has_sequences) or request.prompt_logprobs is None:
                message = (
                    "continuations have tokens, a sequence each, and prompt_logprobs"
                )
                fix = f"set num_sequences={len(continuations)}"
                raise MaxlmError(message, where=where, fix=fix)
            num_prompt_tokens += max(map(len, continuations)) - 1
            max_new_tokens = 0
        # An encoder reads the prompt apart from the decoder's tokens, which
        # num_prompt_tokens counts: both must fit.
        prompt_size = len(request.prompt_tokens)
        longest = max(prompt_size, num_prompt_tokens + max_new_tokens)
        if longest > config.max_length:
            allowed = config.max_length - self.num_virtual_tokens
            message = (
                f"{prompt_size:,} tokens of prompt and "
                f"max_new_tokens={max_new_tokens} are more than the {allowed:,} of the "
                "longest sequence (max_length)"
            )
            fix = "shorten the prompt, or ask for fewer new tokens"
            raise MaxlmError(message, where=where, fix=fix)
        page_size = config.page_size
        # The last new token is never read.
        num_read = num_prompt_tokens + max(max_new_tokens, 1) - 1
        for window, num_pages in zip(self.windows, self.num_pages, strict=True):
            num_needed = -(-num_read // page_size)
            if window is not None:
                num_needed = min(num_needed, count_spanned_pages(window, page_size))
            if num_needed > num_pages - 1:
                message = (
                    f"it needs {num_needed:,} pages of {page_size} tokens, and the "
                    f"cache has {num_pages - 1:,} (num_pages)"
                )
                fix = "raise num_pages, or ask for fewer tokens"
                raise MaxlmError(message, where=where, fix=fix)

    def abort(self, request_id: str) -> list[RunningSequence]:
        """End a request's sequences and return them; none where there is no such
        request."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence)
        return sequences

    def change_params(self) -> None:
        """Let no sequence that starts from now on share what was computed before: the
        parameters are others. Sequences that run go on over the caches that they have;
        where they are preempted, these are computed anew."""
        self.params_version += 1
        for shard in self._shards:
            shard.forget_prefixes()
        for sequence in self.waiting:
            sequence.params_version = self.params_version

    def vacate_caches(self) -> None:
        """Take all rows and pages back: sequences that run wait, and will be computed
        anew; computed prefixes are dropped."""
        for sequence in self.running:
            self._preempt(sequence)
        for shard in self._shards:
            shard.forget_prefixes()

    def finish(self, sequence: RunningSequence) -> None:
        """End a sequence; its computed pages stay in the prefix tree. Ending one again
        does nothing."""
        if sequence.state == "finished":
            return
        if sequence.state == "running":
            self._shards[sequence.shard].release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = "finished"
        request_id = sequence.request.request_id
        self._requests[request_id].remove(sequence)
        if not self._requests[request_id]:
            del self._requests[request_id]

    def fork(
        self, sequence: RunningSequence, next_token: int | None = None
    ) -> RunningSequence:
        """Add a sequence that goes on from another's tokens (beam search). Without a
        free row in the same shard it waits. ``next_token`` replaces the last token,
        which is not computed yet."""
        siblings = self._requests[sequence.request.request_id]
        tokens = list(sequence.tokens)
        if next_token is not None:
            tokens[-1] = next_token
        index = 1 + max(sibling.index for sibling in siblings)
        request_order, _ = sequence.order
        order = (request_order, next(self._counter))
        # Fields with init=False, such as its state and row, are those of a new one.
        target = replace(sequence, index=index, tokens=tokens, order=order)
        siblings.append(target)
        shard = self._shards[sequence.shard]
        if sequence.state == "running" and shard.free_rows:
            shard.fork(sequence, target, sequence.num_computed)
        else:
            self._wait(target)
        return target

    def branch(
        self, request_id: str, branches: Iterable[tuple[int, int]]
    ) -> list[RunningSequence]:
        """Replace a request's sequences by branches of them (beam search), between
        steps. ``branches``: index of the sequence that each goes on from, and the token
        in place of its last one; those that none goes on from end. Return each branch's
        sequence: the first of an index stays in place, others are forks."""
        branches = list(branches)
        sources = {
            sequence.index: sequence for sequence in self._requests.get(request_id, ())
        }
        continued = {index for index, _ in branches}
        for index in sources.keys() - continued:
            self.finish(sources[index])
        sequences: list[RunningSequence] = []
        for index, token in branches:
            sequence = sources[index]
            if sequence in sequences:
                sequence = self.fork(sequence, token)
            sequence.tokens[-1] = token
            sequences.append(sequence)
        return sequences

    def schedule(self, max_steps: int | None = None) -> ScheduledStep | None:
        """Plan the next step; None: nothing is there to do. ``max_steps``: limit of
        ``num_steps`` beside ``decode_steps``."""
        step = ScheduledStep()
        for shard in self._shards:
            shard.start_step()
            self._plan_decode(shard, step)
        self._start_waiting(step)
        for shard in self._shards:
            self._plan_prefill(shard, step)
        if not (step.decode or step.prefill or step.encode):
            return None
        decode_steps = self.config.decode_steps
        if max_steps is not None:
            decode_steps = min(decode_steps, max_steps)
        self._add_decode_steps(step, decode_steps)
        if self.num_lookahead_tokens:
            self._reserve_lookahead(step)
        for shard in self._shards:
            for destination, source in shard.row_copies.items():
                step.row_copies.append(RowCopy(shard.shard, source, destination))
            shard.row_copies = {}
        return step

    def finish_step(
        self, step: ScheduledStep, tokens: Mapping[RunningSequence, list[int]]
    ) -> None:
        """Take the new tokens of the last step that `schedule` planned: of each decode
        row, fewer than planned where drafts were rejected or the output is cut; and the
        one behind each chunk that samples. Sequences that ended meanwhile are passed
        over."""
        for sequence in step.encode:
            sequence.has_encoder_output = sequence.state == "running"
        computed = {row.sequence: len(tokens[row.sequence]) for row in step.decode}
        computed |= {chunk.sequence: chunk.num_tokens for chunk in step.prefill}
        for sequence, num_computed in computed.items():
            if sequence.state == "running":
                sequence.num_computed += num_computed
                sequence.tokens += tokens.get(sequence, ())
                sequence.num_drafts = 0
                self._shards[sequence.shard].settle(sequence)

    def count_available_pages(self) -> int:
        """Return the pages that no sequence holds, in all groups and shards."""
        return sum(pool.num_available for shard in self._shards for pool in shard.pools)

    def _plan_decode(self, shard: CacheRows, step: ScheduledStep) -> None:
        """Plan a token, and drafts where there are pages for them, for each row that
        decodes."""
        for sequence in list(shard.running):
            if sequence.state != "running" or not sequence.is_decoding:
                continue
            num_drafts = min(sequence.num_drafts, sequence.num_tokens_left - 1)
            num_tokens = shard.reserve(sequence, 1 + num_drafts, step.page_copies)
            while not num_tokens:
                # Those planned before are older, and so never preempted.
                self._preempt(shard.running[-1])
                if sequence.state != "running":
                    break
                num_tokens = shard.reserve(sequence, 1 + num_drafts, step.page_copies)
            if num_tokens:
                step.decode.append(DecodeRow(sequence, num_tokens))

    def _plan_prefill(self, shard: CacheRows, step: ScheduledStep) -> None:
        """Plan chunks of the prompts that have begun: the shortest first, whole, so
        that none waits for a longer one to end; an equal share of the oldest in any
        case."""
        num_before = len(step.prefill)
        prompts = [sequence for sequence in shard.running if not sequence.is_decoding]
        if prompts:
            oldest, *others = prompts
            others.sort(key=_count_to_compute)
            chosen = [oldest, *others[: max(0, shard.chunks_left - 1)]]
            num_to_compute = sum(map(_count_to_compute, chosen))
            shard.tokens_left = self.config.limit_chunk_tokens(
                min(num_to_compute, shard.tokens_left)
            )
            # Shorter prompts leave the oldest its equal share.
            reserve = -(-shard.tokens_left // len(chosen))
            for sequence in sorted(chosen, key=_count_to_compute):
                if sequence is oldest:
                    reserve = 0
                self._plan_chunk(shard, sequence, step, shard.tokens_left - reserve)
        working = [*(row.sequence for row in step.decode), *step.encode]
        if any(sequence.shard == shard.shard for sequence in working):
            return
        while shard.running and len(step.prefill) == num_before:
            # Nothing but prompts, which hold all pages: without a preemption none of
            # them would ever go on.
            self._preempt(shard.running[-1])
            if shard.running:
                self._plan_chunk(shard, shard.running[0], step, shard.tokens_left)

    def _plan_chunk(
        self,
        shard: CacheRows,
        sequence: RunningSequence,
        step: ScheduledStep,
        max_tokens: int,
    ) -> None:
        """Plan up to ``max_tokens`` tokens of a sequence, as far as the shard's pages
        allow."""
        if not shard.chunks_left:
            max_tokens = 0
        num_left = sequence.num_to_compute
        num_tokens = num_left
        siblings = self._requests[sequence.request.request_id]
        leads_others = (
            self._can_share
            and len(siblings) > 1
            and not sequence.num_output_tokens
            and self._find_leader(sequence) is None
        )
        num_shared = sequence.num_shared_tokens - 1 - sequence.num_computed
        if leads_others and num_shared > 0:
            num_tokens = num_shared  # the others fork there
        num_tokens = min(num_tokens, max_tokens)
        num_tokens = shard.reserve(sequence, num_tokens, step.page_copies)
        if num_tokens:
            shard.spend(num_tokens)
            start = sequence.num_computed
            samples = num_tokens == num_left
            step.prefill.append(PrefillChunk(sequence, start, num_tokens, samples))

    def _start_waiting(self, step: ScheduledStep) -> None:
        """Give rows to waiting sequences, in order, until one finds no room."""
        for sequence in list(self.waiting):
            if not any(shard.free_rows for shard in self._shards):
                break
            if self._is_blocked(sequence):
                continue
            shard = self._place(sequence)
            if shard is None:
                break
            self.waiting.remove(sequence)
            if not sequence.num_output_tokens:
                sequence.num_cached_tokens = sequence.num_computed
            if sequence.encoder_tokens and not sequence.has_encoder_output:
                step.encode.append(sequence)
                shard.spend(len(sequence.encoder_tokens))
            decodes = sequence.is_decoding
            shares_part_of_page = sequence.num_computed % self.config.page_size > 0
            if decodes or shares_part_of_page:
                # This copies a page that is shared in part now: the sequence that it
                # forked from may be about to write there.
                num_reserved = shard.reserve(sequence, 1, step.page_copies)
                if decodes and num_reserved:
                    step.decode.append(DecodeRow(sequence, 1))

    def _find_leader(self, sequence: RunningSequence) -> RunningSequence | None:
        """Return the sequence that computes the prompt for a request's others, the
        oldest with the same parameters, unless this is the one, or has output to
        compute as well."""
        siblings = self._requests[sequence.request.request_id]
        oldest = next(
            sibling for sibling in siblings if sibling.prefix_key == sequence.prefix_key
        )
        follows = (
            self._can_share
            and oldest is not sequence
            and not sequence.num_output_tokens
        )
        return oldest if follows else None

    def _is_blocked(self, sequence: RunningSequence) -> bool:
        """Return whether a running sequence is about to compute what this one would."""
        leader = self._find_leader(sequence)
        if leader is not None:
            is_prefilled = leader.num_computed >= leader.num_shared_tokens - 1
            has_input = leader.has_encoder_output or not leader.encoder_tokens
            return not (leader.state == "running" and is_prefilled and has_input)
        return any(
            shard.free_rows and shard.is_computing_prefix(sequence)
            for shard in self._shards
        )

    def _place(self, sequence: RunningSequence) -> CacheRows | None:
        """Give a sequence a row where most of its prefix is, then where most pages are
        free; None: there is no room."""
        num_prefilled = sequence.num_shared_tokens - 1
        leader = self._find_leader(sequence)
        if leader is not None:
            shard = self._shards[leader.shard]
            if shard.can_fork(leader, num_prefilled):
                shard.fork(leader, sequence, num_prefilled)
                return shard

        def rank(shard: CacheRows) -> tuple[int, int]:
            num_prefix_pages = len(shard.match_prefix(sequence))
            num_available = sum(pool.num_available for pool in shard.pools)
            return num_prefix_pages, num_available

        for shard in sorted(self._shards, key=rank, reverse=True):
            if shard.place(sequence):
                return shard
        return None

    def _add_decode_steps(self, step: ScheduledStep, max_steps: int) -> None:
        """Let rows decode several tokens in this dispatch: while no prompt is under
        way, none needs the host between, and pages are there without preempting any."""
        rows = [row.sequence for row in step.decode]
        if step.encode or len(rows) < len(self.running):
            return
        if any(sequence.needs_host or sequence.num_drafts for sequence in rows):
            return
        num_steps = max(sequence.num_tokens_left for sequence in rows)
        num_steps = min(num_steps, max_steps)
        for sequence in rows:
            num_tokens = min(num_steps, sequence.num_tokens_left)
            shard = self._shards[sequence.shard]
            num_reserved = shard.reserve(sequence, num_tokens, step.page_copies)
            if num_reserved < num_tokens:
                num_steps = num_reserved
        step.num_steps = num_steps
        step.decode = [
            DecodeRow(sequence, min(num_steps, sequence.num_tokens_left))
            for sequence in rows
        ]

    def _reserve_lookahead(self, step: ScheduledStep) -> None:
        """Give sequences that a token is drawn for pages behind their last tokens, as
        far as there are; they are taken back after the step."""
        counts = {row.sequence: row.num_tokens for row in step.decode}
        counts |= {
            chunk.sequence: chunk.num_tokens for chunk in step.prefill if chunk.samples
        }
        for sequence, num_tokens in counts.items():
            room = self.config.max_length - sequence.num_computed
            num_tokens = min(num_tokens + self.num_lookahead_tokens, room)
            shard = self._shards[sequence.shard]
            shard.reserve(sequence, num_tokens, step.page_copies)

    def _wait(self, sequence: RunningSequence) -> None:
        sequence.state = "waiting"
        sequence.params_version = self.params_version
        insort(self.waiting, sequence, key=get_order)

    def _preempt(self, sequence: RunningSequence) -> None:
        """Take a sequence's row and pages; older ones alone start before it again."""
        self._shards[sequence.shard].release(sequence)
        self._wait(sequence)
        self.num_preemptions += 1


def _count_to_compute(sequence: RunningSequence) -> int:
    return sequence.num_to_compute
