"""What is taken out of documents can be put back, token by token; how much, and in how
many spans, is what the papers say; and a row is packed again whole, under the same
numbers."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.tasks.denoising import (
    Denoiser,
    SentinelIds,
    Ul2Task,
    compute_max_lengths,
    corrupt_row,
    corrupt_tokens,
    replace_spans,
)
from maxlm.tasks.mlm import MlmTask
from maxlm.tasks.task import Vocabulary

WORDS = 500
SENTINELS = SentinelIds(first_sentinel=999, eos=501, decoder_start_id=502)
MODES = {"regular_id": 510, "sequential_id": 511, "extreme_id": 512}

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**32)
span_denoisers = st.builds(
    Denoiser,
    density=st.floats(0.01, 0.99),
    mean_span=st.floats(1, 70),
    mode_token_id=st.sampled_from([None, 510]),
)
denoisers = st.one_of(
    span_denoisers,
    st.sampled_from([*Ul2Task().denoisers, *Ul2Task(**MODES).denoisers]),
)


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, WORDS, n).astype(np.int32)


def is_sentinel(ids):
    return (ids > 599) & (ids <= SENTINELS.first_sentinel)


def recover(inputs, targets):
    """The tokens, with each sentinel of the inputs replaced by what follows it in the
    targets."""
    assert inputs[-1] == targets[-1] == SENTINELS.eos
    inputs = inputs[:-1]
    targets = targets[:-1]
    if inputs.size and inputs[0] in MODES.values():
        inputs = inputs[1:]
    assert not targets.size or is_sentinel(targets[0])
    spans = {}
    for token in targets.tolist():
        if is_sentinel(np.array(token)):
            assert token not in spans
            spans[token] = span = []
        else:
            span.append(token)
    tokens = []
    for token in inputs.tolist():
        tokens += spans.pop(token) if is_sentinel(np.array(token)) else [token]
    assert not spans
    return np.array(tokens, np.int32)


@pytest.mark.heavy
@given(sizes, denoisers, seeds)
def test_every_token_can_be_put_back(n, denoiser, seed):
    tokens = text(n, seed)
    rng = np.random.default_rng(seed)
    inputs, targets = corrupt_tokens(tokens, denoiser, SENTINELS, rng)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(recover(inputs, targets), tokens)
    assert (inputs[0] == denoiser.mode_token_id) == (denoiser.mode_token_id is not None)

    sentinels = inputs[is_sentinel(inputs)]
    np.testing.assert_array_equal(
        sentinels, SENTINELS.first_sentinel - np.arange(sentinels.size)
    )
    np.testing.assert_array_equal(targets[is_sentinel(targets)], sentinels)
    assert sentinels.size or n == 1
    # No span is empty, none touches the next, and none comes first.
    assert not (is_sentinel(inputs[:-1]) & is_sentinel(inputs[1:])).any()
    assert not (is_sentinel(targets[:-1]) & ~(targets[1:] < WORDS)).any()
    assert not is_sentinel(inputs[int(denoiser.mode_token_id is not None)])
    for size, least, most in zip(
        (inputs.size, targets.size), denoiser.max_lengths(n), denoiser.max_lengths(n + 1),
        strict=True,
    ):  # fmt: skip
        assert size <= least <= most


@given(sizes, st.floats(0.01, 0.99), st.floats(1, 70), seeds)
def test_noise_has_its_share_in_spans_of_the_mean(n, density, mean, seed):
    denoiser = Denoiser(density, mean)
    noise = denoiser.draw_noise(n, np.random.default_rng(seed))
    opens = np.sum(noise[1:] & ~noise[:-1])
    inputs, targets = replace_spans(text(n), noise, SENTINELS)
    assert denoiser.max_lengths(n) == (inputs.size, targets.size)
    assert denoiser.count_noise_and_spans(n) == (noise.sum(), opens)
    if n == 1:
        assert not noise.any()
        return
    assert not noise[0]
    assert noise[-1]
    assert noise.sum() == np.clip(np.round(n * density), 1, n - 1)
    expected = max(1, np.round(noise.sum() / mean))
    assert opens == min(expected, noise.sum(), n - noise.sum())


def test_every_division_into_spans_is_as_likely():
    """Of 7 tokens, 3 in 2 spans: 3 ways to divide what stays, 2 for what goes."""
    rng = np.random.default_rng(0)
    times = 6000
    denoiser = Denoiser(3 / 7, 1.5)
    counts = Counter(tuple(denoiser.draw_noise(7, rng).tolist()) for _ in range(times))
    every = {
        tuple(
            np.repeat(
                [False, True] * 2, [staying, taken, 4 - staying, 3 - taken]
            ).tolist()
        )
        for staying, taken in product((1, 2, 3), (1, 2))
    }
    assert set(counts) == every
    expected = times / len(every)
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("n", "density", "most"), [(40, 0.25, 19), (9, 0.5, 8), (2, 0.25, 1)]
)
def test_a_prefix_ends_anywhere_up_to_twice_the_mean(n, density, most):
    rng = np.random.default_rng(0)
    times = 4000
    denoiser = Denoiser(density, None)
    noise = np.array([denoiser.draw_noise(n, rng) for _ in range(times)])
    taken = noise.sum(axis=1)
    assert (noise == (np.arange(n) >= n - taken[:, None])).all()
    counts = np.bincount(taken, minlength=n)[1:]
    assert counts[:most].min() > 0.7 * times / most
    assert not counts[most:].any()
    if most > 1:
        assert abs(taken.mean() - density * n) < 0.04 * n


def test_published_examples():
    """The module's own row; T5's 568 tokens, which become 512 inputs and 114 targets;
    UL2's table, of which each is drawn equally often."""
    tokens = np.array([1, 2, 3, 4, 5, 6, 7], np.int32)
    inputs, targets = replace_spans(tokens, np.isin(tokens, (3, 4, 7)), SENTINELS)
    assert inputs.tolist() == [1, 2, 999, 5, 6, 998, 501]
    assert targets.tolist() == [999, 3, 4, 998, 7, 501]
    assert Denoiser().max_lengths(568) == (512, 114)
    mixture = Ul2Task(**MODES).denoisers
    assert sorted((d.mode_token_id, d.mean_span or 0, d.density) for d in mixture) == [
        (510, 3, 0.15), (510, 8, 0.15), (511, 0, 0.25),
        (512, 3, 0.5), (512, 8, 0.5), (512, 64, 0.15), (512, 64, 0.5),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    lengths = {"encoder_len": 4000, "decoder_len": 4000}
    segments = np.repeat(np.arange(1, 501), 4).astype(np.int32)
    row = corrupt_row(text(2000), segments, mixture, SENTINELS, rng, **lengths)
    drawn = Counter(row["input_tokens"][row["input_tokens"] >= 510].tolist())
    for mode, count in {510: 143, 511: 71, 512: 286}.items():
        assert abs(drawn[mode] - count) < 45


@st.composite
def rows(draw):
    """(tokens, segment_ids) as the loader's, with padding at the end."""
    pieces = draw(st.lists(st.integers(1, 60), min_size=0, max_size=6))
    padding = draw(st.integers(0 if pieces else 1, 9))
    segments = np.repeat(np.arange(len(pieces) + 1), [padding, *pieces])
    segments = np.roll(segments, -padding).astype(np.int32)
    tokens = np.where(segments > 0, text(segments.size), 0)
    return tokens.astype(np.int32), segments


ENCODER = ("tokens", "positions")
DECODER = ("tokens", "targets", "positions", "weights")


def side_of(row, prefix, names, number):
    """One segment's part of the arrays of a side."""
    is_in_segment = row[f"{prefix}segment_ids"] == number
    assert (np.diff(np.flatnonzero(is_in_segment)) == 1).all()
    return {name: row[prefix + name][is_in_segment] for name in names}


@given(
    rows(),
    st.sampled_from([(Denoiser(),), Ul2Task().denoisers, Ul2Task(**MODES).denoisers]),
    seeds,
    st.integers(1, 500),
)
def test_a_row_is_packed_again_segment_by_segment(row, mixture, seed, decoder_len):
    tokens, segments = row
    rng = np.random.default_rng(seed)
    lengths = {"encoder_len": 200, "decoder_len": decoder_len}
    corrupted = corrupt_row(tokens, segments, mixture, SENTINELS, rng, **lengths)
    assert {a.dtype for n, a in corrupted.items() if n != "weights"} == {
        np.dtype(np.int32)
    }
    assert corrupted["weights"].dtype == np.float32
    np.testing.assert_array_equal(corrupted["weights"], corrupted["segment_ids"] > 0)
    for prefix, names, size in (("input_", ENCODER, 200), ("", DECODER, decoder_len)):
        padding = corrupted[f"{prefix}segment_ids"] == 0
        assert padding.shape == (size,)
        assert not any(corrupted[prefix + name][padding].any() for name in names)
        assert (np.diff(np.flatnonzero(~padding)) == 1).all()

    numbers = np.setdiff1d(corrupted["segment_ids"], 0)
    # A segment takes three more places than it has tokens: mode, end, a sentinel for
    # one token.
    has_room = min(200, decoder_len) >= segments.size + 3 * segments.max()
    assert numbers.size == segments.max() or not has_room
    np.testing.assert_array_equal(
        numbers, np.setdiff1d(corrupted["input_segment_ids"], 0)
    )
    for number in numbers:
        inputs = side_of(corrupted, "input_", ENCODER, number)
        outputs = side_of(corrupted, "", DECODER, number)
        whole = tokens[segments == number]
        again = recover(inputs["tokens"], outputs["targets"])
        np.testing.assert_array_equal(again, whole[: again.size])
        assert again.size == whole.size or (again.size >= 2 and not has_room)
        shifted = [SENTINELS.decoder_start_id, *outputs["targets"][:-1]]
        np.testing.assert_array_equal(outputs["tokens"], shifted)
        for side in (inputs, outputs):
            np.testing.assert_array_equal(
                side["positions"], np.arange(side["positions"].size)
            )


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([(), (503, 504)]))
def test_a_piece_is_cut_to_the_most_that_fits(pieces, seed, opening):
    """568 tokens in so many pieces, rows of T5's lengths, which hold them as one."""
    rng = np.random.default_rng(seed)
    lengths = Denoiser().max_lengths
    borders = np.sort(rng.choice(np.arange(1, 568), pieces - 1, replace=False))
    numbers = 1 + np.searchsorted(borders, np.arange(568), side="right").astype(
        np.int32
    )
    corrupted = corrupt_row(
        text(568),
        numbers,
        (Denoiser(),),
        SENTINELS._replace(bos_ids=opening),
        rng,
        encoder_len=512,
        decoder_len=120,
    )
    at = 0
    to = 0
    marks = len(opening)
    for n in np.bincount(numbers)[1:]:
        fitting = [
            m
            for m in range(2 if n > 1 else 1, n + 1)
            if at + marks + lengths(m)[0] <= 512 and to + lengths(m)[1] <= 120
        ]
        if fitting:
            inputs, targets = lengths(max(fitting))
            np.testing.assert_array_equal(
                corrupted["input_tokens"][at : at + marks], opening
            )
            at += marks + inputs
            to += targets
    assert np.count_nonzero(corrupted["input_segment_ids"]) == at
    assert np.count_nonzero(corrupted["segment_ids"]) == to


