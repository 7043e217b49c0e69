"""Ratings agree with an independent fit, their intervals cover, and style is told from
quality."""

import json
import sqlite3
from contextlib import closing

import choix
import numpy as np
import pytest

from maxlm.cli.main import main
from maxlm.evaluation.ratings import (
    compute_leaderboard,
    compute_online_elo,
    compute_style_features,
    fit_bradley_terry,
    read_battles,
)
from tests.errors import message

pytestmark = pytest.mark.heavy

ELO = 400 / np.log(10)


def draw_battles(rng, skills, number):
    """Battles whose expected outcome is sigmoid(difference), ties among them."""
    first = rng.integers(0, len(skills), number)
    second = (first + rng.integers(1, len(skills), number)) % len(skills)
    chance = 1 / (1 + np.exp(skills[second] - skills[first]))
    ties = 0.8 * chance * (1 - chance)
    drawn = rng.random(number)
    winner = np.where(drawn < chance - ties / 2, "model_a", "model_b")
    tied = abs(drawn - chance) < ties / 2
    names = np.where(rng.random(number) < 0.5, "tie", "tie (bothbad)")
    rows = zip(first, second, winner, tied, names, strict=True)
    return [
        {"model_a": f"m{a}", "model_b": f"m{b}", "winner": str(name if tie else won)}
        for a, b, won, tie, name in rows
    ]


@pytest.mark.parametrize(("num_models", "number"), [(2, 30), (5, 120), (13, 1500)])
def test_ratings_are_choixs(num_models, number):
    rng = np.random.default_rng(num_models)
    battles = draw_battles(rng, rng.normal(size=num_models), number)
    fit = fit_bradley_terry(battles, num_resamples=10)
    assert len(fit.models) == num_models
    wins = []  # a tie is one win each way, and any other battle two
    for battle in battles:
        a, b = (fit.models.index(battle[side]) for side in ("model_a", "model_b"))
        pairs = {"model_a": [(a, b)] * 2, "model_b": [(b, a)] * 2}
        wins += pairs.get(battle["winner"], [(a, b), (b, a)])
    for solve in (choix.ilsr_pairwise, choix.opt_pairwise):
        theirs = solve(num_models, wins, alpha=0)
        assert fit.ratings == pytest.approx(
            1000 + ELO * (theirs - theirs.mean()), abs=1
        )


@pytest.mark.parametrize(
    ("num_models", "number"),
    [
        (2, 60),
        pytest.param(3, 150, marks=pytest.mark.more),
        pytest.param(5, 250, marks=pytest.mark.more),
    ],
)
def test_intervals_cover_the_truth_95_times_in_100(num_models, number):
    rng = np.random.default_rng(0)
    skills = np.linspace(-0.8, 0.8, num_models)
    inside = []
    for seed in range(400):
        battles = draw_battles(rng, skills, number)
        low, high = fit_bradley_terry(battles, num_resamples=200, seed=seed).intervals.T
        inside.append((low <= 1000 + ELO * skills) & (1000 + ELO * skills <= high))
    assert 0.93 <= np.mean(inside) <= 0.97


def test_style_control_finds_a_planted_preference():
    """m3 is no better than m2: it writes more, and voters like length and not bold."""
    rng = np.random.default_rng(0)
    skills = np.array([0.0, 0.3, 0.6, 0.6])
    number = 6000
    battles = draw_battles(rng, skills, number)
    pair = np.array(
        [[int(b[side][1]) for side in ("model_a", "model_b")] for b in battles]
    )
    words = rng.integers(20, 200, (number, 2)) * np.where(pair == 3, 2, 1)
    for battle, w, b in zip(
        battles, words, rng.integers(0, 4, (number, 2)), strict=True
    ):
        for n, side in enumerate("ab"):
            text = "```\n# no header\n```\n" + "word " * (w[n] - 4) + "**so** " * b[n]
            turns = [
                {"role": "user", "content": "# q"},
                {"role": "assistant", "content": text},
            ]
            battle[f"conversation_{side}"] = turns
    features = compute_style_features(battles)
    assert not features[:, 1:3].any()
    margin = (skills[pair[:, 0]] - skills[pair[:, 1]]) + 0.8 * features[:, 0]
    for battle, won in zip(
        battles, rng.random(number) < 1 / (1 + np.exp(-margin)), strict=True
    ):
        battle["winner"] = "model_a" if won else "model_b"
    plain = fit_bradley_terry(battles, num_resamples=5)
    fit = fit_bradley_terry(battles, features[:, [0, 3]], num_resamples=5)
    assert plain.ratings[3] - plain.ratings[2] > 60
    assert abs(fit.ratings[3] - fit.ratings[2]) < 35
    assert fit.coefficients == pytest.approx([0.8, 0], abs=0.1)
    assert "conversation_a" in message(
        compute_style_features, draw_battles(rng, skills, 2)
    )


