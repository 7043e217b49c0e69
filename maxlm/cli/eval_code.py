"""maxlm eval humaneval-samples, maxlm eval swe-bench"""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from maxlm.cli.common import JsonOption, WorkersOption, make_numeric_table, open_console, print_json

_SecondsOption = Annotated[float, Option(min=0.1, help="Seconds a program may take.")]


def score_humaneval_samples(
    samples: Annotated[Path, Argument(help="JSON lines of task_id and completion.")],
    data: Annotated[Path, Option(help="HumanEval.jsonl, or .jsonl.gz.")],
    k: Annotated[list[int], Option(min=1, help="Of pass@k.")] = [1, 10, 100],  # noqa: B006
    truncate: Annotated[
        bool, Option("--truncate", help="Cut completions where a function of HumanEval ends.")
    ] = False,
    seconds: _SecondsOption = 10.0,
    workers: WorkersOption = None,
    output: Annotated[Path | None, Option(help="Default: SAMPLES_results.jsonl.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score completions of HumanEval's problems: pass@k, by running them in a sandbox."""
    import json

    from maxlm.evaluation.code import score_code_samples, truncate_completion
    from maxlm.evaluation.records import read_records
    from maxlm.evaluation.sandbox import SandboxLimits, detect_isolation
    from maxlm.runtime.files import replace_file

    problems = read_records(data, ("task_id", "prompt", "test", "entry_point"))
    records = read_records(samples, ("task_id", "completion"))
    if truncate:
        records = [r | {"completion": truncate_completion(r["completion"])} for r in records]
    score, results = score_code_samples(problems, records, k, SandboxLimits(seconds), workers)
    with replace_file(output or Path(f"{samples}_results.jsonl")) as new, open(new, "w") as file:
        for record, result in zip(records, results, strict=True):
            record |= {"result": result.message or "passed", "passed": result.passed}
            print(json.dumps(record), file=file)
    _print_score("HumanEval", score | {"isolation": detect_isolation()}, as_json)


def evaluate_swe_bench(
    predictions: Annotated[Path, Argument(help="instance_id, model_name_or_path, model_patch.")],
    instances: Annotated[Path, Option(help="The benchmark's instances, JSON or JSON lines.")],
    repositories: Annotated[Path, Option(exists=True, help="Clones: owner__name, or name.")],
    readable: Annotated[list[Path] | None, Option(help="Folders that tests read.")] = None,
    seconds: _SecondsOption = 1800.0,
    output: Annotated[Path | None, Option(help="Folder of report.json and logs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Apply predicted patches in local clones, run the tests, and report which are resolved."""
    import json

    from maxlm.evaluation.records import read_records
    from maxlm.evaluation.swe_bench import evaluate_predictions
    from maxlm.runtime.files import replace_file

    keys = ("instance_id", "repo", "base_commit", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS")
    tasks = read_records(instances, keys)
    answers = read_records(predictions, ("instance_id", "model_patch"))
    options = {"seconds": seconds, "readable": readable or ()}
    report = evaluate_predictions(answers, tasks, repositories, output, **options)
    if output:
        with replace_file(output / "report.json") as new:
            new.write_text(json.dumps(report, indent=2))
    _print_score("SWE-bench", report, as_json)


def _print_score(title: str, score: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(score)
    table = make_numeric_table(title, ["value"])
    for name, value in score.items():
        if not isinstance(value, dict | list):
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    open_console().print(table)
