"""The base of tasks of policies: what a step reads of a rollout, and what is logged."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.batch_source import Batch, BatchArraySpec, BatchSource
from maxlm.inference.engine_config import EngineConfig
from maxlm.models.architectures import ModelConfig
from maxlm.models.aux import Aux
from maxlm.parallel.entropy import compute_log_probs_and_entropies
from maxlm.rl.advantages import find_groups_without_variance
from maxlm.rl.corrections import Correction, CorrectionWeights, compute_correction
from maxlm.rl.environments import EnvironmentConfig, SingleTurnEnvironment
from maxlm.rl.environments.addition import AdditionEnvironment
from maxlm.rl.losses import compute_overlong_penalty
from maxlm.rl.rewards import RewardConfig
from maxlm.rl.rewards.forms import FormatReward
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.packing import RowLayout
from maxlm.rl.rollouts.validation import ValidationConfig
from maxlm.rl.routes import ROUTES, declare_routes, get_routes
from maxlm.rl.sequences import PackedSequences
from maxlm.sharding import MeshConfig
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.extra_work import ExtraPass, GenerationWork, ScoringModel
from maxlm.tasks.preference import scale_layers_loss
from maxlm.tasks.task import (
    Average,
    BoundModel,
    DeviceBatch,
    LossResult,
    SourceInputs,
    Task,
    TaskModels,
    WatchedMetric,
    map_micro_batches,
)

SAMPLED = "sampled_log_probs"
OLD = "old_log_probs"
REFERENCE = "reference_log_probs"
ADVANTAGES = "advantages"


class TokenStatistics(NamedTuple):
    """What a model says of the targets of rows [..., S], fp32 in nats."""

    log_probs: jax.Array
    entropies: jax.Array
    hidden: jax.Array
    """Final hidden states [..., S, D], compute dtype."""
    aux: Aux


class PolicyTask(Task):
    """A task whose batches are rollouts: a policy's answers to prompts, with
    advantages. See :mod:`maxlm.rl.rollouts.packing` for the rows.

    Metrics: ``entropy`` of the policy and ``kl`` to its reference are nats a token;
    ``clip_share`` is the share of tokens whose gradient a limit takes away, and
    ``policy_ratio`` the mean ratio to the policy that a rollout's updates began with.
    ``engine_difference`` is the mean absolute difference between the trainer's
    log-probabilities of the sampled tokens and those they were drawn with,
    ``engine_k3`` an estimate of KL(drawn ‖ trainer) in nats a token, ``engine_ratio``
    the mean ratio of their probabilities, and ``corrected_share`` the share of tokens
    whose ratio was out of bounds. ``trained_length`` is the mean number of tokens that
    count of a sample.
    """

    reads_text: ClassVar[bool] = False
    # Rollouts are prepared once; a step's loss reads no frozen model.
    prepares_batch_alone: ClassVar[bool] = True
    command: ClassVar[Literal["train", "tune", "rl"]] = "rl"
    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})
    watched_metric: ClassVar[WatchedMetric | None] = None
    # In the order of their use: two lines of a terminal of 100 columns end after them.
    shown_metrics: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "reward": "reward {:.3f}",
            "response_length": "length {:.0f}",
            "kl": "KL {:.3f}",
            "teacher_kl": "KL {:.3f}",
            "divergence": "divergence {:.3f}",
            "entropy": "entropy {:.2f}",
            "clip_share": "clip {:.1%}",
            "engine_difference": "engine ±{:.0e}",
            "generated_tokens_per_second": "draws {:,.0f}/s",
            "tokens_per_second": "trains {:,.0f} tokens/s",
        }
    )
    plotted_metrics: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "reward": "reward",
            "response_length": "tokens of an answer",
            "entropy": "entropy (nats per token)",
            "kl": "KL to the reference (nats per token)",
            "teacher_kl": "KL to the teacher (nats per token)",
            "divergence": "divergence from the teacher (nats per token)",
            "clip_share": "share of tokens clipped",
        }
    )
    plot_name: ClassVar[str] = "rollouts"
    compares_samples: ClassVar[bool] = False
    """Whether advantages compare the samples of a prompt."""
    needs_rewards: ClassVar[bool] = True

    environment: EnvironmentConfig = SingleTurnEnvironment()
    """Where prompts come from, and what answers the policy's turns."""
    rewards: tuple[RewardConfig, ...] = ()
    """What scores samples; the sum of all, by their weights."""
    rollouts: RolloutConfig = RolloutConfig()
    """How the policy answers prompts."""
    validation: ValidationConfig | None = None
    """Prompts that are answered every ``train.eval_every`` steps, and at the end, and
    not learnt from; null: none."""
    engine: EngineConfig = EngineConfig()
    """The engine that generates."""
    generation_mesh: MeshConfig | None = None
    """The mesh that it generates on; null: that of training."""
    num_samples: int = Field(default=8, ge=1)
    """Samples of each prompt, a group."""
    sequences_per_row: int = Field(default=1, ge=1)
    """Samples that share a row of a batch, each with attention to itself alone."""
    epochs: int = Field(default=1, ge=1)
    """Times that a rollout is trained on."""
    minibatches: int = Field(default=1, ge=1)
    """Steps of an epoch, each on its share of the rollout."""
    correction: Correction = "sequence_mask"
    """What is done about samples that others drew than the trainer's parameters: the
    loss is weighed by the ratio of probabilities, of each token or of the whole
    sequence; ``truncate`` holds it within the limits, ``mask`` makes it 0 outside."""
    correction_cap: float | None = Field(default=3.0, gt=0)
    """Upper limit of that ratio; null: none."""
    correction_floor: float | None = Field(default=None, ge=0)
    """Lower limit of it; null: none."""
    mask_truncated: bool = False
    """Whether samples that ran out of room teach nothing (overlong filtering, DAPO,
    arXiv 2503.14476, §3.4): the loss leaves their tokens out, and counts them as
    sequences."""
    overlong_buffer: int | None = Field(default=None, gt=0)
    """The last so many tokens of ``rollouts.sampling.max_new_tokens`` cost more and
    more of the score, up to ``overlong_penalty`` (DAPO, equation 13); null: none."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """What a sample of full length loses of its score, with ``overlong_buffer``."""
    missing_end_penalty: float = Field(default=0.0, ge=0)
    """What a sample that ran out of room loses of its score."""
    replay_routes: bool = False
    """Whether the policy's passes over a rollout use the experts that its tokens met in
    the engine (:mod:`maxlm.rl.routes`); false: its routers choose anew, which differs
    wherever the engine rounds otherwise. The record of a rollout has them then."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy, which the loss raises; averaged as the loss
    is."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.compares_samples and self.num_samples == 1:
            message = f"task.kind={self.kind} compares the samples of a prompt, and "
            message += "one has no other"
            fix = "set it to 2 or more: 8 to 64"
            raise MaxlmError(message, where="task.num_samples", fix=fix)
        if not self.compares_samples and self.rollouts.zero_variance != "keep":
            message = f"task.kind={self.kind} compares no samples of a prompt, and "
            message += "learns of equal ones too"
            fix = "set it to keep"
            raise MaxlmError(message, where="task.rollouts.zero_variance", fix=fix)
        return self

    def check(self, seq_len: int, vocab_size: int) -> None:
        super().check(seq_len, vocab_size)
        if self.needs_rewards and not self.rewards:
            message = f"task.kind={self.kind} learns of scores, and nothing scores"
            fix = "name a reward: [{kind: exact_match}]"
            raise MaxlmError(message, where="task.rewards", fix=fix)
        if self.validation is not None and not self.rewards:
            message = "answers to validation prompts are scored, and nothing scores"
            fix = "name a reward: [{kind: exact_match}], or set task.validation to null"
            raise MaxlmError(message, where="task.rewards", fix=fix)
        if not self.rollouts.sampling.temperature:
            message = "rollouts at temperature 0 are all alike, and the likeliest "
            message += "token is no distribution to learn"
            fix = "set it above 0: 1; task.validation.temperature may be 0"
            where = "task.rollouts.sampling.temperature"
            raise MaxlmError(message, where=where, fix=fix)

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        self.list_model_arrays(model, seq_len=1)

    @property
    def files_setting(self) -> str | None:
        return "environment.files" if self.environment.needs_files else None

    def for_small_model(self) -> Self:
        """Returns the task in small, with sums of two digits in place of its prompts,
        and in place of its rewards whether an answer begins with a letter, digit or
        sign of ASCII, which a model that knows nothing does now and then."""
        small = super().for_small_model()
        rollouts = self.rollouts
        sampling = rollouts.sampling.model_copy(update={"max_new_tokens": 8})
        sizes = {"max_sequences", "max_length", "num_pages", "prefill_tokens"}
        engine_settings = self.engine.model_dump(exclude_unset=True, exclude=sizes)
        settings = {
            "environment": AdditionEnvironment(num_digits=1),
            "rewards": (FormatReward(pattern="[!-~].*"),) if self.rewards else (),
            "rollouts": rollouts.model_copy(
                update={"sampling": sampling, "max_prompt_length": None}
            ),
            "engine": EngineConfig.model_validate(
                {**engine_settings, "max_sequences": 4, "prefill_tokens": 32}
            ),
            "validation": None,
            "generation_mesh": None,
            "num_samples": min(self.num_samples, 2),
            "sequences_per_row": min(self.sequences_per_row, 2),
            "epochs": min(self.epochs, 2),
            "minibatches": min(self.minibatches, 2),
            "overlong_buffer": self.overlong_buffer and 4,
        }
        return small.model_copy(update=settings)

    @property
    def updates_per_rollout(self) -> int:
        """Steps on each rollout."""
        return self.epochs * self.minibatches

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the policy draws for a sample at most."""
        return self.rollouts.sampling.max_new_tokens

    def make_layout(self, seq_len: int) -> RowLayout:
        """Returns how samples lie in rows of ``data.seq_len``."""
        return RowLayout(seq_len, self.sequences_per_row)

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        from maxlm.rl.rollouts.source import PolicyRolloutSource

        return PolicyRolloutSource(self, inputs)

    def generation(self, seq_len: int, batch_size: int) -> GenerationWork | None:
        from maxlm.rl.rollouts.planned_work import describe_generation

        return describe_generation(self, seq_len, batch_size)

    def scoring_models(self) -> Mapping[str, ScoringModel]:
        models = {reward.name: reward.scoring_model for reward in self.rewards}
        return {name: model for name, model in models.items() if model is not None}

    def extra_passes(self) -> tuple[ExtraPass, ...]:
        names = set(self.list_prepared_arrays())
        models: list[str | None] = []
        if names - {REFERENCE}:
            models.append(None)
        if REFERENCE in names:
            models.append("reference")
        return self.make_passes(models)

    def make_passes(self, models: Sequence[str | None]) -> tuple[ExtraPass, ...]:
        """Returns the passes of :meth:`prepare_rollouts` over a rollout, of the policy
        (None) and of frozen models by name."""
        return tuple(
            ExtraPass(
                f"log-probabilities of the {model or 'policy'}",
                model,
                passes_per_step=1 / self.epochs,
                batches_at_once=self.minibatches,
            )
            for model in models
        )

    # Arrays of a rollout: on the host, then on devices, then on the host again.

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        arrays["versions"] = BatchArraySpec.of_tokens(seq_len)
        for name in (SAMPLED, ADVANTAGES, *self.list_prepared_arrays()):
            arrays[name] = BatchArraySpec.of_tokens(seq_len, np.float32)
        return arrays

    def list_model_arrays(
        self, model: ModelConfig, seq_len: int
    ) -> dict[str, BatchArraySpec]:
        arrays = super().list_model_arrays(model, seq_len)
        if self.replay_routes:
            arrays[ROUTES] = declare_routes(model, seq_len)
        return arrays

    def list_prepared_arrays(self) -> list[str]:
        """Returns the names of the arrays of a batch, fp32 [S], that come of what models
        say of a rollout."""
        return [OLD] if self.updates_per_rollout > 1 else []

    @property
    def reads_models_of_rollouts(self) -> bool:
        """Whether :meth:`prepare_rollouts` has anything to compute."""
        return bool(self.list_prepared_arrays())

    def prepare_rollouts(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> DeviceBatch:
        """Computes what arrays of :meth:`list_prepared_arrays` and
        :meth:`compute_advantages` need of models, from a rollout [M, B, S] and the
        parameters that it was drawn with."""

        def prepare(model: BoundModel, batch: DeviceBatch) -> DeviceBatch:
            return self.prepare_rows(model, models, batch)

        return map_micro_batches(prepare, models.trained, batch)

    def prepare_rows(
        self, policy: BoundModel, models: TaskModels, batch: DeviceBatch
    ) -> DeviceBatch:
        """Computes arrays of :meth:`prepare_rollouts` of rows [..., S]."""
        names = self.list_prepared_arrays()
        if OLD not in names:
            return {}
        return {OLD: self.compute_policy_statistics(policy, batch).log_probs}

    def finish_rollouts(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        is_complete: NDArray[np.bool_],
        batch: Batch,
    ) -> Batch:
        """Returns a rollout's arrays [rows, S] to train on, on the host.

        Args:
            scores: of each reward, [prompts, samples, rewards]; NaN: it gave none.
            weights: of the rewards.
            is_complete: whether the policy ended a sample itself, [prompts, samples].
            batch: the packed samples, with what :meth:`prepare_rollouts` added.
        """
        lengths = self._sum_samples(batch["weights"], batch)
        lengths = lengths.reshape(is_complete.shape)
        penalties = self.compute_penalties(lengths, is_complete)
        is_dropped = np.zeros(len(scores), np.bool_)
        if self.rollouts.zero_variance == "drop":
            is_dropped = find_groups_without_variance(scores, weights, penalties)
            # Without a score they have no part in means over a batch either.
            scores = np.where(is_dropped[:, None, None], np.nan, scores)
        advantages = self.compute_advantages(scores, weights, penalties, batch)
        batch = batch | advantages
        if self.mask_truncated:
            is_counted = self._spread_samples(is_complete.ravel(), batch)
            batch["weights"] = batch["weights"] * is_counted
        if is_dropped.any():
            is_learnt_from = np.repeat(~is_dropped, scores.shape[1])
            batch = batch | self._leave_out_samples(is_learnt_from, batch)
        length = batch["weights"].shape[1]
        rollout = {
            name: np.asarray(batch[name], spec.dtype)
            for name, spec in self.batch_arrays(length).items()
        }
        if self.replay_routes:
            rollout[ROUTES] = batch[ROUTES]
        return rollout

    def find_groups_without_variance(
        self,
        scores: NDArray[np.float64],
        lengths: NDArray[np.integer],
        is_complete: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Says of each prompt whether its samples all score the same, penalties
        included.

        Args:
            scores: of each reward, [prompts, samples, rewards]; NaN: it gave none.
            lengths: tokens that the policy drew, [prompts, samples].
            is_complete: whether the policy ended a sample itself, [prompts, samples].
        """
        weights = [reward.weight for reward in self.rewards]
        penalties = self.compute_penalties(lengths, is_complete)
        return find_groups_without_variance(scores, weights, penalties)

    def compute_penalties(
        self,
        lengths: NDArray[np.floating | np.integer],
        is_complete: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Returns what is taken from samples' scores for their length and for not
        coming to an end, both [prompts, samples]; 0 or more."""
        penalties = np.where(is_complete, 0.0, self.missing_end_penalty)
        if self.overlong_buffer is not None:
            buffer = self.overlong_buffer
            overlong = [
                compute_overlong_penalty(length, self.max_new_tokens, buffer)
                for length in lengths.ravel().tolist()
            ]
            penalties = penalties - self.overlong_penalty * np.reshape(
                overlong, lengths.shape
            )
        return penalties

    @abstractmethod
    def compute_advantages(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        penalties: NDArray[np.float64],
        batch: Batch,
    ) -> Batch:
        """Returns the advantages of a rollout's tokens [rows, S], and other arrays of
        scores that the batch needs; arguments as of :meth:`finish_rollouts` and
        :meth:`compute_penalties`."""

    def _leave_out_samples(
        self, is_learnt_from: NDArray[np.bool_], batch: Batch
    ) -> Batch:
        """Returns arrays of a batch in which the entries of other samples are as
        padding. ``is_learnt_from``: of each sample."""
        is_kept = self._spread_to_entries(is_learnt_from, batch) > 0
        return {name: batch[name] * is_kept for name in ("weights", "segment_ids")}

    def _sum_samples(
        self, values: NDArray[np.floating], batch: Batch
    ) -> NDArray[np.float64]:
        """Sums values [rows, S] over the entries of each sample: [samples], in the
        order that they were packed in."""
        segment_ids = batch["segment_ids"]
        numbers = np.arange(1, self.sequences_per_row + 1)
        is_member = segment_ids[..., None] == numbers
        values = np.asarray(values, np.float64)[..., None]
        sums = np.where(is_member, values, 0.0).sum(1)
        # Sequences of a row stand in order, and rows after one another.
        return sums[is_member.any(1)]

    def _spread_samples(
        self, values: NDArray[np.generic], batch: Batch
    ) -> NDArray[np.float64]:
        """Gives each entry that the policy drew its sample's value: [samples] → [rows,
        S]; 0 elsewhere."""
        spread = self._spread_to_entries(values, batch)
        return np.where(batch["weights"] > 0, spread, 0.0)

    def _spread_to_entries(
        self, values: NDArray[np.generic], batch: Batch
    ) -> NDArray[np.float64]:
        """Gives each entry its sample's value: [samples] → [rows, S]; 0 in padding."""
        segment_ids = batch["segment_ids"]
        numbers = np.arange(1, self.sequences_per_row + 1)
        is_present = (segment_ids[..., None] == numbers).any(1)
        table = np.zeros((len(segment_ids), self.sequences_per_row + 1))
        table[:, 1:][is_present] = values
        return np.take_along_axis(table, segment_ids, axis=1)

    # A step's loss.

    def compute_policy_statistics(
        self, policy: BoundModel, batch: DeviceBatch
    ) -> TokenStatistics:
        """Runs the policy once over rows [..., S], with the experts of the engine where
        rows have them."""
        return self.compute_statistics(policy, batch, get_routes(batch))

    def compute_statistics(
        self,
        model: BoundModel,
        batch: DeviceBatch,
        routes: jax.Array | None = None,
    ) -> TokenStatistics:
        """Runs a model once over rows [..., S]. The policy, old, current and of
        reference, is softmax(logits / temperature) of what samples are drawn at, as in
        TRL 1.16. ``routes``: experts of its tokens, [..., S, E, k]."""
        hidden, aux = model(
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            routes=routes,
        )
        log_probs, entropies = compute_log_probs_and_entropies(
            model.prepare_logits(hidden),
            batch["targets"],
            temperature=self.rollouts.sampling.temperature,
            chunk_tokens=self.chunk_tokens,
        )
        return TokenStatistics(log_probs, entropies, hidden, aux)

    def get_sequences(self, batch: DeviceBatch) -> PackedSequences:
        """Returns the samples of rows [..., S]."""
        return PackedSequences.of_rows(
            batch["segment_ids"], batch["weights"], self.sequences_per_row
        )

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        statistics = self.compute_policy_statistics(models.trained, batch)
        total, sums = self.compute_loss(statistics, models, batch)
        tokens = sums["tokens"]
        assert not isinstance(tokens, Average)
        aux = statistics.aux
        return total + scale_layers_loss(aux, batch, tokens), {**sums, **aux.sums}

    @abstractmethod
    def compute_loss(
        self, statistics: TokenStatistics, models: TaskModels, batch: DeviceBatch
    ) -> LossResult:
        """Computes a step's loss from what the policy says of rows [..., S]."""

    def get_old_log_probs(
        self, statistics: TokenStatistics, batch: DeviceBatch
    ) -> jax.Array:
        """Returns log-probabilities by the policy that a rollout's updates began with;
        in the only update these are the current ones."""
        if OLD in batch:
            return batch[OLD]
        return lax.stop_gradient(statistics.log_probs)

    def correct_samples(
        self, old_log_probs: jax.Array, batch: DeviceBatch
    ) -> CorrectionWeights:
        """Returns the weights of samples that others drew."""
        return compute_correction(
            old_log_probs,
            batch[SAMPLED],
            self.get_sequences(batch),
            self.correction,
            cap=self.correction_cap,
            floor=self.correction_floor,
        )

    def measure_policy(
        self,
        statistics: TokenStatistics,
        old_log_probs: jax.Array,
        correction: CorrectionWeights,
        batch: DeviceBatch,
    ) -> dict[str, Average]:
        """Returns the metrics that all policies have."""
        sequences = self.get_sequences(batch)
        num_tokens = sequences.num_weighted
        differences = old_log_probs - batch[SAMPLED]
        differences = jnp.where(jnp.isnan(differences), 0.0, differences)
        ratios = jnp.exp(statistics.log_probs - old_log_probs)
        engine_ratios = jnp.exp(differences)
        per_token = {
            "entropy": statistics.entropies,
            "policy_ratio": ratios,
            "engine_difference": jnp.abs(differences),
            # Tokens were drawn by the engine: its divergence from the trainer.
            "engine_k3": engine_ratios - differences - 1,
            "engine_ratio": engine_ratios,
            "corrected_share": correction.masked.astype(jnp.float32),
        }
        metrics = {
            name: Average(sequences.total(values), num_tokens)
            for name, values in per_token.items()
        }
        metrics["trained_length"] = Average(num_tokens, sequences.num_present)
        return metrics


