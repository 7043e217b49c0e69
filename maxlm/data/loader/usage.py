"""The part of each source that a mixture reads, step by step, before anything is
trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from maxlm.data.loader.batches import Batches
from maxlm.data.loader.mixture import Phase


@dataclass(frozen=True)
class SourceUsage:
    """The part of one source that some steps read."""

    source: str
    first_step: int
    stop_step: int
    """One past the last step."""
    sequences: int
    share: float
    """Fraction of all sequences of these steps."""
    tokens: int
    """Tokens, rounded: a sequence counts as the mean of its source's."""
    epochs: float
    """Times that these steps read the source."""
    epochs_so_far: float
    """Times that the source was read when these steps are over."""


def summarize_source_usage(
    batches: Batches, first_step: int, stop_step: int
) -> list[SourceUsage]:
    """Returns what steps `first_step` to `stop_step` (not included) of a mixture's
    batches read of each source, in the sources' order. Steps past its end count as
    nothing. O(1) in the steps."""
    mixture = batches.mixture
    assert mixture is not None, "one pass over a store is no mixture"
    before = mixture.count_sequences_before(first_step * batches.batch_size)
    after = mixture.count_sequences_before(stop_step * batches.batch_size)
    total = sum(after.values()) - sum(before.values())
    usages = []
    for name, packing in zip(mixture.names, batches.sources, strict=True):
        sequences = after[name] - before[name]
        epochs = sequences / packing.num_sequences
        usages.append(
            SourceUsage(
                source=name,
                first_step=first_step,
                stop_step=stop_step,
                sequences=sequences,
                share=sequences / max(1, total),
                tokens=round(epochs * packing.store.num_tokens),
                epochs=epochs,
                epochs_so_far=after[name] / packing.num_sequences,
            )
        )
    return usages


def list_phase_steps(phases: Sequence[Phase], num_steps: int) -> list[tuple[int, int]]:
    """Lists the (first step, one past the last) of each phase of a run of so many
    steps, and of each ramp between two, in order."""
    edges = {0, num_steps}
    for phase in phases:
        edges |= {phase.from_step, phase.from_step + phase.ramp_steps}
    edges_of_run = sorted(edge for edge in edges if edge <= num_steps)
    return list(pairwise(edges_of_run))
