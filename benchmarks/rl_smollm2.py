"""Check that GRPO teaches SmolLM2-135M-Instruct a task of reasoning-gym.

    python -m benchmarks.rl_smollm2 BASE [--folder DIR] [--prompts 256] [SETTING ...]

BASE is a run or a Hugging Face checkpoint (benchmarks/smollm2.py makes one). Trains by
the recipe rl/smollm2_135m_reasoning_gym, with settings of one's own, and prints how
often the model is right on questions that training never drew, before and after, at
temperature 0 and 1, with 95% intervals.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest
from maxlm.rl.advantages import sum_scores
from maxlm.rl.program import train_policy
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.samples import Prompt, Sample
from maxlm.rl.tasks.policy import PolicyTask
from maxlm.run.config import RunConfig
from maxlm.run.load import load_model
from maxlm.run.load_config import load_run_config
from maxlm.run.setup import use_compilation_cache

RECIPE = "rl/smollm2_135m_reasoning_gym"
TEMPERATURES = (0.0, 1.0)
HELD_OUT_SEED = 1_000_000_007
"""Entry i of reasoning-gym follows from seed + i: near seeds have the same entries."""


def describe_mean(values: np.ndarray) -> str:
    """Returns a mean and its 95% interval, in percent."""
    error = 1.96 * values.std() / len(values) ** 0.5
    return f"{100 * values.mean():.1f} ± {100 * error:.1f}%"


def draw_held_out_prompts(
    config: RunConfig, task: PolicyTask, tokenizer: Tokenizer, count: int
) -> list[Prompt]:
    """Draws prompts of the recipe's environment that its run does not train on."""
    layout = task.make_layout(config.data.seq_len)
    max_prompt_length = layout.max_entries + 1 - task.max_new_tokens

    def open_order(seed: int) -> PromptOrder:
        return PromptOrder(
            task.environment,
            tokenizer,
            seed=seed,
            max_prompt_length=max_prompt_length,
            shuffle=config.data.shuffle,
        )

    num_rollouts = config.train.steps // task.updates_per_rollout
    num_samples = config.data.batch_size * task.minibatches * task.sequences_per_row
    num_drawn = num_rollouts * num_samples // task.num_samples
    trained = {prompt.tokens for prompt in open_order(config.seed).take(0, num_drawn)}
    prompts: dict[tuple[int, ...], Prompt] = {}
    for prompt in open_order(HELD_OUT_SEED).take(0, 4 * count):
        if prompt.tokens not in trained:
            prompts.setdefault(prompt.tokens, prompt)
    assert len(prompts) >= count, f"{len(prompts)} questions are new"
    return list(prompts.values())[:count]


def score_model(
    folder: Path, config: RunConfig, task: PolicyTask, count: int
) -> dict[float, np.ndarray]:
    """Returns the rewards of a model's answers to held-out prompts, float64 [prompts],
    by the temperature."""
    loaded = load_model(folder)
    tokenizer = loaded.tokenizer
    # As training's engine, so that it is compiled once.
    max_length = task.make_layout(config.data.seq_len).max_entries + 1
    engine_config = task.engine.model_copy(update={"max_length": max_length})
    engine = Engine(loaded.model, loaded.params, engine_config, tokenizer)
    prompts = draw_held_out_prompts(config, task, tokenizer, count)
    scores = {}
    for temperature in TEMPERATURES:
        texts = answer(engine, prompts, temperature, task.max_new_tokens)
        scores[temperature] = score_texts(task, prompts, texts)
        share = describe_mean(scores[temperature])
        print(f"{folder}, temperature {temperature:g}: {share} right, such as")
        for prompt, text in zip(prompts[:3], texts, strict=False):
            print("  ", repr(tokenizer.decode(prompt.tokens) + text), flush=True)
    return scores


def answer(
    engine: Engine, prompts: Sequence[Prompt], temperature: float, max_new_tokens: int
) -> list[str]:
    """Draws an answer to each prompt."""
    requests = [
        GenerationRequest(
            str(number),
            prompt.tokens,
            SamplingConfig(
                temperature=temperature, max_new_tokens=max_new_tokens, seed=number
            ),
        )
        for number, prompt in enumerate(prompts)
    ]
    texts = [""] * len(prompts)
    for output in engine.run(requests):
        texts[int(output.request_id)] += output.text
    return texts


def score_texts(
    task: PolicyTask, prompts: Sequence[Prompt], texts: Sequence[str]
) -> np.ndarray:
    """Returns the recipe's rewards of answers, float64 [answers]."""
    samples = [
        Sample(
            prompt,
            number=0,
            tokens=[*prompt.tokens],
            is_sampled=[False] * len(prompt.tokens),
            log_probs=[0.0] * len(prompt.tokens),
            versions=[-1] * len(prompt.tokens),
            is_complete=True,
            turns=[("assistant", text)],
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    with RewardRunner(task.rewards) as runner:
        scores = runner.score(samples)
    return sum_scores(scores, [reward.weight for reward in task.rewards])


def load_recipe(base: Path, folder: Path, settings: Sequence[str]) -> RunConfig:
    overrides = [f"folder={folder}", "name=tuned", f"train.start_from={base}"]
    return load_run_config(RECIPE, [*overrides, *settings])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("runs/rl-smollm2"))
    parser.add_argument("--prompts", type=int, default=256, help="held out")
    options = parser.parse_intermixed_args()
    shutil.rmtree(options.folder / "tuned", ignore_errors=True)
    config = load_recipe(options.base, options.folder, options.settings)
    task = config.task
    assert isinstance(task, PolicyTask)
    use_compilation_cache(config)
    count = options.prompts
    before = score_model(options.base, config, task, count)
    began = time.perf_counter()
    run = train_policy(config).folder
    seconds = time.perf_counter() - began
    after = score_model(run, config, task, count)
    for temperature in TEMPERATURES:
        gains = after[temperature] - before[temperature]
        print(
            f"{count} held-out questions at temperature {temperature:g}: "
            f"{describe_mean(before[temperature])} before, "
            f"{describe_mean(after[temperature])} after, the gain "
            f"{describe_mean(gains)}"
        )
    print(f"training took {seconds:.0f} s")


if __name__ == "__main__":
    main()
