"""Promise: an output token by token, with what layers look up of the input made once,
is that of whole passes; and its attention to the input is computed as other attention
is."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scoring import Scorer
from maxlm.models.architectures.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderConfig,
)
from maxlm.models.params import bind, param_specs
from maxlm.sharding import AxisRules, ShardingConfig
from tests.models.building import change

BOTH: dict[str, Any] = {
    "vocab_size": 53,
    "num_layers": 3,
    "encoder_layers": 2,
    "d_model": 20,
    "max_seq_len": 64,
    "start_id": 4,
    "attention": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "qk_norm": True,
        "sinks": True,
    },
    "mlp": {"d_ff": 28},
    "positions": {"kind": "relative", "buckets": 8, "max_distance": 20},
    "init_std": 0.5,
}
PROMPTS = [[1], [5, 9, 2, 40, 3, 8, 8], list(range(20, 33))]


@pytest.fixture
def both(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        yield built(clip=2.0)


def built(
    rules: AxisRules | None = None, **attention: Any
) -> tuple[EncoderDecoder, Any]:
    config = EncoderDecoderConfig(**BOTH | {"attention": BOTH["attention"] | attention})
    model = config.build(rules=rules or AxisRules(), dtype=jnp.float32)
    return model, random_params(model)


def random_params(model: EncoderDecoder) -> Any:
    def value(spec):
        drawn = (
            np.random.default_rng(spec.shape)
            .normal(0, 0.5, spec.shape)
            .astype(np.float32)
        )
        return jnp.asarray(1 + 0.3 * drawn if spec.role == "vector" else drawn)

    return jax.tree.map(value, param_specs(model))


def forward(model, params, prompt, written) -> np.ndarray:
    """Logits [S, V] of an output [S] for one prompt, by a whole pass."""
    # One width, one compilation: what follows a token does not change its logits.
    output = np.zeros((1, 8), np.int32)
    output[0, : len(written)] = written
    return np.asarray(_forward(model, params, np.array([prompt]), output))[
        0, : len(written)
    ]


@partial(jax.jit, static_argnums=0)
def _forward(model, params, source, output):
    def places(ids):
        return jnp.arange(ids.shape[1], dtype=jnp.int32)[None]

    bound = bind(model, params)
    hidden, _ = bound(output, places(output), inputs=(source, places(source), None))
    return bound.logits(hidden)


@pytest.mark.heavy
def test_greedy_rows_equal_whole_passes(both):
    """More prompts than rows, and two outputs of one of them."""
    check_greedy_rows(*both)


@pytest.mark.more
def test_devices_that_hold_all_keys_answer_alike(mesh):
    two = mesh(tensor=2)
    with jax.set_mesh(two):
        rules = ShardingConfig().compute.for_mesh(dict(two.shape))
        check_greedy_rows(
            *built(rules.model_copy(update={"kv_heads": (), "vocab": ()}))
        )


def check_greedy_rows(model: EncoderDecoder, params: Any) -> None:
    config = EngineConfig(max_sequences=2, max_length=24, page_size=4, decode_steps=3)
    greedy = SamplingConfig(temperature=0, max_new_tokens=5)
    requests = [
        GenerationRequest(str(i), tuple(prompt), greedy, num_sequences=1 + (i == 1))
        for i, prompt in enumerate(PROMPTS)
    ]
    rows = {}
    for output in Engine(model, params, config).run(requests):
        row_tokens = rows.setdefault(
            (int(output.request_id), output.sequence_index), []
        )
        row_tokens += output.token_ids
    assert len(rows) == 4
    for (prompt, _), row in rows.items():
        written = [model.config.start_id]
        for _ in row:
            written.append(
                int(forward(model, params, PROMPTS[prompt], written)[-1].argmax())
            )
        assert row == written[1:]
    assert len({tuple(row) for row in rows.values()}) == len(
        PROMPTS
    )  # the input matters


@pytest.mark.more
@pytest.mark.heavy
def test_outputs_that_are_given_are_scored(both):
    """Behind the token that outputs begin with, with the input read once for all of its
    outputs."""
    model, params = both
    config = EngineConfig(max_sequences=2, max_length=16, page_size=4)
    tails = [[7, 9, 3, 1, 2], [8], [7, 2]]
    pairs = [(prompt, tail) for prompt in PROMPTS for tail in tails]
    engine = Engine(model, params, config)
    scores = Scorer(engine).score(pairs)
    assert engine.stats().generated_tokens_total == 0
    for (prompt, tail), score in zip(pairs, scores, strict=True):
        logits = forward(model, params, prompt, [model.config.start_id, *tail])[:-1]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tail)), tail]
        assert score.logprob == pytest.approx(logprobs.sum(), abs=1e-4)
        assert score.is_greedy == bool((logits.argmax(-1) == tail).all())


@pytest.mark.heavy
def test_queries_and_keys_across_are_normalised_and_values_cut_off(one_device_mesh):
    """So sizes of the former do not matter; of values far beyond the limit only signs
    are left."""
    with jax.set_mesh(one_device_mesh):
        for name, factors, clip in (
            ("query", (1, 3), None),
            ("value", (1e5, 1e6), 2.0),
        ):
            model, params = built(clip=clip)
            for kernel in (name, "key") if name == "query" else (name,):
                both = [
                    change(
                        params, f"layers.cross.{kernel}.kernel", lambda x, f=f: f * x
                    )
                    for f in factors
                ]
                got, same = (forward(model, p, PROMPTS[1], [4, 7, 9]) for p in both)
                np.testing.assert_allclose(got, same, rtol=1e-3, atol=1e-3)
