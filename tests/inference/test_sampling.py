"""Promise: each row's next token is drawn from the distribution that its settings
define, whatever the other rows' are, and no setting compiles anything anew. Compared
with a float64 filter written token by token from the definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, reshard
from scipy.stats import chisquare

from maxlm.config.load import load_config
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.sampling import (
    compute_logprobs,
    compute_sampling_logits,
    make_keys,
    sample_tokens,
    stack_settings,
)
from tests.errors import message

VOCAB, SLOTS = 37, 24
STOPS = (3, 30)


def reference(logits, config, prompt, output, vocab_size=VOCAB) -> np.ndarray:
    """float64 probabilities of one row's next token."""
    x = {i: float(z) for i, z in enumerate(logits) if i < vocab_size}
    text = [*prompt, *output]
    for i, bias in config.logit_bias.items():
        x[i] += bias
    for i in set(text):
        x[i] = (
            x[i] * config.repetition_penalty
            if x[i] < 0
            else x[i] / config.repetition_penalty
        )
    for i in set(output):
        x[i] -= config.frequency_penalty * output.count(i) + config.presence_penalty
    banned = set()
    n = config.no_repeat_ngram_size
    if n:
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        banned = {
            i
            for i in x
            if (*text[len(text) - n + 1 :], i) in grams and len(text) >= n - 1
        }
    if len(output) < config.min_new_tokens:
        banned |= {*STOPS}
    x = {i: z for i, z in x.items() if i not in banned} or x
    if config.temperature == 0:
        return np.eye(len(logits))[max(x, key=lambda i: (x[i], -i))]
    x = {i: z / config.temperature for i, z in x.items()}
    if config.top_k:
        least = sorted(x.values(), reverse=True)[: config.top_k][-1]
        x = {i: z for i, z in x.items() if z >= least}
    p = softmax(x)
    if config.top_p < 1:
        p = softmax(
            {
                i: x[i]
                for i in x
                if sum(q for q in p.values() if q > p[i]) < config.top_p
            }
        )
    p = softmax({i: x[i] for i in p if p[i] >= config.min_p * max(p.values())})
    if config.typical_p < 1:
        entropy = -sum(q * np.log(q) for q in p.values())
        far = {i: abs(-np.log(q) - entropy) for i, q in p.items()}
        closer = {i: sum(p[j] for j in p if far[j] < far[i]) for i in p}
        p = softmax({i: x[i] for i in p if closer[i] < config.typical_p})
    return np.array([p.get(i, 0.0) for i in range(len(logits))])


def softmax(x: dict[int, float]) -> dict[int, float]:
    weights = {i: np.exp(z - max(x.values())) for i, z in x.items()}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


def random_config(rng) -> SamplingConfig:
    """Each setting in force in a third of the rows."""

    def maybe(name, value):
        return {name: value} if rng.random() < 1 / 3 else {}

    bias = {
        int(i): float(rng.normal(0, 3)) for i in rng.choice(VOCAB, 3, replace=False)
    }
    return SamplingConfig(
        temperature=float(rng.choice([0, 0.3, 0.7, 1, 1, 1.3, 2.5])),
        seed=int(rng.integers(2**32)),
        **maybe("logit_bias", bias),
        **maybe("repetition_penalty", float(rng.uniform(0.5, 2))),
        **maybe("frequency_penalty", float(rng.uniform(-2, 2))),
        **maybe("presence_penalty", float(rng.uniform(-2, 2))),
        **maybe("no_repeat_ngram_size", int(rng.integers(1, 5))),
        **maybe("min_new_tokens", int(rng.integers(1, 12))),
        **maybe("top_k", int(rng.integers(1, 45))),
        **maybe("top_p", float(rng.uniform(0.2, 1))),
        **maybe("min_p", float(rng.uniform(0, 0.3))),
        **maybe("typical_p", float(rng.uniform(0.2, 1))),
    )


class Batch:
    """Random rows: few distinct tokens in their texts, so that n-grams come again."""

    def __init__(self, configs, seed=0):
        rng = np.random.default_rng(seed)
        rows = len(configs)
        self.configs = configs
        self.settings = stack_settings(configs, rows, stop_ids=[STOPS] * rows)
        self.logits = rng.normal(0, 1.5, (rows, VOCAB + 3)).astype(np.float32)
        self.history = rng.integers(0, 4, (rows, SLOTS)).astype(np.int32)
        self.prompts = rng.integers(1, 8, rows).astype(np.int32)
        self.lengths = self.prompts + rng.integers(0, 12, rows).astype(np.int32)

    def arrays(self, rows=slice(None)):
        settings = jax.tree.map(lambda x: x[rows], self.settings)
        rest = (self.history, self.prompts, self.lengths)
        return self.logits[rows], settings, *(x[rows] for x in rest)

    def expected(self, row) -> np.ndarray:
        text = self.history[row, : self.lengths[row]].tolist()
        prompt, output = text[: self.prompts[row]], text[self.prompts[row] :]
        return reference(self.logits[row], self.configs[row], prompt, output)


