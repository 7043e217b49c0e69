"""Direct preference optimization (Rafailov et al. 2023) as a package outside maxlm
would add it: a task with a frozen reference model, on pairs of a JSON Lines file."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import Field

from maxlm.checkpoint.reading import read_metadata
from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.data.row_files import open_rows
from maxlm.data.rows import make_row_source
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.parallel.cross_entropy import compute_fused_log_probs
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.run.warm_start import load_frozen_models
from maxlm.tasks import TASKS, ClmTask, SourceInputs, Task, TaskModels
from maxlm.train.program import train_model
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

SIDES = ("chosen", "rejected")


@TASKS.register("test_dpo")
class MinimalDpoTask(Task):
    """Prefer the chosen answer to the rejected one."""

    reads_text = False

    kind: Literal["test_dpo"] = "test_dpo"
    path: str
    beta: float = Field(default=0.1, gt=0)
    reference: str | None = None

    def frozen_models(self) -> Mapping[str, str | None]:
        return {"reference": self.reference}

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        names = ("tokens", "targets", "segment_ids", "positions")
        tokens, weights = (
            BatchArraySpec.of_tokens(seq_len, t) for t in (np.int32, np.float32)
        )
        arrays = {f"{side}_{name}": tokens for side in SIDES for name in names}
        return arrays | {f"{side}_weights": weights for side in SIDES}

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        length = inputs.loader.seq_len
        return make_row_source(
            open_rows(self.path),
            partial(encode_pair, inputs.tokenizer, length),
            self.batch_arrays(length),
            inputs.loader.batch_size,
            seed=inputs.seed,
        )

    def loss(self, models: TaskModels, batch: Any, key: jax.Array) -> Any:
        margins = {}
        for name, model in {"trained": models.trained, **models.frozen}.items():
            chosen, rejected = (self._log_probs(model, batch, side) for side in SIDES)
            margins[name] = chosen - rejected
        margin = self.beta * (margins["trained"] - margins["reference"])
        pairs = jnp.float32(margin.size)
        sums = {"tokens": pairs, "accuracy": jnp.sum(margin > 0, dtype=jnp.float32)}
        return -jax.nn.log_sigmoid(margin).sum(), sums

    def _log_probs(self, model: Any, batch: Any, side: str) -> jax.Array:
        hidden, _ = model(
            tokens=batch[f"{side}_tokens"],
            positions=batch[f"{side}_positions"],
            segment_ids=batch[f"{side}_segment_ids"],
        )
        logits = model.prepare_logits(hidden)
        log_probs = compute_fused_log_probs(
            logits, batch[f"{side}_targets"], chunk_tokens=self.chunk_tokens
        )
        return (log_probs * batch[f"{side}_weights"]).sum(-1)


def encode_pair(
    tokenizer: Tokenizer, length: int, row: dict[str, str]
) -> dict[str, Any]:
    prompt = tokenizer.encode(row["prompt"])
    arrays = {}
    for side in SIDES:
        ids = [*prompt, *tokenizer.encode(row[side]), tokenizer.eos_id][: length + 1]
        arrays[f"{side}_tokens"] = ids[:-1]
        arrays[f"{side}_targets"] = ids[1:]
        # Of the answer alone: the prompt's tokens are targets without weight.
        arrays[f"{side}_weights"] = np.arange(1, len(ids)) >= len(prompt)
        arrays[f"{side}_positions"] = np.arange(len(ids) - 1)
        arrays[f"{side}_segment_ids"] = np.ones(len(ids) - 1)
    return arrays


@pytest.fixture
def make_config(tmp_path):
    """``make_config(name, **parts)``: a run on pairs in which one word is better than
    another."""
    pairs = [
        {"prompt": f"{i} gulls turn", "chosen": " slowly", "rejected": " into wind"}
        for i in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    text = tiny.write_text(tmp_path / "text")

    def make(name: str, **parts: Any) -> RunConfig:
        task = {"kind": "test_dpo", "path": str(tmp_path / "pairs.jsonl"), "beta": 0.5}
        task |= parts.pop("task", {})
        settings = tiny.settings(tmp_path, text) | {"name": name, "task": task}
        settings["data"]["heldout_fraction"] = 0
        settings |= {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "train": {"steps": 4}}
        settings |= {
            "checkpoint": {"every_steps": 2},
            "reporting": {"tensorboard": False},
        }
        return RunConfig.model_validate(settings | parts)

    return make


def train(config: RunConfig) -> Any:
    return train_model(config, say=lambda _: None)


@pytest.mark.more
@pytest.mark.heavy
def test_a_run_learns_and_resumes_bit_for_bit_with_the_reference_it_began_with(
    make_config,
):
    whole = train(make_config("whole"))
    frozen_models = load_frozen_models(
        whole.setup, lambda setup: setup.init_train_state()
    )
    reference = frozen_models["reference"]
    assert jax.tree.all(
        jax.tree.map(np.array_equal, reference, whole.state.frozen["reference"])
    )
    assert jax.tree.map(lambda x: x.sharding, whole.state) == whole.setup.shardings
    lines = (whole.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # At first the model is its reference, and all margins are 0.
    assert records[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]

    # A run that was killed before its last checkpoint.
    other = shutil.copytree(whole.folder, whole.folder.with_name("cut"))
    shutil.rmtree(other / "checkpoints" / "4")
    cut = train(make_config("cut"))
    assert cut.start_step == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.state, cut.state))

    # Another's reference is saved by where it came from, and must stay what it was.
    config = make_config(
        "own", task={"reference": str(whole.folder)}, train={"steps": 2}
    )
    first = train(config)
    reference_params = first.state.frozen["reference"]
    assert jax.tree.all(
        jax.tree.map(np.array_equal, reference_params, whole.state.params)
    )
    saved = read_metadata(first.folder / "checkpoints" / "2")
    assert saved["frozen"]["reference"]["source"] == str(whole.folder)
    assert not [name for name in saved["fingerprints"] if name.startswith("frozen")]
    # The model that is left is another.
    shutil.rmtree(whole.folder / "checkpoints" / "4")
    with pytest.raises(
        MaxlmError, match=r"the frozen model 'reference' from .*whole is not"
    ):
        train(
            config.model_copy(
                update={"train": config.train.model_copy(update={"steps": 4})}
            )
        )


@pytest.mark.parametrize("axis", ["context", "stage"])
def test_a_mesh_that_it_does_not_declare_is_refused(axis, make_config, monkeypatch):
    train_settings = {"steps": 1, "micro_batches": 2}
    pipeline = {"schedule": "circular"}
    mesh = {axis: 2, "fsdp": -1}
    config = make_config("a", mesh=mesh, train=train_settings, parallel=pipeline)
    with pytest.raises(MaxlmError) as caught:
        train(config)
    meaning = {
        "context": "splits rows and reorders their tokens",
        "stage": "runs all micro-batches [M, B, ...] together through a pipeline",
    }[axis]
    assert str(caught.value) == (
        f"mesh.{axis}: {axis}=2 {meaning}, and task.kind=test_dpo does not say that it "
        f"supports "
        f"this; set it to 1, or if it does, declare mesh_axes with '{axis}' in MinimalDpoTask "
        "(docs/tasks.md)"
    )
    monkeypatch.setattr(MinimalDpoTask, "mesh_axes", frozenset({axis}))
    assert set_up_run(config).mesh.shape[axis] == 2


def test_a_loss_of_its_own_does_not_inherit_what_another_supports():
    """A subclass of a task that supports every mesh declares anew what its own loss
    supports."""

    class SameLoss(ClmTask):
        pass

    class OtherLoss(ClmTask):
        def loss(self, models: TaskModels, batch: Any, key: jax.Array) -> Any:
            return super().loss(models, batch, key)

    assert SameLoss.mesh_axes == ClmTask.mesh_axes == {"context", "stage"}
    assert OtherLoss.mesh_axes == frozenset()


def test_the_plan_counts_the_reference_and_no_optimizer_for_what_is_not_trained(
    make_config,
):
    sizes = dict.fromkeys(("data", "fsdp", "expert", "tensor", "context", "stage"), 1)
    config = make_config("a")
    both = plan_run(config, sizes=sizes).memory
    assert both.frozen == both.parameters
    part = config.train.model_copy(update={"trainable": ("layers.attention.*",)})
    part = plan_run(config.model_copy(update={"train": part}), sizes=sizes).memory
    assert part.optimizer < both.optimizer / 3
    assert part.gradients < both.gradients / 3
