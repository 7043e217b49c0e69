"""Embeddings of a BERT beside transformers', from the same Hugging Face folder."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from maxlm.inference.embedding import Embedder
from maxlm.run.load import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "the cat sat",
    "a longer text about the weather of today, and of tomorrow",
    "x",
]


def test_a_berts_mean_and_first_vectors(tmp_path):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special)
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    pairs = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*pairs)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    settings = transformers.BertConfig(
        vocab_size=96, num_hidden_layers=2, max_position_embeddings=64, **sizes
    )
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(settings).eval()
    for values in theirs.parameters():
        torch.nn.init.normal_(values, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    rows = [
        [*ours.tokenizer.prefix_ids, *ours.tokenizer.encode(t), ours.tokenizer.eos_id]
        for t in TEXTS
    ]
    embedder = Embedder(ours.model, ours.params, ours.mesh, 64)
    with torch.no_grad():
        states = [
            theirs.bert(torch.tensor([row])).last_hidden_state[0].numpy()
            for row in rows
        ]
    for pooling, vectors in (
        ("mean", [s.mean(0) for s in states]),
        ("first", [s[0] for s in states]),
    ):
        expected = [vector / np.linalg.norm(vector) for vector in vectors]
        np.testing.assert_allclose(embedder.embed(rows, pooling), expected, atol=1e-5)
