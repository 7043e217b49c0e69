"""Greedy tokens and log-probabilities of the engine and the server beside
transformers'.

    python benchmarks/engine_parity.py FOLDER [--prompts 50] [--new 64]

FOLDER is a Hugging Face checkpoint (``make serve-demo`` makes one of SmolLM2). Prompts
are parts of this project's documentation, of 1 to 120 tokens. transformers computes in
fp32 for tokens, and in float64 for log-probabilities: those of the prompts' tokens,
fp32 here and there, are compared with it, relative to the largest logit of their token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from serve_load import serve

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.generate import collect_tokens, generate
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.speculation import DraftModel
from maxlm.run.load import load_model

SIZES: dict[str, Any] = {"max_sequences": 8, "prefill_tokens": 64, "max_length": 256}
WAYS: dict[str, dict[str, Any]] = {
    "pages of 16": {"page_size": 16},
    "one page a sequence": {"page_size": 256},
    "prompt look-up": {"page_size": 32, "speculation": {"kind": "prompt_lookup"}},
}
Prompts = Sequence[Sequence[int]]


def choose_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    docs = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    ids = tokenizer.encode("\n".join(path.read_text() for path in docs[:4]))
    random = np.random.default_rng(0)
    places = zip(
        random.integers(0, 3_000, count), random.integers(1, 120, count), strict=True
    )
    return [ids[start : start + size] for start, size in places]


def continue_greedily(
    model: Any, prompts: Prompts, outputs: Prompts
) -> list[list[int]]:
    """What transformers says after each prefix of these."""
    expected = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output]])).logits[0]
        expected.append(logits.argmax(-1)[len(prompt) - 1 : -1].tolist())
    return expected


def compute_logprobs(
    model: Any, prompt: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a prompt's tokens from the second on, and each one's largest
    |logit|."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, :-1].double()
    logprobs = torch.log_softmax(logits, -1)[torch.arange(len(prompt) - 1), prompt[1:]]
    return logprobs.numpy(), logits.abs().amax(-1).numpy()


def run_with_draft(loaded: Any, prompts: Prompts, sampling: SamplingConfig) -> Prompts:
    """Tokens guessed by the model with noise on its parameters, which is right now and
    then."""

    def disturb(x: jax.Array) -> jax.Array:
        noise = np.random.default_rng(x.size).standard_normal(x.shape, np.float32)
        return x + 0.05 * jnp.std(x) * noise

    config = EngineConfig(**SIZES, speculation={"kind": "draft_model", "folder": ""})
    with jax.set_mesh(loaded.mesh):
        draft = DraftModel(loaded.model, jax.tree.map(disturb, loaded.params))
    engine = Engine(loaded.model, loaded.params, config, loaded.tokenizer, draft=draft)
    outputs = [[] for _ in prompts]
    requests = [
        GenerationRequest(str(i), tuple(prompt), sampling)
        for i, prompt in enumerate(prompts)
    ]
    for output in engine.run(requests):
        outputs[int(output.request_id)] += output.token_ids
    stats = engine.stats()
    share = stats.accepted_tokens_total / stats.drafted_tokens_total
    print(
        f"a draft model: {share:.0%} of {stats.drafted_tokens_total} guesses were taken"
    )
    return outputs


def run_engine(
    loaded: Any, prompts: Prompts, sampling: SamplingConfig
) -> list[tuple[list[float], str]]:
    """Log-probabilities of each prompt's tokens, and the text behind it."""
    engine = Engine(
        loaded.model, loaded.params, EngineConfig(**SIZES), loaded.tokenizer
    )
    requests = [
        GenerationRequest(str(i), tuple(prompt), sampling, prompt_logprobs=0)
        for i, prompt in enumerate(prompts)
    ]
    logprobs, texts = {}, {}
    for output in engine.run(requests):
        place = int(output.request_id)
        logprobs.setdefault(place, [t.logprob for t in output.prompt_logprobs or []])
        texts[place] = texts.get(place, "") + output.text
    return [(logprobs[i], texts[i]) for i in range(len(prompts))]


def post(url: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(url, json=body, timeout=None)
    answer.raise_for_status()
    return answer.json()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    loaded = load_model(args.folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    peer = load(args.folder, dtype=torch.float32).eval()
    prompts = choose_prompts(loaded.tokenizer, args.prompts)
    greedy = SamplingConfig(temperature=0, max_new_tokens=args.new)

    def compare(name: str, outputs: Prompts) -> None:
        expected = continue_greedily(peer, prompts, outputs)
        equal = sum(list(a) == b for a, b in zip(outputs, expected, strict=True))
        print(f"{name}: {equal} of {len(prompts)} equal transformers'", flush=True)

    for name, settings in WAYS.items():
        config = EngineConfig(**SIZES | settings)
        outputs = generate(loaded.model, loaded.params, prompts, greedy, config=config)
        compare(name, collect_tokens(outputs))
    compare("a draft model", run_with_draft(loaded, prompts, greedy))
    expected = [text for _, text in run_engine(loaded, prompts, greedy)]
    with serve(args.folder, SIZES) as url:
        body = {"model": "model", "temperature": 0, "max_tokens": args.new}
        answers = [
            post(f"{url}/completions", body | {"prompt": prompt}) for prompt in prompts
        ]
    texts = [answer["choices"][0]["text"] for answer in answers]
    equal = sum(a == b for a, b in zip(texts, expected, strict=True))
    print(f"server: {equal} of {len(prompts)} texts equal the engine's", flush=True)

    peer = peer.double()
    one = SamplingConfig(temperature=0, max_new_tokens=1)
    errors = []
    for prompt, (logprobs, _) in zip(
        prompts, run_engine(loaded, prompts, one), strict=True
    ):
        exact, largest = compute_logprobs(peer, prompt)
        errors += (np.abs(np.array(logprobs) - exact) / largest).tolist()
    print(
        f"log-probabilities of {len(errors)} tokens: off by {max(errors):.1e} of the "
        f"largest logit"
    )


if __name__ == "__main__":
    main()
