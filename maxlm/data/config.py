"""The data of a run: sources, their weights, and how they become batches."""

from pydantic import Field, model_validator

from maxlm.config import FileName, LocalPath, MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.loader.batches import LoaderConfig
from maxlm.data.loader.mixture import Mixing, Phase, check_phases


class MixtureSource(SourceConfig):
    """One source of a mixture: documents to tokenize, or a store that is already
    built."""

    documents: tuple[LocalPath, ...] = ()
    """Files, folders, globs, `python-stdlib` or `python-package:NAME`, as in `maxlm
    corpus build`; tokenized once, into the run's folder."""
    name: FileName = "text"
    """A short name, also of the source's folder; its order of reading depends on it."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the sequences a step takes from this source, relative to the others; 0
    for a source that only later `phases` read."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Times that it may be read, also in part (2.5). After that its weight goes to the
    others, in proportion to theirs. null: no limit."""
    store: str | None = None
    """A token store built before, instead of documents: a folder, or a `gs://` or
    `s3://` URL."""
    store_segments: int | None = Field(default=None, ge=1)
    """Read the store as it was when it had so many segments (`maxlm corpus append` adds
    one), so that a run resumes with the batches it would have had; null: all."""
    heldout_store: str | None = None
    """Held-out part of the store, if there is one."""

    @model_validator(mode="after")
    def _one_origin(self):
        if bool(self.documents) == bool(self.store):
            raise ValueError("give either documents or a store")
        if self.store_segments and not self.store:
            raise ValueError("store_segments goes with store")
        if self.heldout_store and not self.store:
            raise ValueError(
                "heldout_store goes with store; documents are split by hash"
            )
        return self


class DataConfig(LoaderConfig):
    """Sources and batches."""

    sources: tuple[MixtureSource, ...] = ()
    """Sources that are mixed."""
    temperature: float | None = Field(default=None, gt=0)
    """A number T makes shares proportional to weight × tokens^(1/T): 1 mixes sources by
    their size, more brings them closer to their bare weights (mT5's alpha is 1/T: Xue
    et al. 2021). null takes the weights as they are, whatever the sizes."""
    phases: tuple[Phase, ...] = ()
    """Other weights from some step on, such as more of the best text at the end. Each
    source goes on where it stood; an order of reading begun is never begun anew."""
    heldout_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of documents kept out of training for evaluation, chosen by a hash of their
    text."""
    build_workers: int | None = Field(default=None, ge=1)
    """Processes that tokenize documents, or rows of files; null: one a core."""

    @model_validator(mode="after")
    def _names_differ(self):
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ: {', '.join(names)}")
        try:
            check_phases(self.phases, names)
        except MaxlmError as error:
            raise ValueError(str(error)) from error
        return self

    def mixing(self) -> Mixing:
        """Returns the settings by which the loader mixes the sources."""
        max_epochs = {
            source.name: source.max_epochs
            for source in self.sources
            if source.max_epochs is not None
        }
        return Mixing(
            weights={source.name: source.weight for source in self.sources},
            max_epochs=max_epochs,
            temperature=self.temperature,
            phases=self.phases,
        )
