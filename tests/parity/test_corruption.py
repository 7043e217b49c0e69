"""Masking chooses and replaces as transformers' collator does, on average: that one draws each
token by itself, ours fills a share."""

import numpy as np
import pytest

from maxlm.tasks.corrupt import mask_tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

ROWS, LENGTH = 400, 128
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")


@pytest.fixture(scope="module")
def tokenizer():
    """Words w0 ... w194 behind five special ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = (*SPECIAL, *(f"w{i}" for i in range(195)))
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "cls_token", "sep_token", "mask_token", "unk_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, **dict(zip(names, SPECIAL, strict=True))
    )


def rows():
    """[CLS], words, [SEP], and padding of all lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, (ROWS, LENGTH)).astype(np.int32)
    ends = rng.integers(LENGTH // 2, LENGTH, ROWS)
    place = np.arange(LENGTH)
    tokens[:, 0] = 1
    tokens[place == ends[:, None]] = 2
    tokens[place > ends[:, None]] = 0
    return tokens, (place <= ends[:, None]).astype(np.int32)


def shares(before, after, chosen):
    """Of candidates that are chosen; of the chosen that are masked, changed otherwise, kept."""
    candidates = before >= 5
    assert not (chosen & ~candidates).any()
    was, now = before[chosen], after[chosen]
    masked, kept = now == 3, now == was
    return np.array(
        [
            chosen.sum() / candidates.sum(),
            masked.mean(),
            (~masked & ~kept).mean(),
            kept.mean(),
        ]
    )


def test_as_much_is_masked_and_replaced(tokenizer):
    tokens, segments = rows()
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, return_tensors="np", seed=0)
    batch = collate([{"input_ids": row} for row in tokens.tolist()])
    theirs = shares(tokens, batch["input_ids"], batch["labels"] != -100)
    np.testing.assert_array_equal(
        batch["labels"][batch["labels"] != -100], tokens[batch["labels"] != -100]
    )

    special = np.arange(len(tokenizer)) < len(SPECIAL)
    assert set(np.flatnonzero(special)) == set(tokenizer.all_special_ids)
    rng = np.random.default_rng(0)
    ours = [
        mask_tokens(*row, rng, mask_id=tokenizer.mask_token_id, special=special)
        for row in zip(tokens, segments, strict=True)
    ]
    after, _, weights = (np.stack(arrays) for arrays in zip(*ours, strict=True))
    ours = shares(tokens, after, weights > 0)
    # Of 38,000 candidates, 5,700 chosen: each share within four deviations of a difference.
    counts = np.array([np.sum(tokens >= 5), *[weights.sum()] * 3])
    deviation = np.sqrt(2 * theirs * (1 - theirs) / counts)
    assert (np.abs(ours - theirs) < 4 * deviation).all()
    np.testing.assert_allclose(ours, [0.15, 0.8, 0.1, 0.1], atol=0.02)
