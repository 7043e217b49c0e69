"""Promise: whatever runs together, in whatever chunks, pages and steps, each sequence's
tokens are those of whole forward passes of it alone."""

import re
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.generate import collect_tokens, generate
from maxlm.inference.model_runner import count_compilations
from maxlm.inference.params import prepare_params
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.inference.sequences import ScheduledStep
from maxlm.inference.speculation import DraftModel, PromptLookupConfig, look_up_prompt
from maxlm.inference.step import run_step
from maxlm.models.architectures.encoder import Encoder, EncoderConfig
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import bind, flatten_names
from maxlm.sharding import AxisRules
from tests.errors import message
from tests.models.building import LLAMA_GQA

PROMPTS = [[1], [5, 9, 2, 40, 3, 8, 8], [7, 7], list(range(20, 43))]
# A row each: no sequence is ever alone, for which one more program is compiled.
THREE_PROMPTS = PROMPTS[1:]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=9)
SAMPLED = SamplingConfig(
    temperature=3.0, top_k=60, top_p=0.98, max_new_tokens=8, seed=4
)
SMALL = {
    "max_sequences": 3,
    "max_length": 48,
    "page_size": 4,
    "prefill_tokens": 16,
    "max_chunks": 2,
    "decode_steps": 4,
}


def make_engine(tiny, tokenizer=None, draft=None, **settings) -> Engine:
    config = EngineConfig(**{**SMALL, **settings})
    return Engine(tiny.model, tiny.params, config, tokenizer, draft=draft)


def make_requests(prompts, sampling, **options: bool | int) -> list[GenerationRequest]:
    return [
        GenerationRequest(str(number), tuple(prompt), sampling, **options)
        for number, prompt in enumerate(prompts)
    ]


def collect(outputs) -> dict[tuple[str, int], list[int]]:
    rows_by_key: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        tokens = rows_by_key.setdefault((output.request_id, output.sequence_index), [])
        tokens += output.token_ids
    return rows_by_key


def rows(engine: Engine, prompts, sampling, **options: bool | int) -> list[list[int]]:
    rows_by_key = collect(engine.run(make_requests(prompts, sampling, **options)))
    assert engine.stats().num_free_pages == engine.stats().num_pages
    return [rows_by_key[str(number), 0] for number in range(len(prompts))]


@pytest.mark.heavy
def test_greedy_rows_equal_full_forward_passes(tiny):
    """Four prompts in three rows: one is longer than a chunk, one waits, and all share
    steps."""
    expected = [tiny.greedy(prompt, 9) for prompt in PROMPTS]
    assert rows(make_engine(tiny), PROMPTS, GREEDY) == expected
    assert len(set(map(tuple, expected))) == len(expected)


@pytest.mark.more
def test_pages_have_room_for_whole_lanes(llama, monkeypatch):
    """As on a TPU, for heads of 6 features."""
    monkeypatch.setattr(
        "maxlm.inference.engine.choose_feature_multiple", lambda platform: 8
    )
    engine = make_engine(llama)
    assert engine._runner.state.caches["layers"][0].key.shape[-2:] == (4, 8)
    assert rows(engine, PROMPTS[:2], GREEDY) == [
        llama.greedy(prompt, 9) for prompt in PROMPTS[:2]
    ]


@pytest.mark.heavy
def test_sampled_rows_do_not_depend_on_what_else_runs(tiny):
    engine = make_engine(tiny)
    together = rows(engine, PROMPTS, SAMPLED)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert rows(engine, [prompt], SAMPLED) == [row]
    assert rows(engine, PROMPTS[::-1], SAMPLED) == together[::-1]
    assert rows(engine, PROMPTS, SAMPLED.model_copy(update={"seed": 5})) != together


