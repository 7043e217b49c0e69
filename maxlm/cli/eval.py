"""maxlm eval"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from maxlm.cli import common
from maxlm.cli.common import MeshOption, SettingsArgument, StepOption, TemplateOption
from maxlm.cli.eval_code import evaluate_swe_bench, score_humaneval_samples
from maxlm.cli.eval_context import show_passkey_accuracy, show_position_perplexities
from maxlm.cli.eval_judge import evaluate_mt_bench, serve_arena, show_ratings
from maxlm.cli.eval_report import compare, report

FolderOption = Option(exists=True, file_okay=False, help="Local files of the tasks' rows.")


def command(
    context: typer.Context,
    model: Annotated[str, Argument(help="A run's folder, a Hugging Face checkpoint's, or a URL.")],
    tasks: Annotated[str, Option(help="Names by commas: mmlu,gsm8k,arc_challenge.")],
    settings: SettingsArgument = None,
    shots: Annotated[int | None, Option(min=0, help="Examples; default: the task's.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Rows of each task at most.")] = None,
    data: Annotated[Path | None, FolderOption] = None,
    output: Annotated[Path | None, Option(help="Folder of the results.")] = None,
    chat: Annotated[bool, Option("--chat", help="Ask by the model's chat template.")] = False,
    system: Annotated[str | None, Option(help="Text of the system's message.")] = None,
    seed: Annotated[int | None, Option(min=0, help="Of what tasks draw.")] = None,
    mesh: MeshOption = None,
    step: StepOption = None,
    template: TemplateOption = None,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness: mmlu, mmlu_pro, gsm8k, minerva_math,
    arc_challenge, hellaswag, winogrande, truthfulqa_mc2, gpqa_main_zeroshot, and others.

    A URL is that of an OpenAI-compatible server: http://host:8000/v1. Settings are the engine's, as
    max_sequences=32; max_length is the tokens that the model reads at once.
    """
    from maxlm.runtime.session import distributed_session
    from maxlm.train.config import FaultToleranceConfig

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    options = {**context.params, "tasks": names, "settings": settings or ()}
    faults = FaultToleranceConfig()
    with distributed_session(
        {"eval": [model, *names, *options["settings"]]},
        join_timeout_seconds=faults.join_seconds,
        peer_timeout_seconds=faults.peer_seconds,
    ):
        import jax

        from maxlm.evaluation.results import list_metrics
        from maxlm.programs.evaluate import evaluate_model

        results, folder = evaluate_model(**options)
        if jax.process_index() != 0:
            return
    table = common.make_numeric_table("task", ["metric", "value", "±", "rows", "seconds"])
    seconds = dict(results["maxlm"]["seconds_by_task"])
    for task, metric, value, error, rows in list_metrics(results):
        show = "{:.4f}".format if abs(value) < 1000 else "{:.4g}".format
        spread = "" if error is None else show(error)
        spent = f"{seconds.pop(task):.1f}" if task in seconds else ""
        table.add_row(task, metric, show(value), spread, str(rows), spent)
    common.open_console().print(table)
    if missing := results["missing"]:
        print(f"{len(missing)} tasks have no files in {data}, as {', '.join(missing[:3])}")
    print(f"written: {folder}")


subcommands = {"humaneval-samples": score_humaneval_samples, "swe-bench": evaluate_swe_bench}
subcommands |= {"report": report, "diff": compare}
subcommands |= {"mt-bench": evaluate_mt_bench, "ratings": show_ratings, "arena": serve_arena}
subcommands |= {"positions": show_position_perplexities, "passkey": show_passkey_accuracy}