@pytest.mark.parametrize(
    "denoiser", [*Ul2Task().denoisers, *Ul2Task(**MODES).denoisers]
)
def test_room_for_a_document_is_no_more_than_is_used(denoiser):
    rng = np.random.default_rng(0)
    pairs = [corrupt_tokens(text(50), denoiser, SENTINELS, rng) for _ in range(400)]
    most = tuple(max(pair[i].size for pair in pairs) for i in (0, 1))
    assert most == compute_max_lengths(50, (denoiser,))


SPECIAL = np.isin(np.arange(WORDS), [0, 1, 2, 3, 4])
MASK = 4


def masked(row, seed=0, starts_word=None, **settings: float):
    task = MlmTask(mask_id=MASK, whole_words=starts_word is not None, **settings)
    starts = SPECIAL if starts_word is None else starts_word
    vocabulary = Vocabulary(WORDS, (), 0, SPECIAL, starts)
    rng = np.random.default_rng(seed)
    named = dict(zip(("tokens", "segment_ids"), row, strict=True))
    arrays = task.mask_row(vocabulary, named, rng)
    return {name: arrays[name] for name in ("tokens", "targets", "weights")}


@given(rows(), seeds, st.floats(0.01, 0.99), st.booleans())
def test_masked_tokens_can_be_put_back_and_special_ones_stay(row, seed, share, whole):
    tokens, segments = row
    starts = text(WORDS, 3) % 3 == 0 if whole else None
    before = tokens.copy()
    arrays = masked(row, seed, share=share, starts_word=starts)
    np.testing.assert_array_equal(tokens, before)
    assert [a.dtype for a in arrays.values()] == [np.int32, np.int32, np.float32]
    chosen = arrays["weights"] == 1
    assert set(np.unique(arrays["weights"])) <= {0, 1}
    np.testing.assert_array_equal(
        np.where(chosen, arrays["targets"], arrays["tokens"]), tokens
    )
    assert not arrays["targets"][~chosen].any()

    candidates = (segments > 0) & ~SPECIAL[tokens]
    assert not (chosen & ~candidates).any()
    assert not SPECIAL[arrays["tokens"][chosen & (arrays["tokens"] != MASK)]].any()
    budget = max(1, np.round(share * candidates.sum())) if candidates.any() else 0
    if starts is None:
        assert chosen.sum() == budget
    else:
        check_words(tokens, segments, candidates, starts, chosen, budget)


