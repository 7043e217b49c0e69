"""Promise: whatever the model's weights, what is drawn under a form has that form, for
every kind of tokenizer that generates; what cannot be compiled is refused in one
line."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import import_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.inference.banned_sequences import fill_draft_masks
from maxlm.inference.grammar import GrammarCompiler, GrammarMatcher
from maxlm.inference.requests import GrammarSpec
from maxlm.inference.sampling import (
    compute_sampling_logits,
    make_keys,
    sample_tokens,
    stack_settings,
)
from tests.errors import message
from tests.models import tiny_tokenizers

TEXT = Path(__file__).read_text().splitlines()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {
            "type": "array",
            "items": {"enum": ["red", "né", "日本"]},
            "maxItems": 3,
        },
        "inner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "inner"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
DATE = r"(19|20)\d{2}-(0[1-9]|1[0-2])(T[é日a-z]{1,3})?"
SUM = 'start: NUM ("+" NUM){0,3}\nNUM: /[1-9][0-9]{0,2}/'
ROWS, STEPS, EXTRA = 8, 200, 70  # ids that the model's table has and no tokenizer knows


@pytest.fixture(
    scope="module", params=["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]
)
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=request.param, vocab_size=400), TEXT)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@partial(jax.jit, static_argnames="vocab_size")
def step(settings, allowed, position, vocab_size):
    """Tokens that a model of random weights draws, for each row others."""
    logits = 3 * jax.random.normal(jax.random.key(position), (ROWS, vocab_size + EXTRA))
    none = jnp.zeros(ROWS, jnp.int32)
    positions = jnp.full(ROWS, position, jnp.int32)
    logits = compute_sampling_logits(
        logits,
        settings,
        none[:, None],
        none,
        none,
        vocab_size=vocab_size,
        allowed=allowed,
    )
    return sample_tokens(
        logits, make_keys(settings, positions), settings.temperature == 0
    )


def generate(
    tokenizer, matchers: list[GrammarMatcher], sampling: SamplingConfig
) -> list[str]:
    """Texts that end as they should."""
    streams = range(ROWS)
    texts = [[] for _ in range(ROWS)]
    settings = stack_settings([sampling] * ROWS, ROWS, streams=streams)
    words = -(-(tokenizer.vocab_size + EXTRA) // 32)
    for position in range(STEPS):
        allowed = np.full((ROWS, words), np.uint32(2**32 - 1))
        for matcher, row in zip(matchers, allowed, strict=True):
            matcher.fill_mask(row)
        tokens = np.asarray(
            step(settings, allowed, position, tokenizer.vocab_size)
        ).tolist()
        for matcher, text, token in zip(matchers, texts, tokens, strict=True):
            if not text or text[-1] != tokenizer.eos_id:
                assert matcher.is_finished or matcher.accept(token)
                text.append(token)
                assert matcher.error is None
    assert all(matcher.is_finished for matcher in matchers)
    special = {*tokenizer.special_tokens.values()}
    for text in texts:
        assert text[-1] == tokenizer.eos_id
        assert special.isdisjoint(text[:-1])
    return [
        tokenizer.decode_bytes(text[:-1], continued=True).decode() for text in texts
    ]


@pytest.mark.heavy
def test_a_schema_a_regex_and_a_grammar(tokenizer, compiler):
    specs = [
        *[GrammarSpec("json_schema", json.dumps(SCHEMA))] * 4,
        *[GrammarSpec("regex", DATE)] * 2,
        *[GrammarSpec("lark", SUM)] * 2,
    ]
    matchers = [compiler.compile(spec) for spec in specs]
    texts = generate(tokenizer, matchers, SamplingConfig(temperature=1.5))
    for text in texts[:4]:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert all(re.fullmatch(DATE, text) for text in texts[4:6])
    assert all(
        re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){0,3}", text) for text in texts[6:]
    )
    assert len({*texts}) > 6


def test_any_json_object(tokenizer, compiler):
    # What ends strings and objects is made likely, so that random weights come to an
    # end.
    ends = {tokenizer.encode(char)[0]: 8.0 for char in '"}]:'} | {tokenizer.eos_id: 9.0}
    spec = GrammarSpec("json_object")
    matchers = [compiler.compile(spec) for _ in range(ROWS)]
    for text in generate(tokenizer, matchers, SamplingConfig(logit_bias=ends)):
        assert isinstance(json.loads(text), dict)


def masks(matcher, size) -> np.ndarray:
    row = np.zeros(-(-size // 32), np.uint32)
    matcher.fill_mask(row)
    return row


def ids_of(row) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def test_masks_by_hand(tokenizer, compiler):
    size = tokenizer.vocab_size
    matcher = compiler.compile(GrammarSpec("regex", "ab?"))
    (a,), (b,), (c,) = (tokenizer.encode(char) for char in "abc")
    texts = tokenizer.codec.token_bytes
    spelled = {texts[i] for i in ids_of(masks(matcher, size + EXTRA))}
    assert spelled <= {b"a", b"ab"}
    assert b"a" in spelled
    assert not matcher.accept(c)
    assert not matcher.accept(tokenizer.eos_id)
    assert matcher.accept(a)
    assert not matcher.is_finished
    next_ids = ids_of(masks(matcher, size + EXTRA))
    assert {b, tokenizer.eos_id} <= {*next_ids}
    assert {texts[i] for i in next_ids} == {b"b", texts[tokenizer.eos_id]}
    other = matcher.copy()
    assert matcher.accept(b)
    assert matcher.is_finished
    assert ids_of(masks(matcher, size)) == [tokenizer.eos_id]
    assert not other.is_finished  # it stands where it stood
    assert other.accept(tokenizer.eos_id)
    assert other.is_finished
    assert not other.accept(tokenizer.eos_id)


def test_masks_of_a_draft_are_those_of_one_token_after_another(tokenizer, compiler):
    spec = GrammarSpec("json_schema", json.dumps(SCHEMA))
    words = -(-tokenizer.vocab_size // 32)
    matcher = compiler.compile(spec)
    assert all(map(matcher.accept, tokenizer.encode('{"name":')))
    good, bad = tokenizer.encode('"Zoë"'), tokenizer.encode("}")
    draft = [*good, *bad, *bad]
    rows = np.zeros((len(draft) + 1, words), np.uint32)
    fill_draft_masks(matcher, rows, draft)
    for token, row in zip([*good, None], rows, strict=False):
        assert np.array_equal(row, masks(matcher, tokenizer.vocab_size))
        assert token is None or matcher.accept(token)
    assert np.all(rows[len(good) + 1 :] == 2**32 - 1)
    fill_draft_masks(matcher, rows[:1], [])
    assert np.array_equal(rows[0], masks(matcher, tokenizer.vocab_size))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (
            "json_schema",
            '{"type": "object"',
            "Expecting ',' delimiter: line 1 column 18 (char 17)",
        ),
        ("json_schema", "[]", "a schema is a JSON object"),
        ("json_schema", '{"type": "nonsense"}', "Invalid type: nonsense"),
        ("json_schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"enum": []}', "Unsatisfiable schema: anyOf is empty"),
        ("json_schema", '{"$ref": "#"}', "no text of this tokenizer has that form"),
        ("json_schema", '{"items":' * 999 + "1" + "}" * 999, "recursion"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(" * 10**5 + ")" * 10**5, "nested parentheses"),
        ("regex", r"[^\s\S]", "no text of this tokenizer has that form"),
        ("lark", "start: other", 'unknown name: "other"'),
        ("lark", "", "Empty grammar"),
    ],
)
def test_what_cannot_be_compiled(compiler, kind, text, reason):
    got = message(compiler.compile, GrammarSpec(kind, text, "form"))
    assert got.startswith(f"form: {kind} cannot be compiled: ")
    assert reason in got


def test_characters_that_a_tokenizer_lacks(tmp_path):
    roles = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tiny_tokenizers.save(tiny_tokenizers.t5(), tmp_path, **roles)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    tokenizer = import_tokenizer(tmp_path)
    compiler = GrammarCompiler(tokenizer)
    (a,) = tokenizer.encode("a")[-1:]
    got = message(compiler.compile, GrammarSpec("regex", "[{]a[}]"))
    assert got.endswith(
        "regex cannot be compiled: no text of this tokenizer has that form"
    )
    matcher = compiler.compile(GrammarSpec("regex", "a[{]"))
    assert ids_of(masks(matcher, tokenizer.vocab_size)) == [a]
    assert matcher.accept(a)
    assert not matcher.is_finished
    assert ids_of(masks(matcher, tokenizer.vocab_size)) == [tokenizer.eos_id]
    assert matcher.error == "no token can come next"
    assert matcher.is_finished
    assert not matcher.accept(tokenizer.eos_id)


def test_without_the_library(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert message(GrammarCompiler, tokenizer) == (
        "structured output needs the module llguidance; pip install 'maxlm[serve]'"
    )
