"""The choice of formats, against every choice there is."""

from itertools import product

import numpy as np
import pytest

from maxlm.quantization.algorithms.bit_budget import FormatCost, choose_formats
from tests.errors import message


@pytest.mark.parametrize("seed", range(30))
def test_choice_is_the_best(seed):
    random = np.random.default_rng(seed)
    names = [f"m{index}" for index in range(random.integers(1, 6))]
    sizes = {name: int(random.choice([100, 200, 1000])) for name in names}
    costs = {
        name: {
            f"f{index}": FormatCost(
                float(random.choice([2, 3, 4.5, 6, 8])), float(random.exponential())
            )
            for index in range(4)
        }
        for name in names
    }
    total = sum(sizes.values())
    smallest = [min(c.bits for c in costs[name].values()) for name in names]
    least = sum(b * sizes[n] for b, n in zip(smallest, names, strict=True)) / total
    bits = least + 3 * random.random()
    choice = choose_formats(costs, sizes, bits)
    best = np.inf
    for picks in product(*[costs[name].values() for name in names]):
        used = sum(p.bits * sizes[n] for p, n in zip(picks, names, strict=True))
        if used <= bits * total + 1e-6:
            best = min(best, sum(pick.loss for pick in picks))
    assert choice.loss == pytest.approx(best)
    assert choice.bits <= bits + 1e-9


def test_budget_too_small():
    costs = {"up": {"int4": FormatCost(4.5, 1.0), "int8": FormatCost(8.0, 0.1)}}
    assert "at least 4.5" in message(choose_formats, costs, {"up": 64}, 4.0)