def test_requests_that_come_and_go_at_any_moment(llama):
    engine = make_engine(llama)
    expected = {}
    random = np.random.default_rng(0)
    rows_by_key: dict[tuple[str, int], list[int]] = {}
    for number in range(12):
        prompt = random.integers(0, 66, random.integers(1, 30)).tolist()
        sampling = SAMPLED.model_copy(update={"seed": number})
        expected[str(number), 0] = prompt, sampling
        engine.add_request(GenerationRequest(str(number), tuple(prompt), sampling))
        for _ in range(random.integers(0, 3)):
            for output in engine.step():
                rows_by_key.setdefault((output.request_id, 0), []).extend(
                    output.token_ids
                )
        if number % 4 == 3:
            engine.abort(str(number))
            expected.pop((str(number), 0))
    for key, tokens in collect(engine.run([])).items():
        rows_by_key.setdefault(key, []).extend(tokens)
    alone = make_engine(llama)
    for key, (prompt, sampling) in expected.items():
        assert rows(alone, [prompt], sampling) == [rows_by_key[key]]
    assert engine.stats().num_free_pages == engine.stats().num_pages


@pytest.mark.heavy
def test_preempted_rows_are_computed_again_to_the_same_tokens(llama):
    """Pages for one and a half sequences: someone has to wait, and computes prompt and
    output again in small chunks, without log-probabilities of the output's tokens as
    the prompt's."""
    sampling = SAMPLED.model_copy(update={"max_new_tokens": 20})
    prompts = [PROMPTS[1], PROMPTS[3], PROMPTS[2]]
    scarce = make_engine(llama, num_pages=14, prefix_cache=False, prefill_tokens=3)
    drawn = rows(scarce, prompts, sampling, prompt_logprobs=1)
    assert drawn == rows(make_engine(llama), prompts, sampling)
    assert scarce.stats().preemptions_total > 0


def test_sequences_of_one_request_share_its_prompt_and_draw_by_themselves(llama):
    engine = make_engine(llama)
    (request,) = make_requests([PROMPTS[1]], SAMPLED, num_sequences=3)
    rows_by_key = collect(engine.run([request]))
    assert len({tuple(tokens) for tokens in rows_by_key.values()}) == 3
    assert rows_by_key["0", 0] == rows(engine, [PROMPTS[1]], SAMPLED)[0]


def test_a_shared_prefix_is_computed_once(llama):
    engine = make_engine(llama)
    prefix = list(range(30))
    rows(engine, [[*prefix, 3]], GREEDY)
    outputs = list(engine.run(make_requests([[*prefix, 5], prefix], GREEDY)))
    cached = {o.request_id: o.num_cached_tokens for o in outputs if o.num_cached_tokens}
    assert cached == {"0": 28, "1": 28}
    for number, prompt in enumerate(([*prefix, 5], prefix)):
        assert collect(outputs)[str(number), 0] == llama.greedy(prompt, 9)


@pytest.mark.heavy
@pytest.mark.parametrize("window", [pytest.param(3, marks=pytest.mark.more), 8])
def test_windows_keep_their_last_pages_alone(one_device_mesh, build_tiny, window):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": window}
    with jax.set_mesh(one_device_mesh):
        tiny = build_tiny("llama", one_device_mesh, attention=attention, num_layers=1)
        expected = [tiny.greedy(prompt, 17) for prompt in THREE_PROMPTS]
    greedy = GREEDY.model_copy(update={"max_new_tokens": 17})
    engine = make_engine(tiny, prefill_tokens=8)
    assert rows(engine, THREE_PROMPTS, greedy) == expected
    assert engine.stats().num_pages < 3 * 48 / 4


