"""maxlm plan"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from typer import Option

from maxlm.cli.common import ConfigArgument, JsonOption, SettingsArgument, open_console, print_json
from maxlm.config import MaxlmError, load_config

if TYPE_CHECKING:
    from maxlm.plan.predict import Machine


def _amount(description: str, least: float = 0) -> Any:
    return Option(min=least, max=1e12, help=description)


def command(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    on: Annotated[
        str | None, Option(help="The machine: v5p-256, 2xv5p-512, v5e-256, h100x64, cpux8, ...")
    ] = None,
    mesh: Annotated[str | None, Option(help="Instead of the config's: fsdp=64,tensor=4.")] = None,
    compiled: Annotated[bool, Option("--compile", help="Ask its compiler too (a minute).")] = False,
    searching: Annotated[
        bool, Option("--search", help="Find the quickest mesh and remat.")
    ] = False,
    top: Annotated[int | None, Option(min=1, help="How many a search shows: 10.")] = None,
    html: Annotated[Path | None, Option(help="Write a page to look at, all in one file.")] = None,
    as_json: JsonOption = False,
    price: Annotated[float | None, _amount("A device's price an hour: shows the run's.")] = None,
    serve: Annotated[bool, Option("--serve", help="Plan serving the model instead.")] = False,
    prompt: Annotated[int | None, Option(min=1, help="Tokens of a prompt to serve: 512.")] = None,
    new: Annotated[int | None, Option(min=1, help="Tokens of its answer: 128.")] = None,
    batch: Annotated[int | None, Option(min=1, help="Sequences at once: as many as fit.")] = None,
    cache: Annotated[Literal["auto", "int8", "int4"] | None, Option(help="Keys, values.")] = None,
    weights: Annotated[Literal["auto", "fp8", "int8"] | None, Option(help="Matrices.")] = None,
    ttft_ms: Annotated[float | None, _amount("Longest time to a first token.", 1e-3)] = None,
    tpot_ms: Annotated[float | None, _amount("Longest time between tokens.", 1e-3)] = None,
) -> None:
    """Show what a run, or serving its model, holds, sends and takes on a machine, before it is paid
    for.

    Exit code: 0 it fits, 1 it does not, 2 a mistake in what was given.
    """
    from maxlm.plan.predict import plan_run
    from maxlm.plan.show import format_seconds, render_plan_tables, render_plan_vs_compiler_table
    from maxlm.programs.run_config import load_run_config
    from maxlm.sharding import count_min_devices, mesh_sizes, parse_mesh

    requests = {"prompt": prompt, "new": new, "batch": batch, "cache": cache, "weights": weights}
    requests |= {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms}
    requests = {name: value for name, value in requests.items() if value is not None}
    if serve:
        _refuse({"--compile": compiled}, "is of training", "leave it out, or --serve")
        top = top or 10 * searching
        out, shown, fits = _plan_serving(config, settings, on, mesh, requests, top, price)
        return _show(out, shown, fits, html, as_json)
    asked = {f"--{name.replace('_', '-')}": True for name in requests}
    _refuse(asked, "is of serving", "add --serve")
    on_machines = {"--compile": compiled, "--search": searching, "--price": price is not None}
    _refuse(on_machines if on is None else {}, "needs a machine", "name it: --on v5p-128")
    _refuse({"--top": top and not searching}, "is how many a search shows", "add --search")
    _refuse({"--mesh": mesh and searching}, "is what --search chooses", "leave one of the two out")
    run = load_run_config(config, settings or ())
    if mesh:
        run = run.model_copy(update={"mesh": parse_mesh(mesh)})
    sizes = None if on else mesh_sizes(run.mesh, count_min_devices(run.mesh))
    machine, found = _find_machine(on) if on else None, None
    if machine and searching:
        run, found = _search(run, machine, config, top or 10, as_json)
    result = plan_run(run, machine, sizes=sizes)
    out, fits = result.to_json(), result.fits
    shown: list[Any] = [render_plan_tables(result, price_per_device_hour=price)]
    if found:
        out["search"] = found
    if price is not None and result.run_hours is not None:
        out["price"] = price * result.run_hours * result.layout.devices
    if machine and compiled:
        from maxlm.programs.compile import check_fit_by_compiling

        out["compiled"] = verdict = check_fit_by_compiling(run, machine, result)
        fits, words = verdict["fits"], verdict["words"]
        if verdict["seconds"] is not None:
            shown.append(render_plan_vs_compiler_table(verdict["figures"]))
            words += f"; compiled in {format_seconds(verdict['seconds'])}"
        shown.append(f"\n{words}")
    _show(out, shown, fits, html, as_json)


def _show(
    out: dict[str, Any], shown: list[Any], fits: bool | None, html: Path | None, as_json: bool
) -> None:
    """Write a plan's page, print its JSON or what is shown of it; fail if it does not fit."""
    if html:
        from maxlm.runtime.report_page import write_report_page

        write_report_page(html, "maxlm.plan", out["name"], out)
        shown = [*shown, f"written: {html}"]
    if as_json:
        print_json(out)
    else:
        console = open_console()
        for part in shown:
            console.print(part, markup=False)
    if fits is False:
        raise typer.Exit(1)


