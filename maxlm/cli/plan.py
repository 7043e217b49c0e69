"""maxlm plan"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from maxlm.cli.arguments import ConfigArgument, JsonOption, MachineOption, SettingsArgument

if TYPE_CHECKING:
    from rich.console import Console

# The largest number of hours or seconds, or price, that is taken.
_MOST = 1e12


def command(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    on: MachineOption = None,
    mesh: Annotated[
        str | None, typer.Option(help="The mesh, e.g. fsdp=64,tensor=4; default: the config's.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Without --on: how many devices an axis of -1 is to fill."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Ask the machine's own compiler as well (a minute).")
    ] = False,
    searching: Annotated[
        bool, typer.Option("--search", help="Find the quickest mesh, micro-batches and remat.")
    ] = False,
    top: Annotated[int | None, typer.Option(min=1, help="How many a search shows: 10.")] = None,
    compile_top: Annotated[
        int, typer.Option(min=0, help="How many of them to verify by the compiler.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to look at, all in one file.")
    ] = None,
    as_json: JsonOption = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="A device's price an hour: shows the run's.")
    ] = None,
    device_mtbf: Annotated[
        float | None, typer.Option(min=1, help="Hours between failures of one device.")
    ] = None,
    restart: Annotated[
        float | None, typer.Option(min=0, help="Seconds from a failure to the next step.")
    ] = None,
    checkpoint: Annotated[
        float | None, typer.Option(min=0, help="Seconds that a checkpoint holds the run up.")
    ] = None,
) -> None:
    """Show what a run holds, sends and takes on a machine, before it is paid for.

    Exit code: 0 it fits, 1 it does not, 2 a mistake in what was given. `maxlm plan diff A B`
    compares two plans.
    """
    from maxlm.config import load_config
    from maxlm.plan.goodput import Reliability
    from maxlm.plan.predict import Machine, plan_run
    from maxlm.run import RunConfig
    from maxlm.sharding import count_min_devices, mesh_sizes, parse_mesh

    numbers = {
        "device_mtbf_hours": ("--device-mtbf", device_mtbf),
        "restart_seconds": ("--restart", restart),
        "checkpoint_seconds": ("--checkpoint", checkpoint),
    }
    search = searching or compile_top > 0
    on_machines = {"--compile": compiled, "--search": searching, "--compile-top": compile_top}
    on_machines["--price"] = price is not None
    on_machines |= {option: value is not None for option, value in numbers.values()}
    _refuse(on_machines if on is None else {}, "needs a machine", "name it: --on v5p-128")
    _refuse({"--devices": devices and on}, "goes without --on", "leave one of the two out")
    _refuse({"--top": top and not search}, "is how many a search shows", "add --search")
    _refuse({"--mesh": mesh and search}, "is what --search chooses", "leave one of the two out")
    _check_bounds({"--price": price, **dict(numbers.values())})
    run = load_config(RunConfig, config, settings or ()).value
    if mesh:
        run = run.model_copy(update={"mesh": parse_mesh(mesh)})
    machine, sizes = None, None
    if on is None:
        sizes = mesh_sizes(run.mesh, devices or count_min_devices(run.mesh))
    else:
        _stay_off_devices(on)
        machine = Machine.from_name(on)
    given = {name: value for name, (_, value) in numbers.items() if value is not None}
    found = None
    if machine and search:
        run, found = _search(run, machine, config, top or 10, compile_top, as_json)
    result = plan_run(run, machine, sizes=sizes, reliability=Reliability(**given))
    out, fits, words, compared = result.to_json(), result.fits, "", {}
    if found:
        out["search"] = found
    if price is not None and result.run_hours is not None:
        out["price"] = price * result.run_hours * result.layout.devices
    if machine and compiled:
        from maxlm.programs.plans import compare_with_compiler

        fits, words, compared = compare_with_compiler(run, machine, result)
        figures = {what: {"plan": a, "compiler": b} for what, (a, b) in compared.items()}
        out["compiled"] = {"fits": fits, "words": words, "figures": figures}
    if html:
        from maxlm.plan.html import write_report

        write_report(out, html)
    if as_json:
        import json

        print(json.dumps(out, indent=2, allow_nan=False))
    else:
        from maxlm.plan.show import render_comparison_table, render_plan_tables

        console = _console()
        console.print(render_plan_tables(result, price=price))
        if compared:
            console.print(render_comparison_table(compared, "The plan beside the compiler"))
        if words:
            console.print(f"\n{words}", markup=False)
        if html:
            console.print(f"written: {html}")
    if fits is False:
        raise typer.Exit(1)


def compare(
    first: Annotated[str, typer.Argument(help="A plan's JSON, a run's folder, or a config.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    on: MachineOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two plans."""
    from maxlm.plan.diff import compare_plans, render_diff_tables
    from maxlm.programs.plans import read_plan

    if on:
        _stay_off_devices(on)
    found = compare_plans(read_plan(first, on), read_plan(second, on))
    if as_json:
        import json

        print(json.dumps(found, indent=2))
        return
    _console().print(render_diff_tables(found, (first, second)))


