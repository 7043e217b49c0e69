"""Speculative decoding: several tokens a step, guessed beforehand and verified together
(Leviathan et al. 2023, arXiv 2211.17192).

It is lossless in the strictest sense. The model draws each position's token from its
own distribution, with the random numbers of that position, whatever was guessed;
guesses are kept as far as they are what it drew. Outputs are those without speculation,
token for token. A draft model guesses with the same random numbers, so that where two
distributions are alike the tokens drawn of them mostly are too (Daliri et al. 2024,
arXiv 2408.07978).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures import Model
from maxlm.models.caches.layout import CacheLayout, has_row_caches, list_paged_windows
from maxlm.models.params import Params


class PromptLookupConfig(Config):
    """Guess what followed the last tokens where they came before (Saxena 2023, prompt
    lookup)."""

    kind: Literal["prompt_lookup"] = "prompt_lookup"
    num_drafts: int = Field(default=6, gt=0)
    """Tokens guessed at most, a step."""
    max_ngram: int = Field(default=4, gt=0)
    """Longest sequence of last tokens that is looked up; shorter ones follow."""
    min_ngram: int = Field(default=2, gt=0)


class DraftModelConfig(Config):
    """Let a smaller model with the same tokenizer guess."""

    kind: Literal["draft_model"] = "draft_model"
    folder: str
    """A run's folder, or a Hugging Face checkpoint's."""
    num_drafts: int = Field(default=4, gt=0)
    """Tokens guessed, a step."""


SpeculationConfig = Annotated[
    PromptLookupConfig | DraftModelConfig, Field(discriminator="kind")
]


class DraftModel(NamedTuple):
    """A model that guesses what another one will say."""

    model: Model
    params: Params


def look_up_prompt(tokens: Sequence[int], config: PromptLookupConfig) -> list[int]:
    """Returns the tokens that followed the last occurrence of a sequence's last ones,
    the longest that there is; nothing where there is none."""
    array = np.asarray(tokens)
    for size in range(min(config.max_ngram, len(array) - 1), config.min_ngram - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(array[:-1], size)
        found = np.flatnonzero((windows == array[-size:]).all(axis=1))
        if len(found):
            start = int(found[-1]) + size
            return array[start : start + config.num_drafts].tolist()
    return []


def check_speculation(model: Any, draft: Any, layout: CacheLayout) -> None:
    """Checks that tokens can be taken back from a model's caches, and that a draft
    model, if there is one, can guess for it on the same pages. Raises MaxlmError:
    recurrent states, or caches that evict; a draft model with another vocabulary, or
    windows of its own."""
    where = "speculation"
    for each in filter(None, (model, draft)):
        if has_row_caches(each.cache_specs(layout)):
            what = "a recurrent state, or a cache that evicts, cannot take tokens back"
            raise MaxlmError(what, where=where, fix="leave it out")
    if draft is None:
        return
    own = draft.config.vocab_size
    if own != model.config.vocab_size:
        what = f"the draft model has {own} tokens, the model {model.config.vocab_size}"
        raise MaxlmError(
            what, where=where, fix="use a draft model with the same tokenizer"
        )
    if not set(list_paged_windows(draft)) <= set(list_paged_windows(model)):
        what = "the draft model has windows that the model has not"
        raise MaxlmError(
            what, where=where, fix="use another draft model, or prompt_lookup"
        )
