"""Losses and gradients of tasks on rows of files are those of TRL's own trainers, in
fp32."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer import dpo_trainer, kto_trainer, reward_trainer, sft_trainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from maxlm.models.params import flatten_names  # noqa: E402
from maxlm.sharding import ShardingConfig  # noqa: E402
from tests.parity import compare, tiny  # noqa: E402
from tests.tasks.row_cases import (  # noqa: E402
    EOS,
    PREFERENCE_CASES,
    NumberTokenizer,
    compute_loss_and_gradient,
    draw_rows,
    make_batch,
    make_task,
)

transformers.logging.set_verbosity_error()
SEEDS = range(5)
ROWS = 6
SEQ = 40
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
CASES = {"sft": {"kind": "sft", "examples_per_row": 1}, **PREFERENCE_CASES}


def make_trainer(model: Any, reference: Any, settings: dict[str, Any]) -> Any:
    """What TRL's loss functions read of a trainer."""
    smoothing = settings.get("label_smoothing", 0.0)
    accelerator = SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        parallelism_config=None,
        num_processes=1,
    )
    args = SimpleNamespace(
        gradient_checkpointing_kwargs=None,
        loss_type="nll",
        average_tokens_across_devices=False,
        center_rewards_coefficient=settings.get("center_rewards"),
    )
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        args=args,
        accelerator=accelerator,
        beta=settings.get("beta", 0.1),
        loss_type=settings.get(
            "loss_type", "kto" if settings["kind"] == "kto" else "sigmoid"
        ),
        loss_types=[settings.get("loss_type", "sigmoid")],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        label_smoother=None,
        compute_loss_func=None,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        calculate_KL=True,
        desirable_weight=settings.get("desirable_weight", 1.0),
        undesirable_weight=settings.get("undesirable_weight", 1.0),
        alpha=0.0,
        cpo_alpha=settings.get("alpha", 1.0),
        simpo_gamma=settings.get("gamma", 0.5),
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )


def compute_trl_loss(trainer: Any, kind: str, rows: list[dict[str, Any]]) -> Any:
    """The loss of TRL's trainer on its own collator's batch of the same tokens."""
    encode = NumberTokenizer().encode
    model = trainer.model
    encoded = []
    for row in rows:
        ids = {
            f"{name}_ids": [*encode(row[name]), EOS] for name in ("chosen", "rejected")
        }
        ids |= {
            "prompt_ids": encode(row["prompt"]),
            "completion_ids": [*encode(row["completion"]), EOS],
        }
        encoded.append(ids | {"label": row["label"], "margin": row["margin"]})
    if kind == "sft":
        examples = []
        for example in encoded:
            prompt_ids = example["prompt_ids"]
            completion_ids = example["completion_ids"]
            labels = [-100] * len(prompt_ids) + completion_ids
            examples.append(
                {"input_ids": prompt_ids + completion_ids, "labels": labels}
            )
        collate = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0)
        return sft_trainer.SFTTrainer.compute_loss(trainer, model, collate(examples))
    if kind == "reward":
        examples = [
            example
            | {
                f"{s}_ids": example["prompt_ids"] + example[f"{s}_ids"]
                for s in ("chosen", "rejected")
            }
            for example in encoded
        ]
        collate = reward_trainer.DataCollatorForPreference(pad_token_id=0)
        return reward_trainer.RewardTrainer.compute_loss(
            trainer, model, collate(examples)
        )
    if kind == "dpo":
        batch = dpo_trainer.DataCollatorForPreference(pad_token_id=0)(encoded)
        return dpo_trainer.DPOTrainer._compute_loss(trainer, model, batch, False)
    if kind == "kto":
        for i, example in enumerate(encoded):
            example["KL_completion_ids"] = encoded[i - 1]["completion_ids"]
        batch = kto_trainer.DataCollatorForUnpairedPreference(pad_token_id=0)(encoded)
        cls = kto_trainer.KTOTrainer
        trainer._compute_kl_logps = lambda *args: cls._compute_kl_logps(trainer, *args)
        return cls._compute_loss(trainer, model, batch, False)
    cls = {"cpo": CPOTrainer, "orpo": ORPOTrainer}[kind]
    batch = {}
    for side in ("chosen", "rejected"):
        whole = [example["prompt_ids"] + example[f"{side}_ids"] for example in encoded]
        size = max(map(len, whole))
        padded = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        parts = {
            "input_ids": whole,
            "attention_mask": [[1] * len(ids) for ids in whole],
            "labels": [
                [-100] * len(example["prompt_ids"]) + example[f"{side}_ids"]
                for example in encoded
            ],
        }
        for name, lists in parts.items():
            filled = [ids + [padded[name]] * (size - len(ids)) for ids in lists]
            batch[f"{side}_{name}"] = torch.tensor(filled)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(cls, name))
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, name):
            setattr(trainer, name, getattr(cls, name).__get__(trainer))
    return cls.get_batch_loss_metrics(trainer, model, batch)[0]


def build_models(kind: str, seed: int) -> list[Any]:
    """A random Llama and its reference; the reward model's has a score in the head's
    place."""
    if kind != "reward":
        models = [tiny.build("llama", model_seed) for model_seed in (seed, 100 + seed)]
        for model in models:
            add_fused_lm_head(model, outputs=OUTPUTS)
        return models
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **tiny.CASES["llama"][1], num_labels=1, pad_token_id=0
    )
    config._attn_implementation = "eager"
    model = transformers.LlamaForSequenceClassification(config).eval()
    return [tiny.randomize(model)] * 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_same_loss_and_gradient_as_trl(name, seed, tmp_path):
    settings = CASES[name]
    rows = draw_rows(seed, ROWS)
    kind = settings["kind"]
    model, reference = build_models(kind, seed)
    trainer = make_trainer(model, reference, settings)
    theirs = compute_trl_loss(trainer, kind, rows)
    theirs.backward()

    values = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    family, config = compare.read(values)
    if kind == "reward":
        config = config.model_copy(update={"heads": {"score": 1}})

    def convert(tensors: dict[str, Any]) -> Any:
        arrays = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
        score = arrays.pop("score.weight", None)
        if score is not None:
            arrays["lm_head.weight"] = np.zeros(
                (config.vocab_size, config.d_model), np.float32
            )
        plain = config.model_copy(update={"heads": {}})
        flat = compare.parameters(plain, family.list_entries(plain), arrays)
        return flat if score is None else flat | {"heads.score.kernel": score.T}

    task = make_task(tmp_path, rows, **settings)
    batch = make_batch(task, SEQ, ROWS)
    mesh = compare.one_device()
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    params = [compare.placed(convert(m.state_dict()), mesh) for m in (model, reference)]
    policy = config.build(rules=rules, dtype=jnp.float32)
    loss, sums, gradient = compute_loss_and_gradient(
        task, (policy, mesh, *params), batch
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    logged = trainer._metrics["eval"]
    for ours, name in (
        ("margin", "rewards/margins"),
        ("accuracy", "rewards/accuracies"),
        ("kl", "kl"),
    ):
        if logged[name]:
            assert sums[ours] == pytest.approx(logged[name][0], rel=1e-4, abs=1e-5), (
                ours
            )

    want = convert({key: p.grad for key, p in model.named_parameters()})
    got = flatten_names(gradient)
    a, b = (
        np.concatenate([np.ravel(x[key]) for key in sorted(want)]) for x in (want, got)
    )
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.99999
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
