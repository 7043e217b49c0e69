"""What a run is fed: sources, their weights, and how they become batches."""

from pydantic import Field, model_validator

from maxlm.data.corpus.config import SourceConfig
from maxlm.data.loader.loader import LoaderConfig


class MixtureSource(SourceConfig):
    """One source of a mixture: documents to tokenize, or a store that is already built."""

    documents: tuple[str, ...] = ()
    """Files, folders, globs or `python-stdlib`, as in `maxlm corpus build`; tokenized once, into
    the run's folder."""
    name: str = "text"
    """A short name, also of the source's folder; its order of reading depends on it."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the sequences a step takes from this source, relative to the others."""
    store: str | None = None
    """A token store built before, instead of documents."""
    heldout_store: str | None = None
    """Its held-out part, if there is one."""

    @model_validator(mode="after")
    def _one_origin(self):
        if bool(self.documents) == bool(self.store):
            raise ValueError("give either documents or a store")
        if self.heldout_store and not self.store:
            raise ValueError("heldout_store goes with store; documents are split by hash")
        return self

    def corpus(self) -> SourceConfig:
        """How to read its documents."""
        return SourceConfig(**{k: getattr(self, k) for k in SourceConfig.model_fields})


class DataConfig(LoaderConfig):
    """Sources and batches."""

    sources: tuple[MixtureSource, ...] = ()
    """What is mixed."""
    heldout_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of documents kept out of training for evaluation, chosen by a hash of their text."""
    build_workers: int | None = Field(default=None, ge=1)
    """Processes that tokenize documents; null: one a core."""

    @model_validator(mode="after")
    def _names_differ(self):
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ: {', '.join(names)}")
        return self
