"""Training, from a config to a trained model: the story of `maxlm train`."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from pydantic import ValidationError

from maxlm.config import MaxlmError, to_yaml
from maxlm.data.store import TokenStore
from maxlm.data.store.manifest import read_manifest
from maxlm.data.work.paths import replacing
from maxlm.plan.predict import Machine, Plan, predict
from maxlm.plan.show import planned_words
from maxlm.programs.evaluation import held_out
from maxlm.programs.feed import training_batches
from maxlm.programs.prepare import (
    Corpus,
    check_prepared,
    planned_vocab,
    prepare,
    preparing,
    without_settings,
)
from maxlm.programs.record import recorder
from maxlm.programs.setup import Setup, run_folder, set_up, use_compilation_cache
from maxlm.run import IDENTITY, INCIDENTAL, RunConfig, vocab_fits
from maxlm.sharding import links
from maxlm.train.checkpoint import Checkpointer, check_same, group_sizes
from maxlm.train.display import ConsoleDisplay, plot_loss
from maxlm.train.loop import Hooks, train
from maxlm.train.metrics import MetricsLog, read_records
from maxlm.train.state import TrainState

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    setup: Setup
    corpus: Corpus
    plan: Plan
    start: int
    """The step that it began or went on from."""
    state: TrainState
    folder: Path
    heldout: dict[str, dict[str, float]]
    """Per source; see ``held_out``."""


def pretrain(config: RunConfig, *, resume: str | Path | None = None, say: Say = print) -> Trained:
    """Train a model, or go on from the newest checkpoint in its folder.

    Args:
        resume: another run's folder to go on from; what follows is kept in this run's own.
        say: told, on process 0, what happens.

    Raises:
        MaxlmError: anything wrong with the config, the text, the devices or the folder;
            interrupted.
    """
    lead = jax.process_index() == 0
    say = say if lead else lambda _: None
    folder = run_folder(config)
    # What does not fit is refused before anything is written or read.
    setup = set_up(config)
    use_compilation_cache(config)
    vocab_fits(config, planned_vocab(config, folder))
    with ExitStack() as stack:
        origin = _origin(setup, folder, resume, stack)
        beginning = None if origin else _beginning(setup, stack)
        with preparing(config, folder, lead=lead):
            corpus = _prepare_together(config, folder)
        metadata = {
            "config": config.model_dump(mode="json"),
            "tokenizer": corpus.tokenizer.fingerprint,
            "stores": {name: _described(store) for name, store in corpus.training.items()},
        }
        if before := origin or beginning:
            metadata |= _published(before, corpus.tokenizer.fingerprint)
        if origin:
            state = _restore(setup, origin, metadata, corpus, say)
        else:
            state = _started(setup, beginning, say)
        start = int(state.step)
        if start > config.train.steps:
            raise MaxlmError(
                f"the run is at step {start}, train.steps={config.train.steps}",
                where=str(folder),
                fix=f"set train.steps to {start} or more, or train in another run folder",
            )
        plan = predict(
            config,
            Machine.here(setup.mesh.devices.ravel().tolist()),
            sizes=dict(setup.mesh.shape),
            links=links(setup.mesh),
        )
        say(planned_words(plan))
        if lead:
            described = {
                "config.yaml": to_yaml(config),
                "plan.json": f"{json.dumps(plan.to_json(), indent=2)}\n",
            }
            for name, text in described.items():
                with replacing(folder / name) as temporary:
                    temporary.write_text(text)
        keeper = stack.enter_context(
            Checkpointer(
                folder / "checkpoints", config.checkpoint, grouped=group_sizes(setup.specs)
            )
        )
        log = stack.enter_context(MetricsLog(folder, start, write=lead))
        log.event("resume" if start else "start", start, devices=jax.device_count())
        eval_step = setup.evaluation_function()

        def quick_evaluation(state: TrainState) -> Mapping[str, float]:
            batches = config.train.eval_batches
            read = (corpus.heldout, corpus.vocabulary, batches)
            results = held_out(setup, eval_step, parameters(state), *read)
            return _evaluation_record(config, int(state.step), results)

        with (
            training_batches(
                setup, corpus.training, config.data.mixing(), corpus.vocabulary, start
            ) as batches,
            ConsoleDisplay(config.train.steps, start, show=lead) as display,
        ):
            state = train(
                state,
                setup.step_function(),
                batches,
                config=config.train,
                hooks=Hooks(
                    record=recorder(setup, corpus, plan, log, display),
                    evaluate=quick_evaluation if corpus.heldout else None,
                    event=log.event,
                ),
                checkpointer=keeper,
                metadata=metadata,
                folder=str(folder),
            )
        read = (corpus.heldout, corpus.vocabulary)
        results = held_out(setup, eval_step, parameters(state), *read)
        if lead:
            if results and not _evaluated_at(folder, int(state.step)):
                log.log(int(state.step), _evaluation_record(config, int(state.step), results))
            (folder / "plots").mkdir(exist_ok=True)
            plot_loss(folder / "metrics.jsonl", folder / "plots" / "loss.png")
    return Trained(setup, corpus, plan, start, state, folder, results)


def _evaluation_record(
    config: RunConfig, step: int, results: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """``eval_loss`` is over the tokens of all sources, the rates are each source's own."""
    counted = sum(result["tokens"] for result in results.values())
    loss = sum(result["loss"] * result["tokens"] for result in results.values()) / counted
    tokens = step * config.data.batch_size * config.data.seq_len
    record = {"tokens": tokens, "eval_loss": loss}
    return record | {
        f"eval_bits_per_byte/{name}": result["bits_per_byte"]
        for name, result in results.items()
        if "bits_per_byte" in result
    }


