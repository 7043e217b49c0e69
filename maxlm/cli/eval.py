"""maxlm eval"""

import json
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Annotated, Any, Literal

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
from maxlm.runtime.progress import show_progress

FolderOption = Option(
    exists=True, file_okay=False, help="Local files of the tasks' rows."
)
ModelsArgument = Annotated[
    list[str], Argument(metavar="URL[#MODEL]...", help="Endpoints.")
]
TokensOption = Annotated[int, Option(min=1, help="Of an answer.")]
SecondsOption = Annotated[float, Option(min=0.1, help="Seconds a program may take.")]


def command(
    context: typer.Context,
    model: Annotated[
        str, Argument(help="A run's folder, a Hugging Face checkpoint's, or a URL.")
    ],
    tasks: Annotated[str, Option(help="Names by commas: mmlu,gsm8k,arc_challenge.")],
    settings: SettingsArgument = None,
    shots: Annotated[
        int | None, Option(min=0, help="Examples; default: the task's.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Rows of each task at most.")
    ] = None,
    data: Annotated[Path | None, FolderOption] = None,
    output: Annotated[Path | None, Option(help="Folder of the results.")] = None,
    chat: Annotated[
        bool, Option("--chat", help="Ask by the model's chat template.")
    ] = False,
    system: Annotated[str | None, Option(help="Text of the system's message.")] = None,
    seed: Annotated[int | None, Option(min=0, help="Of what tasks draw.")] = None,
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

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    options = {**context.params, "tasks": names, "settings": settings or ()}
    for name in ("coordinator", "num_processes", "process_id"):
        del options[name]
    faults = FaultToleranceConfig()
    with distributed_session(
        {"eval": [model, *names, *options["settings"]]},
        join_timeout_seconds=faults.join_seconds,
        peer_timeout_seconds=faults.peer_seconds,
        cluster_variables=make_cluster_variables(
            coordinator, num_processes, process_id
        ),
    ):
        import jax

        from maxlm.evaluation.program import evaluate_model
        from maxlm.evaluation.results import list_metrics

        results, folder = evaluate_model(**options)
        if jax.process_index() != 0:
            return
    seconds = dict(results["maxlm"]["seconds_by_task"])
    cells = []
    for task, metric, value, error, rows in list_metrics(results):
        show = "{:.4f}".format if abs(value) < 1000 else "{:.4g}".format
        spread = "" if error is None else show(error)
        spent = f"{seconds.pop(task):.1f}" if task in seconds else ""
        cells.append((task, metric, show(value), spread, str(rows), spent))
    print_table("task", ("metric", "value", "±", "rows", "seconds"), cells)
    if missing := results["missing"]:
        print(
            f"{len(missing)} tasks have no files in {data}, as {', '.join(missing[:3])}"
        )
    print(f"written: {folder}")


def report(
    folders: Annotated[
        list[Path], Argument(help="Runs, folders of results, or results files.")
    ],
    output: Annotated[Path, Option(help="The page, .html; JSON beside it.")] = Path(
        "report.html"
    ),
    samples: Annotated[
        int, Option(min=0, help="At most so many of each task or group.")
    ] = 20,
) -> None:
    """Write a page of evaluations: tasks by models, subjects, checkpoints, samples,
    cost."""
    from maxlm.evaluation.report import build_report, write_report
    from maxlm.evaluation.results import find_evaluations

    found = [each for folder in folders for each in find_evaluations(folder)]
    print("written:", *write_report(build_report(found, samples), output))


def compare(
    first: Annotated[
        Path, Argument(help="A run, folder of results, or results file: A.")
    ],
    second: Annotated[Path, Argument(help="Another: B.")],
    alpha: Annotated[
        float, Option(min=1e-6, max=0.5, help="Chance of any false finding.")
    ] = 0.05,
    tasks: Annotated[
        str, Option(help="Tasks or groups, by commas; default: all.")
    ] = "",
) -> None:
    """Compare two evaluations by paired tests; exit with 1 if a task of B falls
    significantly."""
    from maxlm.evaluation.compare import compare_evaluations
    from maxlm.evaluation.results import find_evaluations

    a, b = (find_evaluations(folder)[-1] for folder in (first, second))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found, skipped = compare_evaluations(a, b, names, alpha)
    columns = ("A", "B", "B - A", f"{1 - alpha:.3g} interval", "p", "docs", "verdict")
    rows = []
    for each in found:
        large = max(map(abs, each.interval)) >= 1000
        form, near = (
            ("{:.4g}", "{:.3g} to {:.3g}") if large else ("{:.3f}", "{:.2f} to {:.2f}")
        )
        change = each.second - each.first
        figures = [form.format(value) for value in (each.first, each.second, change)]
        figures += [near.format(*each.interval), f"{each.p:.3g}"]
        rows.append(
            (f"{each.task} {each.metric}", *figures, f"{each.num_docs:,}", each.verdict)
        )
    print_table("task", columns, rows, box=None)
    notes = [
        f"A: {a.path}",
        f"B: {b.path}",
        *(note for each in found for note in each.notes),
    ]
    print(*notes, *(f"not compared: {each}" for each in skipped), sep="\n")
    if any(each.verdict == "falls" for each in found):
        raise typer.Exit(1)


def show_position_perplexities(
    models: Annotated[
        list[str], Argument(help="Folders of runs or Hugging Face checkpoints.")
    ],
    text: Annotated[Path, Option(exists=True, dir_okay=False, help="A file of text.")],
    length: Annotated[
        int | None, Option(min=3, help="Tokens; default: max_seq_len.")
    ] = None,
    windows: Annotated[
        int, Option(min=1, help="Parts of the text that are read, at most.")
    ] = 16,
    mesh: MeshOption = None,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show models' perplexity by the position of a token: with what context, up to
    --length."""
    from maxlm.evaluation.program import evaluate_position_losses

    options = {"length": length, "num_windows": windows, "mesh": mesh, "step": step}
    losses = {
        model: evaluate_position_losses(model, text, **options) for model in models
    }
    if as_json:
        return print_json(
            {
                model: {str(n): x for n, x in own.items()}
                for model, own in losses.items()
            }
        )
    ends = sorted({end for own in losses.values() for end in own})
    rows = []
    for start, end in zip([0, *ends], ends, strict=False):
        row = [f"{exp(own[end]):.4g}" if end in own else "" for own in losses.values()]
        rows.append((f"{start + 1:,} to {end:,}", *row))
    print_table("positions", models, rows, title="perplexity")


def show_passkey_accuracy(
    model: ModelArgument,
    lengths: Annotated[str, Option(help="Tokens, by commas.")],
    depths: Annotated[
        str, Option(help="Places of the key, in percent.")
    ] = "0,25,50,75,100",
    samples: Annotated[int, Option(min=1, help="Keys for each length and depth.")] = 10,
    seed: Annotated[int, Option(min=0, help="Of the keys.")] = 0,
    mesh: MeshOption = None,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how often a model finds a number hidden in long texts, by length and
    depth."""
    from maxlm.evaluation.passkey import evaluate_passkey
    from maxlm.evaluation.program import load_engine_for_length

    sizes, places = (
        _parse(lengths, "--lengths", 1, 2**31),
        _parse(depths, "--depths", 0, 100),
    )
    engine = load_engine_for_length(model, max(sizes), step=step, mesh=mesh)
    with show_progress("answers") as progress:
        how = {"seed": seed, "on_progress": partial(progress, model)}
        found = evaluate_passkey(engine, sizes, places, samples, **how)
    if as_json:
        return print_json({"lengths": sizes, "depths": places, "accuracy": found})
    shares = [[f"{value:.0%}" for value in row] for row in found]
    rows = [(f"{size:,}", *row) for size, row in zip(sizes, shares, strict=True)]
    print_table(
        "length", [f"{depth}%" for depth in places], rows, title="passkeys found"
    )


def _parse(text: str, option: str, least: int, most: int) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value <= most for value in values):
        raise BadParameter(
            f"{option} takes integers from {least} to {most:,} by commas"
        )
    return values


def score_humaneval_samples(
    samples: Annotated[Path, Argument(help="JSON lines of task_id and completion.")],
    data: Annotated[Path, Option(help="HumanEval.jsonl, or .jsonl.gz.")],
    k: Annotated[list[int], Option(min=1, help="Of pass@k.")] = [1, 10, 100],  # noqa: B006
    truncate: Annotated[
        bool,
        Option(
            "--truncate", help="Cut completions where a function of HumanEval ends."
        ),
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
    from maxlm.evaluation.records import read_records
    from maxlm.evaluation.sandbox import SandboxLimits, detect_isolation

    problems = read_records(data, ("task_id", "prompt", "test", "entry_point"))
    records = read_records(samples, ("task_id", "completion"))
    if truncate:
        records = [
            r | {"completion": truncate_completion(r["completion"])} for r in records
        ]
    score, results = score_code_samples(
        problems, records, k, SandboxLimits(seconds), workers
    )
    with (
        replace_file(output or Path(f"{samples}_results.jsonl")) as new,
        open(new, "w") as file,
    ):
        for record, result in zip(records, results, strict=True):
            record |= {"result": result.message or "passed", "passed": result.passed}
            print(json.dumps(record), file=file)
    _print_score("HumanEval", score | {"isolation": detect_isolation()}, as_json)


def evaluate_swe_bench(
    predictions: Annotated[
        Path, Argument(help="instance_id, model_name_or_path, model_patch.")
    ],
    instances: Annotated[
        Path, Option(help="The benchmark's instances, JSON or JSON lines.")
    ],
    repositories: Annotated[
        Path, Option(exists=True, help="Clones: owner__name, or name.")
    ],
    readable: Annotated[
        list[Path] | None, Option(help="Folders that tests read.")
    ] = None,
    seconds: SecondsOption = 1800.0,
    output: Annotated[
        Path | None, Option(help="Folder of report.json and logs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Apply predicted patches in local clones, run the tests, and report which are
    resolved."""
    from maxlm.evaluation.records import read_records
    from maxlm.evaluation.swe_bench import evaluate_predictions

    keys = (
        "instance_id",
        "repo",
        "base_commit",
        "test_patch",
        "FAIL_TO_PASS",
        "PASS_TO_PASS",
    )
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
    single = {name: x for name, x in score.items() if not isinstance(x, dict | list)}
    words = (f"{x:.4f}" if isinstance(x, float) else str(x) for x in single.values())
    print_table(title, ["value"], zip(single, words, strict=True))


def evaluate_mt_bench(
    models: ModelsArgument,
    judge: Annotated[
        str,
        Option(
            metavar="URL[#MODEL]",
            help="Its key: $JUDGE_API_KEY, or else $OPENAI_API_KEY.",
        ),
    ],
    mode: Annotated[
        Literal["single", "pairwise"], Option(help="Grade, or compare.")
    ] = "single",
    data: Annotated[
        Path | None, Option(help="FastChat's data/mt_bench folder.")
    ] = None,
    output: Annotated[Path, Option(help="Where answers and judgments go.")] = Path(
        "runs/mt_bench"
    ),
    limit: Annotated[
        int | None, Option(min=1, help="Questions, evenly spread.")
    ] = None,
    max_tokens: TokensOption = 1024,
    judge_max_tokens: Annotated[int, Option(min=1, help="Of a judgment.")] = 2048,
    judge_body: Annotated[
        str,
        Option(
            metavar="JSON", help='More fields of its requests: \'{"regex": "..."}\'.'
        ),
    ] = "{}",
    concurrency: Annotated[int, Option(min=1, help="Requests at a time.")] = 4,
) -> None:
    """Answer MT-Bench's questions and judge the answers; the same command goes on after
    a cut."""
    from maxlm.evaluation.endpoint import open_endpoint
    from maxlm.evaluation.mt_bench import load_mt_bench, run_mt_bench

    loaded = load_mt_bench(data, limit)
    judging = open_endpoint(judge, "JUDGE_API_KEY")
    fix = 'give a JSON object, such as {"regex": "..."}'
    body = parse_json(judge_body, "--judge-body", fix)
    if not isinstance(body, dict):
        raise MaxlmError("no JSON object", where="--judge-body", fix=fix)
    judging = replace(judging, extra_body=body)
    endpoints = [open_endpoint(model) for model in models]
    pairwise = mode == "pairwise"
    limits: Any = {"max_tokens": max_tokens, "judge_max_tokens": judge_max_tokens}
    limits |= {"pairwise": pairwise, "concurrency": concurrency}
    with show_progress("requests") as progress:
        found = run_mt_bench(
            loaded, output, endpoints, judging, **limits, progress=progress
        )
    columns = ("Turn 1", "Turn 2", "Both", "95%", "Read", "Unreadable")
    for name, summary in found["summaries"].items():
        rows = []
        for kind, cells in summary.items():
            both = cells["both"]
            means = [
                "–" if c["mean"] is None else f"{c['mean']:.2f}" for c in cells.values()
            ]
            span = (
                "–"
                if both["mean"] is None
                else f"{both['low']:.2f} to {both['high']:.2f}"
            )
            rows.append((kind, *means, span, str(both["n"]), str(both["unreadable"])))
        print_table(
            "Category", columns, rows, title="share of wins: " * pairwise + name
        )
    if found["unreadable"]:
        share = f"{found['unreadable']} of {found['judgments']} judgments"
        print(f"judge {judging.model}: {share} have no verdict that can be read")
    if found["refused"]:
        print(
            f"{len(found['refused'])} requests refused; the first: "
            f"{found['refused'][0]}"
        )
    if pairwise and (bias := found["position_bias"])["first_share"] is not None:
        print(
            f"judge {judging.model}: {bias['consistency']:.0%} of {bias['num_pairs']} "
            f"pairs keep "
            f"their verdict when the order changes; {bias['first_share']:.0%} of the "
            f"wins are the "
            f"first answer's, p = {bias['p_value']:.2g}"
            + ": biased!"
            * bias["is_biased"]
        )
    if found["unreadable"] == found["judgments"]:
        raise typer.Exit(1)


def show_ratings(
    battles: Annotated[
        Path,
        Argument(exists=True, dir_okay=False, help="JSONL, or an arena's database."),
    ],
    style_control: Annotated[
        bool, Option(help="Hold length, headers, lists, bold fixed.")
    ] = False,
    output: Annotated[
        Path | None, Option(help="JSON file; default: beside the battles.")
    ] = None,
) -> None:
    """Rate models by their battles: Bradley-Terry with 95% intervals, and online
    Elo."""
    from maxlm.evaluation.ratings import compute_leaderboard, read_battles

    found = compute_leaderboard(read_battles(battles), style_control)
    rows = []
    if not found["rows"] or found["rows"][0]["rating"] is None:
        raise MaxlmError(found["note"], where=str(battles))
    for row in found["rows"]:
        span = "–" if row["low"] is None else f"{row['low']:.0f} to {row['high']:.0f}"
        numbers = (
            str(row["rank"] or "–"),
            f"{row['rating']:.0f}",
            span,
            f"{row['elo']:.0f}",
        )
        rows.append((row["model"], *numbers, str(row["battles"])))
    print_table("Model", ("Rank", "Rating", "95%", "Elo", "Battles"), rows)
    for name, x in found["style"].items():
        print(f"style, {name}: {x:+.3f}")
    if found["note"]:
        print(f"note: {found['note']}")
    with replace_file(output or battles.with_suffix(".ratings.json")) as new:
        new.write_text(json.dumps(found, indent=1), "utf-8")


def serve_arena(
    models: ModelsArgument,
    database: Annotated[Path, Option(help="SQLite file of the battles.")] = Path(
        "arena.db"
    ),
    host: Annotated[str, Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 8080,
    temperature: Annotated[float, Option(min=0, help="Of the answers.")] = 0.7,
    max_tokens: TokensOption = 1024,
) -> None:
    """Serve a page where two models answer blindly, and votes rate them."""
    import uvicorn

    from maxlm.evaluation.arena import Arena
    from maxlm.evaluation.endpoint import open_endpoint
    from maxlm.serving.server import bind_socket

    bound = bind_socket(host, port)
    endpoints = [open_endpoint(model) for model in models]
    arena = Arena(endpoints, database, temperature=temperature, max_tokens=max_tokens)
    print(f"http://{host}:{bound.getsockname()[1]}", flush=True)
    uvicorn.Server(
        uvicorn.Config(arena.make_app(), lifespan="off", log_config=None)
    ).run([bound])


subcommands = {
    "humaneval-samples": score_humaneval_samples,
    "swe-bench": evaluate_swe_bench,
}
subcommands |= {"report": report, "diff": compare}
subcommands |= {
    "mt-bench": evaluate_mt_bench,
    "ratings": show_ratings,
    "arena": serve_arena,
}
subcommands |= {
    "positions": show_position_perplexities,
    "passkey": show_passkey_accuracy,
}
