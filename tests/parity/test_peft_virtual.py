"""PEFT's prefix and prompt tuning, and ours of the same arrays: logits of real tokens of ragged
sequences, which stand in one row here and in a row each there."""

import numpy as np
import pytest

from maxlm.adapters import PrefixAdapter, PromptAdapter
from maxlm.adapters.virtual_tokens import from_peft, to_peft
from maxlm.models.adapters import build_adapted_model
from maxlm.models.params import flatten_names, param_specs
from maxlm.sharding import AxisRules
from tests.parity import compare, measure

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

N, LENGTHS = 4, (13, 6)
ADAPTERS = {
    "prefix": (PrefixAdapter(num_virtual_tokens=N), "PrefixTuningConfig"),
    "prompt": (PromptAdapter(num_virtual_tokens=N), "PromptTuningConfig"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
# Grouped heads; learned positions; scaled embeddings; windows and norms of keys as well.
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "gemma3"])
def test_logits_and_counts_are_pefts(name, kind):
    own = measure.case(name)
    adapter, theirs_kind = ADAPTERS[kind]
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
    if name in ("llama", "gemma", "gemma3") and kind == "prefix":  # head_dim is not D / heads
        heads, size = own.config.attention.num_kv_heads, own.config.attention.head_dim
        settings |= {"token_dim": heads * size, "num_attention_heads": heads}
    model = peft.get_peft_model(measure.build(name), getattr(peft, theirs_kind)(**settings)).eval()
    model.base_model.load_state_dict(own.model.state_dict())
    (embedding,) = [p for p in model.prompt_encoder.parameters() if p.requires_grad]
    torch.manual_seed(1)
    with torch.no_grad():
        embedding.normal_()

    specs = param_specs(
        build_adapted_model(own.config, adapter, rules=AxisRules(), dtype="float32")
    )
    shapes = {n: s.shape for n, s in flatten_names(specs).items() if n.endswith(".virtual")}
    assert sum(map(np.prod, shapes.values())) == model.get_nb_trainable_parameters()[0]
    scale = own.config.embedding_scale
    arrays = from_peft(embedding.detach().numpy(), shapes, scale)
    np.testing.assert_allclose(to_peft(arrays, scale), embedding.detach().numpy(), rtol=1e-6)

    random = np.random.default_rng(0)
    texts = [random.integers(0, own.config.vocab_size, length) for length in LENGTHS]
    tokens, mask = (np.zeros((2, max(LENGTHS)), np.int64) for _ in range(2))
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
    wanted = [x[-max(LENGTHS) :][:size].numpy() for x, size in zip(wanted, LENGTHS, strict=True)]

    row = np.concatenate([np.pad(text, (N, 0)) for text in texts])[None]
    sizes = [N + size for size in LENGTHS]
    positions = np.concatenate([np.arange(size) for size in sizes])[None]
    segments = np.repeat([1, 2], sizes)[None]
    based = {
        name.removesuffix(".virtual"): f"{name.removesuffix('.virtual')}.base" for name in arrays
    }
    flat = {based.get(name, name): array for name, array in own.params.items()} | arrays
    found = compare.logits(own.config, flat, row, positions, segments, adapter=adapter)[0]
    found = [found[N : sizes[0]], found[sizes[0] + N :]]
    for ours, theirs in zip(found, wanted, strict=True):
        assert measure.relative(ours, theirs) < 1e-5
