"""Distillation: a student learns the distributions over tokens that a teacher has.

The teacher is a frozen model beside the student, or stands in the rows of the files as
the log-probabilities of its likeliest tokens (:mod:`maxlm.tune.teachers` writes
such files).
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from pydantic import Field

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.models.architectures import ModelConfig
from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.parallel.divergence import StoredTeacher, fused_divergence_loss
from maxlm.parallel.local import get_layout, make_spec
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow
from maxlm.tasks.sft import AnswerTask
from maxlm.tasks.task import DeviceBatch, LossResult, SourceInputs, TaskModels
from maxlm.tasks.text import TextTask, TokenPredictionTask

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}
"""Both are ends of the generalised Jensen–Shannon divergence's range."""


class TeacherTask(TokenPredictionTask):
    """A student that learns from a teacher's logits: (1 − c)·T²·divergence +
    c·cross-entropy, of every token with a weight, T being ``temperature`` and c
    ``ce_weight``."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    teacher: LocalPath | None = None
    """The teacher's run, such as `maxlm convert` makes, with the student's tokenizer;
    null: its log-probabilities stand in the rows, as `maxlm tune store-logits` writes
    them."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher ‖ student), KL(student ‖ teacher), or the generalised Jensen–Shannon
    divergence: beta·KL(teacher ‖ mixture) + (1 − beta)·KL(student ‖ mixture)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share of jsd's mixture: near 0 it behaves as forward_kl, near 1 as
    reverse_kl."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits; the divergence counts times its square, so that its
    gradient stays as large beside the cross-entropy's (TRL's GKD does without the
    square)."""
    ce_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the text's own cross-entropy in the loss; 1 learns nothing of the
    teacher."""
    features: int | None = Field(default=None, gt=0)
    """Width of the teacher's final hidden states, to learn these too by a linear map of
    the student's, `model.heads.features`; null: its logits alone."""
    features_weight: float = Field(default=1.0, ge=0)
    """Weight of their mean squared error, which is added to the loss."""

    @property
    def required_heads(self) -> Mapping[str, int]:
        return {} if self.features is None else {"features": self.features}

    def check(self, seq_len: int, vocab_size: int) -> None:
        super().check(seq_len, vocab_size)
        if self.features is not None and self.teacher is None:
            message = "stored log-probabilities have no hidden states"
            fix = "set task.teacher, or leave it out"
            raise MaxlmError(message, where="task.features", fix=fix)

    def frozen_models(self) -> Mapping[str, str | None]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def check_frozen_models(
        self, model: ModelConfig, frozen: Mapping[str, ModelConfig]
    ) -> None:
        for teacher in frozen.values():
            check_same_vocabulary(
                teacher.vocab_size, model.vocab_size, str(self.teacher)
            )
            width = teacher.d_model
            if self.features not in (None, width):
                message = f"the teacher's hidden states have {width} features"
                fix = f"set it to {width}"
                raise MaxlmError(message, where="task.features", fix=fix)

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden, aux = models.trained(*inputs)
        feature_sums: dict[str, jax.Array] = {}
        teacher: StoredTeacher | LogitsInputs
        if self.teacher is None:
            teacher = StoredTeacher(batch["teacher_ids"], batch["teacher_log_probs"])
        else:
            model = models.frozen["teacher"]
            teacher_hidden, _ = model(*inputs)
            teacher = model.prepare_logits(teacher_hidden)
            if self.features is not None:
                predicted = models.trained.apply_head("features", hidden)
                feature_sums["features"] = _sum_squared_errors(
                    predicted, teacher_hidden, batch["weights"]
                )
        loss, divergence, cross_entropy = fused_divergence_loss(
            models.trained.prepare_logits(hidden),
            teacher,
            batch["targets"],
            batch["weights"],
            beta=BETAS.get(self.divergence, self.beta),
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            z_loss=self.z_loss,
            chunk_tokens=self.chunk_tokens,
        )
        sums = {"tokens": batch["weights"].sum(), "cross_entropy": cross_entropy}
        loss += self.features_weight * feature_sums.get("features", 0.0) + aux.loss
        return loss, sums | {"divergence": divergence} | feature_sums | aux.sums


