"""Promise: schemas that pydantic writes compile, and what their grammars let through is
what jsonschema, and pydantic itself, let through too."""

import base64
import ipaddress
import json
import random
import typing
import uuid
from collections.abc import Mapping
from datetime import date
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import jsonschema
import numpy as np
import pydantic
import pytest
from pydantic import Field, TypeAdapter

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.inference.grammar import GrammarCompiler
from maxlm.inference.json_schema import make_compilable_schema
from maxlm.inference.requests import GrammarSpec
from tests.errors import message


class Colour(Enum):
    red = "red"
    blue = "blue"


# Of the first, any value of the form is one that pydantic reads.
READ_BY_PYDANTIC = [
    bytes,
    pydantic.SecretStr,
    Path,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
    pydantic.IPvAnyAddress,
    pydantic.IPvAnyNetwork,
    pydantic.IPvAnyInterface,
    pydantic.UUID4,
    Fraction,
    pydantic.Base64Bytes,
    pydantic.Base64UrlBytes,
    set[int],
    set[Colour],
    frozenset[str],
    dict[Colour, int],
    dict[Literal["a", "b"], bool],
    dict[uuid.UUID, int],
    dict[ipaddress.IPv4Network, int],
    dict[Annotated[str, Field(min_length=1, max_length=4)], int],
    Annotated[dict[Colour, int], Field(min_length=1)],
]
COMPILED_ALONE = [typing.Pattern[str], ZoneInfo, pydantic.PostgresDsn, dict[date, int]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=258), ["abc"])


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def compile_schema(compiler: GrammarCompiler, schema: Any) -> Any:
    return compiler.compile(
        GrammarSpec("json_schema", json.dumps(schema), "response_format")
    )


def accepts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str
) -> bool:
    matcher = compile_schema(compiler, schema)
    going = all(matcher.accept(token) for token in tokenizer.encode(text))
    return going and (matcher.is_finished or matcher.accept(tokenizer.eos_id))


def draw_text(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, seed: int
) -> str:
    """An output of the form, drawn evenly from the tokens that may come next; one that
    goes on is ended where it can be."""
    matcher = compile_schema(compiler, schema)
    draw = random.Random(seed)
    row = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    tokens: list[int] = []
    while not matcher.is_finished:
        matcher.fill_mask(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        closing = [
            token for token in allowed if tokenizer.decode([token]) in ('"', "}", "]")
        ]
        if tokenizer.eos_id in allowed:
            break
        is_long = len(tokens) > 60
        tokens.append(draw.choice(closing if is_long and closing else allowed))
        assert matcher.accept(tokens[-1])
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", READ_BY_PYDANTIC, ids=str)
def test_outputs_are_what_jsonschema_and_pydantic_read(compiler, tokenizer, kind):
    adapter = TypeAdapter(kind)
    schema = adapter.json_schema()
    # No grammar keeps these, and pydantic takes repetitions into a set.
    lenient = {key: value for key, value in schema.items() if key != "uniqueItems"}
    for seed in range(6):
        text = draw_text(compiler, tokenizer, schema, seed)
        jsonschema.validate(json.loads(text), lenient)
        adapter.validate_json(text)


@pytest.mark.parametrize("kind", COMPILED_ALONE, ids=str)
def test_further_formats_compile(compiler, kind):
    compile_schema(compiler, TypeAdapter(kind).json_schema())


TEXTS = {
    "ipv4network": [
        "10.1.16.0/20",
        "0.0.0.0/0",
        "192.168.1.7",
        "1.2.3.4/32",
        "255.255.255.254/31",
    ],
    "ipv6network": ["2001:db8::/32", "::/0", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::/112"],
    "ipv6interface": [
        "::1",
        "1::8/64",
        "1:2:3:4:5:6:7::",
        "::2:3:4:5:6:7:8/1",
        "a::b:c:d:e:f:1",
    ],
    "base64": [base64.b64encode(bytes(range(200, 200 + n))).decode() for n in range(4)],
    "base64url": [base64.urlsafe_b64encode(b"\xff\xfe" * n).decode() for n in range(4)],
    "fraction": ["1/3", "-7", "+1/10"],
    "uuid4": ["9f2f2a4c-6d2b-4d0e-8f3a-0123456789ab"],
}
WRONG = {
    "ipv4network": ["10.1.16.0/19", "1.2.3.4/33", "256.0.0.0/8", "1.2.3/8"],
    "ipv6network": ["2001:db8::1/32", "::/129", "1::2::3", "1:2:3:4:5:6:7:8:9"],
    "ipv6interface": [":1", "1:2", "1:2:3:4:5:6:7::8:9", "::1/200"],
    "base64": ["a", "ab", "abc", "ab=c", "abc-"],
    "base64url": ["ab+/"],
    "fraction": ["1/0", "/3", "1/"],
    "uuid4": ["9f2f2a4c-6d2b-5d0e-8f3a-0123456789ab"],
}


def test_patterns_of_formats_take_the_usual_spellings_and_no_others(
    compiler, tokenizer
):
    for texts, expected in ((TEXTS, True), (WRONG, False)):
        for name, spellings in texts.items():
            schema = {"type": "string", "format": name}
            for text in spellings:
                assert (
                    accepts(compiler, tokenizer, schema, json.dumps(text)) is expected
                ), text


def test_names_of_properties_are_kept_where_references_begin_anew(compiler, tokenizer):
    inner = TypeAdapter(dict[Colour, int]).json_schema() | {
        "$id": "json-schema:///inner"
    }
    schema = {
        "type": "object",
        "properties": {"in": inner},
        "$defs": {"Colour": {"enum": ["no"]}},
    }
    schema |= {"additionalProperties": False, "required": ["in"]}
    assert accepts(compiler, tokenizer, schema, '{"in":{"red":1}}')
    assert not accepts(compiler, tokenizer, schema, '{"in":{"no":1}}')


def test_data_and_properties_that_are_named_as_keywords_stay(compiler, tokenizer):
    schema: Mapping[str, Any] = {
        "type": "object",
        "properties": {
            "format": {"const": {"format": "path", "uniqueItems": True}},
            "uniqueItems": {"enum": [{"uniqueItems": True}]},
        },
        "required": ["format", "uniqueItems"],
    }
    assert make_compilable_schema(schema) == (schema, frozenset())
    text = '{"format":{"format":"path","uniqueItems":true},"uniqueItems":{"uniqueItems":true}}'
    assert accepts(compiler, tokenizer, schema, text)


def test_what_is_dropped_is_named_once():
    items = {"type": "array", "uniqueItems": True}
    assert make_compilable_schema(items).dropped_keywords == {"uniqueItems"}
    for harmless in (
        {"uniqueItems": False},
        {**items, "maxItems": 1},
        {"format": "path"},
        True,
    ):
        assert not make_compilable_schema(harmless).dropped_keywords


def test_what_stays_refused_says_what_to_write(compiler):
    overlapping = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    assert "use anyOf" in message(compile_schema, compiler, overlapping)
    assert 'Unimplemented keys: ["not"]' in message(
        compile_schema, compiler, {"not": {}}
    )
    assert message(compile_schema, compiler, {"uniqueItems": 5})
