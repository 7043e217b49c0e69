"""maxlm serve"""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from maxlm.cli.common import (
    MeshOption,
    ModelArgument,
    SettingsArgument,
    StepOption,
    TemplateOption,
)


def command(
    model: ModelArgument,
    settings: SettingsArgument = None,
    host: Annotated[
        str, Option(help="Address to listen on; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[
        str | None, Option(help="The model's name in requests; default: the folder's.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        Option(
            exists=True,
            dir_okay=False,
            help="File with the API key; default: $MAXLM_API_KEY.",
        ),
    ] = None,
    max_queue: Annotated[
        int, Option(min=0, help="Sequences that may wait; more get 429.")
    ] = 256,
    max_body_mb: Annotated[int, Option(min=1, help="Largest request, in MB.")] = 16,
    mesh: MeshOption = None,
    step: StepOption = None,
    template: TemplateOption = None,
    adapter: Annotated[
        list[str] | None,
        Option(help="NAME=FOLDER of a LoRA adapter to load beside it; repeatable."),
    ] = None,
    warm_up: Annotated[
        Literal["behind", "first"],
        Option(help="Compile programs while the first requests run, or before them."),
    ] = "behind",
    generation_config: Annotated[
        Literal["auto", "none"],
        Option(
            help="Sampling settings that a request leaves out: the model's own, or "
            "OpenAI's."
        ),
    ] = "auto",
    allow_origin: Annotated[
        list[str] | None,
        Option(help="Origin allowed by CORS, such as https://chat.example; *: all."),
    ] = None,
    log_requests: Annotated[
        bool, Option("--log-requests", help="Print a line for each request.")
    ] = False,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/embeddings
    and others of OpenAI's API, a chat page at /, Prometheus metrics at /metrics.

    Settings are the engine's, as max_sequences=16. SIGTERM and Ctrl-C finish running
    requests first.
    """
    from maxlm.serving.program import serve

    serve(
        model,
        settings,
        host=host,
        port=port,
        name=name,
        api_key_file=api_key_file,
        max_queue=max_queue,
        max_body_mb=max_body_mb,
        mesh=mesh,
        step=step,
        template=template,
        adapter=adapter,
        warm_up=warm_up,
        generation_config=generation_config,
        allow_origin=allow_origin,
        log_requests=log_requests,
    )
