"""Losses of policies and their gradients, on made log-probabilities, are those of TRL's
own trainers; advantages those of its formulas, and distillation's divergences those of
its trainer."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl.trainer.distillation_trainer import _chunked_divergence_loss  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from maxlm.models.aux import Aux  # noqa: E402
from maxlm.parallel.cross_entropy import LogitsInputs  # noqa: E402
from maxlm.parallel.divergence import fused_divergence_loss  # noqa: E402
from maxlm.parallel.entropy import compute_log_probs_and_entropies  # noqa: E402
from maxlm.rl.corrections import compute_correction  # noqa: E402
from maxlm.rl.sequences import PackedSequences  # noqa: E402
from maxlm.rl.tasks.grpo import GrpoTask  # noqa: E402
from maxlm.rl.tasks.policy import TokenStatistics  # noqa: E402
from maxlm.rl.tasks.rloo import RlooTask  # noqa: E402
from maxlm.sharding import bind_mesh  # noqa: E402
from maxlm.tasks.task import TaskModels  # noqa: E402
from tests.parity import compare as compare_models  # noqa: E402

SEQUENCES, LENGTH, MAX_LENGTH = 7, 13, 17
CAP, FLOOR = 1.6, 0.6
LOSSES = [
    *[(loss, level) for loss in ("grpo", "sapo") for level in ("token", "sequence")],
    *[(loss, "token") for loss in ("bnpo", "dr_grpo", "dapo", "cispo", "vespo")],
    ("luspo", "sequence"),
]
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CELLS = [
    (loss, level, kl_coef, correction)
    for number, (loss, level) in enumerate(LOSSES)
    for kl_coef in (0.0, 0.04)
    # Each of the four corrections with some of the losses.
    for correction in ("none", CORRECTIONS[number % 4])
]


def draw() -> dict[str, np.ndarray]:
    """Sequences of 1 to 13 tokens, a tool's among them, far from the old policy."""
    random = np.random.default_rng(7)
    shape = (SEQUENCES, LENGTH)
    lengths = np.array([13, 1, 5, 9, 2, 12, 7])
    weights = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    weights[0, 4:6] = 0
    log_probs = -random.gamma(2.0, 0.7, shape)
    arrays = {
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.25 * random.standard_normal(shape),
        "reference_log_probs": log_probs + 0.5 * random.standard_normal(shape),
        "entropies": random.gamma(2.0, 0.5, shape),
    }
    drift = 0.3 * random.standard_normal(shape)
    arrays["sampled_log_probs"] = arrays["old_log_probs"] + drift
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return arrays | {
        "weights": weights,
        "sample_advantages": random.normal(size=SEQUENCES).astype(np.float32),
    }


DRAWN = draw()


def make_batch() -> dict[str, jax.Array]:
    """The drawn sequences, one a row."""
    arrays = dict(DRAWN)
    arrays["segment_ids"] = np.ones((SEQUENCES, LENGTH), np.int32)
    advantages = arrays.pop("sample_advantages")[:, None]
    arrays["advantages"] = advantages * arrays["weights"]
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def compute_ours(task: Any) -> tuple[float, np.ndarray, dict[str, float]]:
    """Returns a task's loss, its gradient in the log-probabilities, and metrics."""
    batch = make_batch()
    entropies = batch.pop("entropies")
    log_probs = batch.pop("log_probs")

    def compute_loss(log_probs: jax.Array):
        statistics = TokenStatistics(
            log_probs, entropies, jnp.zeros((SEQUENCES, LENGTH, 1)), Aux()
        )
        total, sums = task.compute_loss(statistics, TaskModels(None), batch)
        return total / sums["tokens"], sums

    (loss, sums), gradient = jax.value_and_grad(compute_loss, has_aux=True)(log_probs)
    metrics = {
        name: float(value.total / value.count)
        for name, value in sums.items()
        if name != "tokens"
    }
    return float(loss), np.asarray(gradient), metrics


