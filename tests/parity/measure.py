"""How closely each case agrees with the other implementation; what the tests assert and
the report writes down."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.huggingface.families.family import ModelFamily
from maxlm.inference.engine import Engine
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.generate import collect_tokens, generate
from maxlm.inference.requests import GenerationRequest
from maxlm.sharding import ShardingConfig
from tests.parity import compare, grok, tiny
from tests.parity.drawn import LENGTH

Arrays = dict[str, np.ndarray]
CASES = (*tiny.CASES, "grok1")
SOURCE = 19
# Documents that share a row: of the output, and of the input of an encoder beside a
# decoder.
PARTS, SOURCE_PARTS = (13, 10), (8, 11)
NEW = 12
CACHED_STEPS = 8
DELTA_RULES = (
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear"),
    *("bailing_hybrid", "bailing_hybrid_unbounded"),
)
"""Cases in which rounding of fp32 is magnified: see tests/models/test_families.py."""
TOP = 20
"""Log-probabilities that are compared at each step: as many as the engine returns."""


class ParityCase(NamedTuple):
    model: Any
    """The other implementation's, fp32."""
    family: ModelFamily
    config: Any
    """Ours, read from the other's config.json."""
    entries: Any
    tensors: Arrays
    """As the other saves them."""
    params: Arrays
    """Ours, by canonical name."""


def build(name: str) -> Any:
    """The other implementation's model, with random weights."""
    return grok.build() if name == "grok1" else tiny.build(name)


@cache
def case(name: str) -> ParityCase:
    """Built, saved, and read by the family's table."""
    model = build(name)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        values, tensors = compare.tensors_of(Path(folder))
    family, config = compare.read(values, tensors)
    entries = family.list_entries(config, tensors)
    return ParityCase(
        model,
        family,
        config,
        entries,
        tensors,
        compare.parameters(config, entries, tensors),
    )


class Batch(NamedTuple):
    """What a model is shown, int [B, S] each."""

    tokens: np.ndarray
    types: np.ndarray | None
    source: np.ndarray | None

    def part(self, number: int) -> "Batch":
        """A document of the first row."""
        run, source_run = _run_of(PARTS, number), _run_of(SOURCE_PARTS, number)
        return Batch(
            self.tokens[:1, run],
            None if self.types is None else self.types[:1, run],
            None if self.source is None else self.source[:1, source_run],
        )


def batch(name: str) -> Batch:
    config = case(name).config
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (2, LENGTH))
    types = getattr(config, "token_types", 0)
    return Batch(
        tokens,
        random.integers(0, types, tokens.shape) if types else None,
        random.integers(0, config.vocab_size, (2, SOURCE))
        if _has_encoder(name)
        else None,
    )


def theirs(model: Any, batch: Batch) -> np.ndarray:
    """Logits [B, S, V] of the other implementation."""
    import torch

    ids = torch.tensor(batch.tokens)
    named = {"input_ids": ids}
    if batch.types is not None:
        named["token_type_ids"] = torch.tensor(batch.types)
    if batch.source is not None:
        named = {"input_ids": torch.tensor(batch.source), "decoder_input_ids": ids}
    with torch.no_grad():
        logits = model(**named).logits
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()


def ours(name: str, batch: Batch, dtype: Any = jnp.float32) -> np.ndarray:
    """Ours, of rows that are one document each."""
    built = case(name)
    params = {key: value.astype(dtype) for key, value in built.params.items()}
    more: dict[str, Any] = {}
    if batch.types is not None:
        more["types"] = batch.types
    if batch.source is not None:
        more["inputs"] = (batch.source, _places(batch.source.shape), None)
    return compare.logits(built.config, params, batch.tokens, dtype=dtype, **more)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error over the largest logit."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


@cache
def single(name: str) -> float:
    """The error of logits in fp32."""
    inputs = batch(name)
    return relative(ours(name, inputs), theirs(case(name).model, inputs))


@cache
def double(name: str) -> float:
    """The error of logits where both sides compute in float64."""
    inputs = batch(name)
    with jax.enable_x64(True):
        got = ours(name, inputs, jnp.float64)
    assert got.dtype == np.float64
    with all_double():
        model = build(name)
        model.load_state_dict(case(name).model.state_dict())
        want = theirs(model, inputs)
    assert want.dtype == np.float64
    return relative(got, want)


class Rounding(NamedTuple):
    """Errors of logits in fp32, from those in float64."""

    ours: float
    theirs: float


@cache
def rounding(name: str) -> Rounding:
    """How far fp32 leads away from float64, here and there."""
    inputs = batch(name)
    with jax.enable_x64(True):
        exact = ours(name, inputs, jnp.float64)
    there = theirs(case(name).model, inputs)
    return Rounding(relative(ours(name, inputs), exact), relative(there, exact))


@contextmanager
def all_double() -> Iterator[None]:
    """torch's fp32 is float64: models are built and run in it throughout, where they
    otherwise cast norms, angles, routers and softmax to fp32."""
    import torch

    originals = (
        torch.float32,
        torch.float,
        torch.Tensor.float,
        torch.get_default_dtype(),
    )
    torch.float32 = torch.float = torch.float64  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(originals[3])
        torch.float32, torch.float, torch.Tensor.float = originals[:3]  # pyright: ignore[reportAttributeAccessIssue]


