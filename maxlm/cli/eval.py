"""maxlm eval"""

import json
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, BadParameter, Option

from maxlm.cli.common import (
    CoordinatorOption,
    JsonOption,
    MeshOption,
    ModelArgument,
    NumProcessesOption,
    ProcessIdOption,
    SettingsArgument,
    StepOption,
    TemplateOption,
    WorkersOption,
    make_cluster_variables,
    print_json,
    print_table,
)
from maxlm.config import MaxlmError
from maxlm.runtime.files import replace_file
from maxlm.runtime.json_files import parse_json
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.progress import show_progress

FolderOption = Option(exists=True, file_okay=False, help="Folder of the tasks' rows.")
ModelsArgument = Annotated[
    list[str], Argument(metavar="URL[#MODEL]...", help="OpenAI-compatible endpoints.")
]
TokensOption = Annotated[int, Option(min=1, help="Most tokens of an answer.")]
SecondsOption = Annotated[float, Option(min=0.1, help="Seconds a program may take.")]


def command(
    model: Annotated[
        str, Argument(help="A run's folder, a Hugging Face checkpoint's, or a URL.")
    ],
    tasks: Annotated[str, Option(help="Names, separated by commas: mmlu,gsm8k.")],
    settings: SettingsArgument = None,
    shots: Annotated[
        int | None, Option(min=0, help="Few-shot examples; default: the task's.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Most rows of each task.")] = None,
    data: Annotated[Path | None, FolderOption] = None,
    output: Annotated[Path | None, Option(help="Folder to write results to.")] = None,
    chat: Annotated[
        bool, Option("--chat", help="Prompt with the model's chat template.")
    ] = False,
    system: Annotated[str | None, Option(help="The system message.")] = None,
    seed: Annotated[int | None, Option(min=0, help="Seed of what tasks draw.")] = None,
    mesh: MeshOption = None,
    step: StepOption = None,
    template: TemplateOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness: mmlu, mmlu_pro, gsm8k,
    minerva_math, arc_challenge, hellaswag, winogrande, truthfulqa_mc2,
    gpqa_main_zeroshot, and others.

    A URL is that of an OpenAI-compatible server: http://host:8000/v1. Settings are the
    engine's, as max_sequences=32; max_length is the tokens that the model reads at
    once.
    """
    from maxlm.run.train_config import FaultToleranceConfig
    from maxlm.runtime.session import distributed_session

    names = _split_names(tasks)
    faults = FaultToleranceConfig()
    with distributed_session(
        {"eval": [model, *names, *(settings or ())]},
        join_timeout_seconds=faults.join_seconds,
        peer_timeout_seconds=faults.peer_seconds,
        cluster_variables=make_cluster_variables(
            coordinator, num_processes, process_id
        ),
    ):
        import jax

        from maxlm.evaluation.program import evaluate_model
        from maxlm.evaluation.results import list_metrics

        results, folder = evaluate_model(
            model,
            names,
            settings or (),
            output=output,
            mesh=mesh,
            step=step,
            template=template,
            data=data,
            shots=shots,
            seed=seed,
            chat=chat,
            limit=limit,
            system=system,
        )
        if jax.process_index() != 0:
            return
    seconds_by_task = dict(results["maxlm"]["seconds_by_task"])
    rows = []
    for task, metric, value, error, num_rows in list_metrics(results):
        form = "{:.4f}" if abs(value) < 1000 else "{:.4g}"
        spread = "" if error is None else form.format(error)
        # Beside the first of a task's metrics alone.
        seconds = ""
        if task in seconds_by_task:
            seconds = f"{seconds_by_task.pop(task):.1f}"
        rows.append((task, metric, form.format(value), spread, str(num_rows), seconds))
    print_table("task", ("metric", "value", "±", "rows", "seconds"), rows)
    missing = results["missing"]
    if missing:
        examples = ", ".join(missing[:3])
        print(f"{len(missing)} tasks have no files in {data}, as {examples}")
    print(f"written: {folder}")


def _split_names(text: str) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def report(
    folders: Annotated[
        list[Path], Argument(help="Runs, folders of results, or results files.")
    ],
    output: Annotated[
        Path, Option(help="HTML file to write; JSON goes beside it.")
    ] = Path("report.html"),
    samples: Annotated[
        int, Option(min=0, help="Most samples of each task or group.")
    ] = 20,
) -> None:
    """Write an HTML page of evaluations: tasks by models, subjects, checkpoints,
    samples, cost."""
    from maxlm.evaluation.report import build_report, write_report
    from maxlm.evaluation.results import read_newest_evaluations

    evaluations = [
        evaluation
        for folder in folders
        for evaluation in read_newest_evaluations(folder)
    ]
    page = build_report(evaluations, samples)
    print("written:", *write_report(page, output))


def compare(
    first: Annotated[
        Path, Argument(help="A run, folder of results, or results file: A.")
    ],
    second: Annotated[Path, Argument(help="Another: B.")],
    alpha: Annotated[
        float, Option(min=1e-6, max=0.5, help="Probability of any false finding.")
    ] = 0.05,
    tasks: Annotated[
        str, Option(help="Tasks or groups, separated by commas; default: all.")
    ] = "",
) -> None:
    """Compare two evaluations by paired tests; exit code 1 if B is significantly worse
    in a task."""
    from maxlm.evaluation.compare import compare_evaluations
    from maxlm.evaluation.results import read_newest_evaluations

    evaluation_a = read_newest_evaluations(first)[-1]
    evaluation_b = read_newest_evaluations(second)[-1]
    comparisons, skipped = compare_evaluations(
        evaluation_a, evaluation_b, _split_names(tasks), alpha
    )
    columns = ("A", "B", "B - A", f"{1 - alpha:.3g} interval", "p", "docs", "verdict")
    rows = []
    for comparison in comparisons:
        low, high = comparison.interval
        form = "{:.3f}"
        interval = f"{low:.2f} to {high:.2f}"
        if max(abs(low), abs(high)) >= 1000:
            form = "{:.4g}"
            interval = f"{low:.3g} to {high:.3g}"
        row = (
            f"{comparison.task} {comparison.metric}",
            form.format(comparison.first),
            form.format(comparison.second),
            form.format(comparison.second - comparison.first),
            interval,
            f"{comparison.p:.3g}",
            f"{comparison.num_docs:,}",
            comparison.verdict,
        )
        rows.append(row)
    print_table("task", columns, rows, with_lines=False)
    print(f"A: {evaluation_a.path}")
    print(f"B: {evaluation_b.path}")
    for comparison in comparisons:
        for note in comparison.notes:
            print(note)
    for reason in skipped:
        print(f"not compared: {reason}")
    if any(comparison.verdict == "falls" for comparison in comparisons):
        raise typer.Exit(1)


def show_position_perplexities(
    models: Annotated[
        list[str], Argument(help="Folders of runs or Hugging Face checkpoints.")
    ],
    text: Annotated[Path, Option(exists=True, dir_okay=False, help="A file of text.")],
    length: Annotated[
        int | None, Option(min=3, help="Tokens of a window; default: max_seq_len.")
    ] = None,
    windows: Annotated[
        int, Option(min=1, help="Most windows of the text that are read.")
    ] = 16,
    mesh: MeshOption = None,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show models' perplexity by the position of a token, that is, by its context, up to
    --length."""
    from maxlm.evaluation.program import evaluate_position_losses

    losses_of_model = {
        model: evaluate_position_losses(
            model, text, length=length, num_windows=windows, mesh=mesh, step=step
        )
        for model in models
    }
    if as_json:
        return print_json(
            {
                model: {str(end): loss for end, loss in losses.items()}
                for model, losses in losses_of_model.items()
            }
        )
    # Each loss is of the positions up to this end, from the one before.
    ends = sorted({end for losses in losses_of_model.values() for end in losses})
    rows = []
    start = 0
    for end in ends:
        perplexities = [
            f"{exp(losses[end]):.4g}" if end in losses else ""
            for losses in losses_of_model.values()
        ]
        rows.append((f"{start + 1:,} to {end:,}", *perplexities))
        start = end
    print_table("positions", models, rows, title="perplexity")


def show_passkey_accuracy(
    model: ModelArgument,
    lengths: Annotated[str, Option(help="Tokens, separated by commas.")],
    depths: Annotated[
        str, Option(help="Places of the key, in percent of the text.")
    ] = "0,25,50,75,100",
    samples: Annotated[int, Option(min=1, help="Keys for each length and depth.")] = 10,
    seed: Annotated[int, Option(min=0, help="Seed of the keys.")] = 0,
    mesh: MeshOption = None,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how often a model finds a number hidden in long texts, by length and
    depth."""
    from maxlm.evaluation.passkey import evaluate_passkey
    from maxlm.evaluation.program import load_engine_for_length

    num_tokens = _parse_integers(lengths, "--lengths", 1, 2**31)
    percents = _parse_integers(depths, "--depths", 0, 100)
    engine = load_engine_for_length(model, max(num_tokens), step=step, mesh=mesh)
    with show_progress("answers") as progress:
        accuracy = evaluate_passkey(
            engine,
            num_tokens,
            percents,
            samples,
            seed=seed,
            on_progress=partial(progress, model),
        )
    if as_json:
        return print_json(
            {"lengths": num_tokens, "depths": percents, "accuracy": accuracy}
        )
    rows = []
    for length, shares in zip(num_tokens, accuracy, strict=True):
        rows.append((f"{length:,}", *(f"{share:.0%}" for share in shares)))
    columns = [f"{percent}%" for percent in percents]
    print_table("length", columns, rows, title="passkeys found")


def _parse_integers(text: str, option: str, minimum: int, maximum: int) -> list[int]:
    """Parse integers that commas separate, each between bounds."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(minimum <= value <= maximum for value in values):
        raise BadParameter(
            f"{option} takes integers from {minimum} to {maximum:,}, separated by "
            f"commas"
        )
    return values


def score_humaneval_samples(
    samples: Annotated[Path, Argument(help="JSON lines of task_id and completion.")],
    data: Annotated[Path, Option(help="HumanEval.jsonl, or .jsonl.gz.")],
    k: Annotated[list[int], Option(min=1, help="The k of pass@k.")] = [1, 10, 100],  # noqa: B006
    truncate: Annotated[
        bool,
        Option("--truncate", help="Cut each completion at the end of its function."),
    ] = False,
    seconds: SecondsOption = 10.0,
    workers: WorkersOption = None,
    output: Annotated[
        Path | None, Option(help="Default: SAMPLES_results.jsonl.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score completions of HumanEval's problems: pass@k, by running them in a
    sandbox."""
    from maxlm.evaluation.code import score_code_samples, truncate_completion
    from maxlm.evaluation.records import read_json_records
    from maxlm.evaluation.sandbox import SandboxLimits, detect_isolation

    problems = read_json_records(data, ("task_id", "prompt", "test", "entry_point"))
    records = read_json_records(samples, ("task_id", "completion"))
    if truncate:
        records = [
            record | {"completion": truncate_completion(record["completion"])}
            for record in records
        ]
    score, results = score_code_samples(
        problems, records, k, SandboxLimits(seconds), workers
    )
    results_file = output or Path(f"{samples}_results.jsonl")
    with replace_file(results_file) as new, open(new, "w") as file:
        for record, result in zip(records, results, strict=True):
            record["result"] = result.message or "passed"
            record["passed"] = result.passed
            print(json.dumps(record), file=file)
    _print_score("HumanEval", score | {"isolation": detect_isolation()}, as_json)


def evaluate_swe_bench(
    predictions: Annotated[
        Path, Argument(help="JSON or JSON lines: instance_id, model_patch.")
    ],
    instances: Annotated[
        Path, Option(help="The benchmark's instances, JSON or JSON lines.")
    ],
    repositories: Annotated[
        Path, Option(exists=True, help="Folder of clones: owner__name, or name.")
    ],
    readable: Annotated[
        list[Path] | None, Option(help="Folders that tests may read.")
    ] = None,
    seconds: SecondsOption = 1800.0,
    output: Annotated[
        Path | None, Option(help="Folder of report.json and logs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Apply predicted patches in local clones, run the tests, and report which are
    resolved."""
    from maxlm.evaluation.records import read_json_records
    from maxlm.evaluation.swe_bench import evaluate_predictions

    keys = (
        "instance_id",
        "repo",
        "base_commit",
        "test_patch",
        "FAIL_TO_PASS",
        "PASS_TO_PASS",
    )
    tasks = read_json_records(instances, keys)
    answers = read_json_records(predictions, ("instance_id", "model_patch"))
    report = evaluate_predictions(
        answers,
        tasks,
        repositories,
        output,
        seconds=seconds,
        readable=readable or (),
    )
    if output:
        with replace_file(output / "report.json") as new:
            new.write_text(json.dumps(report, indent=2))
    _print_score("SWE-bench", report, as_json)


def _print_score(title: str, score: JsonObject, as_json: bool) -> None:
    if as_json:
        return print_json(score)
    rows = []
    for name, value in score.items():
        if isinstance(value, dict | list):
            continue
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        rows.append((name, text))
    print_table(title, ["value"], rows)


def evaluate_mt_bench(
    models: ModelsArgument,
    judge: Annotated[
        str,
        Option(
            metavar="URL[#MODEL]",
            help="The judge; key: $JUDGE_API_KEY, else $OPENAI_API_KEY.",
        ),
    ],
    mode: Annotated[
        Literal["single", "pairwise"], Option(help="Grade answers, or compare pairs.")
    ] = "single",
    data: Annotated[
        Path | None, Option(help="FastChat's data/mt_bench folder.")
    ] = None,
    output: Annotated[Path, Option(help="Folder of answers and judgments.")] = Path(
        "runs/mt_bench"
    ),
    limit: Annotated[
        int | None, Option(min=1, help="Number of questions, evenly spread.")
    ] = None,
    max_tokens: TokensOption = 1024,
    judge_max_tokens: Annotated[
        int, Option(min=1, help="Most tokens of a judgment.")
    ] = 2048,
    judge_body: Annotated[
        str,
        Option(
            metavar="JSON", help='More fields of its requests: \'{"regex": "..."}\'.'
        ),
    ] = "{}",
    concurrency: Annotated[int, Option(min=1, help="Concurrent requests.")] = 4,
) -> None:
    """Answer MT-Bench's questions and judge the answers; the same command resumes after
    an interruption."""
    from maxlm.evaluation.endpoint import open_endpoint
    from maxlm.evaluation.mt_bench import load_mt_bench, run_mt_bench

    questions = load_mt_bench(data, limit)
    judge_endpoint = open_endpoint(judge, "JUDGE_API_KEY")
    fix = 'give a JSON object, such as {"regex": "..."}'
    extra_body = parse_json(judge_body, "--judge-body", fix)
    if not isinstance(extra_body, dict):
        raise MaxlmError("no JSON object", where="--judge-body", fix=fix)
    judge_endpoint = replace(judge_endpoint, extra_body=extra_body)
    endpoints = [open_endpoint(model) for model in models]
    is_pairwise = mode == "pairwise"
    with show_progress("requests") as progress:
        report = run_mt_bench(
            questions,
            output,
            endpoints,
            judge_endpoint,
            pairwise=is_pairwise,
            max_tokens=max_tokens,
            judge_max_tokens=judge_max_tokens,
            concurrency=concurrency,
            progress=progress,
        )
    for name, summary in report["summaries"].items():
        title = f"share of wins: {name}" if is_pairwise else name
        _print_mt_bench_summary(title, summary)
    unreadable = report["unreadable"]
    judgments = report["judgments"]
    if unreadable:
        share = f"{unreadable} of {judgments} judgments"
        print(f"judge {judge_endpoint.model}: {share} have no verdict that can be read")
    refused = report["refused"]
    if refused:
        print(f"{len(refused)} requests refused; the first: {refused[0]}")
    if is_pairwise:
        bias = report["position_bias"]
        if bias["first_share"] is not None:
            _print_position_bias(judge_endpoint.model, bias)
    if unreadable == judgments:
        raise typer.Exit(1)


def _print_mt_bench_summary(title: str, summary: JsonObject) -> None:
    """Print mean grades, or shares of wins, by category and turn."""
    rows = []
    for category, cells in summary.items():
        means = []
        for cell in cells.values():
            mean = cell["mean"]
            means.append("–" if mean is None else f"{mean:.2f}")
        both = cells["both"]
        interval = "–"
        if both["mean"] is not None:
            interval = f"{both['low']:.2f} to {both['high']:.2f}"
        counts = (str(both["n"]), str(both["unreadable"]))
        rows.append((category, *means, interval, *counts))
    columns = ("Turn 1", "Turn 2", "Both", "95%", "Read", "Unreadable")
    print_table("Category", columns, rows, title=title)


def _print_position_bias(judge: str, bias: JsonObject) -> None:
    """Print whether a judge prefers the answer that it reads first."""
    verdict = ": biased!" if bias["is_biased"] else ""
    print(
        f"judge {judge}: {bias['consistency']:.0%} of {bias['num_pairs']} pairs keep "
        f"their verdict when the order changes; {bias['first_share']:.0%} of the wins "
        f"are the first answer's, p = {bias['p_value']:.2g}{verdict}"
    )


def show_ratings(
    battles: Annotated[
        Path,
        Argument(exists=True, dir_okay=False, help="JSONL, or an arena's database."),
    ],
    style_control: Annotated[
        bool, Option(help="Control for length, headers, lists and bold text.")
    ] = False,
    output: Annotated[
        Path | None, Option(help="JSON file; default: beside the battles.")
    ] = None,
) -> None:
    """Rate models by their battles: Bradley-Terry with 95% intervals, and online
    Elo."""
    from maxlm.evaluation.ratings import compute_leaderboard, read_battles

    leaderboard = compute_leaderboard(read_battles(battles), style_control)
    if not leaderboard["rows"] or leaderboard["rows"][0]["rating"] is None:
        raise MaxlmError(leaderboard["note"], where=str(battles))
    rows = []
    for entry in leaderboard["rows"]:
        interval = "–"
        if entry["low"] is not None:
            interval = f"{entry['low']:.0f} to {entry['high']:.0f}"
        row = (
            entry["model"],
            str(entry["rank"] or "–"),
            f"{entry['rating']:.0f}",
            interval,
            f"{entry['elo']:.0f}",
            str(entry["battles"]),
        )
        rows.append(row)
    print_table("Model", ("Rank", "Rating", "95%", "Elo", "Battles"), rows)
    for name, coefficient in leaderboard["style"].items():
        print(f"style, {name}: {coefficient:+.3f}")
    if leaderboard["note"]:
        print(f"note: {leaderboard['note']}")
    with replace_file(output or battles.with_suffix(".ratings.json")) as new:
        new.write_text(json.dumps(leaderboard, indent=1), "utf-8")


def serve_arena(
    models: ModelsArgument,
    database: Annotated[Path, Option(help="SQLite file of the battles.")] = Path(
        "arena.db"
    ),
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 8080,
    temperature: Annotated[
        float, Option(min=0, help="Temperature of the answers.")
    ] = 0.7,
    max_tokens: TokensOption = 1024,
) -> None:
    """Serve a page where two models answer blindly, and votes rate them."""
    import uvicorn

    from maxlm.evaluation.arena import Arena
    from maxlm.evaluation.endpoint import open_endpoint
    from maxlm.serving.server import bind_socket

    listener = bind_socket(host, port)
    endpoints = [open_endpoint(model) for model in models]
    arena = Arena(endpoints, database, temperature=temperature, max_tokens=max_tokens)
    _, bound_port = listener.getsockname()[:2]
    print(f"http://{host}:{bound_port}", flush=True)
    config = uvicorn.Config(arena.make_app(), lifespan="off", log_config=None)
    uvicorn.Server(config).run([listener])


subcommands = {
    "humaneval-samples": score_humaneval_samples,
    "swe-bench": evaluate_swe_bench,
    "report": report,
    "diff": compare,
    "mt-bench": evaluate_mt_bench,
    "ratings": show_ratings,
    "arena": serve_arena,
    "positions": show_position_perplexities,
    "passkey": show_passkey_accuracy,
}
