"""Check that PPO learns a reward while it stays near its reference, and that without
the divergence it takes the reward's fault.

    python -m benchmarks.rl_planted_reward [--folder DIR] [SETTING ...]

A small model learns a made language (benchmarks/planted_reward.py). PPO then trains it
twice from there on a reward that pays most for one word, and a little for repeating it:
with an adaptive divergence and without. Prints for the three models, of sampled answers
to the same prompts: the reward, the divergence from the base in nats an answer, the
entropy in nats a token, the share of distinct answers, the share of words that the
grammar allows, and how often an answer says the word. Settings are of the recipe
rl/planted_reward_ppo, for both.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.planted_reward import (
    WANTED,
    WORDS,
    measure_grammar,
    score_words,
    write_texts,
)
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scoring import Scorer
from maxlm.rl.program import train_policy
from maxlm.run.load import load_model
from maxlm.run.load_config import load_run_config
from maxlm.tune.program import tune_model

NUM_TEXTS = 4000
NUM_ANSWERS = 384
MAX_NEW_TOKENS = 10
VARIANTS: dict[str, tuple[str, ...]] = {
    "with KL": (),
    "without KL": ("task.kl_coef=0", "task.kl_target=null"),
}


class DrawnAnswers(NamedTuple):
    """What a model says to prompts."""

    prompts: list[str]
    texts: list[str]
    token_ids: list[tuple[int, ...]]
    log_probs: np.ndarray
    """Of each whole answer, float64 [answers]."""


class AnsweringModel:
    """A run's model: it answers, and says how likely answers are."""

    def __init__(self, folder: Path):
        loaded = load_model(folder)
        self.tokenizer = loaded.tokenizer
        config = EngineConfig(max_sequences=128, max_length=32)
        self.engine = Engine(loaded.model, loaded.params, config, loaded.tokenizer)

    def encode(self, prompt: str) -> tuple[int, ...]:
        return (*self.tokenizer.prefix_ids, *self.tokenizer.encode(prompt))

    def answer(self, prompts: Sequence[str]) -> DrawnAnswers:
        """Draws an answer to each prompt at temperature 1."""
        requests = [
            GenerationRequest(
                str(number),
                self.encode(prompt),
                SamplingConfig(
                    temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, seed=number
                ),
            )
            for number, prompt in enumerate(prompts)
        ]
        texts = [""] * len(prompts)
        token_ids: list[tuple[int, ...]] = [()] * len(prompts)
        for output in self.engine.run(requests):
            number = int(output.request_id)
            texts[number] += output.text
            token_ids[number] += tuple(output.token_ids)
        log_probs = self.score(prompts, token_ids)
        return DrawnAnswers(list(prompts), texts, token_ids, log_probs)

    def score(
        self, prompts: Sequence[str], token_ids: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        """Returns the log-probability of each answer, float64 [answers]."""
        pairs = [
            (self.encode(prompt), ids)
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]
        return np.array([score.logprob for score in Scorer(self.engine).score(pairs)])


def write_data(folder: Path) -> None:
    """Writes the language's texts, and prompts for the policy."""
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder / "texts.jsonl", NUM_TEXTS, seed=1)
    lines = [json.dumps({"prompt": word}) + "\n" for word in WORDS]
    (folder / "prompts.jsonl").write_text("".join(lines))


def train_base(folder: Path) -> Path:
    """Trains the model that knows the language."""
    texts = folder / "texts.jsonl"
    source = f"{{name: text, documents: [{texts}], text_field: text}}"
    settings = [
        f"folder={folder}",
        f"task.files=[{texts}]",
        f"data.sources=[{source}]",
    ]
    config = load_run_config("rl/planted_reward_base", settings)
    return tune_model(config, say=lambda _: None).folder


def train_by_ppo(
    folder: Path, base: Path, variant: str, settings: Sequence[str]
) -> Path:
    """Trains a policy from the base."""
    reward = Path(__file__).with_name("planted_reward.py")
    overrides = [
        f"folder={folder}",
        f"name={variant.replace(' ', '-').lower()}",
        f"train.start_from={base}",
        f"task.environment.files=[{folder / 'prompts.jsonl'}]",
        f"task.rewards=[{{kind: python, function: '{reward}:score'}}]",
        *settings,
        *VARIANTS[variant],
    ]
    config = load_run_config("rl/planted_reward_ppo", overrides)
    return train_policy(config, say=lambda _: None).folder


def describe(name: str, model: AnsweringModel, base: AnsweringModel) -> None:
    """Prints a row of the table, and an answer."""
    generator = random.Random(7)
    prompts = [generator.choice(WORDS) for _ in range(NUM_ANSWERS)]
    answers = model.answer(prompts)
    rewards = np.array([score_words(text) for text in answers.texts])
    differences = answers.log_probs - base.score(prompts, answers.token_ids)
    num_tokens = sum(len(ids) for ids in answers.token_ids)
    grammar = [
        measure_grammar(prompt, text)
        for prompt, text in zip(prompts, answers.texts, strict=True)
    ]
    counts = [text.split().count(WANTED) for text in answers.texts]
    distinct = len({*zip(prompts, answers.texts, strict=True)}) / NUM_ANSWERS
    kl_error = 1.96 * differences.std() / NUM_ANSWERS**0.5
    entropy = -answers.log_probs.sum() / num_tokens
    print(
        f"{name} | {rewards.mean():.3f} | {differences.mean():.2f} ± {kl_error:.2f} | "
        f"{entropy:.3f} | {distinct:.1%} | {np.mean(grammar):.1%} | "
        f"{np.mean(counts):.2f} | {prompts[0]}{answers.texts[0]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("runs/planted-reward"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder)
    began = time.perf_counter()
    base_folder = train_base(folder)
    base = AnsweringModel(base_folder)
    print(
        "model | reward | KL, nats an answer | entropy, nats a token | distinct answers"
        " | words that the grammar allows | gold an answer | such as"
    )
    describe("base", base, base)
    for variant in VARIANTS:
        run = train_by_ppo(folder, base_folder, variant, options.settings)
        describe(variant, AnsweringModel(run), base)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