def _console(file: TextIO | None = None) -> "Console":
    """Return a console at least 80 columns wide; narrower tables would break words."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, highlight=False)
    console.width = max(80, console.width)
    return console


def _stay_off_devices(on: str) -> None:
    """Keep JAX on this machine's CPU, with N virtual devices for `cpuxN`."""
    import jax

    from maxlm.plan.topology import parse_topology

    machine = parse_topology(on)
    jax.config.update("jax_platforms", "cpu")
    if machine.platform == "cpu" and jax.config.values["jax_num_cpu_devices"] != machine.devices:
        jax.config.update("jax_num_cpu_devices", machine.devices)


def _refuse(options: dict[str, Any], what: str, fix: str) -> None:
    """Refuse options that have no effect here."""
    from maxlm.config import MaxlmError

    for option, given in options.items():
        if given:
            raise MaxlmError(f"{option} {what}", fix=fix)


def _check_bounds(options: dict[str, float | None]) -> None:
    """Refuse numbers so large that arithmetic would overflow."""
    from maxlm.config import MaxlmError

    for option, value in options.items():
        if value is not None and not value <= _MOST:
            raise MaxlmError(f"{option}={value} is too much", fix=f"give {_MOST:g} at most")


def _search(
    run: Any, machine: Any, source: str, top: int, verify: int, quiet: bool
) -> tuple[Any, dict[str, Any]]:
    """Print the quickest candidates; return the first as a run, and all of them as plain data.

    Raises:
        typer.Exit: nothing fits.
    """
    import json
    from dataclasses import asdict
    from math import inf

    from maxlm.plan.search import format_run_yaml, search_layouts
    from maxlm.plan.show import format_bytes, render_candidates_table
    from maxlm.programs.plans import verify_by_compiling

    found = search_layouts(run, machine, top=max(top, verify))
    counts = {name: getattr(found, name) for name in ("tried", "possible", "fitting", "taken")}
    console = _console(sys.stderr if quiet else sys.stdout)
    limit = machine.chip.memory
    console.print(
        f"{found.tried:,} candidates in {found.taken:.2f} s "
        f"({found.tried / max(found.taken, 1e-9):,.0f} a second): {found.possible:,} divide, "
        f"{found.fitting:,} fit"
    )
    if not found.best:
        words = "none divides: batch, sequence, heads and layers must divide over the devices"
        if found.possible:
            words = f"none fits; the least that any needs is {format_bytes(found.least)} a device"
        if found.fitting:
            words = f"none that fits can be: {found.refusal}"
        console.print(words, markup=False)
        if quiet:
            print(json.dumps({"fits": False, "search": {**counts, "best": []}}, indent=2))
        raise typer.Exit(1)
    peaks = verify_by_compiling(run, machine, found.best[:verify])
    console.print(render_candidates_table(found, limit, peaks))
    good = [i for i in (peaks or range(len(found.best))) if peaks.get(i, 0) <= limit]
    if not good:
        console.print("none of those compiled fits by the compiler's account")
        raise typer.Exit(1)
    winner = found.best[good[0]].apply(run)
    text = format_run_yaml(winner, source)
    console.print("\n# the quickest, as a config for maxlm train", markup=False)
    console.print(text, markup=False)
    best = [
        {**asdict(own), "compiled": peaks[i] if peaks.get(i, inf) < inf else None}
        for i, own in enumerate(found.best)
    ]
    return winner, {**counts, "best": best, "config": text}
