"""Samples the next token from logits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures import ModelConfig

# Below this a temperature no longer fits the range of fp32 logits; the result is greedy anyway.
COLDEST = 1e-30


class SamplingConfig(Config):
    """Settings of drawing a continuation: temperature first, then top_k, then top_p."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it; 0 always takes
    the likeliest token (greedy)."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many likeliest tokens alone (Fan et al. 2018); 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of likeliest tokens that holds this much probability (nucleus
    sampling, Holtzman et al. 2019); 1: from all. Costs a sort of the vocabulary unless top_k
    is set."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Stop each continuation after this many tokens; an end-of-text token stops it sooner."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed: the same seed, prompt and settings give the same text."""


class FinalSamplesConfig(SamplingConfig):
    """Text generated when training ends."""

    prompts: tuple[str, ...] = ()


def check_samples(
    samples: FinalSamplesConfig, model: ModelConfig, prompt_tokens: Sequence[int] = ()
) -> None:
    """Check that a model continues text, and has positions for prompts and their continuations.

    Args:
        prompt_tokens: tokens of each prompt; 1 where there is no tokenizer yet.

    Raises:
        MaxlmError: naming the prompt.
    """
    if samples.prompts and model.architecture == "encoder":
        what = "an encoder names masked tokens, and continues no text"
        raise MaxlmError(what, where="samples.prompts", fix="set it to []")
    new, length = samples.max_new_tokens, model.max_seq_len
    # Without a table of positions a model can go on, but what it keeps of a row fills the memory.
    limit = model.position_limit or max(4096, 16 * length)
    for index, tokens in enumerate(prompt_tokens):
        total = tokens + new
        if model.architecture == "encoder_decoder":  # they stand apart, behind start_id
            total = max(tokens, 1 + new)
        if total > limit:
            raise MaxlmError(
                f"the prompt and samples.max_new_tokens={new} make {total:,} tokens; "
                f"model.max_seq_len={length} allows {limit:,}",
                where=f"samples.prompts.{index}",
                fix="shorten the prompt, or ask for fewer new tokens",
            )


def sample(logits: jax.Array, keys: jax.Array, config: SamplingConfig) -> jax.Array:
    """Draw one token a row.

    Of tokens with equal logits the lower ids count as likelier, so that top_k keeps exactly k.

    Args:
        logits: [B, V], fp32.
        keys: random keys [B], one a row; unused when greedy.
        config: only temperature, top_k and top_p matter here.

    Returns:
        int32 [B].
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    logits /= max(config.temperature, COLDEST)
    logits = jnp.where(logits == 0, 0.0, logits)  # top_k sorts -0.0 below 0.0
    vocab = logits.shape[-1]
    if not config.top_k and config.top_p == 1:
        return _draw(keys, logits)
    kept, ids = lax.top_k(logits, min(config.top_k or vocab, vocab))
    if config.top_p < 1:
        kept = jnp.where(_nucleus(kept, config.top_p), kept, -jnp.inf)
    rank = _draw(keys, kept)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _nucleus(logits: jax.Array, p: float) -> jax.Array:
    """Marks descending logits [B, k] that probability p needs; the first always is one."""
    probability = jax.nn.softmax(logits, axis=-1)
    return jnp.cumsum(probability, axis=-1) - probability < p


def _draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
