"""A mixture's settings, turned into weights by global index, and back into a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import isfinite

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.loader.batches import Batches
from maxlm.data.loader.mixture import Mixture

# A ramp is so many steps of a stair: each change of weights costs a look-up one segment more.
RAMP_STAIRS = 16
# Far below the least share that a mixture can keep, far above where floats end.
_LEAST_SIZE = 1e-100
_LARGE, _SMALLER = 2.0**900, 2.0**-200

Weights = Mapping[str, float]


class Phase(Config):
    """Weights from some step on."""

    from_step: int = Field(ge=0)
    """The first step with these weights."""
    weights: dict[str, float] = Field(min_length=1)
    """By source, at least 0, which reads nothing of it. A source that is not named here has its
    own weight."""
    ramp_steps: int = Field(default=0, ge=0)
    """Over how many steps, from `from_step` on, shares move from the ones before to these, along a
    straight line in 16 stairs; 0 changes them at once."""


@dataclass(frozen=True)
class Mixing:
    """How sources are mixed; see `maxlm.data.config.DataConfig` for what the fields mean."""

    weights: Weights
    """By source."""
    max_epochs: Weights = field(default_factory=dict)
    """How often a source may be read, by source; those not named have no limit."""
    temperature: float | None = None
    phases: tuple[Phase, ...] = ()

    def mixture(
        self,
        tokens: Mapping[str, int],
        sequences: Mapping[str, int],
        batch_size: int,
        key: int | None,
    ) -> Mixture:
        """The mixture of stores of these sizes; stores are numbered in the order of `tokens`.

        Raises:
            MaxlmError: a phase names no source, or phases out of order, or weights that `Mixture`
                refuses.
        """
        check_phases(self.phases, tuple(self.weights))
        sizes = dict.fromkeys(tokens, 1.0)
        if self.temperature is not None:
            largest = max([*tokens.values(), 1])
            for name, count in tokens.items():
                sizes[name] = max((count / largest) ** (1 / self.temperature), _LEAST_SIZE)

        def scaled(weights: Weights) -> dict[str, float]:
            products = {name: weights[name] * size for name, size in sizes.items()}
            # Sums must stay finite; a power of two leaves every ratio as it is.
            if max(products.values(), default=0) > _LARGE and all(map(isfinite, weights.values())):
                return {name: product * _SMALLER for name, product in products.items()}
            return products

        steps: list[tuple[int, Weights]] = [(0, scaled(self.weights))]
        for number, phase in enumerate(self.phases):
            weights = {**self.weights, **phase.weights}
            if not any(weights.values()):
                what = f"from step {phase.from_step:,} on all weights are 0"
                fix = "give a source a weight above 0 there"
                raise MaxlmError(what, where=f"phases.{number}.weights", fix=fix)
            after = scaled(weights)
            steps += _ramp(phase, steps[-1][1], after)
        # What a later phase says of the same step is what holds.
        (_, first), *changes = dict(steps).items()
        return Mixture.of(
            first,
            key,
            changes=[(step * batch_size, weights) for step, weights in changes],
            # 0 would be a source that nobody meant to leave out.
            most={name: max(1, round(n * sequences[name])) for name, n in self.max_epochs.items()},
        )


def check_phases(phases: Sequence[Phase], names: Sequence[str]) -> None:
    """
    Raises:
        MaxlmError: a phase names a source that is not there (with the nearest name), or begins
            before the one ahead of it is over.
    """
    free_from = -1
    for number, phase in enumerate(phases):
        where = f"phases.{number}"
        for name in phase.weights:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                fix = f"did you mean {near[0]!r}?" if near else f"sources are: {', '.join(names)}"
                raise MaxlmError(f"there is no source {name!r}", where=f"{where}.weights", fix=fix)
        if phase.from_step <= free_from:
            what = f"from_step={phase.from_step} is not past the phase before and its ramp"
            fix = f"begin at step {free_from + 1} or later, in rising order"
            raise MaxlmError(what, where=where, fix=fix)
        free_from = phase.from_step + max(0, phase.ramp_steps - 1)


def _ramp(phase: Phase, before: Weights, after: Weights) -> Iterator[tuple[int, Weights]]:
    """(first step, weights) of each stair and of what follows."""
    low, high = sum(before.values()), sum(after.values())
    if low > 0 and high > 0:  # Else the mixture refuses the zeros.
        stairs = min(RAMP_STAIRS, phase.ramp_steps)
        for stair in range(stairs):
            part = (stair + 0.5) / stairs
            step = phase.from_step + stair * phase.ramp_steps // stairs
            yield (
                step,
                {n: (1 - part) * before[n] / low + part * after[n] / high for n in before},
            )
    yield phase.from_step + phase.ramp_steps, after


@dataclass(frozen=True)
class MixtureRow:
    """The share of some steps that is read from one source."""

    source: str
    sequences: int
    share: float
    """Of all sequences of these steps."""
    tokens: int
    """Rounded: a sequence counts as the mean of its source's."""
    epochs: float
    """How often these steps read the source."""


def mixture_table(batches: Batches, start: int, stop: int) -> list[MixtureRow]:
    """Returns what steps `start` to `stop` of a mixture's batches read from each source; the steps
    past its end count as nothing. O(1) in the number of steps.
    """
    first, last = (batches.mixture.counts(step * batches.batch_size) for step in (start, stop))
    counts = [b - a for a, b in zip(first, last, strict=True)]
    rows = []
    for name, count, source in zip(batches.mixture.names, counts, batches.sources, strict=True):
        epochs = count / source.packing.num_sequences
        share = count / max(1, sum(counts))
        rows.append(MixtureRow(name, count, share, round(epochs * source.store.num_tokens), epochs))
    return rows