@cache
def packed(name: str, dtype: Any = jnp.float32) -> float:
    """The largest difference of two documents' logits, in a row that they share and in
    rows padded on the right, from the documents alone."""
    built = case(name)
    inputs = batch(name)
    parts = [inputs.part(0), inputs.part(1)]
    rows = _rows([p.tokens[0] for p in parts], PARTS)
    more = {}
    if inputs.types is not None:
        more["types"] = _rows([p.types[0] for p in parts], PARTS).tokens
    if inputs.source is not None:
        source = _rows([p.source[0] for p in parts], SOURCE_PARTS)
        more["inputs"] = tuple(source)
    params = {key: value.astype(dtype) for key, value in built.params.items()}
    got = compare.logits(built.config, params, *rows, dtype=dtype, **more)
    errors = []
    for number, part in enumerate(parts):
        want = ours(name, part, dtype)[0]
        errors.append(relative(got[0, _run_of(PARTS, number)], want))
        errors.append(relative(got[1 + number, : PARTS[number]], want))
    return max(errors)


class Rows(NamedTuple):
    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def _rows(documents: list[np.ndarray], lengths: tuple[int, ...]) -> Rows:
    """A row with all documents, one behind the other, and a padded row for each."""
    total = sum(lengths)
    tokens, positions, segments = np.zeros((3, 1 + len(documents), total), np.int32)
    for number, document in enumerate(documents):
        for row, run in (
            (0, _run_of(lengths, number)),
            (1 + number, slice(len(document))),
        ):
            tokens[row, run] = document
            positions[row, run] = range(len(document))
            segments[row, run] = number + 1
    return Rows(tokens, positions, segments)


def _run_of(lengths: tuple[int, ...], number: int) -> slice:
    start = sum(lengths[:number])
    return slice(start, start + lengths[number])


def _places(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)


def _has_encoder(name: str) -> bool:
    return case(name).model.config.is_encoder_decoder


def generates(name: str) -> bool:
    """Whether it continues texts; an encoder alone does not."""
    return case(name).config.architecture != "encoder"


def prompts(name: str) -> list[list[int]]:
    """Of unequal length."""
    random = np.random.default_rng(2)
    return [
        random.integers(0, case(name).config.vocab_size, n).tolist() for n in (7, 12)
    ]


@cache
def continued(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """What follows each prompt, greedily: here, both at once and through the cache;
    there, one by one."""
    texts = prompts(name)
    return _ours_continued(name, texts), [
        _theirs_continued(name, prompt) for prompt in texts
    ]


@cache
def cached(name: str) -> float:
    """The largest error of log-probabilities in steps through the engine's cache, each
    of the likeliest tokens, over the largest that is compared; the other
    implementation reads all tokens at once."""
    import torch

    built = case(name)
    prompt = prompts(name)[0]
    mesh = compare.one_device()
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    model = built.config.build(rules=rules, dtype=jnp.float32)
    params = compare.placed(built.params, mesh)
    # Room for one sequence, in pages that the steps cross.
    config = EngineConfig(page_size=4, max_sequences=1, max_length=128)
    engine = Engine(model, params, config)
    sampling = SamplingConfig(temperature=0, max_new_tokens=CACHED_STEPS)
    top = min(TOP, built.config.vocab_size)
    request = GenerationRequest("0", tuple(prompt), sampling, top_logprobs=top)
    steps = [step for output in engine.run([request]) for step in output.logprobs]
    assert len(steps) == CACHED_STEPS
    text = np.array([[*prompt, *(step.token_id for step in steps)]])
    logits = theirs(built.model, Batch(text, None, None))[0, len(prompt) - 1 : -1]
    want = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    errors: list[float] = []
    for step, row in zip(steps, want, strict=True):
        errors += [abs(logprob - row[token]) for token, logprob in step.top]
    largest = max(abs(logprob) for step in steps for _, logprob in step.top)
    return max(errors) / largest


def _ours_continued(name: str, texts: list[list[int]]) -> list[list[int]]:
    built = case(name)
    mesh = compare.one_device()
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    model = built.config.build(rules=rules, dtype=jnp.float32)
    params = compare.placed(built.params, mesh)
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW)
    config = EngineConfig(page_size=4)
    return collect_tokens(generate(model, params, texts, sampling, config=config))


def _theirs_continued(name: str, prompt: list[int]) -> list[int]:
    import torch
    from transformers import GenerationConfig

    built = case(name)
    start = getattr(built.config, "start_id", None)
    # Nothing ends it early. Its caches want as many layers of the encoder as of the
    # decoder.
    built.model.generation_config = GenerationConfig()
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
        decoder_start_token_id=start,
        use_cache=start is None,
    )
    out = built.model.generate(torch.tensor([prompt]), generation_config=greedy)[
        0
    ].tolist()
    return out[1 if start is not None else len(prompt) :]