@pytest.mark.more
@pytest.mark.parametrize("chunk", [8, 3])
def test_gated_attention_in_chunks_keeps_its_chunk_s_pages_alone(
    one_device_mesh, build_tiny, chunk
):
    attention = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "chunk": chunk,
        "output_gate": "element",
        "qk_norm": True,
        "qk_norm_form": "all_heads",
        "value_norm": True,
        "temperature": {"scale": 2.0, "length": 3},
    }
    with jax.set_mesh(one_device_mesh):
        tiny = build_tiny("llama", one_device_mesh, attention=attention, num_layers=1)
        expected = [tiny.greedy(prompt, 17) for prompt in THREE_PROMPTS]
    greedy = GREEDY.model_copy(update={"max_new_tokens": 17})
    engine = make_engine(tiny, prefill_tokens=8)
    assert rows(engine, THREE_PROMPTS, greedy) == expected
    assert engine.stats().num_pages < 3 * 48 / 4
    # All maps of the layer's input are one product.
    maps = engine._runner.params["layers"]["attention"]
    kernels = [maps[name]["kernel"] for name in ("query", "key", "value", "gate")]
    values = [kernel.layers[0].value for kernel in kernels]
    assert values[0].shape == (20, 2 * 4 * 6 + 2 * 2 * 6)
    assert values[1:] == [None] * 3


@pytest.mark.more
def test_runs_dispatch_many_steps_unless_somebody_waits_or_reads_along(llama):
    """With no time for a second step, a measured dispatch has one of them."""
    engine = make_engine(llama, dispatch_seconds=1e-9, max_sequences=2)

    def sizes(num_requests: int, stream: bool = False) -> list[int]:
        requests = make_requests(PROMPTS[:num_requests], GREEDY, ignore_eos=True)
        expected = [
            len(output.token_ids)
            for output in engine.run(requests, stream=stream)
            if output.request_id == "0"
        ]
        assert sum(expected) == 9
        return expected

    sizes(1, stream=True)
    assert max(sizes(1, stream=True)) == 1
    assert sizes(1) == [1, 4, 4]
    assert max(sizes(3)) == 1  # the third request waits for the first two


def test_log_probabilities_are_the_model_s_own(llama):
    options = {"top_logprobs": 3, "prompt_logprobs": 2}
    requests = make_requests(
        PROMPTS, SAMPLED.model_copy(update={"temperature": 0.2}), **options
    )
    outputs: dict[str, list[SequenceOutput]] = {}
    for output in make_engine(llama).run(requests):
        outputs.setdefault(output.request_id, []).append(output)
    for number, prompt in enumerate(PROMPTS):
        request_outputs = outputs[str(number)]
        tokens = [token for output in request_outputs for token in output.token_ids]
        logits = llama.logits([*prompt, *tokens])
        logprobs = np.asarray(jax.nn.log_softmax(logits))[:-1]
        (prompt_part,) = [
            o.prompt_logprobs for o in request_outputs if o.prompt_logprobs is not None
        ]
        entries = [
            *prompt_part,
            *(one for output in request_outputs for one in output.logprobs),
        ]
        assert [one.token_id for one in entries] == [*prompt[1:], *tokens]
        for one, row in zip(entries, logprobs, strict=True):
            assert one.logprob == pytest.approx(row[one.token_id], abs=1e-4)
            best = np.argsort(-row)[: len(one.top)]
            assert [token for token, _ in one.top] == best.tolist()
        assert {len(one.top) for one in request_outputs[0].logprobs} == {3}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.more), {"prefill_tokens": 3, "num_pages": 14}],
)
def test_continuations_are_scored_behind_what_they_share(llama, settings):
    """Each token of several continuations has the log-probability of a whole pass,
    whatever else runs, on few pages too; a context may end anywhere in a page, and is
    as long as can be."""
    tails = ((3, 1, 4, 1, 5), (9,), (3, 1, 4), (2, 6))
    contexts = [PROMPTS[1], [5, 9, 2, 40, 3, 8], [11], list(range(7, 51))]
    engine = make_engine(llama, **settings)
    options = {"num_sequences": 4, "continuations": tails, "top_logprobs": 1}
    requests = make_requests(
        contexts, GREEDY.model_copy(update={"max_new_tokens": 1}), **options
    )
    requests = [replace(request, prompt_logprobs=1) for request in requests]
    (other,) = make_requests([PROMPTS[2]], GREEDY)
    outputs = list(engine.run([replace(other, request_id="other"), *requests]))
    assert collect(outputs)["other", 0] == llama.greedy(PROMPTS[2], 9)
    scored = [output for output in outputs if output.request_id != "other"]
    assert len(scored) == len(contexts) * len(tails)
    for output in scored:
        context, tail = contexts[int(output.request_id)], tails[output.sequence_index]
        logprobs = np.asarray(jax.nn.log_softmax(llama.logits([*context, *tail])))
        tokens = [*output.prompt_logprobs, *output.logprobs]
        assert [one.token_id for one in tokens] == [*tail]
        for place, one in enumerate(tokens, len(context) - 1):
            assert one.logprob == pytest.approx(logprobs[place, one.token_id], abs=1e-4)
            assert one.top[0][0] == logprobs[place].argmax()
    assert engine.stats().num_free_pages == engine.stats().num_pages


