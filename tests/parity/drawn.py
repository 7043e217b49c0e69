"""Models like a case's, of sizes drawn at random: none a power of two but by chance."""

import random
from typing import Any

LENGTH = 23
"""Tokens of the rows that models are compared on; they have as many positions."""
Values = dict[str, Any]


def _draw_delta_rule(architecture: str, draw: random.Random) -> dict[str, int]:
    """Heads of layers with a delta rule, by key."""
    key_heads = draw.randint(1, 4)
    group = draw.randint(1, 3)
    value_dim = draw.randint(2, 9)
    key_dim = draw.randint(2, 9)
    if architecture.startswith("Olmo"):
        # transformers saves convolutions of queries, keys and values in equal parts,
        # whatever their channels.
        key_dim = group * value_dim
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * group,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_num_heads": key_heads,
        "linear_head_dim": key_dim,
        "linear_conv_kernel_dim": draw.randint(2, 5),
    }


def draw_settings(
    architecture: str, settings: Values, draw: random.Random, *, is_narrow: bool = False
) -> Values:
    """Draws other sizes for the arguments of a config of transformers. ``is_narrow``:
    with layers' inputs of few numbers."""
    heads = draw.randint(1, 7)
    head_dim = 4 * draw.randint(1, 3)
    free = {"head_dim", "d_kv", "qk_rope_head_dim"} & settings.keys()
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    layers = draw.randint(3, 5)
    sizes = {
        "hidden_size n_embd d_model": heads
        * (draw.randint(3, 11) if free else head_dim),
        "num_attention_heads n_head n_heads num_heads": heads,
        "encoder_attention_heads decoder_attention_heads": heads,
        "num_key_value_heads kv_n_heads num_kv_heads": draw.choice(divisors),
        "head_dim d_kv": head_dim,
        "num_hidden_layers n_layer n_layers num_decoder_layers decoder_layers": layers,
        "num_layers encoder_layers": draw.randint(1, 3),
        "intermediate_size n_inner d_ff ffn_hidden_size ffn_dim": draw.randint(5, 70),
        "encoder_ffn_dim decoder_ffn_dim": draw.randint(5, 70),
        "n_positions max_position_embeddings": draw.randint(LENGTH, 67),
        "sliding_window query_pre_attn_scalar": draw.randint(2, 13),
        # An odd one fails in transformers.
        "q_lora_rank kv_lora_rank": 2 * draw.randint(1, 9),
        "type_vocab_size moe_intermediate_size v_head_dim": draw.randint(1, 9),
        "vocab_size": draw.randint(19, 211),
        **_draw_delta_rule(architecture, draw),
    }
    by_key: Values = {key: size for keys, size in sizes.items() for key in keys.split()}
    if "kv_lora_rank" in settings:
        by_key["num_key_value_heads"] = heads

    def resize(key: str, value: Any) -> Any:
        if isinstance(value, dict) and key.endswith("_config"):
            return {
                inner: resize(inner, inner_value)
                for inner, inner_value in value.items()
            }
        return by_key.get(key, value) if value is not None else None

    values = {key: resize(key, value) for key, value in settings.items()}
    if "moe_layers" in values:
        values["moe_layers"] = [number for number in range(layers) if number % 3]
    for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if key in values:
            kinds = values[key]
            values[key] = [kinds[layer % len(kinds)] for layer in range(layers)]
    if "rotary_dim" in values:
        values["rotary_dim"] = head_dim // 2
    # The heads drawn have an even number of dimensions in each half.
    for key in ("partial_rotary_factor", "rotary_pct"):
        if key in values:
            values[key] = 0.5
    values |= _draw_state_space(values, draw)
    if architecture.startswith("Zamba"):
        values |= _draw_zamba(values, draw)
    if architecture.startswith("MiMo"):
        # Layers with a window have twice the kv heads.
        values["num_attention_heads"] = 2 * heads
    if architecture.startswith("Helium"):
        # Its map back to the stream is square.
        values["hidden_size"] = heads * head_dim
    if architecture.startswith(("Gemma3n", "Gemma4")):
        values |= _draw_gemma(values, draw, is_narrow=is_narrow)
    can_be_untied = ("Llama", "Mi", "Qwen", "Phi3", "SmolLM", "Glm", "Cohere", "Ernie")
    if architecture.startswith(can_be_untied):
        values["tie_word_embeddings"] = draw.random() < 0.5
    if architecture.startswith(("Llama", "Mi", "Qwen", "Phi3", "SmolLM", "Glm")):
        values["rms_norm_eps"] = 10.0 ** -draw.randint(2, 7)
    return values


