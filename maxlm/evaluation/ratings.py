"""Ratings from battles: online Elo, Bradley-Terry, control for style."""

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from maxlm.config import MaxlmError
from maxlm.evaluation.records import Record, read_json_records
from maxlm.runtime.json_types import JsonMapping

OUTCOMES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}
"""Model a's share of the win."""
ELO_UPDATE = 4.0
"""Points that a battle moves at most (k); arenas of many battles have a small one."""
MEAN_RATING = 1000.0
ELO_PER_DECADE = 400.0
"""Points of difference at which the odds of winning are 10."""
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
Battle = JsonMapping
_FIT_ELEMENTS = 4_000_000
"""Elements of the arrays [resamples, battles, parameters] that are fitted at once."""


def read_battles(path: Path) -> list[Record]:
    """Returns the battles of an arena's database, or of a JSONL file (model_a, model_b,
    winner, tstamp), in order of time. Raises MaxlmError if a line is no battle."""
    with path.open("rb") as file:
        is_database = file.read(15) == b"SQLite format 3"
    if is_database:
        return _read_database(path)
    battles = read_json_records(path, ("model_a", "model_b", "winner"))
    for number, battle in enumerate(battles, 1):
        if battle["winner"] not in OUTCOMES:
            message = f"winner={battle['winner']!r}"
            fix = f"it is one of {', '.join(OUTCOMES)}"
            raise MaxlmError(message, where=f"{path}:{number}", fix=fix)
    return sorted(battles, key=lambda battle: battle.get("tstamp") or 0)


def _read_database(path: Path) -> list[Record]:
    try:
        with closing(sqlite3.connect(path)) as connection:
            query = "select * from battles order by tstamp"
            rows = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        message = f"no arena's database ({error})"
        raise MaxlmError(message, where=str(path)) from None
    battles = []
    for row in rows:
        battle = dict(zip(BATTLE_COLUMNS, row, strict=True))
        for column in ("conversation_a", "conversation_b"):
            battle[column] = json.loads(battle[column])
        battles.append(battle)
    return battles


