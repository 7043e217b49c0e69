"""Promise: prefixes and prompts stand before every example, in packed rows, on meshes
and in the engine alike, and nothing else is trained."""

import json
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.adapters.virtual_tokens import (
    PrefixAdapter,
    PromptAdapter,
    from_peft,
    to_peft,
)
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.embedding import Embedder
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scoring import Scorer
from maxlm.inference.search.beam import BeamSearchConfig, beam_search
from maxlm.models.adapters import Adapter
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import bind, flatten_names, param_specs, select_base_params
from maxlm.models.transforms import build_transformed_model
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import make_global_batch
from maxlm.run.setup import set_up_run
from maxlm.sharding import AxisRules
from tests.errors import message
from tests.models.building import CONFIGS
from tests.train import tiny

N = 5
ADAPTERS = {
    "prefix": PrefixAdapter(num_virtual_tokens=N),
    "prompt": PromptAdapter(num_virtual_tokens=N),
}
# Windows, several stacks, norms of keys, scaled embeddings, a tied head; a table of
# positions.
MODELS = {
    name: CONFIGS[name].model_copy(update={"max_seq_len": 48, "num_layers": layers})
    for name, layers in {"pattern": 3, "gpt2": 2}.items()
}
PROMPTS = [[1], [5, 9, 2, 20, 3, 8, 8], [7, 7], list(range(8, 28))]
SMALL = {"max_sequences": 4, "max_length": 40, "page_size": 4, "prefill_tokens": 16}
GREEDY = SamplingConfig(temperature=0, max_new_tokens=8)


@dataclass(frozen=True)
class Adapted:
    model: Any
    params: Any

    def logits(self, *segments: list[int], dummy: int = 0) -> list[np.ndarray]:
        """Logits [S, V] of real tokens, behind virtual ones, of segments in one row."""
        rows = []
        n = self.model.num_virtual_tokens
        for number, segment in enumerate(segments, 1):
            ids = [dummy] * n + segment
            rows += [(token, place, number) for place, token in enumerate(ids)]
        rows += [(0, 0, 0)] * (48 - len(rows))
        arrays = (np.array([column], np.int32) for column in zip(*rows, strict=True))
        logits = np.asarray(_forward(self.model, self.params, *arrays)[1])[0]
        segment_logits = []
        for segment in segments:
            segment_logits.append(logits[n : n + len(segment)])
            logits = logits[n + len(segment) :]
        return segment_logits

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        text = list(prompt)
        for _ in range(steps):
            text.append(int(self.logits(text)[0][-1].argmax()))
        return text[len(prompt) :]

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.model, self.params, EngineConfig(**{**SMALL, **settings}))


@jax.jit(static_argnums=0)
def _forward(model, params, tokens, positions, segment_ids):
    bound = bind(model, params)
    hidden, _ = bound(tokens, positions, segment_ids)
    return hidden, bound.logits(hidden)


def build(config: DecoderConfig, adapter: Adapter | None) -> Adapted:
    model = build_transformed_model(
        config,
        [] if adapter is None else [adapter],
        rules=AxisRules(),
        dtype=jnp.float32,
    )
    random = np.random.default_rng(0)

    def draw(spec: Any) -> jax.Array:
        return jnp.asarray(0.4 * random.standard_normal(spec.shape), jnp.float32)

    return Adapted(model, jax.tree.map(draw, param_specs(model)))


def build_base(adapted: Adapted) -> Adapted:
    """The model without its adapter, with the same parameters."""
    return Adapted(
        build(adapted.model.config, None).model, select_base_params(adapted.params)
    )


