"""PEFT's prefix and prompt tuning, and ours of the same arrays: logits of real tokens
of ragged sequences, which stand in one row here and in a row each there; and PEFT's
files, both ways."""

import json

import numpy as np
import pytest

from maxlm.adapters.virtual_tokens import (
    PrefixAdapter,
    PromptAdapter,
    from_peft,
    to_peft,
)
from maxlm.config import MaxlmError
from maxlm.models.params import flatten_names, param_specs
from maxlm.models.transforms import build_transformed_model
from maxlm.run.convert import convert
from maxlm.run.load import load_run
from maxlm.sharding import AxisRules
from tests.parity import compare, measure

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

N = 4
LENGTHS = (13, 6)
ADAPTERS = {
    "prefix": (PrefixAdapter(num_virtual_tokens=N), "PrefixTuningConfig"),
    "prompt": (PromptAdapter(num_virtual_tokens=N), "PromptTuningConfig"),
}


def adapt(name, kind):
    """A model with random vectors of PEFT's, and these vectors."""
    case = measure.case(name)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
    if (
        name in ("llama", "gemma", "gemma3") and kind == "prefix"
    ):  # head_dim is not D / heads
        heads, size = case.config.attention.num_kv_heads, case.config.attention.head_dim
        settings |= {"token_dim": heads * size, "num_attention_heads": heads}
    config = getattr(peft, ADAPTERS[kind][1])(**settings)
    model = peft.get_peft_model(measure.build(name), config).eval()
    model.base_model.load_state_dict(case.model.state_dict())
    (embedding,) = [p for p in model.prompt_encoder.parameters() if p.requires_grad]
    torch.manual_seed(1)
    with torch.no_grad():
        embedding.normal_()
    return model, embedding


@pytest.mark.parametrize("kind", ADAPTERS)
# Grouped heads; learned positions; scaled embeddings; windows and norms of keys as
# well.
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "gemma3"])
def test_logits_and_counts_are_pefts(name, kind):
    case = measure.case(name)
    adapter = ADAPTERS[kind][0]
    model, embedding = adapt(name, kind)

    specs = param_specs(
        build_transformed_model(
            case.config, [adapter], rules=AxisRules(), dtype="float32"
        )
    )
    shapes = {
        n: s.shape for n, s in flatten_names(specs).items() if n.endswith(".virtual")
    }
    assert sum(map(np.prod, shapes.values())) == model.get_nb_trainable_parameters()[0]
    scale = case.config.embedding_scale
    arrays = from_peft(embedding.detach().numpy(), shapes, scale)
    np.testing.assert_allclose(
        to_peft(arrays, scale), embedding.detach().numpy(), rtol=1e-6
    )

    random = np.random.default_rng(0)
    texts = [random.integers(0, case.config.vocab_size, length) for length in LENGTHS]
    # [2, longest], padded on the right.
    tokens, mask = (np.zeros((2, max(LENGTHS)), np.int64) for _ in range(2))
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)
        ).logits
    expected = [
        x[-max(LENGTHS) :][:size].numpy()
        for x, size in zip(expected, LENGTHS, strict=True)
    ]

    row = np.concatenate([np.pad(text, (N, 0)) for text in texts])[None]
    sizes = [N + size for size in LENGTHS]
    positions = np.concatenate([np.arange(size) for size in sizes])[None]
    segments = np.repeat([1, 2], sizes)[None]
    based = {
        name.removesuffix(".virtual"): f"{name.removesuffix('.virtual')}.base"
        for name in arrays
    }
    flat = {
        based.get(name, name): array for name, array in case.params.items()
    } | arrays
    got = compare.logits(case.config, flat, row, positions, segments, adapter=adapter)[
        0
    ]
    got = [got[N : sizes[0]], got[sizes[0] + N :]]
    for ours, theirs in zip(got, expected, strict=True):
        assert measure.relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_files_hold_the_same_vectors_both_ways(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("maxlm.run.load.load_tokenizer", lambda folder: None)
    theirs, embedding = adapt(name, kind)
    theirs.save_pretrained(tmp_path / "peft")
    theirs.base_model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "peft", tmp_path / "run", base=tmp_path / "base")
    params = flatten_names(load_run(tmp_path / "run").params)
    arrays = {
        name: np.asarray(x) for name, x in params.items() if name.endswith(".virtual")
    }
    vectors = to_peft(arrays, measure.case(name).config.embedding_scale)
    np.testing.assert_allclose(vectors, embedding.detach().numpy(), rtol=1e-6)

    convert(tmp_path / "run", tmp_path / "back", adapter=True)
    again = peft.PeftModel.from_pretrained(
        measure.build(name), tmp_path / "back"
    ).eval()
    again.base_model.load_state_dict(measure.case(name).model.state_dict())
    tokens = torch.arange(9)[None] + 2
    with torch.no_grad():
        expected, got = (model(input_ids=tokens).logits for model in (theirs, again))
    assert measure.relative(got.numpy(), expected.numpy()) < 1e-6
    with pytest.raises(MaxlmError, match=r"cannot be merged.*--adapter"):
        convert(tmp_path / "run", tmp_path / "merged")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps(config | {"num_virtual_tokens": N + 1})
    )
    with pytest.raises(MaxlmError, match=r"prompt_embeddings is \[4, "):
        convert(tmp_path / "peft", tmp_path / "other", base=tmp_path / "base")
