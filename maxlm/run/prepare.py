"""A run's tokenizer and token stores: made once in its folder, then found there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.checkpoint.reading import check_same_settings
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.data.batch_source import BatchSource
from maxlm.data.config import MixtureSource
from maxlm.data.documents.config import SourceConfig
from maxlm.data.loader.batches import check_num_steps
from maxlm.data.loader.packing import TokenSource, describe_missing_checksums
from maxlm.data.store.manifest import Split
from maxlm.data.store.store import TokenStore, check_tokenizer
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.prompts import encode_prompts
from maxlm.run.config import PREPARED, READING, RunConfig, check_samples
from maxlm.runtime.progress import show_progress
from maxlm.tasks import SourceInputs, Vocabulary


@dataclass(frozen=True)
class PreparedData:
    """A run's tokenizer, stores and batches."""

    tokenizer: Tokenizer
    train_stores: dict[str, TokenStore]
    heldout_stores: dict[str, TokenStore]
    train_batch_source: BatchSource
    eval_batch_sources: Mapping[str, BatchSource]
    """The batches to evaluate on, by name."""
    unchecked: tuple[str, ...] = ()
    """Lines that say which files `data.verify` could not check."""


def prepare_data(config: RunConfig, folder: Path) -> PreparedData:
    """Train the tokenizer and build the stores, where that is not done yet, and open
    them.

    With several processes call it on one of them first: the others then only open.
    """
    sources = config.data.sources
    if not sources and config.task.reads_text:
        message = "no text to train on"
        fix = "name documents or a store there"
        raise MaxlmError(message, where="data.sources", fix=fix)

    # The tokenizer, which must suit the model, the task and the samples to draw.
    tokenizer_folder = prepare_tokenizer(config, folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    config.task.check_vocab_size(tokenizer.vocab_size, config.model.vocab_size)
    check_placeholder(config, tokenizer)
    check_frozen_tokenizers(config, tokenizer)
    # An encoder reads a prompt as a document; a decoder goes on from it.
    as_documents = config.model.transformer_type == "encoder_decoder"
    prompts = encode_prompts(
        tokenizer, config.samples.prompts, as_documents=as_documents
    )
    prompt_lengths = [config.num_virtual_tokens + len(ids) for ids in prompts]
    check_samples(config.samples, config.model, prompt_lengths)

    # The stores.
    all_training: dict[str, TokenStore] = {}
    all_heldout: dict[str, TokenStore] = {}
    for source in sources:
        store_folder = folder / "data" / source.name
        training, heldout = _prepare_stores(
            config, source, tokenizer_folder, store_folder
        )
        all_training[source.name] = training
        if heldout is not None:
            all_heldout[source.name] = heldout

    # The batches.
    inputs = make_source_inputs(config, tokenizer, all_training, all_heldout)
    # Refuses a store shorter than a sequence, and builds what indices are missing.
    batches = config.task.batch_source(inputs)
    check_num_steps(batches, config.train.steps)
    evaluation = config.task.evaluation_sources(inputs)
    unchecked: list[str] = []
    if config.data.verify:
        for store in [*all_training.values(), *all_heldout.values()]:
            unchecked += describe_missing_checksums(store)
    return PreparedData(
        tokenizer, all_training, all_heldout, batches, evaluation, tuple(unchecked)
    )


def make_source_inputs(
    config: RunConfig,
    tokenizer: Tokenizer,
    stores: Mapping[str, TokenSource] = MappingProxyType({}),
    heldout: Mapping[str, TokenSource] = MappingProxyType({}),
    vocabulary: Vocabulary | None = None,
) -> SourceInputs:
    """Returns what a task makes its batches from; ``vocabulary``: default, the
    tokenizer's."""
    return SourceInputs(
        loader=config.data,
        seed=config.seed,
        vocabulary=vocabulary or make_vocabulary(tokenizer, config.model.vocab_size),
        tokenizer=tokenizer,
        stores=stores,
        heldout=heldout,
        mixing=config.data.mixing(),
        frontend=config.model.frontend,
        start_id=getattr(config.model, "start_id", 0),
        num_virtual_tokens=config.num_virtual_tokens,
        build_workers=config.data.build_workers,
    )


def check_placeholder(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuses a frontend whose placeholder is a token that text has."""
    frontend = config.model.frontend
    if frontend is None or frontend.placeholder_id >= tokenizer.vocab_size:
        return
    if frontend.placeholder_id in tokenizer.special_tokens.values():
        return
    message = f"{frontend.placeholder_id} is a token that text may have"
    fix = f"name a special token, or an id from {tokenizer.vocab_size} on"
    raise MaxlmError(message, where="model.frontend.placeholder_id", fix=fix)


def check_frozen_tokenizers(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuses models that the task reads and that know other tokens than the run's."""
    for name, source in config.task.frozen_models().items():
        if source is None:  # the model that training starts from
            continue
        other_tokenizer = load_tokenizer(Path(source, "tokenizer"))
        if other_tokenizer.fingerprint != tokenizer.fingerprint:
            message = f"the frozen model {name!r} was trained with another tokenizer"
            fix = "name a run with this run's, or name that run's in tokenizer.path"
            raise MaxlmError(message, where=source, fix=fix)


def prepare_data_on_all_hosts(config: RunConfig, folder: Path) -> PreparedData:
    """Prepares on process 0 what is missing; the others wait and open it."""
    prepared = prepare_data(config, folder) if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("corpus")
    return prepared or prepare_data(config, folder)


def make_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> Vocabulary:
    """Describes a tokenizer's ids, as tasks need to know them.

    A word begins where a token's text does not go on with a letter or digit: at a
    space, a sign, or what a WordPiece vocabulary does not mark as a continuation. Of
    the ``model_vocab_size`` rows of the model's table those past the tokenizer's ids
    are special, and so are ids without a text.
    """
    special = np.ones(model_vocab_size, bool)
    special[: tokenizer.vocab_size] = False
    special[list(tokenizer.special_tokens.values())] = True
    starts_word = np.ones(model_vocab_size, bool)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode_bytes([token], continued=True)
        special[token] |= not text
        # Bytes of a character in the middle are neither, and go on with what came
        # before.
        first = text.decode("utf-8", "replace")[:1]
        starts_word[token] = not (first.isalnum() or first == "\ufffd")
    opening = tuple(tokenizer.prefix_ids)
    return Vocabulary(model_vocab_size, opening, tokenizer.eos_id, special, starts_word)


def check_prepared_data(config: RunConfig, folder: Path) -> None:
    """Raises MaxlmError if the text in the folder was prepared with another config."""
    path = folder / "config.yaml"
    if path.exists():
        before = load_config(RunConfig, path).value
        check_same_settings(
            before.model_dump(mode="json"),
            config.model_dump(mode="json"),
            PREPARED,
            str(folder),
            action="the text here was prepared",
            ignored=READING,
        )


def read_vocab_size(config: RunConfig, folder: Path | None = None) -> int:
    """Counts the ids of a run's tokenizer; ``folder``: the run's own, where it may have
    one."""
    path = _find_named_tokenizer(config)
    if folder is not None and (folder / "tokenizer").exists():
        path = folder / "tokenizer"
    if path is None:  # it will be trained
        return config.tokenizer.vocab_size
    return load_tokenizer(path).vocab_size


def prepare_tokenizer(config: RunConfig, folder: Path) -> Path:
    """Prepares the run's own tokenizer: a copy of the one named, or one trained on its
    text."""
    run_tokenizer_folder = folder / "tokenizer"
    if run_tokenizer_folder.exists():
        return run_tokenizer_folder
    # Both come with much that a run which finds its tokenizer does not need.
    from maxlm.data.tokenizer.chat import add_chat_template
    from maxlm.data.tokenizer.train import train_tokenizer

    path = _find_named_tokenizer(config)
    if path is not None:
        tokenizer = load_tokenizer(path)
        # Stores of another tokenizer are refused before anything is written.
        for source in config.data.sources:
            if source.store is not None:
                _open_named_stores(source, tokenizer)
        _check_extra_tokens(tokenizer, config)
        add_chat_template(tokenizer, config.tokenizer)
    else:
        try:
            tokenizer = train_tokenizer(config.tokenizer, _read_training_texts(config))
        except MaxlmError as error:
            where = error.where or "data.sources"
            raise MaxlmError(error.message, where=where, fix=error.fix) from None
    tokenizer.save(run_tokenizer_folder)
    return run_tokenizer_folder


def _check_extra_tokens(tokenizer: Tokenizer, config: RunConfig) -> None:
    """Refuses special tokens that a tokenizer which is used as it is does not have."""
    special = tokenizer.special.ids
    missing = [
        name for name in config.tokenizer.extra_special_tokens if name not in special
    ]
    if missing:
        message = f"the tokenizer that is used has no special token {missing[0]}"
        fix = "tune the model with them (maxlm tune --base), which grows its vocabulary"
        raise MaxlmError(message, where="tokenizer.extra_special_tokens", fix=fix)


def _find_named_tokenizer(config: RunConfig) -> Path | None:
    """A tokenizer that is there: the one named, or that of the run to start from."""
    if config.tokenizer.path is not None:
        return Path(config.tokenizer.path)
    start = config.train.start_from
    return None if start is None else Path(start) / "tokenizer"


def _read_training_texts(config: RunConfig) -> Iterator[bytes]:
    # Imported here, since documents are read only where a tokenizer is trained.
    from maxlm.data.documents.document import is_heldout
    from maxlm.data.documents.reader import read_documents

    sources = [source for source in config.data.sources if source.documents]
    if not sources and config.task.reads_text:
        message = "a store was made with a tokenizer, and none is named"
        fix = "name the folder of the tokenizer the stores were built with"
        raise MaxlmError(message, where="tokenizer.path", fix=fix)
    if not sources:
        message = "no tokenizer, and no model to start from"
        fix = "name a run's or a Hugging Face folder: --base FOLDER, or "
        fix += "train.start_from=FOLDER"
        raise MaxlmError(message, where="train.start_from", fix=fix)
    for source in sources:
        for document in read_documents(source):
            if not is_heldout(document.text, config.data.heldout_fraction):
                yield document.text


def _prepare_stores(
    config: RunConfig, source: MixtureSource, tokenizer_folder: Path, folder: Path
) -> tuple[TokenStore, TokenStore | None]:
    """Opens a source's stores, training and held out; builds in ``folder`` those that
    are missing."""
    tokenizer = load_tokenizer(tokenizer_folder)
    if source.store is not None:
        return _open_named_stores(source, tokenizer, verify=config.data.verify)
    stores: dict[str, TokenStore] = {}
    for split in _list_splits(source, config.data.heldout_fraction, folder):
        path = folder / split
        if not path.exists():
            _build_store(config, source, tokenizer_folder, path, split)
        store = TokenStore.open(path, verify=config.data.verify)
        check_tokenizer(store, tokenizer)
        stores[split] = store
    training = stores["train"] if "train" in stores else stores["all"]
    return training, stores.get("heldout")


def _build_store(
    config: RunConfig,
    source: MixtureSource,
    tokenizer_folder: Path,
    folder: Path,
    split: Split,
) -> None:
    # Building reads documents, in processes of its own: a run that finds its stores
    # needs none of that.
    from maxlm.data.store.build import build_store

    with show_progress() as progress:
        build_store(
            source,
            tokenizer_folder,
            folder,
            split=split,
            heldout_fraction=config.data.heldout_fraction,
            workers=config.data.build_workers,
            progress=progress,
        )


def _open_named_stores(
    source: MixtureSource, tokenizer: Tokenizer, *, verify: bool = False
) -> tuple[TokenStore, TokenStore | None]:
    """Stores built before, if this tokenizer made them."""
    assert source.store is not None
    training = TokenStore.open(
        source.store, segments=source.store_segments, verify=verify
    )
    heldout = None
    if source.heldout_store is not None:
        heldout = TokenStore.open(source.heldout_store, verify=verify)
    check_tokenizer(training, tokenizer)
    if heldout is not None:
        check_tokenizer(heldout, tokenizer)
    return training, heldout


def _list_splits(
    source: SourceConfig, fraction: float, folder: Path
) -> tuple[Split, ...]:
    """The stores a source gets: of few documents all may fall on one side of the
    split."""
    if (folder / "all").exists():
        return ("all",)
    if (folder / "heldout").exists():
        return "train", "heldout"

    # Imported here, since documents are read only where stores are missing.
    from maxlm.data.documents.document import is_heldout
    from maxlm.data.documents.reader import read_documents

    sides = set()
    for document in read_documents(source):
        sides.add(is_heldout(document.text, fraction))
        if len(sides) == 2:
            return "train", "heldout"
    return ("all",)
