"""An update of TRL 1.12's PPO on fixed answers, in a process of its own:
``python -m tests.parity.trl_ppo FILE.npz ESTIMATOR VALUE_MODEL``."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import tiny

SETTINGS: dict[str, Any] = {
    "sequences": 6,
    "prompt": 5,
    "answer": 7,
    "pad": 1,
    "eos": 2,
    "epochs": 2,
    "kl_coef": 0.3,
    "clip": 0.02,
    "value_clip": 0.02,
    "value_coef": 0.4,
    "discount": 0.98,
    "decay": 0.9,
    "missing_end_penalty": 0.7,
    "rate": 0.02,
}


def build_models() -> tuple[Any, Any, Any, Any, Any]:
    """A policy, its reference, the weights [1, D] of its value head, those of a reward
    model's on a model like it, and a model that values may have to themselves."""

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**tiny.CASES["llama"][1])
        config._attn_implementation = "eager"
        config.pad_token_id = SETTINGS["pad"]
        return tiny.randomize(transformers.LlamaForCausalLM(config).eval())

    policy = build(0)
    reference = build(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.03 * noise
    width = policy.config.hidden_size
    value = 0.2 * torch.randn((1, width), generator=generator)
    reward = 0.5 * torch.randn((1, width), generator=generator)
    return policy, reference, value, reward, build(7)


def draw_tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded at their start, and answers that fill their room; half of them
    have an end."""
    random = np.random.default_rng(3)
    sequences, length = SETTINGS["sequences"], SETTINGS["answer"]
    queries = random.integers(3, vocab_size, (sequences, SETTINGS["prompt"]))
    for row in range(sequences):
        queries[row, : row % 3] = SETTINGS["pad"]
    answers = random.integers(3, vocab_size, (sequences, length))
    answers[::2, -1] = SETTINGS["eos"]
    return queries, answers


class ModelWithScore(torch.nn.Module):
    """What TRL reads of a value or reward model, on a trunk that may be another's."""

    base_model_prefix = "model"

    def __init__(self, trunk: Any, weights: Any):
        super().__init__()
        self.model = trunk
        self.config = trunk.config
        self.score = torch.nn.Linear(weights.shape[1], 1, bias=False)
        with torch.no_grad():
            self.score.weight.copy_(weights)


class FixedPrompts(torch.utils.data.Dataset):
    def __init__(self, queries: np.ndarray):
        self.queries = queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.queries[index].tolist()}


def main(path: Path, estimator: str, value_kind: str) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, reference, value_weights, reward_weights, other = build_models()
    queries, answers = draw_tokens(policy.config.vocab_size)
    answer_of = {tuple(q): a for q, a in zip(queries.tolist(), answers, strict=True)}
    value_trunk = policy if value_kind == "head" else other
    value_model = ModelWithScore(value_trunk.model, value_weights)
    reward_model = ModelWithScore(build_models()[0].model, reward_weights)
    results: dict[str, Any] = {}

    def generate(model, rows, batch_size, pad_token_id, generation_config):
        chosen = np.stack([answer_of[tuple(row)] for row in rows.tolist()])
        whole = torch.cat([rows, torch.tensor(chosen)], 1)
        output = ppo_trainer.forward(model, whole, pad_token_id)
        logits = output.logits[:, rows.shape[1] - 1 : -1]
        results["queries"] = rows.numpy()
        results["answers"] = chosen
        return whole, logits / (1.0 + 1e-7)

    ppo_trainer.batch_generation = generate
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=SETTINGS["sequences"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=SETTINGS["epochs"],
            total_episodes=SETTINGS["sequences"],
            response_length=SETTINGS["answer"],
            temperature=1.0,
            kl_coef=SETTINGS["kl_coef"],
            kl_estimator=estimator,
            cliprange=SETTINGS["clip"],
            cliprange_value=SETTINGS["value_clip"],
            vf_coef=SETTINGS["value_coef"],
            gamma=SETTINGS["discount"],
            lam=SETTINGS["decay"],
            missing_eos_penalty=SETTINGS["missing_end_penalty"],
            whiten_rewards=False,
            learning_rate=SETTINGS["rate"],
            lr_scheduler_type="constant",
            optim="sgd",
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        dataset = FixedPrompts(queries)
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=collate,
        )
        logs: dict[str, float] = {}
        trainer.log = lambda metrics, *args: logs.update(metrics)
        scores: list[Any] = []
        get_reward = ppo_trainer.get_reward

        def record_reward(model, *args):
            result = get_reward(model, *args)
            if model is reward_model:
                # A copy: TRL takes the penalty from it in place.
                scores.append(result[1].clone())
            return result

        ppo_trainer.get_reward = record_reward
        trainer.train()
    results["scores"] = torch.cat(scores).detach().numpy()
    results |= {f"log {name}": np.float64(value) for name, value in logs.items()}
    for name, tensor in policy.state_dict().items():
        results[f"policy {name}"] = tensor.detach().numpy()
    for name, tensor in value_trunk.state_dict().items():
        results[f"value_model {name}"] = tensor.detach().numpy()
    results["value"] = value_model.score.weight.detach().numpy()
    np.savez(path, **results)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def make_tokenizer() -> Any:
    """What TRL asks of a tokenizer."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "<pad>": SETTINGS["pad"], "<eos>": SETTINGS["eos"]}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