@jax.jit
def step(logits, settings, history, prompts, lengths):
    logits = compute_sampling_logits(
        logits, settings, history, prompts, lengths, vocab_size=VOCAB
    )
    return sample(logits, settings, lengths)


@jax.jit
def sample(logits, settings, lengths):
    """(logits, of greedy rows only the taken token's; tokens)"""
    greedy = settings.temperature == 0
    tokens = sample_tokens(logits, make_keys(settings, lengths), greedy)
    taken = jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.where(greedy[..., None] & ~taken, -jnp.inf, logits), tokens


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    return Batch([random_config(rng) for _ in range(240)])


def test_distributions_are_what_the_settings_define(batch):
    logits, tokens = step(*batch.arrays())
    expected = np.stack([batch.expected(row) for row in range(240)])
    assert (expected > 0).sum(1).min() == 1
    assert np.median((expected > 0).sum(1)) > 3
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-6)
    assert np.all((np.asarray(logits) > -np.inf) == (expected > 0))
    assert np.all(expected[np.arange(240), tokens] > 0)
    assert tokens.dtype == jnp.int32


def test_a_row_does_not_depend_on_the_others(batch):
    logits, tokens = step(*batch.arrays())
    plain = Batch([SamplingConfig()] * 240)
    order = np.random.default_rng(0).permutation(240)
    for rows in (order, np.repeat(order[:8], 30)):
        again, drawn = step(*batch.arrays(rows))
        assert np.array_equal(again, logits[rows])
        assert np.array_equal(drawn, tokens[rows])
    # Among rows that need nothing, only one row's settings decide what runs.
    for row in range(6):
        arrays = jax.tree.map(np.copy, plain.arrays())
        for mine, theirs in zip(
            jax.tree.leaves(arrays), jax.tree.leaves(batch.arrays()), strict=True
        ):
            mine[row] = theirs[row]
        again, drawn = step(*arrays)
        assert np.array_equal(again[row], logits[row])
        assert drawn[row] == tokens[row]


def test_no_setting_compiles_anything():
    one = jax.jit(lambda *arrays: step.__wrapped__(*arrays))  # a cache of its own
    for knobs in (
        {},
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.5, "seed": 7},
        {"repetition_penalty": 1.2, "min_p": 0.1},
        {"no_repeat_ngram_size": 3, "typical_p": 0.5},
        {"logit_bias": {1: 2.0}, "frequency_penalty": 1, "min_new_tokens": 2},
    ):
        configs = [SamplingConfig(), SamplingConfig(**knobs)]
        one(*Batch(configs).arrays())
    assert one._cache_size() == 1