def make_trainer(log_probs: Any, task: Any) -> Any:
    """Returns what TRL's losses read of a trainer of the drawn log-probabilities."""
    entropies = torch.tensor(DRAWN["entropies"])
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
    )
    args = SimpleNamespace(
        use_bias_correction_kl=getattr(task, "kl_bias_correction", None),
        delta=getattr(task, "clip_delta", None),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    is_cispo = getattr(task, "loss_type", None) == "cispo"
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *x, **y: (log_probs, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=args,
        beta=task.kl_coef,
        loss_type=getattr(task, "loss_type", None),
        importance_sampling_level=getattr(task, "ratio_level", None),
        epsilon_low=task.clip_low,
        epsilon_high=task.cispo_max_ratio if is_cispo else task.clip_high,
        use_vllm=task.correction != "none",
        vllm_importance_sampling_correction=True,
        off_policy_mask_threshold=getattr(task, "off_policy_threshold", None),
        top_entropy_quantile=1.0,
        _entropy_bonus_enabled=task.entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=task.entropy_coef,
        aux_loss_enabled=False,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )


def correct_as_trl(correction: str) -> Any:
    """Importance weights as TRL 1.16 makes them while it generates: [B, T] of tokens,
    [B, 1] of sequences."""
    mask = torch.tensor(DRAWN["weights"])
    difference = torch.tensor(DRAWN["old_log_probs"] - DRAWN["sampled_log_probs"])
    difference = difference * mask
    if correction.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = torch.exp(difference)
    if correction.endswith("truncate"):
        return torch.clamp(ratio, min=FLOOR, max=CAP)
    return ratio.masked_fill((ratio < FLOOR) | (ratio > CAP), 0.0)


def compute_theirs(trainer: Any, log_probs: Any, task: Any) -> tuple[float, np.ndarray]:
    """Returns the loss of TRL's trainer, and its gradient in the log-probabilities."""
    mask = torch.tensor(DRAWN["weights"])
    ids = torch.zeros((SEQUENCES, LENGTH), dtype=torch.long)
    old = torch.tensor(DRAWN["old_log_probs"])
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(DRAWN["sample_advantages"]),
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": torch.tensor(DRAWN["reference_log_probs"]),
        "sampling_per_token_logps": torch.tensor(DRAWN["sampled_log_probs"]),
        "num_items_in_batch": mask.sum(),
    }
    if task.correction != "none":
        inputs["importance_sampling_ratio"] = correct_as_trl(task.correction)
    cls = RLOOTrainer if task.kind == "rloo" else GRPOTrainer
    loss = cls._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), log_probs.grad.numpy()


def make_task(cls: Any, correction: str, settings: dict[str, Any]) -> Any:
    limits = {"correction_cap": CAP, "correction_floor": FLOOR}
    rollouts = {"sampling": {"max_new_tokens": MAX_LENGTH}}
    values = {"correction": correction, "rollouts": rollouts, **limits, **settings}
    return cls.model_validate(values)


def compare(task: Any) -> tuple[dict[str, float], Any]:
    """Compares loss and gradient; returns our metrics, and TRL's trainer."""
    log_probs = torch.tensor(DRAWN["log_probs"], requires_grad=True)
    trainer = make_trainer(log_probs, task)
    their_loss, their_gradient = compute_theirs(trainer, log_probs, task)
    loss, gradient, metrics = compute_ours(task)
    size = np.abs(their_gradient).max()
    assert size > 1e-3
    assert abs(loss - their_loss) <= 1e-6 * max(1.0, abs(their_loss))
    assert np.abs(gradient - their_gradient).max() <= 1e-5 * size
    return metrics, trainer


@pytest.mark.parametrize(("loss_type", "level", "kl_coef", "correction"), CELLS)
def test_losses_of_groups(loss_type, level, kl_coef, correction):
    task = make_task(
        GrpoTask,
        correction,
        {
            "loss_type": loss_type,
            "ratio_level": level,
            "kl_coef": kl_coef,
            "clip_high": 0.28,
            "cispo_max_ratio": 1.2,
        },
    )
    metrics, trainer = compare(task)
    theirs = trainer._metrics["train"]
    near = {"rel": 1e-5}
    assert metrics["entropy"] == pytest.approx(theirs["entropy"][0], **near)
    if kl_coef:
        assert metrics["kl"] == pytest.approx(theirs["kl"][0], **near)
    clipped = theirs.get("cispo_clip_ratio") or theirs.get("clip_ratio/region_mean")
    if clipped and level == "token":
        assert 0 < clipped[0] < 1
        assert metrics["clip_share"] == pytest.approx(clipped[0], **near)


