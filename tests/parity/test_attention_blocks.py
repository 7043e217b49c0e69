"""Layers of attention compute what those of transformers do, with the same weights: what
newer families change about queries, keys, values, outputs and positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import modeling_rope_utils  # noqa: E402
from transformers.models.cohere import modeling_cohere  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: E402
from transformers.models.deepseek_v32 import modeling_deepseek_v32  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4  # noqa: E402
from transformers.models.hunyuan_v1_dense import (  # noqa: E402
    modeling_hunyuan_v1_dense,
)
from transformers.models.kimi_linear import modeling_kimi_linear  # noqa: E402
from transformers.models.lfm3 import modeling_lfm3  # noqa: E402
from transformers.models.llama4 import modeling_llama4  # noqa: E402
from transformers.models.ministral3 import modeling_ministral3  # noqa: E402
from transformers.models.olmo2 import modeling_olmo2  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next  # noqa: E402

from maxlm.models.architectures.transformer import DecoderConfig  # noqa: E402
from maxlm.models.blocks import build_attention  # noqa: E402
from maxlm.models.build_context import BuildContext  # noqa: E402
from maxlm.models.layers.attend import AttentionInputs, KeysValues  # noqa: E402
from maxlm.models.layers.attention_config import (  # noqa: E402
    AttentionConfig,
    LatentConfig,
    TemperatureConfig,
)
from maxlm.models.layers.norm import NormConfig  # noqa: E402
from maxlm.models.layers.positions import PositionsConfig  # noqa: E402
from maxlm.models.layers.rope import (  # noqa: E402
    LongRopeScaling,
    ProportionalScaling,
    Scaling,
    YarnScaling,
    compute_rotary,
    rope_attention_factor,
)
from maxlm.models.layers.sparse import (  # noqa: E402
    SparseAttention,
    SparseAttentionConfig,
)
from maxlm.models.params import bind  # noqa: E402
from maxlm.sharding import MeshConfig, ShardingConfig, make_mesh  # noqa: E402

D = 14
S = 13
N = 6
K = 2
H = 10
ROPE = {"rope_type": "default", "rope_theta": 90.0}
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "num_hidden_layers": 2,
    "rope_parameters": ROPE,
    "_attn_implementation": "eager",
}
# Half of a head's dimensions and the other half, of pairs that stand side by side.
HALVES = [*range(0, H, 2), *range(1, H, 2)]
HEADS = AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H)


def randomize(module: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return module.eval()


def draw_inputs() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.standard_normal((2, S, D)).astype(np.float32)


def causal_mask(chunk: int | None = None) -> Any:
    place = np.arange(S)
    seen = place[:, None] >= place
    if chunk:
        seen &= place[:, None] // chunk == place // chunk
    return torch.tensor(np.where(seen, 0, -np.inf)[None, None], dtype=torch.float32)


def turn(frequencies: np.ndarray, factor: float = 1.0) -> tuple[Any, Any]:
    """Cosines and sines as most of transformers' layers want them."""
    angles = torch.arange(S).float()[:, None] * torch.tensor(frequencies).float()
    both = torch.cat((angles, angles), dim=-1)[None]
    return both.cos() * factor, both.sin() * factor


def plain_frequencies(size: int = H) -> np.ndarray:
    return 90.0 ** (-np.arange(0, size, 2) / size)


def weights(module: Any, heads: dict[str, tuple[int, ...]], halves=None) -> Any:
    """Kernels by our names, from maps by theirs.

    Args:
        heads: our name → (heads, features of one) that the map's outputs are.
        halves: the order of features in which pairs stand apart, where theirs do not.
    """
    theirs = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    flat = {}
    for name, shape in heads.items():
        kernel = getattr(module, theirs[name]).weight.detach().numpy()
        kernel = kernel.T.reshape(D, *shape)
        if halves is not None and name != "value":
            kernel = kernel[..., halves]
        flat[f"{name}.kernel"] = kernel
    out = module.o_proj.weight.detach().numpy().T
    return flat | {"out.kernel": out.reshape(N, -1, D)}


GROUPED = {"query": (N, H), "key": (K, H), "value": (K, H)}


