"""Samples to score, and functions that score them."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxlm.rl.rewards import REWARDS
from maxlm.rl.rewards.reward import Reward
from maxlm.rl.samples import Prompt, Sample

HERE = Path(__file__)


def make_sample(
    text: str,
    row: Mapping[str, Any] | None = None,
    number: int = 0,
    row_number: int = 7,
    turns: list[tuple[str, str]] | None = None,
    num_sampled: int = 3,
) -> Sample:
    """A sample whose last turn is a text."""
    prompt = Prompt(row_number, (1, 2), {"prompt": "question", **(row or {})})
    return Sample(
        prompt,
        number,
        [1, 2] + [3] * num_sampled,
        [False] * 2 + [True] * num_sampled,
        [0.0] * 2 + [-1.0] * num_sampled,
        [-1] * 2 + [0] * num_sampled,
        True,
        turns or [("assistant", text)],
    )


def make_reward(kind: str, **settings: Any) -> Reward:
    return REWARDS.get(kind).model_validate({"kind": kind, **settings})


def make_function_reward(
    function: str, settings: Mapping[str, Any] | None = None
) -> Reward:
    source = {"kind": "python", "function": f"{HERE}:{function}"}
    return REWARDS.get("python").model_validate({**source, **(settings or {})})


def tell_time(sample: Sample) -> float:
    """When it ends, by the machine's clock; some samples take half a minute."""
    if sample.last_answer == "hang":
        time.sleep(30)
    return time.monotonic()


def count_letters(sample: Sample) -> int:
    if sample.last_answer == "hold":
        # The interpreter's lock is held for hours: no thread and no handler runs.
        re.match(r"(a+)+b", "a" * 60)
    return len(sample.last_answer)


def misbehave(sample: Sample) -> Any:
    """Does what the text says."""
    match sample.last_answer:
        case "raise":
            return {}["score"]
        case "exit":
            os._exit(3)
        case "nan":
            return float("nan")
        case "inf":
            return float("inf")
        case "none":
            return None
        case "two":
            return [1.0, 0.0]
        case "text":
            return "0.5"
    return True
