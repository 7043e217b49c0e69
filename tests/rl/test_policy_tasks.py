"""Policy tasks turn scores into advantages of packed samples, as one sample after the
other in float64 has them; what they cannot learn from is refused in one line."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.aux import Aux
from maxlm.rl.rollouts.packing import pack_samples
from maxlm.rl.samples import Prompt, Sample
from maxlm.rl.tasks.grpo import GrpoTask
from maxlm.rl.tasks.on_policy_distillation import OnPolicyDistillationTask
from maxlm.rl.tasks.policy import TokenStatistics
from maxlm.rl.tasks.ppo import PpoTask
from maxlm.rl.tasks.rloo import RlooTask
from maxlm.tasks.task import Average, TaskModels
from tests.rl.test_advantages import estimate_by_definition

PROMPTS, SAMPLES, SEQ = 3, 3, 26
REWARDS = [{"kind": "exact_match"}]
BASE: dict[str, Any] = {"rewards": REWARDS, "sequences_per_row": 2}
SCORES = np.array([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2], [np.nan, 1.0, 0.0]])[..., None]
IS_COMPLETE = np.array([[True, False, True], [True] * 3, [True, True, False]])


def draw_samples() -> list[Sample]:
    """Samples of ragged lengths, with a tool's tokens in some."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(PROMPTS * SAMPLES):
        prompt = int(random.integers(1, 4))
        length = int(random.integers(1, 9))
        is_sampled = [False] * prompt + [True] * length
        if length > 3:
            is_sampled[prompt + 1] = False
        log_probs = np.where(is_sampled, -random.gamma(2.0, 0.5, len(is_sampled)), 0)
        tokens = random.integers(0, 50, len(is_sampled)).tolist()
        sample = Sample(
            Prompt(number // SAMPLES, tuple(tokens[:prompt]), {}),
            number % SAMPLES,
            tokens,
            is_sampled,
            log_probs.tolist(),
            [0 if drawn else -1 for drawn in is_sampled],
            is_complete=bool(IS_COMPLETE.ravel()[number]),
        )
        samples.append(sample)
    return samples


def make_rollout(task: Any, **added: np.ndarray) -> tuple[dict[str, Any], list[Any]]:
    """A finished rollout, and where each sample's drawn tokens are: (row, entries)."""
    samples = draw_samples()
    batch = pack_samples(samples, task.make_layout(SEQ))
    batch |= added
    places = []
    for number in range(len(samples)):
        row, place = divmod(number, task.sequences_per_row)
        is_own = batch["segment_ids"][row] == place + 1
        entries = np.flatnonzero(is_own & (batch["weights"][row] > 0))
        places.append((row, entries))
    before = {name: array.copy() for name, array in batch.items()}
    rollout = task.finish_rollouts(SCORES, [1.0], IS_COMPLETE, batch)
    for name, array in before.items():
        np.testing.assert_array_equal(batch[name], array)
    assert rollout.keys() == task.batch_arrays(SEQ).keys()
    for name, spec in task.batch_arrays(SEQ).items():
        assert rollout[name].shape[1:] == spec.shape
        assert rollout[name].dtype == spec.dtype
    return rollout, places


def read_samples(array: np.ndarray, places: list[Any]) -> list[float]:
    """The value that all drawn tokens of each sample have."""
    values = []
    for row, entries in places:
        (value,) = set(array[row][entries].tolist())
        values.append(value)
    return values


def draw_rows(seed: int, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (scale * random.standard_normal((5, SEQ))).astype(np.float32)


def test_groups_are_compared_and_truncated_samples_masked():
    task = GrpoTask.model_validate(
        BASE | {"num_samples": 3, "mask_truncated": True, "deviation_epsilon": 1e-6}
    )
    rollout, places = make_rollout(task)
    group = SCORES[0, :, 0]
    first = (group - group.mean()) / (group.std(ddof=1) + 1e-6)
    pair = np.array([0.5, -0.5]) / (np.sqrt(0.5) + 1e-6)
    want = [*first, 0, 0, 0, 0, *pair]
    advantages = read_samples(rollout["advantages"], places)
    np.testing.assert_allclose(advantages, want, atol=1e-6)
    weights = read_samples(rollout["weights"], places)
    np.testing.assert_array_equal(weights, IS_COMPLETE.ravel().astype(float))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_groups_without_variance_are_as_though_never_drawn(loss_type):
    """The loss of a rollout whose second group is dropped is that of one that has it
    not, whatever its tokens are; kept, they are part of the mean."""
    settings = BASE | {"num_samples": 3, "loss_type": loss_type, "entropy_coef": 0.1}
    losses = {}
    for name, zero_variance in (("kept", "keep"), ("dropped", "drop")):
        rollouts = {"zero_variance": zero_variance}
        task = GrpoTask.model_validate(settings | {"rollouts": rollouts})
        rollout, places = make_rollout(task)
        losses[name] = compute_mean_loss(task, rollout)
        weights = [array_sum(rollout["weights"], place) for place in places]
        is_dropped = np.repeat([False, zero_variance == "drop", False], SAMPLES)
        assert [weight == 0 for weight in weights] == is_dropped.tolist()
    # Padding from the beginning: the same rows without the samples of the group.
    without = {name: array.copy() for name, array in rollout.items()}
    task = GrpoTask.model_validate(settings)
    rollout, places = make_rollout(task)
    for number in range(SAMPLES, 2 * SAMPLES):
        row, place = divmod(number, task.sequences_per_row)
        is_own = rollout["segment_ids"][row] == place + 1
        for name in ("segment_ids", "weights", "advantages"):
            rollout[name][row][is_own] = 0
    for name, array in rollout.items():
        np.testing.assert_array_equal(without[name], array, name)
    assert losses["dropped"] == pytest.approx(compute_mean_loss(task, rollout))
    assert abs(losses["dropped"] - losses["kept"]) > 1e-3


def test_a_rollout_of_which_all_is_dropped_teaches_nothing(monkeypatch):
    """Lengths that cost something tell samples apart, and rewards without a weight do
    not."""
    monkeypatch.setattr(f"{__name__}.SCORES", np.ones((PROMPTS, SAMPLES, 1)))
    settings = BASE | {"num_samples": 3}
    rollouts = {"zero_variance": "drop"}
    task = GrpoTask.model_validate(settings | {"rollouts": rollouts})
    rollout, _ = make_rollout(task)
    assert not rollout["weights"].any()
    assert compute_mean_loss(task, rollout) == 0
    penalised = GrpoTask.model_validate(
        settings | {"rollouts": rollouts, "missing_end_penalty": 0.5}
    )
    rollout, places = make_rollout(penalised)
    counted = [bool(array_sum(rollout["weights"], place)) for place in places]
    assert counted == np.repeat([True, False, True], SAMPLES).tolist()


def array_sum(array: np.ndarray, place: Any) -> float:
    row, entries = place
    return float(array[row][entries].sum()) if len(entries) else 0.0


def compute_mean_loss(task: Any, rollout: dict[str, Any]) -> float:
    """Of made log-probabilities, as a step divides it."""
    statistics = TokenStatistics(
        jnp.asarray(-np.abs(draw_rows(3))),
        jnp.asarray(np.abs(draw_rows(4))),
        jnp.zeros((5, SEQ, 1)),
        Aux(),
    )
    batch = {name: jnp.asarray(array) for name, array in rollout.items()}
    total, sums = task.compute_loss(statistics, TaskModels(None), batch)
    return float(total / jnp.maximum(sums["tokens"], 1))


def test_long_and_endless_samples_lose_of_their_score():
    sampling = {"sampling": {"max_new_tokens": 8}}
    task = GrpoTask.model_validate(
        BASE
        | {"num_samples": 3, "rollouts": sampling, "scale_scores": "none"}
        | {"overlong_buffer": 4, "overlong_penalty": 2.0, "missing_end_penalty": 0.25}
    )
    rollout, places = make_rollout(task)
    lengths = np.array([len(entries) for _, entries in places])
    penalties = 2.0 * np.clip((lengths - 4) / 4, 0, 1) + 0.25 * ~IS_COMPLETE.ravel()
    assert 0 < (lengths > 4).sum() < len(lengths)
    totals = SCORES[..., 0] - penalties.reshape(PROMPTS, SAMPLES)
    want = totals - np.nanmean(totals, axis=1, keepdims=True)
    want = np.nan_to_num(want).ravel()  # a sample without a score teaches nothing
    advantages = read_samples(rollout["advantages"], places)
    np.testing.assert_allclose(advantages, want, atol=1e-6)


@pytest.mark.parametrize("is_normalized", [False, True])
def test_the_divergence_is_part_of_leave_one_out_scores(is_normalized):
    task = RlooTask.model_validate(
        BASE | {"num_samples": 3, "kl_coef": 0.3, "normalize_advantages": is_normalized}
    )
    old, reference = draw_rows(1), draw_rows(2)
    rollout, places = make_rollout(
        task, old_log_probs=old, reference_log_probs=reference
    )
    differences = old.astype(np.float64) - reference
    kl = [differences[row][entries].sum() for row, entries in places]
    totals = SCORES[..., 0] - 0.3 * np.reshape(kl, (PROMPTS, SAMPLES))
    want = np.full(totals.shape, np.nan)
    for prompt in range(PROMPTS):
        for sample in range(SAMPLES):
            others = np.delete(totals[prompt], sample)
            want[prompt, sample] = totals[prompt, sample] - np.nanmean(others)
    if is_normalized:
        want = (want - np.nanmean(want)) / (np.nanstd(want, ddof=1) + 1e-4)
    advantages = read_samples(rollout["advantages"], places)
    np.testing.assert_allclose(advantages, np.nan_to_num(want).ravel(), rtol=1e-5)


def test_values_and_scores_make_advantages_of_tokens():
    task = PpoTask.model_validate(
        BASE
        | {"num_samples": 3, "whiten_rewards": True, "missing_end_penalty": 0.5}
        | {"discount": 0.9, "decay": 0.8, "epochs": 2}
    )
    values, kl_rewards = draw_rows(3), draw_rows(4, 0.1)
    rollout, places = make_rollout(
        task,
        values=values,
        kl_rewards=kl_rewards,
        old_log_probs=draw_rows(5),
        reference_log_probs=draw_rows(6),
    )
    is_step = np.zeros(values.shape, bool)
    rewards = np.zeros(values.shape)
    totals = np.nan_to_num(SCORES[..., 0] - 0.5 * ~IS_COMPLETE).ravel()
    for (row, entries), total in zip(places, totals, strict=True):
        is_step[row, entries] = True
        rewards[row, entries] = kl_rewards[row, entries]
        rewards[row, entries[-1]] += total
    steps = rewards[is_step]
    scale = np.sqrt(steps.var(ddof=1) + 1e-8)
    rewards[is_step] = (steps - steps.mean()) / scale + steps.mean()
    raw = estimate_by_definition(
        rewards, values, is_step, rollout["segment_ids"], 0.9, 0.8
    )
    np.testing.assert_allclose(
        rollout["returns"], np.where(is_step, raw + values, 0), atol=1e-5
    )
    # The sample without a score is left out.
    row, entries = places[np.flatnonzero(np.isnan(SCORES).ravel())[0]]
    is_step[row, entries] = False
    counted = raw[is_step]
    want = (counted - counted.mean()) / np.sqrt(counted.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(rollout["advantages"][is_step], want, atol=1e-5)
    np.testing.assert_array_equal(rollout["weights"] > 0, is_step)


def test_a_teacher_judges_tokens():
    task = OnPolicyDistillationTask.model_validate(
        {"teacher": "teacher", "signal": "policy_gradient", "sequences_per_row": 2}
    )
    old, teacher = draw_rows(1), draw_rows(2)
    rollout, places = make_rollout(task, old_log_probs=old, teacher_log_probs=teacher)
    for row, entries in places:
        np.testing.assert_allclose(
            rollout["advantages"][row][entries],
            (teacher - old)[row][entries],
            rtol=1e-6,
        )


def test_metrics_tell_the_engine_from_the_trainer():
    task = GrpoTask.model_validate(BASE | {"num_samples": 3})
    rollout, places = make_rollout(task)
    rollout |= {"old_log_probs": draw_rows(1) - 1}
    statistics = TokenStatistics(
        jnp.asarray(draw_rows(2) - 1), jnp.asarray(draw_rows(3)), jnp.zeros(()), Aux()
    )
    _, sums = task.compute_loss(statistics, TaskModels(None), rollout)

    def join(array: Any) -> np.ndarray:
        array = np.asarray(array, np.float64)
        return np.concatenate([array[row][entries] for row, entries in places])

    difference = join(rollout["old_log_probs"]) - join(rollout["sampled_log_probs"])
    log_ratio = join(statistics.log_probs) - join(rollout["old_log_probs"])
    want = {
        "entropy": join(statistics.entropies).mean(),
        "engine_difference": np.abs(difference).mean(),
        "engine_k3": (np.exp(difference) - difference - 1).mean(),
        "engine_ratio": np.exp(difference).mean(),
        "policy_ratio": np.exp(log_ratio).mean(),
        "trained_length": len(difference) / len(places),
    }
    for name, value in want.items():
        average = sums[name]
        assert isinstance(average, Average)
        assert float(average.total / average.count) == pytest.approx(value, rel=1e-4)


def test_the_weight_of_a_divergence_is_the_task_s_own():
    task = PpoTask.model_validate(
        BASE | {"kl_target": 6.0, "kl_coef": 0.2, "epochs": 2, "kl_horizon": 1000}
    )
    state = task.init_state()
    metrics = {"batch_tokens": 640.0, "trained_length": 10.0, "sequence_kl": 6.6}
    arrays = {name: jnp.float32(value) for name, value in metrics.items()}
    moved = jax.jit(task.update_state)(state, arrays)
    # 64 samples, half of them anew: each is seen twice.
    assert float(moved["kl_coef"]) == pytest.approx(0.2 * (1 + 0.1 * 32 / 1000))
    fixed = PpoTask.model_validate(BASE)
    assert fixed.init_state() == {}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one sample": (GrpoTask, {"num_samples": 1}, "task.num_samples"),
    "one sample of rloo": (RlooTask, {"num_samples": 1}, "task.num_samples"),
    "luspo of tokens": (GrpoTask, {"loss_type": "luspo"}, "task.ratio_level"),
    "tokens of one action": (
        RlooTask,
        {"correction": "token_mask"},
        "task.correction",
    ),
    "two scales": (
        GrpoTask,
        {"merge_scores": "normalize_then_sum", "scale_scores": "none"},
        "task.scale_scores",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(name):
    task, settings, where = REFUSED[name]
    with pytest.raises(MaxlmError) as caught:
        task.model_validate(BASE | settings)
    assert caught.value.where == where
    assert "\n" not in str(caught.value)


def test_a_policy_needs_a_reward_and_a_reference_of_its_vocabulary():
    with pytest.raises(MaxlmError, match="nothing scores"):
        GrpoTask().check(64, 100)
    task = GrpoTask.model_validate(BASE | {"kl_coef": 0.1})
    config = type("Config", (), {"vocab_size": 100})
    other: Any = type("Config", (), {"vocab_size": 101})
    model: Any = config
    task.check_frozen_models(model, {"reference": model})
    with pytest.raises(MaxlmError, match="101 ids"):
        task.check_frozen_models(model, {"reference": other})