def test_a_row_stops_at_a_stop_token_and_the_others_go_on(llama):
    full = rows(make_engine(llama), PROMPTS, GREEDY)
    stop = full[1][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in full]
    assert len(expected[1]) < 9
    assert rows(make_engine(llama), PROMPTS, GREEDY, stop_token_ids=(stop,)) == expected


def test_penalties_see_the_prompt_and_what_several_steps_wrote(llama):
    sampling = SamplingConfig(temperature=0, max_new_tokens=9, no_repeat_ngram_size=1)
    (drawn,) = rows(make_engine(llama), [PROMPTS[1]], sampling)
    text = list(PROMPTS[1])
    for token in drawn:
        logits = llama.logits(text)[-1].copy()
        logits[text] = -np.inf
        assert token == logits.argmax()
        text.append(token)


@pytest.mark.more
def test_ids_that_the_tokenizer_lacks_are_never_drawn(llama):
    uniform = SamplingConfig(temperature=1e6, max_new_tokens=8)
    config = EngineConfig(**SMALL)
    drawn = collect_tokens(
        generate(
            llama.model, llama.params, PROMPTS, uniform, vocab_size=40, config=config
        )
    )
    assert 35 < max(map(max, drawn)) < 40
    assert all(len(set(row)) > 4 for row in drawn)


@pytest.mark.heavy
def test_nothing_compiles_after_warm_up(shallow):
    engine = make_engine(shallow, max_length=44)  # no other test's
    engine.warm_up()
    before = count_compilations()
    rows(engine, PROMPTS, GREEDY)
    rows(engine, PROMPTS[:1], SAMPLED, top_logprobs=2, prompt_logprobs=1)
    penal = SamplingConfig(
        repetition_penalty=1.3, min_p=0.1, logit_bias={3: 1.0}, max_new_tokens=7
    )
    (request,) = make_requests([PROMPTS[1]], penal, num_sequences=3)
    list(engine.run([request]))
    assert count_compilations() == before


@pytest.mark.more
def test_steps_find_what_was_compiled_behind_them(llama, caplog):
    """No step compiles what the thread did, and its tokens are those of an engine
    without one."""
    engine = make_engine(llama, max_length=45)  # no other test's
    engine.warm_up_in_background()
    while engine.num_programs_left:
        time.sleep(0.01)
    with caplog.at_level("WARNING"), jax.log_compiles():
        tokens = rows(engine, PROMPTS, GREEDY)
        lines_behind = [line for line in caplog.messages if "XLA compilation" in line]
        cold = rows(make_engine(llama, max_length=47), PROMPTS, GREEDY)
    engine.close()
    assert not [line for line in lines_behind if "run_step" in line]
    assert [
        line
        for line in caplog.messages
        if "XLA compilation" in line and "run_step" in line
    ]
    assert tokens == cold


