"""Log-probabilities of the engine against those of a training forward pass.

    python benchmarks/engine_trainer.py [--kinds dense moe] [--batch-invariant]

For each kind of model, small and random in fp32: tokens are drawn by engines that differ
in what runs together, chunks of prompts, page sizes, prefixes, preemptions and the
parameters before; then a training forward pass reads them, several sequences packed in
a row. Prints the largest difference of a log-probability for each way of running, and
the mean of exp(trainer − engine) at top_p .8, top_k 50, min_p .1 beside that of a
log-probability among the tokens that these filters keep.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.adapters import Adapter
from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.params import Params, bind, param_specs
from maxlm.optim.state import param_shardings
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.cross_entropy import compute_fused_log_probs
from maxlm.parallel.entropy import compute_log_probs_and_entropies
from maxlm.run.model_placement import place_model
from maxlm.sharding import MeshConfig, ShardingConfig, make_mesh

VOCAB = 66
_ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
_LATENT = {"q_rank": 7, "kv_rank": 10, "rotary_dim": 2, "value_dim": 4}
_DELTA = {"kind": "gated_delta_net", "num_heads": 4, "num_key_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"attention": _ATTENTION},
    "moe": {
        "attention": _ATTENTION,
        "mlp": None,
        "moe": {"num_experts": 6, "experts_per_token": 2, "d_ff": 11},
    },
    "window": {"attention": _ATTENTION | {"window": 5}},
    "latent": {
        "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6}
        | {"latent": _LATENT},
    },
    "hybrid": {
        "attention": _ATTENTION,
        "kinds": {
            "delta": {"mixer": _DELTA | {"key_dim": 5, "value_dim": 6}},
            "full": {},
        },
        "pattern": ["delta", "full"],
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "together": {},
    "one by one": {"max_sequences": 1},
    "one token a dispatch": {"decode_steps": 1},
    "chunks of 3": {"prefill_tokens": 3},
    "chunks of 64": {"prefill_tokens": 64},
    "pages of 3": {"page_size": 3},
    "pages of 16": {"page_size": 16},
    "few pages": {"num_pages": 9},
    "no shared prefixes": {"prefix_cache": False},
    "the trainer's arrays": {"shares_params": True},
}
"""Settings of the engine that change nothing but what runs together."""
# A stream of about unit size, as of trained models: norms that enlarge a small one
# would enlarge rounding with it, on both sides alike.
_STDS = {"embedding": 1.0, "head": 0.15}
_DEFAULTS = {"max_sequences": 8, "max_length": 48, "page_size": 8, "prefill_tokens": 16}


class DrawnSequence(NamedTuple):
    """A prompt, and what an engine drew behind it."""

    prompt: tuple[int, ...]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class ComparedCase:
    """A model as a trainer has it."""

    model: Decoder
    params: Params
    mesh: Mesh

    def with_other_params(self) -> "ComparedCase":
        """Returns the same model with parameters of another step."""
        params = jax.tree.map(
            lambda x: jax.device_put(np.asarray(x)[..., ::-1].copy(), x.sharding),
            self.params,
        )
        return ComparedCase(self.model, params, self.mesh)


def build_case(
    kind: str,
    mesh: Mesh,
    adapter: Adapter | None = None,
    *,
    batch_invariant: bool = False,
) -> ComparedCase:
    """Builds a small model with random parameters, stored and used on a mesh as a
    trainer's are."""
    settings = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 20,
        "max_seq_len": 128,
        "mlp": {"d_ff": 28},
        **KINDS[kind],
    }
    config = DecoderConfig.model_validate(settings)
    sizes = dict(mesh.shape)
    sharding = ShardingConfig()
    with jax.set_mesh(mesh):
        placed = place_model(
            config,
            sharding,
            ParallelConfig(batch_invariant=batch_invariant),
            sizes,
            jnp.float32,
            training=None,
            transforms=[] if adapter is None else [adapter],
        )
        model = placed.model
        assert isinstance(model, Decoder)
        specs = param_specs(model)
        shardings = param_shardings(specs, placed.storage, mesh)
        rng = np.random.default_rng(0)

        def draw(path, spec, sharding):
            noise = rng.standard_normal(spec.shape)
            if spec.role == "vector":
                start = spec.init(jax.random.key(0), spec.shape, jnp.float32)
                value = np.asarray(start) + 0.1 * noise
            else:
                value = _STDS.get(path[0].key, 0.1) * noise
            return jax.device_put(value.astype(np.float32), sharding)

        params = jax.tree_util.tree_map_with_path(draw, specs, shardings)
        return ComparedCase(model, params, mesh)


