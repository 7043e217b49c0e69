"""The generation loop: one prefill, then one small dispatch a token, streamed as they come."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

from maxlm.config import MaxlmError
from maxlm.inference.decode import cast_params, decode, encode, prefill
from maxlm.inference.sampling import SamplingConfig, sample
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.transformer import Cache, CrossAttentionCache, Transformer
from maxlm.models.params import Params
from maxlm.sharding import bind_mesh


def generate(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    eos_id: int | Sequence[int] | None,
    key: jax.Array,
    streams: Sequence[int] | None = None,
    vocab_size: int | None = None,
    cache_length: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts, yielding each step's tokens as soon as they are known. A model
    with an encoder reads the prompts with it, and writes an output of its own.

    A row's tokens depend on its prompt, the settings, ``key`` and its stream, not on the other
    rows.

    Args:
        params: on an explicit mesh, where everything then runs.
        prompts: token ids, each starting as training documents do (with bos).
        eos_id: ends a row, or several that do; None: rows only end at max_new_tokens.
        key: one key for the call.
        streams: each row's random stream, in [0, 2**32); default: its index.
        vocab_size: ids the tokenizer knows, where the model's table is larger; no other is drawn.
        cache_length: slots of each row's cache; default: as many as are needed, rounded up so
            that calls of similar lengths share a compilation.

    Returns:
        For each step a list with each row's token; None for rows that have ended. The eos token
        itself is yielded. Stops when every row has ended. A model that cannot continue these
        prompts is refused before anything runs.
    """
    if isinstance(model, Encoder):
        what = "an encoder names masked tokens; it does not continue text"
        raise MaxlmError(what, where="generate", fix="use a decoder, or an encoder with a decoder")
    _check_prompts(model.config, prompts)
    if model.rules.seq:
        what = f"the sequence is split over {' and '.join(model.rules.seq)}"
        raise MaxlmError(what, where="mesh", fix="generate on a mesh with context=1")
    longest, new = max(map(len, prompts)), sampling.max_new_tokens
    if isinstance(model, EncoderDecoder):  # the output's slots, behind its start
        width, _ = _sizes(model.config, longest, 0, None)
        _, length = _sizes(model.config, 1, new, cache_length)
    else:
        width, length = _sizes(model.config, longest, new, cache_length)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    rows = _round_up(len(prompts), prod(mesh.shape[axis] for axis in model.rules.batch))
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)  # rows that only fill the batch hold one token
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    seeds = np.zeros(rows, np.uint32)
    seeds[: len(prompts)] = range(len(prompts)) if streams is None else streams
    # Only what shapes the distribution is compiled in.
    shape = sampling.model_copy(update={"max_new_tokens": 1, "seed": 0})
    settings = _Settings(model, shape, vocab_size)
    given = _Given(bind_mesh(mesh, cast_params)(model, params), seeds, key)
    start = partial(bind_mesh(mesh, _start), settings, length, given, tokens, lengths)
    advance = partial(bind_mesh(mesh, _advance), settings, given)
    return _stream(start, advance, len(prompts), sampling.max_new_tokens, eos_id)


class _Settings(NamedTuple):
    """Settings that are compiled into a call's steps."""

    model: Transformer
    sampling: SamplingConfig
    vocab_size: int | None


class _Given(NamedTuple):
    """A call's arrays that all steps read."""

    params: Params
    seeds: jax.Array | np.ndarray
    key: jax.Array


def _stream(start, advance, rows: int, steps: int, eos_id: int | Sequence[int] | None):
    ended = np.zeros(rows, bool)
    tokens, positions, cache, memory = start()
    for step in range(steps):
        drawn = tokens
        if step + 1 < steps:  # before looking at the tokens, so that the device never waits
            tokens, positions, cache = advance(tokens, positions, cache, memory)
        values = np.asarray(drawn)[:rows]
        yield [None if over else int(token) for token, over in zip(values, ended, strict=True)]
        ended |= np.isin(values, () if eos_id is None else eos_id)
        if ended.all():
            return


@partial(jax.jit, static_argnums=(0, 1))
def _start(
    settings: _Settings, cache_length: int, given: _Given, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, Cache, CrossAttentionCache | None]:
    model = settings.model
    memory = encode(model, given.params, tokens, lengths)
    if isinstance(model, EncoderDecoder):
        tokens = jnp.full_like(tokens[:, :1], model.config.start_id)
        lengths = jnp.ones_like(lengths)
    logits, cache = prefill(model, given.params, tokens, lengths, cache_length, memory)
    return _draw_next(settings, given, logits, lengths), _whole(lengths), cache, memory


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _advance(
    settings: _Settings,
    given: _Given,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    memory: CrossAttentionCache | None,
) -> tuple[jax.Array, jax.Array, Cache]:
    logits, cache = decode(settings.model, given.params, tokens, positions, cache, memory)
    positions = positions + 1
    return _draw_next(settings, given, logits, positions), _whole(positions), cache


def _draw_next(
    settings: _Settings, given: _Given, logits: jax.Array, positions: jax.Array
) -> jax.Array:
    """The tokens at ``positions``, each drawn with a key of its row's stream and position."""

    def row_key(seed, position):
        return jax.random.fold_in(jax.random.fold_in(given.key, seed), position)

    rows = settings.model.rules.spec("batch")
    keys = jax.vmap(row_key)(reshard(given.seeds, rows), reshard(positions, rows))
    return _whole(sample(logits[:, : settings.vocab_size], keys, settings.sampling))


def _whole(x: jax.Array) -> jax.Array:
    """Replicates x over the mesh, so that any process can read it."""
    return reshard(x, PartitionSpec())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def round_up_to_bucket(n: int) -> int:
    """Rounds n up to a power of two from 16 to 128, or a multiple of 128: few distinct sizes, hence
    few compilations, at little waste."""
    return _round_up(n, 128) if n > 128 else max(16, 1 << (n - 1).bit_length())


def _sizes(
    config: TransformerConfig, longest: int, new: int, cache_length: int | None
) -> tuple[int, int]:
    """Width of the padded prompts, slots of the cache."""
    limits = []
    if config.position_limit is not None:
        limits.append((config.position_limit, "the model has positions"))
    if cache_length is not None:
        limits.append((cache_length, "the cache has slots"))
    limit, reason = min(limits, default=(None, ""))
    if limit is not None and longest + new > limit:
        room = limit - longest
        fix = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
        what = f"a prompt of {longest} tokens and {new} new ones make {longest + new}"
        raise MaxlmError(f"{what}; {reason} for {limit}", where="generate", fix=fix)
    length = cache_length or round_up_to_bucket(longest + new)
    length = length if limit is None else min(length, limit)
    return min(round_up_to_bucket(longest), length), length


def _check_prompts(config: TransformerConfig, prompts: Sequence[Sequence[int]]) -> None:
    if not prompts:
        raise MaxlmError("no prompts", where="generate", fix="give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise MaxlmError("no tokens", where=f"prompt {number}", fix="start it with bos")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                what = f"token {token} is outside the model's vocabulary of {config.vocab_size}"
                fix = "use the tokenizer the model was trained with"
                raise MaxlmError(what, where=f"prompt {number}", fix=fix)