class ReferencePolicyTask(PolicyTask):
    """A policy that is held near a frozen model."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference; 0: no second model is held."""
    reference: LocalPath | None = None
    """Run whose model is the reference; null: the model that training starts from, and
    under an adapter its base, which takes no memory of its own."""

    @property
    def has_reference(self) -> bool:
        return self.kl_coef > 0

    def frozen_models(self) -> Mapping[str, str | None]:
        return {"reference": self.reference} if self.has_reference else {}

    def check_frozen_models(
        self, model: ModelConfig, frozen: Mapping[str, ModelConfig]
    ) -> None:
        for reference in frozen.values():
            if reference.vocab_size != model.vocab_size:
                message = f"the reference has {reference.vocab_size} ids, "
                message += f"model.vocab_size={model.vocab_size}"
                fix = "use a reference with the policy's vocabulary"
                raise MaxlmError(message, where="task.reference", fix=fix)

    def list_prepared_arrays(self) -> list[str]:
        names = super().list_prepared_arrays()
        return [*names, REFERENCE] if self.has_reference else names

    def prepare_rows(
        self, policy: BoundModel, models: TaskModels, batch: DeviceBatch
    ) -> DeviceBatch:
        arrays = super().prepare_rows(policy, models, batch)
        if self.has_reference:
            reference = models.frozen["reference"]
            statistics = self.compute_statistics(reference, batch)
            arrays = arrays | {REFERENCE: statistics.log_probs}
        return arrays
