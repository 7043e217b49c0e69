"""A finished corpus, open for reading."""

# pyarrow.compute makes its functions at run time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maxlm.config import MaxlmError
from maxlm.corpus.cuts import remove_spans
from maxlm.corpus.recipe import (
    RECIPE,
    FilterRules,
    RecipeConfig,
    get_label_types,
    get_text_stages,
    resolve_rules,
)
from maxlm.corpus.shards import DOCUMENTS, StageShardView
from maxlm.runtime.files import verify_and_strip_json_digest

MANIFEST = "manifest.json"
"""Name of the manifest in a stage's folder, which is written last."""
_AGAIN = "run maxlm corpus run with its recipe again"


def read_recipe(folder: Path) -> RecipeConfig:
    """Reads the recipe that a corpus was made by."""
    path = folder / RECIPE
    try:
        text = path.read_text("utf-8")
        return RecipeConfig.model_validate_json(verify_and_strip_json_digest(text))
    except OSError as error:
        fix = "make one with maxlm corpus run RECIPE"
        raise MaxlmError("there is no corpus here", where=str(folder), fix=fix) from error
    except ValueError as error:  # Pydantic's, and bytes that are no UTF-8.
        what = "this corpus was made by another version of maxlm, or is damaged"
        raise MaxlmError(what, where=str(path), fix=_AGAIN) from error


@dataclass(frozen=True)
class OpenCorpus:
    """The folder that `run_recipe` made."""

    folder: Path
    recipe: RecipeConfig

    @classmethod
    def open(cls, folder: Path | str) -> "OpenCorpus":
        """Opens the corpus in a folder.

        Raises:
            MaxlmError: there is none, it is of another version, or its stages are not all done.
        """
        corpus = cls(Path(folder), read_recipe(Path(folder)))
        for title in corpus.list_stages():
            corpus.read_manifest(title)
        return corpus

    def read_manifest(self, stage_name: str) -> dict[str, Any]:
        """Reads the manifest of a stage's folder."""
        path = self.folder / stage_name / MANIFEST
        try:
            return json.loads(verify_and_strip_json_digest(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            what = f"the stage {stage_name} is not finished, or its manifest is damaged"
            raise MaxlmError(what, where=str(path), fix=_AGAIN) from error

    def list_stages(self) -> list[str]:
        """Lists the names of its stages, the reading of sources first."""
        return [DOCUMENTS, *(stage.unique_name for stage in self.recipe.stages)]

    @cached_property
    def labels(self) -> dict[str, pa.DataType]:
        """The type of each label."""
        return get_label_types(self.recipe)

    @cached_property
    def shards(self) -> list[StageShardView]:
        """The corpus's shards, in the order of its documents."""
        names, texts = self.read_manifest(DOCUMENTS)["shards"], get_text_stages(self.recipe)
        return [StageShardView(self.folder, name, texts) for name in names]

    def resolve_rules(
        self, keep: Mapping[str, str] | None = None, cut: Sequence[str] | None = None
    ) -> FilterRules:
        """Resolves rules for this corpus; None: those of its recipe. See `resolve_rules`."""
        keep = self.recipe.keep if keep is None else keep
        cut = self.recipe.cut if cut is None else cut
        return resolve_rules(self.recipe, keep, cut, str(self.folder))


def mark_kept(table: pa.RecordBatch, rules: FilterRules) -> np.ndarray:
    """Marks documents that fulfil all rules and have a text: bool [rows]."""
    keep = pc.is_valid(table.column("text")).to_numpy(zero_copy_only=False)
    for rule in rules.keep.values():
        keep = keep & rule.evaluate(table)
    return keep


def read_filtered_documents(
    shard: StageShardView, rules: FilterRules, columns: Sequence[str] = ("id",)
) -> Iterator[tuple[tuple[Any, ...], str | None]]:
    """Yields the values of `columns` and the text of each document of a shard, in order; None for
    a text that the rules drop.

    Spans of all the labels in `rules.cut` are cut out of the text.
    """
    for table in shard.read_row_groups(
        list(dict.fromkeys([*columns, "text", *rules.label_names, *rules.cut]))
    ):
        keep = mark_kept(table, rules)
        texts = remove_cut_spans(table.filter(pa.array(keep)), rules)
        values = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        for row, keeps in zip(values, keep, strict=True):
            yield row, next(texts) if keeps else None


def remove_cut_spans(table: pa.RecordBatch, rules: FilterRules) -> Iterator[str]:
    """Yields the texts of documents without the spans of all the labels in `rules.cut`."""
    spans = [table.column(label).to_pylist() for label in rules.cut]
    for i, text in enumerate(table.column("text").to_pylist()):
        cuts = [(span["start"], span["end"]) for each in spans for span in each[i] or ()]
        yield remove_spans(text, cuts) if cuts else text
