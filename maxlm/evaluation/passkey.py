"""Passkey retrieval: a number hidden in filler text, asked for at its end (Mohtashami &
Jaggi 2023, arXiv 2305.16300, §4.2). Prompts need no chat template."""

import re
from collections.abc import Callable, Sequence
from itertools import product
from random import Random

import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and "
    "memorize it. "
    "I will quiz you about the important information there."
)
SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


def build_passkey_prompt(
    tokenizer: Tokenizer, max_tokens: int, depth: float, key: str
) -> list[int]:
    """Builds a prompt of as many sentences as ``max_tokens`` hold, with the key behind
    ``depth`` percent of them. Raises MaxlmError: there is no room for the key and the
    question."""

    def encode(num_sentences: int) -> list[int]:
        filler = [SENTENCES[i % len(SENTENCES)] for i in range(num_sentences)]
        place = round(depth / 100 * num_sentences)
        before = " ".join(filler[:place])
        behind = " ".join(filler[place:])
        parts = [TASK, before, NEEDLE.format(key=key), behind, QUESTION]
        text = "\n".join(part for part in parts if part)
        return [*tokenizer.prefix_ids, *tokenizer.encode(text)]

    shortest = len(encode(0))
    if shortest > max_tokens:
        message = f"a passkey prompt has {shortest} tokens, and room for {max_tokens}"
        raise MaxlmError(message, where="--lengths", fix="use longer ones")
    # An estimate by the tokens of 100 sentences, then steps of one.
    tokens_per_hundred = len(encode(100)) - shortest
    count = max(0, (max_tokens - shortest) * 100 // tokens_per_hundred)
    while len(encode(count + 1)) <= max_tokens:
        count += 1
    prompt = encode(count)
    while len(prompt) > max_tokens:
        count -= 1
        prompt = encode(count)
    return prompt


def parse_passkey(text: str) -> str | None:
    """Returns the first number in an answer."""
    number = re.search(r"\d+", text)
    return None if number is None else number[0]


def evaluate_passkey(
    engine: Engine,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_samples: int,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Asks for keys of five digits, by greedy decoding; returns the share of right
    answers by length and depth.

    Args:
        engine: with a tokenizer, and room for the longest of ``lengths``.
        lengths: tokens of a prompt and its answer, at most.
        depths: places of the key in the filler, in percent: 0 is the beginning.
        num_samples: keys for each length and depth; cells have keys of their own.
        on_progress: is told how many answers there are, and of how many.
    """
    tokenizer = engine.tokenizer
    random = Random(seed)
    assert tokenizer is not None
    key_sizes = [len(tokenizer.encode(f" {key}")) for key in (10000, 54321, 98989)]
    room = max(key_sizes) + 3  # a stray space or quotation mark may come first
    sampling = SamplingConfig(temperature=0, max_new_tokens=room)
    requests: list[GenerationRequest] = []
    keys: list[str] = []
    for length, depth, _ in product(lengths, depths, range(num_samples)):
        key = str(random.randint(10_000, 99_999))
        keys.append(key)
        prompt = build_passkey_prompt(tokenizer, length - room, depth, key)
        requests.append(GenerationRequest(str(len(requests)), tuple(prompt), sampling))
    answers: list[list[int]] = [[] for _ in keys]
    num_done = 0
    for output in engine.run(requests):
        answers[int(output.request_id)] += output.token_ids
        if output.finish_reason is not None:
            num_done += 1
        on_progress(num_done, len(keys))
    is_right = []
    for answer, key in zip(answers, keys, strict=True):
        is_right.append(parse_passkey(tokenizer.decode(answer)) == key)
    # Requests are in this order: by length, depth and sample.
    by_cell = np.array(is_right).reshape(len(lengths), len(depths), num_samples)
    return by_cell.mean(axis=-1).tolist()