def ours(
    config: AttentionConfig | SparseAttentionConfig,
    flat: dict[str, np.ndarray],
    norm: NormConfig = NormConfig(eps=1e-6),
    *,
    positions: PositionsConfig = PositionsConfig(theta=90.0),
    rotary_dim: int = H,
    scale: float | None = None,
    shared: KeysValues | None = None,
) -> np.ndarray:
    """Runs our layer on :func:`draw_inputs`."""
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    context = BuildContext(rules, jnp.float32, D, num_layers=2, init_std=0.02)
    if isinstance(config, SparseAttentionConfig):
        layer = SparseAttention(config, norm, context)
        heads = config.attention
    else:
        layer = build_attention(config, norm, context)
        heads = config
    places = jnp.broadcast_to(jnp.arange(S), (2, S))
    with jax.set_mesh(mesh):
        rotary = None
        if positions.kind == "rope":
            rotary = compute_rotary(
                places, rotary_dim, positions.theta, positions.scaling
            )
        inputs = AttentionInputs(
            positions=places,
            segment_ids=None,
            rotary=rotary,
            slopes=None,
            biases=None,
            scale=scale or heads.head_dim**-0.5,
            window=None,
            causal=True,
            shared=shared,
        )
        nested = unflatten_dict(jax.tree.map(jnp.asarray, flat), sep=".")
        y = bind(layer, nested)(jnp.asarray(draw_inputs()), inputs).y
    return np.asarray(y)


def assert_equal(here: np.ndarray, there: Any) -> None:
    expected = there.detach().numpy()
    assert np.abs(here - expected).max() <= 1e-5 * np.abs(expected).max()


def array(parameter: Any) -> np.ndarray:
    return parameter.detach().numpy()


def test_gate_of_each_element_as_qwen3_next_has_it():
    cls = modeling_qwen3_next.Qwen3NextAttention
    there = randomize(cls(cls_config("Qwen3NextConfig"), 0))
    x = torch.tensor(draw_inputs())
    y, _ = there(x, turn(plain_frequencies()), causal_mask())

    flat = weights(there, {"key": (K, H), "value": (K, H)})
    both = array(there.q_proj.weight).T.reshape(D, N, 2 * H)
    flat |= {"query.kernel": both[..., :H], "gate.kernel": both[..., H:]}
    flat |= {"query_norm.scale": array(there.q_norm.weight)}
    flat |= {"key_norm.scale": array(there.k_norm.weight)}
    config = HEADS.model_copy(update={"qk_norm": True, "output_gate": "element"})
    norm = NormConfig(eps=1e-6, zero_centred=True)
    assert_equal(ours(config, flat, norm), y)


