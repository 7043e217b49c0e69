"""Does tuning teach what the rows say? A base model learns a format, a preference, a score.

    python benchmarks/tune_learning.py sft|preference|reward BASE [--folder DIR] [--methods dpo,ipo]

BASE is a run or a Hugging Face checkpoint (benchmarks/smollm2.py makes one). ``sft``: the share of
answers in a format that is new to the model, on held-out questions, before and after.
``preference`` starts from the model of ``sft``, whose answers have a note in half of the cases, and
tunes it by each method to prefer those: the share of sampled answers that have one, the held-out
loss of the conversations, and the KL divergence from the model at the start, per answer, before and
after. ``reward``: the accuracy on held-out pairs, and Spearman's correlation of scores with the
utility that the pairs were made with.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tune_data import has_note, is_formatted, write_chats, write_utility
from maxlm.data.tokenizer import encode_chat
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.sampling import SamplingConfig
from maxlm.inference.scoring import Scorer
from maxlm.programs.load import LoadedRun, load_model
from maxlm.programs.tune import load_recipe, tune_model

SETTINGS = (
    "data.seq_len=256",
    "data.batch_size=8",
    "schedule.warmup_steps=4",
    "train.eval_every=0",
    "train.max_device_rows=null",
    "checkpoint.every_steps=0",
)
METHODS: dict[str, tuple[str, ...]] = {
    "dpo": ("dpo_lora", "schedule.learning_rate=1e-4"),
    "ipo": ("dpo_lora", "task.loss_type=ipo", "task.beta=0.5", "schedule.learning_rate=1e-4"),
    "kto": ("kto_lora", "schedule.learning_rate=1e-4"),
    "orpo": ("orpo_lora", "schedule.learning_rate=2e-4"),
    "simpo": ("simpo_lora", "schedule.learning_rate=1e-4"),
}


def tune(recipe: str, base: str, data: Path, folder: Path, name: str, *settings: str) -> Path:
    """Tunes a model in DIR/NAME; returns the run's folder."""
    own = [f"folder={folder}", f"name={name}", *SETTINGS, *settings]
    own += [f"task.validation_files=[{data.with_name(data.stem + '_test.jsonl')}]"]
    result = tune_model(load_recipe(recipe, own, base=base, files=[str(data)]), say=lambda _: None)
    loss = {source: f"{own['loss']:.4f}" for source, own in result.heldout.items()}
    print(f"{name}: held-out loss {loss}", flush=True)
    return result.folder


class Sampler:
    """Answers and scores conversations with a model."""

    def __init__(self, folder: str | Path):
        self.loaded: LoadedRun = load_model(folder)
        config = EngineConfig(max_sequences=16, max_length=256)
        own = self.loaded
        self.engine = Engine(own.model, own.params, config, own.tokenizer)

    def encode(self, question: list[dict[str, Any]]) -> tuple[int, ...]:
        tokenizer = self.loaded.tokenizer
        return tuple(encode_chat(tokenizer, question, add_generation_prompt=True))

    def answer(self, questions: Sequence[Any], temperature: float) -> list[str]:
        """Returns an answer to each question; the seed is the question's number."""
        texts = [""] * len(questions)
        requests = []
        for i, question in enumerate(questions):
            sampling = SamplingConfig(temperature=temperature, max_new_tokens=48, seed=i)
            requests.append(GenerationRequest(str(i), self.encode(question), sampling))
        for output in self.engine.run(requests):
            texts[int(output.request_id)] += output.text
        return texts

    def score(self, questions: Sequence[Any], answers: Sequence[str]) -> np.ndarray:
        """Returns the log-probability of each answer."""
        tokenizer = self.loaded.tokenizer
        pairs = [
            (self.encode(q), (*tokenizer.encode(a), tokenizer.eos_id))
            for q, a in zip(questions, answers, strict=True)
        ]
        return np.array([found.logprob for found in Scorer(self.engine).score(pairs)])


def read_questions(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"][:-1] for line in path.read_text().splitlines()]


def share(texts: Sequence[str], test: Any) -> float:
    return sum(map(test, texts)) / len(texts)


def run_sft(base: str, folder: Path) -> Path:
    questions = read_questions(folder / "chats_test.jsonl")
    before = share(Sampler(base).answer(questions, 0), is_formatted)
    tuned = tune("sft_lora", base, folder / "chats.jsonl", folder, "sft", "train.steps=40")
    texts = Sampler(tuned).answer(questions, 0)
    print(f"answers in the format: {before:.0%} before, {share(texts, is_formatted):.0%} after")
    print("such as", *texts[:3], sep="\n  ")
    return tuned


def run_preference(base: str, folder: Path, methods: Sequence[str]) -> None:
    questions = read_questions(folder / "chats_test.jsonl")
    if not (sft := folder / "sft").exists():
        run_sft(base, folder)
    start = Sampler(sft)
    print(f"with a note before: {share(start.answer(questions, 1), has_note):.0%}")
    for method in methods:
        recipe, *settings = METHODS[method]
        rows = folder / ("labels.jsonl" if method == "kto" else "pairs.jsonl")
        tuned = tune(recipe, str(sft), rows, folder, method, "train.steps=30", *settings)
        model = Sampler(tuned)
        texts = model.answer(questions, 1)
        kl = (model.score(questions, texts) - start.score(questions, texts)).mean()
        found = f"{share(texts, has_note):.0%}, in the format {share(texts, is_formatted):.0%}"
        print(f"{method}: with a note after: {found}, KL {kl:.2f} nats an answer", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", choices=["sft", "preference", "reward"])
    parser.add_argument("base")
    parser.add_argument("--folder", type=Path, default=Path("runs/tune-learning"))
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder)
    write_utility(folder)
    if options.case == "sft":
        run_sft(options.base, folder)
    elif options.case == "preference":
        run_preference(options.base, folder, options.methods.split(","))


if __name__ == "__main__":
    main()
