"""Tokens that a model's modules of ``mtp`` guess, and those of them that the model draws
too.

    python benchmarks/mtp_drafts.py RUN [--drafts 1 2 3] [TEXT ...]

RUN: a run or a Hugging Face folder whose model has modules, such as that of ``maxlm
train demo name=demo_mtp model.mtp.num_modules=1 train.steps=500``. Its continuations of
prompts, greedy and sampled, are generated with guesses and without, and are equal.
"""

import argparse
from pathlib import Path

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig, EngineStats
from maxlm.inference.requests import GenerationRequest
from maxlm.run.load import LoadedRun, load_model

ROOT = Path(__file__).parents[1]
# Python sources, as the demo is trained on, that are not among them.
TEXTS = sorted((ROOT / "maxlm/inference").glob("*.py"))
PROMPT_TOKENS = 64
NEW_TOKENS = 96
SAMPLINGS = {
    "greedy": SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS),
    "temperature 0.8": SamplingConfig(
        temperature=0.8, top_p=0.95, max_new_tokens=NEW_TOKENS, seed=3
    ),
}


def generate(
    run: LoadedRun,
    prompts: list[tuple[int, ...]],
    sampling: SamplingConfig,
    num_drafts: int,
) -> tuple[dict[str, list[int]], EngineStats]:
    """Continues prompts with so many guesses a step, 0: without any; returns the tokens
    by request, and the engine's counts."""
    speculation = {"kind": "mtp", "num_drafts": num_drafts} if num_drafts else None
    config = EngineConfig.model_validate(
        {
            "max_sequences": 8,
            "max_length": PROMPT_TOKENS + NEW_TOKENS,
            "speculation": speculation,
        }
    )
    engine = Engine(run.model, run.params, config, run.tokenizer)
    requests = [
        GenerationRequest(str(number), prompt, sampling, ignore_eos=True)
        for number, prompt in enumerate(prompts)
    ]
    tokens: dict[str, list[int]] = {}
    for output in engine.run(requests):
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens, engine.stats()


def main() -> None:
    """Prints a row for each sampling and number of guesses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("texts", nargs="*", type=Path, default=TEXTS)
    parser.add_argument("--drafts", nargs="*", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    run = load_model(args.run)
    prompts: list[tuple[int, ...]] = []
    for path in args.texts:
        # Behind the imports, which tell little of what follows.
        text = path.read_text()
        tokens = run.tokenizer.encode(text[len(text) // 2 :])
        if len(tokens) >= PROMPT_TOKENS:
            prompts.append(tuple(tokens[:PROMPT_TOKENS]))
    print(f"{len(prompts)} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} more each")
    print(f"{'':16}{'guesses':>8}{'guessed':>9}{'drawn too':>11}{'tokens a step':>15}")
    for name, sampling in SAMPLINGS.items():
        expected, _ = generate(run, prompts, sampling, 0)
        for num_drafts in args.drafts:
            tokens, counted = generate(run, prompts, sampling, num_drafts)
            assert tokens == expected, "guesses have changed the output"
            drafted = counted.drafted_tokens_total
            accepted = counted.accepted_tokens_total
            generated = counted.generated_tokens_total
            # Steps of one sequence: each draws one token beside the accepted ones.
            num_steps = generated - accepted
            share = f"{accepted / drafted:.1%}"
            per_step = f"{generated / num_steps:.2f}"
            row = f"{name:16}{num_drafts:8}{drafted:9,}{share:>11}{per_step:>15}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