@pytest.mark.heavy
def test_draws_follow_the_probabilities():
    """A vocabulary of several groups, the last one not full."""
    draws, vocab = 100_000, 301
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    settings = stack_settings([SamplingConfig(seed=11, top_p=0.97)], 1)

    @jax.jit
    def draw(positions):
        zero = jnp.zeros((1, 1), jnp.int32)
        process = partial(compute_sampling_logits, vocab_size=vocab - 1)
        processed = process(logits[None], settings, zero, zero[0], zero[0])
        keys = jax.vmap(lambda position: make_keys(settings, position)[0])(positions)
        rows = jnp.broadcast_to(processed, (len(positions), vocab))
        return processed[0], sample_tokens(rows, keys, jnp.zeros(len(positions), bool))

    processed_row, tokens = draw(jnp.arange(draws // 4, dtype=jnp.int32))
    counts = np.bincount(tokens, minlength=vocab)
    for part in range(1, 4):
        _, tokens = draw(jnp.arange(draws // 4, dtype=jnp.int32) + part * draws // 4)
        counts += np.bincount(tokens, minlength=vocab)
    expected = draws * np.asarray(jax.nn.softmax(processed_row), np.float64)
    assert counts[expected == 0].sum() == 0
    assert (expected > 0).sum() > 100
    assert (
        chisquare(counts[expected > 0], expected[expected > 0], sum_check=False).pvalue
        > 1e-3
    )
    # One token after another is independent of the last.
    both = np.bincount(np.asarray(tokens[:-1] % 3 * 3 + tokens[1:] % 3), minlength=9)
    thirds = np.bincount(np.arange(vocab) % 3, expected, 3) / draws
    assert (
        chisquare(
            both, np.outer(thirds, thirds).ravel() * both.sum(), sum_check=False
        ).pvalue
        > 1e-3
    )


def test_draws_differ_by_seed_stream_and_position_alone():
    logits = np.zeros((6, 1000), np.float32)
    configs = [SamplingConfig(seed=seed) for seed in (1, 1, 2**32 - 1, 1, 1, 1)]
    settings = stack_settings(configs, 6, streams=[0, 1, 0, 0, 2**32 - 1, 0])
    keys = make_keys(settings, jnp.asarray([9, 9, 9, 10, 9, 9], jnp.int32))
    tokens = np.asarray(
        sample_tokens(jnp.asarray(logits), keys, np.zeros(6, bool))
    ).tolist()
    assert tokens[0] == tokens[5]
    assert len(set(tokens)) == 5


keep = jax.jit(compute_sampling_logits, static_argnames="vocab_size")


def kept_ids(
    logits,
    history=(),
    output=0,
    vocab_size=None,
    allowed=None,
    **knobs: float | dict[int, float],
) -> list[int]:
    """Tokens that one row may draw."""
    settings = stack_settings([SamplingConfig(**knobs)], 1, stop_ids=[STOPS])
    text = jnp.asarray(
        [[*history, *[0, 1, 2, 3] * 2][:8]], jnp.int32
    )  # the rest does not matter
    length = jnp.asarray([len(history)], jnp.int32)
    x = jnp.asarray([logits], jnp.float32)
    size = vocab_size or len(logits)
    bits = (
        None
        if allowed is None
        else jnp.asarray([[sum(1 << i for i in allowed)]], jnp.uint32)
    )
    x = keep(x, settings, text, length - output, length, vocab_size=size, allowed=bits)
    x, _ = sample(x, settings, length)
    return np.flatnonzero(np.asarray(x[0]) > -np.inf).tolist()


def test_ties():
    x = [0.0, 2.0, 2.0, 1.0, -0.0]
    assert kept_ids(x, temperature=0) == [1]
    assert kept_ids([3.0] * 5, temperature=0) == [0]
    assert kept_ids([-1, -0.0, 0.0, -0.0, -2], temperature=0) == [1]
    assert kept_ids(x, top_k=1) == [1, 2]  # as transformers does
    assert kept_ids(x, top_k=4) == [0, 1, 2, 3, 4]  # the two zeros are equal
    assert kept_ids(x, top_p=1e-320) == [1, 2]
    assert kept_ids(x, temperature=1e-35, top_p=0.999) == [1, 2]


@pytest.mark.heavy
def test_nothing_that_is_not_allowed_is_kept():
    x = [5.0, 4.0, 3.0, 2.0, 1.0, 9.0]
    assert kept_ids(x, vocab_size=5, top_k=3) == [0, 1, 2]
    assert kept_ids(x, vocab_size=5, allowed=[1, 3, 5], top_k=2) == [1, 3]
    assert kept_ids(
        x, vocab_size=5, allowed=[4, 5], logit_bias={0: 99.0}, top_p=0.1
    ) == [4]
    assert kept_ids(x, vocab_size=5, logit_bias={5: 99.0, 77: 1.0}, temperature=0) == [
        0
    ]


@pytest.mark.heavy
def test_bans_that_would_leave_nothing_do_not_hold():
    x = [5.0, 4.0, 3.0, 2.0]
    assert kept_ids(x, min_new_tokens=2) == [0, 1, 2]
    assert kept_ids(x, [0, 0], 2, min_new_tokens=2) == [0, 1, 2, 3]
    assert kept_ids(x, allowed=[3], min_new_tokens=2) == [3]
    assert kept_ids(x, [0, 1, 2], no_repeat_ngram_size=1) == [3]
    assert kept_ids(x, [0, 1, 2], no_repeat_ngram_size=1, min_new_tokens=2) == [
        0,
        1,
        2,
        3,
    ]


def test_repeated_ngrams_by_hand():
    x = [0.0] * 4
    text = [1, 2, 3, 1, 2]
    assert kept_ids(x, text, no_repeat_ngram_size=3) == [0, 1, 2]  # 1 2 3 came
    assert kept_ids(x, text, no_repeat_ngram_size=2) == [0, 1, 2]  # 2 3 came
    assert kept_ids(x, text, no_repeat_ngram_size=4) == [0, 1, 2, 3]
    assert kept_ids(x, [2, 2], no_repeat_ngram_size=2) == [0, 1, 3]
    assert kept_ids(x, [2], no_repeat_ngram_size=2) == [0, 1, 2, 3]
    assert kept_ids(x, [2, 2], no_repeat_ngram_size=10**12) == [0, 1, 2, 3]
    assert kept_ids(x, [], no_repeat_ngram_size=1) == [0, 1, 2, 3]


def test_settings_at_their_limits():
    x = [5.0, 4.0, 3.0]
    assert kept_ids(x, temperature=1e300, vocab_size=2) == [0, 1]
    assert kept_ids(x, top_k=10**12, min_p=1.0) == [0]
    assert kept_ids(x, typical_p=1e-300, min_new_tokens=10**12) == [0]


def test_positions_of_a_draft_are_as_one_after_another(batch):
    """Logits [R, G, V], the draft already in the history."""
    rows, drafts = 240, 3
    _, settings, history, prompts, lengths = batch.arrays()
    several = (
        np.random.default_rng(1)
        .normal(0, 3, (rows, drafts, VOCAB + 3))
        .astype(np.float32)
    )
    ends = lengths[:, None] + np.arange(drafts, dtype=np.int32)
    axes = (1, None, None, None, 1)
    process = jax.vmap(partial(compute_sampling_logits, vocab_size=VOCAB), axes, 1)
    together = jax.jit(process)(several, settings, history, prompts, ends)
    for g in range(drafts):
        alone = keep(
            several[:, g], settings, history, prompts, ends[:, g], vocab_size=VOCAB
        )
        np.testing.assert_allclose(together[:, g], alone, rtol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("shards", [None, pytest.param(4, marks=pytest.mark.more)])
def test_rows_split_over_devices_draw_as_on_one(batch, mesh, shards):
    expected_logits, expected = step(*batch.arrays())
    split = PartitionSpec(("data", "fsdp"))
    arrays = batch.arrays()
    if shards:
        arrays = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), arrays)
    with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2)):
        placed = jax.tree.map(lambda x: reshard(jnp.asarray(x), split), arrays)
        logits, tokens = jax.jit(step.__wrapped__)(*placed)
        chosen, _, _ = jax.jit(partial(compute_logprobs, vocab_size=VOCAB))(
            placed[0], tokens, jnp.asarray(True)
        )
        for result in (logits, tokens, chosen):
            assert jax.typeof(result).sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(logits.reshape(240, -1), expected_logits, rtol=1e-6)
    assert np.array_equal(tokens.reshape(-1), expected)


def test_log_probabilities_are_the_models_own(batch):
    logits = batch.logits[:9]
    tokens = np.arange(9, dtype=np.int32)
    compute = jax.jit(partial(compute_logprobs, vocab_size=VOCAB))
    chosen, ids, values = compute(logits, tokens, jnp.asarray(True))
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))  # over the whole table
    np.testing.assert_allclose(chosen, exact[np.arange(9), tokens], rtol=1e-5)
    likeliest = np.argsort(-exact[:, :VOCAB], axis=-1)[:, :20]
    assert np.array_equal(ids, likeliest)
    np.testing.assert_allclose(
        values, np.take_along_axis(exact, likeliest, -1), rtol=1e-5
    )
    assert ids.dtype == jnp.int32
    assert all(not np.any(x) for x in compute(logits, tokens, jnp.asarray(False)))
    few = compute_logprobs(
        logits[:, :4], tokens[:9] % 4, jnp.asarray(True), vocab_size=3
    )
    assert few[1].shape == (9, 3)


def test_bad_settings_are_refused_in_one_line():
    bad = "temperature=-0.1 top_k=-1 top_p=1.1 max_new_tokens=0 repetition_penalty=0"
    for setting in [*bad.split(), "logit_bias={-1: 2.0}", "logit_bias={1: .inf}"]:
        assert setting.partition("=")[0] in message(
            load_config, SamplingConfig, None, [setting]
        )
    got = message(load_config, SamplingConfig, None, ["top_p=0"])
    assert got == "command line: top_p must be greater than 0, not 0"


def test_all_the_biases_that_a_row_may_have():
    biases = {i: float(i % 7) for i in range(0, 640, 2)}
    settings = stack_settings([None, SamplingConfig(logit_bias=biases)], 3)
    zeros = jnp.zeros((3, 1), jnp.int32)
    process = partial(compute_sampling_logits, vocab_size=640)
    logits = process(jnp.zeros((3, 640)), settings, zeros, zeros[:, 0], zeros[:, 0])
    assert not np.any(logits[::2])
    assert logits[1].tolist() == [biases.get(i, 0.0) for i in range(640)]
