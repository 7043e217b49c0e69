"""A model as judge: prompts, verdicts by FastChat's rules, and the judge's own position bias."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maxlm.config import MaxlmError

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Categories whose answers are judged beside a reference answer."""


def parse_score(judgment: str) -> float:
    """Returns the first [[n]] of a judgment, or else the first [n]; -1: there is none."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(found[1]) if found else -1


def parse_winner(judgment: str) -> str:
    """Returns A, B or tie by the first of [[A]], [[B]], [[C]], in this order, that a judgment
    contains; error: none of them."""
    marks = (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"))
    return next((winner for mark, winner in marks if mark in judgment), "error")


def format_judge_prompt(
    templates: Mapping[str, Any],
    question: Mapping[str, Any],
    answers: Sequence[Sequence[str]],
    turn: int,
    reference: Sequence[str] = (),
) -> tuple[str, list[dict[str, str]]]:
    """Returns the name of one of FastChat's templates, and the conversation to send to the judge.
    `answers` are turns of one model to be graded, or of two to be compared; a second turn is judged
    with the first before it."""
    guided, single = question["category"] in REFERENCE_CATEGORIES, len(answers) == 1
    name = ("single-" if single else "pair-") + ("math-v1" if guided else f"v{2 - single}")
    name += "-multi-turn" if turn == 2 else ""
    texts = {"question": question["turns"], "ref_answer": reference}
    texts |= zip(("answer",) if single else ("answer_a", "answer_b"), answers, strict=True)
    fields = {f"{key}_{n}": text for key, turns in texts.items() for n, text in enumerate(turns, 1)}
    fields |= {key: turns[0] for key, turns in texts.items() if turns}
    try:
        system, prompt = (templates[name][key] for key in ("system_prompt", "prompt_template"))
        user = {"role": "user", "content": prompt.format(**fields)}
    except (LookupError, ValueError) as error:
        what = f"{name} cannot be filled in for question {question['question_id']}: {error!r}"
        fix = "complete judge_prompts.jsonl or reference_answer/gpt-4.jsonl"
        raise MaxlmError(what, fix=fix) from None
    return name, [{"role": "system", "content": system}, user]


def measure_position_bias(verdicts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Measures a judge by pairs of verdicts (model_1, model_2, tie or error); model_1 is shown
    first in the first, and second in the second. Returns num_pairs without error; consistency, the
    share of pairs with equal verdicts; first_share, the share of wins of the answer shown first;
    p_value of an exact sign test over pairs, whose two verdicts may depend on each other."""
    from scipy.stats import binomtest

    pairs = [pair for pair in verdicts if "error" not in pair]
    first = [(a == "model_1") + (b == "model_2") for a, b in pairs]
    wins = [(a != "tie") + (b != "tie") for a, b in pairs]
    leads = [2 * f - w for f, w in zip(first, wins, strict=True) if 2 * f != w]
    p_value = binomtest(sum(lead > 0 for lead in leads), len(leads)).pvalue if leads else 1.0
    return {
        "num_pairs": len(pairs),
        "consistency": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
        "first_share": sum(first) / sum(wins) if sum(wins) else None,
        "p_value": float(p_value),
        "is_biased": bool(p_value < 0.05),
    }
