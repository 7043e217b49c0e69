"""Arrays between the scheduler's plan of a step and the devices."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.adapter_slots import AdapterSlots
from maxlm.inference.banned_sequences import TokenMatcher, fill_draft_masks
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.prompt_vectors import ChunkVectors
from maxlm.inference.requests import TokenLogprob
from maxlm.inference.sampling import RowSettings, stack_settings
from maxlm.inference.sequences import PrefillChunk, RunningSequence, ScheduledStep
from maxlm.inference.step_arrays import StepInputs, StepOutputs, StepSizes


class _PlacedChunk(NamedTuple):
    """A chunk, and where it stands in a step's arrays."""

    chunk: PrefillChunk
    shard: int
    index: int
    """Its place among its shard's F chunks."""
    begin: int
    """Where its tokens begin among its shard's C tokens of chunks."""


class _PlacedResults(NamedTuple):
    """A sequence that tokens are drawn for, and where a step's arrays have them."""

    sequence: RunningSequence
    shard: int
    place: int
    """Of the first, among its shard's b·G + F results."""
    num_tokens: int


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
    chunk_vectors: ChunkVectors | None = None
    """What puts vectors in place of tokens on the devices; None: no prompt has any."""
    num_mtp_modules: int = 0
    """Modules of ``mtp`` that guess."""
    is_warm: bool = False
    """Whether no shape is chosen but those of `list_shapes`."""

    def __post_init__(self) -> None:
        self.rows = (self.num_shards, self.config.max_sequences)
        """(D, R)."""
        self._shapes = self.list_shapes()
        self._num_mask_words = -(-self.vocab_size // 32)
        self._no_history = np.zeros((*self.rows, self.config.max_length), np.int32)
        self._placed: dict[tuple[int, int], RunningSequence] = {}
        """The last sequence of each (shard, row)."""
        # What depends on the sequences that are placed, and not on their progress: made
        # anew only when another sequence takes a row.
        self._settings: RowSettings | None = None
        self._prompt_lengths = np.zeros(self.rows, np.int32)
        self._adapter_masks: np.ndarray | None = None

    def list_shapes(self) -> list[StepSizes]:
        """Lists the shapes that plans fit in, the smaller ones first."""
        # 1, 4, 16, ... rows up to the most: few shapes to compile, and a step computes
        # fewer than four times the rows it needs.
        max_rows = self.config.max_sequences
        row_counts = [max_rows if self.all_rows else 1]
        while row_counts[-1] < max_rows:
            row_counts.append(min(4 * row_counts[-1], max_rows))

        # Tokens of a row: the last one, and behind it the drafts if there are any.
        widths = [1]
        if self.num_drafts:
            widths.append(1 + self.num_drafts)

        shapes: list[StepSizes] = []
        # The draft model runs a step for each draft, and one more; modules of mtp guess
        # behind each step.
        max_steps = max(self.config.decode_steps, 1 + self.num_drafts)
        if self.num_mtp_modules:
            max_steps = 1
        for num_rows in row_counts:
            for width in widths:
                decoding_shape = StepSizes(
                    num_rows=num_rows,
                    row_tokens=width,
                    chunk_tokens=0,
                    num_chunks=0,
                    # Rows with drafts are verified in one step.
                    max_steps=max_steps if width == 1 else 1,
                )
                shapes.append(decoding_shape)
        for chunk_tokens in self.config.chunk_sizes:
            for width in widths:
                mixed_shape = StepSizes(
                    num_rows=max_rows,
                    row_tokens=width,
                    chunk_tokens=chunk_tokens,
                    num_chunks=self.config.max_chunks,
                    max_steps=1,
                )
                shapes.append(mixed_shape)
        return shapes

    def choose_shape(self, plan: ScheduledStep) -> StepSizes:
        """Returns the smallest shape that a plan fits in. Where nothing but
        continuations is read, and their own programs may be compiled, it has no rows
        that decode."""
        width = 1 + self.num_drafts if plan.drafts else 1
        tokens_by_shard = Counter[int]()
        for chunk in plan.prefill:
            tokens_by_shard[chunk.sequence.shard] += chunk.num_tokens
        max_chunk_tokens = max(tokens_by_shard.values(), default=0)
        # The rows of a step are the first b: the highest one that decodes counts.
        last_row = max((row.sequence.row for row in plan.decode), default=-1)
        num_rows = last_row + 1

        def fits(shape: StepSizes) -> bool:
            has_chunks = shape.chunk_tokens > 0
            if has_chunks != bool(plan.prefill):
                return False
            return (
                shape.row_tokens == width
                and shape.num_rows >= num_rows
                and shape.chunk_tokens >= max_chunk_tokens
            )

        shape = next(shape for shape in self._shapes if fits(shape))
        reads_continuations_alone = (
            bool(plan.prefill)
            and not plan.decode
            and all(chunk.sequence.request.continuations for chunk in plan.prefill)
        )
        may_drop_rows = not (self.all_rows or self.is_warm)
        if reads_continuations_alone and may_drop_rows:
            return shape._replace(num_rows=0)
        return shape

    def build(
        self,
        plan: ScheduledStep,
        shape: StepSizes,
        page_tables: Sequence[np.ndarray],
        matchers: Mapping[RunningSequence, TokenMatcher],
    ) -> StepInputs:
        """Builds the inputs of a plan; ``matchers``: of sequences with a grammar or
        banned sequences."""
        D = self.num_shards
        b, G, C, F, _ = shape
        num_results = b * G + F

        sequences = _list_sequences(plan)
        for sequence in sequences:
            place = (sequence.shard, sequence.row)
            if self._placed.get(place) is not sequence:
                self._placed[place] = sequence
                self._settings = None
        settings = self._settings
        if settings is None:
            settings = self._stack_settings()
        needs_logprobs = any(
            sequence.request.top_logprobs is not None for sequence in sequences
        )
        needs_top_logprobs = any(
            sequence.request.top_logprobs or sequence.request.prompt_logprobs
            for sequence in sequences
        )

        # A step in which nothing happens; what the plan has is written into it below.
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
            settings=settings,
            history=self._make_history(plan),
            prompt_lengths=self._prompt_lengths,
            allowed=np.zeros((D, num_results, self._num_mask_words), np.uint32),
            has_grammar=np.bool_(bool(matchers)),
            forced_tokens=np.full((D, num_results), -1, np.int32),
            needs_logprobs=np.bool_(needs_logprobs),
            needs_top_logprobs=np.bool_(needs_top_logprobs),
            adapter_masks=self._adapter_masks,
            chunk_following=(
                np.zeros((D, C, self.num_mtp_modules), np.int32)
                if self.num_mtp_modules
                else None
            ),
        )
        inputs = self._add_vectors(inputs, plan)
        # Tokens to compute.
        for sequence, num_tokens in plan.decode:
            place = (sequence.shard, sequence.row)
            row_tokens = [sequence.tokens[-1], *plan.drafts.get(sequence, ())]
            inputs.tokens[place][: len(row_tokens)] = row_tokens
            inputs.computed[place] = sequence.num_computed
            inputs.counts[place] = num_tokens
        for placed_chunk in _place_chunks(plan):
            _write_chunk(inputs, placed_chunk)

        # Tokens that may follow.
        if matchers:
            # All bits set: rows without a matcher may draw any token.
            inputs.allowed[:] = np.iinfo(np.uint32).max
        for sequence, shard, place, _ in _place_results(plan, shape):
            continuations = sequence.request.continuations
            if continuations:
                # Chunks read a continuation up to its last token, which is the result.
                last_token = continuations[sequence.index][-1]
                inputs.forced_tokens[shard, place] = last_token
            matcher = matchers.get(sequence)
            if matcher is not None:
                draft = plan.drafts.get(sequence, ())
                # A result behind the row's last token, and one behind each draft.
                num_row_results = 1 + len(draft)
                masks = inputs.allowed[shard, place : place + num_row_results]
                fill_draft_masks(matcher, masks, draft)
        return inputs

    def _add_vectors(self, inputs: StepInputs, plan: ScheduledStep) -> StepInputs:
        """Adds the vectors in place of tokens of a plan's chunks."""
        num_shards, num_tokens = inputs.chunk_tokens.shape
        if self.chunk_vectors is None or not num_tokens:
            return inputs
        numbers = np.zeros((num_shards, num_tokens), np.int32)
        values = None
        for chunk, shard, _, begin in _place_chunks(plan):
            vectors = chunk.sequence.vectors
            if vectors is None:
                continue
            stop = chunk.start + chunk.num_tokens
            first, last = np.searchsorted(vectors.places, [chunk.start, stop])
            places = begin + vectors.places[first:last] - chunk.start
            if not len(places):
                continue
            if values is None:
                values = self.chunk_vectors.allocate(num_shards, num_tokens)
            values[shard, places] = vectors.values[first:last]
            # Each token's vector stands at the token's own place.
            numbers[shard, places] = 1 + places
        if values is None:
            on_devices = self.chunk_vectors.get_zeros(num_shards, num_tokens)
        else:
            on_devices = self.chunk_vectors.put(values)
        return inputs._replace(chunk_vectors=on_devices, chunk_vector_numbers=numbers)

    def read_results(
        self, result: StepOutputs, shape: StepSizes, plan: ScheduledStep
    ) -> dict[RunningSequence, list[TokenLogprob]]:
        """Returns the tokens of each decoding row, of a draft those that the model drew
        too and the one behind them; and the token behind each chunk that samples."""
        tokens: dict[RunningSequence, list[TokenLogprob]] = {}
        for sequence, shard, place, num_tokens in _place_results(plan, shape):
            sequence_tokens = tokens.setdefault(sequence, [])
            draft = plan.drafts.get(sequence, ())
            for i in range(num_tokens):
                # Token i is that of step i; with drafts it is result i of one step.
                if shape.row_tokens == 1:
                    at = (i, shard, place)
                else:
                    at = (0, shard, place + i)
                token = _read_token(result, at, sequence)
                sequence_tokens.append(token)
                # The drafts behind one that the model did not draw are void.
                if i < len(draft) and token.token_id != draft[i]:
                    break
        return tokens

    def read_drafts(
        self, result: StepOutputs, shape: StepSizes, plan: ScheduledStep
    ) -> Iterator[tuple[RunningSequence, list[int]]]:
        """Yields what modules of ``mtp`` guess behind the last token of each sequence
        that tokens are drawn for."""
        if result.drafts is None:
            return
        drafts = np.asarray(result.drafts)
        for sequence, _ in plan.decode:
            yield sequence, drafts[sequence.shard, sequence.row].tolist()
        for chunk, shard, index, _ in _place_chunks(plan):
            if chunk.samples:
                place = shape.num_rows + index
                yield chunk.sequence, drafts[shard, place].tolist()

    def read_routes(
        self, result: StepOutputs, shape: StepSizes, plan: ScheduledStep
    ) -> Iterator[tuple[RunningSequence, np.ndarray]]:
        """Yields the experts [tokens, E, k] of the tokens that each sequence read, also
        of those that void drafts or the end of its output made superfluous."""
        if result.routes is None:
            return
        routes = np.asarray(result.routes)  # [steps, D, b·G + C, E, k]
        for sequence, num_tokens in plan.decode:
            place = sequence.row * shape.row_tokens
            if shape.row_tokens == 1:
                yield sequence, routes[:num_tokens, sequence.shard, place]
            else:
                places = slice(place, place + num_tokens)
                yield sequence, routes[0, sequence.shard, places]
        num_row_tokens = shape.num_rows * shape.row_tokens
        for chunk, shard, _, begin in _place_chunks(plan):
            first = num_row_tokens + begin
            places = slice(first, first + chunk.num_tokens)
            yield chunk.sequence, routes[0, shard, places]

    def read_prompts(
        self, result: StepOutputs, plan: ScheduledStep
    ) -> Iterator[tuple[PrefillChunk, list[TokenLogprob]]]:
        """Yields chunks of prompts whose log-probabilities are requested, and the
        prompt's tokens that follow those of the chunk."""
        for chunk, shard, _, begin in _place_chunks(plan):
            sequence = chunk.sequence
            if sequence.request.prompt_logprobs is None:
                continue
            # Indices in the sequence: the chunk's tokens, moved by one.
            first = max(chunk.start + 1, sequence.logprobs_start)
            end = min(
                chunk.start + 1 + chunk.num_tokens,
                sequence.num_prompt_tokens,
            )
            following = sequence.tokens[first:end]
            # A token's log-probability stands at the place of the one before it.
            first_place = begin + (first - 1 - chunk.start)
            places = slice(first_place, first_place + len(following))
            chosen, top_ids, top = (
                np.asarray(x)[shard, places] for x in result.prompt_logprobs
            )
            tokens = []
            for index, token_id in enumerate(following):
                likeliest = _zip_top(top_ids[index], top[index])
                tokens.append(TokenLogprob(token_id, float(chosen[index]), likeliest))
            yield chunk, tokens

    def _stack_settings(self) -> RowSettings:
        """Stacks what is placed in each row, and keeps it."""
        D, R = self.rows
        num_rows = D * R
        # An empty row has the cheapest settings, and no adapter.
        configs: list[SamplingConfig | None] = [None] * num_rows
        stop_ids: list[tuple[int, ...]] = [()] * num_rows
        streams = [0] * num_rows
        logprobs_temperatures = [1.0] * num_rows
        adapters: list[str | None] = [None] * num_rows
        prompt_lengths = np.zeros(num_rows, np.int32)
        for row, place in enumerate(np.ndindex(D, R)):
            sequence = self._placed.get(place)
            if sequence is None or sequence.state == "finished":
                continue
            configs[row] = sequence.request.sampling
            stop_ids[row] = sequence.stop_ids
            streams[row] = sequence.request.first_stream + sequence.index
            logprobs_temperatures[row] = sequence.request.logprobs_temperature
            adapters[row] = sequence.request.adapter
            prompt_lengths[row] = sequence.num_prompt_tokens
        self._prompt_lengths = prompt_lengths.reshape(D, R)
        masks = self.adapters.make_masks(adapters)
        self._adapter_masks = None if masks is None else masks.reshape(D, R, -1)
        flat_settings = stack_settings(
            configs,
            num_rows,
            stop_ids=stop_ids,
            streams=streams,
            logprobs_temperatures=logprobs_temperatures,
        )
        # [D · R, ...] -> [D, R, ...]
        by_shard = [x.reshape(D, R, *x.shape[1:]) for x in flat_settings]
        self._settings = RowSettings(*by_shard)
        return self._settings

    def _make_history(self, plan: ScheduledStep) -> np.ndarray:
        """Returns each row's tokens, int32 [D, R, T], where a setting looks at them;
        else the same array always."""
        sequences = [
            sequence
            for sequence in _list_sequences(plan)
            if sequence.request.sampling.reads_history
        ]
        if not sequences:
            return self._no_history
        history = np.zeros_like(self._no_history)
        for sequence in sequences:
            tokens = [*sequence.tokens, *plan.drafts.get(sequence, ())]
            tokens = tokens[: history.shape[-1]]
            num_virtual = sequence.num_virtual_tokens
            tokens[:num_virtual] = [-1] * num_virtual  # no token of the vocabulary
            history[sequence.shard, sequence.row, : len(tokens)] = tokens
        return history