OTHER_SETTINGS = {
    "two-sided": {"clip_delta": 1.3, "loss_type": "grpo"},
    "uncorrected divergence": {"kl_bias_correction": False, "kl_coef": 0.3},
    "divergence of samples": {
        "kl_coef": 0.3,
        "ratio_level": "sequence",
        "loss_type": "grpo",
    },
    "off-policy samples": {"off_policy_threshold": 0.02},
    "entropy": {"entropy_coef": 0.3},
    "sequence level luspo": {
        "loss_type": "luspo",
        "ratio_level": "sequence",
        "kl_coef": 0.1,
    },
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings(name):
    compare(make_task(GrpoTask, "token_truncate", OTHER_SETTINGS[name]))


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction(correction, loss_type):
    """And that it changes anything."""
    compare(make_task(GrpoTask, correction, {"loss_type": loss_type}))
    batch = make_batch()
    weights = compute_correction(
        batch["old_log_probs"],
        batch["sampled_log_probs"],
        PackedSequences.of_rows(batch["segment_ids"], batch["weights"], 1),
        correction,
        cap=CAP,
        floor=FLOOR,
    )
    is_masked = np.asarray(weights.masked) & (DRAWN["weights"] > 0)
    assert 0 < is_masked.sum() < DRAWN["weights"].sum()


def test_leave_one_out_losses():
    metrics, trainer = compare(make_task(RlooTask, "none", {}))
    theirs = trainer._metrics["train"]
    assert metrics["entropy"] == pytest.approx(theirs["entropy"][0], rel=1e-5)
    clip_share = theirs["clip_ratio/region_mean"][0]
    assert 0 < clip_share < 1
    assert metrics["clip_share"] == pytest.approx(clip_share)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergences_from_a_wider_teacher(beta):
    """What on-policy distillation learns from, with gradients in hidden states and
    head; also where no token counts in a chunk."""
    random = np.random.default_rng(5)
    shapes = {"hidden": (3, 9, 8), "teacher": (3, 9, 12)}
    heads = {"hidden": (8, 31), "teacher": (12, 31)}
    hidden = {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    head = {n: random.normal(size=s).astype(np.float32) for n, s in heads.items()}
    weights = (random.random((3, 9)) < 0.6).astype(np.float32)
    weights[1] = 0

    student = [
        torch.tensor(hidden["hidden"], requires_grad=True),
        torch.tensor(head["hidden"].T.copy(), requires_grad=True),
    ]
    their_loss, their_entropy, _ = _chunked_divergence_loss(
        student[0],
        torch.tensor(hidden["teacher"]),
        student[1],
        torch.tensor(head["teacher"].T.copy()),
        torch.tensor(weights),
        beta,
    )
    their_loss.backward()

    def compute_loss(hidden_states, kernel):
        layout = ((), ())
        model = LogitsInputs(hidden_states, kernel, layout)
        teacher = LogitsInputs(
            jnp.asarray(hidden["teacher"]), jnp.asarray(head["teacher"]), layout
        )
        targets = jnp.zeros(weights.shape, jnp.int32)
        loss, _, _ = fused_divergence_loss(
            model, teacher, targets, jnp.asarray(weights), beta=beta, chunk_tokens=7
        )
        _, entropies = compute_log_probs_and_entropies(model, targets, chunk_tokens=7)
        return loss / weights.sum(), (entropies * weights).sum()

    step = jax.jit(jax.value_and_grad(compute_loss, (0, 1), has_aux=True))
    (loss, entropy), gradients = bind_mesh(compare_models.one_device(), step)(
        hidden["hidden"], head["hidden"]
    )
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-6)
    assert float(entropy) == pytest.approx(their_entropy.item(), rel=1e-5)
    their_gradients = (student[0].grad.numpy(), student[1].grad.numpy().T)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        size = np.abs(theirs).max()
        assert np.abs(ours - theirs).max() <= 1e-5 * size


def test_a_policy_at_a_temperature_is_trl_s():
    """Log-probabilities and entropies of softmax(logits / T), and the gradient of both
    in the head, by the function of TRL's trainer that all its passes call."""
    temperature = 0.7
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    random = np.random.default_rng(3)
    tokens = torch.tensor(random.integers(0, 37, (3, 11)))
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, :-1].numpy()
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    their_log_probs, their_entropies, _ = (
        GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__(
            trainer, model, tokens, torch.ones_like(tokens), 10, compute_entropy=True
        )
    )
    cotangents = random.standard_normal((2, 3, 10)).astype(np.float32)
    (their_log_probs * torch.tensor(cotangents[0])).sum().backward()

    def compute(kernel):
        log_probs, entropies = compute_log_probs_and_entropies(
            LogitsInputs(jnp.asarray(hidden), kernel, ((), ())),
            jnp.asarray(tokens[:, 1:].numpy(), jnp.int32),
            temperature=temperature,
            chunk_tokens=7,
        )
        return (log_probs * cotangents[0]).sum(), (log_probs, entropies)

    step = jax.jit(jax.value_and_grad(compute, has_aux=True))
    kernel = jnp.asarray(model.lm_head.weight.detach().numpy().T.copy())
    (_, both), gradient = bind_mesh(compare_models.one_device(), step)(kernel)
    for ours, theirs in zip(both, (their_log_probs, their_entropies), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
    their_gradient = model.lm_head.weight.grad.numpy().T
    size = np.abs(their_gradient).max()
    assert np.abs(gradient - their_gradient).max() <= 1e-5 * size
