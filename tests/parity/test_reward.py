"""A reward model that is converted gives transformers' classifier the scores that it
gives, and one that transformers saved gives its scores here."""

import json

import numpy as np
import pytest

from maxlm.data.tokenizer.load import import_tokenizer
from maxlm.inference.embedding import Embedder
from maxlm.models.params import flatten_names
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.run.load import load_model, load_run
from maxlm.train.program import train_model
from maxlm.tune.references import score_texts
from tests.data.tokenizer.foreign import write_checkpoint
from tests.train import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = tiny.TEXT.split()


@pytest.mark.parametrize("tied", [True, False])
def test_scores_in_transformers(tied, tmp_path):
    random = np.random.default_rng(3)
    rows = [
        {"prompt": "the sun", "completion": " " + " ".join(random.choice(WORDS, n))}
        for n in (1, 4, 2)
    ]
    pairs = [{"prompt": "a", "chosen": " sea", "rejected": " wind"}] * 8
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pairs)
    )
    settings = tiny.settings(
        tmp_path, tiny.write_text(tmp_path / "text", 2), train={"steps": 1}
    )
    settings["data"] |= {"heldout_fraction": 0}
    settings["model"] |= {"init_std": 0.3, "tie_embeddings": tied}
    settings["tokenizer"] |= {"pad": "<pad>"}
    train_model(RunConfig.model_validate(settings), say=lambda _: None)
    settings["data"] |= {"sources": []}
    settings["model"] |= {"heads": {"score": 1}}
    task = {"kind": "reward", "files": [str(tmp_path / "pairs.jsonl")]}
    start = {"steps": 2, "start_from": str(tmp_path / "tiny")}
    settings |= {"name": "reward", "task": task, "train": start}
    run = train_model(RunConfig.model_validate(settings), say=lambda _: None).folder

    convert(run, tmp_path / "out")
    cls = transformers.AutoModelForSequenceClassification
    theirs = cls.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokenizer = load_run(run).tokenizer
    texts = [row["prompt"] + row["completion"] for row in rows]
    tokens = [
        [*tokenizer.prefix_ids, *tokenizer.encode(t), tokenizer.eos_id] for t in texts
    ]
    width = max(map(len, tokens))
    padded = [ids + [tokenizer.pad_id] * (width - len(ids)) for ids in tokens]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in tokens]
    with torch.no_grad():
        expected = theirs(
            torch.tensor(padded), attention_mask=torch.tensor(mask)
        ).logits[:, 0]
    ours = score_texts(run, rows)
    assert np.ptp(ours) > 0.05
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)

    convert(tmp_path / "out", tmp_path / "back")
    want, back = (
        flatten_names(load_run(path).params) for path in (run, tmp_path / "back")
    )
    assert want.keys() == back.keys()
    for name in want:
        np.testing.assert_array_equal(back[name], want[name], err_msg=name)


@pytest.mark.parametrize(("name", "labels"), [("Llama", 1), ("Qwen3", 2)])
def test_untied_classifiers_of_transformers(name, labels, tmp_path):
    write_checkpoint(tmp_path / "published", "smollm2")  # a run has a tokenizer
    vocab_size = max(import_tokenizer(tmp_path / "published").vocab_size, 97)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    head = {"num_labels": labels, "pad_token_id": 0, "tie_word_embeddings": False}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocab_size, initializer_range=0.3, **sizes, **heads, **head
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "run")
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 97, size).tolist() for size in (3, 9, 5)]
    with torch.no_grad():
        expected = [theirs(torch.tensor([row])).logits[0].numpy() for row in tokens]
    run = load_model(tmp_path / "run")
    scores = Embedder(run.model, run.params, run.mesh, 16).apply_head(tokens, "score")
    assert scores.shape == (3, labels)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
