"""Token stores to batches: the batch at step s is a pure function of (stores, mixture,
seed, s)."""

from maxlm.data.loader.batches import (
    LoaderConfig,
    check_num_steps,
    load_batches,
    make_batches,
    make_one_pass_batches,
)
from maxlm.data.loader.mixture import Mixing, Phase
from maxlm.data.loader.packing import TokenSource
from maxlm.data.loader.usage import (
    SourceUsage,
    list_phase_steps,
    summarize_source_usage,
)

__all__ = [
    "LoaderConfig",
    "Mixing",
    "Phase",
    "SourceUsage",
    "TokenSource",
    "check_num_steps",
    "list_phase_steps",
    "load_batches",
    "make_batches",
    "make_one_pass_batches",
    "summarize_source_usage",
]