@pytest.fixture(scope="module")
def built(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        return {
            (name, kind): build(config, adapter)
            for name, config in MODELS.items()
            for kind, adapter in ADAPTERS.items()
        }


@pytest.fixture(params=["prefix", pytest.param("prompt", marks=pytest.mark.slow)])
def kind(request):
    return request.param


@pytest.fixture
def adapted(kind, built, one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        yield built["pattern", kind]


@pytest.mark.heavy
def test_segments_of_a_row_have_virtual_tokens_each_whatever_their_ids(adapted):
    expected = [adapted.logits(prompt)[0] for prompt in PROMPTS[:3]]
    for one, other in zip(
        expected, adapted.logits(*PROMPTS[:3], dummy=17), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    base = build_base(adapted)
    assert np.abs(expected[1] - base.logits(PROMPTS[1])[0]).max() > 0.1


def test_a_prompt_of_given_tokens_begins_as_these_tokens(one_device_mesh):
    adapter = PromptAdapter(num_virtual_tokens=N, init_token_ids=(3, 11))
    with jax.set_mesh(one_device_mesh):
        adapted = build(MODELS["pattern"], adapter)
        adapted = Adapted(adapted.model, adapter.init_from_base(adapted.params))
        base = build_base(adapted)
        expected = base.logits([3, 11, 3, 11, 3, *PROMPTS[1]])[0][N:]
        np.testing.assert_array_equal(adapted.logits(PROMPTS[1])[0], expected)


@pytest.mark.heavy
def test_a_prefix_of_a_texts_own_keys_and_values_is_that_text(one_device_mesh):
    """Of one layer, whose keys and values of a token are known without attention."""
    config = CONFIGS["no_positions"].model_copy(
        update={"num_layers": 1, "max_seq_len": 48}
    )
    with jax.set_mesh(one_device_mesh):
        adapted = build(config, ADAPTERS["prefix"])
        base = build_base(adapted)
        model = bind(base.model, base.params)
        block = bind(model.layers, jax.tree.map(lambda x: x[0], base.params["layers"]))
        x = block.attention_norm(model.embed(*np.array([[[3, 4, 6, 7, 9]], [[0] * N]])))
        keys_values = block.attention.project_keys_values(x)._asdict().items()
        layers = adapted.params["layers"]
        kernels = {name: layers["attention"][name]["kernel"] for name, _ in keys_values}
        attention = {
            n: {"kernel": replace(kernels[n], virtual=vectors)}
            for n, vectors in keys_values
        }
        attention = {**layers["attention"], **attention}
        params = {**adapted.params, "layers": {**layers, "attention": attention}}
        expected = base.logits([3, 4, 6, 7, 9, *PROMPTS[1]])[0][N:]
        logits = Adapted(adapted.model, params).logits(PROMPTS[1])[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.more
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        ("pattern", {"speculation": {"kind": "prompt_lookup", "num_drafts": 2}}),
    ],
)
def test_greedy_rows_equal_full_forward_passes(
    built, one_device_mesh, name, kind, settings
):
    with jax.set_mesh(one_device_mesh):
        adapted = built[name, kind]
        engine = adapted.engine(**settings)
        for _ in range(2):  # at first nothing is cached
            requests = [
                GenerationRequest(str(i), tuple(p), GREEDY)
                for i, p in enumerate(PROMPTS)
            ]
            generated: dict[str, list[int]] = {}
            for output in engine.run(requests):
                generated.setdefault(output.request_id, []).extend(output.token_ids)
                request = requests[int(output.request_id)]
                assert output.num_cached_tokens < len(request.prompt_tokens)
            assert [generated[str(i)] for i in range(4)] == [
                adapted.greedy(p, 8) for p in PROMPTS
            ]
        stats = engine.stats()
    assert stats.prompt_tokens_total == 2 * sum(map(len, PROMPTS))
    assert 0 < stats.cached_prompt_tokens_total < sum(map(len, PROMPTS))


@pytest.mark.more
def test_logprobs_scores_beams_and_penalties_leave_virtual_tokens_out(adapted, kind):
    engine = adapted.engine()
    prompt = PROMPTS[1]
    logprobs = np.asarray(jax.nn.log_softmax(adapted.logits(prompt)[0]))
    expected = logprobs[np.arange(6), prompt[1:]]

    request = GenerationRequest("a", tuple(prompt), GREEDY, prompt_logprobs=1)
    first = next(iter(engine.run([request]))).prompt_logprobs
    assert [entry.token_id for entry in first] == prompt[1:]
    np.testing.assert_allclose([entry.logprob for entry in first], expected, atol=1e-4)
    engine.abort("a")

    (score,) = Scorer(adapted.engine()).score([(prompt[:3], prompt[3:])])
    np.testing.assert_allclose(score.token_logprobs, expected[2:], atol=1e-4)

    (result,) = beam_search(
        adapted.engine(), [prompt], BeamSearchConfig(max_new_tokens=5)
    )
    text = [*prompt, *result.outputs[0].token_ids]
    logprobs = np.asarray(jax.nn.log_softmax(adapted.logits(text)[0]))[6:-1]
    chosen = logprobs[np.arange(5), text[7:]]
    assert result.outputs[0].logprob == pytest.approx(chosen.sum(), abs=1e-3)

    # Token 0, which stands where virtual tokens do, has not been said.
    sampling = GREEDY.model_copy(
        update={"max_new_tokens": 1, "repetition_penalty": 1e4}
    )
    logits = adapted.logits(prompt)[0][-1]
    bias = {0: float(logits.max() - logits[0] + 1)}
    sampling = sampling.model_copy(update={"logit_bias": bias})
    (output,) = adapted.engine().run([GenerationRequest("a", tuple(prompt), sampling)])
    assert output.token_ids == [0]


@pytest.mark.more
def test_the_longest_sequence_is_that_of_real_tokens(built, kind):
    adapted = built["gpt2", kind]
    engine = adapted.engine(max_length=99)
    assert engine.config.max_length == 48 - N  # positions that are left
    request = GenerationRequest(
        "a", tuple(range(30)), GREEDY.model_copy(update={"max_new_tokens": 13})
    )
    assert sum(len(output.token_ids) for output in engine.run([request])) == 13
    longer = GenerationRequest("a", tuple(range(31)), request.sampling)
    assert "are more than the 43 of the longest sequence" in message(
        engine.add_request, longer
    )


@pytest.mark.heavy
def test_embeddings_pool_real_tokens(adapted, one_device_mesh):
    embedder = Embedder(adapted.model, adapted.params, one_device_mesh, 40)
    tokens = [*[0] * N, *PROMPTS[1], *[0] * (41 - N)]
    arrays = [np.array([row], np.int32) for row in (tokens, range(48), [1] * 48)]
    hidden = np.asarray(_forward(adapted.model, adapted.params, *arrays)[0])[
        0, N : N + 7
    ]
    for pooling, vector in {
        "mean": hidden.mean(0),
        "first": hidden[0],
        "last": hidden[-1],
    }.items():
        (embedding,) = embedder.embed([PROMPTS[1]], pooling)
        np.testing.assert_allclose(
            embedding, vector / np.linalg.norm(vector), atol=1e-5
        )


def test_arrays_turn_into_pefts_and_back(adapted, kind):
    arrays = {n: np.asarray(x) for n, x in flatten_names(adapted.params).items()}
    arrays = {name: x for name, x in arrays.items() if name.endswith(".virtual")}
    theirs = to_peft(arrays, 3.0)
    assert theirs.shape == ((N, 3 * 2 * 2 * 6) if kind == "prefix" else (N, 10))
    shapes = {name: x.shape for name, x in arrays.items()}
    back = from_peft(theirs, shapes, 3.0)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(back[name], array, rtol=1e-6)
    refusal = message(from_peft, theirs[1:], shapes)
    assert refusal.startswith(f"prompt_embeddings is [4, {theirs.shape[1]}], and [5, ")


@pytest.fixture
def make_config(tmp_path):
    """``make_config(name, mesh, **parts)``: a run that tunes virtual tokens on short
    answers."""
    text = tiny.write_text(tmp_path / "text")
    words = tiny.TEXT.split()
    pairs = [
        {"prompt": " ".join(words[: 1 + i % 5]), "completion": words[i % 7]}
        for i in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))

    def make(name: str, mesh: dict[str, int], **parts: Any) -> RunConfig:
        settings = tiny.settings(tmp_path, text) | {
            "name": name,
            "mesh": {"fsdp": 1} | mesh,
        }
        settings["task"] = {"kind": "sft", "files": [str(tmp_path / "pairs.jsonl")]}
        settings["train"] = {"steps": 2, "trainable": ["*.virtual"]}
        settings |= {
            "sharding": {"max_unsharded": 1},
            "reporting": {"tensorboard": False},
        }
        settings["adapter"] = {
            "kind": "prefix",
            "num_virtual_tokens": 3,
            "init_std": 0.5,
        }
        for name, part in parts.items():
            changed = settings.get(name, {}) | part
            settings[name] = {
                key: value for key, value in changed.items() if value is not None
            }
        return RunConfig.model_validate(settings)

    return make


MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "2x2x2": {"fsdp": 2, "context": 2, "tensor": 2},
    "stages": {"stage": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.more
def test_steps_in_every_layout_train_virtual_tokens_alone(make_config, kind):
    random = np.random.default_rng(0)
    sizes = [(12 + row, 13, 7 - row) for row in range(8)]
    batch = {
        "tokens": random.integers(0, 300, (8, 32)),
        "targets": random.integers(0, 300, (8, 32)),
        "segment_ids": np.stack([np.repeat([1, 2, 0], lengths) for lengths in sizes]),
        "positions": np.stack(
            [np.concatenate([*map(np.arange, lengths)]) for lengths in sizes]
        ),
    }
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    weights = (batch["segment_ids"] > 0) & (batch["positions"] >= 3)
    batch["weights"] = weights.astype(np.float32)
    expected: dict[str, np.ndarray] = {}
    for name, mesh in MESHES.items():
        parts: dict[str, Any] = {"adapter": {"kind": kind}}
        if name == "2x2x2":
            parts["sharding"] = {"compute": {"residual": ["context", "tensor"]}}
        if name == "stages":  # ZeRO-2
            whole = {"embed": [], "expert_embed": []}
            parts["sharding"] = {"storage": whole, "gradients": {}}
        micro_batches = 2 if name == "stages" else 1
        parts["train"] = {"micro_batches": micro_batches}
        devices = jax.devices()[: int(np.prod([*mesh.values()]))]
        setup = set_up_run(make_config(name, mesh, **parts), devices)
        state = setup.init_train_state()
        before = {n: np.asarray(x) for n, x in flatten_names(state.params).items()}
        arrays = (
            setup.config.task.batch_arrays(32),
            range(8),
            setup.placed.compute,
            setup.mesh,
        )
        lead = micro_batches, 8 // micro_batches
        put = make_global_batch(batch, *arrays, lead, setup.token_order)
        state, metrics = setup.jit_train_step()(state, put)
        after = {n: np.asarray(x) for n, x in flatten_names(state.params).items()}
        changed = {n for n in before if np.any(before[n] != after[n])}
        tuned = {n for n in before if n.endswith(".virtual")}
        assert changed == tuned
        assert len(tuned) == (2 if kind == "prefix" else 1)
        moments = {
            n: np.asarray(x)
            for n, x in flatten_names(state.opt_state).items()
            if x.ndim
        }
        assert {n.split(".", 2)[2] for n in moments} == tuned
        results = moments | {n: np.asarray(metrics[n]) for n in ("loss", "grad_norm")}
        expected = expected or results
        for key, array in expected.items():
            scale = np.abs(array).max()
            np.testing.assert_allclose(
                results[key], array, atol=1e-4 * scale, err_msg=key
            )


def test_what_cannot_have_virtual_tokens_is_refused(make_config):
    task = {"kind": "clm", "files": None}
    refusal = message(make_config, "a", {}, task=task, train={"trainable": ["*"]})
    assert "task.kind=clm has no examples that begin with virtual tokens" in refusal
    latent = {"kv_rank": 8, "rotary_dim": 2, "value_dim": 4}
    attention = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 6, "latent": latent}
    model = {
        "vocab_size": 20,
        "num_layers": 1,
        "d_model": 8,
        "mlp": {"d_ff": 8},
        "max_seq_len": 8,
    }
    latent = DecoderConfig.model_validate(model | {"attention": attention})
    refusal = message(build, latent, ADAPTERS["prefix"])
    assert "the model has no layers.attention.key.kernel" in refusal
    ids = PromptAdapter(init_token_ids=(99,))
    assert "99 is no row of the model's table" in message(build, MODELS["gpt2"], ids)
