"""Text in, text out: what lies between a tokenizer and the generation loop."""

from collections.abc import Iterator, Sequence

import jax

from maxlm.data.tokenizer import StreamDecoder, Tokenizer
from maxlm.inference.generate import generate
from maxlm.inference.sampling import SamplingConfig
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.params import Params


def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    sampling: SamplingConfig,
) -> Iterator[list[str]]:
    """Continue prompts, each as the opening of a document; an encoder reads them as whole ones.
    Literals of special tokens in them are plain text.

    Yields at each step a list with the text that each row's new token completes, often empty; all
    of a row's pieces joined are its continuation (see :func:`get_prompt_separator`). The tokens
    that end a continuation give no text.
    """
    whole = isinstance(model, EncoderDecoder)
    steps = generate(
        model,
        params,
        encode_prompts(tokenizer, prompts, as_documents=whole),
        sampling,
        eos_id=tokenizer.stop_ids,
        key=jax.random.key(sampling.seed),
        vocab_size=tokenizer.vocab_size,
    )
    continued = [not whole and bool(tokenizer.encode(prompt)) for prompt in prompts]
    return _decode(steps, tokenizer, [StreamDecoder(tokenizer, continued=c) for c in continued])


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | bytes], *, as_documents: bool
) -> list[list[int]]:
    """Return the ids that a model is given for each prompt, at least one; ``as_documents``: prompts
    are documents, as an encoder reads them, rather than openings."""
    end = [tokenizer.eos_id] if as_documents else []
    encoded = [[*tokenizer.prefix_ids, *tokenizer.encode(prompt), *end] for prompt in prompts]
    # A model needs a token to start from, even where documents open without one.
    return [ids or [tokenizer.bos_id] for ids in encoded]


def get_prompt_separator(model: Model) -> str:
    """Returns what separates a prompt from its continuation where both are shown."""
    return "\n" if isinstance(model, EncoderDecoder) else ""


def _decode(
    steps: Iterator[list[int | None]], tokenizer: Tokenizer, decoders: list[StreamDecoder]
) -> Iterator[list[str]]:
    silent = (None, *tokenizer.stop_ids)
    for tokens in steps:
        yield [
            "" if token in silent else decoder.push(token)
            for token, decoder in zip(tokens, decoders, strict=True)
        ]
    yield [decoder.flush() for decoder in decoders]
