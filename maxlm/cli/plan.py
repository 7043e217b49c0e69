"""maxlm plan"""

from typing import Annotated

import typer


def command(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped config: llama3_8b.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to override: key.path=value ...")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="The mesh, e.g. fsdp=64,tensor=4; default: the config's.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many devices a mesh axis of -1 is to fill.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show where every parameter of a run lies, and what each device must hold. Needs no device."""
    from maxlm.config import load
    from maxlm.plan.layout import lay_out
    from maxlm.run import RunConfig
    from maxlm.sharding import mesh_sizes, parse_mesh, smallest

    run = load(RunConfig, config, settings or ()).value
    chosen = parse_mesh(mesh) if mesh else run.mesh
    layout = lay_out(run, mesh_sizes(chosen, devices or smallest(chosen)))
    if as_json:
        import json

        print(json.dumps(layout.to_json(), indent=2))
        return
    from rich.console import Console

    from maxlm.plan.show import tables

    Console().print(tables(layout))
