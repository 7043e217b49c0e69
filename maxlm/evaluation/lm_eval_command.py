"""lm-evaluation-harness's own command line, with our models: ``maxlm-lm-eval --model
maxlm --model_args run=FOLDER,max_length=2048 --tasks ...``."""

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from maxlm.config import MaxlmError
from maxlm.evaluation.lm_eval_model import MaxlmModel
from maxlm.evaluation.program import make_harness_model
from maxlm.serving.program import load_chat_model

_IGNORED = ("batch_size", "max_batch_size", "device")
"""Arguments that the harness passes to every model."""


@register_model("maxlm")
class LoadedMaxlmModel(MaxlmModel):
    """A model that the harness loads by its ``--model_args``: the folder of a run or a
    Hugging Face checkpoint, a mesh such as ``fsdp=2;tensor=2``, ``MaxlmModel``'s
    arguments, and settings of the engine. ``--batch_size`` and ``--device`` mean
    nothing here."""

    def __init__(
        self,
        run: str,
        step: int | None = None,
        mesh: str | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **engine_settings: Any,
    ):
        # The harness parts its arguments at commas.
        if mesh:
            mesh = mesh.replace(";", ",")
        loaded = load_chat_model(str(run), step=step, mesh=mesh or None)
        settings = [
            f"{name}={value}"
            for name, value in engine_settings.items()
            if name not in _IGNORED
        ]
        make_harness_model(
            loaded,
            super().__init__,
            settings,
            add_bos_token=add_bos_token,
            max_gen_toks=max_gen_toks,
            seed=seed,
        )


def main() -> None:
    """Runs ``lm_eval`` with the model ``maxlm``."""
    try:
        cli_evaluate()
    except MaxlmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
