"""Distillation's losses and gradients are those of TRL's GKD on the same models, in
fp32, times temperature²; features' those of torch."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from trl.experimental.gkd import GKDTrainer  # noqa: E402

from maxlm.models.params import flatten_names  # noqa: E402
from maxlm.sharding import ShardingConfig  # noqa: E402
from tests.parity import compare, tiny  # noqa: E402
from tests.tasks.row_cases import (  # noqa: E402
    EOS,
    NumberTokenizer,
    compute_loss_and_gradient,
    draw_rows,
    make_batch,
    make_task,
)

transformers.logging.set_verbosity_error()
ROWS, SEQ = 6, 40
WIDE = {"hidden_size": 48, "intermediate_size": 56}  # the teacher's
CASES = [(beta, t) for beta in (0.0, 0.25, 0.5, 0.75, 1.0) for t in (1.0, 2.0)]


def build(seed: int, **sizes: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**tiny.CASES["llama"][1] | sizes)
    config._attn_implementation = "eager"
    return tiny.randomize(transformers.LlamaForCausalLM(config).eval())


def make_torch_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows padded at their ends, with labels of answers alone."""
    encode = NumberTokenizer().encode
    prompts = [encode(row["prompt"]) for row in rows]
    answers = [[*encode(row["completion"]), EOS] for row in rows]
    size = max(len(p + a) for p, a in zip(prompts, answers, strict=True))
    parts: dict[str, list[list[int]]] = {
        "input_ids": [],
        "attention_mask": [],
        "labels": [],
    }
    for prompt, answer in zip(prompts, answers, strict=True):
        room = size - len(prompt + answer)
        parts["input_ids"].append(prompt + answer + [0] * room)
        parts["attention_mask"].append([1] * len(prompt + answer) + [0] * room)
        parts["labels"].append([-100] * len(prompt) + answer + [-100] * room)
    return {name: torch.tensor(lists) for name, lists in parts.items()}


def check(
    settings: dict[str, Any],
    theirs: Any,
    student: Any,
    teacher: Any,
    rows: Any,
    path: Any,
):
    """Our loss and gradient against a torch loss; ``student`` may have a ``features``
    map."""
    theirs.backward()
    models = []
    for model in (student, teacher):
        family, config = compare.read(
            model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        )
        models.append((family, config))

    def convert(index: int, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
        family, config = models[index]
        arrays = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
        features = arrays.pop("features.weight", None)
        flat = compare.parameters(config, family.list_entries(config), arrays)
        return (
            flat if features is None else flat | {"heads.features.kernel": features.T}
        )

    task_settings = {
        "kind": "distill",
        "teacher": "teacher",
        "examples_per_row": 1,
    } | settings
    task = make_task(path, rows, **task_settings)
    mesh = compare.one_device()
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    built = []
    for index, (_, config) in enumerate(models):
        heads = dict(task.required_heads) if index == 0 else {}
        config = config.model_copy(update={"heads": heads})
        built.append(config.build(rules=rules, dtype=jnp.float32))
    params = [
        compare.placed(convert(i, model.state_dict()), mesh)
        for i, model in enumerate((student, teacher))
    ]
    batch = make_batch(task, SEQ, ROWS)
    loss, _, gradient = compute_loss_and_gradient(
        task, (built[0], mesh, *params), batch, frozen_model=built[1]
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    want = convert(0, {key: p.grad for key, p in student.named_parameters()})
    got = flatten_names(gradient)
    a, b = (
        np.concatenate([np.ravel(x[key]) for key in sorted(want)]) for x in (want, got)
    )
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.99999
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)


@pytest.mark.parametrize(("beta", "temperature"), CASES)
def test_same_loss_and_gradient_as_trl(beta, temperature, tmp_path):
    seed = int(4 * beta)
    rows = draw_rows(seed, ROWS)
    student = build(seed)
    teacher = build(100 + seed, **WIDE)
    batch = make_torch_batch(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1].detach()
    theirs = GKDTrainer.generalized_jsd_loss(
        *logits, labels=batch["labels"][:, 1:], beta=beta, temperature=temperature
    )
    kinds: dict[float, dict[str, Any]] = {
        0.0: {"divergence": "forward_kl"},
        1.0: {"divergence": "reverse_kl"},
    }
    settings = kinds.get(beta, {"divergence": "jsd", "beta": beta}) | {
        "temperature": temperature
    }
    check(settings, temperature**2 * theirs, student, teacher, rows, tmp_path)


def test_features_and_cross_entropy_as_torch_has_them(tmp_path):
    rows = draw_rows(3, ROWS)
    student = build(3)
    teacher = build(103, **WIDE)
    sizes = student.config.hidden_size, teacher.config.hidden_size
    student.features = torch.nn.Linear(*sizes, bias=False)
    batch = make_torch_batch(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["output_hidden_states"] = True
    ours = student(**inputs)
    theirs = teacher(**inputs)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    targets = theirs.hidden_states[-1][:, :-1]
    guess = student.features(ours.hidden_states[-1])
    features = torch.nn.functional.mse_loss(
        guess[:, :-1][counted], targets[counted].detach()
    )
    logits = ours.logits[:, :-1]
    entropy = torch.nn.functional.cross_entropy(logits[counted], labels[counted])
    kl = GKDTrainer.generalized_jsd_loss(
        logits, theirs.logits[:, :-1].detach(), labels=labels, beta=0
    )
    loss = 0.7 * kl + 0.3 * entropy + 0.5 * features
    settings = {"ce_weight": 0.3, "features": sizes[1], "features_weight": 0.5}
    check(settings, loss, student, teacher, rows, tmp_path)