def draw_prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Draws prompts of unlike lengths; the second half begin as the first half do."""
    rng = np.random.default_rng(seed)
    prompts: list[tuple[int, ...]] = []
    for number in range(count):
        length = 3 + (7 * number) % 19
        tokens = rng.integers(1, VOCAB, length).tolist()
        if number >= count // 2:
            tokens = [*prompts[number - count // 2], *tokens[:2]]
        prompts.append(tuple(tokens))
    return prompts


def run_engine(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingConfig,
    *,
    num_sequences: int = 1,
    scales_logprobs: bool = False,
) -> list[DrawnSequence]:
    """Draws continuations; returns them prompt by prompt. ``scales_logprobs``: see
    :class:`GenerationRequest`."""
    rows = {
        (number, index): DrawnSequence(prompt, [], [])
        for number, prompt in enumerate(prompts)
        for index in range(num_sequences)
    }
    requests = [
        GenerationRequest(
            str(number),
            prompt,
            sampling,
            num_sequences,
            top_logprobs=0,
            scales_logprobs=scales_logprobs,
        )
        for number, prompt in enumerate(prompts)
    ]
    for output in engine.run(requests):
        row = rows[int(output.request_id), output.sequence_index]
        row.tokens.extend(output.token_ids)
        row.logprobs.extend(entry.logprob for entry in output.logprobs)
    return list(rows.values())


def compute_log_probs(
    model: Decoder,
    params: Params,
    batch: Mapping[str, jax.Array],
    temperature: float = 1.0,
) -> jax.Array:
    """Computes log-probabilities of targets [B, S] as a training step does; at another
    temperature than 1 as one of a policy does."""
    bound = bind(model, params)
    hidden, _ = bound(batch["tokens"], batch["positions"], batch["segment_ids"])
    head = bound.prepare_logits(hidden)
    if temperature == 1:
        return compute_fused_log_probs(head, batch["targets"], chunk_tokens=64)
    log_probs, _ = compute_log_probs_and_entropies(
        head, batch["targets"], temperature=temperature, chunk_tokens=64
    )
    return log_probs


_forward = jax.jit(compute_log_probs, static_argnums=(0, 3))


@partial(jax.jit, static_argnums=0)
def _compute_logits(model: Decoder, params: Params, tokens: jax.Array) -> jax.Array:
    bound = bind(model, params)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = bound(tokens, positions)
    return bound.logits(hidden)


def compute_logits(
    case: ComparedCase, sequence: DrawnSequence, row_length: int = 48
) -> np.ndarray:
    """Computes, on one device, the logits that each of a sequence's tokens was drawn
    by: float64 [tokens, V]."""
    text = [*sequence.prompt, *sequence.tokens]
    tokens = np.zeros((1, row_length), np.int32)
    tokens[0, : len(text)] = text
    with jax.set_mesh(case.mesh):
        logits = _compute_logits(case.model, case.params, tokens)
    rows = np.asarray(logits[0], np.float64)
    return rows[len(sequence.prompt) - 1 : len(text) - 1]


def compute_kept_mass(
    case: ComparedCase,
    sequence: DrawnSequence,
    sampling: SamplingConfig,
    row_length: int = 48,
) -> np.ndarray:
    """Computes, on one device, the probability of the tokens that may be drawn in place
    of each of a sequence's: those that top-k, then top-p and then min-p keep."""
    masses = []
    for row in compute_logits(case, sequence, row_length):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        likeliest = np.sort(probabilities)[::-1][: sampling.top_k]
        before = np.cumsum(likeliest) - likeliest
        likeliest = likeliest[before < sampling.top_p * likeliest.sum()]
        likeliest = likeliest[likeliest >= sampling.min_p * likeliest[0]]
        masses.append(likeliest.sum())
    return np.array(masses)


