"""A recipe: from sources over stages to the rules that say what is kept."""

import hashlib
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as types
from pydantic import Field, model_validator

from maxlm.config import Config, LocalPath, MaxlmError
from maxlm.corpus.crawl import CrawlSource
from maxlm.corpus.expression import (
    Expression,
    make_unknown_label_error,
    parse_expression,
)
from maxlm.corpus.shards import DOCUMENT_SCHEMA, DOCUMENTS
from maxlm.corpus.stage import CrossDocumentStage, Stage, Verdicts
from maxlm.corpus.stages import AnyStage
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.stages.heuristics import PUBLISHED

RECIPE = "corpus.json"
"""Name of the file of a corpus's recipe, by which a folder is recognised as a
corpus."""
_KINDS = {
    "numbers": (types.is_integer, types.is_floating, types.is_boolean),
    "strings": (types.is_string, types.is_large_string),
}
_DOCUMENT_LABELS = {
    name: DOCUMENT_SCHEMA.field(name).type for name in ("id", "source", "url")
}


class RecipeConfig(Config):
    """The recipe of `maxlm corpus run`."""

    out: LocalPath
    """The corpus's folder."""
    sources: tuple[CrawlSource, ...] = Field(min_length=1)
    """Sources of raw documents."""
    stages: tuple[AnyStage, ...] = ()
    """Stages that label the documents, in this order."""
    keep: dict[str, str] = Field(default_factory=dict)
    """Rules by name, in the order in which the report tells what each one drops:
    expressions over labels, of which a document must fulfil all. `published.NAME` is a
    rule of a paper: see docs/corpus.md. Applied when a token store is built; a changed
    one costs no new pass over texts."""
    cut: tuple[str, ...] = ()
    """Labels that hold spans to cut out of the kept texts, such as `substring.cuts`."""
    workers: int | None = Field(default=None, ge=1)
    """Tasks at a time, at most; null: one a core, or a CPU of the Ray cluster that runs
    them."""
    shard_bytes: int = Field(default=64 << 20, gt=0)
    """About how many bytes of input make a shard, the unit of work and of resumption.
    What a worker holds in memory grows with it only in stages that compare documents
    (see docs/corpus.md)."""

    @model_validator(mode="after")
    def _check_names(self) -> "RecipeConfig":
        source_names = [source.name for source in self.sources]
        stage_names = [stage.unique_name for stage in self.stages]
        for kind, names in (("sources", source_names), ("stages", stage_names)):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(
                        f"two {kind} are called {name}: give one another name"
                    )
        indexes = [
            stage.index for stage in self.stages if isinstance(stage, ExactStage)
        ]
        for index in indexes:
            if index is not None and indexes.count(index) > 1:
                raise ValueError(
                    f"two stages use the index {index}: name it in one of them"
                )
        for name in stage_names:
            # These are other files of the corpus's folder; and no expression could name
            # a label below a keyword.
            if name in (DOCUMENTS, "lock", "settled") or keyword.iskeyword(name):
                raise ValueError(f"no stage can be called {name}: give it another name")
        return self


@dataclass(frozen=True)
class BoundStage:
    """A stage in its place: what it may read, and what its labels depend on."""

    stage: Stage
    text_stages: tuple[str, ...]
    where: Expression | None
    fingerprint: str
    """A hash of everything that decides the stage's labels, but for the documents."""
    is_cross_document: bool
    """Whether its labels depend on the other documents of the corpus."""


@dataclass(frozen=True)
class FilterRules:
    """Rules of what is kept of a corpus, checked against its labels."""

    keep: Mapping[str, Expression]
    cut: tuple[str, ...]

    @property
    def label_names(self) -> list[str]:
        """The labels that rules of `keep` name, each once."""
        names = []
        for rule in self.keep.values():
            names += rule.label_names
        return list(dict.fromkeys(names))

    def describe(self) -> dict[str, object]:
        """Describes the rules, as JSON has it."""
        return {
            "keep": {name: rule.text for name, rule in self.keep.items()},
            "cut": self.cut,
        }


