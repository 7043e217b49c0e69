"""A whole update of PPO, fixed answers, two epochs of SGD, is that of TRL 1.12: what it
logs, and the parameters behind it.

TRL has no PPO since 1.13. To run this, put the last version that has it into a folder
of its own, and name the folder:

    pip install --target FOLDER --no-deps trl==1.12.0
    MAXLM_TRL_112=FOLDER pytest tests/parity/test_ppo_trl.py

Answers fill all the room that they have. There TRL's estimate is the usual one; of
shorter ones it has the score one step behind the last token, with a value of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from maxlm.models.params import bind, flatten_names  # noqa: E402
from maxlm.rl.rollouts.packing import RowLayout, pack_samples  # noqa: E402
from maxlm.rl.samples import Prompt, Sample  # noqa: E402
from maxlm.rl.tasks.ppo import PpoTask  # noqa: E402
from maxlm.sharding import ShardingConfig, bind_mesh  # noqa: E402
from maxlm.tasks.task import Average, TaskModels  # noqa: E402
from tests.models.building import QUICK  # noqa: E402
from tests.parity import compare  # noqa: E402
from tests.parity.trl_ppo import SETTINGS, build_models  # noqa: E402

VERSION_FOLDER = "MAXLM_TRL_112"
FOLDER = os.environ.get(VERSION_FOLDER)
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        FOLDER is None or not Path(FOLDER, "trl", "experimental", "ppo").is_dir(),
        reason=f"{VERSION_FOLDER} names no folder with trl 1.12",
    ),
]
HEAD = "heads.value.kernel"


@pytest.fixture(
    scope="module", params=[("k1", "head"), ("k3", "head"), ("k3", "separate")]
)
def theirs(request, tmp_path_factory):
    """What TRL makes of the update, in a process of its own: it has another version of
    TRL than ours."""
    path = tmp_path_factory.mktemp("trl") / "update.npz"
    command = [sys.executable, "-m", "tests.parity.trl_ppo", str(path), *request.param]
    environment = os.environ | {"PYTHONPATH": f"{FOLDER}:."}
    subprocess.run(command, check=True, env=environment, timeout=600)
    with np.load(path) as arrays:
        return *request.param, dict(arrays)


def test_an_update(theirs):
    estimator, value_kind, update = theirs
    policy, reference, value_weight, _, value_trunk = build_models()
    family, config = compare.read(
        policy.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    )
    entries = family.list_entries(config)

    def read_params(tensors: Any, head: Any) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
        flat = compare.parameters(config, entries, arrays)
        return flat if head is None else flat | {HEAD: np.asarray(head).T}

    def read_trained(policy: Any, trunk: Any, head: Any) -> dict[str, np.ndarray]:
        """The policy's parameters, and those of its value model."""
        if value_kind == "head":
            return read_params(policy, head)
        values = read_params(trunk, head)
        values = {f"auxiliary.value.{name}": array for name, array in values.items()}
        return read_params(policy, None) | values

    def detach(model: Any) -> dict[str, np.ndarray]:
        return {n: t.detach().numpy() for n, t in model.state_dict().items()}

    mesh = compare.one_device()
    with_head = config.model_copy(update={"heads": {"value": 1}})
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    module = with_head.build(rules=rules, dtype=jnp.float32)
    start = read_trained(detach(policy), detach(value_trunk), value_weight.numpy())
    reference_module = module
    if value_kind == "separate":
        value_module = module
        reference_module = config.build(rules=rules, dtype=jnp.float32)
        module = config.build(rules=rules, dtype=jnp.float32)
        module.auxiliary = nnx.Dict({"value": value_module})
    params = compare.placed(start, mesh)
    head = value_weight.numpy() if value_kind == "head" else None
    frozen = compare.placed(read_params(detach(reference), head), mesh)

    task = PpoTask.model_validate(
        {
            "rewards": [{"kind": "exact_match"}],
            "epochs": SETTINGS["epochs"],
            "kl_coef": SETTINGS["kl_coef"],
            "kl_estimator": estimator,
            "value_model": value_kind,
            "clip": SETTINGS["clip"],
            "value_clip": SETTINGS["value_clip"],
            "value_coef": SETTINGS["value_coef"],
            "discount": SETTINGS["discount"],
            "decay": SETTINGS["decay"],
            "missing_end_penalty": SETTINGS["missing_end_penalty"],
            "correction": "none",
        }
    )
    queries = update["queries"]
    answers = update["answers"]
    samples = []
    for query, answer in zip(queries, answers, strict=True):
        tokens = [int(t) for t in query if t != SETTINGS["pad"]]
        length = len(answer)
        sample = Sample(
            Prompt(len(samples), tuple(tokens), {}),
            0,
            [*tokens, *(int(t) for t in answer)],
            [False] * len(tokens) + [True] * length,
            [0.0] * (len(tokens) + length),
            [0] * (len(tokens) + length),
            bool((answer == SETTINGS["eos"]).any()),
        )
        samples.append(sample)
    is_complete = np.array([[sample.is_complete] for sample in samples])
    assert 0 < is_complete.sum() < len(samples)
    seq_len = max(len(sample.tokens) for sample in samples) - 1
    batch = pack_samples(samples, RowLayout(seq_len))

    def prepare(params, frozen, batch):
        frozen_models = {"reference": bind(reference_module, frozen)}
        models = TaskModels(bind(module, params), frozen_models)
        micro = {name: array[None] for name, array in batch.items()}
        return task.prepare_rollouts(models, micro, jax.random.key(0))

    added = bind_mesh(mesh, jax.jit(prepare, compiler_options=QUICK))(
        params, frozen, batch
    )
    batch |= {name: np.asarray(array[0]) for name, array in added.items()}
    scores = update["scores"].astype(np.float64)[:, None, None]
    rollout = task.finish_rollouts(scores, [1.0], is_complete, batch)

    def compute_loss(params, rollout):
        models = TaskModels(bind(module, params))
        total, sums = task.loss(models, rollout, jax.random.key(0))
        return total / sums["tokens"], sums

    step = jax.jit(
        jax.value_and_grad(compute_loss, has_aux=True), compiler_options=QUICK
    )
    optimizer = optax.sgd(SETTINGS["rate"])
    state = optimizer.init(params)
    records = []
    for _ in range(SETTINGS["epochs"]):
        (_, sums), gradient = bind_mesh(mesh, step)(params, rollout)
        records.append(
            {
                name: float(value.total / value.count)
                if isinstance(value, Average)
                else float(value / sums["tokens"])
                for name, value in sums.items()
            }
        )
        changes, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, changes)

    def average(name: str) -> float:
        return float(np.mean([record[name] for record in records]))

    penalties = SETTINGS["missing_end_penalty"] * ~is_complete[:, 0]
    logged = {
        "objective/kl": records[0]["sequence_kl"],
        "objective/non_score_reward": -SETTINGS["kl_coef"] * records[0]["sequence_kl"],
        "objective/scores": float((update["scores"] - penalties).mean()),
        "loss/policy_avg": average("policy_loss"),
        "loss/value_avg": average("value_loss"),
        "policy/approxkl_avg": average("old_kl"),
        "policy/clipfrac_avg": average("clip_share"),
        "policy/entropy_avg": average("entropy"),
        "val/clipfrac_avg": average("value_clip_share"),
        "val/ratio": average("policy_ratio"),
    }
    for name, ours in logged.items():
        logged_by_trl = float(update[f"log {name}"])
        # Relative, and of numbers that are differences near 0, of 1.
        assert ours == pytest.approx(logged_by_trl, rel=1e-5, abs=1e-6), name

    def select(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): array
            for name, array in update.items()
            if name.startswith(prefix)
        }

    end = read_trained(select("policy "), select("value_model "), update["value"])
    ours = flatten_names(params)
    moved = max(np.abs(end[name] - start[name]).max() for name in end)
    assert moved > 1e-4
    for name, array in end.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-6, err_msg=name)
