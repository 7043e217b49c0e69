"""maxlm plan"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import typer
from typer import Argument, Option

from maxlm.cli.common import (
    ConfigArgument,
    JsonOption,
    SettingsArgument,
    open_console,
    print_json,
)
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.runtime.json_types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from rich.console import RenderableType

    from maxlm.plan.generation import ExpectedLengths
    from maxlm.plan.machine import Machine
    from maxlm.plan.search import SearchResult
    from maxlm.run.config import RunConfig

OptionT = TypeVar("OptionT")
_DEFAULT_TOP = 10


@dataclass(frozen=True)
class _PlanOutput:
    """A plan as it is printed."""

    data: JsonObject
    """Plain data, for --json and for a page."""
    tables: "list[RenderableType]"
    fits: bool | None
    """None: no machine was named."""


@dataclass(frozen=True)
class _SearchOptions:
    """Options of a search."""

    top: int
    """Candidates to show."""
    compile_top: int
    """Candidates to compile, the quickest first."""
    to_stderr: bool
    """Whether tables go to stderr, since stdout is for JSON."""


def _make_amount_option(description: str, minimum: float = 0) -> Any:
    """Makes an option of a number that is neither negative nor infinite."""
    return Option(min=minimum, max=1e12, help=description)


def command(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    on: Annotated[
        str | None,
        Option(
            help="The machine: v5p-256, 2xv5p-512, v5p:4x4x8, v5e-256, h100x64, cpux8, "
            "..."
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        Option(help="Mesh to use instead of the config's: fsdp=64,tensor=4."),
    ] = None,
    devices: Annotated[
        int | None, Option(min=1, help="Number of devices, without --on.")
    ] = None,
    compiled: Annotated[
        bool,
        Option(
            "--compile",
            help="Compile too (a minute): the compiler's memory, products and "
            "collectives beside the plan's.",
        ),
    ] = False,
    searching: Annotated[
        bool, Option("--search", help="Find the quickest mesh and remat.")
    ] = False,
    top: Annotated[
        int | None, Option(min=1, help="Candidates that a search shows; default: 10.")
    ] = None,
    compile_top: Annotated[
        int,
        Option(min=0, help="Search, and compile this many of the quickest candidates."),
    ] = 0,
    html: Annotated[
        Path | None, Option(help="Write the plan as one HTML file.")
    ] = None,
    as_json: JsonOption = False,
    price: Annotated[
        float | None,
        _make_amount_option("Price of a device-hour: shows the price of the run."),
    ] = None,
    device_mtbf: Annotated[
        float | None,
        _make_amount_option(
            "Hours between failures of one device; default: 50,700.", 1
        ),
    ] = None,
    restart: Annotated[
        float | None,
        _make_amount_option("Seconds from a failure to the next step; default: 600."),
    ] = None,
    checkpoint: Annotated[
        float | None,
        _make_amount_option(
            "Seconds that a checkpoint stalls the run; default: by its bytes."
        ),
    ] = None,
    serve: Annotated[
        bool, Option("--serve", help="Plan serving the model instead.")
    ] = False,
    prompt: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens of a prompt, with --serve (default: 512), or on average of a "
            "task that generates (default: of the longest).",
        ),
    ] = None,
    new: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens of an answer, with --serve (default: 128), or on average of a "
            "task that generates (default: of the longest).",
        ),
    ] = None,
    batch: Annotated[
        int | None, Option(min=1, help="Concurrent sequences; default: as many as fit.")
    ] = None,
    cache: Annotated[
        Literal["auto", "int8", "int4"] | None,
        Option(help="Format of cached keys and values."),
    ] = None,
    weights: Annotated[
        str | None,
        Option(
            help="Scheme of maxlm quantize, such as int4-g32 or w8a8-fp8; default: "
            "weights as the run has them."
        ),
    ] = None,
    ttft_ms: Annotated[
        float | None, _make_amount_option("Longest time to a first token.", 1e-3)
    ] = None,
    tpot_ms: Annotated[
        float | None, _make_amount_option("Longest time between tokens.", 1e-3)
    ] = None,
    mtp_drafts: Annotated[
        int | None,
        Option(
            min=1,
            help="With --serve: tokens that the modules of model.mtp guess in each "
            "step (speculation.kind=mtp); their caches are counted; default: none.",
        ),
    ] = None,
) -> None:
    """Show a run's memory, communication and time on a machine, or those of serving its
    model, before it starts.

    Exit codes: 0 fits, 1 does not fit, 2 wrong input.
    `maxlm plan diff A B` compares two plans.
    """
    requests = _select_given(
        {
            "prompt": prompt,
            "new": new,
            "batch": batch,
            "cache": cache,
            "weights": weights,
            "ttft_ms": ttft_ms,
            "tpot_ms": tpot_ms,
            "mtp_drafts": mtp_drafts,
        }
    )
    reliability = _select_given(
        {
            "device_mtbf_hours": device_mtbf,
            "restart_seconds": restart,
            "checkpoint_seconds": checkpoint,
        }
    )
    training_options = {
        "--compile": compiled,
        "--compile-top": compile_top > 0,
        "--devices": devices is not None,
        "--device-mtbf, --restart or --checkpoint": bool(reliability),
    }
    if serve:
        fix = "leave out this option, or --serve"
        _refuse_options(training_options, "is for training runs", fix)
        if top is None:
            top = _DEFAULT_TOP if searching else 0
        output = _plan_serving(config, settings or [], on, mesh, requests, top, price)
        return _print_output(output, html, as_json)

    lengths = _select_given({"prompt": prompt, "new": new})
    serving_options = {
        f"--{name.replace('_', '-')}": True for name in requests if name not in lengths
    }
    _refuse_options(serving_options, "is for serving", "add --serve")
    searching = searching or compile_top > 0
    if on is None:
        machine_options = training_options | {
            "--devices": False,
            "--search": searching,
            "--price": price is not None,
            "--prompt or --new": bool(lengths),
        }
        _refuse_options(machine_options, "needs a machine", "name it: --on v5p-128")
    else:
        by_count = {"--devices": devices is not None}
        _refuse_options(by_count, "excludes --on", "leave out one of the two")
    search = None
    if searching:
        by_hand = {"--mesh": mesh is not None}
        _refuse_options(by_hand, "is what --search chooses", "leave out one of the two")
        search = _SearchOptions(
            top=max(top or _DEFAULT_TOP, compile_top),
            compile_top=compile_top,
            to_stderr=as_json,
        )
    else:
        top_option = {"--top": top is not None}
        _refuse_options(top_option, "needs a search", "add --search")
    output = _plan_training(
        config,
        settings or [],
        on=on,
        mesh=mesh,
        devices=devices,
        search=search,
        compiled=compiled,
        price=price,
        reliability=reliability,
        lengths=lengths,
    )
    _print_output(output, html, as_json)


def _select_given(options: Mapping[str, OptionT | None]) -> dict[str, OptionT]:
    """Return the options that are given: not None."""
    return {name: value for name, value in options.items() if value is not None}


def compare(
    first: Annotated[
        str,
        Argument(
            help="A run's folder, a plan's JSON, or a config: 'llama3_8b "
            "model.remat=mlp'."
        ),
    ],
    second: Annotated[str, Argument(help="Another.")],
    on: Annotated[
        str | None, Option(help="The machine to plan configs on: v5p-256.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where two plans differ: layout, memory, communication and time.

    \b
    maxlm plan diff runs/a runs/b
    maxlm plan diff llama3_8b 'llama3_8b model.remat=mlp mesh.tensor=2' --on v5p-64

    Exit codes: 0 compared, 2 wrong input.
    """
    from maxlm.plan.diff import compare_plans, render_plan_diff
    from maxlm.plan.source import load_plan

    machine = None if on is None else _make_machine(on)
    first_plan = load_plan(first, machine)
    second_plan = load_plan(second, machine)
    diff = compare_plans(first_plan, second_plan)
    if as_json:
        print_json(diff)
    else:
        open_console().print(render_plan_diff(diff, (first, second)), markup=False)


