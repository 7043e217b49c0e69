"""Promise: each sequence of a batch is as by its own adapter merged into the base
alone, whichever adapters run beside it, come and go."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from maxlm.adapters.lora import LoraAdapter
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.speculation import DraftModel
from maxlm.models.params import flatten_names, param_specs
from tests.errors import message
from tests.inference.conftest import Tiny

ADAPTERS = {
    "small": LoraAdapter(rank=2, alpha=3.0, targets=("query", "mlp.up")),
    "stable": LoraAdapter(rank=5, alpha=7.0, rank_stabilized=True),
    "out": LoraAdapter(rank=8, alpha=4.0, targets=("out", "down", "value")),
}
PROMPTS = {
    None: [5, 9, 2, 40, 3, 8, 8],
    "small": [7, 7],
    "stable": list(range(20, 43)),
    "out": [5, 9, 2, 40, 3, 8, 8],
}
GREEDY = SamplingConfig(temperature=0, max_new_tokens=9)
SIZES = {
    "max_sequences": 4,
    "max_length": 40,
    "page_size": 4,
    "prefill_tokens": 16,
    "max_chunks": 2,
    "decode_steps": 4,
    "max_adapters": 3,
    "max_adapter_rank": 8,
}


def draw_arrays(
    tiny: Tiny, adapter: LoraAdapter, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random A and B of an adapter, by canonical name."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(0, 0.1, spec.shape).astype(np.float32)
        for name, spec in flatten_names(adapter.adapt(param_specs(tiny.model))).items()
        if "lora_" in name
    }


def merge(tiny: Tiny, name: str | None, seed: int = 0) -> Tiny:
    """The model with an adapter in its weights, in float64 by its equation."""
    if name is None:
        return tiny
    flat = flatten_names(tiny.params)
    arrays = draw_arrays(tiny, ADAPTERS[name], seed)
    for kernel in {array.rpartition(".")[0] for array in arrays}:
        a = arrays[f"{kernel}.lora_a"].astype(np.float64)
        b = arrays[f"{kernel}.lora_b"].astype(np.float64)
        layers = [np.tensordot(*factors, 1) for factors in zip(a, b, strict=True)]
        value = np.asarray(flat[kernel]) + ADAPTERS[name].scale * np.stack(layers)
        flat[kernel] = jax.device_put(value.astype(np.float32), flat[kernel].sharding)
    return Tiny(
        tiny.model, jax.tree.unflatten(jax.tree.structure(tiny.params), flat.values())
    )


def make_engine(tiny: Tiny, **settings) -> Engine:
    return Engine(tiny.model, tiny.params, EngineConfig(**{**SIZES, **settings}))


def load(engine: Engine, tiny: Tiny, name: str, seed: int = 0) -> None:
    engine.load_adapter(name, (ADAPTERS[name], draw_arrays(tiny, ADAPTERS[name], seed)))


def request(
    adapter: str | None, request_id: str = "", prompt_tokens=None
) -> GenerationRequest:
    name = request_id or str(adapter)
    if prompt_tokens is None:
        prompt_tokens = tuple(PROMPTS[adapter])
    return GenerationRequest(
        name, prompt_tokens, GREEDY, top_logprobs=0, adapter=adapter
    )


def collect(outputs, tokens_by_name=None) -> dict[str, list]:
    """(token, log-probability) of each request's sequence."""
    tokens_by_name = {} if tokens_by_name is None else tokens_by_name
    for output in outputs:
        pairs = tokens_by_name.setdefault(output.request_id, [])
        pairs += [(token.token_id, token.logprob) for token in output.logprobs]
    return tokens_by_name


def check(tiny: Tiny, outputs: list, adapter: str | None, seed: int = 0) -> None:
    merged = merge(tiny, adapter, seed)
    tokens = merged.greedy(PROMPTS[adapter], 9)
    assert [token for token, _ in outputs] == tokens
    logits = merged.logits([*PROMPTS[adapter], *tokens[:-1]])[
        len(PROMPTS[adapter]) - 1 :
    ]
    want = np.asarray(jax.nn.log_softmax(logits))[np.arange(9), tokens]
    np.testing.assert_allclose([logprob for _, logprob in outputs], want, atol=2e-5)


@pytest.mark.more
def test_a_batch_of_adapters_is_as_each_merged_model_alone(tiny):
    engine = make_engine(tiny)
    for name in ADAPTERS:
        load(engine, tiny, name)
    outputs = collect(engine.run([request(name) for name in PROMPTS]))
    for name in PROMPTS:
        check(tiny, outputs[name or "None"], name)
    tokens = {name: [token for token, _ in pairs] for name, pairs in outputs.items()}
    assert tokens["None"] != tokens["out"]


