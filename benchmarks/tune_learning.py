"""Check that tuning teaches what the rows show: a format, a preference, a score.

    python -m benchmarks.tune_learning sft|preference|reward|adapters BASE [--folder
    DIR]
        [--methods dpo,ipo]

BASE is a run or a Hugging Face checkpoint (benchmarks/smollm2.py makes one). ``sft``:
the share of answers in a format that is new to the model, on held-out questions, before
and after. ``preference`` starts from the model of ``sft``, whose answers have a note in
half of the cases, and tunes it by each method to prefer those: the share of sampled
answers that have one, the held-out loss of the conversations, and the KL divergence
from the model at the start, per answer, before and after. ``reward``: a small model
without pretraining, with BASE's tokenizer: the accuracy on held-out pairs, and
Spearman's correlation of scores with the utility that the pairs were made with.
``adapters``: the conversations learnt by each kind of adapter for equal steps:
parameters trained, held-out loss, seconds a step.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tune_data import has_note, is_formatted, write_chats, write_utility
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.chat import encode_chat
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scoring import Scorer
from maxlm.models.params import flatten_names
from maxlm.run.load import LoadedRun, load_model
from maxlm.run.load_config import load_run_config
from maxlm.train.program import TrainingResult
from maxlm.train.records import read_records
from maxlm.tune.program import tune_model
from maxlm.tune.references import score_texts

REWARD = (
    "data.batch_size=64",
    "data.seq_len=32",
    "train.steps=150",
    "schedule.learning_rate=1e-3",
    "model.vocab_size=49152",
    "task.validation_files=[]",
    "task.validation_fraction=0.05",
)
SETTINGS = (
    "data.seq_len=256",
    "data.batch_size=4",
    "schedule.warmup_steps=4",
    "train.eval_every=0",
    "train.max_device_rows=null",
    "checkpoint.every_steps=0",
)
ADAPTERS: dict[str, tuple[str, ...]] = {
    "full": ("schedule.learning_rate=5e-5",),
    "biases and norms": ("train.trainable=['*norm*']", "schedule.learning_rate=5e-3"),
    "lora": (
        "adapter={kind: lora, rank: 16, alpha: 32}",
        "schedule.learning_rate=5e-4",
    ),
    "rslora": (
        "adapter={kind: lora, rank: 16, alpha: 8, rank_stabilized: true}",
        "schedule.learning_rate=5e-4",
    ),
    "dora": (
        "adapter={kind: lora, rank: 16, alpha: 32, dora: true}",
        "schedule.learning_rate=5e-4",
    ),
    "pissa": (
        "adapter={kind: lora, rank: 16, alpha: 16, init: pissa}",
        "schedule.learning_rate=2e-4",
    ),
    "ia3": ("adapter.kind=ia3", "schedule.learning_rate=1e-2"),
    "houlsby": (
        "adapter={kind: bottleneck, placement: houlsby}",
        "schedule.learning_rate=1e-3",
    ),
    "pfeiffer": (
        "adapter={kind: bottleneck, placement: pfeiffer}",
        "schedule.learning_rate=1e-3",
    ),
    "prefix": (
        "adapter={kind: prefix, num_virtual_tokens: 16}",
        "schedule.learning_rate=1e-1",
    ),
    "prompt": (
        "adapter={kind: prompt, num_virtual_tokens: 16}",
        "schedule.learning_rate=3e-1",
    ),
}
SFT = ("train.steps=40", "schedule.learning_rate=5e-4")
PAIRS = ("train.steps=20", "data.seq_len=176", "data.batch_size=8")
METHODS: dict[str, tuple[str, ...]] = {
    "dpo": ("dpo_lora", "schedule.learning_rate=3e-5"),
    "ipo": ("dpo_lora", "task.loss_type=ipo", "schedule.learning_rate=3e-5"),
    "kto": ("kto_lora", "schedule.learning_rate=2e-4"),
    "orpo": ("orpo_lora", "schedule.learning_rate=5e-4"),
    "simpo": ("simpo_lora", "schedule.learning_rate=1e-4"),
}


def tune(
    recipe: str, base: str | None, data: Path, folder: Path, name: str, *settings: str
) -> TrainingResult:
    """Tunes a model in DIR/NAME."""
    shutil.rmtree(folder / name, ignore_errors=True)
    overrides = [f"train.start_from={base}"] if base else []
    overrides += [
        f"task.files=[{data}]",
        f"folder={folder}",
        f"name={name}",
        *SETTINGS,
        *settings,
    ]
    if "task.validation_files=[]" not in settings:
        test_rows = data.with_name(data.stem + "_test.jsonl")
        overrides += [f"task.validation_files=[{test_rows}]"]
    result = tune_model(load_run_config(recipe, overrides), say=lambda _: None)
    loss = {
        source: f"{metrics['loss']:.4f}" for source, metrics in result.heldout.items()
    }
    print(f"{name}: held-out loss {loss}", flush=True)
    return result


class Sampler:
    """Answers and scores conversations with a model."""

    def __init__(self, folder: str | Path):
        self.loaded: LoadedRun = load_model(folder)
        config = EngineConfig(max_sequences=16, max_length=256)
        loaded = self.loaded
        self.engine = Engine(loaded.model, loaded.params, config, loaded.tokenizer)

    def encode(self, question: list[dict[str, Any]]) -> tuple[int, ...]:
        tokenizer = self.loaded.tokenizer
        return tuple(encode_chat(tokenizer, question, add_generation_prompt=True))

    def answer(self, questions: Sequence[Any], temperature: float) -> list[str]:
        """Returns an answer to each question; the seed is the question's number."""
        texts = [""] * len(questions)
        requests = []
        for i, question in enumerate(questions):
            sampling = SamplingConfig(
                temperature=temperature, max_new_tokens=48, seed=i
            )
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
        return np.array([score.logprob for score in Scorer(self.engine).score(pairs)])