subcommands = {"diff": compare}


def _plan_training(
    config: str,
    settings: list[str],
    *,
    on: str | None,
    mesh: str | None,
    devices: int | None,
    search: _SearchOptions | None,
    compiled: bool,
    price: float | None,
    reliability: Mapping[str, float],
    lengths: Mapping[str, int],
) -> _PlanOutput:
    """Plan a run, or the best layout of it that a search finds."""
    from maxlm.plan.generation import ExpectedLengths
    from maxlm.plan.goodput import Reliability
    from maxlm.plan.predict import TRAINING_STEP, plan_run
    from maxlm.plan.show import format_seconds, render_plan_tables
    from maxlm.run.load_config import load_run_config
    from maxlm.sharding import count_min_devices, mesh_sizes, parse_mesh

    run = load_run_config(config, settings)
    if lengths and run.task.generation(run.data.seq_len, run.data.batch_size) is None:
        by_name = {f"--{name}": True for name in lengths}
        message = f"is for serving, and task.kind={run.task.kind} generates nothing"
        _refuse_options(by_name, message, "add --serve")
    expected_lengths = ExpectedLengths(**lengths)
    if mesh is not None:
        run = run.model_copy(update={"mesh": parse_mesh(mesh)})
    machine = None
    sizes = None
    if on is None:
        sizes = mesh_sizes(run.mesh, devices or count_min_devices(run.mesh))
    else:
        machine = _make_machine(on)
    searched = None
    if machine is not None and search is not None:
        run, searched = _search(run, machine, config, search, expected_lengths)
    plan = plan_run(
        run,
        machine,
        sizes=sizes,
        reliability=Reliability(**reliability),
        lengths=expected_lengths,
    )
    data = plan.to_json()
    tables: list[RenderableType] = [
        render_plan_tables(plan, price_per_device_hour=price)
    ]
    if searched is not None:
        data["search"] = searched
    if price is not None and plan.run_hours is not None:
        data["price"] = price * plan.run_hours * plan.layout.devices
    if machine is None or not compiled:
        return _PlanOutput(data, tables, plan.fits)

    from maxlm.plan.compiled.program import check_fit_by_compiling
    from maxlm.plan.compiled.tables import render_compiler_tables

    verdict = check_fit_by_compiling(run, machine, plan)
    data["compiled"] = asdict(verdict)
    verdict_line = verdict.words
    if verdict.seconds is not None:
        tables.append(render_compiler_tables(verdict))
        verdict_line += f"; compiled in {format_seconds(verdict.seconds)}"
    tables.append(f"\n{verdict_line}")
    # The compiler's account is of the training step alone.
    others_fit = all(
        size <= machine.chip.memory_bytes
        for phase, size in plan.bytes_by_phase.items()
        if phase != TRAINING_STEP
    )
    return _PlanOutput(data, tables, verdict.fits and others_fit)