def cls_config(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(**(SIZES | {"rms_norm_eps": 1e-6} | settings))


def test_gate_of_each_head_as_lfm3_has_it():
    cls = modeling_lfm3.Lfm3Attention
    settings = {"use_attention_gate": True, "layer_types": ["full_attention"] * 2}
    there = randomize(cls(cls_config("Lfm3Config", **settings), 0))
    x = torch.tensor(draw_inputs())
    y, _ = there(x, turn(plain_frequencies()), causal_mask())
    flat = weights(there, GROUPED)
    flat["gate.kernel"] = array(there.g_proj.weight).T
    flat |= {"query_norm.scale": array(there.q_norm.weight)}
    flat |= {"key_norm.scale": array(there.k_norm.weight)}
    config = HEADS.model_copy(update={"qk_norm": True, "output_gate": "head"})
    assert_equal(ours(config, flat), y)


def test_norm_over_all_heads_at_once_as_olmo2_has_it():
    cls = modeling_olmo2.Olmo2Attention
    there = randomize(cls(cls_config("Olmo2Config"), 0))
    y, _ = there(torch.tensor(draw_inputs()), turn(plain_frequencies()), causal_mask())
    flat = weights(there, GROUPED)
    flat["query_norm.scale"] = array(there.q_norm.weight).reshape(N, H)
    flat["key_norm.scale"] = array(there.k_norm.weight).reshape(K, H)
    config = HEADS.model_copy(update={"qk_norm": True, "qk_norm_form": "all_heads"})
    assert_equal(ours(config, flat), y)


def test_norm_of_each_head_with_weights_of_its_own_as_cohere_has_it():
    """Cohere's pairs of dimensions stand side by side, and so do its norms' weights."""
    settings = {"layer_norm_eps": 1e-6, "use_qk_norm": True}
    cls = modeling_cohere.CohereAttention
    there = randomize(cls(cls_config("CohereConfig", **settings), 0))
    angles = torch.arange(S).float()[:, None] * torch.tensor(plain_frequencies())
    pairs = torch.repeat_interleave(angles, 2, dim=-1)[None].float()
    embeddings = pairs.cos(), pairs.sin()
    y, _ = there(torch.tensor(draw_inputs()), embeddings, causal_mask())
    flat = weights(there, GROUPED, HALVES)
    flat["query_norm.scale"] = array(there.q_norm.weight)[:, HALVES]
    flat["key_norm.scale"] = array(there.k_norm.weight)[:, HALVES]
    config = HEADS.model_copy(update={"qk_norm": True, "qk_norm_form": "per_head"})
    norm = NormConfig(kind="layernorm", eps=1e-6)
    assert_equal(ours(config, flat, norm), y)


def test_norm_behind_rope_as_hunyuan_has_it():
    cls = modeling_hunyuan_v1_dense.HunYuanDenseV1Attention
    there = randomize(cls(cls_config("HunYuanDenseV1Config"), 0))
    y, _ = there(torch.tensor(draw_inputs()), turn(plain_frequencies()), causal_mask())
    flat = weights(there, GROUPED)
    flat["query_norm.scale"] = array(there.query_layernorm.weight)
    flat["key_norm.scale"] = array(there.key_layernorm.weight)
    config = HEADS.model_copy(update={"qk_norm": True, "qk_norm_after_rope": True})
    assert_equal(ours(config, flat), y)


@pytest.mark.parametrize("has_rope", [True, False])
def test_chunks_weightless_norm_and_temperature_as_llama4_has_them(has_rope):
    settings = {
        "no_rope_layers": [int(has_rope)] * 2,
        "floor_scale": 3,
        "attn_scale": 0.2,
        "attention_chunk_size": 5,
        "layer_types": ["full_attention"] * 2,
    }
    cls = modeling_llama4.Llama4TextAttention
    there = randomize(cls(cls_config("Llama4TextConfig", **settings), 0))
    angles = torch.arange(S).float()[:, None] * torch.tensor(plain_frequencies())
    turns = torch.polar(torch.ones_like(angles), angles)[None].to(torch.complex64)
    mask = causal_mask(chunk=5 if has_rope else None)
    y, _ = there(torch.tensor(draw_inputs()), turns, mask)
    update: dict[str, Any]
    if has_rope:
        update = {
            "qk_norm": True,
            "qk_norm_form": "weightless",
            "qk_norm_after_rope": True,
            "chunk": 5,
        }
    else:
        update = {"temperature": TemperatureConfig(scale=0.2, length=3)}
    positions = PositionsConfig(kind="rope" if has_rope else "none", theta=90.0)
    here = ours(
        HEADS.model_copy(update=update),
        weights(there, GROUPED, HALVES),
        positions=positions,
    )
    assert_equal(here, y)


def test_temperature_beside_rope_as_ministral3_has_it():
    rope = {
        **ROPE,
        "llama_4_scaling_beta": 0.3,
        "original_max_position_embeddings": 4,
    }
    cls = modeling_ministral3.Ministral3Attention
    there = randomize(cls(cls_config("Ministral3Config", rope_parameters=rope), 0))
    y, _ = there(
        torch.tensor(draw_inputs()),
        turn(plain_frequencies()),
        causal_mask(),
        position_ids=torch.arange(S)[None],
    )
    temperature = TemperatureConfig(scale=0.3, length=4, offset=0)
    config = HEADS.model_copy(update={"temperature": temperature})
    assert_equal(ours(config, weights(there, GROUPED)), y)


@pytest.mark.parametrize("shares", [False, True])
def test_keys_as_values_and_shared_keys_as_gemma4_has_them(shares):
    """Global layers: values are the keys before norm and RoPE, under a norm without
    weights; the last layers read the keys and values of an earlier one."""
    settings = {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": ROPE},
        "attention_k_eq_v": True,
        "global_head_dim": H,
        "num_global_key_value_heads": K,
        "num_kv_shared_layers": 1 if shares else 0,
    }
    cls = modeling_gemma4.Gemma4TextAttention
    there = randomize(cls(cls_config("Gemma4TextConfig", **settings), int(shares)))
    frequencies = np.where(np.arange(H // 2) < H // 4, plain_frequencies(), 0.0)
    rng = np.random.default_rng(7)
    read = rng.standard_normal((2, 2, S, K, H)).astype(np.float32)
    states = {"full_attention": tuple(torch.tensor(x).transpose(1, 2) for x in read)}
    x = torch.tensor(draw_inputs())
    y, _ = there(x, turn(frequencies), causal_mask(), shared_kv_states=states)

    update = {
        "qk_norm": True,
        "value_norm": True,
        "keys_as_values": True,
        "shares_keys": shares,
    }
    heads = {"query": (N, H)} if shares else {"query": (N, H), "key": (K, H)}
    flat = weights(there, heads) | {"query_norm.scale": array(there.q_norm.weight)}
    if not shares:
        flat["key_norm.scale"] = array(there.k_norm.weight)
    scaling = ProportionalScaling(share=0.5)
    here = ours(
        HEADS.model_copy(update=update),
        flat,
        positions=PositionsConfig(theta=90.0, scaling=scaling),
        scale=1.0,
        shared=KeysValues(*map(jnp.asarray, read)) if shares else None,
    )
    assert_equal(here, y)


LATENT = LatentConfig(q_rank=5, kv_rank=9, rotary_dim=6, value_dim=8)
LATENT_HEADS = AttentionConfig(num_heads=N, num_kv_heads=N, head_dim=H, latent=LATENT)


def latent_weights(module: Any, order: list[int]) -> dict[str, np.ndarray]:
    """As :func:`weights`; ``order`` of the rotary dimensions."""
    P = LATENT.rotary_dim
    plain = H - P
    order_of_heads = [*range(plain), *(plain + i for i in order)]
    down = array(module.kv_a_proj_with_mqa.weight).T
    up = array(module.kv_b_proj.weight).T.reshape(LATENT.kv_rank, N, -1)
    query = array(module.q_b_proj.weight).T.reshape(-1, N, H)
    return {
        "query_down.kernel": array(module.q_a_proj.weight).T,
        "query_norm.scale": array(module.q_a_layernorm.weight),
        "query.kernel": query[..., order_of_heads],
        "key_down.kernel": down[:, : LATENT.kv_rank],
        "key_rotary.kernel": down[:, LATENT.kv_rank :][:, order],
        "key_norm.scale": array(module.kv_a_layernorm.weight),
        "key_up.kernel": up[..., :plain],
        "value_up.kernel": up[..., plain:],
        "out.kernel": array(module.o_proj.weight).T.reshape(N, -1, D),
    }


LATENT_SIZES = {
    "num_key_value_heads": N,
    "head_dim": LATENT.rotary_dim,
    "q_lora_rank": LATENT.q_rank,
    "kv_lora_rank": LATENT.kv_rank,
    "qk_rope_head_dim": LATENT.rotary_dim,
    "qk_nope_head_dim": H - LATENT.rotary_dim,
    "v_head_dim": LATENT.value_dim,
}


@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_attention_with_yarn_as_deepseek_v3_has_it(interleaved):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 90.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    }
    settings = {
        **LATENT_SIZES,
        "rope_parameters": rope,
        "rope_interleave": interleaved,
        "max_position_embeddings": 64,
    }
    config = cls_config("DeepseekV3Config", **settings)
    there = randomize(modeling_deepseek_v3.DeepseekV3Attention(config, 0))
    frequencies, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    y, _ = there(
        torch.tensor(draw_inputs()), turn(frequencies.numpy(), factor), causal_mask()
    )
    P = LATENT.rotary_dim
    order = [*range(0, P, 2), *range(1, P, 2)] if interleaved else [*range(P)]
    scaling = YarnScaling(
        factor=4.0,
        original_length=16,
        beta_fast=8.0,
        beta_slow=1.0,
        mscale=0.7,
        mscale_all_dim=1.3,
    )
    positions = PositionsConfig(theta=90.0, scaling=scaling)
    here = ours(
        LATENT_HEADS,
        latent_weights(there, order),
        positions=positions,
        rotary_dim=P,
        scale=find_score_scale(LATENT_HEADS, positions),
    )
    assert_equal(here, y)


def find_score_scale(heads: AttentionConfig, positions: PositionsConfig) -> float:
    """The factor on q·k that a model gives its layers."""
    model = DecoderConfig.model_validate(
        {
            "vocab_size": 9,
            "num_layers": 1,
            "d_model": D,
            "max_seq_len": 64,
            "attention": heads.model_dump(),
            "mlp": {"d_ff": 4},
            "positions": positions.model_dump(),
        }
    )
    return model.score_scale(model.layer_kinds[0])


def test_latent_attention_without_rope_as_kimi_linear_has_it():
    config = cls_config("KimiLinearConfig", **LATENT_SIZES, attention_bias=False)
    there = randomize(modeling_kimi_linear.KimiLinearAttention(config, 0))
    y, _ = there(torch.tensor(draw_inputs()), causal_mask())
    latent = LATENT.model_copy(update={"norm_eps": 1e-6})
    here = ours(
        LATENT_HEADS.model_copy(update={"latent": latent}),
        latent_weights(there, [*range(LATENT.rotary_dim)]),
        NormConfig(eps=0.1),
        positions=PositionsConfig(kind="none"),
    )
    assert_equal(here, y)


@pytest.mark.parametrize("top_k", [5, S])
def test_sparse_attention_as_deepseek_v32_has_it(top_k):
    """With 32 heads of the indexer: with few, scores tie at 0. Its RoPE turns halves,
    attention's the pairs side by side."""
    settings = {
        **LATENT_SIZES,
        "index_n_heads": 32,
        "index_head_dim": 8,
        "index_topk": top_k,
        "attention_bias": False,
    }
    config = cls_config("DeepseekV32Config", **settings)
    there = randomize(modeling_deepseek_v32.DeepseekV32Attention(config, 0))
    P = LATENT.rotary_dim
    y, _ = there(torch.tensor(draw_inputs()), turn(plain_frequencies(P)), causal_mask())
    order = [*range(0, P, 2), *range(1, P, 2)]
    indexer = there.indexer
    flat = latent_weights(there, order)
    flat |= {
        "index_query.kernel": array(indexer.wq_b.weight).T,
        "index_key.kernel": array(indexer.wk.weight).T,
        "index_key_norm.scale": array(indexer.k_norm.weight),
        "index_key_norm.bias": array(indexer.k_norm.bias),
        "index_weight.kernel": array(indexer.weights_proj.weight).T,
    }
    sparse = SparseAttentionConfig(
        attention=LATENT_HEADS, index_heads=32, index_dim=8, top_k=top_k
    )
    here = ours(sparse, flat, rotary_dim=P)
    assert_equal(here, y)
    if top_k < S:  # the choice matters
        whole = sparse.model_copy(update={"top_k": S})
        others = ours(whole, flat, rotary_dim=P)
        assert np.abs(here - others).max() > 0.1 * np.abs(here).max()


def longrope(length: int) -> tuple[Scaling, dict[str, Any]]:
    rng = np.random.default_rng(2)
    short, long = rng.uniform(1, 5, (2, 5)).tolist()
    scaling = LongRopeScaling(
        factor=3.0,
        original_length=length,
        short_factors=tuple(short),
        long_factors=tuple(long),
    )
    theirs = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": length,
    }
    return scaling, theirs


def gpt_oss_yarn(length: int) -> tuple[Scaling, dict[str, Any]]:
    settings = {"factor": 3.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
    theirs = {
        "rope_type": "yarn",
        "original_max_position_embeddings": length,
        **settings,
    }
    return YarnScaling(original_length=length, **settings), theirs


def proportional(length: int) -> tuple[Scaling, dict[str, Any]]:
    theirs = {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "factor": 2.0,
    }
    return ProportionalScaling(share=0.5, factor=2.0), theirs


@pytest.mark.parametrize("make", [longrope, gpt_oss_yarn, proportional])
@pytest.mark.parametrize("original_length", [S, S - 1])
def test_scaled_rope_turns_as_transformers(make, original_length):
    """A row of S tokens is within the original length, or just past it."""
    scaling, theirs = make(original_length)
    config = cls_config(
        "LlamaConfig",
        hidden_size=N * H,
        rope_parameters={"rope_theta": 90.0, **theirs},
        max_position_embeddings=3 * original_length,
    )
    initialize = modeling_rope_utils.ROPE_INIT_FUNCTIONS[theirs["rope_type"]]
    frequencies, factor = initialize(config, seq_len=S)
    expected = turn(frequencies.numpy(), factor)
    here = compute_rotary(jnp.arange(S)[None], H, 90.0, scaling)
    for ours_, theirs_ in zip(here, expected, strict=True):
        difference = np.abs(ours_[0, :, 0] - theirs_[0, :, : H // 2].numpy())
        assert difference.max() <= 1e-5
    assert rope_attention_factor(scaling) == pytest.approx(factor)
