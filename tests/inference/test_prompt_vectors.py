"""Vectors in place of prompts' tokens in the engine: a table's own rows given as vectors
generate what their tokens do, caches tell vectors apart, and requests that do not fit
are one line."""

from typing import Any

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.engine_inputs import InputBuilder
from maxlm.inference.prompt_vectors import ChunkVectors, make_prompt_vectors
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scheduler import Scheduler
from maxlm.models.architectures.transformer import DecoderConfig
from tests.inference.conftest import CONFIGS, VOCAB
from tests.models.building import decoder, placed_params

WIDTH = 7
FRONTEND = {"kind": "embeddings", "placeholder_id": VOCAB - 1, "width": WIDTH}
SETTINGS = CONFIGS["llama"] | {"num_layers": 1}
CONFIG = DecoderConfig.model_validate(SETTINGS | {"frontend": FRONTEND})
PLAIN = DecoderConfig.model_validate(SETTINGS)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=4)
PROMPT = (5, 65, 65, 9, 11, 65, 3, 8, 65)
PLACES = (1, 2, 5, 8)


def make_engine(
    config: DecoderConfig, where: Any, *, accepts_embeddings: bool = False
) -> Engine:
    settings = EngineConfig(
        max_sequences=1,
        max_length=24,
        page_size=4,
        prefill_tokens=8,
        accepts_embeddings=accepts_embeddings,
    )
    params = placed_params(config, where)
    return Engine(decoder(config, where), params, settings)


def generate(engine: Engine, fields: Any = None) -> list[int]:
    """Continues ``PROMPT``, or the prompt among the fields of a request."""
    settings = {"prompt_tokens": PROMPT, "sampling": GREEDY, **(fields or {})}
    request = GenerationRequest("a", **settings)
    return [token for output in engine.run([request]) for token in output.token_ids]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "axes", [{}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.more)]
)
def test_rows_of_the_table_as_vectors_generate_what_their_tokens_do(axes, mesh):
    where = mesh(**axes)
    engine = make_engine(PLAIN, where, accepts_embeddings=True)
    tokens = list(PROMPT)
    random = np.random.default_rng(0)
    for place in PLACES:
        tokens[place] = int(random.integers(1, VOCAB))
    table = np.asarray(engine.params["embedding"]["table"])
    vectors = table[[tokens[place] for place in PLACES]]
    expected = generate(engine, {"prompt_tokens": tuple(tokens)})
    fields = {"embeddings": vectors, "embedding_places": PLACES}
    generated = generate(engine, fields)
    assert generated == expected
    # The same prompt without them is another, whatever is cached.
    assert generate(engine) != expected
    # With all programs compiled beforehand, vectors compile nothing.
    engine.warm_up()
    num_compiled = engine.stats().compilations_total
    assert generate(engine, fields) == expected
    assert engine.stats().compilations_total == num_compiled


@pytest.mark.heavy
def test_items_and_their_vectors_generate_the_same(one_device_mesh):
    engine = make_engine(CONFIG, one_device_mesh)
    random = np.random.default_rng(1)
    items = random.normal(size=(len(PLACES), WIDTH)).astype(np.float32)
    kernel = np.asarray(engine.params["frontend"]["projection"]["kernel"])
    generated = generate(engine, {"items": {"embeddings": items}})
    assert generated == generate(engine, {"embeddings": items @ kernel})
    assert generated != generate(engine, {"items": {"embeddings": -items}})
    # Text alone needs none; a placeholder does.
    assert len(generate(engine, {"prompt_tokens": (5, 9, 11)})) == 4
    for fields, message in (
        ({}, "0 vectors for 4 places"),
        ({"items": {"embeddings": items[:3]}}, "3 vectors for 4 places"),
        ({"items": {"patches": items}}, "reads embeddings, there are patches"),
        ({"items": {"embeddings": items[:, 1:]}}, r"shape \[4, 6\], and not \[items"),
        ({"embeddings": items}, "model.d_model=20"),
        (
            {"embeddings": items @ kernel, "items": {"embeddings": items}},
            "both items and embeddings",
        ),
        (
            {"embeddings": items @ kernel, "embedding_places": (1, 5, 2, 8)},
            "no ascending indices below 9",
        ),
    ):
        with pytest.raises(MaxlmError, match=message) as caught:
            generate(engine, fields)
        assert str(caught.value).startswith("request a: ")
    assert not engine.has_work


@pytest.mark.heavy
def test_a_model_without_a_frontend_takes_vectors_where_its_engine_says(
    one_device_mesh,
):
    engine = make_engine(PLAIN, one_device_mesh)
    vectors = np.zeros((1, 20), np.float32)
    with pytest.raises(MaxlmError, match="accepts_embeddings=true"):
        generate(engine, {"embeddings": vectors, "embedding_places": (1,)})
    with pytest.raises(MaxlmError, match=r"items .* without a frontend"):
        generate(engine, {"items": {"embeddings": vectors}})


