"""Training speed of the same small Llama on this CPU, in maxlm and in other programs.

    python benchmarks/cpu_step.py [--rounds 5] [--steps 4] [--only maxlm,bare]

4 layers, d 256, 4 heads, FFN 1024 (SwiGLU), vocabulary 8192 (untied), sequence 512,
batch 8, AdamW, fp32. Each round times every contender once, one after the other, so
that all see the same machine; printed are medians of tokens/s over the rounds and
ratios to the bare JAX step. Transformers and torch are in the `parity` extra; without
them only the JAX rows appear.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

LAYERS, D, HEADS, FF, VOCAB, SEQ, BATCH = 4, 256, 4, 1024, 8192, 512, 8
HEAD = D // HEADS
THETA, EPS, RATE, DECAY = 10_000.0, 1e-5, 3e-4, 0.1

Step = Callable[[], float]
"""Takes one optimizer step and returns its loss."""


def tokens() -> np.ndarray:
    """[BATCH, SEQ + 1]"""
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ + 1), dtype=np.int32)


def maxlm_step() -> Step:
    from maxlm.config.load import load_config
    from maxlm.run.config import RunConfig
    from maxlm.run.global_batch import batch_sharding
    from maxlm.run.setup import set_up_run

    settings = [
        *(
            f"model.vocab_size={VOCAB}",
            f"model.num_layers={LAYERS}",
            f"model.d_model={D}",
        ),
        *(
            f"model.max_seq_len={SEQ}",
            f"model.mlp.d_ff={FF}",
            "model.tie_embeddings=false",
        ),
        *(
            f"model.attention.num_heads={HEADS}",
            f"model.attention.num_kv_heads={HEADS}",
        ),
        *(f"model.attention.head_dim={HEAD}", "model.remat=none"),
        *(f"data.seq_len={SEQ}", f"data.batch_size={BATCH}", "schedule.kind=constant"),
        *("schedule.warmup_steps=0", f"schedule.learning_rate={RATE}", "mesh.fsdp=1"),
    ]
    setup = set_up_run(
        load_config(RunConfig, "models/demo", settings).value, jax.devices()[:1]
    )
    data = tokens()
    batch = {
        "tokens": data[:, :-1],
        "targets": data[:, 1:],
        "positions": np.broadcast_to(np.arange(SEQ, dtype=np.int32), (BATCH, SEQ)),
        "segment_ids": np.ones((BATCH, SEQ), np.int32),
        "weights": np.ones((BATCH, SEQ), np.float32),
    }
    sharding = batch_sharding(setup.placed.compute, setup.mesh)
    batch = {
        name: jax.device_put(array[None], sharding) for name, array in batch.items()
    }
    state = setup.init_train_state()
    step = setup.jit_train_step()

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def bare_step(remat: bool) -> Step:
    """What one would write in an afternoon: one function, layers scanned, plain
    attention."""

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * scale

    angles = jnp.arange(SEQ)[:, None] * THETA ** (-jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def rope(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    causal = jnp.tril(jnp.ones((SEQ, SEQ), bool))

    def layer(x, p):
        y = norm(x, p["n1"])
        q, k, v = (jnp.einsum("bsd,dnh->bsnh", y, p[name]) for name in "qkv")
        q, k = rope(q), rope(k)
        scores = jnp.einsum("bsnh,btnh->bnst", q, k) / math.sqrt(HEAD)
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), -1)
        x = x + jnp.einsum("bnst,btnh,nhd->bsd", weights, v, p["o"])
        y = norm(x, p["n2"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    def loss(params, data):
        x = params["embed"][data[:, :-1]]
        body = jax.checkpoint(layer) if remat else layer
        x, _ = jax.lax.scan(body, x, params["layers"])
        logits = norm(x, params["norm"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, data[:, 1:]
        ).mean()

    def init(key):
        shapes = {
            **dict.fromkeys("qkv", (LAYERS, D, HEADS, HEAD)),
            "o": (LAYERS, HEADS, HEAD, D),
            "gate": (LAYERS, D, FF),
            "up": (LAYERS, D, FF),
            "down": (LAYERS, FF, D),
        }
        keys = iter(jax.random.split(key, 16))
        random = {n: 0.02 * jax.random.normal(next(keys), s) for n, s in shapes.items()}
        ones = {"n1": jnp.ones((LAYERS, D)), "n2": jnp.ones((LAYERS, D))}
        return {
            "embed": 0.02 * jax.random.normal(next(keys), (VOCAB, D)),
            "head": 0.02 * jax.random.normal(next(keys), (D, VOCAB)),
            "norm": jnp.ones(D),
            "layers": {**random, **ones},
        }

    optimizer = optax.adamw(RATE, b2=0.95, weight_decay=DECAY)

    @jax.jit
    def step(params, state, data):
        value, grads = jax.value_and_grad(loss)(params, data)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = init(jax.random.key(0))
    state = optimizer.init(params)
    data = jnp.asarray(tokens())

    def run() -> float:
        nonlocal params, state
        params, state, value = step(params, state, data)
        return float(value)

    return run


def torch_step(compiled: bool) -> Step:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=SEQ,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )
    data = torch.from_numpy(tokens()).long()
    forward = torch.compile(model) if compiled else model

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = forward(input_ids=data[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), data[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        return float(loss)

    return run


CONTENDERS: dict[str, Callable[[], Step]] = {
    "bare JAX": lambda: bare_step(remat=False),
    "bare JAX, full remat": lambda: bare_step(remat=True),
    "maxlm": maxlm_step,
    "transformers, eager": lambda: torch_step(compiled=False),
    "transformers, torch.compile": lambda: torch_step(compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=4, help="steps a contender takes in a round"
    )
    parser.add_argument(
        "--only", default="", help="comma-separated beginnings of names"
    )
    args = parser.parse_args()
    name_prefixes = tuple(filter(None, args.only.split(",")))
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name, build in CONTENDERS.items():
        if name_prefixes and not name.startswith(name_prefixes):
            continue
        began = time.perf_counter()
        try:
            steps[name] = build()
        except ImportError as error:
            print(f"{name}: left out ({error}); pip install 'maxlm[parity]'")
            continue
        loss = steps[name]()
        first[name] = time.perf_counter() - began
        print(
            f"{name}: first step after {first[name]:.1f} s, loss {loss:.4f}", flush=True
        )
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(args.steps):
                step()
            rates[name].append(args.steps * BATCH * SEQ / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians.get("bare JAX")
    print(f"{'':<28} {'tokens/s':>9} {'min':>7} {'max':>7}  {'÷ bare':>6}")
    for name, median in medians.items():
        ratio = f"{median / base:6.2f}" if base else ""
        low = min(rates[name])
        high = max(rates[name])
        print(f"{name:<28} {median:>9,.0f} {low:>7,.0f} {high:>7,.0f}  {ratio}")


if __name__ == "__main__":
    main()
