"""Arrays between the scheduler's plan of a step and the devices."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.inference.adapter_slots import AdapterSlots
from maxlm.inference.banned_sequences import TokenMatcher, fill_draft_masks
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.requests import TokenLogprob
from maxlm.inference.sampling import RowSettings, stack_settings
from maxlm.inference.sequences import PrefillChunk, RunningSequence, ScheduledStep
from maxlm.inference.step import StepInputs, StepOutputs, StepSizes


@dataclass(eq=False)
class InputBuilder:
    """Builds steps' inputs, and finds each sequence's part in their outputs."""

    config: EngineConfig
    num_shards: int
    """D."""
    vocab_size: int
    """The model's."""
    num_drafts: int
    """Tokens that are guessed at most, a step."""
    all_rows: bool
    """Whether every step has all rows, so that caches kept by row are not cut."""
    adapters: AdapterSlots
    """Those that requests may name."""
    is_warm: bool = False
    """Whether no shape is chosen but those of `list_shapes`."""

    def __post_init__(self) -> None:
        self.rows = self.num_shards, self.config.max_sequences
        self._shapes = self.list_shapes()
        self._words = -(-self.vocab_size // 32)
        self._no_history = np.zeros((*self.rows, self.config.max_length), np.int32)
        self._placed: dict[tuple[int, int], RunningSequence] = {}
        self._prompt_lengths = np.zeros(self.rows, np.int32)
        self._settings: RowSettings | None = None
        self._adapter_masks: np.ndarray | None = None

    def list_shapes(self) -> list[StepSizes]:
        """Lists the shapes that plans fit in, the smaller ones first."""
        F, most = self.config.max_chunks, self.config.max_sequences
        widths = dict.fromkeys((1, 1 + self.num_drafts))
        counts = [most if self.all_rows else 1]
        while counts[-1] < most:
            counts.append(min(4 * counts[-1], most))
        most_steps = max(self.config.decode_steps, 1 + self.num_drafts)
        steps = {width: most_steps if width == 1 else 1 for width in widths}
        decode = [StepSizes(b, G, 0, 0, steps[G]) for b in counts for G in widths]
        return decode + [
            StepSizes(most, G, C, F, 1) for C in self.config.chunk_sizes for G in widths
        ]

    def choose_shape(self, plan: ScheduledStep) -> StepSizes:
        """Returns the smallest shape that a plan fits in. Where nothing but
        continuations is read, and their own programs may be compiled, it has no rows
        that decode."""
        width = 1 + self.num_drafts if plan.drafts else 1
        tokens = Counter[int]()
        for chunk in plan.prefill:
            tokens[chunk.sequence.shard] += chunk.num_tokens
        num_rows = 1 + max((row.sequence.row for row in plan.decode), default=-1)
        num_tokens = max(tokens.values(), default=0)
        shape = next(
            each
            for each in self._shapes
            if each.row_tokens == width
            and each.num_rows >= num_rows
            and (each.chunk_tokens >= num_tokens if tokens else not each.chunk_tokens)
        )
        only_reads = tokens and all(
            each.sequence.request.continuations for each in plan.prefill
        )
        no_rows = only_reads and not (plan.decode or self.all_rows or self.is_warm)
        return shape._replace(num_rows=0) if no_rows else shape

    def build(
        self,
        plan: ScheduledStep,
        shape: StepSizes,
        page_tables: Sequence[np.ndarray],
        matchers: Mapping[RunningSequence, TokenMatcher],
    ) -> StepInputs:
        """Builds the inputs of a plan; ``matchers``: of sequences with a grammar or
        banned sequences."""
        D = self.rows[0]
        b, G, C, F, _ = shape
        for part in (*plan.decode, *plan.prefill):
            at = part.sequence.shard, part.sequence.row
            if self._placed.get(at) is not part.sequence:
                self._placed[at], self._settings = part.sequence, None
        asked = [part.sequence.request for part in (*plan.decode, *plan.prefill)]
        inputs = StepInputs(
            tokens=np.zeros((D, b, G), np.int32),
            computed=np.full((D, b), -1, np.int32),
            counts=np.zeros((D, b), np.int32),
            num_steps=np.int32(plan.num_steps),
            chunk_tokens=np.zeros((D, C), np.int32),
            chunk_targets=np.full((D, C), -1, np.int32),
            chunk_rows=np.zeros((D, F), np.int32),
            chunk_starts=np.zeros((D, F), np.int32),
            chunk_sizes=np.zeros((D, F), np.int32),
            chunk_lengths=np.zeros((D, F), np.int32),
            page_tables=tuple(page_tables),
            settings=self._settings or self._stack_settings(),
            history=self._make_history(plan),
            prompt_lengths=self._prompt_lengths,
            allowed=np.zeros((D, b * G + F, self._words), np.uint32),
            has_grammar=np.bool_(bool(matchers)),
            forced_tokens=np.full((D, b * G + F), -1, np.int32),
            logprobs_wanted=np.bool_(
                any(request.top_logprobs is not None for request in asked)
            ),
            adapter_masks=self._adapter_masks,
        )
        for sequence, num_tokens in plan.decode:
            at = sequence.shard, sequence.row
            own = [sequence.tokens[-1], *plan.drafts.get(sequence, ())]
            inputs.tokens[at][: len(own)] = own
            inputs.computed[at], inputs.counts[at] = sequence.num_computed, num_tokens
        for at, begin, (sequence, start, size, _) in self._locate_chunks(plan):
            inputs.chunk_rows[at], inputs.chunk_starts[at] = sequence.row, start
            inputs.chunk_sizes[at], inputs.chunk_lengths[at] = (
                size,
                len(sequence.tokens),
            )
            own = sequence.tokens[start : start + size + 1]
            inputs.chunk_tokens[at[0], begin : begin + size] = own[:size]
            if sequence.request.prompt_logprobs is not None:
                first = max(0, sequence.logprobs_start - 1 - start)
                last = max(first, min(len(own), sequence.num_prompt_tokens - start) - 1)
                targets = inputs.chunk_targets[at[0], begin + first : begin + last]
                targets[:] = own[first + 1 : last + 1]
        if matchers:
            inputs.allowed[:] = np.iinfo(np.uint32).max
        for sequence, (shard, first), _ in self._locate_results(plan, shape):
            if tails := sequence.request.continuations:
                inputs.forced_tokens[shard, first] = tails[sequence.index][-1]
            if matcher := matchers.get(sequence):
                draft = plan.drafts.get(sequence, ())
                masks = inputs.allowed[shard, first : first + 1 + len(draft)]
                fill_draft_masks(matcher, masks, draft)
        return inputs

    def read_results(
        self, result: StepOutputs, shape: StepSizes, plan: ScheduledStep
    ) -> dict[RunningSequence, list[TokenLogprob]]:
        """Returns the tokens of each decoding row, of a draft those that the model drew
        too and the one behind them; and the token behind each chunk that samples."""
        found: dict[RunningSequence, list[TokenLogprob]] = {}
        for sequence, (shard, first), num_tokens in self._locate_results(plan, shape):
            own = found.setdefault(sequence, [])
            draft = plan.drafts.get(sequence, ())
            for i in range(num_tokens):
                step, place = (i, 0) if shape.row_tokens == 1 else (0, i)
                own.append(_read(result, (step, shard, first + place), sequence))
                if i < len(draft) and own[-1].token_id != draft[i]:
                    break
        return found

    def read_prompts(
        self, result: StepOutputs, plan: ScheduledStep
    ) -> Iterator[tuple[PrefillChunk, list[TokenLogprob]]]:
        """Yields chunks of prompts whose log-probabilities are wanted, and the prompt's
        tokens that follow those of the chunk."""
        for (shard, _), begin, chunk in self._locate_chunks(plan):
            sequence, start, size, _ = chunk
            if sequence.request.prompt_logprobs is None:
                continue
            first = max(start + 1, sequence.logprobs_start)
            known = sequence.tokens[
                first : min(start + size + 1, sequence.num_prompt_tokens)
            ]
            begin += first - start - 1
            at = shard, slice(begin, begin + len(known))
            columns = zip(
                known, *(np.asarray(x)[at] for x in result.prompt_logprobs), strict=True
            )
            yield (
                chunk,
                [
                    TokenLogprob(t, float(p), _zip(ids, top))
                    for t, p, ids, top in columns
                ],
            )

    def _locate_chunks(
        self, plan: ScheduledStep
    ) -> list[tuple[tuple[int, int], int, PrefillChunk]]:
        """Each chunk's (shard, place among its chunks), and where its tokens begin
        among them."""
        counts = Counter[int]()
        begins = Counter[int]()
        found = []
        for chunk in plan.prefill:
            shard = chunk.sequence.shard
            found.append(((shard, counts[shard]), begins[shard], chunk))
            counts[shard] += 1
            begins[shard] += chunk.num_tokens
        return found

    def _locate_results(
        self, plan: ScheduledStep, shape: StepSizes
    ) -> Iterator[tuple[RunningSequence, tuple[int, int], int]]:
        """Yields each sequence that tokens are drawn for, the (shard, place) of its
        first result, and the number of its tokens."""
        for sequence, num_tokens in plan.decode:
            yield (
                sequence,
                (sequence.shard, sequence.row * shape.row_tokens),
                num_tokens,
            )
        for (shard, index), _, chunk in self._locate_chunks(plan):
            if chunk.samples:
                place = shape.num_rows * shape.row_tokens + index
                yield chunk.sequence, (shard, place), 1

    def _stack_settings(self) -> RowSettings:
        D, R = self.rows
        placed = [self._placed.get(at) for at in np.ndindex(D, R)]
        placed = [
            each if each and each.state != "finished" else None for each in placed
        ]
        self._prompt_lengths = np.array(
            [each.num_prompt_tokens if each else 0 for each in placed], np.int32
        ).reshape(D, R)
        masks = self.adapters.make_masks(
            [e.request.adapter if e else None for e in placed]
        )
        self._adapter_masks = None if masks is None else masks.reshape(D, R, -1)
        settings = stack_settings(
            [each.request.sampling if each else None for each in placed],
            D * R,
            stop_ids=[each.stop_ids if each else () for each in placed],
            streams=[each.index if each else 0 for each in placed],
        )
        self._settings = RowSettings(*(x.reshape(D, R, *x.shape[1:]) for x in settings))
        return self._settings

    def _make_history(self, plan: ScheduledStep) -> np.ndarray:
        """Each row's tokens, where a setting looks at them; else the same array
        always."""
        sequences = [part.sequence for part in (*plan.decode, *plan.prefill)]
        sequences = [each for each in sequences if each.request.sampling.reads_history]
        if not sequences:
            return self._no_history
        history = np.zeros_like(self._no_history)
        for each in sequences:
            own = [*each.tokens, *plan.drafts.get(each, ())][: history.shape[-1]]
            own[: each.num_virtual_tokens] = [
                -1
            ] * each.num_virtual_tokens  # no token at all
            history[each.shard, each.row, : len(own)] = own
        return history


def _read(
    result: StepOutputs, at: tuple[int, ...], sequence: RunningSequence
) -> TokenLogprob:
    token = int(result.tokens[at])
    chosen, top_ids, top = result.logprobs
    if sequence.request.top_logprobs is None:
        return TokenLogprob(token, 0.0)
    return TokenLogprob(token, float(chosen[at]), _zip(top_ids[at], top[at]))


def _zip(ids: np.ndarray, values: np.ndarray) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
