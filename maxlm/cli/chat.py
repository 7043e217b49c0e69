"""maxlm chat"""

import re
from typing import Annotated

from typer import Option

from maxlm.cli.common import (
    MeshOption,
    ModelArgument,
    SettingsArgument,
    StepOption,
    TemplateOption,
)
from maxlm.config.load import load_config


def command(
    model: ModelArgument,
    settings: SettingsArgument = None,
    system: Annotated[
        str | None, Option(help="The system message, before the conversation.")
    ] = None,
    mesh: MeshOption = None,
    step: StepOption = None,
    template: TemplateOption = None,
) -> None:
    """Chat with a model; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.

    Settings are those of sampling, as top_p=0.9, and of the engine, as
    max_length=16384; by default temperature=0.7, max_length=8192, and an answer may
    fill the context. Each line of piped input is a message.
    """
    from maxlm.config.sampling import SamplingConfig
    from maxlm.inference.engine_config import EngineConfig
    from maxlm.serving.program import load_chat_model, make_engine
    from maxlm.serving.terminal_chat import ChatSession, run_chat

    # At temperature 1 small models stray; an answer may have what the context has room
    # for.
    sampling_settings = ["temperature=0.7", "max_new_tokens=1000000000"]
    engine_settings = ["max_sequences=1", "max_length=8192"]
    for setting in settings or ():
        name = re.split(r"[.=\[]", setting)[0]
        if name in EngineConfig.model_fields:
            engine_settings.append(setting)
        else:
            sampling_settings.append(setting)
    sampling = load_config(SamplingConfig, None, sampling_settings).value
    loaded = load_chat_model(model, step=step, mesh=mesh, template=template)
    engine = make_engine(loaded, engine_settings, warm_up="behind")
    try:
        run_chat(ChatSession(engine, sampling, system))
    finally:
        engine.close()
