"""The gate finds a fall that is there, and seldom one that is not."""

from math import comb, log, sqrt

import numpy as np
import pytest

from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.evaluation.compare import (
    compare_evaluations,
    compare_samples,
    compute_holm_p_values,
)
from maxlm.evaluation.results import EvalDoc, read_newest_evaluations
from tests.evaluation.folders import make_sample, write_evaluation


def compare(first, second, metric="acc", higher=True, alpha=0.05, weights=None):
    weights = np.ones(len(first)) if weights is None else weights
    sides = []
    for scores in (first, second):
        values = [
            {metric: (float(x), float(w))} for x, w in zip(scores, weights, strict=True)
        ]
        sides.append(
            [
                EvalDoc((i,), doc_values, "", "", "", [], {})
                for i, doc_values in enumerate(values)
            ]
        )
    return compare_samples("t", metric, sides, higher, alpha)


def test_mcnemar_is_the_exact_binomial_test_and_holm_as_by_hand():
    adjusted = compute_holm_p_values([0.01, 0.04, 0.03, 0.005, 0.9])
    assert adjusted == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    for lost, gained in [(0, 0), (1, 0), (0, 5), (8, 1), (5, 5), (13, 37), (2, 8)]:
        n = lost + gained
        least = min(lost, gained)
        tail = sum(comb(n, k) for k in range(least + 1)) / 2**n
        p = compare([1] * lost + [0] * gained + [1], [0] * lost + [1] * gained + [1]).p
        assert p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_zeros_and_ones_are_compared_by_the_documents_that_change():
    first, second = [1] * 9 + [0] * 3 + [1] * 40, [0] * 9 + [1] * 3 + [1] * 40
    comparison = compare(first, second, alpha=0.2)
    assert (comparison.first, comparison.second) == (
        pytest.approx(49 / 52),
        pytest.approx(43 / 52),
    )
    assert (
        compare(second, first).verdict
        == compare(first, second, higher=False).verdict
        == "rises"
    )
    # Agresti and Min: half a document more in each of the four cells.
    b, c, n, z = 9.5, 3.5, 54, 1.2815515655446004
    middle, error = (c - b) / n, z * sqrt(b + c - (c - b) ** 2 / n) / n
    assert comparison.interval == (
        pytest.approx(middle - error),
        pytest.approx(middle + error),
    )


def test_other_figures_by_a_paired_t_test():
    rng = np.random.default_rng(3)
    first = rng.random(31)
    second = first - 0.02 + 0.05 * rng.standard_normal(31)
    comparison = compare(first, second, "f1")
    change = second - first
    error = change.std(ddof=1) / sqrt(31)
    # 30 degrees of freedom: 2.0423 at 95% (any table of Student's t).
    assert comparison.interval[1] - comparison.interval[0] == pytest.approx(
        2 * 2.0423 * error, rel=1e-4
    )
    assert (comparison.p < 0.05) == (abs(change.mean()) > 2.0423 * error)
    assert compare(first, first, "f1").p == compare([0.5], [0.25], "f1").p == 1.0
    assert compare([0.5, 0.75], [0.25, 0.5], "f1").p == 0.5  # Two signs: no less.


def test_perplexities_are_of_all_documents_together():
    rng = np.random.default_rng(5)
    weights = rng.integers(3, 40, 200)
    first = -2.0 * weights + rng.standard_normal(200)
    second = first - 0.1 * weights + 0.2 * rng.standard_normal(200)
    picks = rng.integers(0, 200, (4000, 200))
    for metric in ("word_perplexity", "bits_per_byte"):
        figure = (
            (lambda x: np.exp(-x))
            if metric == "word_perplexity"
            else (lambda x: -x / log(2))
        )
        comparison = compare(first, second, metric, higher=False, weights=weights)
        a, b = (figure(side.sum() / weights.sum()) for side in (first, second))
        assert (comparison.first, comparison.second) == (
            pytest.approx(a),
            pytest.approx(b),
        )
        assert comparison.verdict == "falls"  # It rises, and lower is better.
        # The interval beside a bootstrap of documents; a perplexity's is of B ÷ A,
        # times A.
        a, b = (
            figure(side[picks].sum(1) / weights[picks].sum(1))
            for side in (first, second)
        )
        change = b - a if metric == "bits_per_byte" else comparison.first * (b / a - 1)
        width = comparison.interval[1] - comparison.interval[0]
        assert width == pytest.approx(2 * 1.97 * np.std(change), rel=0.1)


def test_perplexities_that_are_far_apart_differ():
    """The test is of their logarithms: a few hard documents do not hide what all
    say."""
    rng = np.random.default_rng(6)
    first = rng.normal(-4, 3, 60)
    comparison = compare(
        first, first - rng.gamma(2.0, 5.0, 60), "perplexity", higher=False
    )
    assert comparison.second > 1000 * comparison.first
    assert comparison.p < 1e-9