def _print_output(output: _PlanOutput, html: Path | None, as_json: bool) -> None:
    """Write a plan's page, and print its JSON or its tables. Raises typer.Exit: it does
    not fit."""
    tables = output.tables
    if html is not None:
        from maxlm.runtime.report_page import write_report_page

        write_report_page(html, "maxlm.plan", output.data["name"], output.data)
        tables = [*tables, f"written: {html}"]
    if as_json:
        print_json(output.data)
    else:
        console = open_console()
        for table in tables:
            console.print(table, markup=False)
    if output.fits is False:
        raise typer.Exit(1)


def _plan_serving(
    config: str,
    settings: list[str],
    on: str | None,
    mesh: str | None,
    requests: JsonMapping,
    top: int,
    price: float | None,
) -> _PlanOutput:
    """Plan serving, on the best split where no mesh is given.

    Args:
        requests: fields of ``ServingOptions``, and the ``cache``.
        top: splits of a search to show; 0: no search.
    """
    from maxlm.plan.served_model import ServingOptions
    from maxlm.plan.serving import search_serving
    from maxlm.plan.serving_cache import CacheFormat
    from maxlm.plan.show_serving import render_serving_search, render_serving_tables
    from maxlm.run.config import RunConfig
    from maxlm.sharding import mesh_sizes, parse_mesh

    if on is None:
        raise MaxlmError("--serve needs a machine", fix="name it: --on h100x8")
    searching = {"--search or --top": mesh is not None and top > 0}
    fix = "leave it out, or --mesh"
    _refuse_options(searching, "chooses the mesh", fix)
    run_config = Path(config) / "config.yaml"
    source = str(run_config) if run_config.is_file() else config
    run = load_config(RunConfig, source, settings).value
    if run.name == RunConfig.model_fields["name"].default:
        run = run.model_copy(update={"name": Path(config).stem})
    machine = _make_machine(on)
    tensor = None
    if mesh is not None:
        sizes = mesh_sizes(parse_mesh(mesh), machine.topology.devices)
        others = {
            f"--mesh {axis}": sizes[axis] > 1 for axis in ("stage", "expert", "context")
        }
        _refuse_options(others, "does not split what is served", "use data and tensor")
        # Devices of a replica: `data` and `fsdp` count replicas.
        tensor = sizes["tensor"]
    requests = dict(requests)
    cache = requests.pop("cache", None)
    if cache is not None:
        cache_formats = (cache,)
    else:
        cache_formats = get_args(CacheFormat) if top else ("auto",)
    options = ServingOptions(**requests)
    plans, refusal = search_serving(
        run, machine, options, tensor=tensor, caches=cache_formats
    )
    plan = plans[0]
    data = asdict(plan)
    tables: list[RenderableType] = [
        render_serving_tables(plan, price_per_device_hour=price)
    ]
    if top:
        data["search"] = [asdict(other) for other in plans[:top] if other.is_feasible]
        tables.insert(0, render_serving_search(plans, top))
    if refusal and not plan.fits:
        tables.append(f"\nnot tried: {refusal}")
    return _PlanOutput(data, tables, plan.is_feasible)


