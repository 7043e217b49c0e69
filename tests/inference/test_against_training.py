"""Promise: the engine's log-probabilities are those of a training forward pass, whatever
runs together and however."""

import jax
import numpy as np
import pytest

from benchmarks.engine_trainer import (
    KINDS,
    SETTINGS,
    VOCAB,
    build_case,
    compute_differences,
    compute_kept_mass,
    compute_log_probs,
    compute_logits,
    draw_prompts,
    make_engine,
    run_engine,
)
from maxlm.adapters.lora import LoraAdapter
from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.requests import GenerationRequest

SAMPLED = SamplingConfig(temperature=1.0, max_new_tokens=12)
PROMPTS = draw_prompts(8)
BOUND = 1e-6


@pytest.fixture(scope="module")
def cases(one_device_mesh):
    return {kind: build_case(kind, one_device_mesh) for kind in KINDS}


def check(case, sequences) -> None:
    differences = compute_differences(case, sequences)
    assert len(differences) >= 12 * len(PROMPTS)
    assert np.abs(differences).max() <= BOUND


FEW = (
    ("dense", "together"),
    ("hybrid", "chunks of 3"),
    ("moe", "the trainer's arrays"),
)
CELLS = [
    pytest.param(
        kind, name, marks=pytest.mark.heavy if (kind, name) in FEW else pytest.mark.more
    )
    for kind in KINDS
    for name in SETTINGS
]


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_log_probabilities_are_the_trainer_s(cases, kind, name):
    case = cases[kind]
    engine = make_engine(case, **SETTINGS[name])
    sequences = run_engine(engine, PROMPTS, SAMPLED)
    check(case, sequences)
    if name == "few pages":
        assert engine.stats().preemptions_total or kind == "window"
    if name == "together" and kind != "hybrid":
        # Prompts that begin alike have shared what was computed.
        assert engine.stats().cached_prompt_tokens_total


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.heavy if kind == "dense" else pytest.mark.more
        )
        for kind in KINDS
    ],
)
def test_log_probabilities_are_the_trainer_s_after_a_swap(cases, kind):
    before = cases[kind]
    after = before.with_other_params()
    engine = make_engine(before)
    old_sequences = run_engine(engine, PROMPTS, SAMPLED)
    engine.set_params(after.params)
    sequences = run_engine(engine, PROMPTS, SAMPLED)
    check(after, sequences)
    # A sequence of the old parameters would have been far off.
    assert np.abs(compute_differences(after, old_sequences)).max() > 1e-2


@pytest.mark.heavy
def test_log_probabilities_are_the_trainer_s_on_a_mesh(mesh):
    """Its parameters are stored over fsdp and read over tensor."""
    case = build_case("dense", mesh(fsdp=2, tensor=2))
    engine = make_engine(case, shares_params=True)
    check(case, run_engine(engine, PROMPTS, SAMPLED))


@pytest.mark.parametrize(
    "shares_params",
    [
        pytest.param(False, marks=pytest.mark.more),
        pytest.param(True, marks=pytest.mark.heavy),
    ],
)
def test_an_adapter_that_is_trained_is_generated_with(one_device_mesh, shares_params):
    """The trainer's state has leaves of a base and A and B."""
    case = build_case("dense", one_device_mesh, LoraAdapter(rank=2))
    after = case.with_other_params()
    engine = make_engine(case, shares_params=shares_params)
    engine.set_params(after.params)
    sequences = run_engine(engine, PROMPTS[:2], SAMPLED)
    differences = compute_differences(after, sequences)
    assert np.abs(differences).max() <= BOUND
    assert np.abs(compute_differences(case, sequences)).max() > 1e-2


@pytest.mark.heavy
def test_ratios_have_mean_one_where_filters_cut_the_distribution(cases):
    """Log-probabilities among the tokens that filters keep would have a mean ratio of
    the kept mass."""
    case = cases["dense"]
    sampling = SamplingConfig(top_p=0.8, top_k=50, min_p=0.1, max_new_tokens=16)
    sequences = run_engine(make_engine(case), PROMPTS, sampling, num_sequences=6)
    ratios = np.exp(compute_differences(case, sequences))
    assert len(ratios) == 16 * 6 * len(PROMPTS)
    assert ratios.mean() == pytest.approx(1, abs=1e-6)
    masses = np.concatenate(
        [compute_kept_mass(case, s, sampling) for s in sequences[::6]]
    )
    assert masses.mean() < 0.9


@pytest.mark.heavy
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_a_policy_at_a_temperature_is_one_distribution(cases, temperature):
    """softmax(logits / temperature), on both sides, whatever filters cut and although
    there are ids that the tokenizer does not have."""
    case = cases["dense"]
    sampling = SamplingConfig(temperature=temperature, top_p=0.8, max_new_tokens=12)
    engine = make_engine(case, vocab_size=VOCAB - 13)
    sequences = run_engine(engine, PROMPTS, sampling, scales_logprobs=True)
    assert max(token for s in sequences for token in s.tokens) < VOCAB - 13
    differences = compute_differences(case, sequences, temperature=temperature)
    assert np.abs(differences).max() <= BOUND
    assert np.exp(differences).mean() == pytest.approx(1, abs=1e-6)
    # The model's own probabilities are others, and so is the mean ratio.
    unscaled = run_engine(engine, PROMPTS, sampling)
    assert [s.tokens for s in unscaled] == [s.tokens for s in sequences]
    ratios = np.exp(compute_differences(case, unscaled, temperature=temperature))
    assert abs(ratios.mean() - 1) > 0.05
    # And over the ids of the tokenizer alone they would be larger.
    logits = compute_logits(case, sequences[0])
    shares = np.exp(logits / temperature)
    assert shares[:, : VOCAB - 13].sum() / shares.sum() < 0.9


