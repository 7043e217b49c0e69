"""The scheduler drives a device of numpy arrays, where a wrong page shows as a wrong
token."""

from itertools import count

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.requests import GenerationRequest, GrammarSpec
from maxlm.inference.scheduler import Scheduler

VOCAB, STOP = 12, 11


def hash_tokens(sequence, tokens):
    """For each token a number that depends on it and all before it, as keys and values
    do."""
    state = hash(
        (sequence.cache_key, sequence.encoder_tokens)
    )  # of integers: always the same
    states = []
    for token in tokens:
        state = hash((state, token)) % 2**62
        states.append(state)
    return states


def next_token(sequence, state):
    return hash((state, int(sequence.request.request_id), sequence.index)) % VOCAB


class SimulatedDevice:
    """Pages and rows as numpy arrays. A computed token writes its hash to its slot, and
    reads all that it sees through the page tables, where its own sequence's hashes must
    be."""

    def __init__(self, scheduler, rng=None, stop=None):
        self.scheduler, self.rng, self.stop = scheduler, rng, stop
        shards = len(scheduler._shards)
        rows = scheduler.config.max_sequences
        self.size = scheduler.config.page_size
        self.pools = [
            np.zeros((shards, n, self.size), np.int64) for n in scheduler.num_pages
        ]
        self.rows = np.zeros((shards, rows), np.int64)  # the encoder's output
        self.num_prefilled = self.num_copies = self.max_steps = self.num_rejected = 0

    def compute(self, sequence, tokens, start, writers):
        """Compute tokens[start:] of a sequence; returns their hashes."""
        states = hash_tokens(sequence, tokens)
        shard = sequence.shard
        if sequence.encoder_tokens:
            assert self.rows[shard, sequence.row] == hash(sequence.encoder_tokens)
        for group, window in enumerate(self.scheduler.windows):
            table = self.scheduler.page_tables[group][shard, sequence.row]
            pool = self.pools[group][shard]
            for at in range(start, len(tokens)):
                page = table[at // self.size]
                assert page > 0
                assert self.scheduler._shards[shard].pools[group].ref_counts[page] == 1
                assert writers.setdefault((shard, group, page), sequence) is sequence
                pool[page, at % self.size] = states[at]
            seen = np.arange(
                0 if window is None else max(0, start - window + 1), len(tokens)
            )
            stored = pool[table[seen // self.size], seen % self.size]
            np.testing.assert_array_equal(stored, np.array(states)[seen])
        return states[start:]

    def run(self, step, before_finish=lambda: None):
        writers = {}
        pools = [pool.copy() for pool in self.pools]
        for shard, group, source, destination in step.page_copies:
            assert writers.setdefault((shard, group, destination)) is None
            self.pools[group][shard, destination] = pools[group][shard, source]
        assert len(writers) == len(step.page_copies)
        writers.clear()
        self.num_copies += len(step.page_copies)
        rows = self.rows.copy()
        for shard, source, destination in step.row_copies:
            self.rows[shard, destination] = rows[shard, source]
        for sequence in step.encode:
            self.rows[sequence.shard, sequence.row] = hash(sequence.encoder_tokens)
        drawn = {}
        for sequence, num_tokens in step.decode:
            start = sequence.num_computed
            new = []
            assert start == len(sequence.tokens) - 1
            if sequence.num_drafts and num_tokens > 1:
                assert step.num_steps == 1
                drafts = self.rng.integers(0, VOCAB, num_tokens - 1).tolist()
                states = self.compute(
                    sequence, sequence.tokens + drafts, start, writers
                )
                for state, draft in zip(states, [*drafts, None], strict=True):
                    new.append(next_token(sequence, state))
                    if new[-1] != draft:
                        break
                self.num_rejected += num_tokens - len(new)
            else:
                for at in range(num_tokens):
                    tokens = sequence.tokens + new
                    state = self.compute(sequence, tokens, start + at, writers)[-1]
                    new.append(next_token(sequence, state))
            ends = [at for at, token in enumerate(new, 1) if token == self.stop]
            drawn[sequence] = new[: min(ends, default=None)]
        for sequence, start, num_tokens, samples in step.prefill:
            assert start == sequence.num_computed
            end = start + num_tokens
            assert samples == (end == len(sequence.tokens))
            states = self.compute(sequence, sequence.tokens[:end], start, writers)
            if samples:
                drawn[sequence] = [next_token(sequence, states[-1])]
            self.num_prefilled += num_tokens
        config = self.scheduler.config
        parts = [*step.decode, *step.prefill]
        for shard in range(len(self.scheduler._shards)):
            chunks = [
                chunk.num_tokens
                for chunk in step.prefill
                if chunk.sequence.shard == shard
            ]
            assert len(chunks) <= config.max_chunks
            assert sum(chunks) <= config.prefill_tokens
        assert step.num_steps == 1 or len(step.decode) == len(self.scheduler.running)
        assert len({id(part.sequence) for part in parts}) == len(parts)
        self.max_steps = max(self.max_steps, step.num_steps)
        before_finish()
        self.scheduler.finish_step(step, drawn)
        for sequence in self.scheduler.running:
            if sequence.num_tokens_left == 0 or sequence.tokens[-1] == self.stop:
                self.scheduler.finish(sequence)


def check_rest(scheduler, device):
    """At the end, pages are free or in the tree, and free once that is cleared."""
    finish_all(scheduler, device)
    assert not scheduler.running + scheduler.waiting
    every = len(scheduler._shards) * sum(count - 1 for count in scheduler.num_pages)
    assert scheduler.count_available_pages() == every
    assert not any(table.any() for table in scheduler.page_tables)
    for shard in scheduler._shards:
        for group, pool in enumerate(shard.pools):
            while pool.evictable:
                shard.tree.evict(group)
        assert sorted(shard.free_rows) == list(range(scheduler.config.max_sequences))
        for pool, num_pages in zip(shard.pools, scheduler.num_pages, strict=True):
            assert (len(pool.free), any(pool.ref_counts)) == (num_pages - 1, False)
        assert not shard.tree._roots
    assert not scheduler._requests


def make_request(
    tokens,
    number=0,
    new=4,
    *,
    num_sequences=1,
    continuations=(),
    grammar=None,
    prompt_logprobs=None,
):
    return GenerationRequest(
        str(number),
        tuple(tokens),
        SamplingConfig(max_new_tokens=new),
        num_sequences=num_sequences,
        continuations=continuations,
        grammar=grammar,
        prompt_logprobs=prompt_logprobs,
    )


def make_scheduler(windows=(None,), num_shards=1, decoder_start_id=None, **settings):
    config = EngineConfig(**{"max_length": 64, "page_size": 4, **settings})
    return Scheduler(
        config, windows, num_shards=num_shards, decoder_start_id=decoder_start_id
    )


def simulate(windows=(None,), *, rng=None, num_shards=1, **settings: int | bool):
    scheduler = make_scheduler(windows, num_shards, **settings)
    return scheduler, SimulatedDevice(scheduler, rng)


def finish_all(scheduler, device):
    while step := scheduler.schedule():
        device.run(step)


@pytest.mark.parametrize(
    ("windows", "num_pages", "settings"),
    [
        ((None,), 40, {}),
        ((None,), 14, {"max_sequences": 7}),
        ((None, 6), 19, {"page_size": 3}),
        ((5,), 8, {"page_size": 2}),
        ((None, 1, 9), 17, {"num_shards": 2}),
        ((None,), 14, {"prefix_cache": False}),
        ((None,), 12, {"decoder_start_id": 3, "page_size": 2, "max_length": 20}),
        ((), None, {"decode_steps": 3}),
    ],
)
def test_random_traffic_computes_every_token_from_its_own_context(
    windows, num_pages, settings
):
    """Arrivals with common prefixes, several sequences a request, drafts, grammars,
    forks and 500 aborts at any moment over few pages: nothing reads another's page,
    nothing stands still, nothing is left, and sequences get the tokens that they get
    alone."""
    rng = np.random.default_rng(3)
    base = {
        "max_sequences": 5,
        "max_length": 52,
        "decode_steps": 5,
        "num_pages": num_pages,
    }
    base |= {"prefill_tokens": 11, "max_chunks": 3}
    scheduler = make_scheduler(windows, **base | settings)
    device = SimulatedDevice(scheduler, rng, STOP)
    names = count()
    requests = []
    longest = scheduler.config.max_length
    prefixes = [rng.integers(0, 4, longest // 2).tolist() for _ in range(3)]

    def abort_one():
        if scheduler._requests:
            name = rng.choice(list(scheduler._requests))
            alive = list(scheduler._requests[name])
            assert scheduler.abort(name) == alive
            assert {sequence.state for sequence in alive} == {"finished"}
            assert scheduler.abort(name) == []

    for _ in range(800):
        if rng.random() < 0.35:
            prefix = prefixes[rng.integers(3)][: rng.integers(longest // 2)]
            tokens = [*prefix, *rng.integers(0, STOP, rng.integers(1, 9)).tolist()]
            options = {
                "new": int(rng.integers(1, longest - 1 - len(tokens))),
                "num_sequences": int(rng.choice([1, 1, 1, 2, 4])),
                "grammar": GrammarSpec("json_object") if rng.random() < 0.1 else None,
                "prompt_logprobs": 0 if rng.random() < 0.1 else None,
            }
            if rng.random() < 0.2:  # continuations to score
                tails = [
                    rng.integers(0, STOP, rng.integers(1, 9))
                    for _ in range(rng.integers(6))
                ]
                tails = tuple(tuple(tail.tolist()) for tail in [*tails, np.array([1])])
                options |= {
                    "new": 1,
                    "num_sequences": len(tails),
                    "continuations": tails,
                }
                options |= {"grammar": None, "prompt_logprobs": 0}
            request = make_request(tokens, next(names), **options)
            requests += scheduler.add(request, cache_key=int(rng.integers(2)))
        if rng.random() < 0.06:
            abort_one()
        running = scheduler.running
        if running and windows and rng.random() < 0.1:
            source = running[rng.integers(len(running))]
            # Beams: the last token, which is not computed, may be another.
            scheduler.fork(source, 1 if source.num_output_tokens else None)
        for sequence in scheduler.running:
            sequence.num_drafts = int(windows != () and rng.random() < 0.1) * 3
        step = scheduler.schedule()
        if step is None:
            assert not scheduler.running
            assert not scheduler.waiting
            continue
        device.run(step, abort_one if rng.random() < 0.04 else lambda: None)
        for sequence in scheduler.running:
            end = -(-sequence.num_computed // device.size)
            for group, window in enumerate(windows):
                row_pages = scheduler.page_tables[group][
                    sequence.shard, sequence.row
                ].nonzero()[0]
                start = (
                    0 if window is None else max(0, sequence.num_computed - window + 1)
                )
                assert row_pages.tolist() == list(range(start // device.size, end))
    check_rest(scheduler, device)
    for sequence in requests:
        states = hash_tokens(sequence, sequence.tokens)[
            sequence.num_prompt_tokens - 1 :
        ]
        output = sequence.tokens[sequence.num_prompt_tokens :]
        assert output == [next_token(sequence, state) for state in states[:-1]]
    # All of it came up.
    assert device.max_steps == scheduler.config.decode_steps
    assert bool(device.num_copies) == bool(device.num_rejected) == bool(windows)
    assert scheduler.num_preemptions > 5 or num_pages in (None, 40)


@pytest.mark.parametrize("together", [True, False])
def test_requests_share_a_prefix(together):
    """32 requests with 1,000 tokens in common, at once or one after another, hold one
    copy of their pages, and prefill less than a fifth of their tokens."""
    settings = {
        "page_size": 8,
        "max_sequences": 32,
        "prefill_tokens": 4000,
        "max_chunks": 32,
    }
    scheduler, device = simulate(max_length=1040, **settings)
    prefix = np.random.default_rng(1).integers(0, VOCAB, 1000)
    pages = set()
    sequences = []
    for number in range(32):
        tokens = [*prefix.tolist(), number % VOCAB, number]
        sequences += scheduler.add(make_request(tokens, number, new=3))
        if not together:
            finish_all(scheduler, device)
    most = 0
    while step := scheduler.schedule():
        pages |= set(scheduler.page_tables[0][0, :, : 1000 // 8].flat) - {0}
        most = max(most, len(scheduler.running))
        device.run(step)
    assert most == 32 * together
    assert len(pages) == 125 * together
    assert sum(sequence.num_cached_tokens for sequence in sequences) == 31 * 1000
    assert 1000 < device.num_prefilled <= 1000 + 32 * 2 <= 32 * 1002 / 5
    check_rest(scheduler, device)


def test_prompt_of_several_sequences_is_prefilled_once():
    """Its full pages are shared; each sequence but one copies the page that is partly
    filled."""
    scheduler, device = simulate(prefix_cache=False)
    sequences = scheduler.add(make_request(range(23), new=5, num_sequences=7))
    finish_all(scheduler, device)
    assert device.num_prefilled == 22
    assert device.num_copies == 6
    assert [sequence.num_cached_tokens for sequence in sequences] == [0] + [22] * 6
    assert len({tuple(sequence.tokens) for sequence in sequences}) > 1
    check_rest(scheduler, device)


def test_rows_and_steps():
    """Rows are the lowest free ones. Several steps go in one dispatch, none beyond a
    sequence's end, if no prompt is under way and no row needs the host or has
    drafts."""
    scheduler = make_scheduler(max_sequences=3, decode_steps=4, prefill_tokens=8)
    device = SimulatedDevice(scheduler, np.random.default_rng(0))
    sequences = []
    for number, new in enumerate([20, 3, 7, 9]):
        sequences += scheduler.add(make_request([1, 2 + number], number, new))
    step = scheduler.schedule()
    assert [sequence.row for sequence in sequences] == [0, 1, 2, -1]
    device.run(step)
    step = scheduler.schedule()
    assert (step.num_steps, [n for _, n in step.decode]) == (4, [4, 2, 4])
    device.run(step, lambda: scheduler.abort("0"))
    assert [sequence.row for sequence in sequences] == [-1, -1, 2, -1]
    step = scheduler.schedule()
    assert (step.num_steps, sequences[3].row) == (1, 0)
    device.run(step)
    sequences[3].num_drafts = 2
    step = scheduler.schedule()
    assert (step.num_steps, [n for _, n in step.decode]) == (1, [1, 3])
    device.run(step)
    sequences[3].needs_host = True
    assert scheduler.schedule().num_steps == 1


def test_oldest_requests_start_first_and_stay():
    """Where pages run out the youngest sequence waits, and goes on with its output
    before any that came after it."""
    scheduler, device = simulate(num_pages=9, prefix_cache=False, decode_steps=1)
    requests = (make_request([1, 2, 3 + number], number, new=26) for number in range(3))
    first, second, third = (scheduler.add(request)[0] for request in requests)
    for num_preemptions, waiting in enumerate([[third], [second, third]], 1):
        while scheduler.num_preemptions < num_preemptions:
            device.run(scheduler.schedule())
        assert scheduler.waiting == waiting
    assert second.num_output_tokens > 5
    ends = []
    while step := scheduler.schedule():
        device.run(step)
        ends += [
            x for x in (first, second, third) if x.state == "finished" and x not in ends
        ]
    assert ends == [first, second, third]
    check_rest(scheduler, device)


def test_long_prompt_does_not_hold_up_decoding():
    """Each step of a long prompt decodes the other rows as well."""
    scheduler = make_scheduler(max_length=200, prefill_tokens=10)
    device = SimulatedDevice(scheduler)
    (short,) = scheduler.add(make_request([3], 0, new=60))
    device.run(scheduler.schedule())
    (long,) = scheduler.add(make_request(range(100), 1))
    for at in range(10):
        step = scheduler.schedule()
        assert [row.sequence for row in step.decode] == [short]
        assert step.prefill == [(long, at * 10, 10, at == 9)]
        device.run(step)


@pytest.mark.parametrize(
    ("request_", "settings", "error"),
    [
        (
            make_request(range(60), 7, 5),
            {},
            "request 7: 60 tokens .*max_new_tokens=5 .* the 64 ",
        ),
        (make_request([], 7), {}, "request 7: a request needs a token"),
        (
            make_request([1], 7, num_sequences=0),
            {},
            "request 7: a request needs a token",
        ),
        (make_request(range(30), 7, 4), {"num_pages": 9}, "needs 9 pages .* has 8 "),
        (make_request([1], 0), {}, "request_id: a request 0 is under way"),
    ],
)
def test_requests_that_never_can_run_are_refused(request_, settings, error):
    scheduler = make_scheduler(**settings)
    scheduler.add(make_request([1]))
    with pytest.raises(MaxlmError, match=error):
        scheduler.add(request_)
    assert len(scheduler.waiting) == 1


def test_prompt_that_fills_the_pool_runs():
    """What is accepted runs: alone, with every page, windows included."""
    for windows, pages in [((None,), 8), ((None, 7), 8), ((7,), 3)]:
        scheduler = make_scheduler(windows, num_pages=1 + pages)
        for number in range(3):
            scheduler.add(make_request(range(number, 31), number, 2, num_sequences=2))
        check_rest(scheduler, SimulatedDevice(scheduler))


def test_encoder_runs_before_the_first_decode_and_its_row_is_copied():
    """An encoder's input is not split, and counts as prefill. A fork of a fork copies
    the first row, also when that one has ended and its row has another sequence; what
    has ended is not copied to."""
    scheduler, device = simulate(
        decoder_start_id=2, prefill_tokens=8, decode_steps=1, max_sequences=6
    )
    first, other = scheduler.add(make_request(range(30), 0, new=20, num_sequences=2))
    (second,) = scheduler.add(make_request([4], 1, new=20))
    step = scheduler.schedule()
    assert (step.encode, step.decode) == ([first], [(first, 1)])
    device.run(step)
    step = scheduler.schedule()
    assert (step.encode, step.row_copies) == ([second], [(0, 0, 1)])
    assert [row.sequence for row in step.decode] == [first, other, second]
    device.run(step)
    ended, child = scheduler.fork(first), scheduler.fork(first)
    scheduler.finish(ended)
    grandchild = scheduler.fork(child)
    scheduler.finish(scheduler.fork(child))
    scheduler.finish(first)
    (last,) = scheduler.add(make_request(range(9), 2))
    step = scheduler.schedule()
    assert (child.row, grandchild.row, last.row) == (4, 3, 0)
    assert sorted(step.row_copies) == [(0, 0, 3), (0, 0, 4)]
    device.run(step)
    check_rest(scheduler, device)


def test_prompts_start_when_there_are_pages_for_all_of_them():
    """The evictable pages of the prefix itself do not count as free."""
    scheduler, device = simulate(num_pages=20)
    scheduler.add(make_request(range(40), 0, new=2))
    finish_all(scheduler, device)
    scheduler.add(make_request(range(5, 36), 1, new=9))
    device.run(scheduler.schedule())
    (longer,) = scheduler.add(make_request(range(60), 2))
    device.run(scheduler.schedule())
    assert longer.state == "waiting"
    finish_all(scheduler, device)
    assert longer.num_cached_tokens == 36  # the other took a page of it
    assert scheduler.num_preemptions == 0


def test_continuations_share_a_context_of_any_length():
    """Continuations that are scored compute the context once, and its whole pages not
    at all where the tree has them; but always its last token, behind which their first
    ones are looked up."""
    tails = ((1, 2, 3, 4, 5), (2,), (1, 2, 3))
    scheduler, device = simulate(max_sequences=4)
    context = [*range(10), 7]
    for number, cached in enumerate([0, 8]):
        options = {"num_sequences": 3, "continuations": tails, "prompt_logprobs": 0}
        before = device.num_prefilled
        sequences = scheduler.add(make_request(context, number, 1, **options))
        finish_all(scheduler, device)
        # Nothing decodes.
        assert device.num_prefilled - before == len(context) - 1 - cached + 5 + 1 + 3
        assert sequences[0].num_cached_tokens == cached
    check_rest(scheduler, device)


def test_short_prompts_are_read_whole_and_the_oldest_goes_on():
    """Prompts are read in order of what is left of them, but for a share of the
    oldest."""
    scheduler, device = simulate(max_sequences=4, prefill_tokens=32)
    for number, size in enumerate([60, 20, 30, 10]):
        scheduler.add(make_request([number] * size, number))
    plans = []
    for _ in range(2):
        step = scheduler.schedule()
        plans.append(
            [(chunk.sequence.order[0], chunk.num_tokens) for chunk in step.prefill]
        )
        device.run(step)
    assert plans == [[(3, 10), (1, 14), (0, 8)], [(1, 6), (2, 15), (0, 11)]]


def test_prompt_logprobs_need_the_whole_prompt():
    """A prompt whose logits are wanted is computed, though the tree has it."""
    scheduler, device = simulate()
    for number, (logprobs, cached) in enumerate([(None, 0), (None, 20), (0, 0)]):
        request = make_request(range(21), number, prompt_logprobs=logprobs)
        (sequence,) = scheduler.add(request)
        finish_all(scheduler, device)
        assert sequence.num_cached_tokens == cached


def test_little_of_a_step_is_padding():
    """Chunks are computed in sizes of 32, 128 and 512: no step has half of one empty,
    unless a smaller one would do no better."""
    sizes = {}
    for length in (31, 33, 64, 65, 132, 256, 257, 600):
        scheduler = Scheduler(EngineConfig(max_sequences=2, max_length=1024), (None,))
        scheduler.add(
            GenerationRequest("0", (1,) * length, SamplingConfig(max_new_tokens=1))
        )
        device = SimulatedDevice(scheduler)
        sizes[length] = []
        while step := scheduler.schedule():
            sizes[length] += [chunk.num_tokens for chunk in step.prefill]
            device.run(step)
    assert sizes == {
        31: [31],
        33: [32],  # the last one like those that follow it
        64: [32, 32],
        65: [65],
        132: [128, 4],
        256: [128, 128],
        257: [257],
        600: [512, 88],
    }
