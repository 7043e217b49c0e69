"""Perplexity by position of a small model at four times the length that it was trained
at.

    python benchmarks/extend_context.py [FOLDER] [--steps 1500] [--tune-steps 150]
    [--seed 0]

Trains a model like the demo's, on its text, in rows of 128 tokens; measures it at 512
as it is and with ``tune.extend_to=512`` by yarn, ntk and linear; goes on training with
each of them, and without scaling, on as many tokens a step; and measures again. Runs
that are in FOLDER/seedN already (FOLDER: runs/extend_context) are taken as they are.

Text is that of held-out documents; a perplexity is that of 32 positions of each window.
The bar: with YaRN that at 4 times the length is at most 1.1 times that at the length
itself, where it is 3 times or more without scaling.
"""

import argparse
from collections.abc import Mapping
from math import exp
from pathlib import Path

import numpy as np

from maxlm.config.load import load_config
from maxlm.data.store.store import TokenStore
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.scoring import Scorer
from maxlm.run.config import RunConfig
from maxlm.run.load import load_run
from maxlm.run.setup import set_up_run
from maxlm.train.program import train_model

LENGTH, LONG, TOKENS = 128, 512, 2048
POSITIONS = 64, 128, 192, 256, 384, 511
KINDS = ("none", "yarn", "ntk", "linear")


def make_config(
    folder: Path, kind: str | None, steps: int, rate: float, seed: int
) -> RunConfig:
    """Makes the run of the base model (None), or one that goes on from it."""
    base = folder / "base"
    length = LENGTH if kind is None else LONG
    settings = [
        f"folder={folder}",
        f"data.seq_len={length}",
        f"data.batch_size={TOKENS // length}",
    ]
    settings += [
        f"train.steps={steps}",
        f"schedule.learning_rate={rate}",
        "data.workers=0",
    ]
    settings += [
        f"model.max_seq_len={LENGTH}",
        f"train.eval_every={steps}",
        "samples.prompts=[]",
    ]
    settings += [f"checkpoint.every_steps={steps}", f"seed={seed}"]
    if kind is None:
        return load_config(RunConfig, "demo", [*settings, "name=base"]).value
    stores = "{name: text, store: %s, heldout_store: %s}"
    stores %= base / "data/text/train", base / "data/text/heldout"
    settings += [f"name={kind}", f"train.start_from={base}", f"data.sources=[{stores}]"]
    settings += [
        f"tokenizer={{path: {base / 'tokenizer'}}}",
        "schedule.warmup_steps=10",
    ]
    settings += (
        [f"model.max_seq_len={LONG}"]
        if kind == "none"
        else [f"tune.extend_to={LONG}", f"tune.extend_by={kind}"]
    )
    return load_config(RunConfig, "demo", settings).value


def train_once(config: RunConfig) -> Path:
    """Trains a run that is not there yet; returns its folder."""
    run = Path(config.folder, config.name)
    if not (run / "checkpoints" / str(config.train.steps)).exists():
        train_model(
            config, say=lambda line: print(f"  {config.name}: {line}", flush=True)
        )
    return run


def read_windows(store_folder: Path, most: int) -> list[list[int]]:
    """Reads windows of LONG tokens from a store; they overlap, so that most of the text
    stands in each range of positions. Of each document its beginning alone, so that
    windows are of many."""
    store = TokenStore.open(store_folder)
    texts = (store.text_tokens(index).tolist() for index in range(store.num_documents))
    windows = [
        text[start : start + LONG]
        for text in texts
        for start in range(0, min(len(text), 4 * LONG) - LONG + 1, LENGTH)
    ]
    return windows[:: max(1, len(windows) // most)][:most]


def measure(run: Path, config: RunConfig, windows: list[list[int]]) -> dict[int, float]:
    """Computes perplexities of a run's parameters in the model of a config: of the 32
    tokens up to each of POSITIONS."""
    loaded = load_run(run)
    model = set_up_run(config, list(loaded.mesh.devices.flat), for_training=False).model
    engine = Engine(
        model, loaded.params, EngineConfig(max_sequences=16, max_length=LONG)
    )
    scores = Scorer(engine).score([(window[:1], window[1:]) for window in windows])
    losses = -np.array([score.token_logprobs for score in scores]).mean(axis=0)
    return {end: exp(losses[end - 32 : end].mean()) for end in POSITIONS}


def show(name: str, perplexities: Mapping[int, float]) -> None:
    """Prints a row: perplexities, and the last over that at LENGTH."""
    ratio = perplexities[POSITIONS[-1]] / perplexities[LENGTH]
    values = (f"{value:9.2f}" for value in perplexities.values())
    print(f"{name:16}", *values, f"{ratio:8.3f}", flush=True)


def main() -> None:
    """Prints the table, and whether the bar holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs/extend_context")
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tune-steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=2e-3, help="Of training on.")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder / f"seed{args.seed}"
    seed = args.seed
    base = train_once(make_config(folder, None, args.steps, 8e-3, seed))
    configs = {
        k: make_config(folder, k, args.tune_steps, args.rate, seed) for k in KINDS
    }
    windows = read_windows(base / "data/text/heldout", args.windows)
    print(f"{len(windows)} windows; perplexity of positions up to", flush=True)
    print(" " * 16 + "".join(f"{end:>10}" for end in (*POSITIONS, "ratio")), flush=True)
    for kind, config in configs.items():
        show(f"{kind}, before", measure(base, config, windows))
    for kind, config in configs.items():
        show(f"{kind}, after", measure(train_once(config), config, windows))


if __name__ == "__main__":
    main()
