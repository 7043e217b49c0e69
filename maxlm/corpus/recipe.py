"""A recipe: from sources over stages to the rules that say what is kept."""

import hashlib
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as types
from pydantic import Field, model_validator

from maxlm.config import Config, LocalPath, MaxlmError
from maxlm.corpus.crawl import CrawlSource
from maxlm.corpus.expression import Expression, make_unknown_label_error, parse
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
    def _names_differ(self):
        sources = [source.name for source in self.sources]
        titles = [stage.unique_name for stage in self.stages]
        for kind, names in (("sources", sources), ("stages", titles)):
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
        for title in titles:
            if title in (DOCUMENTS, "lock", "settled") or keyword.iskeyword(title):
                raise ValueError(
                    f"no stage can be called {title}: give it another name"
                )
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
        return list(
            dict.fromkeys(
                name for rule in self.keep.values() for name in rule.label_names
            )
        )

    def describe(self) -> dict[str, Any]:
        """The rules as JSON has them."""
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
    keys = {DOCUMENTS: ""}
    steps = []
    wholes: set[str] = set()
    for number, stage in enumerate(recipe.stages):
        name = stage.unique_name
        place = f"stages.{number}"
        labels = get_label_types(recipe.stages[:number])
        texts = get_text_stages(recipe.stages[:number])
        where = None
        if stage.where is not None:
            condition = parse(stage.where, labels, f"{place}.where")
            where = condition.replace_labels(
                get_neutral_verdicts(recipe.stages[:number])
            )
        read = [*stage.input_columns, *(where.label_names if where else ())]
        for column in read:
            if column not in labels and column not in DOCUMENT_SCHEMA.names:
                raise make_unknown_label_error(column, labels, f"{place} ({name})")
        for label, kind in stage.input_labels.items():
            if not any(
                is_kind(labels.get(label, pa.null())) for is_kind in _KINDS[kind]
            ):
                what = f'"{label}" holds no {kind}, which {name} needs'
                raise MaxlmError(what, where=place, fix="name a label that does")
        sources = {column.rpartition(".")[0] or DOCUMENTS for column in read}
        # Of texts the order matters: the newest that a document has is read.
        seen = texts if "text" in stage.input_columns else ()
        before = sorted((s, keys[s]) for s in {*sources, *seen})
        parts = [stage.fingerprint(), where and where.text, before, seen]
        keys[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        whole = isinstance(stage, CrossDocumentStage) or bool(
            wholes & {*sources, *seen}
        )
        wholes |= {name} if whole else set()
        steps.append(BoundStage(stage, texts, where, keys[name], whole))
    return steps


def get_label_types(stages: Sequence[Stage]) -> dict[str, pa.DataType]:
    """Returns the type of each label that a corpus of these stages has."""
    return _DOCUMENT_LABELS | {
        f"{stage.unique_name}.{field.name}": field.type
        for stage in stages
        for field in stage.schema()
        if field.name != "text"
    }


def get_neutral_verdicts(stages: Sequence[Stage]) -> Verdicts:
    """Returns the verdicts of stages that compare documents for one that loses no
    text."""
    return {
        name: value
        for stage in stages
        if isinstance(stage, CrossDocumentStage)
        for name, value in stage.neutral_verdicts.items()
    }


def get_text_stages(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Returns the stages that write a version of the text, oldest first."""
    return (
        DOCUMENTS,
        *(each.unique_name for each in stages if "text" in each.schema().names),
    )


def resolve_rules(
    recipe: RecipeConfig,
    keep: Mapping[str, str],
    cut: Sequence[str],
    error_location: str,
) -> FilterRules:
    """Check rules against a recipe's labels. `error_location`: what comes before a
    rule's key in errors, such as the corpus's folder."""
    labels = get_label_types(recipe.stages)
    parsed = {}
    for name, text in keep.items():
        place = f"{error_location}: keep.{name}" if error_location else f"keep.{name}"
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            what = f"{name!r} cannot be the name of a rule"
            raise MaxlmError(what, where=place, fix="use letters, digits, _ and -")
        known = text.strip().removeprefix("published.")
        if known != text.strip():
            if known not in PUBLISHED:
                what = f'there is no published rule "{known}"'
                raise MaxlmError(
                    what, where=place, fix=f"choose: {', '.join(PUBLISHED)}"
                )
            text = PUBLISHED[known]
        parsed[name] = parse(text, labels, place)
    spans = [name for name, type_ in labels.items() if _holds_spans(type_)]
    titles = [DOCUMENTS, *(stage.unique_name for stage in recipe.stages)]
    newest = get_text_stages(recipe.stages)[-1]
    for label in cut:
        if label not in spans:
            what = f'"{label}" is no label that holds spans to cut'
            raise MaxlmError(
                what, where="cut", fix=f"choose: {', '.join(spans) or 'none here'}"
            )
        stage = label.rpartition(".")[0]
        if titles.index(stage) <= titles.index(newest):
            what = (
                f"{label} are places in the text as it was before {newest} changed it"
            )
            raise MaxlmError(what, where="cut", fix=f"put {stage} after {newest}")
    return FilterRules(parsed, tuple(cut))


def _holds_spans(type_: pa.DataType) -> bool:
    has_fields = types.is_list(type_) and types.is_struct(type_.value_type)
    return has_fields and {"start", "end"} <= {field.name for field in type_.value_type}
