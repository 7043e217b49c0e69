"""The parity matrix: layouts × models, each a few training steps that must equal one
device's."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.config import MaxlmError
from maxlm.models.params import flatten_names
from maxlm.optim.state import TrainState
from maxlm.parallel.config import ParallelConfig
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import (
    batch_sharding,
    get_local_row_indices,
    make_global_batch,
)
from maxlm.run.setup import RunSetup, set_up_run
from maxlm.sharding import bind_mesh
from tests.models.building import QUICK

STEPS, MICRO, ROWS, SEQ = 3, 4, 8, 24
RATE = 1e-2

DENSE, ALL = ("mha", "gqa_window"), ("mha", "gqa_window", "moe")
CAPACITY, PATTERN, LATENT = "moe capacity", "pattern", "latent"
KINDS = "kinds"
GATED, MAMBA, DELTA, SPARSE = "gated, chunks", "mamba", "delta rules", "sparse"
HYBRID = "hybrid"
NARROW = "narrow values"
STREAMS = "hyper-connections"
SHARED = "shared blocks"
SEPARATE_VALUES = "ppo, separate values"
_BASE = {"vocab_size": 72, "num_layers": 4, "d_model": 32, "max_seq_len": SEQ}
_HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6}
_EXPERTS = {"num_experts": 8, "experts_per_token": 2, "d_ff": 16, "shared_experts": 1}
MODELS: dict[str, dict[str, Any]] = {
    "mha": _BASE
    | {
        "d_model": 24,
        "attention": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 3, "bias": True},
        "mlp": {"d_ff": 40, "gated": False, "activation": "gelu_tanh", "bias": True},
        "norm": {"kind": "layernorm", "bias": True},
        "positions": {"kind": "learned"},
        "tie_embeddings": True,
    },
    "gqa_window": _BASE
    | {
        "vocab_size": 88,
        "attention": _HEADS | {"window": 7, "sinks": True},
        "mlp": {"d_ff": 48},
        "remat": "none",
    },
    "moe": _BASE
    | {
        "vocab_size": 56,
        "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6},
        "moe": _EXPERTS | {"z_loss": 1e-3},
    },
    # Layers unlike each other: kinds by turns with some left over (Gemma 3), and latent
    # attention with a dense layer before those with experts and modules behind them that
    # predict further tokens (DeepSeek-V3).
    PATTERN: _BASE
    | {
        "num_layers": 5,
        "attention": _HEADS | {"qk_norm": True},
        "mlp": {"d_ff": 48, "activation": "gelu_tanh"},
        "norm": {"zero_centred": True},
        "placement": "sandwich",
        "pattern": [{"window": 5, "positions": {"theta": 100.0}}, {"window": None}],
        "embedding_scale": 5.0,
        "tie_embeddings": True,
    },
    # An output gate, one mean for the norm of all heads, chunks that end within rows'
    # documents and devices' shares, queries that grow.
    GATED: _BASE
    | {
        "attention": _HEADS
        | {"output_gate": "element", "qk_norm": True, "qk_norm_form": "all_heads"}
        | {"chunk": 5, "temperature": {"scale": 0.5, "length": 3}, "value_norm": True},
        "mlp": {"d_ff": 48},
    },
    # Heads whose values are narrower than their keys, norms without weights, slopes of
    # an activation that are learnt.
    NARROW: _BASE
    | {
        "attention": _HEADS
        | {"value_head_dim": 5, "qk_norm": True, "qk_norm_form": "weightless"},
        "mlp": {"d_ff": 48, "gated": False, "activation": {"kind": "xielu"}},
        "norm": {"kind": "layernorm", "weightless": True},
    },
    # Latent attention to what an indexer chooses.
    SPARSE: _BASE
    | {
        "mixer": {
            "kind": "sparse_attention",
            "attention": {
                "num_heads": 8,
                "num_kv_heads": 8,
                "head_dim": 10,
                "latent": {
                    "q_rank": 8,
                    "kv_rank": 16,
                    "rotary_dim": 4,
                    "value_dim": 6,
                },
            },
            "index_heads": 8,
            "index_dim": 6,
            "top_k": 3,
        },
        "mlp": {"d_ff": 48},
    },
    LATENT: _BASE
    | {
        "num_layers": 3,
        "attention": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 10, "sinks": True}
        | {"latent": {"kv_rank": 16, "rotary_dim": 4, "value_dim": 6}},
        "mlp": {"d_ff": 48},
        # With every part that experts may have.
        "moe": _EXPERTS
        | {"activation": {"kind": "clamped_swiglu"}, "bias": True, "router_bias": True}
        | {"shared_gate": True, "shared_d_ff": 24, "latent_dim": 16}
        | {"score": "sigmoid", "selection_bias": True},
        "dense_layers": 1,
        "mtp": {"num_modules": 2},
    },
    # Layers of other modules by turns, each with parameters of its own shapes.
    KINDS: _BASE
    | {
        "num_layers": 8,
        "attention": _HEADS,
        "mlp": {"d_ff": 48},
        "kinds": {
            "wide": {},
            "narrow": {
                "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 10},
                "window": 7,
                "ffn": "none",
                "positions": {"kind": "none"},
            },
        },
        "pattern": ["narrow", "wide"],
    },
}
# States that pass from token to token, and from one device's share of a row to the next.
MODELS[MAMBA] = _BASE | {
    "mixer": {"kind": "mamba", "d_inner": 48, "d_state": 5, "dt_rank": 3}
    | {"inner_norms": "learned"},
    "ffn": "none",
    "positions": {"kind": "none"},
    "remat": "attention",
}
# States that are matrices, by head and by channel, beside attention.
MODELS[DELTA] = _BASE | {
    "num_layers": 6,
    "attention": _HEADS | {"output_gate": "element"},
    "mlp": {"d_ff": 48},
    "kinds": {
        "delta": {
            "mixer": {"kind": "gated_delta_net", "num_heads": 8, "num_key_heads": 4}
            | {"key_dim": 5, "value_dim": 6, "negative_eigenvalues": True}
        },
        "kimi": {
            "mixer": {"kind": "kimi_delta_attention", "num_heads": 8, "head_dim": 5}
            | {"rank": 4}
        },
        "full": {"positions": {"kind": "none"}},
    },
    "pattern": ["delta", "kimi", "full"],
    "remat": "attention",
}
# Every other mixer with a state, by turns: one group of heads, and several; attention
# beside it; branches that join the normed stream.
_SPACE = {"kind": "mamba2", "num_heads": 8, "head_dim": 3, "state_size": 5}
MODELS[HYBRID] = _BASE | {
    "num_layers": 8,
    "attention": _HEADS,
    "mlp": {"d_ff": 48, "gate_scale": 0.8, "output_scale": 1.2},
    "kinds": {
        "space": {"mixer": _SPACE | {"gated_norm": "norm_first"}, "ffn": "none"},
        "line": {
            "mixer": {"kind": "lightning", "num_heads": 8, "head_dim": 3},
            "placement": "normed",
            "mixer_scales": {"stream": 1.1, "output": 0.9},
            "ffn": "none",
        },
        "conv": {"mixer": {"kind": "short_conv", "bias": True}},
        "both": {
            "mixer": {
                "kind": "parallel_heads",
                "attention": _HEADS,
                "mixer": _SPACE | {"num_groups": 4, "bias": True, "max_step": 1.0},
                "mixer_output_scale": 0.7,
            },
            "ffn": "none",
        },
    },
    "pattern": ["space", "line", "conv", "both"],
    "remat": "attention",
}
# Layers that read the weights of two blocks by turns, with low-rank maps of their own.
_SHARED_BLOCK = {
    "kind": "shared_block",
    "attention": _HEADS,
    "mlp": {"d_ff": 48, "activation": "gelu", "bias": True},
    "mixer": _SPACE,
    "attention_rank": 8,
    "mlp_rank": 16,
}
MODELS[SHARED] = _BASE | {
    "num_layers": 6,
    "kinds": {
        "space": {"mixer": _SPACE, "ffn": "none"},
        "first": {"mixer": _SHARED_BLOCK, "ffn": "none"},
        "second": {"mixer": _SHARED_BLOCK | {"block": "block1"}, "ffn": "none"},
    },
    "pattern": ["space", "first", "second"],
}
# Several residual streams, whose weights follow from them.
MODELS[STREAMS] = _BASE | {
    "attention": _HEADS,
    "mlp": {"d_ff": 48},
    "placement": "sandwich",
    "block": {"kind": "hyper_connections", "num_streams": 3, "sinkhorn_iterations": 4},
}
MODELS[CAPACITY] = MODELS["moe"] | {
    "moe": MODELS["moe"]["moe"] | {"dispatch": "capacity", "capacity_factor": 1.0}
}


# Tuning: a base model, and settings of its run. Segments of a row are chosen and
# rejected by turns.
_LORA = {"adapter": {"kind": "lora", "rank": 2}}
_POLICY = {
    "rewards": [{"kind": "exact_match"}],
    "epochs": 2,
    "sequences_per_row": 6,
    "correction": "token_truncate",
    "kl_coef": 0.1,
    "entropy_coef": 0.01,
}
TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "sft + lora": ("gqa_window", {"task": {"kind": "sft"}, **_LORA}),
    "dpo + lora": (
        "gqa_window",
        {"task": {"kind": "dpo", "examples_per_row": 6}, **_LORA},
    ),
    "narrow values + lora": (NARROW, _LORA),
    # Policies, on rollouts that were prepared before.
    "grpo + lora": (
        "gqa_window",
        {
            "task": _POLICY
            | {"kind": "grpo", "loss_type": "grpo", "ratio_level": "sequence"}
            | {"num_samples": 2},
            **_LORA,
        },
    ),
    "ppo": (
        "mha",
        {
            # Without a reference, which would be a second model of this one's.
            "task": _POLICY | {"kind": "ppo", "kl_coef": 0.0},
            "model": MODELS["mha"] | {"heads": {"value": 1}},
        },
    ),
    # A second model in training.
    SEPARATE_VALUES: (
        "gqa_window",
        {"task": _POLICY | {"kind": "ppo", "kl_coef": 0.0, "value_model": "separate"}},
    ),
}


@dataclass(frozen=True)
class Cell:
    """One layout: a mesh and settings over the defaults."""

    mesh: dict[str, int]
    settings: dict[str, Any]
    models: tuple[str, ...] = ALL
    """Those it is tried with."""


REST = {"embed": None, "expert_embed": None}
WHOLE = {"storage": REST}
ZERO1 = {"storage": REST, "gradients": REST, "optimizer": {}}
ZERO2 = {"storage": REST, "gradients": {}}
SEQUENCE_PARALLEL = {"compute": {"residual": ["context", "tensor"]}}


def _cell(
    settings: dict[str, Any] | None = None, models: tuple[str, ...] = ALL, **mesh: int
) -> Cell:
    return Cell({"fsdp": 1, **mesh}, settings or {}, models)


def _pipe(schedule: str, groups: int = 1, **more: Any) -> dict[str, Any]:
    return {"parallel": {"schedule": schedule, "layer_groups": groups}, **more}


def _context(method: str, **more: Any) -> dict[str, Any]:
    return {"parallel": {"context": method, **more}}


def _compute(**rules: Any) -> dict[str, Any]:
    return {"sharding": {"compute": rules}}


def _micro(count: int) -> dict[str, Any]:
    return {"steps": STEPS, "micro_batches": count}


SP = {"sharding": SEQUENCE_PARALLEL}
KV_WHOLE = {"sharding": {"storage": {"kv_heads": None}, "compute": {"kv_heads": None}}}
ALONE = _cell()
CELLS: dict[str, Cell] = {
    "dp": _cell({"sharding": WHOLE}, (*ALL, CAPACITY), data=8),
    "hsdp": _cell(data=2, fsdp=4),
    "zero1": _cell({"sharding": ZERO1}, fsdp=8),
    "zero2": _cell({"sharding": ZERO2}, fsdp=8),
    "fsdp": _cell(fsdp=8),
    "tp": _cell({}, (*ALL, CAPACITY, HYBRID), tensor=4),
    "tp+sp": _cell(SP, tensor=4),
    "cp all-gather": _cell(
        _context("all_gather"), (*ALL, CAPACITY, GATED, MAMBA, DELTA), context=4
    ),
    "cp ring": _cell(_context("ring"), (*ALL, CAPACITY, SPARSE), context=4),
    "cp ulysses": _cell(_context("ulysses"), (*ALL, CAPACITY), context=4),
    "ep": _cell({}, (*ALL, CAPACITY), expert=8),
    "pp gpipe": _cell(_pipe("gpipe"), (*ALL, PATTERN, LATENT), stage=4),
    "pp circular": _cell(_pipe("circular", 2), (*ALL, KINDS, STREAMS, SHARED), stage=2),
    "pp 1f1b": _cell(_pipe("1f1b"), stage=4),
    "tp, 8 ways": _cell({}, (*ALL, MAMBA), tensor=8),
    "tp, 8 ways, kv heads whole": _cell(
        KV_WHOLE, ("gqa_window", "moe", GATED), tensor=8
    ),
    "cp ring, 8 ways": _cell(_context("ring"), context=8),
    "cp ring in order, 8 ways": _cell(
        _context("ring", balance_sequence=False),
        ("gqa_window", GATED, MAMBA, HYBRID),
        context=8,
    ),
    "cp ulysses × tp, 8 ways": _cell(
        _context("ulysses"), ("moe",), context=4, tensor=2
    ),
    "d_model split in compute": _cell(
        _compute(embed=["fsdp"], batch=["data", "expert"]), data=2, fsdp=2
    ),
    "hsdp × tp+sp": _cell(
        SP, (*ALL, PATTERN, LATENT, SPARSE), data=2, fsdp=2, tensor=2
    ),
    "zero2 × tp+sp": _cell(
        {"sharding": {**ZERO2, **SEQUENCE_PARALLEL}}, ("gqa_window",), fsdp=4, tensor=2
    ),
    "fsdp × cp ring × tp+sp": _cell(
        _context("ring") | SP,
        (*ALL, KINDS, GATED, MAMBA, DELTA, HYBRID, LATENT, STREAMS, NARROW, SHARED),
        fsdp=2,
        context=2,
        tensor=2,
    ),
    "cp ulysses × tp": _cell(
        _context("ulysses"), (*ALL, GATED, NARROW), data=2, context=2, tensor=2
    ),
    "ep × fsdp × tp": _cell(expert=2, fsdp=2, tensor=2),
    "ep × zero2": _cell({"sharding": ZERO2}, ("moe",), expert=2, fsdp=4),
    "ep × cp ring": _cell(_context("ring"), (*ALL, CAPACITY), expert=4, context=2),
    "ep × pp circular": _cell(_pipe("circular", 2), stage=2, expert=4),
    "ep × pp 1f1b × tp+sp": _cell(_pipe("1f1b", **SP), stage=2, expert=2, tensor=2),
    "hsdp × pp gpipe": _cell(_pipe("gpipe"), stage=2, data=2, fsdp=2),
    "dp × tp+sp × pp gpipe": _cell(
        _pipe("gpipe", **SP), ("gqa_window",), stage=2, data=2, tensor=2
    ),
    "zero1 × pp circular": _cell(
        _pipe("circular", 2, sharding=ZERO1), ("gqa_window",), stage=2, fsdp=4
    ),
    "zero2 × pp gpipe": _cell(
        _pipe("gpipe", sharding=ZERO2), ("gqa_window",), stage=2, fsdp=4
    ),
    "zero2 × pp 1f1b": _cell(
        _pipe("1f1b", sharding=ZERO2), ("gqa_window",), stage=2, fsdp=4
    ),
    "fsdp × tp+sp × pp 1f1b": _cell(
        _pipe("1f1b", **SP),
        (*ALL, KINDS, GATED, MAMBA, DELTA, HYBRID, SPARSE, STREAMS, NARROW),
        stage=2,
        fsdp=2,
        tensor=2,
    ),
    "fsdp × tp+sp × pp circular": _cell(
        _pipe("circular", 2, **SP), stage=2, fsdp=2, tensor=2
    ),
    "cp all-gather × pp circular": _cell(
        _pipe("circular", 2), (*ALL, GATED, MAMBA), stage=2, context=2, data=2
    ),
    "cp ring in order × pp 1f1b": _cell(
        _context("ring", balance_sequence=False, schedule="1f1b"),
        stage=2,
        fsdp=2,
        context=2,
    ),
    "pp 1f1b, 2 micro-batches": _cell(_pipe("1f1b", train=_micro(2)), stage=4),
    "pp 1f1b in layer groups": _cell(_pipe("1f1b", 2), stage=2),
    "pp circular, 4 layer groups": _cell(_pipe("circular", 4), stage=2),
    "heads and sequence on one axis": _cell(
        _compute(seq=["context", "tensor"], residual=["context", "tensor"]), tensor=2
    ),
}


# What is refused before anything is compiled (docs/parallelism.md: why); all else must
# train.
REFUSED: dict[str, tuple[str, ...]] = {
    "cp all-gather": (CAPACITY,),
    "cp ring": (CAPACITY, SPARSE),
    "cp ulysses": (CAPACITY,),
    "ep": DENSE,
    "ep × fsdp × tp": DENSE,
    "ep × cp ring": (*DENSE, CAPACITY),
    "ep × pp circular": DENSE,
    "ep × pp 1f1b × tp+sp": DENSE,
    "tp, 8 ways": ("gqa_window", "moe"),
    "tp, 8 ways, kv heads whole": ("moe",),
    "cp ring, 8 ways": ALL,
    "cp ulysses × tp, 8 ways": ("moe",),
    "d_model split in compute": ALL,
    "pp gpipe": (PATTERN, LATENT),
    "pp circular": (SHARED,),
    "pp 1f1b, 2 micro-batches": ALL,
    "pp 1f1b in layer groups": ALL,
    "pp circular, 4 layer groups": ALL,
    "heads and sequence on one axis": ALL,
}


def _list_models(cell: Cell) -> list[str]:
    """The models of a cell, and what is tuned where its base is one of them."""
    return [
        *cell.models,
        *(name for name, (base, _) in TUNED.items() if base in cell.models),
    ]


def _is_trained(name: str, model: str) -> bool:
    base = TUNED.get(model, (model,))[0]
    has_stages = CELLS[name].mesh.get("stage", 1) > 1
    if model == SEPARATE_VALUES and has_stages:
        return False
    return base not in REFUSED.get(name, ())


PAIRS = [(name, model) for name, cell in CELLS.items() for model in _list_models(cell)]
TRAINED = [pair for pair in PAIRS if _is_trained(*pair)]


def _parts_that_meet(name: str, model: str) -> set[tuple[str, ...]]:
    """The model of a cell, its parts (axes in use and how they are used), and every two
    of them."""
    cell = CELLS[name]
    parallel = ParallelConfig.model_validate(cell.settings.get("parallel", {}))
    axis_uses = {
        "context": f"{parallel.context}, balanced: {parallel.balance_sequence}",
        "stage": parallel.schedule,
    }
    axes = [axis for axis, size in cell.mesh.items() if size > 1]
    parts = [f"{axis} {axis_uses.get(axis, '')}" for axis in axes]
    parts += [str(rules) for rules in cell.settings.get("sharding", {}).items()]
    return {(model,), *((part,) for part in parts), *combinations(sorted(parts), 2)}


def _cover_parts(
    trained: list[tuple[str, str]], most: int, *others: tuple[str, str]
) -> list[tuple[str, str]]:
    """Few of `trained` that, with `others`, have every model and every part, and where
    `most` is 2, every two parts that meet."""

    def list_parts(name: str, model: str) -> set[tuple[str, ...]]:
        return {part for part in _parts_that_meet(name, model) if len(part) <= most}

    parts = {cell: list_parts(*cell) for cell in trained}
    missing = set().union(*parts.values())
    for cell in others:
        missing -= list_parts(*cell)
    chosen = []
    while missing:
        # Greedy set cover: of the cells, the one that has most of what is missing.
        best = max(trained, key=lambda cell: len(parts[cell] & missing))
        chosen.append(best)
        missing -= parts[best]
    return chosen


# What `make test-more` trains on two processes.
HOSTS_COVER = ("ep × pp circular", "moe")
# What `make test` and `make test-more` train on eight devices.
COVER = _cover_parts(TRAINED, 2, HOSTS_COVER)
# Of it, what `make test` trains: pipelines, context and tensor parallelism by the layouts
# that compile fastest. Experts over devices have tests/parallel/test_experts.py there.
SMALL_COVER = (
    ("cp ring in order × pp 1f1b", "mha"),
    ("fsdp × cp ring × tp+sp", "mha"),
    ("cp ulysses × tp", "mha"),
)

# The same for eight devices of two processes, which every axis then crosses.
HOST_CELLS: dict[str, Cell] = {
    "fsdp": _cell({}, ("gqa_window",), fsdp=8),
    "tp+sp": _cell(SP, ("mha",), tensor=8),
    "pp circular": _cell(_pipe("circular", 2), ("gqa_window",), stage=2, fsdp=4),
    "pp 1f1b": _cell(_pipe("1f1b"), ("mha",), stage=4, tensor=2),
    "cp ring": _cell(_context("ring"), ("gqa_window",), context=4, fsdp=2),
    "cp all-gather": _cell(_context("all_gather"), ("gqa_window",), context=4, fsdp=2),
    "cp ulysses": _cell(_context("ulysses"), ("mha",), context=4, fsdp=2),
    "ep": _cell({}, ("moe",), expert=8),
    "ep × pp circular": _cell(_pipe("circular", 2), ("moe",), stage=2, expert=4),
}


def config_of(model: str, cell: Cell) -> RunConfig:
    base, tuning = TUNED.get(model, (model, {}))
    return RunConfig.model_validate(
        {
            "model": MODELS[base],
            **tuning,
            "data": {"seq_len": SEQ, "batch_size": ROWS * MICRO},
            "mesh": cell.mesh,
            "train": {"steps": STEPS, "micro_batches": MICRO},
            "schedule": {"kind": "constant", "warmup_steps": 0, "learning_rate": RATE},
            # Smaller: where gradients are small, updates are rounding alone.
            "optimizer": {"eps": 1e-2},
            "compute_dtype": "float32",
            **cell.settings,
            "sharding": {"max_unsharded": 1.0, **cell.settings.get("sharding", {})},
        }
    )


def refusal(model: str, cell: Cell) -> str | None:
    """Why a layout of a model is refused before anything is compiled; None: it is
    not."""
    try:
        config = config_of(model, cell)
        set_up_run(config, devices_of(config))
    except MaxlmError as error:
        return str(error)
    return None


@cache
def batches(vocab_size: int) -> list[dict[str, np.ndarray]]:
    """Rows of several documents and padding, and what a policy's loss reads of
    them."""
    random = np.random.default_rng(1)
    policy_random = np.random.default_rng(2)
    shape = (ROWS * MICRO, SEQ)
    columns = np.arange(SEQ)
    step_batches = []
    for _ in range(STEPS):
        tokens, targets = random.integers(0, vocab_size, (2, *shape), dtype=np.int32)
        # [rows, SEQ]: where a document begins, and for each token where its own did.
        starts = random.random(shape) < 0.2
        starts[:, 0] = True
        begun = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        lengths = random.integers(SEQ // 2, SEQ + 1, shape[0])
        padding = columns >= lengths[:, None]
        # Padding is segment 0; documents count from 1.
        segments = np.where(padding, 0, np.cumsum(starts, axis=1)).astype(np.int32)
        positions = np.where(padding, 0, columns - begun).astype(np.int32)
        weights = random.random(shape, dtype=np.float32) * (segments > 0)
        batch = {"tokens": tokens, "targets": targets, "weights": weights}
        batch |= {"positions": positions, "segment_ids": segments}
        batch["versions"] = np.zeros(shape, np.int32)
        for name in ("advantages", "values", "returns"):
            batch[name] = policy_random.standard_normal(shape, dtype=np.float32)
        for name in ("sampled", "old", "reference"):
            noise = 0.1 * policy_random.standard_normal(shape, dtype=np.float32)
            batch[f"{name}_log_probs"] = noise - np.float32(np.log(vocab_size))
        step_batches.append(batch)
    return step_batches


def devices_of(config: RunConfig) -> list[Any]:
    count = int(np.prod(list(config.mesh.model_dump().values())))
    return jax.devices()[:count]


def start_from(folder: Path, setup: RunSetup) -> TrainState:
    """The one checkpoint that all layouts of a model start from; who comes first, one
    device, writes it."""
    if not folder.exists():
        with FolderTier(folder) as keeper:
            keeper.save(0, setup.init_train_state(), {})
    with FolderTier(folder, read_only=True) as keeper:
        return keeper.restore(0, setup.abstract_state)


def train(
    setup: RunSetup, state: TrainState
) -> Iterator[tuple[dict[str, float], TrainState]]:
    """Metrics and state after each step, which the next one takes."""
    jitted: Any = setup.jit_train_step().__wrapped__
    lead = (MICRO, ROWS)
    rules = setup.placed.compute
    mesh = setup.mesh
    arrays = setup.config.task.batch_arrays(SEQ)
    rows = get_local_row_indices(batch_sharding(rules, mesh, ()), lead)
    step = None
    for batch in batches(setup.config.model.vocab_size):
        local_arrays = {name: batch[name][rows] for name in arrays}
        global_batch = make_global_batch(
            local_arrays, arrays, rows, rules, mesh, lead, setup.token_order
        )
        if step is None:
            lowered = bind_mesh(setup.mesh, jitted.lower)(state, global_batch)
            # XLA compiles a model twice as fast when it does not optimise.
            step = lowered.compile(compiler_options=QUICK)
        state, metrics = step(state, global_batch)
        yield {name: float(value) for name, value in metrics.items()}, state


def canonical(setup: RunSetup, params: Any) -> dict[str, np.ndarray]:
    """Every parameter under its canonical name, layers on one axis."""
    groups = layer_group_shapes(setup.specs)
    arrays = {}
    for name, value in flatten_names(params).items():
        array = np.array(value)
        if name in groups:
            # [layer groups, layers of each, ...] to [layers, ...].
            array = array.reshape(-1, *array.shape[2:])
        arrays[name] = array
    return arrays
