"""The part of each source that a run's mixture reads: what `maxlm corpus mix` shows."""

from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.data.loader.batches import make_batches
from maxlm.data.loader.usage import (
    SourceUsage,
    list_phase_steps,
    summarize_source_usage,
)
from maxlm.run.config import RunConfig
from maxlm.run.prepare import check_prepared_data, prepare_data
from maxlm.train.run_folder import create_run_folder


def prepare_mixture(config: RunConfig) -> list[SourceUsage]:
    """Prepares a run's text in its folder, and returns what its steps read of each
    source: in each phase and ramp, and last in all of them. Raises MaxlmError: no
    sources, text that was prepared with another config, or anything that `prepare_data`
    refuses."""
    if not config.data.sources:
        fix = "name documents or stores there"
        raise MaxlmError("there are no sources to mix", where="data.sources", fix=fix)
    folder = Path(config.folder, config.name)
    check_prepared_data(config, folder)
    with create_run_folder(config, folder):
        stores = prepare_data(config, folder).train_stores
    batches = make_batches(stores, config.data.mixing(), config.data, seed=config.seed)
    steps = list_phase_steps(config.data.phases, config.train.steps)
    if len(steps) > 1:
        steps.append((0, config.train.steps))
    return [
        usage
        for first_step, stop_step in steps
        for usage in summarize_source_usage(batches, first_step, stop_step)
    ]
