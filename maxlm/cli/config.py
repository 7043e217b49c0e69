"""``maxlm config``: what a config resolves to, what may stand in one, which ones are shipped."""

import sys
from typing import Annotated

import typer

from maxlm.cli.arguments import ConfigArgument, SettingsArgument

app = typer.Typer(help="Show configs, where each value comes from, their schema.")


@app.command()
def show(
    config: ConfigArgument,
    settings: SettingsArgument = None,
) -> None:
    """Print the resolved config as YAML, with where each value comes from."""
    from maxlm import config as configs
    from maxlm.run import RunConfig

    loaded = configs.load_config(RunConfig, config, settings or ())
    _print(configs.to_annotated_yaml(loaded), "yaml")


@app.command("schema")
def print_schema(
    recipe: Annotated[
        bool, typer.Option("--recipe", help="A corpus's recipe instead of a run.")
    ] = False,
) -> None:
    """Print the JSON Schema of a run config, for editors to complete and check YAML with."""
    import json

    from maxlm import config as configs

    if recipe:
        from maxlm.corpus.recipe import RecipeConfig as described
    else:
        from maxlm.run import RunConfig as described

    _print(json.dumps(configs.build_json_schema(described), indent=2, ensure_ascii=False), "json")


@app.command("list")
def list_configs() -> None:
    """Print the names of the configs that come with maxlm."""
    from maxlm.config import list_shipped_configs

    for name in list_shipped_configs():
        print(name)


def _print(text: str, language: str) -> None:
    """Coloured on a terminal, as it is elsewhere: the output may go to a file or another tool."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.syntax import Syntax

    plain = {"background_color": "default", "word_wrap": True}
    Console().print(Syntax(text, language, **plain))  # pyright: ignore[reportArgumentType]
