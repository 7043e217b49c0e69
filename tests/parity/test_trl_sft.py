"""Conversations are encoded and masked as transformers does, and their loss and its
gradient are those of a causal model of transformers on labels of which the rest is
-100, as TRL trains."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from maxlm.data.conversations import encode_conversation  # noqa: E402
from maxlm.data.loader.batches import LoaderConfig  # noqa: E402
from maxlm.data.tokenizer.load import import_tokenizer  # noqa: E402
from maxlm.models.params import bind, flatten_names  # noqa: E402
from maxlm.sharding import ShardingConfig  # noqa: E402
from maxlm.tasks import SourceInputs, TaskModels  # noqa: E402
from maxlm.tasks.sft import SftTask  # noqa: E402
from tests.data.tokenizer.foreign import write_checkpoint  # noqa: E402
from tests.parity import compare, tiny  # noqa: E402

transformers.logging.set_verbosity_error()

MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}BEGIN{{ m.role }}
{% generation %}{{ m.content }}END
{% endgeneration %}{% else %}BEGIN{{ m.role }}
{{ m.content }}END
{% endif %}{% endfor %}{% if add_generation_prompt %}BEGINassistant
{% endif %}"""
# To the token that ends a turn alone, which is what is learnt where nothing is marked.
TO_THE_END = MARKED.replace(
    "END\n{% endgeneration %}", "END{% endgeneration %}{{ '\\n' }}"
)
LITERALS = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
LITERALS |= {"llama2": ("<s>", "</s>"), "gemma": ("<s>", "</s>")}
WORDS = ["the", "fox", "", "jumps\nover", "größer", "12", "dogs,", "猫", "ends", "hi"]


def draw_talks(seed, count):
    random = np.random.default_rng(seed)
    talks = []
    for _ in range(count):
        roles = ["system"] * random.integers(2) + [
            "user",
            "assistant",
        ] * random.integers(1, 4)
        texts = [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in roles]
        turns = zip(roles, texts, strict=True)
        talks.append(
            [{"role": role, "content": text.strip() or "hi"} for role, text in turns]
        )
    return talks


def open_both(folder, name, template):
    write_checkpoint(folder, name)
    start, end = LITERALS[name]
    written = template.replace("BEGIN", start).replace("END", end)
    (folder / "chat_template.jinja").write_text(written)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return import_tokenizer(folder), theirs


def encode_there(tokenizer, talk):
    options = {
        "return_assistant_tokens_mask": True,
        "return_dict": True,
        "tokenize": True,
    }
    encoding = tokenizer.apply_chat_template(talk, **options)
    return encoding["input_ids"], [bool(mark) for mark in encoding["assistant_masks"]]


@pytest.mark.parametrize("name", LITERALS)
@pytest.mark.parametrize("marked", [True, False])
def test_masks_are_transformers(tmp_path, name, marked):
    ours, theirs = open_both(tmp_path, name, MARKED if marked else TO_THE_END)
    if not marked:
        plain = TO_THE_END.replace("{% generation %}", "").replace(
            "{% endgeneration %}", ""
        )
        (tmp_path / "plain").mkdir()
        ours, _ = open_both(tmp_path / "plain", name, plain)
    for talk in draw_talks(0, 20):
        assert encode_conversation(ours, talk) == encode_there(theirs, talk)


@pytest.mark.parametrize(
    ("seed", "most"), [(0, None), (1, 1), (2, None), (3, 2), (4, None)]
)
def test_loss_and_gradient_are_those_of_unlearnt_labels(tmp_path, seed, most):
    ours, theirs = open_both(tmp_path, "smollm2", TO_THE_END)
    talks = draw_talks(seed, 6)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    encoded = [encode_there(theirs, talk) for talk in talks]
    size = max(len(ids) for ids, _ in encoded)

    vocab = max(ours.vocab_size, 300)
    settings = dict(tiny.CASES["llama"][1]) | {"vocab_size": vocab}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**settings)
    config._attn_implementation = "eager"
    model = tiny.randomize(transformers.LlamaForCausalLM(config).eval())
    padded = {
        name: np.full((6, size), fill)
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    for i, (ids, mask) in enumerate(encoded):
        padded["input_ids"][i, : len(ids)] = ids
        padded["labels"][i, : len(ids)] = np.where(mask, ids, -100)
    padded["attention_mask"] = np.arange(size) < [[len(ids)] for ids, _ in encoded]
    want = model(
        **{name: torch.tensor(np.int64(array)) for name, array in padded.items()}
    ).loss
    want.backward()

    model.save_pretrained(tmp_path / "model")
    values, tensors = compare.tensors_of(tmp_path / "model")
    family, model_config = compare.read(values, tensors)
    entries = family.list_entries(model_config)
    mesh = compare.one_device()
    gradients = {
        name: p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    expected = compare.parameters(
        model_config, entries, {n: gradients[n] for n in tensors}
    )
    built = model_config.build(
        rules=ShardingConfig().compute.for_mesh(dict(mesh.shape)), dtype=jnp.float32
    )
    task = SftTask(files=(str(path),), examples_per_row=most)
    loader = LoaderConfig(seq_len=2 * size, batch_size=6, shuffle=False)
    inputs = SourceInputs(loader, 0, None, ours)  # type: ignore[arg-type]
    source = task.batch_source(inputs)
    batch = source.rows(0, range(source.rows_per_epoch))

    def loss(params, batch):
        models = TaskModels(bind(built, params))
        total, sums = task.loss(models, batch, jax.random.key(0))
        return total / sums["tokens"]

    with jax.set_mesh(mesh):
        params = compare.placed(
            compare.parameters(model_config, entries, tensors), mesh
        )
        got, gradient = jax.jit(jax.value_and_grad(loss))(
            params, jax.tree.map(jnp.asarray, batch)
        )
    assert float(got) == pytest.approx(want.item(), rel=1e-5)
    got_gradient = flatten_names(jax.device_get(gradient))
    a, b = (
        np.concatenate([np.ravel(tree[n]) for n in expected])
        for tree in (got_gradient, expected)
    )
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99999
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-4)
