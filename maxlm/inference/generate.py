"""Continuations of a few prompts at once, by an engine of their own."""

from collections.abc import Iterable, Iterator, Sequence

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.models.architectures import Model
from maxlm.models.frontends import ItemArrays
from maxlm.models.params import Params


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    config: EngineConfig | None = None,
    items: ItemArrays | None = None,
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
        config: of the engine; the default, and a config that leaves ``max_sequences``
            or ``max_length`` out, have room for these prompts.
        items: arrays of the model's frontend, whose vectors stand at each prompt's
            placeholders.

    Raises:
        MaxlmError: a model that cannot continue these prompts; before anything runs.
    """
    config = config or EngineConfig()
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    room = {
        "max_sequences": max(1, len(prompts)),
        # In steps of 128: prompts of about one length share a compilation.
        "max_length": max(2, -(-longest // 128) * 128),
    }
    unset = {
        name: value
        for name, value in room.items()
        if name not in config.model_fields_set
    }
    config = config.model_copy(update=unset)
    engine = Engine(model, params, config, tokenizer, vocab_size)
    for number, prompt in enumerate(prompts):
        request = GenerationRequest(str(number), tuple(prompt), sampling, items=items)
        engine.add_request(request)
    return engine.run((), stream=True)


def collect_tokens(outputs: Iterable[SequenceOutput]) -> list[list[int]]:
    """Returns each prompt's new tokens, of the outputs of :func:`generate`."""
    tokens: dict[str, list[int]] = {}
    for output in outputs:
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return [tokens[str(number)] for number in range(len(tokens))]
