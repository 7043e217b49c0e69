"""Promise: each mistake in a config is one line that says what, where and what to do,
whatever is written; and what is written shortly fills no memory."""

import random
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import model_validator

from maxlm.config import Config, MaxlmError
from maxlm.config.keys import flatten, join_key
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.config.yaml_text import parse_yaml
from maxlm.run.config import RunConfig
from tests.config.example import Model, Run, Source


@pytest.fixture
def message(tmp_path, monkeypatch):
    """The message for a file run.yaml of this text, with these overrides."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("mesh: {data: 2}\ndata:\n  sources: [{path: a}]\n")

    def message(text: str | bytes, *overrides: str, cls: type[Config] = Run) -> str:
        data = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        Path("run.yaml").write_bytes(data)
        with pytest.raises(MaxlmError) as caught:
            load_config(cls, Path("run.yaml"), overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


ENDLESS = "nested too deep, perhaps without end"
UNKNOWN_KEYS = {
    "model:\n  d_modl: 3": "run.yaml:2: unknown key model.d_modl; did you mean "
    "model.d_model?",
    "model: {weight: 3}": "run.yaml:1: unknown key model.weight; "
    "did you mean data.sources.0.weight? "
    "valid here: d_model, num_heads, num_kv_heads, activation, bias",
    "model.d_model: 3": "run.yaml:1: unknown key model.d_model; "
    "write it nested, one mapping inside the other",
    "model: {include: b}": "run.yaml:1: unknown key model.include; "
    "`include` stands at the top of a file only",
    "data:\n  sources:\n    - path: a\n      wieght: 3": "run.yaml:4: unknown key "
    "data.sources.0.wieght; did you mean data.sources.0.weight?",
    "optimizer: {kind: lion, lr: 3}": "run.yaml:1: unknown key optimizer.lr; "
    "valid here: kind, beta",
}

WRONG_VALUES = {
    "model:\n  d_model: four": "run.yaml:2: model.d_model must be an integer, not "
    "'four'",
    "model: {d_model: -1}": "run.yaml:1: model.d_model must be greater than 0, not -1",
    "model: [1]": "run.yaml:1: model must be a mapping "
    "(d_model, num_heads, num_kv_heads, activation, bias), not [1]",
    "optimizer: 3": "run.yaml:1: optimizer must be a mapping (kind, lr, beta), not 3",
    "data: {sources: [{weight: 3}]}": "run.yaml:1: data.sources.0.path is required; "
    "add it, or pass data.sources.0.path=...",
    "name: 3": "run.yaml:1: name must be text, not 3; put quotes around it: '3'",
    "model: {activation: sillu}": "run.yaml:1: model.activation must be one of 'silu', "
    "'gelu', "
    "not 'sillu'; did you mean silu?",
    "optimizer:\n  kind: adam": "run.yaml:2: optimizer.kind must be one of 'adamw', "
    "'lion', "
    "not 'adam'; did you mean adamw?",
    "optimizer: {lr: 3}": "run.yaml:1: optimizer.kind is required; "
    "set it to one of 'adamw', 'lion'",
    "data: {workers: many}": "run.yaml:1: data.workers must be 'auto' or an integer, "
    "not 'many'",
    "share: .nan": "run.yaml:1: share must be a finite number, not nan",
    f"share: {'y' * 90}": f"run.yaml:1: share must be a number, not '{'y' * 56}...",
}

VALIDATORS = {
    "data:\n  seq_len: 9": "run.yaml:2: data.seq_len: seq_len=9 is not a multiple of 8",
    "data:\n  seq_len: 8000": "run.yaml:2: data.seq_len=8000 is too long for x",
    "model:\n  num_heads: 6": "run.yaml:2: model: num_heads=6 is not divisible by 4; "
    "choose a divisor",
    "name: raise": "tokenizer/vocab.json: no such thing",
}

YAML = {
    "a: [1\nb: 2": "run.yaml:2: not YAML: while parsing a flow sequence "
    "expected ',' or ']', but got ':'",
    "a:\n\t- b": "run.yaml:2: not YAML: while scanning for the next token found "
    "character '\\t' "
    "that cannot start any token; indent with spaces, not tabs",
    "name: a\n\nname: b": "run.yaml:3: key 'name' is already set on line 1; remove one "
    "of the two",
    "# list\n- 1": "run.yaml:2: a config must be a mapping of keys to values",
    "\nname: 'a\0'": "run.yaml: not YAML: unacceptable character #x0000: special "
    'characters are not allowed in "<unicode string>", position 9',
    "a: &a [*a]": f"run.yaml:1: {ENDLESS}",
    "a: &a {<<: *a}": f"run.yaml: {ENDLESS}",
    f"name: {'[' * 9000}": f"run.yaml: {ENDLESS}",
    "[a]: 3": "run.yaml:1: a key must be a plain name",
    "a: !!python/object:os.system {}": "run.yaml:1: the tag "
    "'tag:yaml.org,2002:python/object:os.system' is not allowed",
    b"name: a\nout: \xff": "run.yaml:2: not UTF-8 text (byte 0xff); save it as UTF-8",
}

INCLUDES = {
    "include: bass.yaml": "run.yaml:1: include 'bass.yaml': there is no bass.yaml; "
    "did you mean base.yaml?",
    "name: a\ninclude:\n  - base.yaml\n  - q/zzz": "run.yaml:4: include 'q/zzz': there "
    "is no q/zzz",
    "include: run.yaml": "run.yaml:1: include cycle: run.yaml -> run.yaml; "
    "remove one of these includes",
    "include: base.yaml\nmesh: [1]": "run.yaml:2: mesh is a list here, but a mapping "
    "in "
    "base.yaml:1; write both alike",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(text, expected, id=str(text)[:40])
        for group in (UNKNOWN_KEYS, WRONG_VALUES, VALIDATORS, YAML, INCLUDES)
        for text, expected in group.items()
    ],
)
def test_a_faulty_file(message, text, expected):
    assert message(text) == expected


OVERRIDES = {
    "modl.d_model=3": "command line: unknown key modl; did you mean model?",
    "include=b": "command line: unknown key include; `include` stands at the top of a "
    "file only",
    "name=3": "command line: name must be text, not 3; write name=\"'3'\"",
    "a..b=3": "command line: 'a..b=3' is not an override; "
    "write key=value, such as model.num_layers=4",
    "name=[1": "command line: name=[1: not YAML: while parsing a flow sequence "
    "expected ',' or ']', but got '<stream end>'",
    "data.sources.1.path=b": "command line: data.sources is a list of 1 element; "
    "there is no data.sources.1; count from 0, or give the whole list",
    "data.sources={path: b}": "command line: data.sources is a mapping here, but a "
    "list in "
    "base.yaml:3; write both alike",
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items())
def test_a_faulty_override(message, override, expected):
    assert message("include: base.yaml", override) == expected


@pytest.mark.heavy
def test_overrides_have_the_same_limits(message):
    assert ENDLESS in message("", f"name={'[' * 5000}")
    assert "is not an override" in message("", f"{'.'.join('a' * 900)}=1")


BOMBS = {
    "x: &a0 [x]": "aTHIS: &aTHIS [" + "*aLAST, " * 10 + "]",
    "x: &a0 {x: 1}": "aTHIS: &aTHIS {<<: [" + "*aLAST, " * 10 + "]}",
}


@pytest.mark.parametrize("start", BOMBS, ids=("aliases", "merges"))
def test_much_that_is_written_shortly(message, start):
    lines = (
        BOMBS[start].replace("THIS", f"{i}").replace("LAST", f"{i - 1}")
        for i in range(1, 50)
    )
    assert "more than 20,000 values" in message("\n".join((start, *lines)))


def test_a_check_names_every_place_it_speaks_of(message):
    text = "name: a\nmodel:\n  num_heads: 6\n"
    kv = "num_heads=6 is not divisible by num_kv_heads=4"

    class Strict(Config):
        num_heads: int
        num_kv_heads: int

        @model_validator(mode="after")
        def _check(self):
            raise ValueError(kv)

    class Outer(Config):
        model: Strict

    assert message(text[8:], "model.num_kv_heads=4", cls=Outer) == (
        f"run.yaml:2, command line: model: {kv}"
    )


def test_several_faults_are_counted_and_a_misspelt_key_comes_first(message):
    class Needs(Config):
        width: int
        depth: int
        name: str = ""

    assert message("wdith: 3\nname: 4\n", cls=Needs) == (
        "run.yaml:1: unknown key wdith; did you mean width or depth? (and 3 more)"
    )
    assert message("width: x\ndepth: y\n", cls=Needs) == (
        "run.yaml:1: width must be an integer, not 'x' (and 1 more)"
    )


def test_a_fault_in_an_included_file_is_placed_there_and_cycles_are_named(message):
    Path("sub").mkdir()
    Path("sub/b.yaml").write_text("\nmodel:\n  d_model: x\n")
    Path("a.yaml").write_text("\ninclude: sub/b.yaml\n")
    assert message("include: a.yaml") == (
        "sub/b.yaml:3: model.d_model must be an integer, not 'x'"
    )
    Path("sub/b.yaml").write_text("include: [../run.yaml]\n")
    assert message("include: a.yaml") == (
        "sub/b.yaml:1: include cycle: run.yaml -> a.yaml -> sub/b.yaml -> run.yaml; "
        "remove one of these includes"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Path("nope.yaml"), "nope.yaml: cannot be read: No such file or directory"),
        (None, "command line: path is required; add it, or pass path=..."),
    ],
)
def test_a_file_or_a_value_that_is_missing(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaxlmError) as caught:
        load_config(Source, source)
    assert str(caught.value) == expected


def test_a_bare_class_still_raises_its_own_error():
    with pytest.raises(MaxlmError) as caught:
        Model(num_heads=6)
    assert caught.value.where is None


ODD = [
    *(
        "true",
        "0",
        "-1",
        "1.5",
        "1e400",
        ".nan",
        "9223372036854775808",
        "0x_",
        "''",
        "'1'",
        "yes",
    ),
    *(
        "..",
        "/etc",
        "-rf",
        "~",
        "[]",
        "{}",
        "[1]",
        "²",
        "1_000",
        "&a [*a]",
        "{<<: 3}",
        "{=: 3}",
    ),
    *('"\\n"', "x" * 300, "1" + "0" * 5000, "[" * 999, "{a: " * 999, "{? [a] : b}"),
    *(
        "${name}",
        "${",
        "${}",
        "x${model}",
        "${model}",
        "!!bool x",
        "!!set {a}",
        "\u202e",
    ),
]


@pytest.mark.heavy
def test_whatever_is_put_in_place_of_a_value(tmp_path):
    choose = random.Random(5).choice
    demo = load_config(RunConfig, "demo").value
    keys = [
        join_key(key) for key, _ in flatten(parse_yaml(to_yaml(demo), "").to_plain())
    ]
    passed = 0
    for odd in ODD * 2:
        with suppress(MaxlmError):
            run = load_config(RunConfig, "demo", [f"{choose(keys)}={odd}"]).value
            (tmp_path / "again.yaml").write_text(to_yaml(run))
            assert load_config(RunConfig, tmp_path / "again.yaml").value == run
            passed += 1
    assert 0 < passed < len(ODD)
