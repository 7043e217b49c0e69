"""The loader on a token store on disk: the tokens of the store, also from a worker process."""

import numpy as np
import pytest

from maxlm.data.loader import LoaderConfig, make_batches, make_loader
from maxlm.data.loader.prefetch import SHORT_RUN_STEPS
from maxlm.data.store import Manifest, TokenStore
from maxlm.data.store.arrays import create_array, write_array
from maxlm.data.store.manifest import write_manifest


@pytest.fixture
def store_and_tokens(tmp_path):
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(random.integers(2, 90, 200))])
    tokens = random.integers(0, 70000, offsets[-1]).astype(np.uint32)
    for name, values in (("tokens", tokens), ("offsets", offsets)):
        array = create_array(tmp_path, name, values.size, values.dtype.name)
        write_array(array, 0, values, tmp_path)
    description = {
        "format_version": 1,
        "tokenizer_fingerprint": "",
        "vocab_size": 70000,
        "bos_id": 0,
        "eos_id": 1,
        "dtype": "uint32",
        "num_tokens": tokens.size,
        "num_documents": offsets.size - 1,
        "text_bytes": 0,
        "split": "all",
        "heldout_fraction": 0.0,
        "text_field": "text",
        "on_bad_bytes": "error",
        "num_binary_files": 0,
        "sources": [],
    }
    write_manifest(tmp_path, Manifest.model_validate(description))
    return TokenStore.open(tmp_path), tokens


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_is_the_store(store_and_tokens, packing):
    store, tokens = store_and_tokens
    config = LoaderConfig(seq_len=32, batch_size=1, packing=packing)
    batches = make_batches({"a": store}, {"a": 1}, config, seed=0)
    steps = range(batches.sources[0].packing.num_sequences)
    made = [batches.rows(step) for step in steps]
    seen = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in made])
    assert np.array_equal(np.sort(seen), np.sort(tokens))
    pairs = [(b["tokens"][b["weights"] > 0], b["targets"][b["weights"] > 0]) for b in made]
    inside = np.delete(np.arange(tokens.size), store.offsets[1:] - 1)
    expected = sorted(zip(tokens[inside].tolist(), tokens[inside + 1].tolist(), strict=True))
    assert sorted(p for a, b in pairs for p in zip(a.tolist(), b.tolist(), strict=True)) == expected


def test_a_worker_reopens_the_store_and_its_index(store_and_tokens):
    store, _ = store_and_tokens
    config = LoaderConfig(seq_len=32, batch_size=4, packing="best_fit", workers=1)
    batches = make_batches({"a": store}, {"a": 1}, config, seed=2)
    steps = SHORT_RUN_STEPS + 3
    with make_loader(
        {"a": store}, {"a": 1}, config, seed=2, start_step=9, num_steps=steps
    ) as loader:
        for step in range(9, 9 + steps):
            batch, expected = next(loader), batches.rows(step)
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)
