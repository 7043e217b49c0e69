"""Train a policy by reinforcement learning, kill it once on the way, and say what it
learnt.

    python -m benchmarks.rl_demo RECIPE [KEY=VALUE ...]

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

from benchmarks.policy_answers import AnsweringPolicy, get_policy_task
from maxlm.run.load_config import load_run_config
from maxlm.train.records import read_records


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
    task = get_policy_task(config)
    base = config.train.start_from
    if base is None:
        parser.error("the recipe starts from no run: set train.start_from")
    folder = Path(config.folder, config.name)
    if not args.measure_only:
        train_and_kill(args.recipe, args.settings, folder, config.train.steps // 2)
    report_rewards(folder)
    shares = []
    for model in (base, folder):
        policy = AnsweringPolicy(model, config)
        samples = policy.answer(policy.draw_prompts(args.prompts), temperature=0.0)
        shares.append(float(policy.score(samples).mean()))
    before, after = shares
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


if __name__ == "__main__":
    main()
