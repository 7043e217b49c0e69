"""Settings of how the next token is drawn.

They stand here, apart from the engine, so that a run's config names them without loading
JAX.
"""

from typing import Annotated

from pydantic import Field

from maxlm.config.base import Config

MAX_LOGIT_BIASES = 320
"""Entries of ``logit_bias`` at most: what the engine's arrays have room for."""

_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Bias = Annotated[float, Field(ge=-1000, le=1000)]


class SamplingConfig(Config):
    """Settings of drawing a continuation, applied to the logits in the order in which
    they stand here, as transformers does."""

    logit_bias: dict[_TokenId, _Bias] = Field(default={}, max_length=MAX_LOGIT_BIASES)
    """Added to logits, by token id."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divides positive logits, and multiplies negative ones, of tokens that the prompt
    or the output has (Keskar et al. 2019, arXiv 1909.05858, §4.1); 1: none."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from a token's logit for each time that the output has it."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken once from the logits of tokens that the output has."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """No sequence of so many tokens comes twice, the prompt included; 0: no limit."""
    min_new_tokens: int = Field(default=0, ge=0)
    """No end-of-text token before so many tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it; 0
    always takes the likeliest token (greedy)."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many likeliest tokens alone (Fan et al. 2018); 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of likeliest tokens that holds this much probability
    (nucleus sampling, Holtzman et al. 2019); 1: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw from tokens with at least this share of the likeliest token's probability
    (Nguyen et al. 2024, arXiv 2407.01082); 0: from all."""
    typical_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the tokens whose surprise is closest to the expected one and that hold
    this much probability (Meister et al. 2022, arXiv 2202.00666); 1: from all."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Stop each continuation after this many tokens; an end-of-text token stops it
    sooner."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed: the same seed, prompt and settings give the same text."""

    @property
    def reads_history(self) -> bool:
        """Whether a token's distribution depends on earlier ones beyond the model."""
        penalties = (
            self.frequency_penalty,
            self.presence_penalty,
            self.no_repeat_ngram_size,
        )
        return self.repetition_penalty != 1 or any(penalties)


class FinalSamplesConfig(SamplingConfig):
    """Text generated when training ends."""

    prompts: tuple[str, ...] = ()
