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

MANY = "more than 20,000 values"
DEEP = "nested too deep, perhaps without end"
BOMBS = {
    "x: &a0 [x]": "aTHIS: &aTHIS [" + "*aLAST, " * 10 + "]",
    "x: &a0 {x: 1}": "aTHIS: &aTHIS {<<: [" + "*aLAST, " * 10 + "]}",
    "a0: [x]": "aTHIS: ['${aLAST}', '${aLAST}']",
    f"a0: {'x' * 99}": "aTHIS: ${aLAST}${aLAST}",
}
FILES = {
    "a: ${b}\nb: [['${a}']]": f": {DEEP}",
    "b: ${a.c}\na: ${a}": f": {DEEP}",
    f"name: {'[' * 9000}": f"run.yaml: {DEEP}",
    "a: &a {<<: *a}": f"run.yaml: {DEEP}",
    f"seed: 1{'0' * 5000}": "run.yaml:1: seed: unable to parse input string as an integer",
    "seed: !!int x": "run.yaml:1: the tag 'tag:yaml.org,2002:int' is not allowed",
    "folder: ${oc.env:SECRET}/x": "run.yaml:1: folder: bad reference ${oc.env:SECRET}; only",
}


class Anything(Config):
    name: str = ""
    seed: int = 0
    folder: str = ""


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """The one line for a file run.yaml and overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")

    def refused(text: str, *overrides: str) -> str:
        Path("run.yaml").write_text(text)
        with pytest.raises(MaxlmError) as caught:
            load_config(Anything, Path("run.yaml"), overrides)
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


def test_overrides_have_the_same_limits(refused):
    assert DEEP in refused("", f"name={'[' * 5000}")
    assert "is not an override" in refused("", f"{'.'.join('a' * 900)}=1")


ODD = [
    *("true", "0", "-1", "1.5", "1e400", ".nan", "9223372036854775808", "0x_", "''", "'1'", "yes"),
    *("..", "/etc", "-rf", "~", "[]", "{}", "[1]", "²", "1_000", "&a [*a]", "{<<: 3}", "{=: 3}"),
    *('"\\n"', "x" * 300, "1" + "0" * 5000, "[" * 999, "{a: " * 999, "{? [a] : b}"),
    *("${name}", "${", "${}", "x${model}", "${model}", "!!bool x", "!!set {a}", "\u202e"),
]


def test_whatever_is_put_in_place_of_a_value(tmp_path):
    choose = random.Random(5).choice
    demo = load_config(RunConfig, "demo").value
    keys = [join_key(key) for key, _ in flatten(parse_yaml(to_yaml(demo), "").to_plain())]
    passed = 0
    for odd in ODD * 2:
        with suppress(MaxlmError):
            run = load_config(RunConfig, "demo", [f"{choose(keys)}={odd}"]).value
            (tmp_path / "again.yaml").write_text(to_yaml(run))
            assert load_config(RunConfig, tmp_path / "again.yaml").value == run
            passed += 1
    assert 0 < passed < len(ODD)
