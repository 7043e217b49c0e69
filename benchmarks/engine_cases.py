"""Savings of the engine by shared prefixes and guessed tokens.

    python benchmarks/engine_cases.py FOLDER [--rounds 3]

FOLDER is a run or a Hugging Face checkpoint. First 32 requests whose prompts begin with
the same 1,000 tokens: pages held, against those of one, and tokens prefilled, against
those without sharing. Then prompt look-up on text to be copied: the model repeats a
list that its prompt has three times; tokens/s beside decoding without guesses, in turn.
"""

import argparse
import statistics
import time

import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.run.load import LoadedRun, load_model

PAGE, DRAFTS = 16, 6


def measure_prefix(loaded: LoadedRun) -> None:
    config = EngineConfig(
        max_sequences=32, max_length=1088, page_size=PAGE, prefill_tokens=256
    )
    random = np.random.default_rng(0)
    prefix = random.integers(1_000, 40_000, 1_000).tolist()
    sampling = SamplingConfig(temperature=0, max_new_tokens=40)
    pages_held = {}
    for count in (1, 32):
        engine = Engine(loaded.model, loaded.params, config, loaded.tokenizer)
        before = engine.stats()
        for number in range(count):
            prompt = (*prefix, *random.integers(1_000, 40_000, 8).tolist())
            engine.add_request(
                GenerationRequest(
                    f"{count}-{number}", prompt, sampling, ignore_eos=True
                )
            )
        most = 0
        while engine.has_work:
            engine.step()
            if len(engine.scheduler.running) == count:
                most = max(
                    most, engine.stats().num_pages - engine.stats().num_free_pages
                )
        pages_held[count] = most
        after = engine.stats()
    prefix_pages = 1_000 // PAGE
    pages_per_request = pages_held[1] - prefix_pages
    shared = pages_held[32] - 32 * pages_per_request
    prompts = after.prompt_tokens_total - before.prompt_tokens_total
    computed = prompts - (
        after.cached_prompt_tokens_total - before.cached_prompt_tokens_total
    )
    print(
        f"shared prefix of 1,000 tokens: one request holds {pages_held[1]} pages, {pages_per_request} of "
        f"them its own; "
        f"32 hold {pages_held[32]}, {shared / prefix_pages:.2f}× the prefix without their own"
    )
    print(
        f"tokens prefilled: {computed:,} of {prompts:,}, {prompts / computed:.1f}× "
        f"fewer"
    )


def measure_lookup(loaded: LoadedRun, rounds: int) -> None:
    speculation = {"kind": "prompt_lookup", "num_drafts": DRAFTS}
    engines = {}
    for name, guess in (("plain", None), ("prompt look-up", speculation)):
        config = EngineConfig(
            max_sequences=1,
            max_length=1024,
            page_size=32,
            prefix_cache=False,
            speculation=guess,
        )
        engines[name] = Engine(loaded.model, loaded.params, config, loaded.tokenizer)
    text = "\n".join(
        f"{10 * i + 7}. The {colour} {thing} costs {i * i + 3} dollars."
        for i, (colour, thing) in enumerate(
            (c, t)
            for c in ("red", "green", "blue")
            for t in ("lamp", "chair", "table", "shelf")
        )
    )
    prompt = tuple(loaded.tokenizer.encode(f"{text}\n\n" * 3))
    sampling = SamplingConfig(temperature=0, max_new_tokens=160)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    outputs = {}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            engine.add_request(
                GenerationRequest(f"{number}", prompt, sampling, ignore_eos=True)
            )
            while any(
                sequence.num_to_compute != 1 for sequence in engine.scheduler.running
            ) or (engine.scheduler.waiting):
                engine.step()
            start = time.perf_counter()
            tokens = []
            while engine.has_work:
                for output in engine.step():
                    tokens += output.token_ids
            if number:
                rates[name].append(len(tokens) / (time.perf_counter() - start))
            outputs[name] = tokens
    assert outputs["plain"] == outputs["prompt look-up"]
    ratios = sorted(b / a for a, b in zip(*rates.values(), strict=True))
    for name, name_rates in rates.items():
        print(f"{name:16}{statistics.median(name_rates):8.1f} tokens/s")
    print(
        f"prompt look-up is {statistics.median(ratios):.2f}× "
        f"({ratios[0]:.2f}–{ratios[-1]:.2f})"
    )
    stats = engines["prompt look-up"].stats()
    print(
        f"guessed {stats.drafted_tokens_total}, accepted {stats.accepted_tokens_total}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    loaded = load_model(args.folder)
    measure_prefix(loaded)
    measure_lookup(loaded, args.rounds)


if __name__ == "__main__":
    main()
