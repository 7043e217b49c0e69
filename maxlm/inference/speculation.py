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
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.inference.generative_model import GenerativeModel
from maxlm.models.architectures import Model
from maxlm.models.caches.layout import CacheLayout, has_row_caches, list_paged_windows
from maxlm.models.params import Params


class MtpDraftsConfig(Config):
    """Let the model's own modules of ``mtp`` guess, from what stands behind its layers
    (DeepSeek-V3, §5.4.3)."""

    kind: Literal["mtp"] = "mtp"
    num_drafts: int = Field(default=1, gt=0)
    """Tokens guessed, a step; those beyond the modules' number are guessed by the last
    module, each from the one before."""


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
    PromptLookupConfig | DraftModelConfig | MtpDraftsConfig,
    Field(discriminator="kind"),
]


class DraftModel(NamedTuple):
    """A model that guesses what another one will say."""

    model: Model
    params: Params


def count_drafting_modules(
    model: GenerativeModel, config: SpeculationConfig | None
) -> int:
    """Counts the modules of a model's ``mtp``, the first ones, that guess for it.
    Raises MaxlmError: they should, and there are none."""
    if not isinstance(config, MtpDraftsConfig):
        return 0
    mtp = model.config.mtp
    if mtp is None:
        message = "the model has no modules that predict further tokens (model.mtp)"
        fix = "use prompt_lookup, or train with model.mtp"
        raise MaxlmError(message, where="speculation.kind=mtp", fix=fix)
    return min(mtp.num_modules, config.num_drafts)


def look_up_prompt(tokens: Sequence[int], config: PromptLookupConfig) -> list[int]:
    """Returns the tokens that followed the last occurrence of a sequence's last ones,
    the longest that there is; nothing where there is none."""
    array = np.asarray(tokens)
    for size in range(min(config.max_ngram, len(array) - 1), config.min_ngram - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(array[:-1], size)
        matches = np.flatnonzero((windows == array[-size:]).all(axis=1))
        if len(matches):
            start = int(matches[-1]) + size
            return array[start : start + config.num_drafts].tolist()
    return []


def check_speculation(
    model: GenerativeModel, draft: GenerativeModel | None, layout: CacheLayout
) -> None:
    """Checks that tokens can be taken back from a model's caches, and that a draft
    model, if there is one, can guess for it on the same pages. Raises MaxlmError:
    recurrent states, or caches that evict; a draft model with another vocabulary, or
    windows of its own."""
    where = "speculation"
    models = [model] if draft is None else [model, draft]
    for each_model in models:
        if has_row_caches(each_model.cache_specs(layout)):
            message = (
                "a recurrent state, or a cache that evicts, cannot take tokens back"
            )
            raise MaxlmError(message, where=where, fix="leave it out")
    if draft is None:
        return
    draft_size = draft.config.vocab_size
    model_size = model.config.vocab_size
    if draft_size != model_size:
        message = f"the draft model has {draft_size} tokens, the model {model_size}"
        fix = "use a draft model with the same tokenizer"
        raise MaxlmError(message, where=where, fix=fix)
    # The draft model reads the model's page tables, one for each window.
    if not set(list_paged_windows(draft)) <= set(list_paged_windows(model)):
        message = "the draft model has windows that the model has not"
        fix = "use another draft model, or prompt_lookup"
        raise MaxlmError(message, where=where, fix=fix)
