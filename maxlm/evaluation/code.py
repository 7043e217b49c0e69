"""Functional correctness of generated code: HumanEval and pass@k (Chen et al.,
2107.03374)."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from types import SimpleNamespace
from typing import Any

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import ExecutionResult, SandboxLimits, run_all


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples is correct:
    equation 1 of Chen et al. 2021, 1 - C(n - c, k) / C(n, k). Raises ValueError unless
    1 <= k <= n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        message = f"pass@{k} of {num_correct} correct among {num_samples} samples"
        raise ValueError(message)
    chance_all_wrong = comb(num_samples - num_correct, k) / comb(num_samples, k)
    return 1 - chance_all_wrong


def truncate_completion(completion: str) -> str:
    """Return a completion up to where a function of HumanEval ends (Chen et al.,
    section 2.2)."""
    return re.split("\nclass|\ndef|\n#|\nif|\nprint", completion, maxsplit=1)[0]


def build_check_program(problem: Mapping[str, str], completion: str) -> str:
    """Return the program that ends without error if a HumanEval problem's completion is
    correct."""
    function = f"{problem['prompt']}{completion}"
    return f"{function}\n{problem['test']}\ncheck({problem['entry_point']})"


def score_code_samples(
    problems: Iterable[Mapping[str, str]],
    samples: Sequence[Mapping[str, str]],
    ks: Sequence[int] = (1, 10, 100),
    limits: SandboxLimits | None = None,
    workers: int | None = None,
) -> tuple[dict[str, float], list[ExecutionResult]]:
    """Run samples (``task_id``, ``completion``) against HumanEval's problems. Return
    ``pass@k`` as means over the problems with samples, for each k that all of these
    have samples for, ``num_problems`` and ``num_samples``; and each sample's result, in
    order."""
    problems_by_id = {problem["task_id"]: problem for problem in problems}
    task_ids = [sample["task_id"] for sample in samples]
    programs = []
    for task_id, sample in zip(task_ids, samples, strict=True):
        if task_id not in problems_by_id:
            message = f"a sample's {task_id} is no problem of the data"
            raise MaxlmError(message, fix="see --data")
        problem = problems_by_id[task_id]
        programs.append(build_check_program(problem, sample["completion"]))
    score, results = _score_programs(task_ids, programs, ks, limits, workers)
    score["num_problems"] = len(set(task_ids))
    score["num_samples"] = len(task_ids)
    return score, results


def evaluate_code(
    references: Sequence[str],
    predictions: Sequence[Sequence[str]],
    k: Sequence[int] = (1, 10, 100),
) -> tuple[dict[str, float], list[ExecutionResult]]:
    """Score each problem's candidate programs by its tests, as Hugging Face's metric
    ``code_eval`` does, in the sandbox."""
    problems: list[int] = []
    programs: list[str] = []
    pairs = zip(references, predictions, strict=True)
    for number, (tests, candidates) in enumerate(pairs):
        for candidate in candidates:
            problems.append(number)
            programs.append(f"{candidate}\n{tests}")
    return _score_programs(problems, programs, k)


def _score_programs(
    problems: Sequence[str | int],
    programs: Sequence[str],
    ks: Sequence[int],
    limits: SandboxLimits | None = None,
    workers: int | None = None,
) -> tuple[dict[str, float], list[ExecutionResult]]:
    """Run each problem's candidates; return pass@k as means over the problems, and
    results."""
    results = run_all(programs, limits, workers)
    counts = Counter(problems)
    num_correct = Counter[str | int]()
    for problem, result in zip(problems, results, strict=True):
        num_correct[problem] += result.passed
    fewest_samples = min(counts.values(), default=0)
    score: dict[str, float] = {}
    for k in ks:
        if k <= fewest_samples:
            estimates = [
                estimate_pass_at_k(num_samples, num_correct[problem], k)
                for problem, num_samples in counts.items()
            ]
            score[f"pass@{k}"] = sum(estimates) / len(estimates)
    return score, results


@contextmanager
def replace_code_eval() -> Iterator[None]:
    """Make `evaluate.load("code_eval")` give `evaluate_code` within the block, in which
    to load lm-evaluation-harness's tasks (humaneval, mbpp and their kin): they load and
    keep the metric."""
    import evaluate

    original_load: Any = evaluate.load
    sandboxed = SimpleNamespace(compute=evaluate_code)

    def load(path: str, *arguments: object, **options: object) -> Any:
        if path == "code_eval":
            return sandboxed
        return original_load(path, *arguments, **options)

    # Modules that are loaded already would keep the metric that they have.
    for name in ("humaneval", "mbpp"):
        sys.modules.pop(f"lm_eval.tasks.{name}.utils", None)
    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original_load
