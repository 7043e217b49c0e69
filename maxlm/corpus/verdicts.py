"""Which labels of a corpus depend on rules, for a set of rules.

Stages that compare documents find what is alike; which of the documents alike loses a
text is a *verdict*, and depends on which documents the rules keep. So do all labels of
a stage whose `where` names a verdict: of a document that loses a text they are null.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from maxlm.config import MaxlmError
from maxlm.corpus.expression import Expression, parse
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


def plan_verdicts(
    recipe: RecipeConfig, rules: FilterRules, error_location: str
) -> VerdictPlan:
    """Finds the labels that must be settled for `rules`. Raises MaxlmError where stages
    that must be settled together keep by different labels."""
    dependent: set[str] = set()
    bound: list[tuple[Stage, Expression | None, list[str]]] = []
    for number, stage in enumerate(recipe.stages):
        where = None
        if stage.where is not None:
            known = get_label_types(recipe.stages[:number])
            condition = parse(stage.where, known, f"stages.{number}.where")
            where = None if dependent.isdisjoint(condition.label_names) else condition
        names = [f"{stage.unique_name}.{field.name}" for field in stage.schema()]
        if where is None:
            verdicts = (
                stage.neutral_verdicts if isinstance(stage, CrossDocumentStage) else {}
            )
            names = [name for name in names if name in verdicts]
        dependent.update(names)
        bound.append((stage, where, names))

    needed_by_keep = _find_needed(bound, rules.label_names)
    needed = _find_needed(bound, [*rules.label_names, *rules.cut])
    stages = []
    for stage, where, names in bound:
        used = [name for name in names if name in needed]
        if not used:
            continue
        if isinstance(stage, CrossDocumentStage):
            # All of its verdicts, for people to see.
            used = [
                name
                for name in names
                if name in needed or name in stage.neutral_verdicts
            ]
        is_cut = any(name in rules.cut for name in names)
        stages.append(VerdictStage(stage, where, tuple(used), is_cut))
    return VerdictPlan(
        tuple(stages), _make_phases(stages, needed_by_keep, error_location)
    )


def _find_needed(
    bound: Sequence[tuple[Stage, Expression | None, list[str]]], names: Sequence[str]
) -> set[str]:
    """Finds the labels that the given ones depend on, these included."""
    needed = set(names)
    for _, where, labels in reversed(bound):
        if where is not None and not needed.isdisjoint(labels):
            needed.update(where.label_names)
    return needed


def _make_phases(
    stages: Sequence[VerdictStage], needed_by_keep: set[str], error_location: str
) -> tuple[tuple[VerdictStage, ...], ...]:
    deciding = [
        stage for stage in stages if not needed_by_keep.isdisjoint(stage.labels)
    ]
    waiting = [stage for stage in stages if stage not in deciding]
    # What one stage cuts may be what another keeps: those that cut are settled
    # together.
    if waiting and any(stage.is_cut for stage in deciding):
        deciding = list(stages)
        waiting = []
    phases = tuple(tuple(phase) for phase in (deciding, waiting) if phase)
    for phase in phases:
        keep_by = get_order_labels(phase)
        if len(keep_by) > 1:
            (first, first_label), (second, second_label) = keep_by[:2]
            message = (
                f"{first} keeps by {first_label} and {second} by {second_label}: what "
                f"one of them "
                "keeps might lose its text by the other"
            )
            fix = "give both the same keep_by, or name the verdicts of one of them in no rule"
            raise MaxlmError(message, where=error_location or "stages", fix=fix)
    return phases


def get_order_labels(phase: Sequence[VerdictStage]) -> list[tuple[str, str]]:
    """Returns the different labels by which stages of a phase keep, each with the first
    stage that does."""
    labels: dict[str, str] = {}
    for bound in phase:
        stage = bound.stage
        if isinstance(stage, CrossDocumentStage) and stage.keep_by is not None:
            labels.setdefault(stage.keep_by, stage.unique_name)
    return [(stage, label) for label, stage in labels.items()]
