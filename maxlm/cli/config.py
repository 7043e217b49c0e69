"""``maxlm config``: a config's resolved values, its schema, and the shipped configs."""

import json
from typing import Annotated

import typer
from typer import Option

from maxlm.cli.common import ConfigArgument, SettingsArgument
from maxlm.config.assets import list_shipped_configs
from maxlm.config.load import load_config
from maxlm.config.show import build_json_schema, to_annotated_yaml

app = typer.Typer(help="Show configs, where each value comes from, their schema.")


@app.command()
def show(config: ConfigArgument, settings: SettingsArgument = None) -> None:
    """Print the resolved config as YAML, with where each value comes from."""
    from maxlm.run.config import RunConfig

    print(to_annotated_yaml(load_config(RunConfig, config, settings or ())))


@app.command("schema")
def print_schema(
    recipe: Annotated[
        bool, Option("--recipe", help="A corpus's recipe instead of a run.")
    ] = False,
) -> None:
    """Print the JSON Schema of a run config, for editors to complete and check YAML
    with."""
    if recipe:
        from maxlm.corpus.recipe import RecipeConfig

        schema = build_json_schema(RecipeConfig)
    else:
        from maxlm.run.config import RunConfig

        schema = build_json_schema(RunConfig)
    print(json.dumps(schema, indent=2, ensure_ascii=False))


@app.command("list")
def list_configs() -> None:
    """Print the names of the configs that come with maxlm."""
    print(*list_shipped_configs(), sep="\n")