def check_words(tokens, segments, candidates, starts, chosen, budget):
    """Words are chosen whole, and no other would have fitted."""
    words = []
    previous = None
    for i in np.flatnonzero(candidates):
        goes_on = (
            previous == i - 1
            and segments[i] == segments[i - 1]
            and not starts[tokens[i]]
        )
        if goes_on:
            words[-1].append(i)
        else:
            words.append([i])
        previous = i
    assert all(len(set(chosen[word].tolist())) == 1 for word in words)
    left = budget - chosen.sum()
    assert left >= 0
    assert all(len(word) > left for word in words if left and not chosen[word[0]])


def test_chosen_tokens_become_a_mask_another_or_stay():
    row = np.random.default_rng(1).integers(5, WORDS, 200_000).astype(np.int32)
    arrays = masked((row, np.ones_like(row)))
    chosen = arrays["weights"] == 1
    assert chosen.sum() == 30_000
    became = arrays["tokens"][chosen]
    is_mask = became == MASK
    same = became == row[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.01
    assert abs(same.mean() - 0.1 - 0.1 / 495) < 0.007
    others = np.bincount(became[~is_mask & ~same], minlength=WORDS)
    assert not others[:5].any()
    assert (others[5:] > 0).mean() > 0.98  # of about 6 each
    assert np.array_equal(
        masked((row, np.ones_like(row)), masked=0, random=0)["tokens"], row
    )
