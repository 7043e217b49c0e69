"""Modules that predict tokens further ahead: hidden states, losses and gradients are
those of transformers' modules on the same parameters, in fp32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_layers import MtpModel  # noqa: E402

from maxlm.models.params import bind, flatten_names  # noqa: E402
from maxlm.sharding import AxisRules  # noqa: E402
from maxlm.tasks.task import TaskModels  # noqa: E402
from maxlm.tasks.text import ClmTask  # noqa: E402
from tests.parity import compare, tiny  # noqa: E402

pytestmark = pytest.mark.heavy
MODULES, SEQ = 2, 11


def build():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.CASES["llama"][1])
    config._attn_implementation = "eager"
    config.num_mtp_layers = MODULES
    main = tiny.randomize(transformers.LlamaForCausalLM(config).eval())
    return main, tiny.randomize(MtpModel(main, MODULES).eval())


# Their tensors of one module by our names within the stack ``mtp``.
MODULE_TENSORS = {
    "token_norm.scale": "enorm.weight",
    "hidden_norm.scale": "hnorm.weight",
    "join.kernel": "eh_proj.weight",
    "output_norm.scale": "post_norm.weight",
}


def compute_their_losses(main, mtp, tokens):
    """Hidden states behind each module, and the sum of all cross-entropies: the model's
    at weight 1, a module's at 0.3 / 2."""
    hidden = main.model(tokens).last_hidden_state
    logits = main.lm_head(hidden)
    entropy = partial(torch.nn.functional.cross_entropy, reduction="sum")
    total = entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    states = []
    for index in range(MODULES):
        ahead = index + 1
        inputs = tokens[:, ahead:]
        positions = torch.arange(inputs.shape[1])[None]
        hidden = mtp.forward_layer(
            index, hidden[:, : inputs.shape[1]], positions, None, input_ids=inputs
        )
        states.append(hidden)
        logits = main.lm_head(hidden)[:, :-1]
        targets = tokens[:, ahead + 1 :]
        loss = entropy(logits.flatten(0, 1), targets.flatten())
        total = total + 0.3 / MODULES * loss
    return states, total


def read_parameters(main, mtp):
    """Our config and parameters of their model and modules."""
    values = main.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    values.pop("num_mtp_layers")
    family, config = compare.read(values)
    tensors = {name: t.detach().numpy() for name, t in main.state_dict().items()}
    flat = compare.parameters(config, family.list_entries(config), tensors)
    # A model with as many layers as there are modules reads the modules' layers.
    as_layers = {}
    for name, tensor in mtp.state_dict().items():
        if ".mtp_block." in name:
            as_layers[f"model.{name.replace('.mtp_block', '')}"] = tensor.numpy()
    outer = {name: t for name, t in tensors.items() if ".layers." not in name}
    shallow = config.model_copy(update={"num_layers": MODULES})
    entries = family.list_entries(shallow)
    layers = compare.parameters(shallow, entries, outer | as_layers)
    for name, value in layers.items():
        if name.startswith("layers."):
            flat[name.replace("layers.", "mtp.", 1)] = value
    for ours, theirs in MODULE_TENSORS.items():
        stacked = [
            mtp.state_dict()[f"layers.{index}.{theirs}"].numpy()
            for index in range(MODULES)
        ]
        if ours == "join.kernel":
            stacked = [matrix.T for matrix in stacked]
        flat[f"mtp.{ours}"] = np.stack(stacked)
    changes = {"mtp": {"num_modules": MODULES}, "remat": "full"}
    return type(config).model_validate(config.model_dump() | changes), flat


def test_states_losses_and_gradients_are_those_of_transformers():
    main, mtp = build()
    config, flat = read_parameters(main, mtp)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, SEQ))
    their_states, their_loss = compute_their_losses(main, mtp, torch.tensor(tokens))
    their_loss.backward()

    mesh = compare.one_device()
    with jax.set_mesh(mesh):
        model = config.build(rules=AxisRules(), dtype=jnp.float32)
        params = compare.placed(flat, mesh)
        weights = np.ones((3, SEQ), np.float32)
        weights[:, -1] = 0
        batch = {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "targets": jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
            "positions": jnp.asarray([[*range(SEQ)]] * 3, jnp.int32),
            "segment_ids": jnp.ones((3, SEQ), jnp.int32),
            "weights": jnp.asarray(weights),
        }

        @jax.jit
        def compute(params):
            bound = bind(model, params)
            return ClmTask().loss(TaskModels(bound), batch, jax.random.key(0))

        @jax.jit
        def read_states(params):
            bound = bind(model, params)
            hidden, _ = bound(*(batch[n] for n in ("tokens", "positions")))
            ahead = bound.predict_ahead(
                hidden,
                batch["positions"],
                batch["segment_ids"],
                batch["targets"],
                batch["weights"],
            )
            return [module.hidden for module in ahead.predictions]

        states = read_states(params)
        (loss, sums), grads = jax.jit(jax.value_and_grad(compute, has_aux=True))(params)
    for ahead, (ours, theirs) in enumerate(zip(states, their_states, strict=True), 1):
        want = theirs.detach().numpy()
        # Rounding: a few numbers are 1.2e-5 apart under some options of the compiler.
        np.testing.assert_allclose(ours[:, : SEQ - ahead], want, rtol=0, atol=2e-5)
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-6)
    assert sums["tokens"] == 3 * (SEQ - 1)

    flat_grads = flatten_names(grads)
    pairs = {
        "embedding.table": main.model.embed_tokens.weight.grad,
        "final_norm.scale": main.model.norm.weight.grad,
    }
    for index in range(MODULES):
        layer = mtp.layers[index]
        pairs[f"mtp.join.kernel:{index}"] = layer.eh_proj.weight.grad.T
        pairs[f"mtp.token_norm.scale:{index}"] = layer.enorm.weight.grad
        pairs[f"mtp.mlp.up.kernel:{index}"] = layer.mtp_block.mlp.up_proj.weight.grad.T
    for name, theirs in pairs.items():
        name, _, index = name.partition(":")
        ours = np.asarray(flat_grads[name])
        if index:
            ours = ours[int(index)]
        want = theirs.numpy()
        atol = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=atol, err_msg=name)