def test_prefixes_are_shared_up_to_the_first_vector_that_differs():
    """Pages of text before an image are shared by all, those behind by equal images
    alone."""
    config = EngineConfig(
        max_sequences=4, max_length=32, page_size=4, prefill_tokens=64
    )
    scheduler = Scheduler(config, (None,))
    prompt = (1, 2, 3, 4, 5, 65, 65, *range(7, 13))  # 13 tokens
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)

    def count_cached(name: str, vectors: np.ndarray) -> int:
        request = GenerationRequest(name, prompt, GREEDY)
        placed = make_prompt_vectors((5, 6), vectors, np.float32)
        (sequence,) = scheduler.add(request, vectors=placed)
        while sequence.state != "finished":
            step = scheduler.schedule()
            assert step is not None
            drawn = {
                part.sequence: [1] * getattr(part, "num_tokens", 1)
                for part in step.decode
            }
            drawn |= {chunk.sequence: [1] for chunk in step.prefill if chunk.samples}
            scheduler.finish_step(step, drawn)
            if sequence.num_output_tokens >= 2:
                scheduler.finish(sequence)
        return sequence.num_cached_tokens

    assert count_cached("a", values[:2]) == 0
    assert count_cached("b", values[:2]) == 12
    # The second vector of a page differs, or the two change places.
    assert count_cached("c", values[[0, 2]]) == 4
    assert count_cached("d", values[[1, 0]]) == 4
    assert count_cached("e", values[[0, 2]]) == 12


class HostVectors(ChunkVectors):
    """Leaves vectors on the host."""

    def __init__(self, width: int):
        super().__init__(width, np.float32, None)  # type: ignore[arg-type]

    def put(self, values: np.ndarray) -> Any:
        return values


class NoAdapters:
    def make_masks(self, names: Any) -> None:
        del names


def test_each_chunk_has_the_vectors_of_its_own_tokens():
    """Over the chunks of prompts of any length, beginning anywhere: each placeholder is
    computed once, in a chunk, with its own vector, also a prompt's last token."""
    config = EngineConfig(
        max_sequences=4, max_length=32, page_size=4, prefill_tokens=8, max_chunks=3
    )
    scheduler = Scheduler(config, (None,), num_shards=2)
    adapters: Any = NoAdapters()
    builder = InputBuilder(config, 2, VOCAB, 0, False, adapters, HostVectors(3))
    random = np.random.default_rng(0)
    placed = {}
    for number in range(12):
        prompt = random.integers(1, 60, int(random.integers(1, 20)))
        count = int(random.integers(0, len(prompt) + 1))
        places = np.sort(random.choice(len(prompt), count, replace=False))
        if number % 2 and count:
            places[-1] = len(prompt) - 1
        request = GenerationRequest(str(number), tuple(prompt.tolist()), GREEDY)
        values = random.normal(size=(len(places), 3))
        vectors = None
        if count:
            vectors = make_prompt_vectors(places.tolist(), values, np.float32)
        (sequence,) = scheduler.add(request, vectors=vectors)
        placed[sequence] = vectors
    seen: dict[tuple[Any, int], np.ndarray] = {}
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        assert step is not None
        inputs = builder.build(
            step, builder.choose_shape(step), scheduler.page_tables, {}
        )
        for row in step.decode:
            vectors = placed[row.sequence]
            assert vectors is None or row.sequence.num_computed > vectors.places[-1]
        begins = [0, 0]
        num_read = 0
        for sequence, start, num_tokens, _ in step.prefill:
            shard = sequence.shard
            numbers = inputs.chunk_vector_numbers
            values = inputs.chunk_vectors
            assert numbers is not None
            for place in range(num_tokens):
                vector_number = numbers[shard, begins[shard] + place]
                if vector_number:
                    key = (sequence, start + place)
                    assert key not in seen
                    seen[key] = np.asarray(values)[shard, vector_number - 1]
                    num_read += 1
            begins[shard] += num_tokens
        if inputs.chunk_vector_numbers is not None:
            assert np.count_nonzero(inputs.chunk_vector_numbers) == num_read
        drawn = {row.sequence: [1] * row.num_tokens for row in step.decode}
        drawn |= {chunk.sequence: [1] for chunk in step.prefill if chunk.samples}
        scheduler.finish_step(step, drawn)
        for sequence in drawn:
            if sequence.num_output_tokens >= 3:
                scheduler.finish(sequence)
    for sequence, vectors in placed.items():
        if vectors is None:
            continue
        for place, value in zip(vectors.places, vectors.values, strict=True):
            np.testing.assert_array_equal(seen.pop((sequence, int(place))), value)
    assert not seen
