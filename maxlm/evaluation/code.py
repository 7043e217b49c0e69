"""Functional correctness of generated code: HumanEval and pass@k (Chen et al.,
2107.03374)."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from types import SimpleNamespace

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import ExecutionResult, SandboxLimits, run_all


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples is correct:
    equation 1 of Chen et al. 2021, 1 - C(n - c, k) / C(n, k). Raises ValueError unless
    1 <= k <= n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{k} of {num_correct} correct among {num_samples} samples"
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def truncate_completion(completion: str) -> str:
    """Return a completion up to where a function of HumanEval ends (Chen et al.,
    section 2.2)."""
    return re.split("\nclass|\ndef|\n#|\nif|\nprint", completion, maxsplit=1)[0]


def build_check_program(problem: Mapping[str, str], completion: str) -> str:
    """Return the program that ends without error if a HumanEval problem's completion is
    correct."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


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
    by_id = {problem["task_id"]: problem for problem in problems}
    if unknown := [each["task_id"] for each in samples if each["task_id"] not in by_id]:
        raise MaxlmError(
            f"a sample's {unknown[0]} is no problem of the data", fix="see --data"
        )
    programs = [
        build_check_program(by_id[each["task_id"]], each["completion"])
        for each in samples
    ]
    tasks = [each["task_id"] for each in samples]
    score, results = _score_programs(tasks, programs, ks, limits, workers)
    return score | {"num_problems": len({*tasks}), "num_samples": len(tasks)}, results


def evaluate_code(
    references: Sequence[str],
    predictions: Sequence[Sequence[str]],
    k: Sequence[int] = (1, 10, 100),
) -> tuple[dict[str, float], list[ExecutionResult]]:
    """Score each problem's candidate programs by its tests, as Hugging Face's metric
    ``code_eval`` does, in the sandbox."""
    pairs = zip(references, predictions, strict=True)
    programs = [f"{program}\n{tests}" for tests, each in pairs for program in each]
    problems = [number for number, each in enumerate(predictions) for _ in each]
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
    pairs = zip(problems, results, strict=True)
    correct = Counter(name for name, result in pairs if result.passed)
    score = {}
    for k in ks:
        if k <= min(counts.values(), default=0):
            each = [
                estimate_pass_at_k(n, correct[name], k) for name, n in counts.items()
            ]
            score[f"pass@{k}"] = sum(each) / len(each)
    return score, results


@contextmanager
def replace_code_eval() -> Iterator[None]:
    """Make `evaluate.load("code_eval")` give `evaluate_code` within the block, in which
    to load lm-evaluation-harness's tasks (humaneval, mbpp and their kin): they load and
    keep the metric."""
    import evaluate

    load = evaluate.load
    for name in ("humaneval", "mbpp"):  # Loaded before, they would keep the other.
        sys.modules.pop(f"lm_eval.tasks.{name}.utils", None)
    ours = SimpleNamespace(compute=evaluate_code)
    evaluate.load = lambda path, *rest, **options: (
        ours if path == "code_eval" else load(path, *rest, **options)
    )
    try:
        yield
    finally:
        evaluate.load = load
