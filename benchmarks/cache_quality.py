"""Perplexity with lossy caches, divided by that with exact keys and values.

    python benchmarks/cache_quality.py RUN [--tokens 768] [--chunk 16] [--only KIND ...]
    [TEXT ...]

The texts are prompts whose log-probabilities the engine computes (teacher forcing),
``--chunk`` tokens at a time: a chunk's own tokens see each other exactly, and earlier
ones through the cache. Evicting caches have room for half of a text; ``recent`` keeps
only its last tokens. Bytes are those of a token in one layer, including scales, divided
by those of bf16.

RUN: a run or a Hugging Face folder, for instance SmolLM2-135M. On that model int8
should be at most 1.005, int4 at most 1.05, and h2o at most 1.10 and below ``recent``.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.caches.layout import CacheLayout, has_unit
from maxlm.run.load import LoadedRun, load_model

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "docs/architecture.md", ROOT / "LICENSE"]


def list_caches(budget: int) -> dict[str, dict[str, Any]]:
    """Lists the settings of each cache by its name in the table."""
    return {
        "paged": {"kind": "paged"},
        "int8": {"kind": "int8"},
        "int4": {"kind": "int4"},
        "h2o": {"kind": "h2o", "budget": budget, "recent": budget // 2},
        "snapkv": {"kind": "snapkv", "budget": budget},
        "sinks": {"kind": "sinks", "budget": budget},
        "recent": {"kind": "sinks", "budget": budget, "num_sinks": 0},
    }


def compute_loss(
    run: LoadedRun, config: EngineConfig, prompts: list[list[int]]
) -> np.ndarray:
    """Computes each prompt's mean negative log-likelihood, natural."""
    engine = Engine(run.model, run.params, config)
    losses = np.zeros(len(prompts))
    one = SamplingConfig(temperature=0, max_new_tokens=1)
    for output in engine.run(
        [
            GenerationRequest(str(index), tuple(prompt), one, prompt_logprobs=0)
            for index, prompt in enumerate(prompts)
        ]
    ):
        logprobs = [token.logprob for token in output.prompt_logprobs or ()]
        losses[int(output.request_id)] = -np.mean(logprobs)
    return losses


def count_bytes(run: LoadedRun, config: EngineConfig) -> float:
    """Counts a layer's bytes per token of bf16 keys and values, or of what stands for
    them."""
    (stack, *_) = run.model.cache_specs(
        CacheLayout(1, 1, 1, config.page_size, cache=config.cache)
    ).values()
    unit = "page"
    tokens = config.page_size
    if not has_unit(stack, unit):
        unit = "row"
        tokens = getattr(config.cache, "budget", 0)
    arrays = [array for array in jax.tree.leaves(stack[0]) if array.unit == unit]
    sizes = [
        np.prod(array.shape) * jnp.dtype(array.dtype or "bfloat16").itemsize
        for array in arrays
    ]
    return sum(sizes) / tokens


def main() -> None:
    """Prints a row for each cache."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("texts", nargs="*", type=Path, default=TEXTS)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    run = load_model(args.run)
    prompts = [
        run.tokenizer.encode(path.read_text())[: args.tokens] for path in args.texts
    ]
    base, base_bytes = None, None
    print(
        f"{'cache':8}{'bytes':>8}",
        *(f"{path.name:>20}" for path in args.texts),
        flush=True,
    )
    for name, cache in list_caches(args.tokens // 2).items():
        if args.only and name not in ("paged", *args.only):
            continue
        settings = {
            "cache": cache,
            "max_sequences": len(prompts),
            "max_length": args.tokens + 32,
            "prefill_tokens": args.chunk,
            "max_chunks": 1,
            "prefix_cache": False,
        }
        config = EngineConfig.model_validate(settings)
        losses = compute_loss(run, config, prompts)
        size = count_bytes(run, config)
        if base is None or base_bytes is None:
            base, base_bytes = losses, size
        figures = zip(np.exp(losses), np.exp(losses - base), strict=True)
        columns = (
            f"{f'{perplexity:.3f} ({ratio:.4f}x)':>20}" for perplexity, ratio in figures
        )
        print(f"{name:8}{size / base_bytes:7.3f}x", *columns, flush=True)


if __name__ == "__main__":
    main()
