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

from benchmarks.policy_answers import AnsweringPolicy
from maxlm.rl.program import train_policy
from maxlm.run.config import RunConfig
from maxlm.run.load_config import load_run_config
from maxlm.run.setup import use_compilation_cache

RECIPE = "rl/smollm2_135m_reasoning_gym"
TEMPERATURES = (0.0, 1.0)


def describe_mean(values: np.ndarray) -> str:
    """Returns a mean and its 95% interval, in percent."""
    error = 1.96 * values.std() / len(values) ** 0.5
    return f"{100 * values.mean():.1f} ± {100 * error:.1f}%"


def score_model(
    folder: Path, config: RunConfig, num_prompts: int
) -> dict[float, np.ndarray]:
    """Returns the rewards of a model's answers to held-out prompts, float64 [prompts],
    by the temperature."""
    policy = AnsweringPolicy(folder, config)
    prompts = policy.draw_prompts(num_prompts)
    scores = {}
    for temperature in TEMPERATURES:
        samples = policy.answer(prompts, temperature)
        scores[temperature] = policy.score(samples)
        share = describe_mean(scores[temperature])
        print(f"{folder}, temperature {temperature:g}: {share} right, such as")
        for sample in samples[:3]:
            question = policy.tokenizer.decode(sample.prompt.tokens)
            print("  ", repr(question + sample.last_answer), flush=True)
    return scores


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
    use_compilation_cache(config)
    count = options.prompts
    before = score_model(options.base, config, count)
    began = time.perf_counter()
    run = train_policy(config).folder
    seconds = time.perf_counter() - began
    after = score_model(run, config, count)
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