def _plan_serving(
    config: str,
    settings: list[str] | None,
    on: str | None,
    mesh: str | None,
    requests: dict[str, Any],
    top: int,
    price: float | None,
) -> tuple[dict[str, Any], list[Any], bool]:
    """Plan serving, on the best split where no mesh is given: as plain data and as what is shown,
    and whether it fits and is in time."""
    from maxlm.plan.serving import ENGINE_WEIGHT_FORMATS, ServingOptions, search_serving
    from maxlm.plan.serving_cache import CacheFormat
    from maxlm.plan.show import render_serving_search, render_serving_tables
    from maxlm.run import RunConfig
    from maxlm.sharding import mesh_sizes, parse_mesh

    if on is None:
        raise MaxlmError("--serve needs a machine", fix="name it: --on h100x8")
    weights = requests.get("weights", "auto")
    if weights not in ENGINE_WEIGHT_FORMATS:
        message = f"--weights {weights}: maxlm serves no quantized weights yet"
        raise MaxlmError(message, fix="leave it out: weights are in the compute dtype")
    _refuse({"--search or --top": top and mesh}, "chooses the mesh", "leave one of the two out")
    folder = Path(config) / "config.yaml"
    run = load_config(RunConfig, str(folder) if folder.is_file() else config, settings or ()).value
    if run.name == RunConfig.model_fields["name"].default:
        run = run.model_copy(update={"name": Path(config).stem})
    machine, cache, tensor = _find_machine(on), requests.pop("cache", None), None
    if mesh:
        sizes = mesh_sizes(parse_mesh(mesh), machine.topology.devices)
        others = {f"--mesh {axis}": sizes[axis] > 1 for axis in ("stage", "expert", "context")}
        _refuse(others, "does not split what is served", "use data and tensor")
        tensor = sizes["tensor"]  # devices of a replica: `data` and `fsdp` count replicas
    caches = (cache,) if cache else get_args(CacheFormat) if top else ("auto",)
    options = ServingOptions(**requests)
    plans, refusal = search_serving(run, machine, options, tensor=tensor, caches=caches)
    plan, out = plans[0], asdict(plans[0])
    shown: list[Any] = [render_serving_tables(plan, price_per_device_hour=price)]
    if top:
        out["search"] = [asdict(own) for own in plans[:top] if own.is_feasible]
        shown.insert(0, render_serving_search(plans, top))
    if refusal and not plan.fits:
        shown.append(f"\nnot tried: {refusal}")
    return out, shown, plan.is_feasible


def _find_machine(on: str) -> "Machine":
    """Return a machine, with JAX kept on this machine's CPU: N virtual devices for `cpuxN`."""
    import jax

    from maxlm.plan.predict import Machine
    from maxlm.plan.topology import parse_topology

    topology = parse_topology(on)
    jax.config.update("jax_platforms", "cpu")
    if topology.platform == "cpu" and jax.config.values["jax_num_cpu_devices"] != topology.devices:
        jax.config.update("jax_num_cpu_devices", topology.devices)
    return Machine.from_name(on)


def _refuse(options: dict[str, Any], what: str, fix: str) -> None:
    """Refuse options that have no effect here."""
    for option, given in options.items():
        if given:
            raise MaxlmError(f"{option} {what}", fix=fix)


def _search(
    run: Any, machine: Any, source: str, top: int, quiet: bool
) -> tuple[Any, dict[str, Any]]:
    """Print the quickest candidates; return the first as a run, and all of them as plain data.
    Raises typer.Exit: nothing fits."""
    from maxlm.plan.known_errors import format_known_time_errors
    from maxlm.plan.search import format_run_yaml, search_layouts
    from maxlm.plan.show import format_bytes, render_candidates_table

    found = search_layouts(run, machine, top=top)
    counts: dict[str, Any] = {"tried": found.num_tried, "possible": found.num_divisible}
    counts |= {"fitting": found.num_fitting, "taken": found.search_seconds}
    console = open_console(sys.stderr if quiet else sys.stdout)
    console.print(
        f"{found.num_tried:,} candidates in {found.search_seconds:.2f} s "
        f"({found.num_tried / max(found.search_seconds, 1e-9):,.0f} a second): "
        f"{found.num_divisible:,} divide, {found.num_fitting:,} fit"
    )
    if not found.best:
        words = "none divides: batch, sequence, heads and layers must divide over the devices"
        if found.num_divisible:
            least = format_bytes(found.min_peak_bytes)
            words = f"none fits; the least that any needs is {least} a device"
        if found.num_fitting:
            words = f"none that fits can be: {found.last_refusal}"
        console.print(words, markup=False)
        if quiet:
            print_json({"fits": False, "search": {**counts, "best": []}})
        raise typer.Exit(1)
    console.print(render_candidates_table(found, machine.chip.memory_bytes))
    errors = {
        error: None
        for candidate in found.best
        for error in candidate.known_time_errors(run, machine.topology)
    }
    if errors:
        console.print(f"among these, {format_known_time_errors([*errors])}", markup=False)
    winner = found.best[0].apply(run)
    text = format_run_yaml(winner, source)
    console.print("\n# the quickest, as a config for maxlm train", markup=False)
    console.print(text, markup=False)
    return winner, {**counts, "best": [asdict(own) for own in found.best], "config": text}
