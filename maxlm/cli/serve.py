"""maxlm serve"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from maxlm.cli.common import (
    MeshOption,
    ModelArgument,
    SettingsArgument,
    StepOption,
    TemplateOption,
)


def command(
    context: typer.Context,
    model: ModelArgument,
    settings: SettingsArgument = None,
    host: Annotated[
        str, Option(help="Address to listen at; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[
        str | None, Option(help="Name in requests; default: the folder's.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        Option(
            exists=True,
            dir_okay=False,
            help="A file with the key; else $MAXLM_API_KEY.",
        ),
    ] = None,
    max_queue: Annotated[
        int, Option(min=0, help="Sequences that may wait; then 429.")
    ] = 256,
    max_body_mb: Annotated[int, Option(min=1, help="Most of a request, in MB.")] = 16,
    mesh: MeshOption = None,
    step: StepOption = None,
    template: TemplateOption = None,
    adapter: Annotated[
        list[str] | None,
        Option(help="NAME=FOLDER of a LoRA adapter to load beside it; repeatable."),
    ] = None,
    warm_up: Annotated[
        Literal["behind", "first"],
        Option(
            help="Compile programs behind the first answers, or all before the first."
        ),
    ] = "behind",
    generation_config: Annotated[
        Literal["auto", "none"],
        Option(
            help="Sampling left out by a request: the model's own settings, or "
            "OpenAI's."
        ),
    ] = "auto",
    allow_origin: Annotated[
        list[str] | None,
        Option(
            help="An origin whose pages may ask (CORS), such as https://chat.example; "
            "*: all."
        ),
    ] = None,
    log_requests: Annotated[
        bool, Option("--log-requests", help="Print a line for each request.")
    ] = False,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/embeddings
    and others of OpenAI's API, a chat page at /, Prometheus's numbers at /metrics.

    Settings are the engine's, as max_sequences=16. SIGTERM and Ctrl-C finish what runs.
    """
    from maxlm.serving.program import serve

    serve(**context.params)