@pytest.mark.heavy
def test_adapters_come_and_go_between_steps_and_nothing_compiles(shallow):
    engine = make_engine(shallow, max_adapters=2)
    outputs = {}
    engine.warm_up()
    compiled = engine.stats().compilations_total
    load(engine, shallow, "small")
    engine.add_request(request("small"))
    engine.add_request(request(None))
    collect(engine.step(), outputs)
    load(engine, shallow, "out", seed=1)
    engine.add_request(request("out"))
    collect(engine.step(), outputs)
    assert "requests use it" in message(lambda: engine.unload_adapter("out"))
    assert "slots are taken" in message(lambda: load(engine, shallow, "stable"))
    while any(
        sequence.request.adapter == "small" for sequence in engine.scheduler.running
    ):
        collect(engine.step(), outputs)
    engine.unload_adapter("small")
    load(engine, shallow, "stable")
    engine.add_request(request("stable"))
    collect(engine.run([]), outputs)
    for name in PROMPTS:
        check(shallow, outputs[str(name)], name, seed=int(name == "out"))
    assert engine.stats().compilations_total == compiled
    assert engine.adapters == ("out", "stable")


@pytest.mark.heavy
def test_prefixes_are_shared_within_an_adapter_alone(llama):
    engine = make_engine(llama)
    prompt = tuple(range(20))

    def run(adapter: str | None) -> tuple[int, list]:
        outputs = list(engine.run([request(adapter, "x", prompt_tokens=prompt)]))
        return max(o.num_cached_tokens for o in outputs), collect(outputs)["x"]

    load(engine, llama, "out")
    load(engine, llama, "small")
    cached, first = zip(*(run(name) for name in (None, "out", "small")), strict=True)
    assert cached == (0, 0, 0)
    cached, again = zip(*(run(name) for name in (None, "out", "small")), strict=True)
    assert cached == (16, 16, 16)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    engine.unload_adapter("out")
    load(engine, llama, "out", seed=1)  # another one under the same name
    cached, other = run("out")
    assert cached == 0
    assert other != first[1]


def test_what_no_slot_holds_is_refused_in_one_line(llama):
    engine = make_engine(llama)
    load(engine, llama, "small")
    arrays = draw_arrays(llama, ADAPTERS["small"])

    def refuse(adapter: LoraAdapter, arrays=arrays, name="x") -> str:
        return message(lambda: engine.load_adapter(name, (adapter, arrays)))

    assert "loaded already" in refuse(ADAPTERS["small"], name="small")
    assert "max_adapter_rank=9" in refuse(LoraAdapter(rank=9))
    assert "maxlm convert" in refuse(LoraAdapter(rank=2, dora=True))
    assert "maxlm convert" in refuse(LoraAdapter(rank=2, init="pissa"))
    table = {"embedding.table.lora_a": np.zeros((66, 2), np.float32)}
    assert "embedding.table.lora_a" in refuse(ADAPTERS["small"], table)
    name = "layers.attention.query.kernel.lora_a"
    foreign = arrays | {name: arrays[name][:, :-1]}
    assert f"{name} [2, 19, 2]" in refuse(ADAPTERS["small"], foreign)
    assert "no adapter 'x'" in message(
        lambda: engine.add_request(replace(request(None), adapter="x"))
    )
    assert "no adapter 'x'" in message(lambda: engine.unload_adapter("x"))
    none = make_engine(llama, max_adapters=0)
    assert "max_adapters" in message(lambda: load(none, llama, "small"))
    assert "no adapter 'small'" in message(lambda: none.add_request(request("small")))


@pytest.mark.more
def test_adapters_on_four_devices_with_drafts(mesh, build_tiny, tinies):
    four = build_tiny("llama", mesh(data=2, tensor=2))
    speculation = {"kind": "draft_model", "folder": "", "num_drafts": 2}
    config = EngineConfig(**{**SIZES, "speculation": speculation})
    engine = Engine(
        four.model, four.params, config, draft=DraftModel(four.model, four.params)
    )
    for name in ADAPTERS:
        load(engine, four, name)
    outputs = collect(engine.run([request(name) for name in PROMPTS]))
    with jax.set_mesh(tinies["llama"].params["embedding"]["table"].sharding.mesh):
        for name in PROMPTS:
            check(tinies["llama"], outputs[name or "None"], name)
    assert engine.stats().accepted_tokens_total > 0