@pytest.mark.more
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.3, 5), (2.0, 0)])
def test_log_probabilities_are_those_at_temperature_one(cases, temperature, top_k):
    case = cases["dense"]
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, repetition_penalty=1.3, max_new_tokens=12
    )
    sequences = run_engine(make_engine(case), PROMPTS, sampling)
    differences = compute_differences(case, sequences)
    assert np.abs(differences).max() <= 2 * BOUND  # the unlikeliest are larger numbers


@pytest.mark.heavy
def test_the_likeliest_tokens_come_where_they_are_asked_for(cases):
    """A request beside them that wants the chosen token's alone changes nothing."""
    case = cases["dense"]
    engine = make_engine(case)
    requests = [
        GenerationRequest("none", PROMPTS[0], SAMPLED),
        GenerationRequest("chosen", PROMPTS[1], SAMPLED, top_logprobs=0),
        GenerationRequest("three", PROMPTS[1], SAMPLED, top_logprobs=3),
    ]
    entries = {}
    for output in engine.run(requests):
        entries.setdefault(output.request_id, []).extend(output.logprobs)
    assert entries["none"] == []
    assert [entry.logprob for entry in entries["chosen"]] == [
        entry.logprob for entry in entries["three"]
    ]
    assert all(entry.top == () for entry in entries["chosen"])
    for entry in entries["three"]:
        (_, first), (_, second), _ = entry.top
        assert max(second, entry.logprob) <= first < 0


def run_invariant(case, settings):
    engine = make_engine(case, **{"batch_invariant": True, **settings})
    return engine, run_engine(engine, PROMPTS, SAMPLED)


INVARIANT = ("together", "one by one", "chunks of 3", "pages of 3", "few pages")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param("dense", ("chunks of 3",), marks=pytest.mark.heavy),
        pytest.param("dense", tuple(SETTINGS), marks=pytest.mark.more),
        pytest.param("window", INVARIANT, marks=pytest.mark.more),
    ],
)
def test_every_bit_is_the_trainer_s_where_both_are_batch_invariant(
    one_device_mesh, kind, names
):
    case = build_case(kind, one_device_mesh, batch_invariant=True)
    for name in names:
        engine, sequences = run_invariant(case, SETTINGS[name])
        assert np.abs(compute_differences(case, sequences)).max() == 0
    after = case.with_other_params()
    engine.set_params(after.params)
    sequences = run_engine(engine, PROMPTS, SAMPLED)
    assert np.abs(compute_differences(after, sequences)).max() == 0


@pytest.mark.more
def test_a_batch_invariant_pass_is_the_same_function(one_device_mesh):
    """Of the same parameters, log-probabilities and gradients."""
    values = {}
    for batch_invariant in (False, True):
        case = build_case("window", one_device_mesh, batch_invariant=batch_invariant)
        arrays = np.random.default_rng(0).integers(1, 60, (2, 2, 21))
        segments = np.repeat([[1] * 8 + [2] * 10 + [0] * 3], 2, axis=0)
        positions = np.repeat([[*range(8), *range(10), 0, 0, 0]], 2, axis=0)
        batch = {
            "tokens": arrays[0],
            "targets": arrays[1],
            "positions": positions,
            "segment_ids": segments,
        }
        batch = {name: x.astype(np.int32) for name, x in batch.items()}

        @jax.jit
        def differentiate(params, batch=batch, model=case.model):
            def loss(params):
                log_probs = compute_log_probs(model, params, batch)
                return (log_probs * (batch["segment_ids"] > 0)).sum(), log_probs

            return jax.grad(loss, has_aux=True)(params)

        with jax.set_mesh(case.mesh):
            values[batch_invariant] = differentiate(case.params)
    (plain_gradients, plain), (gradients, log_probs) = values.values()
    # What stands in padding, no one reads.
    is_text = segments > 0
    np.testing.assert_allclose(log_probs[is_text], plain[is_text], atol=2e-6)
    for expected, gradient in zip(
        jax.tree.leaves(plain_gradients), jax.tree.leaves(gradients), strict=True
    ):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, atol=2e-5 * largest)


def test_what_is_not_covered_by_batch_invariance_is_refused(cases):
    for kind, name in (
        ("moe", "moe"),
        ("latent", "attention"),
        ("hybrid", "gated_delta_net"),
    ):
        with pytest.raises(MaxlmError, match=f"does not cover .*{name}"):
            make_engine(cases[kind], batch_invariant=True)
    with pytest.raises(MaxlmError, match="a cache of kind int8"):
        make_engine(cases["dense"], batch_invariant=True, cache={"kind": "int8"})
