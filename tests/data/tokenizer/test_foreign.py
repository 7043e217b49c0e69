"""Checkpoints' tokenizers taken in, kept in maxlm's folders, and given back."""

import io
import json
import os

import pytest

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import export_tokenizer, import_tokenizer, load_tokenizer
from tests.data.tokenizer.foreign import MAKERS, TEXTS, write_checkpoint
from tests.errors import message

TEXT = "  the quick </s>größer\n\n  12 猫 <|im_start|> <mask>"

# name: bos, eos, pad, and whether a prompt opens with bos.
EXPECTED = {
    "smollm2": ("<|im_start|>", "<|im_end|>", None, False),
    "qwen": ("<|endoftext|>", "<|endoftext|>", None, False),
    "roberta": ("<s>", "</s>", None, True),
    "llama2": ("<s>", "</s>", None, True),
    "gemma": ("<s>", "</s>", None, True),
    "t5": ("</s>", "</s>", "<pad>", False),
    "bert": ("[CLS]", "[SEP]", "[PAD]", True),
}


@pytest.fixture
def llama(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", "llama2")


def settings(folder, name="tokenizer_config.json", **values):
    (folder / name).write_text(json.dumps(values))
    return import_tokenizer(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", MAKERS)
def test_roles(name, tmp_path):
    folder = write_checkpoint(tmp_path, name)
    ours = import_tokenizer(folder)
    ids = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in ids}
    bos, eos, pad, opens = EXPECTED[name]
    assert isinstance(ours, Tokenizer)
    assert (ours.bos_id, ours.eos_id) == (ids[bos], ids[eos])
    assert ours.pad_id == (None if pad is None else ids[pad])
    assert ours.prefix_ids == ((ids[bos],) if opens else ())
    assert list(ours.special_tokens.values()) == sorted(ours.special_tokens.values())
    unknown = {"t5": {"<unk>"}, "bert": {"[UNK]"}}.get(name, set())
    ordinary = {"<tool>", "    ", "fox hole", "▁▁"} | unknown
    assert set(ours.special_tokens) == set(ids) - ordinary


@pytest.mark.parametrize("name", MAKERS)
def test_there_and_back(name, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", name)
    ours = import_tokenizer(checkpoint)
    ours.save(tmp_path / "kept")
    loaded = load_tokenizer(tmp_path / "kept")
    assert loaded.fingerprint == ours.fingerprint
    roles = (
        "bos_id",
        "eos_id",
        "pad_id",
        "prefix_ids",
        "special_tokens",
        "vocab_size",
        "lossless",
    )
    for role in roles:
        assert getattr(loaded, role) == getattr(ours, role)
    for special in (False, True):
        ids = ours.encode(TEXT, allow_special=special)
        assert loaded.encode(TEXT, allow_special=special) == ids
        assert loaded.decode(ids) == ours.decode(ids)
    loaded.save(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "kept")

    brought = files(checkpoint)
    del brought["config.json"]
    assert files(tmp_path / "kept").keys() == {*brought, "maxlm_tokenizer.json"}
    for source in (ours, loaded):
        export_tokenizer(source, tmp_path / "given" / "back")
        assert files(tmp_path / "given" / "back") == brought


def test_roles_are_looked_for_in_turn(llama):
    ids = {"generation_config.json": 2, "config.json": 1}
    for name, i in ids.items():
        (llama / name).write_text(
            json.dumps({"eos_token_id": [i, 0], "pad_token_id": i})
        )
    ours = settings(llama, eos_token="<absent>")
    assert (ours.eos_id, ours.pad_id) == (2, 2)
    (llama / "generation_config.json").write_text('{"eos_token_id": null}')
    ours = settings(llama, eos_token=None)
    assert (ours.eos_id, ours.pad_id) == (1, 1)
    ours = settings(llama, "special_tokens_map.json", eos_token={"content": "<unk>"})
    assert ours.eos_id == 0
    assert settings(llama, eos_token="</s>").eos_id == 2


@pytest.mark.parametrize("value", ['"2"', "2.0", "true", '["</s>"]', '{"a": 2}'])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_id_is_refused(llama, name, value):
    (llama / name).write_text(f'{{"eos_token_id": {value}}}')
    text = message(settings, llama, eos_token="</s>")
    assert text.startswith(f"{llama / name}: eos_token_id=")
    assert " is no id of a token; write a whole number, or a list" in text


def test_deep_settings_are_refused(llama):
    (llama / "generation_config.json").write_text("[" * 5000 + "]" * 5000)
    assert "generation_config.json: cannot be read (nested deeper" in message(
        settings, llama
    )


def test_a_named_pipe_is_not_waited_for(llama):
    (llama / "tokenizer.json").unlink()
    os.mkfifo(llama / "tokenizer.json")
    assert "tokenizer.json: neither a file nor" in message(import_tokenizer, llama)


def test_whether_prompts_open_with_bos_is_the_post_processors_word(llama):
    imported = settings(llama, bos_token="<s>", eos_token="</s>", add_bos_token=False)
    assert imported.prefix_ids == (1,)
    data = json.loads((llama / "tokenizer.json").read_text())
    (llama / "tokenizer.json").write_text(json.dumps({**data, "post_processor": None}))
    for added, opening in ((True, (1,)), (False, ()), (None, ())):
        imported = settings(
            llama, bos_token="<s>", eos_token="</s>", add_bos_token=added
        )
        assert imported.prefix_ids == opening
        assert imported.bos_id == 1
    assert settings(llama, eos_token="</s>", add_bos_token=True).prefix_ids == ()


def test_what_cannot_be_loaded_imported_or_trained(llama, tmp_path):
    assert "make a tokenizer of it with `maxlm tokenizer import`" in message(
        load_tokenizer, llama
    )
    (tmp_path / "vocab.json").write_text("{}")
    assert "no tokenizer.json here; let transformers write" in message(
        import_tokenizer, tmp_path
    )
    assert "no such folder" in message(import_tokenizer, tmp_path / "missing")
    assert "damaged tokenizer file" in message(
        import_tokenizer, tmp_path / "vocab.json"
    )
    for content in ("{", "[]"):
        (llama / "tokenizer_config.json").write_text(content)
        assert "tokenizer_config.json: cannot be read (" in message(
            import_tokenizer, llama
        )
    (llama / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: damaged tokenizer file (" in message(
        import_tokenizer, llama
    )
    assert "is imported, not trained" in message(TokenizerConfig, kind="huggingface")


def sentencepiece(folder, **options):
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).split("\n") * 3),
        model_writer=model,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        **{
            "vocab_size": 324,
            "byte_fallback": True,
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            **options,
        },
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>"}'
    )
    return folder


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_sentencepiece_model_that_changes_nothing_is_taken(tmp_path, model):
    folder = sentencepiece(tmp_path / "checkpoint", model_type=model)
    ours = import_tokenizer(folder)
    assert (ours.kind, ours.lossless) == (f"sentencepiece_{model}", True)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.prefix_ids) == (
        1,
        2,
        None,
        (1,),
    )
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert not {1, 2} & set(ours.encode("<s></s>"))
    ours.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").fingerprint == ours.fingerprint
    export_tokenizer(load_tokenizer(tmp_path / "kept"), tmp_path / "out")
    assert files(tmp_path / "out") == files(folder)


@pytest.mark.parametrize(
    "options", [{"add_dummy_prefix": True}, {"byte_fallback": False, "vocab_size": 70}]
)
def test_a_sentencepiece_model_that_changes_text_is_refused(tmp_path, options):
    folder = sentencepiece(tmp_path / "checkpoint", **options)
    assert "model changes text, lacks bytes or has tokens" in message(
        import_tokenizer, folder
    )