class DistillationTask(AnswerTask, TeacherTask):
    """Learns a teacher's distributions in the answers of rows as supervised fine-tuning
    reads."""

    kind: Literal["distill"] = "distill"
    top_k: int = Field(default=64, ge=1)
    """Tokens of a stored teacher, as many as are stored; all others count as one class
    more."""

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        if self.teacher is not None:
            return arrays
        axes = ("seq", None)
        log_probs = BatchArraySpec((seq_len, self.top_k + 1), np.float32, axes)
        ids = BatchArraySpec((seq_len, self.top_k), np.int32, axes)
        return arrays | {"teacher_ids": ids, "teacher_log_probs": log_probs}

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        """Adds a stored teacher's log-probabilities, at the places with a weight."""
        if self.teacher is not None:
            return arrays
        places = np.flatnonzero(arrays["weights"])
        targets = arrays["targets"][places]
        stored_ids, stored_log_probs = read_stored_teacher(
            row, targets, self.top_k, self.temperature
        )
        length = len(arrays["tokens"])
        ids = np.zeros((length, stored_ids.shape[1]), stored_ids.dtype)
        ids[places] = stored_ids
        log_probs = np.zeros(
            (length, stored_log_probs.shape[1]), stored_log_probs.dtype
        )
        log_probs[places] = stored_log_probs
        arrays["teacher_ids"] = ids
        arrays["teacher_log_probs"] = log_probs
        return arrays

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        if self.teacher is None:
            file = self.open_files("files")
            student_size = inputs.vocabulary.size
            teacher_size = file[0].get("teacher_vocab_size", student_size)
            check_same_vocabulary(teacher_size, student_size, str(file.paths[0]))
        return super().batch_source(inputs)


class TextDistillationTask(TeacherTask, TextTask):
    """Learns a teacher's distributions over every token of text, as in pretraining."""

    predicts_every_token: ClassVar[bool] = True

    kind: Literal["distill_text"] = "distill_text"
    teacher: LocalPath  # pyright: ignore[reportGeneralTypeIssues]
    """The teacher's run, such as `maxlm convert` makes, with the student's
    tokenizer."""


def write_stored_teacher(
    ids: np.ndarray, log_probs: np.ndarray, targets: np.ndarray
) -> dict[str, bytes]:
    """Returns columns of a row that hold a teacher's log-probabilities fp32 [n, k + 1],
    of ``ids`` [n, k] and of all others together, at its ``targets`` [n]."""
    return {
        "teacher_targets": targets.astype("<i4").tobytes(),
        "teacher_ids": ids.astype("<i4").tobytes(),
        "teacher_log_probs": log_probs.astype("<f4").tobytes(),
    }


def read_stored_teacher(
    row: FileRow, targets: np.ndarray, k: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [n, k] and log-probabilities [n, k + 1] that a row's teacher
    stored at ``targets``; raises MaxlmError if it stored those of other tokens, another
    number of them, or at another temperature."""
    if row.get("teacher_ids") is None:
        raise MaxlmError(
            "no teacher's log-probabilities",
            where="task.teacher",
            fix="maxlm tune store-logits, or set task.teacher",
        )
    stored_temperature = row["teacher_temperature"]
    if stored_temperature != temperature:
        message = f"log-probabilities at temperature {stored_temperature:g}, "
        message += f"not {temperature:g}"
        fix = f"set it to {stored_temperature:g}"
        raise MaxlmError(message, where="task.temperature", fix=fix)
    stored_targets = np.frombuffer(row["teacher_targets"], "<i4")
    if not np.array_equal(stored_targets, targets):
        message = "the teacher's log-probabilities are of other tokens"
        raise MaxlmError(message, where="teacher_targets", fix="store them again")
    ids = np.frombuffer(row["teacher_ids"], "<i4").reshape(len(targets), -1)
    stored_k = ids.shape[1]
    if stored_k != k:
        message = f"{stored_k} log-probabilities a token, task.top_k={k}"
        raise MaxlmError(message, where="task.top_k", fix=f"set it to {stored_k}")
    log_probs = np.frombuffer(row["teacher_log_probs"], "<f4")
    return ids, log_probs.reshape(len(targets), -1)


def _sum_squared_errors(
    predicted: jax.Array, features: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sums the errors of tokens [..., S, D], each a mean over features, by weight."""
    errors = jnp.square(predicted - features.astype(jnp.float32)).mean(-1)
    errors = reshard(errors, make_spec(get_layout(weights)))
    return jnp.where(weights != 0, weights * errors, 0.0).sum()


def check_same_vocabulary(teacher_size: int, student_size: int, where: str) -> None:
    """Checks that a teacher's logits are of the student's tokens."""
    if teacher_size != student_size:
        message = f"the teacher has {teacher_size} ids, model.vocab_size={student_size}"
        fix = "use a teacher with the student's vocabulary"
        raise MaxlmError(message, where=where, fix=fix)