def _evaluated_at(folder: Path, step: int) -> bool:
    """Whether the evaluation that ends a run is in its records: it may be started once more."""
    records = read_records(folder / "metrics.jsonl")
    return any(record["step"] == step and "eval_loss" in record for record in records)


def parameters(state: TrainState) -> Any:
    """The parameters to use a model with: their moving average where there is one."""
    return state.params if state.ema is None else state.ema


def _prepare_together(config: RunConfig, folder: Path) -> Corpus:
    """Process 0 builds what is missing, the others wait and open it."""
    corpus = prepare(config, folder) if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus")
    return corpus or prepare(config, folder)


def _origin(
    setup: Setup, folder: Path, resume: str | Path | None, stack: ExitStack
) -> Checkpointer | None:
    """The checkpoints to go on from: this run's own, else those of the one to resume, else none.

    Raises:
        MaxlmError: they, or the text prepared here, are of another config; none to resume from.
    """
    now = _lasting(setup.config.model_dump(mode="json"))
    for home, required in ((folder, False), (resume, True)):
        if home is None or not (required or (Path(home) / "checkpoints").is_dir()):
            continue
        keeper = stack.enter_context(
            Checkpointer(
                Path(home) / "checkpoints", read_only=True, grouped=group_sizes(setup.specs)
            )
        )
        if required or keeper.latest() is not None:
            saved = _lasting(_completed(keeper.metadata()["config"]))
            check_same(saved, now, IDENTITY, str(keeper.folder))
            return keeper
    check_prepared(setup.config, folder)
    return None


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the settings that are newer than it, at their defaults."""
    try:
        return RunConfig.model_validate(saved).model_dump(mode="json")
    except (ValidationError, MaxlmError):  # What is wrong with it shows in the comparison.
        return saved


def _described(store: TokenStore) -> dict[str, Any]:
    """What tells whether a store still holds the documents that it held."""
    counts = {"documents": store.num_documents, "tokens": store.num_tokens}
    digest = store.manifest.tokens_sha256  # None: an older version made the store.
    return counts | {"offsets_sha256": store.offsets_sha256, "tokens_sha256": digest}


def _check_stores(
    config: RunConfig,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    corpus: Corpus,
    where: str,
) -> None:
    """
    Raises:
        MaxlmError: a store is not what it was when the checkpoint was written.
    """
    for source in config.data.sources:
        name = source.name
        # An older run, or store, has no hash of tokens.
        if name not in before or all(
            now[name][key] == value or None in (now[name][key], value)
            for key, value in before[name].items()
        ):
            continue
        was, became = (
            f"{each['documents']:,} documents, {each['tokens']:,} tokens"
            for each in (before[name], now[name])
        )
        fix = "give it the documents that it had, or train in another run folder"
        whole = read_manifest(corpus.training[name].place)
        for count in range(1, len(whole.segments) + 1 if source.store else 1):
            if whole.first(count).offsets_sha256 == before[name]["offsets_sha256"]:
                fix = f"set store_segments: {count} for it, or train in another run folder"
        what = f"the store of source {name!r} is not what it was ({was}; now {became})"
        raise MaxlmError(what, where=where, fix=fix)


def _restore(
    setup: Setup, origin: Checkpointer, metadata: Mapping[str, Any], corpus: Corpus, say: Say
) -> TrainState:
    saved = origin.metadata()
    check_same(saved, metadata, ("tokenizer",), str(origin.folder))
    # Checkpoints of older versions say nothing of stores.
    before = saved.get("stores", {})
    _check_stores(setup.config, before, metadata["stores"], corpus, str(origin.folder))
    state = origin.restore(None, setup.abstract_state)
    say(f"resuming from step {int(state.step)} in {origin.folder}")
    return state


def _beginning(setup: Setup, stack: ExitStack) -> Checkpointer | None:
    """The checkpoints of the run whose parameters this one is to start from, if there is one.

    Raises:
        MaxlmError: none there, or of another model.
    """
    home = setup.config.train.start_from
    if home is None:
        return None
    folder = Path(home) / "checkpoints"
    keeper = stack.enter_context(
        Checkpointer(folder, read_only=True, grouped=group_sizes(setup.specs))
    )
    keeper.check_params(None, setup.abstract_state.params, _averaged(keeper))
    return keeper


def _averaged(keeper: Checkpointer) -> str:
    """Under which name the parameters are that a run is judged by."""
    average = keeper.metadata()["config"]["train"].get("ema_decay") is not None
    return "ema" if average else "params"


def _started(setup: Setup, beginning: Checkpointer | None, say: Say) -> TrainState:
    """A fresh state, with another run's parameters where there is one."""
    state = setup.init()
    if beginning is None:
        return state
    abstract = setup.abstract_state.params
    params = beginning.restore_params(None, abstract, _averaged(beginning))
    say(f"starting from the parameters in {beginning.folder.parent}")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, ema=ema)


def _published(before: Checkpointer, tokenizer: str) -> dict[str, dict[str, Any]]:
    """What export should know of the published model that the parameters once were, if any: its
    family and, while the tokenizer is still its own, its token ids."""
    saved = before.metadata()
    if (known := saved.get("published")) is None:
        return {}
    kept = ("family", "tokens") if saved["tokenizer"] == tokenizer else ("family",)
    return {"published": {key: known[key] for key in kept if key in known}}


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the settings that may change from one start to the next.

    ``store_segments`` may so that a run can go on after an append to its store: what the store
    then holds is compared.
    """
    config = without_settings(config, ("store_segments",))
    return {
        part: {k: v for k, v in settings.items() if f"{part}.{k}" not in INCIDENTAL}
        if isinstance(settings, Mapping)
        else settings
        for part, settings in config.items()
    }