def _list_sequences(plan: ScheduledStep) -> list[RunningSequence]:
    """Lists the sequences that have a part in a step."""
    return [part.sequence for part in (*plan.decode, *plan.prefill)]


def _place_chunks(plan: ScheduledStep) -> list[_PlacedChunk]:
    """Places the chunks of each shard one behind the other."""
    num_chunks = Counter[int]()
    num_tokens = Counter[int]()
    placed = []
    for chunk in plan.prefill:
        shard = chunk.sequence.shard
        placed_chunk = _PlacedChunk(
            chunk, shard, index=num_chunks[shard], begin=num_tokens[shard]
        )
        placed.append(placed_chunk)
        num_chunks[shard] += 1
        num_tokens[shard] += chunk.num_tokens
    return placed


def _place_results(plan: ScheduledStep, shape: StepSizes) -> Iterator[_PlacedResults]:
    """Yields each sequence that tokens are drawn for: rows that decode, then chunks."""
    for sequence, num_tokens in plan.decode:
        place = sequence.row * shape.row_tokens
        yield _PlacedResults(sequence, sequence.shard, place, num_tokens)
    num_row_results = shape.num_rows * shape.row_tokens
    for chunk, shard, index, _ in _place_chunks(plan):
        if chunk.samples:
            yield _PlacedResults(chunk.sequence, shard, num_row_results + index, 1)


