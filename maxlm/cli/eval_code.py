"""maxlm eval humaneval-samples, maxlm eval swe-bench"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from maxlm.cli.common import JsonOption, WorkersOption, make_numeric_table, open_console, print_json

_SecondsOption = Annotated[float, Option(min=0.1, help="Seconds a program may take.")]


def score_humaneval_samples(
    samples: Annotated[Path, Argument(help="JSON lines of task_id and completion.")],
    data: Annotated[Path, Option(help="HumanEval.jsonl, or .jsonl.gz.")],
    k: Annotated[str, Option(help="Of pass@k.")] = "1,10,100",
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

    from maxlm.config import MaxlmError
    from maxlm.evaluation.code import read_records, score_samples, truncate_completion
    from maxlm.evaluation.sandbox import SandboxLimits, detect_isolation
    from maxlm.runtime.files import replace_file

    if not all(each.isdigit() and int(each) > 0 for each in k.split(",")):
        raise MaxlmError(f"--k {k}", fix="numbers by commas: 1,10,100")
    problems = read_records(data, "task_id", "prompt", "test", "entry_point")
    records = read_records(samples, "task_id", "completion")
    if truncate:
        records = [r | {"completion": truncate_completion(r["completion"])} for r in records]
    limits = SandboxLimits(seconds=seconds)
    ks = [int(each) for each in k.split(",")]
    score, results = score_samples(problems, records, ks, limits, workers)
    score["isolation"] = detect_isolation().layer
    target = output or samples.with_name(f"{samples.name}_results.jsonl")
    with replace_file(target) as new, open(new, "w") as file:
        for record, result in zip(records, results, strict=True):
            print(json.dumps(record | {"result": str(result), "passed": result.passed}), file=file)
    if as_json:
        return print_json(score)
    table = make_numeric_table("HumanEval", ["value"])
    for name, value in score.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4f}" if name.startswith("pass@") else str(value))
    open_console().print(table)
    print(f"written: {target} (isolation: {score['isolation']})")


def run_swe_bench(
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
    from dataclasses import replace

    from maxlm.evaluation.code import read_records
    from maxlm.evaluation.swe_bench import LIMITS, evaluate_predictions
    from maxlm.runtime.files import replace_file

    keys = ("instance_id", "repo", "base_commit", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS")
    report = evaluate_predictions(
        read_records(predictions, "instance_id", "model_patch"),
        read_records(instances, *keys),
        repositories,
        logs=output,
        limits=replace(LIMITS, seconds=seconds),
        readable=readable or (),
    )
    if output:
        with replace_file(output / "report.json") as new:
            new.write_text(json.dumps(report, indent=2))
    if as_json:
        return print_json(report)
    table = make_numeric_table("SWE-bench", ["instances"])
    for name, value in report.items():
        if name.endswith("_instances"):
            table.add_row(name.removesuffix("_instances").replace("_", " "), str(value))
    open_console().print(table)
    for name in report["error_ids"]:
        typer.echo(f"does not apply: {name}")