@pytest.mark.more
def test_steps_do_not_wait_for_programs_that_they_do_not_need(llama):
    engine = make_engine(llama, max_length=46)  # no other test's
    engine.warm_up_in_background()
    engine.close()
    assert engine.num_programs_left == 0
    assert rows(engine, PROMPTS, GREEDY) == rows(make_engine(llama), PROMPTS, GREEDY)


@pytest.mark.heavy
def test_only_those_who_want_log_probabilities_pay_for_them(llama):
    """The likeliest tokens of a small chunk's logits are found under a condition in the
    compiled step: a loop's invariant part is computed whether or not the loop is
    entered."""
    engine = make_engine(llama)
    shape = engine._inputs.list_shapes()[-1]
    with jax.set_mesh(engine.mesh):
        inputs = engine._inputs.build(
            ScheduledStep(), shape, engine.scheduler.page_tables, {}
        )
        runner = engine._runner
        step = run_step.lower(
            engine.model, runner.spec, shape, runner.params, runner.state, inputs
        )
        rest, main = step.compile().as_text().split("\nENTRY ")
    vocab_size = runner.model.config.vocab_size
    sorts = re.compile(rf",{vocab_size}\]\S* sort\(|\"TopK\"")
    assert sorts.search(rest)
    assert not sorts.search(main)


@pytest.mark.more
def test_angles_that_grow_with_the_sequence_are_each_row_s_own(
    one_device_mesh, build_tiny
):
    """Some rows are beyond the original length and some are not."""
    scaling = {"kind": "dynamic_ntk", "factor": 8.0, "original_length": 6}
    prompts = [*PROMPTS, [3, 1, 4, 1, 5, 9, 2, 6] * 4]
    with jax.set_mesh(one_device_mesh):
        tiny = build_tiny("llama", one_device_mesh, positions={"scaling": scaling})
        together = rows(make_engine(tiny), prompts, GREEDY)

        @jax.jit
        def forward(params, ids, places, segments):
            bound = bind(tiny.model, params)
            return bound.logits(bound(ids, places, segments)[0])

        for prompt, row in zip(prompts, together, strict=True):
            assert rows(make_engine(tiny), [prompt], GREEDY) == [row]
            # A forward pass of just the prompt: padding is of no segment, and at 0.
            ids, places, segments = np.zeros((3, 1, 40), np.int32)
            size = len(prompt)
            ids[0, :size] = prompt
            places[0, :size] = range(size)
            segments[0, :size] = 1
            logits = forward(tiny.params, ids, places, segments)
            assert logits[0, size - 1].argmax() == row[0]
        plain = rows(make_engine(build_tiny("llama", one_device_mesh)), prompts, GREEDY)
    assert [a == b for a, b in zip(plain, together, strict=True)] != [True] * len(
        prompts
    )


@pytest.mark.heavy
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("temperature", [pytest.param(0, marks=pytest.mark.more), 1.5])
def test_guessed_tokens_change_nothing(llama, shallow, settings, temperature):
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=14, **settings)
    prompts = [[1, 2, 3] * 6, [5, 9, 5, 9], PROMPTS[3], [4]]
    expected = rows(make_engine(llama), prompts, sampling)
    lookup = {"kind": "prompt_lookup", "num_drafts": 3, "min_ngram": 1}
    engine = make_engine(llama, speculation=lookup)
    assert rows(engine, prompts, sampling) == expected
    assert settings or engine.stats().drafted_tokens_total > 0
    drafts = {"kind": "draft_model", "folder": "", "num_drafts": 3}
    for name, other in {"itself": llama, "another": shallow}.items():
        draft = DraftModel(other.model, other.params)
        engine = make_engine(llama, draft=draft, speculation=drafts)
        assert rows(engine, prompts, sampling) == expected
        stats = engine.stats()
        if name == "itself":  # all but those behind an output's end
            assert stats.accepted_tokens_total > 0.9 * stats.drafted_tokens_total
        else:
            assert stats.accepted_tokens_total < 0.9 * stats.drafted_tokens_total


