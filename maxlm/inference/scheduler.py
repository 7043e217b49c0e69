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
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.sequences import (
    DecodeRow,
    PrefillChunk,
    RunningSequence,
    ScheduledStep,
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

    def __post_init__(self) -> None:
        config, windows = self.config, self.windows
        self.num_pages = config.count_pages(windows)
        """Pages of each group's pool in one shard, page 0 included."""
        shape = (self.num_shards, config.max_sequences, config.pages_per_sequence)
        self.page_tables = [np.zeros(shape, np.int32) for _ in windows]
        """For each group [shards, rows, pages of the longest sequence]; 0: no page.
        Changed in place."""
        self.waiting: list[RunningSequence] = []
        """Sequences without a row, the next to start first."""
        self.num_preemptions = 0
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
        self, request: GenerationRequest, cache_key: Hashable = None
    ) -> list[RunningSequence]:
        """Queue a request and return its sequences. Requests with different
        ``cache_key`` share no pages (other adapters). Raises MaxlmError: it can never
        run."""
        encoder_tokens = ()
        tokens = request.prompt_tokens
        if self.decoder_start_id is not None:
            encoder_tokens = tokens
            tokens = (self.decoder_start_id,)
        num_virtual = self.num_virtual_tokens
        tokens = (0,) * num_virtual + tokens
        self._check(request, len(tokens))
        if request.request_id in self._requests:
            what = f"a request {request.request_id} is under way"
            raise MaxlmError(what, where="request_id", fix="use another")
        prompts = [(*tokens, *tail[:-1]) for tail in request.continuations]
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
                num_virtual_tokens=num_virtual,
                needs_host=request.grammar is not None
                or bool(request.banned_sequences),
            )
            for index, prompt in enumerate(prompts or [tokens] * request.num_sequences)
        ]
        self._requests[request.request_id] = list(sequences)
        self.waiting += sequences
        return sequences

    def _check(self, request: GenerationRequest, num_prompt_tokens: int) -> None:
        """Refuse a request, with so many tokens of the decoder, virtual ones among
        them, that could not even run alone."""
        where = f"request {request.request_id}"
        config = self.config
        new = request.sampling.max_new_tokens
        if not request.prompt_tokens or request.num_sequences < 1:
            what = "a request needs a token to continue, and a sequence"
            raise MaxlmError(
                what, where=where, fix="give a prompt, and num_sequences of 1 or more"
            )
        if tails := request.continuations:
            is_whole = all(tails) and request.num_sequences == len(tails)
            if not is_whole or request.prompt_logprobs is None:
                what = "continuations have tokens, a sequence each, and prompt_logprobs"
                raise MaxlmError(
                    what, where=where, fix=f"set num_sequences={len(tails)}"
                )
            num_prompt_tokens = num_prompt_tokens + max(map(len, tails)) - 1
            new = 0
        if max(len(request.prompt_tokens), num_prompt_tokens + new) > config.max_length:
            what = f"{len(request.prompt_tokens):,} tokens of prompt and max_new_tokens={new} are "
            longest = config.max_length - self.num_virtual_tokens
            what += f"more than the {longest:,} of the longest sequence (max_length)"
            fix = "shorten the prompt, or ask for fewer new tokens"
            raise MaxlmError(what, where=where, fix=fix)
        for window, num_pages in zip(self.windows, self.num_pages, strict=True):
            # The last token is never read.
            wanted = -(-(num_prompt_tokens + max(new, 1) - 1) // config.page_size)
            if window is not None:
                wanted = min(wanted, count_spanned_pages(window, config.page_size))
            if wanted > num_pages - 1:
                what = f"it needs {wanted:,} pages of {config.page_size} tokens, and the cache has "
                what += f"{num_pages - 1:,} (num_pages)"
                raise MaxlmError(
                    what, where=where, fix="raise num_pages, or ask for fewer tokens"
                )

    def abort(self, request_id: str) -> list[RunningSequence]:
        """End a request's sequences and return them; none where there is no such
        request."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence)
        return sequences

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
        others = self._requests[sequence.request.request_id]
        others.remove(sequence)
        if not others:
            del self._requests[sequence.request.request_id]

    def fork(
        self, sequence: RunningSequence, next_token: int | None = None
    ) -> RunningSequence:
        """Add a sequence that goes on from another's tokens (beam search). Without a
        free row in the same shard it waits. ``next_token`` replaces the last token,
        which is not computed yet."""
        others = self._requests[sequence.request.request_id]
        tokens = (
            sequence.tokens
            if next_token is None
            else [*sequence.tokens[:-1], next_token]
        )
        index = 1 + max(other.index for other in others)
        order = sequence.order[0]
        order = order, next(self._counter)
        target = replace(sequence, index=index, tokens=list(tokens), order=order)
        others.append(target)
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
        sources = {each.index: each for each in self._requests.get(request_id, ())}
        for index in sources.keys() - {index for index, _ in branches}:
            self.finish(sources[index])
        found: list[RunningSequence] = []
        for index, token in branches:
            sequence = sources[index]
            if sequence in found:
                sequence = self.fork(sequence, token)
            sequence.tokens[-1] = token
            found.append(sequence)
        return found

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
        self._add_decode_steps(
            step, min(max_steps or 1 << 30, self.config.decode_steps)
        )
        for shard in self._shards:
            copies = shard.row_copies.items()
            step.row_copies += [(shard.shard, source, row) for row, source in copies]
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
            wanted = 1 + min(sequence.num_drafts, sequence.num_tokens_left - 1)
            while not (num_tokens := shard.reserve(sequence, wanted, step.page_copies)):
                # Those planned before are older, and so never preempted.
                self._preempt(shard.running[-1])
                if sequence.state != "running":
                    break
            else:
                step.decode.append(DecodeRow(sequence, num_tokens))

    def _plan_prefill(self, shard: CacheRows, step: ScheduledStep) -> None:
        """Plan chunks of the prompts that have begun: the shortest first, whole, so
        that none waits for a longer one to end; an equal share of the oldest in any
        case."""
        num_before = len(step.prefill)
        if prompts := [each for each in shard.running if not each.is_decoding]:
            oldest, *others = prompts
            others.sort(key=lambda each: each.num_to_compute)
            chosen = [oldest, *others[: max(0, shard.chunks_left - 1)]]
            wanted = sum(each.num_to_compute for each in chosen)
            shard.tokens_left = self.config.limit_chunk_tokens(
                min(wanted, shard.tokens_left)
            )
            kept = -(-shard.tokens_left // len(chosen))
            for sequence in sorted(chosen, key=lambda each: each.num_to_compute):
                kept = 0 if sequence is oldest else kept
                self._plan_chunk(shard, sequence, step, shard.tokens_left - kept)
        working = [*(row.sequence for row in step.decode), *step.encode]
        if not any(sequence.shard == shard.shard for sequence in working):
            while shard.running and len(step.prefill) == num_before:
                # Nothing but prompts, which hold all pages.
                self._preempt(shard.running[-1])
                if shard.running:
                    self._plan_chunk(shard, shard.running[0], step, shard.tokens_left)

    def _plan_chunk(
        self,
        shard: CacheRows,
        sequence: RunningSequence,
        step: ScheduledStep,
        most: int,
    ) -> None:
        """Plan up to ``most`` tokens of a sequence, as far as the shard's pages
        allow."""
        num_left = sequence.num_to_compute
        prompt_left = not sequence.num_output_tokens
        leads = len(self._requests[sequence.request.request_id]) > 1 and self._can_share
        wanted = num_left
        num_shared = sequence.num_shared_tokens - 1 - sequence.num_computed
        if (
            leads
            and prompt_left
            and num_shared > 0
            and self._find_leader(sequence) is None
        ):
            wanted = num_shared  # the others go on from there
        wanted = min(wanted, most) if shard.chunks_left else 0
        if num_tokens := shard.reserve(sequence, wanted, step.page_copies):
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
            # A copy of a page that it shares in part: the other may be about to write
            # there.
            if decodes or sequence.num_computed % self.config.page_size:
                decodes &= bool(shard.reserve(sequence, 1, step.page_copies))
            if decodes:
                step.decode.append(DecodeRow(sequence, 1))

    def _find_leader(self, sequence: RunningSequence) -> RunningSequence | None:
        """Return the sequence that computes the prompt for a request's others, its
        oldest, unless this is the one, or has output to compute as well."""
        oldest = self._requests[sequence.request.request_id][0]
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
            each.free_rows and each.is_computing_prefix(sequence)
            for each in self._shards
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
            return len(shard.match_prefix(sequence)), sum(
                p.num_available for p in shard.pools
            )

        ranked = sorted(self._shards, key=rank, reverse=True)
        return next((shard for shard in ranked if shard.place(sequence)), None)

    def _add_decode_steps(self, step: ScheduledStep, most: int) -> None:
        """Let rows decode several tokens in this dispatch: while no prompt is under
        way, none needs the host between, and pages are there without preempting any."""
        rows = [row.sequence for row in step.decode]
        if step.encode or len(rows) < sum(len(shard.running) for shard in self._shards):
            return
        if any(sequence.needs_host or sequence.num_drafts for sequence in rows):
            return
        num_steps = min(most, max(each.num_tokens_left for each in rows))
        for sequence in rows:
            wanted = min(num_steps, sequence.num_tokens_left)
            shard = self._shards[sequence.shard]
            got = shard.reserve(sequence, wanted, step.page_copies)
            num_steps = num_steps if got == wanted else got
        step.num_steps = num_steps
        step.decode = [
            DecodeRow(each, min(num_steps, each.num_tokens_left)) for each in rows
        ]

    def _wait(self, sequence: RunningSequence) -> None:
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=lambda each: each.order)

    def _preempt(self, sequence: RunningSequence) -> None:
        """Take a sequence's row and pages; older ones alone start before it again."""
        self._shards[sequence.shard].release(sequence)
        self._wait(sequence)
        self.num_preemptions += 1
