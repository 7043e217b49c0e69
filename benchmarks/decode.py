"""Speed of prefill and decoding on this CPU beside transformers, fp32, the same
SmolLM2-135M.

    python benchmarks/decode.py FOLDER [--rounds 5] [--new 64] [--prompt 32] [--rows
    FILE]
        [--compile]

FOLDER is a Hugging Face checkpoint (``make serve-demo`` makes one of SmolLM2). Each
round times every contender once, one after the other; printed are medians over the
rounds, their spread, and ratios of tokens/s. The share of the memory's bandwidth is
(bytes of weights and cache that a step reads) ÷ (its time) ÷ (the rate at which a plain
sum over as many bytes reads them in that round). --rows writes the medians for ``python
benchmarks/plan_serving.py --cpu FILE``. --compile has transformers' steps compiled too,
by torch.compile, which takes minutes and a C++ compiler.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.model_runner import count_compilations
from maxlm.inference.requests import GenerationRequest
from maxlm.models.params import flatten_names
from maxlm.run.load import load_model

PREFILL = 512
BATCHES = (1, 8)


def make_engine(folder: str) -> Engine:
    loaded = load_model(folder)
    config = EngineConfig(
        max_sequences=8,
        max_length=1024,
        prefill_tokens=512,
        page_size=32,
        prefix_cache=False,
    )
    return Engine(loaded.model, loaded.params, config, loaded.tokenizer)


def time_decode(engine: Engine, batch: int, prompt: int, new: int) -> float:
    """Seconds a step of so many sequences, behind their first tokens."""
    random = np.random.default_rng(batch)
    sampling = SamplingConfig(temperature=0, max_new_tokens=1 + new)
    prompts = [tuple(random.integers(0, 40_000, prompt).tolist()) for _ in range(batch)]
    requests = [
        GenerationRequest(f"{time.time()}-{row}", tokens, sampling, ignore_eos=True)
        for row, tokens in enumerate(prompts)
    ]
    begun = set()
    start = 0.0
    for output in engine.run(requests):
        if output.request_id not in begun:
            begun.add(output.request_id)
            start = time.perf_counter()
    return (time.perf_counter() - start) / new


def time_prefill(engine: Engine) -> float:
    """Seconds to the first token of a prompt of 512."""
    tokens = tuple(np.random.default_rng(0).integers(0, 40_000, PREFILL).tolist())
    sampling = SamplingConfig(temperature=0, max_new_tokens=1)
    start = time.perf_counter()
    list(engine.run([GenerationRequest(f"{time.time()}", tokens, sampling)]))
    return time.perf_counter() - start


def make_peer(folder: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def time_peer_decode(model: Any, batch: int, prompt: int, new: int, kind: str) -> float:
    """Seconds a step of transformers' ``generate``, behind the first four.

    Args:
        kind: its cache; "compiled": a static one, and torch.compile for the steps.
    """
    import torch
    from transformers import CompileConfig, StoppingCriteria

    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ids = torch.randint(0, 40_000, (batch, prompt))
    cache_options = {}
    if kind != "dynamic":
        cache_options["cache_implementation"] = "static"
    if kind == "compiled":
        cache_options["compile_config"] = CompileConfig(fullgraph=True, mode="default")
        cache_options["compile_config"]._compile_all_devices = True
    count = 4 + new
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        disable_compile=kind != "compiled",
        stopping_criteria=[Clock()],
        **cache_options,
    )
    return (times[-1] - times[-1 - new]) / new


def time_peer_prefill(model: Any) -> float:
    import torch

    ids = torch.randint(0, 40_000, (1, PREFILL))
    start = time.perf_counter()
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    return time.perf_counter() - start


def time_stream(array: jax.Array) -> float:
    """Seconds to read an array once: the median of five times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(_sum(array))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


_sum = jax.jit(jnp.sum)


def show(
    name: str, times: list[float], tokens: int, peer: list[float] | None = None
) -> None:
    middle = statistics.median(times)
    spread = f"{1e3 * min(times):7.1f}–{1e3 * max(times):.1f} ms"
    line = f"{name:34}{tokens / middle:9.1f} tokens/s  {spread}"
    if peer:
        ratios = sorted(b / a for a, b in zip(times, peer, strict=True))
        line += (
            f"   {statistics.median(ratios):.2f}× ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        )
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    kinds = ["dynamic", "static", *(["compiled"] if args.compile else [])]
    engine = make_engine(args.folder)
    peer = make_peer(args.folder)
    engine.warm_up()
    compiled = count_compilations()
    weights = sum(x.nbytes for x in flatten_names(engine.params).values())
    stream = jnp.ones(weights // 4, jnp.float32)
    runs: dict[str, Callable[[], float]] = {"stream": lambda: time_stream(stream)}
    runs["prefill"] = lambda: time_prefill(engine)
    runs["peer prefill"] = lambda: time_peer_prefill(peer)
    for batch in BATCHES:
        where = batch, args.prompt, args.new
        runs[f"decode {batch}"] = lambda where=where: time_decode(engine, *where)
        for kind in kinds:
            runs[f"peer {kind} {batch}"] = lambda where=where, kind=kind: (
                time_peer_decode(peer, *where, kind)
            )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:  # the first round warms up
                times[name].append(seconds)
    show("prefill 512", times["prefill"], PREFILL, times["peer prefill"])
    show("  transformers", times["peer prefill"], PREFILL)
    token_bytes = sum(
        x.nbytes // (x.shape[1] * x.shape[3])
        for x in jax.tree.leaves(engine._runner.state.caches)
    )
    for batch in BATCHES:
        batch_times = times[f"decode {batch}"]
        peers = {kind: times[f"peer {kind} {batch}"] for kind in kinds}
        best = min(peers.values(), key=statistics.median)
        show(f"decode, batch {batch}", batch_times, batch, best)
        for kind, peer_times in peers.items():
            show(f"  transformers, {kind}", peer_times, batch)
        read = weights + token_bytes * batch * (args.prompt + args.new // 2)
        shares = sorted(
            read / weights * s / d
            for s, d in zip(times["stream"], batch_times, strict=True)
        )
        middle = statistics.median(shares)
        print(f"  share of bandwidth {middle:.2f} ({shares[0]:.2f}–{shares[-1]:.2f})")
    rate = weights / statistics.median(times["stream"]) / 1e9
    if args.rows:
        ms = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
        common = {
            "source": "here",
            "model": "smollm2_135m",
            "machine": "cpux1",
            "tensor": 1,
        }
        loads = [(PREFILL, 1, 1, "prompt", ms["prefill"])]
        loads += [
            (args.prompt, args.new, b, "tpot", ms[f"decode {b}"]) for b in BATCHES
        ]
        names = "prompt", "new", "batch", "measure", "published"
        rows = [common | dict(zip(names, load, strict=True)) for load in loads]
        args.rows.write_text(json.dumps(rows))
    print(
        f"stream {rate:.1f} GB/s; compilations after warm-up: "
        f"{count_compilations() - compiled}"
    )


if __name__ == "__main__":
    main()