def compute_trainer_logprobs(
    case: ComparedCase,
    sequences: Sequence[DrawnSequence],
    *,
    row_length: int = 96,
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Computes log-probabilities of drawn tokens by a training forward pass over rows in
    which sequences stand one behind the other; those of each sequence."""
    num_rows = case.mesh.size
    names = ("tokens", "positions", "segment_ids", "targets")
    places: list[tuple[int, int, int]] = []
    row, end = 0, 0
    for sequence in sequences:
        length = len(sequence.prompt) + len(sequence.tokens) - 1
        if end + length > row_length:
            row, end = row + 1, 0
        places.append((row, end, length))
        end += length
    total_rows = -(-(row + 1) // num_rows) * num_rows
    arrays = {name: np.zeros((total_rows, row_length), np.int32) for name in names}
    segments = dict.fromkeys(range(total_rows), 0)
    for sequence, (row, start, length) in zip(sequences, places, strict=True):
        text = [*sequence.prompt, *sequence.tokens]
        span = (row, slice(start, start + length))
        segments[row] += 1
        arrays["tokens"][span] = text[:-1]
        arrays["targets"][span] = text[1:]
        arrays["positions"][span] = np.arange(length)
        arrays["segment_ids"][span] = segments[row]
    by_row = NamedSharding(case.mesh, case.model.rules.spec("batch", None))
    logprobs = []
    with jax.set_mesh(case.mesh):
        for first in range(0, total_rows, num_rows):
            batch = {
                name: jax.device_put(array[first : first + num_rows], by_row)
                for name, array in arrays.items()
            }
            by_row_logprobs = _forward(case.model, case.params, batch, temperature)
            logprobs.append(np.asarray(by_row_logprobs))
    by_place = np.concatenate(logprobs)
    results = []
    for sequence, (row, start, length) in zip(sequences, places, strict=True):
        first = start + len(sequence.prompt) - 1
        results.append(by_place[row, first : start + length])
    return results


def compute_differences(
    case: ComparedCase,
    sequences: Sequence[DrawnSequence],
    *,
    temperature: float = 1.0,
) -> np.ndarray:
    """Returns trainer − engine of each drawn token's log-probability, in float64."""
    trainer = np.concatenate(
        compute_trainer_logprobs(case, sequences, temperature=temperature)
    )
    engine = np.concatenate([sequence.logprobs for sequence in sequences])
    return trainer.astype(np.float64) - engine


def make_engine(
    case: ComparedCase, vocab_size: int | None = None, **settings: Any
) -> Engine:
    """Makes an engine on the trainer's parameters. ``vocab_size``: ids that may be
    drawn; None: all."""
    config = EngineConfig(**{**_DEFAULTS, **settings})
    return Engine(case.model, case.params, config, vocab_size=vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--batch-invariant", action="store_true")
    arguments = parser.parse_args()
    is_invariant: bool = arguments.batch_invariant
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    prompts = draw_prompts(12)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=20)
    for kind in arguments.kinds:
        case = build_case(kind, mesh, batch_invariant=is_invariant)
        for name, settings in SETTINGS.items():
            engine = make_engine(case, batch_invariant=is_invariant, **settings)
            sequences = run_engine(engine, prompts, sampling)
            differences = compute_differences(case, sequences)
            largest = np.abs(differences).max()
            share = (differences == 0).mean()
            print(f"{kind:8} {name:24} {largest:.1e}  equal {share:.0%}", flush=True)
        changed = case.with_other_params()
        engine = make_engine(case, batch_invariant=is_invariant)
        run_engine(engine, prompts, sampling)
        engine.set_params(changed.params)
        differences = compute_differences(
            changed, run_engine(engine, prompts, sampling)
        )
        print(f"{kind:8} {'after other parameters':24} {np.abs(differences).max():.1e}")
        cut = SamplingConfig(top_p=0.8, top_k=50, min_p=0.1, max_new_tokens=20)
        sequences = run_engine(engine, prompts, cut, num_sequences=8)
        ratio = np.exp(compute_differences(changed, sequences)).mean()
        masses = [compute_kept_mass(changed, s, cut) for s in sequences]
        biased = np.concatenate(masses).mean()
        print(f"{kind:8} mean ratio {ratio:.6f}; of kept tokens alone {biased:.3f}")


if __name__ == "__main__":
    main()