def read_questions(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"][:-1] for line in path.read_text().splitlines()]


def share(texts: Sequence[str], test: Any) -> float:
    return sum(map(test, texts)) / len(texts)


def run_sft(base: str, folder: Path) -> Path:
    questions = read_questions(folder / "chats_test.jsonl")
    before = share(Sampler(base).answer(questions, 0), is_formatted)
    tuned = tune("sft_lora", base, folder / "chats.jsonl", folder, "sft", *SFT).folder
    texts = Sampler(tuned).answer(questions, 0)
    print(
        f"answers in the format: {before:.0%} before, {share(texts, is_formatted):.0%} "
        f"after"
    )
    print("such as", *texts[:3], sep="\n  ")
    return tuned


def run_preference(base: str, folder: Path, methods: Sequence[str]) -> None:
    questions = read_questions(folder / "chats_test.jsonl")
    sft = folder / "sft"
    if not sft.exists():
        run_sft(base, folder)
    start = Sampler(sft)
    print(f"with a note before: {share(start.answer(questions, 1), has_note):.0%}")
    for method in methods:
        recipe, *settings = METHODS[method]
        rows = folder / ("labels.jsonl" if method == "kto" else "pairs.jsonl")
        tuned = tune(recipe, str(sft), rows, folder, method, *PAIRS, *settings).folder
        model = Sampler(tuned)
        texts = model.answer(questions, 1)
        kl = (model.score(questions, texts) - start.score(questions, texts)).mean()
        shares = f"{share(texts, has_note):.0%}, in the format {share(texts, is_formatted):.0%}"
        print(
            f"{method}: with a note after: {shares}, KL {kl:.2f} nats an answer",
            flush=True,
        )


def run_reward(base: str, folder: Path) -> None:
    recipe = folder / "reward.yaml"
    recipe.write_text("include: [models/demo, methods/reward]")
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        load_model(base).tokenizer.save(tokenizer)
    reward_settings = *REWARD, f"tokenizer.path={tokenizer}"
    result = tune(
        str(recipe), None, folder / "utility.jsonl", folder, "reward", *reward_settings
    )
    rows = [
        json.loads(line)
        for line in (folder / "utility_test.jsonl").read_text().splitlines()
    ]
    scored = [{"prompt": "Words:", "completion": row["text"]} for row in rows]
    scores = score_texts(result.folder, scored)
    utility = np.array([row["utility"] for row in rows])
    pairs = np.random.default_rng(0).permutation(len(rows)).reshape(-1, 2)
    right = np.diff(scores[pairs])[:, 0] * np.diff(utility[pairs])[:, 0] > 0
    ranks = [np.argsort(np.argsort(values)) for values in (scores, utility)]
    correlation = np.corrcoef(ranks[0], ranks[1])[0, 1]
    print(
        f"held-out pairs ordered rightly {right.mean():.1%} of {len(pairs)}, Spearman "
        f"{correlation:.3f}"
    )


def run_adapters(base: str, folder: Path, kinds: Sequence[str]) -> None:
    for kind in kinds:
        settings = ADAPTERS[kind]
        name = kind.replace(" ", "-")
        result = tune(
            "sft",
            base,
            folder / "chats.jsonl",
            folder,
            name,
            *settings,
            "train.steps=25",
        )
        specs = flatten_names(result.setup.trainable)
        trained = sum(spec.size for spec in specs.values() if spec is not None)
        whole = sum(spec.size for spec in flatten_names(result.setup.specs).values())
        records = read_records(result.folder / "metrics.jsonl")
        seconds = [r["seconds"] for r in records if r.get("seconds") and r["step"] > 2]
        print(
            f"{kind} | {trained:,} | {trained / whole:.3%} | {np.median(seconds):.2f} "
            f"s a step",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", choices=["sft", "preference", "reward", "adapters"])
    parser.add_argument("base")
    parser.add_argument("--folder", type=Path, default=Path("runs/tune-learning"))
    parser.add_argument("--methods", help="default: all")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder)
    write_utility(folder)
    if options.case == "sft":
        run_sft(options.base, folder)
    elif options.case == "preference":
        run_preference(
            options.base, folder, (options.methods or ",".join(METHODS)).split(",")
        )
    elif options.case == "reward":
        run_reward(options.base, folder)
    else:
        run_adapters(
            options.base, folder, (options.methods or ",".join(ADAPTERS)).split(",")
        )


if __name__ == "__main__":
    main()
