"""Functional correctness of generated code: HumanEval and pass@k (Chen et al., 2107.03374)."""

import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import ExecutionResult, SandboxLimits, run_all

STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion of a HumanEval function ends (Chen et al. 2021, section 2.2)."""


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples is correct: equation 1
    of Chen et al. 2021, 1 - C(n - c, k) / C(n, k). Raises ValueError unless 1 <= k <= n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def truncate_completion(completion: str) -> str:
    """Return a completion up to the first of `STOP_SEQUENCES`."""
    return re.split("|".join(STOP_SEQUENCES), completion, maxsplit=1)[0]


def build_check_program(problem: Mapping[str, str], completion: str) -> str:
    """Return the program that ends without error if a HumanEval problem's completion is correct."""
    check = f"{problem['test']}\ncheck({problem['entry_point']})"
    return f"{problem['prompt']}{completion}\n{check}"


def score_samples(
    problems: Iterable[Mapping[str, str]],
    samples: Sequence[Mapping[str, str]],
    ks: Sequence[int] = (1, 10, 100),
    limits: SandboxLimits | None = None,
    workers: int | None = None,
) -> tuple[dict[str, Any], list[ExecutionResult]]:
    """Run samples (``task_id``, ``completion``) against HumanEval's problems.

    Returns:
        ``pass@k`` as means over the problems with samples, for each k that all of them have samples
        for; ``num_problems``, ``num_samples``; the same by task in ``tasks``; and each sample's
        result, in order.
    """
    by_id = {problem["task_id"]: problem for problem in problems}
    for number, sample in enumerate(samples, 1):
        if sample["task_id"] not in by_id:
            what = f"sample {number} is of {sample['task_id']}, which is no problem of the data"
            raise MaxlmError(what, fix="name the problems' file: --data")
    programs = [build_check_program(by_id[each["task_id"]], each["completion"]) for each in samples]
    results = run_all(programs, limits, workers)
    passed = defaultdict[str, list[bool]](list)
    for sample, result in zip(samples, results, strict=True):
        passed[sample["task_id"]].append(result.passed)
    counts = {task: (len(each), sum(each)) for task, each in passed.items()}
    tasks = {
        task: {"num_samples": n, "num_correct": c} | compute_mean_pass_at_k([(n, c)], ks)
        for task, (n, c) in counts.items()
    }
    score = compute_mean_pass_at_k(counts.values(), ks)
    score |= {"num_problems": len(tasks), "num_samples": len(samples)}
    return score | {"tasks": tasks}, results


def compute_mean_pass_at_k(
    counts: Collection[tuple[int, int]], ks: Sequence[int]
) -> dict[str, float]:
    """Return ``pass@k`` as the mean over problems with (samples, correct ones), for each k that all
    problems have samples for."""
    fewest = min((samples for samples, _ in counts), default=0)
    return {
        f"pass@{k}": sum(estimate_pass_at_k(n, c, k) for n, c in counts) / len(counts)
        for k in ks
        if k <= fewest
    }


def evaluate_code(
    references: Sequence[str],
    predictions: Sequence[Sequence[str]],
    k: Sequence[int] = (1, 10, 100),
    num_workers: int | None = None,
    timeout: float = 10.0,
) -> tuple[dict[str, float], list[list[ExecutionResult]]]:
    """Score programs in the sandbox, with the arguments of Hugging Face's metric ``code_eval``.

    Args:
        references: each problem's tests.
        predictions: each problem's candidate programs.
        timeout: seconds a program.

    Returns:
        ``pass@k``, of those k that every problem has candidates for; each candidate's result.
    """
    pairs = zip(references, predictions, strict=True)
    programs = [f"{program}\n{tests}" for tests, each in pairs for program in each]
    found = iter(run_all(programs, SandboxLimits(seconds=timeout), num_workers))
    results = [[next(found) for _ in each] for each in predictions]
    counts = [(len(each), sum(result.passed for result in each)) for each in results]
    return compute_mean_pass_at_k(counts, k), results


@contextmanager
def replace_code_eval() -> Iterator[None]:
    """Make `evaluate.load("code_eval")` give `evaluate_code` within the block.

    lm-evaluation-harness's tasks (humaneval, mbpp and their kin) load the metric, from the network,
    as they are loaded, and keep it: load them within the block, with
    ``confirm_run_unsafe_code=True``.
    """
    import evaluate

    load = evaluate.load
    for name in ("humaneval", "mbpp"):  # Loaded before, they would keep the other.
        sys.modules.pop(f"lm_eval.tasks.{name}.utils", None)

    def load_ours(path: str, *arguments: Any, **options: Any) -> Any:
        if path == "code_eval":
            return SimpleNamespace(compute=evaluate_code)
        return load(path, *arguments, **options)

    evaluate.load = load_ours
    try:
        yield
    finally:
        evaluate.load = load


def read_records(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Read JSON objects that all have `keys`: one a line, or a list, or the values of an object;
    a name that ends in ".gz" is decompressed. Raises MaxlmError."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if path.name.removesuffix(".gz").endswith(".json"):
            found = json.loads(text)
            records = list(found.values()) if isinstance(found, dict) else found
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise MaxlmError(f"no readable JSON lines ({error})", where=str(path)) from error
    for number, record in enumerate(records, 1):
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            what = f"record {number} has no {', '.join(missing)}"
            raise MaxlmError(what, where=str(path), fix=f"each needs {', '.join(keys)}")
    return records
