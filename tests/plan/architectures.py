"""Small models of every kind of layer, to compare the plan's formulas with."""

from typing import Any

from maxlm.run.config import RunConfig
from tests.train import cells
from tests.train.cells import CELLS, MICRO, ROWS

SEQ = 32
_HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6}
_PLAIN = {"d_ff": 48, "gated": False, "activation": "gelu"}
_EXPERTS = {
    "num_experts": 8,
    "experts_per_token": 2,
    "d_ff": 16,
    "dispatch": "capacity",
}
_LATENT = {"kv_rank": 16, "rotary_dim": 4, "value_dim": 6}
# Heads that divide over four devices, of sizes that are no powers of two.
_SPACE = {"kind": "mamba2", "num_heads": 12, "head_dim": 6, "state_size": 5}
_WITHOUT_POSITIONS = {"positions": {"kind": "none"}, "mlp": {"d_ff": 72}}
MODELS: dict[str, dict[str, Any]] = {
    "pattern": {
        "attention": _HEADS | {"qk_norm": True, "soft_cap": 20.0},
        "mlp": {"d_ff": 48},
        "placement": "sandwich",
        "num_layers": 6,
        "pattern": [
            {"window": 7, "positions": {"theta": 100.0}},
            {"window": 5},
            {"window": None},
        ],
        "tie_embeddings": True,
    },
    "latent": {
        "attention": {
            "num_heads": 8,
            "num_kv_heads": 8,
            "head_dim": 10,
            "latent": _LATENT,
        },
        "mlp": {"d_ff": 72},
        "moe": _EXPERTS | {"shared_experts": 1},
        "dense_layers": 2,
        "num_layers": 5,
    },
    # Kinds of layers of other modules, by turns.
    "kinds": {
        "attention": _HEADS,
        "mlp": {"d_ff": 72},
        "moe": _EXPERTS,
        "num_layers": 8,
        "kinds": {
            "wide": {"ffn": "mlp"},
            "narrow": {
                "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 10},
                "window": 7,
                "ffn": "none",
            },
            "expert": {"mixer": "none", "ffn": "moe", "placement": "output"},
        },
        "pattern": ["wide", "narrow", "wide", "expert"],
    },
    # Two modules behind the layers, each with the model's head.
    "mtp": {"attention": _HEADS, "mlp": {"d_ff": 72}, "mtp": {"num_modules": 2}},
    "parallel_shared": {
        "attention": _HEADS,
        "mlp": _PLAIN,
        "placement": "parallel_shared",
        "head_bias": True,
    },
    "gated_experts": {
        "attention": _HEADS,
        "moe": _EXPERTS | {"bias": True, "shared_experts": 1, "shared_gate": True},
    },
    "latent_experts": {"attention": _HEADS, "moe": _EXPERTS | {"latent_dim": 16}},
    "sandwich_experts": {"attention": _HEADS, "moe": _EXPERTS, "placement": "sandwich"},
    # A mixer that passes a state from token to token, or an indexer, in each layer.
    "mamba": {
        "mixer": {"kind": "mamba", "d_inner": 88, "d_state": 5, "dt_rank": 8},
        "ffn": "none",
        "positions": {"kind": "none"},
    },
    "mamba2": {"mixer": _SPACE, "ffn": "none", "positions": {"kind": "none"}},
    "mamba2_groups": _WITHOUT_POSITIONS
    | {"mixer": _SPACE | {"num_groups": 4, "gated_norm": "norm_first"}},
    "gated_delta_net": _WITHOUT_POSITIONS
    | {
        "mixer": {"kind": "gated_delta_net", "num_heads": 8, "num_key_heads": 4}
        | {"key_dim": 6, "value_dim": 10}
    },
    "kimi_delta_attention": _WITHOUT_POSITIONS
    | {
        "mixer": {"kind": "kimi_delta_attention", "num_heads": 8, "head_dim": 6}
        | {"rank": 8}
    },
    "kimi_delta_whole": _WITHOUT_POSITIONS
    | {
        "mixer": {"kind": "kimi_delta_attention", "num_heads": 8, "head_dim": 6}
        | {"squeezed": False, "min_log_decay": -5.0}
    },
    "lightning": _WITHOUT_POSITIONS
    | {"mixer": {"kind": "lightning", "num_heads": 12, "head_dim": 6}},
    "short_conv": _WITHOUT_POSITIONS | {"mixer": {"kind": "short_conv"}},
    "parallel_heads": {
        "mixer": {"kind": "parallel_heads", "attention": _HEADS, "mixer": _SPACE},
        "mlp": {"d_ff": 72},
    },
    # Zamba2: two layers of four with a block of attention and an MLP that they share.
    "shared_block": {
        "kinds": {
            "space": {"mixer": _SPACE, "ffn": "none"},
            "hybrid": {
                "mixer": {
                    "kind": "shared_block",
                    "attention": _HEADS,
                    "mlp": {"d_ff": 72},
                    "mixer": _SPACE,
                    "attention_rank": 8,
                    "mlp_rank": 8,
                },
                "ffn": "none",
            },
        },
        "pattern": ["space", "hybrid"],
    },
    # Qwen3-Next: three layers with a delta rule, one with gated attention, experts.
    "delta_hybrid": {
        "attention": _HEADS | {"output_gate": "element", "qk_norm": True},
        "moe": _EXPERTS | {"shared_experts": 1, "shared_gate": True},
        "kinds": {
            "linear": {
                "mixer": {"kind": "gated_delta_net", "num_heads": 8, "key_dim": 6}
                | {"num_key_heads": 4, "value_dim": 10}
            },
            "full": {},
        },
        "pattern": ["linear", "linear", "linear", "full"],
        "num_layers": 8,
    },
    "encoder": {
        "architecture": "encoder",
        "attention": _HEADS | {"bias": True},
        "mlp": _PLAIN | {"bias": True},
        "placement": "post",
        "norm": {"kind": "layernorm", "bias": True},
        "final_norm": False,
        "embedding_norm": True,
        "positions": {"kind": "learned"},
        "token_types": 2,
        "head_activation": "gelu",
        "tie_embeddings": True,
    },
    "encoder_decoder": {
        "architecture": "encoder_decoder",
        "encoder_layers": 2,
        "attention": _HEADS,
        "mlp": _PLAIN,
        "positions": {"kind": "relative", "buckets": 8, "max_distance": 16},
        "vocab_size": 208,
    },
}
_TASKS = {
    "encoder": {"kind": "mlm"},
    "encoder_decoder": {
        "kind": "span_corruption",
        "encoder_len": 32,
        "decoder_len": 16,
    },
}


def run(model: str, layout: str, seq_len: int = SEQ, **changes: Any) -> RunConfig:
    """A run of one of these models, or the parity matrix's, on a layout of that."""
    cell = CELLS[layout]
    settings = dict(CELLS[layout].settings)
    micro = MICRO if cell.mesh.get("stage", 1) > 1 else 1
    sizes = {"vocab_size": 88, "num_layers": 4, "d_model": 32}
    model_settings = MODELS[model] if model in MODELS else cells.MODELS[model]
    return RunConfig.model_validate(
        {
            "model": {**sizes, **model_settings, "max_seq_len": seq_len, **changes},
            "task": _TASKS.get(model, {"kind": "clm"}),
            "data": {"seq_len": seq_len, "batch_size": ROWS * micro},
            "mesh": cell.mesh,
            "train": {"micro_batches": micro},
            **settings,
            "sharding": {"max_unsharded": 1.0, **settings.get("sharding", {})},
        }
    )
