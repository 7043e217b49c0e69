"""Text in, text out: what lies between a tokenizer and the generation loop."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.prompts import encode_prompts
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.generate import generate
from maxlm.inference.search.beam import BeamSearchConfig, beam_search
from maxlm.inference.search.best_of_n import best_of_n
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.frontends import ItemArrays
from maxlm.models.params import Params


def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    sampling: SamplingConfig,
    items: ItemArrays | None = None,
) -> Iterator[list[str]]:
    """Continue prompts, each as the opening of a document; an encoder reads them as
    whole ones. Literals of special tokens in them are plain text. ``items``: arrays of
    the model's frontend, whose vectors stand before the text of each prompt.

    Yields at each step a list with the text that each row's new token completes, often
    empty; all of a row's pieces joined are its continuation (see
    :func:`get_prompt_separator`). The tokens that end a continuation give no text.
    """
    tokens = encode_prompts(
        tokenizer, prompts, as_documents=isinstance(model, EncoderDecoder)
    )
    if items is not None:
        tokens = [
            place_items(model, prompt, items, tokenizer.prefix_ids) for prompt in tokens
        ]
    outputs = generate(
        model, params, tokens, sampling, tokenizer=tokenizer, items=items
    )
    return (
        _place_text(output.text, int(output.request_id), len(prompts))
        for output in outputs
    )


def place_items(
    model: Model, tokens: Sequence[int], items: ItemArrays, opening: Sequence[int]
) -> list[int]:
    """Returns a prompt's tokens with placeholders for items of the model's frontend, as
    examples that it is trained on have them; ``opening``: the tokens that a document
    begins with. Raises MaxlmError: the model has no frontend, or reads other arrays."""
    frontend = model.config.frontend
    if frontend is None:
        message = f"items ({', '.join(items)}) for a model without a frontend"
        raise MaxlmError(message, where="items", fix="leave them out")
    num_vectors = frontend.count_vectors(frontend.check_items(items))
    indices = frontend.place_items(tokens, num_vectors, opening)
    return [frontend.placeholder_id if i < 0 else tokens[i] for i in indices]


def read_item_file(path: Path) -> dict[str, np.ndarray]:
    """Reads arrays [items, ...] by name from an .npz file. Raises MaxlmError: it is
    none."""
    fix = "write it with numpy.savez"
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            message = "one array without a name, as in .npy"
            raise MaxlmError(message, where=str(path), fix=fix)
        with loaded:
            return {name: loaded[name] for name in loaded}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        message = f"cannot be read as .npz: {error}"
        raise MaxlmError(message, where=str(path), fix=fix) from None


def search_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    sampling: SamplingConfig,
    *,
    num_beams: int | None,
    num_samples: int = 1,
) -> Iterator[list[str]]:
    """Continue prompts one after the other, by beam search or, where ``num_beams`` is
    None, by the sample with the highest mean log-probability; yields each prompt's text
    as :func:`generate_text` does, in one piece."""
    tokens = encode_prompts(
        tokenizer, prompts, as_documents=isinstance(model, EncoderDecoder)
    )
    longest = max(map(len, tokens)) + sampling.max_new_tokens
    room = EngineConfig(
        max_sequences=num_beams or min(num_samples, 16), max_length=longest
    )
    engine = Engine(model, params, room, tokenizer)
    for number, prompt in enumerate(tokens):
        if num_beams is None:
            result = best_of_n(engine, prompt, num_samples, sampling)
        else:
            config = BeamSearchConfig(
                num_beams=num_beams, max_new_tokens=sampling.max_new_tokens
            )
            (result,) = beam_search(engine, [prompt], config)
        yield _place_text(result.outputs[0].text, number, len(prompts))


def get_prompt_separator(model: Model) -> str:
    """Returns what separates a prompt from its continuation where both are shown."""
    return "\n" if isinstance(model, EncoderDecoder) else ""


def _place_text(text: str, index: int, num_prompts: int) -> list[str]:
    """One prompt's text as the texts of all prompts."""
    return [text if i == index else "" for i in range(num_prompts)]
