"""Mamba's layers beside transformers': Mamba, Falcon-Mamba, and the Mamba layers of
Jamba, with weights drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import bind
from maxlm.sharding import AxisRules

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = [
    # d_model, d_inner / d_model, d_state, dt_rank, d_conv, layers, tokens
    (18, 2, 5, 3, 4, 2, 23),
    (13, 3, 16, 6, 3, 3, 65),
    (32, 1, 7, 4, 2, 1, 130),
    (10, 2, 1, 9, 5, 2, 1),
]
VOCAB = 41


def make_mamba(sizes, kind):
    d_model, expand, d_state, rank, width, layers, _ = sizes
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": d_model,
        "num_hidden_layers": layers,
    }
    if kind == "jamba":
        config = transformers.JambaConfig(
            **settings,
            mamba_expand=expand,
            mamba_d_state=d_state,
            mamba_dt_rank=rank,
            mamba_d_conv=width,
            mamba_proj_bias=True,
            intermediate_size=22,
            attn_layer_period=8,
            attn_layer_offset=7,
            expert_layer_period=8,
            expert_layer_offset=7,
            num_attention_heads=1,
            num_key_value_heads=1,
            pad_token_id=0,
        )
        return transformers.JambaForCausalLM(config).eval()
    names = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "falcon": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    }
    config_class, model_class = names[kind]
    config = config_class(
        **settings,
        expand=expand,
        intermediate_size=expand * d_model,
        state_size=d_state,
        time_step_rank=rank,
        conv_kernel=width,
        use_bias=kind == "mamba",
        use_conv_bias=kind == "falcon",
    )
    return model_class(config).eval()


def make_config(sizes, kind) -> DecoderConfig:
    d_model, expand, d_state, rank, width, layers, _ = sizes
    norms = {"mamba": "none", "falcon": "weightless", "jamba": "learned"}
    mixer = {
        "kind": "mamba",
        "d_inner": expand * d_model,
        "d_state": d_state,
        "dt_rank": rank,
        "d_conv": width,
        "bias": kind != "falcon",
        "conv_bias": kind != "mamba",
        "inner_norms": norms[kind],
        "inner_norm_eps": 1e-6,
    }
    feed_forward = {"mlp": {"d_ff": 22}} if kind == "jamba" else {"ffn": "none"}
    return DecoderConfig.model_validate(
        {
            "vocab_size": VOCAB,
            "num_layers": layers,
            "d_model": d_model,
            "max_seq_len": 256,
            "mixer": mixer,
            **feed_forward,
            "norm": {"eps": 1e-6 if kind == "jamba" else 1e-5},
            "positions": {"kind": "none"},
            "tie_embeddings": kind != "jamba",
        }
    )


def convert_mixer(weights, kind):
    """A mixer's parameters from its torch names."""

    def kernel(name):
        return {"kernel": weights[f"{name}.weight"].T}

    def halves(name):
        return np.split(weights[name], 2)

    to_input, to_gate = halves("in_proj.weight")
    params = {
        "input": {"kernel": to_input.T},
        "gate": {"kernel": to_gate.T},
        "conv_weight": weights["conv1d.weight"][:, 0],
        "x_proj": kernel("x_proj"),
        "dt_proj": kernel("dt_proj"),
        "dt_bias": weights["dt_proj.bias"],
        "A_log": weights["A_log"],
        "D": weights["D"],
        "out": kernel("out_proj"),
    }
    if "in_proj.bias" in weights:
        params["input"]["bias"], params["gate"]["bias"] = halves("in_proj.bias")
        params["out"]["bias"] = weights["out_proj.bias"]
    if "conv1d.bias" in weights:
        params["conv_bias"] = weights["conv1d.bias"]
    if kind == "jamba":
        for ours, theirs in (("dt", "dt"), ("B", "b"), ("C", "c")):
            params[f"{ours}_norm"] = {"scale": weights[f"{theirs}_layernorm.weight"]}
    return params


def convert(model, kind):
    """All parameters, layers stacked."""
    weights = {name: x.detach().numpy() for name, x in model.named_parameters()}
    is_jamba = kind == "jamba"
    prefix = "model." if is_jamba else "backbone."

    def select(start):
        return {
            name.removeprefix(start): array
            for name, array in weights.items()
            if name.startswith(start)
        }

    layers = []
    for index in range(model.config.num_hidden_layers):
        layer = select(f"{prefix}layers.{index}.")
        mixer = "mamba." if is_jamba else "mixer."
        mixer_weights = select(f"{prefix}layers.{index}.{mixer}")
        norm = "input_layernorm.weight" if is_jamba else "norm.weight"
        params = {
            "attention_norm": {"scale": layer[norm]},
            "mamba": convert_mixer(mixer_weights, kind),
        }
        if is_jamba:
            params["mlp_norm"] = {"scale": layer["pre_ff_layernorm.weight"]}
            params["mlp"] = {
                name: {"kernel": layer[f"feed_forward.{name}_proj.weight"].T}
                for name in ("gate", "up", "down")
            }
        layers.append(params)
    embeddings = "embed_tokens.weight" if is_jamba else "embeddings.weight"
    final_norm = "final_layernorm.weight" if is_jamba else "norm_f.weight"
    result = {
        "embedding": {"table": weights[prefix + embeddings]},
        "layers": jax.tree.map(lambda *x: np.stack(x), *layers),
        "final_norm": {"scale": weights[prefix + final_norm]},
    }
    if is_jamba:
        result["head"] = {"kernel": weights["lm_head.weight"].T}
    return result


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["mamba", "falcon", "jamba"])
def test_logits_and_gradients_equal_transformers(kind, sizes, one_device_mesh):
    torch.manual_seed(sum(sizes))
    theirs = make_mamba(sizes, kind)
    for name, values in theirs.named_parameters():
        if name.endswith(("A_log", "norm.weight", "norm_f.weight")):
            continue  # as they begin
        torch.nn.init.normal_(values, std=0.3)
    # Not the padding token, 0, whose embedding has no gradient there.
    tokens = torch.randint(1, VOCAB, (2, sizes[-1]))
    weights = torch.randn(2, sizes[-1], VOCAB)
    logits = theirs(tokens, use_cache=False).logits
    (logits * weights).sum().backward()
    truth = logits.detach().numpy()

    with jax.set_mesh(one_device_mesh):
        model = make_config(sizes, kind).build(rules=AxisRules(), dtype=jnp.float32)
        params = convert(theirs, kind)
        for parameter in theirs.parameters():
            parameter.data = parameter.grad
        their_gradients = convert(theirs, kind)

        @jax.jit
        def run(params, tokens):
            def loss(params):
                bound = bind(model, params)
                places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
                logits = bound.logits(bound(tokens, places)[0])
                return jnp.sum(logits * weights.numpy()), logits

            return jax.grad(loss, has_aux=True)(params)

        gradients, ours = run(params, tokens.numpy())
    assert np.abs(ours - truth).max() <= 1e-5 * max(1, np.abs(truth).max())

    def check(path, gradient, true_gradient):
        error = np.abs(gradient - true_gradient).max()
        assert error <= 1e-4 * np.abs(true_gradient).max(), (path, error)

    jax.tree_util.tree_map_with_path(check, gradients, their_gradients)
