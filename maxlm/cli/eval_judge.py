"""maxlm eval mt-bench, ratings and arena"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from maxlm.cli.common import make_numeric_table, open_console

_ModelsArgument = Annotated[list[str], Argument(metavar="URL[#MODEL]...", help="Endpoints.")]
_TokensOption = Annotated[int, Option(min=1, help="Of an answer.")]


def evaluate_mt_bench(
    models: _ModelsArgument,
    judge: Annotated[
        str, Option(metavar="URL[#MODEL]", help="Its key: $JUDGE_API_KEY, or else $OPENAI_API_KEY.")
    ],
    mode: Annotated[Literal["single", "pairwise"], Option(help="Grade, or compare.")] = "single",
    data: Annotated[Path | None, Option(help="FastChat's data/mt_bench folder.")] = None,
    output: Annotated[Path, Option(help="Where answers and judgments go.")] = Path("runs/mt_bench"),
    limit: Annotated[int | None, Option(min=1, help="Questions, evenly spread.")] = None,
    max_tokens: _TokensOption = 1024,
    judge_max_tokens: Annotated[int, Option(min=1, help="Of a judgment.")] = 2048,
    judge_body: Annotated[
        str, Option(metavar="JSON", help='More fields of its requests: \'{"regex": "..."}\'.')
    ] = "{}",
    concurrency: Annotated[int, Option(min=1, help="Requests at a time.")] = 4,
) -> None:
    """Answer MT-Bench's questions and judge the answers; the same command goes on after a cut."""
    import json
    from dataclasses import replace

    from maxlm.config import MaxlmError
    from maxlm.evaluation.endpoint import open_endpoint
    from maxlm.evaluation.mt_bench import load_mt_bench, run_mt_bench
    from maxlm.runtime.progress import show_progress

    loaded, judging = load_mt_bench(data, limit), open_endpoint(judge, "JUDGE_API_KEY")
    try:
        judging = replace(judging, extra_body=dict(json.loads(judge_body)))
    except ValueError as error:
        raise MaxlmError(f"no JSON object ({error})", where="--judge-body") from None
    endpoints, pairwise = [open_endpoint(model) for model in models], mode == "pairwise"
    limits: Any = {"max_tokens": max_tokens, "judge_max_tokens": judge_max_tokens}
    limits |= {"pairwise": pairwise, "concurrency": concurrency}
    with show_progress("requests") as progress:
        found = run_mt_bench(loaded, output, endpoints, judging, **limits, progress=progress)
    columns, console = ("Turn 1", "Turn 2", "Both", "95%", "Read", "Unreadable"), open_console()
    for name, summary in found["summaries"].items():
        table = make_numeric_table("Category", columns, "share of wins: " * pairwise + name)
        for kind, cells in summary.items():
            both = cells["both"]
            means = ["–" if c["mean"] is None else f"{c['mean']:.2f}" for c in cells.values()]
            span = "–" if both["mean"] is None else f"{both['low']:.2f} to {both['high']:.2f}"
            table.add_row(kind, *means, span, str(both["n"]), str(both["unreadable"]))
        console.print(table)
    if found["unreadable"]:
        share = f"{found['unreadable']} of {found['judgments']} judgments"
        console.print(f"judge {judging.model}: {share} have no verdict that can be read")
    if found["refused"]:
        console.print(f"{len(found['refused'])} requests refused; the first: {found['refused'][0]}")
    if pairwise and (bias := found["position_bias"])["first_share"] is not None:
        console.print(
            f"judge {judging.model}: {bias['consistency']:.0%} of {bias['num_pairs']} pairs keep "
            f"their verdict when the order changes; {bias['first_share']:.0%} of the wins are the "
            f"first answer's, p = {bias['p_value']:.2g}" + ": biased!" * bias["is_biased"]
        )
    if found["unreadable"] == found["judgments"]:
        raise typer.Exit(1)


def show_ratings(
    battles: Annotated[
        Path, Argument(exists=True, dir_okay=False, help="JSONL, or an arena's database.")
    ],
    style_control: Annotated[bool, Option(help="Hold length, headers, lists, bold fixed.")] = False,
    output: Annotated[Path | None, Option(help="JSON file; default: beside the battles.")] = None,
) -> None:
    """Rate models by their battles: Bradley-Terry with 95% intervals, and online Elo."""
    import json

    from maxlm.config import MaxlmError
    from maxlm.evaluation.ratings import compute_leaderboard, read_battles
    from maxlm.runtime.files import replace_file

    found, console = compute_leaderboard(read_battles(battles), style_control), open_console()
    if not found["rows"] or found["rows"][0]["rating"] is None:
        raise MaxlmError(found["note"], where=str(battles))
    table = make_numeric_table("Model", ("Rank", "Rating", "95%", "Elo", "Battles"))
    for row in found["rows"]:
        span = "–" if row["low"] is None else f"{row['low']:.0f} to {row['high']:.0f}"
        numbers = (str(row["rank"] or "–"), f"{row['rating']:.0f}", span, f"{row['elo']:.0f}")
        table.add_row(row["model"], *numbers, str(row["battles"]))
    console.print(
        table, *(f"style, {name}: {x:+.3f}" for name, x in found["style"].items()), sep="\n"
    )
    if found["note"]:
        console.print(f"note: {found['note']}")
    with replace_file(output or battles.with_suffix(".ratings.json")) as new:
        new.write_text(json.dumps(found, indent=1), "utf-8")


def serve_arena(
    models: _ModelsArgument,
    database: Annotated[Path, Option(help="SQLite file of the battles.")] = Path("arena.db"),
    host: Annotated[str, Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 8080,
    temperature: Annotated[float, Option(min=0, help="Of the answers.")] = 0.7,
    max_tokens: _TokensOption = 1024,
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
    uvicorn.Server(uvicorn.Config(arena.make_app(), lifespan="off", log_config=None)).run([bound])