def test_what_is_looked_up_follows_the_last_and_longest_match():
    config = PromptLookupConfig(num_drafts=3, max_ngram=2, min_ngram=1)
    assert look_up_prompt([1, 2, 9, 1, 2, 8, 7, 6, 5, 1, 2], config) == [8, 7, 6]
    assert look_up_prompt([3, 2, 9, 1, 2], config) == [9, 1, 2]
    assert look_up_prompt([1, 2, 3], config) == []
    assert look_up_prompt([1, 2, 1], config.model_copy(update={"min_ngram": 2})) == []


def test_parameters_are_laid_out_once_and_equal(llama):
    laid_out = flatten_names(prepare_params(llama.model, llama.params))
    for name, value in flatten_names(llama.params).items():
        if not name.startswith("layers."):
            np.testing.assert_array_equal(laid_out[name], value)
            continue
        for layer in range(2):
            layer_values = laid_out.pop(f"{name}.layers.{layer}", None)
            if layer_values is not None:
                np.testing.assert_array_equal(layer_values, value[layer])
            else:  # side by side with the others of its input
                first = (
                    name.replace("key", "query")
                    .replace("value", "query")
                    .replace("up", "gate")
                )
                fused = laid_out[f"{first}.layers.{layer}.value"]
                expected = np.reshape(value[layer], (20, -1))
                width = expected.shape[1]
                places = range(fused.shape[1] - width + 1)
                assert any(
                    np.array_equal(fused[:, at : at + width], expected) for at in places
                )


def refusal(tiny, request: GenerationRequest, **settings: int) -> str:
    return message(make_engine(tiny, **settings).add_request, request)


def test_what_can_never_run_is_refused_in_one_line(llama, gpt2):
    long = GenerationRequest("a", (1,) * 45, GREEDY)
    assert "45 tokens of prompt and max_new_tokens=9 are more than the 48" in refusal(
        llama, long
    )
    assert "more than the 40" in refusal(
        gpt2, GenerationRequest("a", (1,) * 35, GREEDY)
    )
    many = GenerationRequest("a", (1,) * 30, GREEDY)
    assert "it needs 10 pages of 4 tokens" in refusal(llama, many, num_pages=8)
    assert refusal(llama, GenerationRequest("a", (), GREEDY)).startswith("request a: ")
    for token in (66, -1):
        assert refusal(llama, GenerationRequest("a", (1, token), GREEDY)) == (
            f"request a: token {token} is outside the model's vocabulary of 66; "
            "use the tokenizer that the model was trained with"
        )
    stops = GenerationRequest("a", (1,), GREEDY, stop_strings=("x",))
    assert "need a tokenizer" in refusal(llama, stops)
    ids = GenerationRequest("a", (1,), GREEDY, stop_token_ids=tuple(range(17)))
    assert "17 tokens end the output" in refusal(llama, ids)


def test_models_that_continue_nothing_and_meshes_that_split_the_sequence(llama):
    model, params = llama.model, llama.params
    split = Decoder(model.config, rules=AxisRules(seq=("context",)), dtype=model.dtype)
    assert message(generate, split, params, [[1]], GREEDY) == (
        "mesh: the sequence is split over context; generate on a mesh with context=1"
    )
    config = EncoderConfig.model_validate(
        LLAMA_GQA.model_dump() | {"architecture": "encoder"}
    )
    encoder = Encoder(config, rules=AxisRules(), dtype=model.dtype)
    assert "does not continue text" in message(generate, encoder, params, [[1]], GREEDY)


def test_a_draft_model_with_another_vocabulary_is_refused(
    one_device_mesh, llama, build_tiny
):
    other = build_tiny("llama", one_device_mesh, vocab_size=50)
    drafts = {"kind": "draft_model", "folder": "", "num_drafts": 3}
    refused = message(
        make_engine,
        llama,
        draft=DraftModel(other.model, other.params),
        speculation=drafts,
    )
    assert refused.startswith(
        "speculation: the draft model has 50 tokens, the model 66; "
    )
