"""Promise: guesses change neither the distribution of what is generated nor how it is
counted."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.speculation import DraftModel
from maxlm.models.architectures.encoder import EncoderConfig
from maxlm.sharding import AxisRules

pytestmark = pytest.mark.heavy

VOCAB = 8
PROMPT = (3, 1)
NUM_SAMPLES = int(os.environ.get("NUM_SAMPLES", 8_000))
BIAS = {"logit_bias": {0: 0.5, 5: -0.5}, "temperature": 1.7, "top_p": 0.95}


@pytest.fixture(scope="module")
def built(one_device_mesh, build_tiny):
    sizes = {"vocab_size": VOCAB, "init_std": 0.3}
    return [build_tiny("llama", one_device_mesh, num_layers=n, **sizes) for n in (2, 1)]


@pytest.fixture
def models(one_device_mesh, built):
    with jax.set_mesh(one_device_mesh):
        yield built


def make_engine(models, num_drafts: int, rows: int) -> Engine:
    model, draft = models
    config = EngineConfig(
        max_sequences=rows,
        max_length=16,
        page_size=8,
        max_chunks=64,
        speculation={"kind": "draft_model", "folder": "", "num_drafts": num_drafts},
    )
    return Engine(
        model.model, model.params, config, draft=DraftModel(draft.model, draft.params)
    )


def test_an_encoder_guesses_for_no_model(models):
    config = EncoderConfig(
        vocab_size=VOCAB,
        num_layers=1,
        d_model=8,
        max_seq_len=16,
        attention={"num_heads": 2, "num_kv_heads": 2, "head_dim": 4},
        mlp={"d_ff": 8},
    )
    encoder = config.build(rules=AxisRules(), dtype=jnp.float32)
    with pytest.raises(MaxlmError, match="an encoder names masked tokens"):
        make_engine([models[0], SimpleNamespace(model=encoder, params={})], 2, 4)


@pytest.fixture(scope="module")
def built_with_mtp(one_device_mesh, build_tiny):
    sizes = {"vocab_size": VOCAB, "init_std": 0.3}
    return build_tiny("llama", one_device_mesh, mtp={"num_modules": 2}, **sizes)


@pytest.mark.more
@pytest.mark.parametrize("kind", ["draft_model", "mtp"])
def test_two_tokens_have_the_joint_distribution_of_exact_enumeration(
    models, built_with_mtp, kind
):
    """Guessed by another model or the model's own modules, temperature and nucleus on;
    probabilities from whole passes."""
    target = models[0]
    engine = make_engine(models, 3, 250)
    if kind == "mtp":
        target = built_with_mtp
        config = EngineConfig.model_validate(
            {
                **engine.config.model_dump(),
                "speculation": {"kind": "mtp", "num_drafts": 3},
            }
        )
        engine = Engine(target.model, target.params, config)
    counts = np.zeros((VOCAB, VOCAB))
    sampling = SamplingConfig(max_new_tokens=4, **BIAS)
    requests = [
        GenerationRequest(str(seed), PROMPT, sampling.model_copy(update={"seed": seed}))
        for seed in range(NUM_SAMPLES)
    ]
    rows: dict[str, list[int]] = {}
    for output in engine.run(requests):
        rows.setdefault(output.request_id, []).extend(output.token_ids)
    for tokens in rows.values():
        counts[tokens[0], tokens[1]] += 1
    joint = np.zeros((VOCAB, VOCAB))
    first = next_distribution(target, PROMPT)
    for token in range(VOCAB):
        joint[token] = first[token] * next_distribution(target, (*PROMPT, token))
    assert counts[joint == 0].sum() == 0
    possible = joint > 0
    assert (
        stats.chisquare(counts[possible], joint[possible] * NUM_SAMPLES).pvalue > 0.001
    )
    accepted = (
        engine.stats().accepted_tokens_total / engine.stats().drafted_tokens_total
    )
    assert 0.2 < accepted < 0.95  # the models differ, and not much


def next_distribution(tiny, text) -> np.ndarray:
    """By hand: bias, temperature, nucleus, in float64."""
    logits = tiny.logits(text)[-1].astype(np.float64)
    for token, bias in BIAS["logit_bias"].items():
        logits[token] += bias
    weights = np.exp(logits / BIAS["temperature"])
    weights /= weights.sum()
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= BIAS["top_p"]]] = 0
    return weights / weights.sum()


@pytest.mark.more
@pytest.mark.parametrize("num_drafts", [2, 5])
def test_tokens_a_step_follow_from_the_rate_of_acceptance(
    models, num_drafts, monkeypatch
):
    """(1 − a^(g+1)) / (1 − a) tokens a step (Leviathan et al. 2023, eq. 1), for guesses
    that are right with probability a wherever they stand: a model without weights,
    always guessed alike."""
    monkeypatch.setattr(
        "maxlm.inference.engine.look_up_prompt",
        lambda tokens, config: [2] * config.num_drafts,
    )
    model = models[0]
    params = jax.tree.map(lambda x: x * 0, model.params)
    a = 0.7
    bias = np.log(a * (VOCAB - 1) / (1 - a))
    speculation = {"kind": "prompt_lookup", "num_drafts": num_drafts}
    config = EngineConfig(
        max_sequences=40,
        max_length=512,
        page_size=32,
        prefix_cache=False,
        speculation=speculation,
    )
    engine = Engine(model.model, params, config)
    sampling = SamplingConfig(max_new_tokens=400, logit_bias={2: float(bias)})
    list(
        engine.run(
            GenerationRequest(
                str(seed), PROMPT, sampling.model_copy(update={"seed": seed})
            )
            for seed in range(40)
        )
    )
    counted = engine.stats()
    steps = (
        counted.drafted_tokens_total / num_drafts
    )  # but for a few cut ones at the ends
    expected = (1 - a ** (num_drafts + 1)) / (1 - a)
    assert 1 + counted.accepted_tokens_total / steps == pytest.approx(
        expected, rel=0.03
    )