def bind_stages(recipe: RecipeConfig) -> list[BoundStage]:
    """Puts each stage in its place, and checks what it reads.

    Which of several documents loses a text is settled for each set of rules. So here a
    `where` that names such a verdict selects documents as if none did.
    """
    resolve_rules(recipe, recipe.keep, recipe.cut, "")
    fingerprints = {DOCUMENTS: ""}
    cross_document: set[str] = set()
    bound_stages = []
    for number, stage in enumerate(recipe.stages):
        name = stage.unique_name
        place = f"stages.{number}"
        earlier = recipe.stages[:number]
        labels = get_label_types(earlier)
        text_stages = get_text_stages(earlier)
        where = None
        condition_labels: tuple[str, ...] = ()
        if stage.where is not None:
            condition = parse_expression(stage.where, labels, f"{place}.where")
            where = condition.replace_labels(get_neutral_verdicts(earlier))
            condition_labels = where.label_names
        columns = [*stage.input_columns, *condition_labels]
        for column in columns:
            if column not in labels and column not in DOCUMENT_SCHEMA.names:
                raise make_unknown_label_error(column, labels, f"{place} ({name})")
        _check_input_labels(stage, labels, place)

        # All that it reads: stages of labels, and those that wrote the text. Of these
        # the order matters: the newest that a document has is read.
        texts_read = text_stages if "text" in stage.input_columns else ()
        sources = set(texts_read)
        for column in columns:
            sources.add(column.rpartition(".")[0] or DOCUMENTS)
        source_fingerprints = sorted(
            (source, fingerprints[source]) for source in sources
        )
        parts = [
            stage.fingerprint(),
            where and where.text,
            source_fingerprints,
            texts_read,
        ]
        fingerprints[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        is_cross_document = isinstance(stage, CrossDocumentStage)
        if is_cross_document or not cross_document.isdisjoint(sources):
            cross_document.add(name)
        bound_stages.append(
            BoundStage(
                stage=stage,
                text_stages=text_stages,
                where=where,
                fingerprint=fingerprints[name],
                is_cross_document=name in cross_document,
            )
        )
    return bound_stages


def _check_input_labels(
    stage: Stage, labels: Mapping[str, pa.DataType], place: str
) -> None:
    """Checks that the labels that a stage reads hold what it needs."""
    for label, kind in stage.input_labels.items():
        type_ = labels.get(label, pa.null())
        if not any(is_kind(type_) for is_kind in _KINDS[kind]):
            message = f'"{label}" holds no {kind}, which {stage.unique_name} needs'
            raise MaxlmError(message, where=place, fix="name a label that does")


def get_label_types(stages: Sequence[Stage]) -> dict[str, pa.DataType]:
    """Returns the type of each label that a corpus of these stages has."""
    label_types = dict(_DOCUMENT_LABELS)
    for stage in stages:
        for field in stage.schema():
            if field.name != "text":
                label_types[f"{stage.unique_name}.{field.name}"] = field.type
    return label_types


def get_neutral_verdicts(stages: Sequence[Stage]) -> Verdicts:
    """Returns the verdicts of stages that compare documents for one that loses no
    text."""
    verdicts = {}
    for stage in stages:
        if isinstance(stage, CrossDocumentStage):
            verdicts |= stage.neutral_verdicts
    return verdicts


def get_text_stages(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Returns the stages that write a version of the text, oldest first."""
    writers = [stage.unique_name for stage in stages if "text" in stage.schema().names]
    return (DOCUMENTS, *writers)


def resolve_rules(
    recipe: RecipeConfig,
    keep: Mapping[str, str],
    cut: Sequence[str],
    error_location: str,
) -> FilterRules:
    """Checks rules against a recipe's labels. `error_location`: what comes before a
    rule's key in errors, such as the corpus's folder."""
    labels = get_label_types(recipe.stages)
    expressions = {}
    for name, text in keep.items():
        place = f"{error_location}: keep.{name}" if error_location else f"keep.{name}"
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            message = f"{name!r} cannot be the name of a rule"
            raise MaxlmError(message, where=place, fix="use letters, digits, _ and -")
        text = _expand_published_rule(text, place)
        expressions[name] = parse_expression(text, labels, place)
    _check_cuts(recipe, labels, cut)
    return FilterRules(expressions, tuple(cut))


def _expand_published_rule(text: str, place: str) -> str:
    """Returns the expression that `published.NAME` stands for; others as they are."""
    prefix = "published."
    if not text.strip().startswith(prefix):
        return text
    name = text.strip().removeprefix(prefix)
    if name not in PUBLISHED:
        message = f'there is no published rule "{name}"'
        fix = f"choose: {', '.join(PUBLISHED)}"
        raise MaxlmError(message, where=place, fix=fix)
    return PUBLISHED[name]


def _check_cuts(
    recipe: RecipeConfig, labels: Mapping[str, pa.DataType], cut: Sequence[str]
) -> None:
    """Checks that labels hold spans of the newest text."""
    span_labels = [name for name, type_ in labels.items() if _holds_spans(type_)]
    stage_names = [DOCUMENTS, *(stage.unique_name for stage in recipe.stages)]
    newest_text = get_text_stages(recipe.stages)[-1]
    for label in cut:
        if label not in span_labels:
            message = f'"{label}" is no label that holds spans to cut'
            fix = f"choose: {', '.join(span_labels) or 'none here'}"
            raise MaxlmError(message, where="cut", fix=fix)
        stage_name = label.rpartition(".")[0]
        if stage_names.index(stage_name) <= stage_names.index(newest_text):
            message = (
                f"{label} are places in the text as it was before {newest_text} "
                "changed it"
            )
            fix = f"put {stage_name} after {newest_text}"
            raise MaxlmError(message, where="cut", fix=fix)


def _holds_spans(type_: pa.DataType) -> bool:
    if not types.is_list(type_) or not types.is_struct(type_.value_type):
        return False
    fields = {field.name for field in type_.value_type}
    return {"start", "end"} <= fields
