"""Which labels of a corpus depend on rules, for a set of rules.

Stages that compare documents find what is alike; which of the documents alike loses a
text is a *verdict*, and depends on which documents the rules keep. So do all labels of
a stage whose `where` names a verdict: of a document that loses a text they are null.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from maxlm.config import MaxlmError
from maxlm.corpus.expression import Expression, parse_expression
from maxlm.corpus.recipe import FilterRules, RecipeConfig, get_label_types
from maxlm.corpus.stage import CrossDocumentStage, Stage


@dataclass(frozen=True)
class VerdictStage:
    """A stage with labels that depend on rules."""

    stage: Stage
    where: Expression | None
    """Its condition, if that names labels that depend on rules."""
    labels: tuple[str, ...]
    """Those of its labels that depend on rules and matter, as "stage.label"."""
    is_cut: bool
    """Whether its spans are cut out of the texts."""


@dataclass(frozen=True)
class VerdictPlan:
    """Labels to be settled for a set of rules."""

    stages: tuple[VerdictStage, ...]
    """The stages whose labels matter, in the recipe's order."""
    phases: tuple[tuple[VerdictStage, ...], ...]
    """The same stages: those on which it depends which documents are kept; then, if
    they can wait, those of which spans are cut out of kept documents and nothing
    else."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that depend on rules and matter."""
        return tuple(name for stage in self.stages for name in stage.labels)


@dataclass(frozen=True)
class _StageVerdicts:
    """The labels of a stage that depend on rules, whether they matter or not."""

    stage: Stage
    where: Expression | None
    labels: tuple[str, ...]


def plan_verdicts(
    recipe: RecipeConfig, rules: FilterRules, error_location: str
) -> VerdictPlan:
    """Finds the labels that must be settled for `rules`. Raises MaxlmError where stages
    that must be settled together keep by different labels."""
    candidates = _list_stage_verdicts(recipe)
    needed_by_keep = _find_needed(candidates, rules.label_names)
    needed = _find_needed(candidates, [*rules.label_names, *rules.cut])
    stages = []
    for candidate in candidates:
        stage = candidate.stage
        if needed.isdisjoint(candidate.labels):
            continue
        shown = needed
        if isinstance(stage, CrossDocumentStage):
            # All of its verdicts, for people to see.
            shown = needed | stage.neutral_verdicts.keys()
        stages.append(
            VerdictStage(
                stage=stage,
                where=candidate.where,
                labels=tuple(name for name in candidate.labels if name in shown),
                is_cut=not set(rules.cut).isdisjoint(candidate.labels),
            )
        )
    phases = _make_phases(stages, needed_by_keep, error_location)
    return VerdictPlan(tuple(stages), phases)


def _list_stage_verdicts(recipe: RecipeConfig) -> list[_StageVerdicts]:
    """Lists, for each stage of a recipe, the labels that depend on rules."""
    candidates = []
    dependent: set[str] = set()
    for number, stage in enumerate(recipe.stages):
        where = None
        if stage.where is not None:
            known_labels = get_label_types(recipe.stages[:number])
            condition = parse_expression(
                stage.where, known_labels, f"stages.{number}.where"
            )
            if not dependent.isdisjoint(condition.label_names):
                where = condition
        names = [f"{stage.unique_name}.{field.name}" for field in stage.schema()]
        if where is None:
            # Of a stage that labels the same documents under all rules only verdicts
            # depend on them.
            verdicts = (
                stage.neutral_verdicts if isinstance(stage, CrossDocumentStage) else {}
            )
            names = [name for name in names if name in verdicts]
        dependent.update(names)
        candidates.append(_StageVerdicts(stage, where, tuple(names)))
    return candidates


def _find_needed(
    candidates: Sequence[_StageVerdicts], names: Sequence[str]
) -> set[str]:
    """Finds the labels that the given ones depend on, these included."""
    needed = set(names)
    # Conditions name labels of earlier stages only, so one pass from the last is enough.
    for candidate in reversed(candidates):
        if candidate.where is not None and not needed.isdisjoint(candidate.labels):
            needed.update(candidate.where.label_names)
    return needed


def _make_phases(
    stages: Sequence[VerdictStage], needed_by_keep: set[str], error_location: str
) -> tuple[tuple[VerdictStage, ...], ...]:
    """Divides stages into those that decide which documents are kept and those that can
    wait until it is known."""
    deciding = []
    waiting = []
    for stage in stages:
        if needed_by_keep.isdisjoint(stage.labels):
            waiting.append(stage)
        else:
            deciding.append(stage)
    # What one stage cuts may be what another keeps: those that cut are settled
    # together.
    if waiting and any(stage.is_cut for stage in deciding):
        deciding = list(stages)
        waiting = []
    phases = tuple(tuple(phase) for phase in (deciding, waiting) if phase)
    for phase in phases:
        order_labels = get_order_labels(phase)
        if len(order_labels) > 1:
            (first, first_label), (second, second_label) = order_labels[:2]
            message = (
                f"{first} keeps by {first_label} and {second} by {second_label}: what "
                "one of them keeps might lose its text by the other"
            )
            fix = (
                "give both the same keep_by, or name the verdicts of one of them in no "
                "rule"
            )
            raise MaxlmError(message, where=error_location or "stages", fix=fix)
    return phases


def get_order_labels(phase: Sequence[VerdictStage]) -> list[tuple[str, str]]:
    """Returns the different labels by which stages of a phase keep, each after the name
    of the first stage that does."""
    stage_by_label: dict[str, str] = {}
    for verdict_stage in phase:
        stage = verdict_stage.stage
        if isinstance(stage, CrossDocumentStage) and stage.keep_by is not None:
            stage_by_label.setdefault(stage.keep_by, stage.unique_name)
    return [(stage_name, label) for label, stage_name in stage_by_label.items()]
