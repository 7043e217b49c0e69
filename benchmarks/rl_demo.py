"""Train a policy by reinforcement learning, kill it once on the way, and say what it
learnt.

    python benchmarks/rl_demo.py RECIPE [KEY=VALUE ...]

`maxlm rl RECIPE` is killed (SIGKILL) once half of its steps are done, and started
again. Then the model that it began with and the one that it ended with answer the same
prompts, drawn with a seed of their own, by their likeliest tokens. Prints the share of
right answers of both, and where the plot is. Exits with 1 if the run did not go on from
where it was, or did not learn.
"""

import argparse
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.engine import Engine
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.tasks.policy import PolicyTask
from maxlm.run.config import RunConfig
from maxlm.run.load import load_model
from maxlm.run.load_config import load_run_config
from maxlm.train.records import read_records

SEED = 1_000_003
"""Of the prompts that both models answer: no recipe's seed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--prompts", type=int, default=512, help="that both answer")
    parser.add_argument(
        "--measure-only", action="store_true", help="the run is there already"
    )
    args = parser.parse_args()
    config = load_run_config(args.recipe, args.settings)
    task = config.task
    if not isinstance(task, PolicyTask):
        parser.error(f"task.kind={task.kind} learns of no rollouts")
    base = config.train.start_from
    if base is None:
        parser.error("the recipe starts from no run: set train.start_from")
    folder = Path(config.folder, config.name)
    if not args.measure_only:
        train_and_kill(args.recipe, args.settings, folder, config.train.steps // 2)
    report_rewards(folder)
    before = measure_accuracy(base, task, config, args.prompts)
    after = measure_accuracy(folder, task, config, args.prompts)
    print(f"right answers to {args.prompts} other prompts, by the likeliest tokens:")
    print(f"  before  {before:6.1%}  {base}")
    print(f"  after   {after:6.1%}  {folder}")
    print(f"plot: {folder}/plots/{task.plot_name}.png")
    print(f"samples with their rewards: {folder}/samples/rollouts.jsonl")
    if after <= before:
        sys.exit("it did not learn")


def train_and_kill(
    recipe: str, settings: Sequence[str], folder: Path, kill_step: int
) -> None:
    """Runs `maxlm rl`, kills it once ``kill_step`` steps are done, and runs it to its
    end. A run that is past that step is not killed."""
    command = [Path(sysconfig.get_path("scripts"), "maxlm"), "rl", recipe, *settings]
    began = time.monotonic()
    if find_last_step(folder) < kill_step:
        process = subprocess.Popen(command)
        try:
            while process.poll() is None and find_last_step(folder) < kill_step:
                time.sleep(0.2)
        finally:
            process.kill()
        process.wait()
        step = find_last_step(folder)
        if step < kill_step:
            sys.exit(f"it ended by itself at step {step}")
        print(f"killed (SIGKILL) at step {step}; the same command goes on", flush=True)
    subprocess.run(command, check=True)
    print(f"trained in {time.monotonic() - began:.0f} s")


def find_last_step(folder: Path) -> int:
    """Returns the last step that a run has a record of; 0: none."""
    return max(
        (record["step"] for record in read_records(folder / "metrics.jsonl")), default=0
    )


def report_rewards(folder: Path) -> None:
    """Prints the mean rewards of a run's first and last rollouts, and that every step
    between is there once."""
    rewards = {
        record["step"]: record["reward"]
        for record in read_records(folder / "metrics.jsonl")
        if "reward" in record
    }
    steps = sorted(rewards)
    if steps != list(range(1, len(steps) + 1)):
        sys.exit(f"{folder}/metrics.jsonl lacks steps: it has {len(steps)}")
    last = [rewards[step] for step in steps[-5:]]
    print(
        f"reward of sampled answers: {rewards[1]:.3f} in the first rollout, "
        f"{sum(last) / len(last):.3f} in the last {len(last)} of {len(steps)}"
    )


def measure_accuracy(
    folder: str | Path, task: PolicyTask, config: RunConfig, num_prompts: int
) -> float:
    """Returns the mean reward of the likeliest answers of a run's model to prompts of a
    task's environment that the seed ``SEED`` draws."""
    loaded = load_model(folder)
    max_tokens = config.data.seq_len + 1
    engine_config = task.engine.model_copy(update={"max_length": max_tokens})
    engine = Engine(loaded.model, loaded.params, engine_config, loaded.tokenizer)
    sampling = task.rollouts.sampling.model_copy(update={"temperature": 0.0})
    rollouts = task.rollouts.model_copy(update={"sampling": sampling})
    sampler = RolloutSampler(
        engine, loaded.tokenizer, task.environment, rollouts, seed=SEED
    )
    order = open_prompts(task, loaded.tokenizer, rollouts, sampler.max_prompt_length)
    samples = list(sampler.sample(order.take(0, num_prompts), 1))
    with RewardRunner(task.rewards) as runner:
        for sample in samples:
            runner.submit(sample)
        scores = runner.collect(samples)
    return float(scores.sum(1).mean())


def open_prompts(
    task: PolicyTask, tokenizer: Tokenizer, rollouts: RolloutConfig, max_length: int
) -> PromptOrder:
    return PromptOrder(
        task.environment,
        tokenizer,
        seed=SEED,
        max_prompt_length=max_length,
        long_prompts=rollouts.long_prompts,
    )


if __name__ == "__main__":
    main()
