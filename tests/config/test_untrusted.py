"""Promise: a config from elsewhere ends in one line at worst: it fills no memory and reads no
secrets."""

import random
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from maxlm.config import Config, MaxlmError, load_config, to_yaml
from maxlm.config.keys import flatten, join_key
from maxlm.config.yaml_text import parse_yaml
from maxlm.run import RunConfig

MANY = "more than 20,000 values; write less (aliases, includes and"
DEEP = "nested more than 64 levels deep, perhaps without end; write less (aliases, includes and"
BOMBS = {
    "x: &a0 [x]": "aTHIS: &aTHIS [" + "*aLAST, " * 10 + "]",
    "x: &a0 {x: 1}": "aTHIS: &aTHIS {<<: [" + "*aLAST, " * 10 + "]}",
    "a0: [x]": "aTHIS: ['${aLAST}', '${aLAST}']",
    f"a0: {'x' * 99}": "aTHIS: ${aLAST}${aLAST}",
}
SOURCES = ", ".join(f"{{name: x{i}, store: s}}" for i in range(2000))
FILES = {
    "a: ${b}\nb: [['${a}']]": f": {DEEP}",
    "b: ${a.c}\na: ${a}": f": {DEEP}",
    f"name: {'[' * 9000}": f"run.yaml:1: {DEEP}",
    f"a: &a {'[' * 40}{']' * 40}\nb: {'[' * 30}*a{']' * 30}": f"run.yaml:1: b.0.0.0: {DEEP}",
    "a: &a {<<: *a}": f"run.yaml:1: a: {DEEP}",
    f"a: &a {{{', '.join(map('k{}: 1'.format, range(3000)))}}}\nb: {{<<: [{'*a, ' * 3000}]}}": MANY,
    f"include: demo\ndata: {{sources: [{SOURCES}]}}": MANY,  # With its defaults.
    f"seed: 1{'0' * 5000}": "run.yaml:1: seed must be an integer, not '1000",
    f"seed: 0x{'f' * 5000}": "run.yaml:1: seed must be an integer, not '0xfff",
    'folder: "a\\0b"': "run.yaml:1: not YAML: character U+0000 is not allowed",
    'folder: "\\ud800"': "run.yaml:1: not YAML: character U+D800 is not allowed",
    "seed: !!int x": "run.yaml:1: the tag 'tag:yaml.org,2002:int' is not allowed",
    "folder: ${oc.env:SECRET}/x": "run.yaml:1: folder: ${oc.env:SECRET} is not filled in, only "
    '${key.path} is; pass folder="$VARIABLE" on the command line, where the shell fills it',
    "name: env\nfolder: ${oc.${name}:SECRET}": "run.yaml:2: folder: ${oc.${name} names no key",
}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The one line for a file run.yaml and overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")

    def refused(text: str, *overrides: str) -> str:
        Path("run.yaml").write_text(text)
        with pytest.raises(MaxlmError) as caught:
            load_config(RunConfig, Path("run.yaml"), overrides)
        line = str(caught.value)
        assert not [word for word in ("\n", "hunter2") if word in line]
        return line

    return refused


@pytest.mark.parametrize("start", BOMBS, ids=("aliases", "merges", "references", "texts"))
def test_little_memory_for_much_that_is_written_shortly(refused, start):
    lines = (BOMBS[start].replace("THIS", f"{i}").replace("LAST", f"{i - 1}") for i in range(1, 50))
    tracemalloc.start()
    try:
        assert MANY in refused("\n".join((start, *lines)))
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_file(refused, text):
    assert FILES[text] in refused(text)


def test_overrides_and_includes_have_the_same_limits(refused):
    assert DEEP in refused("", f"model.mlp={'[' * 5000}")
    assert DEEP in refused("", f"{'.'.join('a' * 900)}=1")
    for number in range(40):
        Path(f"{number}.yaml").write_text(f"include: [{number + 1}.yaml, {number + 1}.yaml]")
    Path("40.yaml").write_text("")
    assert MANY in refused("include: 0.yaml")


def test_references_lead_through_one_another(tmp_path):
    class Parts(Config):
        a: dict[str, list[int]]
        b: dict[str, list[int]]
        c: int
        texts: list[str]

    path = tmp_path / "run.yaml"
    path.write_text(
        "a: {x: [3, 5]}\nb: ${a}\nc: ${b.x[1]}\n"
        r"texts: ['${c}-${b.x.0}', '\${c}', '\\${c}', 'a\\b', '\\\${c}${c}', '${texts.1}']"
    )
    assert load_config(Parts, path, ["a.x.1=7"]).value == Parts(
        a={"x": [3, 7]},
        b={"x": [3, 7]},
        c=7,
        texts=["7-3", "${c}", r"\7", r"a\\b", r"\${c}7", "${c}"],
    )


ODD = [
    *("true", "0", "-1", "1.5", "1e400", ".nan", "9223372036854775808", "0x_", "''", "'1'", "yes"),
    *("..", "/etc", "-rf", "~", "[]", "{}", "[1]", "²", "1_000", "&a [*a]", "{<<: 3}", "{=: 3}"),
    *('"a\\0b"', '"\\n"', "x" * 300, "1" + "0" * 5000, "[" * 999, "{a: " * 999, "{? [a] : b}"),
    *("${name}", "${", "${}", "x${model}", "${model}", "???", "!!bool x", "!!set {a}", "\u202e"),
]


def test_whatever_is_put_in_place_of_a_value(tmp_path):
    choose = random.Random(5).choice
    demo = load_config(RunConfig, "demo").value
    keys = [join_key(key) for key, _ in flatten(parse_yaml(to_yaml(demo), "").data)]
    passed = 0
    for odd in ODD * 2:
        with suppress(MaxlmError):
            run = load_config(RunConfig, "demo", [f"{choose(keys)}={odd}"]).value
            (tmp_path / "again.yaml").write_text(to_yaml(run))
            assert load_config(RunConfig, tmp_path / "again.yaml").value == run
            passed += 1
    assert 0 < passed < len(ODD)
