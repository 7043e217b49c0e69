"""Ratings from battles: online Elo, Bradley-Terry, control for style."""

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.evaluation.records import read_records

OUTCOMES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}
"""Model a's share of the win."""
BATTLE_COLUMNS = (
    "model_a",
    "model_b",
    "winner",
    "tstamp",
    "conversation_a",
    "conversation_b",
)
"""An arena's table."""
STYLE_FEATURES = {
    "length": r"\S+",
    "headers": r"(?m)^ {0,3}#{1,6}\s",
    "lists": r"(?m)^\s*(?:[-*+]|\d+\.)\s",
    "bold": r"\*\*[^*\n]+\*\*|__[^_\n]+__",
}
"""Patterns that count one in an answer."""
Battle = Mapping[str, Any]


def read_battles(path: Path) -> list[dict[str, Any]]:
    """Returns the battles of an arena's database, or of a JSONL file (model_a, model_b,
    winner, tstamp), in order of time. Raises MaxlmError if a line is no battle."""
    with path.open("rb") as file:
        is_database = file.read(15) == b"SQLite format 3"
    if is_database:
        try:
            with closing(sqlite3.connect(path)) as connection:
                rows = connection.execute(
                    "select * from battles order by tstamp"
                ).fetchall()
        except sqlite3.Error as error:
            raise MaxlmError(
                f"no arena's database ({error})", where=str(path)
            ) from None
        values = [(*row[:4], *map(json.loads, row[4:])) for row in rows]
        return [dict(zip(BATTLE_COLUMNS, each, strict=True)) for each in values]
    battles = read_records(path, ("model_a", "model_b", "winner"))
    for number, battle in enumerate(battles, 1):
        if battle["winner"] not in OUTCOMES:
            fix = f"it is one of {', '.join(OUTCOMES)}"
            raise MaxlmError(
                f"winner={battle['winner']!r}", where=f"{path}:{number}", fix=fix
            )
    return sorted(battles, key=lambda battle: battle.get("tstamp") or 0)


def compute_online_elo(battles: Sequence[Battle]) -> dict[str, float]:
    """Returns Elo ratings (k = 4, initial 1000), updated battle by battle: their order
    matters."""
    ratings: dict[str, float] = {}
    for battle in battles:
        a, b = (
            ratings.setdefault(battle[side], 1000.0) for side in ("model_a", "model_b")
        )
        change = 4 * (OUTCOMES[battle["winner"]] - 1 / (1 + 10 ** ((b - a) / 400)))
        ratings[battle["model_a"]] += change
        ratings[battle["model_b"]] -= change
    return ratings


@dataclass(frozen=True)
class BradleyTerryFit:
    """Ratings [M] on Elo's scale (400 points: odds of 10), of mean 1000, with 95%
    intervals [M, 2], NaN where too many resamples have no finite ratings; coefficients
    [K] in log-odds."""

    models: list[str]
    ratings: np.ndarray
    intervals: np.ndarray
    coefficients: np.ndarray