def _draw_zamba(values: Values, draw: random.Random) -> Values:
    """Draws which layers share a block, and heads that make up twice the width."""
    layers = values["num_hidden_layers"] + 2
    kinds = ["hybrid", "linear_attention"]
    inner = 2 * values["hidden_size"]
    divisors = [n for n in range(1, inner + 1) if inner % n == 0]
    is_second = "adapter_rank" in values
    drawn: Values = {
        "num_hidden_layers": layers,
        "layers_block_type": draw.sample(
            [*kinds * 2, *draw.choices(kinds, k=layers - 4)], layers
        ),
        "n_mamba_heads": draw.choice(divisors if is_second else divisors[:4]),
    }
    if is_second:
        heads = drawn["n_mamba_heads"]
        groups = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
        drawn |= {"mamba_ngroups": groups, "adapter_rank": draw.randint(1, 9)}
        drawn["num_mem_blocks"] = draw.randint(1, 3)
    if values.get("use_shared_attention_adapter"):
        drawn["num_key_value_heads"] = values["num_attention_heads"]
    return drawn


def _draw_gemma(values: Values, draw: random.Random, *, is_narrow: bool) -> Values:
    """Draws what Gemma 3n and 4 have a layer: keys of others, inputs, sparsity."""
    layers = values["num_hidden_layers"]
    kinds = ["sliding_attention", "full_attention"]
    drawn: Values = {
        "layer_types": [*kinds, *draw.choices(kinds, k=layers - 3), kinds[1]],
        "global_head_dim": 4 * draw.randint(1, 5),
        "laurel_rank": draw.randint(1, 6),
        "altup_num_inputs": draw.randint(2, 5),
        "altup_active_idx": draw.randint(0, 1),
        "activation_sparsity_pattern": [
            draw.choice([0.0, round(draw.uniform(0.2, 0.95), 2)]) for _ in range(layers)
        ],
    }
    if values.get("num_kv_shared_layers"):
        drawn["num_kv_shared_layers"] = draw.randint(1, layers - 2)
    if values["hidden_size_per_layer_input"]:
        # Where a token's gates, which few units have, are all shut, the norm behind them
        # magnifies what fp32 leaves of gelu there: of 1 + tanh next to 0.
        narrowest, widest = (1, 8) if is_narrow else (9, 23)
        drawn["hidden_size_per_layer_input"] = draw.randint(narrowest, widest)
    if "vocab_size_per_layer_input" in values:
        # Gemma 4 has no rows for tokens beyond its table.
        fewest = 11 if "laurel_rank" in values else values["vocab_size"]
        drawn["vocab_size_per_layer_input"] = draw.randint(fewest, values["vocab_size"])
    if "num_global_key_value_heads" in values:
        drawn["num_global_key_value_heads"] = draw.choice(
            [1, values["num_attention_heads"]]
        )
    return {key: value for key, value in drawn.items() if key in values}


def _draw_state_space(values: Values, draw: random.Random) -> Values:
    """Draws other sizes for a config's state spaces, and other layers that have them."""
    groups = draw.randint(1, 3)
    heads = groups * draw.randint(1, 4)
    channels = 2 * draw.randint(1, 6)
    sizes = {
        "state_size ssm_state_size mamba_d_state": draw.randint(1, 17),
        "conv_kernel mamba_d_conv conv_L_cache": draw.randint(2, 5),
        "mamba_dt_rank": draw.randint(1, 9),
        "mamba_num_heads": heads,
        "mamba_head_dim": channels,
        "n_groups": groups,
    }
    by_key: Values = {key: size for keys, size in sizes.items() for key in keys.split()}
    drawn = {key: size for key, size in by_key.items() if key in values}
    if "num_heads" in values and "n_groups" in values:  # Mamba-2
        drawn |= {"num_heads": heads, "head_dim": channels}
        drawn["hidden_size"] = heads * channels // 2
    if "mamba_d_ssm" in values:
        drawn |= {"mamba_n_heads": heads, "mamba_n_groups": groups}
        drawn |= {"mamba_d_head": channels, "mamba_d_ssm": heads * channels}
    elif "mamba_n_heads" in values:
        # Heads make up twice the width.
        inner = 2 * values["hidden_size"]
        heads = draw.choice([n for n in range(1, inner + 1) if inner % n == 0])
        groups = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
        drawn |= {"mamba_n_heads": heads, "mamba_n_groups": groups}
    letters = values.get("hybrid_override_pattern")
    if letters is not None:
        pattern = draw.sample(letters, len(letters))
        drawn["hybrid_override_pattern"] = "".join(pattern)
    for key in ("attn_layer_indices", "full_attn_idxs"):
        if key in values:
            drawn[key] = sorted(draw.sample(range(values["num_hidden_layers"]), 2))
    return drawn