def compute_online_elo(battles: Sequence[Battle]) -> dict[str, float]:
    """Returns Elo ratings (k = 4, initial 1000), updated battle by battle: their order
    matters."""
    ratings: dict[str, float] = {}
    for battle in battles:
        a = ratings.setdefault(battle["model_a"], MEAN_RATING)
        b = ratings.setdefault(battle["model_b"], MEAN_RATING)
        expected = 1 / (1 + 10 ** ((b - a) / ELO_PER_DECADE))
        change = ELO_UPDATE * (OUTCOMES[battle["winner"]] - expected)
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
    features: np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> BradleyTerryFit:
    """Fits P(a beats b) = sigmoid(r_a - r_b + c · x) by maximum likelihood (Bradley and
    Terry 1952); a tie is half a win each. Intervals are 1.96 standard errors by
    resampling the battles; percentiles cover less: likelihood exaggerates differences,
    and resampling does so again. `features` are covariates x [N, K]. Raises MaxlmError
    where no ratings are finite.

    Shapes: N battles, C of them unlike each other, M models, K features.
    """
    pairs = [[battle["model_a"], battle["model_b"]] for battle in battles]
    models, index = np.unique(pairs, return_inverse=True)
    num_models = len(models)
    if num_models < 2:
        raise MaxlmError("ratings need battles between two models or more")

    # Battles that are alike are one row with a count [C]. A row is model a, model b,
    # outcome, features: [C, 3 + K].
    outcomes = [OUTCOMES[battle["winner"]] for battle in battles]
    columns = [index.reshape(-1, 2), np.array(outcomes)]
    if features is not None:
        columns.append(features)
    rows, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    one_hot = np.eye(num_models)
    first = one_hot[rows[:, 0].astype(int)]  # [C, M]
    second = one_hot[rows[:, 1].astype(int)]
    row_outcomes = rows[:, 2]
    row_features = rows[:, 3:]
    _check_connected(models, first.T @ second)
    # By a row, parameters (ratings, coefficients) give the log-odds that a wins.
    design = np.concatenate([first - second, row_features], axis=1)  # [C, M + K]

    # The battles themselves, then their resamples, a batch at a time to bound memory.
    params = []
    generator = np.random.default_rng(seed)
    shares = counts / counts.sum()
    num_fits = 1 + num_resamples
    batch_size = max(1, _FIT_ELEMENTS // design.size)
    for start in range(0, num_fits, batch_size):
        size = min(batch_size, num_fits - start)
        weights = generator.multinomial(len(battles), shares, size=size)
        if start == 0:
            weights[0] = counts
        params.append(_maximize_likelihood(design, row_outcomes, weights, num_models))
    log_odds, style = np.split(np.concatenate(params), [num_models], axis=1)
    if np.isnan(log_odds[0]).any():
        message = (
            "no finite ratings: models, or a style, won every battle against others"
        )
        raise MaxlmError(message)

    # From natural log-odds to Elo's scale.
    ratings = MEAN_RATING + log_odds * ELO_PER_DECADE / np.log(10)
    fitted = ratings[0]
    resampled = ratings[1:]
    resampled = resampled[~np.isnan(resampled).any(axis=1)]
    intervals = np.full((num_models, 2), np.nan)
    if len(resampled) >= 0.975 * num_resamples > 0:  # else an end may be infinite
        spread = 1.96 * resampled.std(axis=0)
        intervals = np.stack([fitted - spread, fitted + spread], axis=1)
    return BradleyTerryFit(models.tolist(), fitted, intervals, style[0])


def _check_connected(models: np.ndarray, meetings: np.ndarray) -> None:
    """Raises MaxlmError for models that no chain of battles joins, whose difference is
    anything; ``meetings`` [M, M]: above 0 where two models have met."""
    from scipy.sparse.csgraph import connected_components

    num_groups, group = connected_components(meetings, directed=False)
    if num_groups > 1:
        names = " | ".join(", ".join(models[group == n]) for n in range(num_groups))
        fix = "collect battles that join them, or leave models out"
        raise MaxlmError(f"groups of models never met: {names}", fix=fix)


def _maximize_likelihood(
    design: np.ndarray, outcome: np.ndarray, weights: np.ndarray, num_models: int
) -> np.ndarray:
    """Fits parameters by Newton's method, for all rows of weights at once.

    Args:
        design: [C, P].
        outcome: [C], model a's share of the win.
        weights: [R, C], how often each row of the design counts in each fit.
        num_models: ratings, which are the first of the P parameters.

    Returns:
        [R, P]; NaN: no finite maximum.
    """
    num_params = design.shape[1]
    params = np.zeros((len(weights), num_params))
    step = np.zeros_like(params)
    # The likelihood does not change with the ratings' sum, which this keeps at 0. (The
    # small term keeps the matrix invertible where nothing else determines a parameter.)
    centre = 1e-10 * np.eye(num_params)
    centre[:num_models, :num_models] += 1
    curvature = centre
    for _ in range(25):
        # The clip keeps exp finite.
        log_odds = np.clip(params @ design.T, -500, 500)  # [R, C]
        chance = 1 / (1 + np.exp(-log_odds))
        slope = (weights * (outcome - chance)) @ design  # [R, P]
        information = weights * chance * (1 - chance)
        curvature = (design.T * information[:, None]) @ design + centre  # [R, P, P]
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        # No parameter moves by more than 2, so that a fit does not overshoot.
        step /= np.maximum(1, np.abs(step).max(axis=1, keepdims=True) / 2)
        params += step
        if np.abs(step).max() < 1e-9:
            break
    # Across groups that won both ways, the curvature at the maximum is no less than
    # about 0.1.
    has_converged = np.abs(step).max(axis=1) < 1e-6
    is_curved = np.linalg.eigvalsh(curvature)[:, 0] > 1e-6
    is_finite = has_converged & is_curved
    return np.where(is_finite[:, None], params, np.nan)


def compute_leaderboard(
    battles: Sequence[Battle], style_control: bool = False
) -> Record:
    """Returns a leaderboard as plain data: rows by rating, style's coefficients, and a
    note where there are no finite ratings (rows are by Elo) or no intervals."""
    counts = Counter[str]()
    for battle in battles:
        counts.update((battle["model_a"], battle["model_b"]))
    elo = compute_online_elo(battles)
    rows: list[Record] = []
    for model in sorted(elo, key=lambda model: -elo[model]):
        row = {
            "model": model,
            "elo": elo[model],
            "battles": counts[model],
            "rank": None,
            "rating": None,
            "low": None,
            "high": None,
        }
        rows.append(row)
    leaderboard: Record = {"rows": rows, "style": {}, "note": None}
    try:
        features = compute_style_features(battles) if style_control else None
        fit = fit_bradley_terry(battles, features)
    except MaxlmError as error:
        leaderboard["note"] = str(error)
        return leaderboard
    has_intervals = not np.isnan(fit.intervals).any()
    if not has_intervals:
        leaderboard["note"] = (
            "too few battles for intervals: resamples have no finite ratings"
        )
    for row in rows:
        index = fit.models.index(row["model"])
        row["rating"] = float(fit.ratings[index])
        if has_intervals:
            low, high = fit.intervals[index].tolist()
            # Behind the models whose whole interval is above this one's.
            num_better = int((fit.intervals[:, 0] > high).sum())
            row["rank"] = 1 + num_better
            row["low"] = low
            row["high"] = high
    rows.sort(key=lambda row: -row["rating"])
    coefficients = fit.coefficients.tolist()
    leaderboard["style"] = dict(zip(STYLE_FEATURES, coefficients, strict=False))
    return leaderboard


def compute_style_features(battles: Sequence[Battle]) -> np.ndarray:
    """Returns [N, 4] differences in style, (a - b) / (a + b + 1) over their root mean
    square: as in LMSYS's "Does style matter?" (2024), but about zero, so that swapped
    sides change nothing. Counted in conversation_a and _b, but for length without code;
    MaxlmError: a battle has none."""
    counts = []
    for battle in battles:
        for column in ("conversation_a", "conversation_b"):
            conversation = battle.get(column)
            if not _is_conversation(conversation):
                raise MaxlmError(
                    "style control needs conversation_a and conversation_b: lists of "
                    "role and content"
                )
            counts.append(_count_style(conversation))
    by_side = np.array(counts, float).reshape(-1, 2, len(STYLE_FEATURES))  # [N, 2, 4]
    difference = by_side[:, 0] - by_side[:, 1]
    ratio = difference / (by_side.sum(axis=1) + 1)
    root_mean_square = np.sqrt((ratio**2).mean(axis=0))
    return ratio / np.maximum(root_mean_square, 1e-9)


def _is_conversation(conversation: object) -> TypeGuard[list[dict[str, str]]]:
    """Whether JSON is a conversation of at least one message."""
    if not isinstance(conversation, list) or not conversation:
        return False
    for turn in conversation:
        if not isinstance(turn, dict) or "role" not in turn:
            return False
        # Only what the model says is counted; a user's content may have other forms.
        is_text = isinstance(turn.get("content"), str)
        if turn["role"] == "assistant" and not is_text:
            return False
    return True


def _count_style(conversation: Sequence[Mapping[str, str]]) -> list[int]:
    """Counts each of STYLE_FEATURES in the assistant's messages."""
    text = "\n".join(
        turn["content"] for turn in conversation if turn["role"] == "assistant"
    )
    without_code = re.sub(r"(?s)```.*?(?:```|\Z)", "", text)
    counts = []
    for feature, pattern in STYLE_FEATURES.items():
        counted_text = text if feature == "length" else without_code
        counts.append(len(re.findall(pattern, counted_text)))
    return counts