def _write_chunk(inputs: StepInputs, placed: _PlacedChunk) -> None:
    """Writes a chunk's tokens, and those whose log-probabilities are requested."""
    chunk, shard, index, begin = placed
    sequence, start, num_tokens, _ = chunk
    inputs.chunk_rows[shard, index] = sequence.row
    inputs.chunk_starts[shard, index] = start
    inputs.chunk_sizes[shard, index] = num_tokens
    inputs.chunk_lengths[shard, index] = len(sequence.tokens)
    # The chunk's tokens, and the one behind them where it is known.
    tokens = sequence.tokens[start : start + num_tokens + 1]
    inputs.chunk_tokens[shard, begin : begin + num_tokens] = tokens[:num_tokens]
    if inputs.chunk_following is not None:
        following = inputs.chunk_following[shard, begin : begin + num_tokens]
        for module in range(following.shape[-1]):
            first = start + module + 1
            ahead = sequence.tokens[first : first + num_tokens]
            following[: len(ahead), module] = ahead
            # Behind the known tokens: those that are drawn and guessed.
            num_beyond = num_tokens - len(ahead)
            first_beyond = max(0, first - len(sequence.tokens))
            beyond = np.arange(first_beyond, first_beyond + num_beyond)
            following[len(ahead) :, module] = -1 - beyond
    if sequence.request.prompt_logprobs is None:
        return
    # Places in the chunk, from the first whose next token's log-probability is
    # requested to the last whose next token is known and of the prompt.
    first = max(0, sequence.logprobs_start - 1 - start)
    num_prompt_tokens = min(len(tokens), sequence.num_prompt_tokens - start)
    num_followed = num_prompt_tokens - 1
    end = max(first, num_followed)
    targets = inputs.chunk_targets[shard, begin + first : begin + end]
    targets[:] = tokens[first + 1 : end + 1]


def _read_token(
    result: StepOutputs, at: tuple[int, int, int], sequence: RunningSequence
) -> TokenLogprob:
    """Reads the token at (step, shard, place)."""
    token_id = int(result.tokens[at])
    if sequence.request.top_logprobs is None:
        return TokenLogprob(token_id, 0.0)
    chosen, top_ids, top = result.logprobs
    likeliest = _zip_top(top_ids[at], top[at])
    return TokenLogprob(token_id, float(chosen[at]), likeliest)


def _zip_top(ids: np.ndarray, logprobs: np.ndarray) -> tuple[tuple[int, float], ...]:
    """Returns pairs of token id and log-probability."""
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
