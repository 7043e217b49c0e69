"""Whose error it is where two fp32 models' log-likelihoods differ: both beside a
float64 model.

    python benchmarks/eval_precision.py FOLDER FILE [--rows 40]

FOLDER is a Hugging Face checkpoint; FILE has llm-foundry's rows of WinoGrande
(``context_options``, ``continuation``) or of questions (``query``, ``choices``). Each
continuation is scored by torch in float64, by torch in fp32 (softmax in float64, and in
fp32 as HFLM's default is), and by ours.
"""

import argparse
import json

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from maxlm.evaluation.program import make_evaluation_engine
from maxlm.inference.scoring import Scorer
from maxlm.run.load import load_model


def list_texts(row):
    if "context_options" in row:
        return [
            (head, f" {row['continuation'].strip()}") for head in row["context_options"]
        ]
    return [(row["query"], f" {choice}") for choice in row["choices"]]


def score(model, pair, dtype):
    context, tail = pair
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tail][:-1]])).logits[0, -len(tail) :]
    logprobs = torch.log_softmax(logits.to(dtype), -1)
    return logprobs[torch.arange(len(tail)), torch.tensor(tail)].sum().item()


def print_errors_of_products():
    """Root mean squares of products' errors over those of the products."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=size).astype(np.float32) for size in ((512, 576), (576, 1536))
    )
    exact = a.astype(np.float64) @ b
    for name, found in (
        ("XLA", jnp.asarray(a) @ b),
        ("torch", torch.tensor(a) @ torch.tensor(b)),
    ):
        error = np.sqrt(np.mean((np.asarray(found) - exact) ** 2) / np.mean(exact**2))
        print(f"products of 512 × 576 × 1536 in fp32, {name}: off by {error:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=40)
    given = parser.parse_args()
    with open(given.file) as file:
        rows = [json.loads(line) for line in file][: given.rows]
    loaded = load_model(given.folder)
    encode = loaded.tokenizer.encode
    pairs = [
        (encode(head), encode(tail)) for row in rows for head, tail in list_texts(row)
    ]
    ours = [
        each.logprob for each in Scorer(make_evaluation_engine(loaded)).score(pairs)
    ]
    load = transformers.AutoModelForCausalLM.from_pretrained
    single = load(given.folder, dtype=torch.float32).eval()
    theirs = {
        "torch fp32, softmax float64": [
            score(single, pair, torch.float64) for pair in pairs
        ],
        "torch fp32, softmax fp32": [
            score(single, pair, torch.float32) for pair in pairs
        ],
        "maxlm": ours,
    }
    print_errors_of_products()
    double = load(given.folder, dtype=torch.float64).eval()
    exact = np.array([score(double, pair, torch.float64) for pair in pairs])
    print(
        f"{len(pairs)} continuations, {np.mean([len(tail) for _, tail in pairs]):.1f} "
        f"tokens each"
    )
    for name, found in theirs.items():
        error = np.abs(np.array(found) - exact)
        print(
            f"{name:28} max {error.max():.1e}, mean {error.mean():.1e} nats from "
            f"float64"
        )


if __name__ == "__main__":
    main()