@pytest.mark.heavy
@pytest.mark.parametrize("metric", ["acc", pytest.param("f1", marks=pytest.mark.more)])
def test_equal_models_seldom_fail_the_gate(metric):
    """Of five tasks in each of 400 simulations; documents differ in how hard they
    are."""
    rng = np.random.default_rng(11)
    alpha = 0.1
    runs = 400
    fails = 0
    for _ in range(runs):
        p_values = []
        for size in (23, 40, 57, 80, 131):
            right = rng.beta(0.6, 0.6, size)
            scores = rng.random((2, size)) < right
            first, second = (
                scores if metric == "acc" else scores * rng.random((2, size))
            )
            p_values.append(compare(first, second, metric).p)
        fails += min(compute_holm_p_values(p_values)) <= alpha
    assert fails / runs <= alpha + 3 * sqrt(alpha * (1 - alpha) / runs)


def compare_both(folder, tasks):
    first, second = (read_newest_evaluations(folder / name)[-1] for name in "ab")
    return compare_evaluations(first, second, tasks, 0.05)


@pytest.fixture
def two(tmp_path):
    """Evaluations of which the second falls on one of two tasks, and lacks one."""
    scores = [1.0, 0.0, 1.0, 1.0] * 10
    tasks = {"arc": {"acc": scores}, "piqa": {"acc": scores}, "only": {"acc": [1.0]}}
    write_evaluation(tmp_path / "a", tasks)
    lines = [make_sample(i, {"acc": score}) for i, score in enumerate(scores)]
    lines = [*lines[3:], make_sample(99, {"acc": 1.0})]  # Three lost, one of its own.
    lines[0]["prompt_hash"] = "other examples"
    tasks = {"arc": {"acc": scores[2:]}, "piqa": {"acc": [0.0] * 10 + scores[10:]}}
    write_evaluation(tmp_path / "b", tasks, model="b", samples={"arc": lines})
    return tmp_path / "a", tmp_path / "b"


def test_the_command_gates(two, capsys):
    assert main(["eval", "diff", *map(str, two)]) == 1
    text = capsys.readouterr().out
    rows = {row.split()[0]: row.split() for row in text.splitlines() if row.strip()}
    # Seven of the ten zeros were ones; adjusted for two tasks.
    assert rows["piqa"][-3:] == [f"{2 * 2 / 2**7:.3g}", "40", "falls"]
    assert rows["arc"][-2:] == ["37", "same"]
    assert "arc: 3 documents only in A\narc: 1 documents only in B\n" in text
    assert "warning: arc: 1 prompts differ" in text
    assert "not compared: only (not in both)\n" in text
    # Better is no failure; nor is a fall within what alpha allows, nor on a task that
    # is not named.
    assert main(["eval", "diff", *map(str, reversed(two))]) == 0
    assert main(["eval", "diff", *map(str, two), "--alpha", "0.001"]) == 0
    assert main(["eval", "diff", *map(str, two), "--tasks", "arc"]) == 0


def test_groups_are_compared_over_all_their_documents(tmp_path):
    for name, lost in (("a", 0), ("b", 4)):
        tasks = {
            t: {"acc": [0.0] * lost + [1.0] * (15 - lost)}
            for t in ("m_x", "m_y", "m_z")
        }
        write_evaluation(
            tmp_path / name, tasks, model=name, groups={"m": ["m_x", "m_y", "m_z"]}
        )
    ((comparison,), skipped) = compare_both(tmp_path, [])
    assert (comparison.task, comparison.num_docs, comparison.verdict, skipped) == (
        "m",
        45,
        "falls",
        [],
    )
    assert comparison.p == pytest.approx(2 / 2**12)
    ((comparison,), _) = compare_both(tmp_path, ["m_y"])
    assert (comparison.num_docs, comparison.p, comparison.verdict) == (
        15,
        pytest.approx(0.125),
        "same",
    )


def test_what_cannot_be_compared_is_named(two, tmp_path, capsys):
    with pytest.raises(
        MaxlmError, match=r"compare arx \(not in both\); tasks of both: arc, piqa"
    ):
        compare_both(tmp_path, ["arc", "arx"])
    next(two[0].glob("results_*")).unlink()
    write_evaluation(two[0], {"other": {"acc": [1.0]}}, time="2027")
    with pytest.raises(
        MaxlmError, match=r"compare other \(not in both\), arc \(not in both\)"
    ):
        compare_both(tmp_path, [])
    with pytest.raises(MaxlmError, match="no document of t is in both"):
        compare([], [])
    next(two[1].glob("samples_piqa*")).unlink()
    assert main(["eval", "diff", *map(str, (two[1], two[1]))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
