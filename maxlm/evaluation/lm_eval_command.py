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

_OWN = ("add_bos_token", "max_gen_toks", "seed")
_HARNESS = ("batch_size", "max_batch_size", "device")


@register_model("maxlm")
class LoadedMaxlmModel(MaxlmModel):
    """A model that the harness loads by its ``--model_args``: the folder of a run or a
    Hugging Face checkpoint, a mesh such as ``fsdp=2;tensor=2``, ``MaxlmModel``'s
    arguments, and settings of the engine. ``--batch_size`` and ``--device`` mean
    nothing here."""

    def __init__(
        self, run: str, step: int | None = None, mesh: str | None = None, **given: Any
    ):
        loaded = load_chat_model(
            str(run), step=step, mesh=mesh.replace(";", ",") if mesh else None
        )
        own = {name: given.pop(name) for name in _OWN if name in given}
        settings = [
            f"{name}={value}" for name, value in given.items() if name not in _HARNESS
        ]
        make_harness_model(loaded, super().__init__, settings, **own)


def main() -> None:
    """Runs ``lm_eval`` with the model ``maxlm``."""
    try:
        cli_evaluate()
    except MaxlmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
