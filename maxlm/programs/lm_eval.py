"""lm-evaluation-harness's own command line, with our models: ``maxlm-lm-eval --model maxlm
--model_args run=FOLDER,max_length=2048 --tasks ...``."""

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from maxlm.config import MaxlmError
from maxlm.evaluation.lm_eval_model import MaxlmModel
from maxlm.programs.evaluate import make_evaluation_engine
from maxlm.programs.serve import load_chat_model


@register_model("maxlm")
class LoadedMaxlmModel(MaxlmModel):
    """A model that the harness loads by its ``--model_args``.

    Args:
        run: a run's folder, or a Hugging Face checkpoint's.
        mesh: devices by axis; a semicolon between axes, as the harness takes the commas.
        batch_size, max_batch_size, device: the harness's own, without a meaning here.
        settings: the engine's.
    """

    def __init__(
        self,
        run: str,
        step: int | None = None,
        mesh: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **settings: Any,
    ):
        devices = mesh.replace(";", ",") if mesh else None
        loaded = load_chat_model(run, step=step, mesh=devices, template=None)
        engine = make_evaluation_engine(loaded, [f"{k}={v}" for k, v in settings.items()])
        own = {"add_bos_token": add_bos_token, "prefix_token_id": prefix_token_id}
        super().__init__(engine, **own, max_gen_toks=max_gen_toks)


def main() -> None:
    """Runs ``lm_eval`` with the model ``maxlm``."""
    try:
        cli_evaluate()
    except MaxlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
