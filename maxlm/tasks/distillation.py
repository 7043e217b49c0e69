"""Distillation: a student learns the distributions over tokens that a teacher has.

The teacher is a frozen model beside the student, or stands in the rows of the files as
the log-probabilities of its likeliest tokens (:mod:`maxlm.tune.teachers` writes
such files).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from pydantic import Field

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.parallel.divergence import StoredTeacher, fused_divergence_loss
from maxlm.parallel.local import get_layout, make_spec
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow
from maxlm.tasks.sft import AnswerTask
from maxlm.tasks.task import DeviceBatch, LossResult, SourceInputs, TaskModels
from maxlm.tasks.text import TextTask, TokenPredictionTask

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


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
            what = "stored log-probabilities have no hidden states"
            raise MaxlmError(
                what, where="task.features", fix="set task.teacher, or leave it out"
            )

    def frozen_models(self) -> Mapping[str, str | None]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def check_frozen_models(self, model: Any, frozen: Mapping[str, Any]) -> None:
        for own in frozen.values():
            check_same_vocabulary(own.vocab_size, model.vocab_size, str(self.teacher))
            if self.features not in (None, own.d_model):
                what = f"the teacher's hidden states have {own.d_model} features"
                raise MaxlmError(
                    what, where="task.features", fix=f"set it to {own.d_model}"
                )

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        inputs = tuple(batch[name] for name in ("tokens", "positions", "segment_ids"))
        hidden, aux = models.trained(*inputs)
        more: dict[str, jax.Array] = {}
        if self.teacher is None:
            teacher: Any = StoredTeacher(
                batch["teacher_ids"], batch["teacher_log_probs"]
            )
        else:
            model = models.frozen["teacher"]
            theirs = model(*inputs)[0]
            teacher = model.prepare_logits(theirs)
            if self.features is not None:
                own = models.trained.apply_head("features", hidden)
                more["features"] = _sum_squared_errors(own, theirs, batch["weights"])
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
        loss += self.features_weight * more.get("features", 0.0) + aux.loss
        return loss, sums | {"divergence": divergence} | more | aux.sums


class DistillationTask(AnswerTask, TeacherTask):
    """Learns a teacher's distributions in the answers of rows as supervised fine-tuning
    reads."""

    kind: Literal["distill"] = "distill"
    top_k: int = Field(default=64, ge=1)
    """Tokens of a stored teacher, as many as are stored; all others count as one class
    more."""

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        axes = ("seq", None)
        if self.teacher is not None:
            return arrays
        log_probs = BatchArraySpec((seq_len, self.top_k + 1), np.float32, axes)
        ids = BatchArraySpec((seq_len, self.top_k), np.int32, axes)
        return arrays | {"teacher_ids": ids, "teacher_log_probs": log_probs}

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        """Adds a stored teacher's log-probabilities, at the places with a weight."""
        if self.teacher is None:
            places = np.flatnonzero(arrays["weights"])
            targets = arrays["targets"][places]
            values = read_stored_teacher(row, targets, self.top_k, self.temperature)
            for name, own in zip(
                ("teacher_ids", "teacher_log_probs"), values, strict=True
            ):
                arrays[name] = np.zeros(
                    (len(arrays["tokens"]), own.shape[1]), own.dtype
                )
                arrays[name][places] = own
        return arrays

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        if self.teacher is None:
            file = self.open_files("files")
            size = file[0].get("teacher_vocab_size", inputs.vocabulary.size)
            check_same_vocabulary(size, inputs.vocabulary.size, str(file.paths[0]))
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
    row: Mapping[str, Any], targets: np.ndarray, k: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [n, k] and log-probabilities [n, k + 1] of what a row's teacher
    says at ``targets``; raises MaxlmError if it was asked for others."""
    if row.get("teacher_ids") is None:
        what, fix = (
            "no teacher's log-probabilities",
            "maxlm tune store-logits, or set task.teacher",
        )
        raise MaxlmError(what, where="task.teacher", fix=fix)
    found = row["teacher_temperature"]
    if found != temperature:
        what = f"log-probabilities at temperature {found:g}, not {temperature:g}"
        raise MaxlmError(what, where="task.temperature", fix=f"set it to {found:g}")
    if not np.array_equal(np.frombuffer(row["teacher_targets"], "<i4"), targets):
        what, fix = (
            "the teacher's log-probabilities are of other tokens",
            "store them again",
        )
        raise MaxlmError(what, where="teacher_targets", fix=fix)
    ids = np.frombuffer(row["teacher_ids"], "<i4").reshape(len(targets), -1)
    found = ids.shape[1]
    if found != k:
        what = f"{found} log-probabilities a token, task.top_k={k}"
        raise MaxlmError(what, where="task.top_k", fix=f"set it to {found}")
    return ids, np.frombuffer(row["teacher_log_probs"], "<f4").reshape(len(targets), -1)


def _sum_squared_errors(
    own: jax.Array, theirs: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sums the errors of tokens [..., S, D], each a mean over features, by weight."""
    errors = jnp.square(own - theirs.astype(jnp.float32)).mean(-1)
    errors = reshard(errors, make_spec(get_layout(weights)))
    return jnp.where(weights != 0, weights * errors, 0.0).sum()


def check_same_vocabulary(teacher_size: int, student_size: int, where: str) -> None:
    """Checks that a teacher's logits are of the student's tokens."""
    if teacher_size != student_size:
        what = f"the teacher has {teacher_size} ids, model.vocab_size={student_size}"
        raise MaxlmError(
            what, where=where, fix="use a teacher with the student's vocabulary"
        )
