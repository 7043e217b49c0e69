"""A family of published models as an external package writes it, with the layout of
StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173)."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxlm.config import MaxlmError
from maxlm.huggingface.families import FAMILIES, fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear, map_linears, map_norm
from maxlm.run.convert import convert
from tests.parity import compare

LAYER = "model.layers.{layer}"
BIASED = ("attention.bias", "mlp.bias", "norm.bias")

ACME_CODER = FAMILIES.register(
    "acme_coder",
    ModelFamily(
        "acme_coder",
        "AcmeCoderForCausalLM",
        {
            **fields.SIZES,
            "num_key_value_heads": fields.map_size("attention.num_kv_heads"),
            "intermediate_size": fields.map_size("mlp.d_ff"),
            "hidden_act": fields.map_activation("mlp.activation", "gelu_pytorch_tanh"),
            "norm_epsilon": fields.map_number("norm.eps", 1e-5),
            "sliding_window": fields.map_size("attention.window", None),
            "use_bias": fields.require_value(True, always_write=True),
            "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        },
        {
            "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
            **map_norm(f"{LAYER}.input_layernorm", "attention_norm"),
            **map_linears(
                f"{LAYER}.self_attn",
                "attention",
                q_proj="query",
                k_proj="key",
                v_proj="value",
                o_proj="out",
            ),
            **map_norm(f"{LAYER}.post_attention_layernorm", "mlp_norm"),
            **map_linears(f"{LAYER}.mlp", "mlp", c_fc="up", c_proj="down"),
            **map_norm("model.norm", "final_norm"),
            "lm_head.weight": linear("head.kernel"),
        },
        {
            "norm.kind": "layernorm",
            "mlp.gated": False,
            **dict.fromkeys(BIASED, True),
        },
        rope_kwargs={},
        ignored_keys=["embedding_dropout", "residual_dropout"],
    ),
)

B, S, V, D, F, HEADS, KV_HEADS, HEAD, LAYERS = 2, 9, 37, 24, 40, 4, 2, 6, 2
CONFIG = {
    "architectures": ["AcmeCoderForCausalLM"],
    "model_type": "acme_coder",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
    "rope_theta": 1000.0,
    "sliding_window": 4,
    "use_bias": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.018,
}


def make_tensors() -> dict[str, np.ndarray]:
    """Random tensors under the published names and in the published shapes."""
    shapes = {"model.embed_tokens.weight": (V, D)}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    for layer in range(LAYERS):
        name = LAYER.format(layer=layer)
        add(f"{name}.input_layernorm", D)
        add(f"{name}.post_attention_layernorm", D)
        add(f"{name}.self_attn.q_proj", HEADS * HEAD, D)
        add(f"{name}.self_attn.k_proj", KV_HEADS * HEAD, D)
        add(f"{name}.self_attn.v_proj", KV_HEADS * HEAD, D)
        add(f"{name}.self_attn.o_proj", D, HEADS * HEAD)
        add(f"{name}.mlp.c_fc", F, D)
        add(f"{name}.mlp.c_proj", D, F)
    add("model.norm", D)
    random = np.random.default_rng(0)
    return {
        name: random.normal(0, 0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def compute_logits(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The published function in float64: [B, S, V] of int [B, S]."""
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}

    def apply(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalise(name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def rotate(x: np.ndarray) -> np.ndarray:
        # [B, S, N, H]: the two halves of a head are the parts of complex numbers.
        inverse = 1000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
        turn = np.exp(1j * np.arange(S)[:, None] * inverse)[:, None]
        turned = (x[..., : HEAD // 2] + 1j * x[..., HEAD // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    age = np.arange(S)[:, None] - np.arange(S)[None]
    is_visible = (age >= 0) & (age < CONFIG["sliding_window"])
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        name = LAYER.format(layer=layer)
        y = normalise(f"{name}.input_layernorm", x)
        query = apply(f"{name}.self_attn.q_proj", y).reshape(B, S, HEADS, HEAD)
        key = apply(f"{name}.self_attn.k_proj", y).reshape(B, S, KV_HEADS, HEAD)
        value = apply(f"{name}.self_attn.v_proj", y).reshape(B, S, KV_HEADS, HEAD)
        group_size = HEADS // KV_HEADS
        key = rotate(key).repeat(group_size, axis=2)
        value = value.repeat(group_size, axis=2)
        scores = np.einsum("bqnh,bknh->bnqk", rotate(query), key) / np.sqrt(HEAD)
        scores = np.where(is_visible, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("bnqk,bknh->bqnh", scores, value).reshape(B, S, -1)
        x = x + apply(f"{name}.self_attn.o_proj", mixed)
        y = normalise(f"{name}.post_attention_layernorm", x)
        y = apply(f"{name}.mlp.c_fc", y)
        inner = np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)
        x = x + apply(f"{name}.mlp.c_proj", 0.5 * y * (1 + np.tanh(inner)))
    return normalise("model.norm", x) @ weights["model.embed_tokens.weight"].T


def write_checkpoint(folder: Path, **changes: object) -> dict[str, np.ndarray]:
    tensors = make_tensors()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_it_computes_the_published_function():
    tensors = make_tensors()
    tokens = np.random.default_rng(1).integers(0, V, (B, S))
    family, config = compare.read(CONFIG, tensors)
    assert family is ACME_CODER
    entries = family.list_entries(config, tensors)
    params = compare.parameters(config, entries, tensors)
    logits = compare.logits(config, params, tokens)
    expected = compute_logits(tensors, tokens)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_checkpoint_becomes_a_run_and_comes_back(tmp_path):
    tensors = write_checkpoint(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    # Two names of one activation: the first that is known is written.
    assert config.pop("hidden_act") == "gelu_new"
    for key in CONFIG.keys() - {"hidden_act"}:
        assert config[key] == CONFIG[key], key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": False}, "use_bias=False is not implemented"),
        ({"residual_scale": 2}, "residual_scale=2 is not implemented"),
    ],
)
def test_what_it_does_not_implement_is_refused(changes, message, tmp_path):
    write_checkpoint(tmp_path / "published", **changes)
    with pytest.raises(MaxlmError, match=message):
        convert(tmp_path / "published", tmp_path / "run")
