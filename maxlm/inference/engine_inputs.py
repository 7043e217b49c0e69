"""Arrays between the scheduler's plan of a step and the devices."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from maxlm.inference.adapter_slots import AdapterSlots
from maxlm.inference.cache_updates import MAX_PAGE_COPIES
from maxlm.inference.grammar import GrammarMatcher
from maxlm.inference.requests import TokenLogprob
from maxlm.inference.sampling import RowSettings, stack_settings
from maxlm.inference.scheduler_config import SchedulerConfig
from maxlm.inference.sequences import (
    DecodeRow,
    PageCopy,
    PrefillChunk,
    ScheduledStep,
    Sequence,
)
from maxlm.inference.step import StepInputs, StepOutputs, StepSizes
from maxlm.models.caches import CacheLayout

MIN_CHUNK = 16
"""Tokens of the smallest size that prompts are computed in, at most."""


class InputBuilder:
    """Builds steps' inputs, and finds each sequence's part in their outputs.

    Args:
        num_shards: D.
        vocab_size: the model's.
        num_drafts: tokens that are guessed at most, a step.
        all_rows: whether every step has all rows, so that caches kept by row are not cut.
        adapters: that requests may name.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        num_shards: int,
        vocab_size: int,
        *,
        num_drafts: int,
        all_rows: bool,
        adapters: AdapterSlots,
    ):
        self.num_drafts = num_drafts
        self.max_steps = max(config.decode_steps, 1 + num_drafts)
        self._all_rows = all_rows
        self.is_warm = False
        """Whether no shape is chosen but those of `list_shapes`."""
        self.config, self.rows = config, (num_shards, config.max_sequences)
        self._words = -(-vocab_size // 32)
        self._no_history = np.zeros((*self.rows, config.max_length), np.int32)
        self._placed: dict[tuple[int, int], Sequence] = {}
        self._prompt_lengths = np.zeros(self.rows, np.int32)
        self._settings: RowSettings | None = None
        self._adapters = adapters
        self._adapter_masks: np.ndarray | None = None

    def list_shapes(self) -> list[StepSizes]:
        """Lists the shapes that plans fit in."""
        config, widths = self.config, dict.fromkeys((1, 1 + self.num_drafts))
        steps = {width: self.max_steps if width == 1 else 1 for width in widths}
        decode = [StepSizes(b, G, 0, 0, steps[G]) for b in self._list_row_counts() for G in widths]
        F, most = config.max_chunks, config.max_sequences
        return decode + [
            StepSizes(most, G, C, F, 1) for C in self._list_chunk_sizes() for G in widths
        ]

    def choose_shape(self, plan: ScheduledStep, *, has_drafts: bool) -> StepSizes:
        """Returns the smallest shape that a plan fits in. Where nothing but continuations is read,
        and their own programs may be compiled, it has no rows that decode."""
        width = 1 + self.num_drafts if has_drafts else 1
        config, tokens = self.config, Counter[int]()
        for chunk in plan.prefill:
            tokens[chunk.sequence.shard] += chunk.num_tokens
        if not tokens:
            used = 1 + max(row.sequence.row for row in plan.decode)
            b = next(count for count in self._list_row_counts() if count >= used)
            return StepSizes(b, width, 0, 0, self.max_steps if width == 1 else 1)
        size = next(size for size in self._list_chunk_sizes() if size >= max(tokens.values()))
        only_reads = all(chunk.sequence.request.continuations for chunk in plan.prefill)
        no_rows = only_reads and not (plan.decode or self._all_rows or self.is_warm)
        b = 0 if no_rows else config.max_sequences
        return StepSizes(b, width, size, config.max_chunks, 1)

    def build(
        self,
        plan: ScheduledStep,
        shape: StepSizes,
        page_tables: Items[np.ndarray],
        drafts: Mapping[Sequence, Items[int]],
        matchers: Mapping[Sequence, GrammarMatcher],
    ) -> StepInputs:
        """Builds the inputs of a plan.

        Args:
            drafts: tokens to verify behind the last ones.
            matchers: of sequences with a grammar.
        """
        D, (b, G, C, F, _) = self.rows[0], shape
        for part in (*plan.decode, *plan.prefill):
            at = part.sequence.shard, part.sequence.row
            if self._placed.get(at) is not part.sequence:
                self._placed[at], self._settings = part.sequence, None
        tokens = np.zeros((D, b, G), np.int32)
        computed, counts = np.full((D, b), -1, np.int32), np.zeros((D, b), np.int32)
        for sequence, num_tokens in plan.decode:
            at = sequence.shard, sequence.row
            own = [sequence.tokens[-1], *drafts.get(sequence, ())]
            tokens[at][: len(own)] = own
            computed[at], counts[at] = sequence.num_computed, num_tokens
        chunk_tokens, chunk_targets = np.zeros((D, C), np.int32), np.full((D, C), -1, np.int32)
        rows, starts, sizes, lengths = np.zeros((4, D, F), np.int32)
        for at, begin, (sequence, start, size, _) in self._locate_chunks(plan):
            rows[at], starts[at], sizes[at] = sequence.row, start, size
            lengths[at] = len(sequence.tokens)
            own = sequence.tokens[start : start + size + 1]
            chunk_tokens[at[0], begin : begin + size] = own[:size]
            if sequence.request.prompt_logprobs is not None:
                first = max(0, sequence.logprobs_start - 1 - start)
                last = min(len(own), sequence.num_prompt_tokens - start) - 1
                chunk_targets[at[0], begin + first : begin + last] = own[first + 1 : last + 1]
        asked = [part.sequence.request for part in (*plan.decode, *plan.prefill)]
        return StepInputs(
            tokens=tokens,
            computed=computed,
            counts=counts,
            num_steps=np.int32(plan.num_steps),
            chunk_tokens=chunk_tokens,
            chunk_targets=chunk_targets,
            chunk_rows=rows,
            chunk_starts=starts,
            chunk_sizes=sizes,
            chunk_lengths=lengths,
            page_tables=tuple(page_tables),
            settings=self._settings or self._stack_settings(),
            history=self._make_history(plan, drafts),
            prompt_lengths=self._prompt_lengths,
            allowed=self._make_masks(plan, shape, drafts, matchers),
            has_grammar=np.bool_(bool(matchers)),
            forced_tokens=self._stack_forced_tokens(plan, shape),
            logprobs_wanted=np.bool_(any(request.top_logprobs is not None for request in asked)),
            adapter_masks=self._adapter_masks,
        )

    def stack_page_copies(
        self, copies: Items[PageCopy], windows: Items[int | None], layout: CacheLayout
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Builds the arguments of :func:`~maxlm.inference.cache_updates.copy_pages`."""
        shape, stacked = (self.rows[0], MAX_PAGE_COPIES), {}
        for group, window in enumerate(windows):
            sources = np.zeros(shape, np.int32)
            destinations = np.full(shape, layout.count_pages(window), np.int32)
            for place, copy in enumerate(copies):
                if copy.group == group:
                    sources[copy.shard, place] = copy.source
                    destinations[copy.shard, place] = copy.destination
            stacked[str(window)] = sources, destinations
        return stacked

    def read_row(
        self, result: StepOutputs, shape: StepSizes, row: DecodeRow, draft: Items[int]
    ) -> list[TokenLogprob]:
        """Returns the tokens of a decoding row: of a draft those that the model drew too, and the
        one behind them."""
        (sequence, num_tokens), G, found = row, shape.row_tokens, []
        for i in range(num_tokens):
            step, place = (i, 0) if G == 1 else (0, i)
            at = step, sequence.shard, sequence.row * G + place
            found.append(_read((result.tokens, result.logprobs), at, sequence))
            if G > 1 and i < len(draft) and found[-1].token_id != draft[i]:
                break
        return found

    def read_chunk(
        self, result: StepOutputs, shape: StepSizes, plan: ScheduledStep, place: int
    ) -> TokenLogprob:
        """Returns the token behind a plan's chunk."""
        (shard, index), _, chunk = self._locate_chunks(plan)[place]
        at = 0, shard, shape.num_rows * shape.row_tokens + index
        return _read((result.tokens, result.logprobs), at, chunk.sequence)

    def read_prompt(
        self, result: StepOutputs, plan: ScheduledStep, place: int
    ) -> list[TokenLogprob]:
        """Returns the tokens of the prompt that follow those of a plan's chunk."""
        (shard, _), begin, (sequence, start, size, _) = self._locate_chunks(plan)[place]
        first = max(start + 1, sequence.logprobs_start)
        known = sequence.tokens[first : min(start + size + 1, sequence.num_prompt_tokens)]
        begin += first - start - 1
        chosen, top_ids, top = (np.asarray(x)[shard, begin:] for x in result.prompt_logprobs)
        return [
            TokenLogprob(token, float(chosen[i]), _zip(top_ids[i], top[i]))
            for i, token in enumerate(known)
        ]

    def _list_row_counts(self) -> list[int]:
        most = self.config.max_sequences
        counts = [most if self._all_rows else 1]
        while counts[-1] < most:
            counts.append(min(4 * counts[-1], most))
        return counts

    def _list_chunk_sizes(self) -> list[int]:
        sizes = [self.config.prefill_tokens]
        while sizes[0] >= 4 * MIN_CHUNK:
            sizes.insert(0, -(-sizes[0] // 4))
        return sizes

    def _locate_chunks(
        self, plan: ScheduledStep
    ) -> list[tuple[tuple[int, int], int, PrefillChunk]]:
        """Each chunk's (shard, place among its chunks), and where its tokens begin among them."""
        counts, begins, found = Counter[int](), Counter[int](), []
        for chunk in plan.prefill:
            shard = chunk.sequence.shard
            found.append(((shard, counts[shard]), begins[shard], chunk))
            counts[shard] += 1
            begins[shard] += chunk.num_tokens
        return found

    def _stack_settings(self) -> RowSettings:
        D, R = self.rows
        at = [(shard, row) for shard in range(D) for row in range(R)]
        placed = [self._placed.get(each) for each in at]
        self._prompt_lengths = np.array(
            [each.num_prompt_tokens if each else 0 for each in placed], np.int32
        ).reshape(D, R)
        masks = self._adapters.make_masks([e.request.adapter if e else None for e in placed])
        self._adapter_masks = None if masks is None else masks.reshape(D, R, -1)
        settings = stack_settings(
            [each.request.sampling if each else None for each in placed],
            D * R,
            stop_ids=[each.stop_ids if each else () for each in placed],
            streams=[each.index if each else 0 for each in placed],
        )
        self._settings = RowSettings(*(x.reshape(D, R, *x.shape[1:]) for x in settings))
        return self._settings

    def _stack_forced_tokens(self, plan: ScheduledStep, shape: StepSizes) -> np.ndarray:
        """Last tokens of continuations that are scored, int32 [D, b·G + F]; -1: one is drawn."""
        b, G, _, F, _ = shape
        forced = np.full((self.rows[0], b * G + F), -1, np.int32)
        for sequence, _ in plan.decode:
            if tails := sequence.request.continuations:
                forced[sequence.shard, sequence.row * G] = tails[sequence.index][-1]
        for (shard, index), _, chunk in self._locate_chunks(plan):
            if chunk.samples and (tails := chunk.sequence.request.continuations):
                forced[shard, b * G + index] = tails[chunk.sequence.index][-1]
        return forced

    def _make_history(
        self, plan: ScheduledStep, drafts: Mapping[Sequence, Items[int]]
    ) -> np.ndarray:
        """Each row's tokens, where a setting looks at them; else the same array always."""
        sequences = [part.sequence for part in (*plan.decode, *plan.prefill)]
        sequences = [each for each in sequences if each.request.sampling.reads_history]
        if not sequences:
            return self._no_history
        history = np.zeros_like(self._no_history)
        for each in sequences:
            own = [*each.tokens, *drafts.get(each, ())][: history.shape[-1]]
            own[: each.num_virtual_tokens] = [-1] * each.num_virtual_tokens  # no token at all
            history[each.shard, each.row, : len(own)] = own
        return history

    def _make_masks(
        self,
        plan: ScheduledStep,
        shape: StepSizes,
        drafts: Mapping[Sequence, Items[int]],
        matchers: Mapping[Sequence, GrammarMatcher],
    ) -> np.ndarray:
        """Tokens that grammars allow, uint32 [D, b·G + F, words]."""
        (b, G, _, F, _), full = shape, np.iinfo(np.uint32).max
        size = self.rows[0], b * G + F, self._words
        if not matchers:
            return np.zeros(size, np.uint32)
        masks = np.full(size, full, np.uint32)
        for sequence, _ in plan.decode:
            if matcher := matchers.get(sequence):
                draft = drafts.get(sequence, ())
                begin = sequence.row * G
                matcher.fill_draft_masks(
                    masks[sequence.shard, begin : begin + 1 + len(draft)], draft
                )
        for (shard, index), _, chunk in self._locate_chunks(plan):
            if chunk.samples and (matcher := matchers.get(chunk.sequence)):
                matcher.fill_mask(masks[shard, b * G + index])
        return masks


def _read(arrays: Any, at: tuple[int, ...], sequence: Sequence) -> TokenLogprob:
    tokens, (chosen, top_ids, top) = arrays
    token = int(tokens[at])
    if sequence.request.top_logprobs is None:
        return TokenLogprob(token, 0.0)
    return TokenLogprob(token, float(chosen[at]), _zip(top_ids[at], top[at]))


def _zip(ids: np.ndarray, values: np.ndarray) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
