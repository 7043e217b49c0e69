"""Continuations of a few prompts at once, by an engine of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.models.architectures import Model
from maxlm.models.params import Params


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    **settings: Any,
) -> Iterator[SequenceOutput]:
    """Continues prompts, and yields their tokens as they come; an output's
    ``request_id`` is the prompt's number, "0", "1", ... A model with an encoder reads
    the prompts with it, and writes an output of its own.

    Args:
        params: on an explicit mesh, where everything then runs.
        prompts: token ids, each starting as training documents do (with bos).
        tokenizer: for text, and for the tokens that end an output; None: outputs end at
            ``max_new_tokens`` alone.
        vocab_size: ids that may be drawn; default: the tokenizer's, else the model's.
        settings: of :class:`~maxlm.inference.engine.EngineConfig`; default: room for
            these prompts.

    Raises:
        MaxlmError: a model that cannot continue these prompts; before anything runs.
    """
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    room = {
        "max_sequences": max(1, len(prompts)),
        "max_length": max(2, -(-longest // 128) * 128),
    }
    engine = Engine(
        model, params, EngineConfig(**{**room, **settings}), tokenizer, vocab_size
    )
    for number, prompt in enumerate(prompts):
        engine.add_request(GenerationRequest(str(number), tuple(prompt), sampling))
    return engine.run((), stream=True)


def generate_tokens(*args: Any, **kwargs: Any) -> list[list[int]]:
    """Returns each prompt's new tokens; arguments as of :func:`generate`."""
    found: dict[str, list[int]] = {}
    for output in generate(*args, **kwargs):
        found.setdefault(output.request_id, []).extend(output.token_ids)
    return [found[str(number)] for number in range(len(found))]