def _make_machine(name: str) -> "Machine":
    """Return a machine, with JAX kept on this machine's CPU: N virtual devices for
    `cpuxN`."""
    import jax

    from maxlm.plan.machine import Machine
    from maxlm.plan.topology import parse_topology

    topology = parse_topology(name)
    jax.config.update("jax_platforms", "cpu")
    num_cpu_devices = jax.config.values["jax_num_cpu_devices"]
    # Once JAX has started, an update is an error, though to the same number.
    if topology.platform == "cpu" and num_cpu_devices != topology.devices:
        jax.config.update("jax_num_cpu_devices", topology.devices)
    return Machine.from_name(name)


def _refuse_options(options: Mapping[str, bool], message: str, fix: str) -> None:
    """Refuse options that are given but have no effect here; ``message`` follows the
    option's name."""
    for option, is_given in options.items():
        if is_given:
            raise MaxlmError(f"{option} {message}", fix=fix)


def _search(
    run: "RunConfig",
    machine: "Machine",
    source: str,
    options: _SearchOptions,
    lengths: "ExpectedLengths",
) -> tuple["RunConfig", JsonObject]:
    """Print the quickest candidates; return the first that fits as a run, and all of
    them as plain data. Where some are compiled, it fits by the compiler's account.
    Raises typer.Exit: nothing fits."""
    from maxlm.plan.known_errors import KnownTimeError, format_known_time_errors
    from maxlm.plan.search import format_run_yaml, search_layouts
    from maxlm.plan.show import render_candidates_table

    result = search_layouts(run, machine, top=options.top, lengths=lengths)
    data: JsonObject = {
        "tried": result.num_tried,
        "possible": result.num_divisible,
        "fitting": result.num_fitting,
        "taken": result.search_seconds,
    }
    console = open_console(sys.stderr if options.to_stderr else sys.stdout)
    candidates_per_second = result.num_tried / max(result.search_seconds, 1e-9)
    console.print(
        f"{result.num_tried:,} candidates in {result.search_seconds:.2f} s "
        f"({candidates_per_second:,.0f} a second): "
        f"{result.num_divisible:,} divide, {result.num_fitting:,} fit"
    )
    if not result.best:
        console.print(_explain_empty_search(result), markup=False)
        if options.to_stderr:
            print_json({"fits": False, "search": {**data, "best": []}})
        raise typer.Exit(1)
    limit = machine.chip.memory_bytes
    peaks: list[float] = []
    if options.compile_top:
        from maxlm.plan.compiled.program import compile_candidate_peaks

        compiled = result.best[: options.compile_top]
        peaks = compile_candidate_peaks(run, machine, compiled)
    console.print(render_candidates_table(result, limit, peaks))
    errors: dict[KnownTimeError, None] = {}  # an ordered set
    for candidate in result.best:
        errors |= dict.fromkeys(candidate.find_known_time_errors(run, machine.topology))
    if errors:
        known = format_known_time_errors([*errors])
        console.print(f"among these, {known}", markup=False)
    best = [asdict(candidate) for candidate in result.best]
    for candidate, peak in zip(best, peaks, strict=False):
        # JSON has no infinity: where the compiler finds no room there is no peak.
        candidate["compiled"] = {
            "fits": peak <= limit,
            "peak": peak if peak < inf else None,
        }
    data["best"] = best
    winner = 0
    if peaks:
        fitting = [index for index, peak in enumerate(peaks) if peak <= limit]
        if not fitting:
            console.print("none of those compiled fits by the compiler's account")
            if options.to_stderr:
                print_json({"fits": False, "search": data})
            raise typer.Exit(1)
        winner = fitting[0]
    best_run = result.best[winner].apply(run)
    data["config"] = format_run_yaml(best_run, source)
    command = run.task.command
    console.print(f"\n# the quickest, as a config for maxlm {command}", markup=False)
    console.print(data["config"], markup=False)
    return best_run, data


def _explain_empty_search(result: "SearchResult") -> str:
    from maxlm.plan.show import format_bytes

    if result.num_fitting:
        return f"no candidate that fits is valid: {result.last_refusal}"
    if result.num_divisible:
        least = format_bytes(result.min_peak_bytes)
        return f"none fits; the least that any needs is {least} a device"
    return (
        "none divides: batch, sequence, heads and layers must divide over the devices"
    )