def test_ratings_that_do_not_exist_are_refused():
    def beats(*pairs):
        return [{"model_a": a, "model_b": b, "winner": "model_a"} for a, b in pairs]

    apart = beats("ab", "ba", "cd", "dc")
    assert "never met: a, b | c, d" in message(fit_bradley_terry, apart)
    assert "two models" in message(fit_bradley_terry, [])
    leaderboard = compute_leaderboard(beats("ab", "ba", "ac", "cd", "dc", "bd"))
    assert "won every battle" in leaderboard["note"]
    assert [row["model"] for row in leaderboard["rows"]][-1] in "cd"
    assert leaderboard["rows"][0]["rating"] is None
    few = compute_leaderboard(beats("ab", "ab", "ab", "ab", "ba"))
    assert "resamples have no finite ratings" in few["note"]
    leaderboard = [(row["model"], row["rank"], row["low"]) for row in few["rows"]]
    assert leaderboard == [("a", None, None), ("b", None, None)]


def test_the_command_reads_battles_in_order_of_time(tmp_path, capsys):
    path = tmp_path / "battles.jsonl"
    ratings = {"m0": 1000.0, "m1": 1000.0, "m2": 1000.0}
    battles = draw_battles(np.random.default_rng(2), np.array([2.0, 0, 1]), 200)
    lines = [json.dumps({**b, "tstamp": n}) for n, b in enumerate(battles)]
    path.write_text("\n".join(reversed(lines)))
    assert main(["eval", "ratings", str(path)]) == 0
    shown = [
        row.split()[1] for row in capsys.readouterr().out.splitlines() if " m" in row
    ]
    assert shown == ["m0", "m2", "m1"]
    for battle in battles:  # Elo, as a plain loop
        a, b = battle["model_a"], battle["model_b"]
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        change = 4 * (
            {"model_a": 1, "model_b": 0}.get(battle["winner"], 0.5) - expected
        )
        ratings |= {a: ratings[a] + change, b: ratings[b] - change}
    assert compute_online_elo(battles) == pytest.approx(ratings)
    rated = json.loads(path.with_suffix(".ratings.json").read_text())["rows"][0]
    assert (rated["elo"], rated["rank"]) == (pytest.approx(ratings["m0"]), 1)
    path.write_text('{"model_a": "x", "model_b": "y", "winner": "both"}')
    assert "battles.jsonl:1: winner='both'" in message(read_battles, path)


def test_files_without_battles_are_named_in_one_line(tmp_path, capsys):
    other, talks = tmp_path / "other.db", tmp_path / "talks.jsonl"
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("create table x (y)")
    talk = {"conversation_a": [{"role": "assistant"}], "conversation_b": []}
    talks.write_text(
        json.dumps({"model_a": "x", "model_b": "y", "winner": "tie", **talk})
    )
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\n")
    for name, fault in (
        ("other.db", "arena's database"),
        ("bad.jsonl", "not a record"),
    ):
        assert main(["eval", "ratings", str(tmp_path / name)]) == 2
        assert fault in capsys.readouterr().err
    assert main(["eval", "ratings", str(talks), "--style-control"]) == 2
    assert "lists of role and content" in capsys.readouterr().err
