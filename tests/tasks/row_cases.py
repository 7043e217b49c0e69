"""Rows of prompts and answers whose tokens are written as numbers, and batches of
them."""

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from maxlm.data.loader.batches import LoaderConfig
from maxlm.models.params import bind
from maxlm.sharding import bind_mesh
from maxlm.tasks import TASKS, SourceInputs, TaskModels, Vocabulary
from tests.models.building import QUICK

VOCAB = 97
EOS = 2
PREFERENCE_CASES: dict[str, dict[str, Any]] = {
    "reward": {"kind": "reward"},
    "reward_centred": {"kind": "reward", "center_rewards": 0.3},
    "dpo_sigmoid": {"kind": "dpo", "beta": 0.3},
    "dpo_hinge": {"kind": "dpo", "loss_type": "hinge", "beta": 0.3},
    "dpo_robust": {
        "kind": "dpo",
        "loss_type": "robust",
        "beta": 0.3,
        "label_smoothing": 0.2,
    },
    "dpo_ipo": {"kind": "dpo", "loss_type": "ipo", "beta": 0.3},
    "kto": {
        "kind": "kto",
        "beta": 0.3,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
    },
    "orpo": {"kind": "orpo", "beta": 0.4},
    "cpo_sigmoid": {"kind": "cpo", "label_smoothing": 0.1, "alpha": 0.5},
    "cpo_hinge": {"kind": "cpo", "loss_type": "hinge"},
    "cpo_ipo": {"kind": "cpo", "loss_type": "ipo"},
    "simpo": {
        "kind": "cpo",
        "loss_type": "simpo",
        "beta": 2.0,
        "gamma": 0.8,
        "alpha": 0.0,
    },
}


class NumberTokenizer:
    """A tokenizer of texts like ``"5 17 3"``."""

    vocab_size = VOCAB
    eos_id = EOS
    prefix_ids: ClassVar[list[int]] = []
    special_tokens: ClassVar[dict[str, int]] = {}

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def draw_text(random: np.random.Generator, low: int = 1, high: int = 8) -> str:
    return " ".join(map(str, random.integers(3, VOCAB, random.integers(low, high))))


def draw_rows(seed: int, count: int = 6) -> list[dict[str, Any]]:
    """Rows that every task reads, of ragged lengths; answers are good and bad by
    turns."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt = draw_text(random)
        chosen = draw_text(random)
        row = {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": draw_text(random),
            "completion": chosen,
            "label": i % 3 != 1,
            "margin": round(float(random.normal()), 3),
        }
        rows.append(row)
    return rows


def make_task(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    """A task on a file of these rows."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = TASKS.find(settings["kind"])
    assert task is not None
    return task.model_validate({"files": [str(path)], **settings})


def make_inputs(seq_len: int, batch_size: int) -> SourceInputs:
    ids = np.zeros(VOCAB, bool)
    loader = LoaderConfig(seq_len=seq_len, batch_size=batch_size, shuffle=False)
    tokenizer: Any = NumberTokenizer()
    vocabulary = Vocabulary(VOCAB, (), EOS, ids, ids)
    return SourceInputs(loader, 0, vocabulary, tokenizer)


def make_batch(
    task: Any, seq_len: int, batch_size: int, step: int = 0
) -> dict[str, np.ndarray]:
    """Rows [batch_size, ...] of a task's file, each of its examples once."""
    file = task.open_files("files")
    inputs = make_inputs(seq_len, batch_size)
    source = task.make_source(
        file, np.arange(len(file)), inputs, shuffle=False, endless=False
    )
    return source.rows(step, range(batch_size))


def compute_loss_and_gradient(
    task: Any, models: Any, batch: Any, parts: int = 1, frozen_model: Any = None
) -> tuple[float, dict[str, float], Any]:
    """The mean loss over a batch [B, ...] in some micro-batches, what is logged, and
    the gradient of the former. ``models``: a model, its mesh, its parameters and a
    reference's, which ``frozen_model`` has, by default the same."""
    model, mesh, *both = models
    micro = {
        name: array.reshape(parts, -1, *array.shape[1:])
        for name, array in batch.items()
    }
    settings = task.model_dump_json(exclude={"files"})
    step = _jit_step(type(task), settings, model, frozen_model or model)
    (loss, sums), gradient = bind_mesh(mesh, step)(*both, micro)
    counted = float(sums["tokens"])
    return float(loss), {name: float(x) / counted for name, x in sums.items()}, gradient


@cache
def _jit_step(kind: Any, settings: str, model: Any, frozen_model: Any) -> Any:
    """One for all files, which its batches alone depend on."""
    task = kind.model_validate_json(settings)

    def run(params, reference, micro):
        frozen = {name: bind(frozen_model, reference) for name in task.frozen_models()}
        key = jax.random.key(0)
        models = TaskModels(bind(model, params), frozen)
        micro = task.prepare_batch(models, micro, key)

        def total(params):
            models = TaskModels(bind(model, params), frozen)
            results = jax.lax.map(lambda rows: task.loss(models, rows, key), micro)
            loss, sums = jax.tree.map(lambda x: x.sum(0), results)
            return loss / sums["tokens"], sums

        return jax.value_and_grad(total, has_aux=True)(params)

    return jax.jit(run, compiler_options=QUICK)
