"""A finished corpus, open for reading; also as files that `maxlm.data.documents`
reads."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

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
from maxlm.corpus.settling import settle_verdicts
from maxlm.corpus.shards import (
    DOCUMENTS,
    StageShardView,
    check_shard,
    read_shard_checksums,
    verify_shards,
)
from maxlm.corpus.stage import CrossDocumentStage
from maxlm.corpus.verdicts import plan_verdicts
from maxlm.data.documents.config import FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, SourceFile
from maxlm.runtime.files import verify_and_strip_json_digest
from maxlm.runtime.progress import Progress, ignore_progress

MANIFEST = "manifest.json"
"""Name of the manifest in a stage's folder, which is written last."""
_AGAIN = "run maxlm corpus run with its recipe again"


@dataclass(frozen=True)
class OpenCorpus:
    """The folder that `run_recipe` made."""

    folder: Path
    recipe: RecipeConfig
    unfinished: str = ""
    """How far the run is and what is left out, if stages are not done and the corpus is
    opened all the same; then the recipe is what is done of it."""

    @classmethod
    def open(
        cls, folder: Path | str, *, allow_unfinished: bool = False
    ) -> "OpenCorpus":
        """Opens the corpus in a folder. Raises MaxlmError: there is none, it is of
        another version, its sources are not all read, or its stages are not all done.

        Args:
            allow_unfinished: if a stage is not done, open the corpus as if the recipe
                ended before it, with the rules that need no more.
        """
        folder = Path(folder)
        try:
            text = (folder / RECIPE).read_text("utf-8")
            recipe = RecipeConfig.model_validate_json(
                verify_and_strip_json_digest(text)
            )
        except OSError as error:
            fix = "make one with maxlm corpus run RECIPE"
            raise MaxlmError(
                "there is no corpus here", where=str(folder), fix=fix
            ) from error
        except ValueError as error:  # Pydantic's, and bytes that are no UTF-8.
            what = "this corpus was made by another version of maxlm, or is damaged"
            raise MaxlmError(what, where=str(folder / RECIPE), fix=_AGAIN) from error
        corpus = cls(folder, recipe)
        for title in corpus.list_stages():
            try:
                corpus.read_manifest(title)
            except MaxlmError as error:
                done = corpus.count_shard_files(title)
                if title == DOCUMENTS:
                    message = f"the stage documents is not finished: {done} shards are read so far"
                    raise MaxlmError(message, where=str(folder), fix=_AGAIN) from error
                if not allow_unfinished:
                    raise
                return corpus.take_finished_stages(title)
        return corpus

    def list_stages(self) -> list[str]:
        """Lists the names of the corpus's stages, that of the documents first."""
        return [DOCUMENTS, *(stage.unique_name for stage in self.recipe.stages)]

    def verify(self) -> list[str]:
        """Reads every shard, and raises MaxlmError if one is not as it was written.

        Returns a line for each stage whose shards have no checksums of whole files.
        """
        unchecked = []
        for stage in self.list_stages():
            folder = self.folder / stage
            list_sha256 = self.read_manifest(stage).get("checksums_sha256")
            verify_shards(
                folder, [shard.path(stage) for shard in self.shards], list_sha256
            )
            if list_sha256 is None:
                unchecked.append(
                    f"{folder}: an earlier maxlm wrote these shards without checksums "
                    f"of whole "
                    "files: those of their pages are checked; the recipe, run again, "
                    "adds them"
                )
        return unchecked

    def read_checksums(self) -> dict[Path, str]:
        """Reads the SHA-256 of every file of the corpus's shards, but of stages without
        any."""
        digests: dict[Path, str] = {}
        for stage in self.list_stages():
            list_sha256 = self.read_manifest(stage).get("checksums_sha256")
            digests |= read_shard_checksums(self.folder / stage, list_sha256)
        return digests

    def count_shard_files(self, stage_name: str) -> int:
        """Counts the shards that a stage has written."""
        return len(list((self.folder / stage_name).glob("*.parquet")))

    def take_finished_stages(self, unfinished_stage: str) -> "OpenCorpus":
        """Returns the corpus as it is before a stage that is not done."""
        names = [stage.unique_name for stage in self.recipe.stages]
        position = names.index(unfinished_stage)
        first = self.recipe.model_copy(
            update={"stages": self.recipe.stages[:position], "keep": {}, "cut": ()}
        )
        keep = {}
        for name, text in self.recipe.keep.items():
            with suppress(MaxlmError):  # It names a label that is not there yet.
                resolve_rules(first, {name: text}, (), "")
                keep[name] = text
        cut = [
            label
            for label in self.recipe.cut
            if label.rpartition(".")[0] in names[:position]
        ]
        shards = len(self.read_manifest(DOCUMENTS)["shards"])
        parts = [
            f"not done: stage {unfinished_stage} is {position + 1} of {len(names)}, "
            f"{self.count_shard_files(unfinished_stage)} of its {shards} shards are "
            f"written"
        ]
        left_out = [name for name in self.recipe.keep if name not in keep]
        left_out += [f"cut {label}" for label in self.recipe.cut if label not in cut]
        if left_out:
            parts.append(f"rules that wait for it or later ones: {', '.join(left_out)}")
        parts.append(_AGAIN)
        recipe = first.model_copy(update={"keep": keep, "cut": tuple(cut)})
        return OpenCorpus(self.folder, recipe, "; ".join(parts))

    def read_manifest(self, stage_name: str) -> dict[str, Any]:
        """Reads the manifest of a stage's folder."""
        path = self.folder / stage_name / MANIFEST
        try:
            return json.loads(verify_and_strip_json_digest(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            what = f"the stage {stage_name} is not finished, or its manifest is damaged"
            raise MaxlmError(what, where=str(path), fix=_AGAIN) from error

    @cached_property
    def labels(self) -> dict[str, pa.DataType]:
        """The type of each label."""
        return get_label_types(self.recipe.stages)

    @cached_property
    def shards(self) -> list[StageShardView]:
        """The corpus's shards, in the order of its documents."""
        names = self.read_manifest(DOCUMENTS)["shards"]
        texts = get_text_stages(self.recipe.stages)
        return [StageShardView(self.folder, name, texts) for name in names]

    def list_settled_labels(self, rules: FilterRules) -> tuple[str, ...]:
        """Lists the labels that `rules` need and that depend on which copies are
        kept."""
        return plan_verdicts(self.recipe, rules, str(self.folder)).label_names

    def settle_rules(
        self, rules: FilterRules, progress: Progress = ignore_progress
    ) -> list[StageShardView]:
        """Returns the shards with verdicts as they are among the documents that `rules`
        keep; see `settling.settle_verdicts`. To be used wherever these rules are
        applied."""
        titles = [DOCUMENTS, *(stage.unique_name for stage in self.recipe.stages)]
        # Whole manifests: a stage whose folder was deleted may have made other labels
        # by one key.
        manifests = [json.dumps(self.read_manifest(title)) for title in titles]
        return settle_verdicts(
            self.recipe, self.shards, manifests, rules, str(self.folder), progress
        )

    def resolve_rules(
        self, keep: Mapping[str, str] | None = None, cut: Sequence[str] | None = None
    ) -> FilterRules:
        """Resolves rules for this corpus; None: those of its recipe. See
        `resolve_rules`."""
        keep = self.recipe.keep if keep is None else keep
        cut = self.recipe.cut if cut is None else cut
        return resolve_rules(self.recipe, keep, cut, str(self.folder))


class FilteredShard(NamedTuple):
    """A shard as a file of documents: what its `SourceFile.details` are."""

    shard: StageShardView
    rules: FilterRules
    sha256_by_path: dict[Path, str | None]
    """SHA-256 of each of the files that are read; None: its stage has no checksums."""


def mark_kept(table: pa.RecordBatch, rules: FilterRules) -> np.ndarray:
    """Marks documents that fulfil all rules and have a text: bool [rows]."""
    keep = table.column("text").is_valid().to_numpy(zero_copy_only=False)
    for rule in rules.keep.values():
        keep = keep & rule.evaluate(table)
    return keep


def read_filtered_documents(
    shard: StageShardView, rules: FilterRules, columns: Sequence[str] = ("id",)
) -> Iterator[tuple[tuple[Any, ...], str | None]]:
    """Yields the values of `columns` and the text of each document of a shard, in
    order; None for a text that the rules drop.

    Spans of all the labels in `rules.cut` are cut out of the text.
    """
    needed = dict.fromkeys([*columns, "text", *rules.label_names, *rules.cut])
    for table in shard.read_row_groups(list(needed)):
        keep = mark_kept(table, rules)
        texts = remove_cut_spans(table.filter(pa.array(keep)), rules)
        values = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        for row, keeps in zip(values, keep, strict=True):
            yield row, next(texts) if keeps else None


def remove_cut_spans(table: pa.RecordBatch, rules: FilterRules) -> Iterator[str]:
    """Yields the texts of documents without the spans of all the labels in
    `rules.cut`."""
    spans = [table.column(label).to_pylist() for label in rules.cut]
    for i, text in enumerate(table.column("text").to_pylist()):
        cuts = [
            (span["start"], span["end"]) for each in spans for span in each[i] or ()
        ]
        yield remove_spans(text, cuts) if cuts else text


def list_corpus_files(folder: Path, source: FilesConfig) -> list[SourceFile]:
    """Lists the shards of the corpus in `folder`, as files."""
    corpus = OpenCorpus.open(folder)
    chosen = source if isinstance(source, SourceConfig) else None
    rules = corpus.resolve_rules(chosen and chosen.keep, chosen and chosen.cut)
    labels, files = ["text", *rules.label_names, *rules.cut], []
    digests = corpus.read_checksums()
    for shard in corpus.settle_rules(rules):
        stages = {
            stage for label in labels for stage, _ in shard.find_column_sources(label)
        }
        path = shard.path(DOCUMENTS)
        extra_paths = tuple(shard.path(s) for s in sorted(stages - {DOCUMENTS}))
        state = path.stat()
        files.append(
            SourceFile(
                path=path,
                name=f"{folder}/{shard.name}",
                format="corpus",
                compression="none",
                size=state.st_size,
                mtime_ns=state.st_mtime_ns,
                extra_paths=extra_paths,
                details=FilteredShard(
                    shard,
                    rules,
                    {path: digests.get(path) for path in (path, *extra_paths)},
                ),
            )
        )
    return files


def read_corpus_slice(part: FileSlice) -> Iterator[Document | None]:
    """Reads the documents of a shard; None for each that the rules drop."""
    filtered: FilteredShard = part.file.details
    for path, digest in filtered.sha256_by_path.items():
        check_shard(path, digest)
    for (document_id,), text in read_filtered_documents(filtered.shard, filtered.rules):
        yield None if text is None else Document(document_id, text.encode())


def describe_filter_rules(files: Iterable[SourceFile]) -> str:
    """Describes the rules that decide what is taken from corpora, as JSON."""
    rules = {file.details.shard.folder: file.details.rules for file in files}
    return json.dumps([each.describe() for each in rules.values()])


def find_document(
    corpus: OpenCorpus, document_id: str
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Finds a document by its id; raises MaxlmError if there is none. Returns its
    newest text, columns and labels, by name; whether it fulfils each rule, by the
    rule's name."""
    hidden = [
        f"{stage.unique_name}.{name}"
        for stage in corpus.recipe.stages
        if isinstance(stage, CrossDocumentStage)
        for name in stage.internal_labels
    ]
    shown = [name for name in corpus.labels if name not in hidden]
    columns = ["id", "source", "url", "meta", "text", *shown]
    rules = corpus.resolve_rules()
    for shard in corpus.settle_rules(rules):
        for group, ids in enumerate(shard.read_row_groups(["id"])):
            row = ids.column("id").index(document_id).as_py()
            if row >= 0:
                tables = shard.read_row_groups(list(dict.fromkeys(columns)))
                table = next(islice(tables, group, None)).slice(row, 1)
                passed = {
                    name: bool(rule.evaluate(table)[0])
                    for name, rule in rules.keep.items()
                }
                return table.to_pylist()[0], passed
    fix = "ids are in the report, or in the column id of documents/*.parquet"
    raise MaxlmError(
        f"there is no document {document_id!r}", where=str(corpus.folder), fix=fix
    )