def fit_bradley_terry(
    battles: Sequence[Battle],
    features: Any = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> BradleyTerryFit:
    """Fits P(a beats b) = sigmoid(r_a - r_b + c · x) by maximum likelihood (Bradley and
    Terry 1952); a tie is half a win each. Intervals are 1.96 standard errors by
    resampling the battles; percentiles cover less: likelihood exaggerates differences,
    and resampling does so again. `features` are covariates x [N, K]. Raises MaxlmError
    where no ratings are finite."""
    from scipy.sparse.csgraph import connected_components

    models, index = np.unique(
        [[b["model_a"], b["model_b"]] for b in battles], return_inverse=True
    )
    if len(models) < 2:
        raise MaxlmError("ratings need battles between two models or more")
    columns = [index.reshape(-1, 2), [OUTCOMES[battle["winner"]] for battle in battles]]
    columns += [features] * (features is not None)
    rows, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    first, second = (
        np.eye(len(models))[rows[:, n].astype(int)] for n in (0, 1)
    )  # one-hot
    num_groups, group = connected_components(first.T @ second, directed=False)
    if num_groups > 1:
        names = " | ".join(", ".join(models[group == n]) for n in range(num_groups))
        fix = "collect battles that join them, or leave models out"
        raise MaxlmError(f"groups of models never met: {names}", fix=fix)
    design = np.concatenate([first - second, rows[:, 3:]], axis=1)
    params = []
    draw = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // design.size)  # bounds memory
    for start in range(0, 1 + num_resamples, at_once):
        size = min(at_once, 1 + num_resamples - start)
        weights = draw.multinomial(len(battles), counts / counts.sum(), size=size)
        if start == 0:
            weights[0] = counts
        params.append(_maximize_likelihood(design, rows[:, 2], weights, len(models)))
    ratings, style = np.split(np.concatenate(params), [len(models)], axis=1)
    if np.isnan(ratings[0]).any():
        raise MaxlmError(
            "no finite ratings: models, or a style, won every battle against others"
        )
    ratings = 1000 + ratings * 400 / np.log(10)
    resampled = ratings[1:][~np.isnan(ratings[1:]).any(axis=1)]
    intervals = np.full((len(models), 2), np.nan)
    if len(resampled) >= 0.975 * num_resamples > 0:  # else an end may be infinite
        spread = 1.96 * resampled.std(axis=0)
        intervals = np.stack([ratings[0] - spread, ratings[0] + spread], axis=1)
    return BradleyTerryFit(models.tolist(), ratings[0], intervals, style[0])


def _maximize_likelihood(
    design: np.ndarray, outcome: np.ndarray, weights: np.ndarray, num_models: int
) -> np.ndarray:
    """Newton's method for all rows of `weights` [R, C] at once: [R, P]; NaN: no finite
    maximum."""
    params, step = np.zeros((2, len(weights), design.shape[1]))
    curvature = centre = 1e-10 * np.eye(design.shape[1])
    centre[:num_models, :num_models] += (
        1  # The likelihood does not know the ratings' sum: 0.
    )
    for _ in range(25):
        chance = 1 / (1 + np.exp(-np.clip(params @ design.T, -500, 500)))
        slope = (weights * (outcome - chance)) @ design
        curvature = (
            design.T * (weights * chance * (1 - chance))[:, None]
        ) @ design + centre
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        step /= np.maximum(1, np.abs(step).max(axis=1, keepdims=True) / 2)
        params += step
        if np.abs(step).max() < 1e-9:
            break
    # Across groups that won both ways, the curvature at the maximum is no less than
    # about 0.1.
    finite = (np.abs(step).max(axis=1) < 1e-6) & (
        np.linalg.eigvalsh(curvature)[:, 0] > 1e-6
    )
    return np.where(finite[:, None], params, np.nan)


def compute_leaderboard(
    battles: Sequence[Battle], style_control: bool = False
) -> dict[str, Any]:
    """Returns a leaderboard as plain data: rows by rating, style's coefficients, and a
    note where there are no finite ratings (rows are by Elo) or no intervals."""
    counts = Counter(
        battle[side] for battle in battles for side in ("model_a", "model_b")
    )
    elo = sorted(compute_online_elo(battles).items(), key=lambda each: -each[1])
    empty = dict.fromkeys(("rank", "rating", "low", "high"))
    rows = [
        {"model": name, "elo": x, "battles": counts[name], **empty} for name, x in elo
    ]
    found: dict[str, Any] = {"rows": rows, "style": {}, "note": None}
    try:
        fit = fit_bradley_terry(
            battles, compute_style_features(battles) if style_control else None
        )
    except MaxlmError as error:
        return found | {"note": str(error)}
    if np.isnan(fit.intervals).any():
        found["note"] = (
            "too few battles for intervals: resamples have no finite ratings"
        )
    for row in rows:
        number = fit.models.index(row["model"])
        row["rating"], (low, high) = (
            float(fit.ratings[number]),
            fit.intervals[number].tolist(),
        )
        if not found["note"]:
            row |= {
                "rank": 1 + int((fit.intervals[:, 0] > high).sum()),
                "low": low,
                "high": high,
            }
    rows.sort(key=lambda row: -row["rating"])
    return found | {
        "style": dict(zip(STYLE_FEATURES, fit.coefficients.tolist(), strict=False))
    }


def compute_style_features(battles: Sequence[Battle]) -> np.ndarray:
    """Returns [N, 4] differences in style, (a - b) / (a + b + 1) over their root mean
    square: as in LMSYS's "Does style matter?" (2024), but about zero, so that swapped
    sides change nothing. Counted in conversation_a and _b, but for length without code;
    MaxlmError: a battle has none."""
    talks = [battle.get(f"conversation_{side}") for battle in battles for side in "ab"]
    try:
        counts = np.array(
            [_count_style(talk or None) for talk in talks], float
        ).reshape(-1, 2, 4)
    except (TypeError, KeyError):
        what = "style control needs conversation_a and conversation_b: lists of role and content"
        raise MaxlmError(what) from None
    ratio = (counts[:, 0] - counts[:, 1]) / (counts.sum(axis=1) + 1)
    return ratio / np.maximum(np.sqrt((ratio**2).mean(axis=0)), 1e-9)


def _count_style(turns: Any) -> list[int]:
    text = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
    plain = re.sub(r"(?s)```.*?(?:```|\Z)", "", text)
    texts = (text, plain, plain, plain)
    return [
        len(re.findall(*each))
        for each in zip(STYLE_FEATURES.values(), texts, strict=True)
    ]
