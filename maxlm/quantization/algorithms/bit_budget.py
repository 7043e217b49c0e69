"""Mixed precision: which matrix gets which format, for the least loss within a budget of
bits.

It is a knapsack with one choice a matrix. A price on bits, found by bisection, gives a
first choice and a bound on what any choice can reach; dynamic programming over the
choices that the bound leaves is exact.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maxlm.config.errors import MaxlmError

MOST_STATES = 200_000
"""Partial choices kept at a time. Beyond them the least promising go, and the result
need not be the best."""
BISECTIONS = 100


class FormatCost(NamedTuple):
    """What a format costs for one matrix."""

    bits: float
    """A number's, scales included."""
    loss: float
    """The rise of the loss, in any unit that adds up over matrices."""


class FormatChoice(NamedTuple):
    """A format for each matrix."""

    formats: dict[str, str]
    bits: float
    """The mean over all numbers, scales included."""
    loss: float
    """The sum over the matrices."""


class _Options(NamedTuple):
    """One matrix's candidates."""

    names: list[str]
    bits: NDArray[np.int64]
    """Of the whole matrix."""
    losses: NDArray[np.float64]


def choose_formats(
    costs: Mapping[str, Mapping[str, FormatCost]],
    sizes: Mapping[str, int],
    bits: float,
) -> FormatChoice:
    """Chooses a format for each matrix, with the least sum of losses.

    Args:
        costs: by matrix and format.
        sizes: by matrix, its numbers.
        bits: at most so many a number, in the mean over all matrices.

    Raises:
        MaxlmError: the smallest formats take more than ``bits``.
    """
    options = [_list_options(costs[name], sizes[name]) for name in costs]
    total_size = sum(sizes[name] for name in costs)
    budget = int(bits * total_size + 1e-6)
    least = sum(int(option.bits.min()) for option in options)
    if least > budget:
        raise MaxlmError(
            f"{bits:g} bits a number are fewer than the smallest formats take",
            where="bits",
            fix=f"allow at least {np.ceil(100 * least / total_size) / 100:g}, or "
            "smaller formats",
        )
    price, first = _price_bits(options, budget)
    first = _spend_rest(options, first, budget)
    choice = _search(options, budget, price, first)
    formats = {
        name: option.names[place]
        for name, option, place in zip(costs, options, choice, strict=True)
    }
    used, loss = _add_up(options, choice)
    return FormatChoice(formats, used / max(total_size, 1), loss)


def _list_options(costs: Mapping[str, FormatCost], size: int) -> _Options:
    """Returns the candidates by rising bits and falling loss, without those that
    another one beats in both."""
    ordered = sorted(costs.items(), key=lambda item: (item[1].bits, item[1].loss))
    names: list[str] = []
    bits: list[int] = []
    losses: list[float] = []
    for name, cost in ordered:
        if not losses or cost.loss < losses[-1]:
            names.append(name)
            bits.append(round(cost.bits * size))
            losses.append(cost.loss)
    return _Options(names, np.array(bits, np.int64), np.array(losses, np.float64))


def _choose_at(options: list[_Options], price: float) -> list[int]:
    """Returns each matrix's best candidate when a bit costs ``price`` of loss; of equal
    ones the one of fewest bits."""
    return [int(np.argmin(option.losses + price * option.bits)) for option in options]


def _add_up(options: list[_Options], choice: list[int]) -> tuple[int, float]:
    """Returns the bits and the loss of a choice."""
    pairs = list(zip(options, choice, strict=True))
    used = sum(int(option.bits[place]) for option, place in pairs)
    return used, float(sum(option.losses[place] for option, place in pairs))


def _price_bits(options: list[_Options], budget: int) -> tuple[float, list[int]]:
    """Returns the lowest price of a bit, nearly, at which the choice fits the budget,
    and the choice."""
    free = _choose_at(options, 0.0)
    if _add_up(options, free)[0] <= budget:
        return 0.0, free
    steepest = 1.0
    for option in options:
        slopes = -np.diff(option.losses) / np.maximum(np.diff(option.bits), 1)
        steepest = max([steepest, *slopes])
    low = 0.0
    high = 2 * steepest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _add_up(options, _choose_at(options, middle))[0] <= budget:
            high = middle
        else:
            low = middle
    return high, _choose_at(options, high)


def _spend_rest(options: list[_Options], choice: list[int], budget: int) -> list[int]:
    """Returns a choice that spends what bits are left, the best step for its bits
    first."""
    choice = list(choice)
    left = budget - _add_up(options, choice)[0]
    while True:
        best: tuple[float, int, int] | None = None
        for number, (option, place) in enumerate(zip(options, choice, strict=True)):
            for larger in range(place + 1, len(option.bits)):
                bits = int(option.bits[larger] - option.bits[place])
                gain = float(option.losses[place] - option.losses[larger])
                if bits <= left and (best is None or gain / max(bits, 1) > best[0]):
                    best = (gain / max(bits, 1), number, larger)
        if best is None:
            return choice
        _, number, larger = best
        left -= int(options[number].bits[larger] - options[number].bits[choice[number]])
        choice[number] = larger


def _search(
    options: list[_Options], budget: int, price: float, first: list[int]
) -> list[int]:
    """Returns the best choice. States are partial choices: what they used and lost.
    One goes when another uses and loses no more, or when its bound, loss plus the price
    of its bits with the others at their best for that price, is no less than the loss
    of the best whole choice known."""
    known = _add_up(options, first)[1]
    rests = [float((option.losses + price * option.bits).min()) for option in options]
    least_bits = [int(option.bits.min()) for option in options]
    used = np.zeros(1, np.int64)
    losses = np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for number, option in enumerate(options):
        count = len(option.bits)
        new_used = (used[:, None] + option.bits).reshape(-1)
        new_losses = (losses[:, None] + option.losses).reshape(-1)
        rest = sum(rests[number + 1 :])
        bounds = new_losses + price * (new_used - budget) + rest
        fits = new_used + sum(least_bits[number + 1 :]) <= budget
        kept_states = np.flatnonzero(fits & (bounds < known))
        order = np.lexsort((new_losses[kept_states], new_used[kept_states]))
        kept_states = kept_states[order]
        before = np.minimum.accumulate(np.append(np.inf, new_losses[kept_states]))
        kept_states = kept_states[new_losses[kept_states] < before[:-1]]
        if len(kept_states) > MOST_STATES:
            promising = np.argsort(bounds[kept_states])[:MOST_STATES]
            kept_states = np.sort(kept_states[promising])
        if not len(kept_states):
            return first
        used = new_used[kept_states]
        losses = new_losses[kept_states]
        history.append((kept_states // count, kept_states % count))
    state = int(np.argmin(losses))
    choice = []
    for parents, places in reversed(history):
        choice.append(int(places[state]))
        state = int(parents[state])
    return choice[::-1]
