"""Filtered distributions equal those of transformers' own logits processors, in its own
order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.sampling import process_logits, stack_settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROWS, VOCAB, SLOTS = 1000, 307, 40
STOPS = [5, 17]


def random_config(rng) -> SamplingConfig:
    """Each setting in force in a third of the rows; those that transformers has."""

    def maybe(name, value):
        return {name: value} if rng.random() < 1 / 3 else {}

    bias = {
        int(i): float(rng.normal(0, 4)) for i in rng.choice(VOCAB, 9, replace=False)
    }
    return SamplingConfig(
        temperature=float(rng.choice([0, 0.4, 0.8, 1, 1.5, 3])),
        **maybe("logit_bias", bias),
        **maybe("repetition_penalty", float(rng.uniform(0.5, 2))),
        **maybe("no_repeat_ngram_size", int(rng.integers(1, 5))),
        **maybe("min_new_tokens", int(rng.integers(1, 25))),
        **maybe("top_k", int(rng.integers(1, 400))),
        **maybe("top_p", float(rng.uniform(0.1, 1))),
        **maybe("min_p", float(10 ** -rng.uniform(0.3, 3))),
        **maybe("typical_p", float(rng.uniform(0.1, 1))),
    )


def filter_with_transformers(logits, config: SamplingConfig, text, prompt_length):
    """Probabilities of one row, [V]."""
    sampled = config.temperature > 0
    filters = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "typical_p": config.typical_p,
    }
    settings = transformers.GenerationConfig(
        do_sample=sampled,
        sequence_bias={(i,): bias for i, bias in config.logit_bias.items()} or None,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        min_new_tokens=config.min_new_tokens,
        **(filters if sampled else {}),
    )
    settings._eos_token_tensor = torch.tensor(STOPS)
    mixin = transformers.GenerationMixin()
    mixin.config = transformers.PreTrainedConfig()
    processors = mixin._get_logits_processor(
        settings, input_ids_seq_length=prompt_length
    )
    scores = processors(torch.from_numpy(text)[None], torch.from_numpy(logits)[None])
    if not sampled:
        return torch.nn.functional.one_hot(scores.argmax(-1), VOCAB)[0].numpy()
    return scores.softmax(-1)[0].numpy()


def test_a_thousand_random_settings():
    rng = np.random.default_rng(0)
    configs = [random_config(rng) for _ in range(ROWS)]
    logits = rng.normal(0, 2, (ROWS, VOCAB)).astype(np.float32)
    history = rng.integers(0, 30, (ROWS, SLOTS))
    prompts = rng.integers(1, 12, ROWS)
    lengths = prompts + rng.integers(0, 28, ROWS)
    expected = np.stack(
        [
            filter_with_transformers(
                logits[i], config, history[i, : lengths[i]], int(prompts[i])
            )
            for i, config in enumerate(configs)
        ]
    )
    settings = stack_settings(configs, ROWS, stop_ids=[STOPS] * ROWS)
    process = jax.jit(partial(process_logits, vocab_size=VOCAB))
    ours = process(
        logits,
        settings,
        *(jnp.asarray(x, jnp.int32) for x in (history, prompts, lengths)),
    )
    assert 10 < np.median((expected > 0).sum(1)) < VOCAB / 2
    np.testing.assert_allclose(jax.nn.softmax(ours, axis=-1), expected, atol=1e-6)
