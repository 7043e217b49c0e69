"""Modules that predict further tokens, read from files as they are published, compute
what a float64 composition of transformers' own layers does (DeepSeek-V3, arXiv
2412.19437, §2.2), and come back bit for bit."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from maxlm.config.load import load_config  # noqa: E402
from maxlm.models.params import bind  # noqa: E402
from maxlm.run.config import RunConfig  # noqa: E402
from maxlm.run.convert import convert  # noqa: E402
from maxlm.sharding import AxisRules  # noqa: E402
from tests.parity import compare, tiny  # noqa: E402

pytestmark = pytest.mark.heavy
SEQ = 13
LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class ModuleLayout:
    """Names of a module's tensors in published files."""

    layer: str = LAYER
    join: str = f"{LAYER}.eh_proj.weight"
    token_norm: str = f"{LAYER}.enorm.weight"
    hidden_norm: str = f"{LAYER}.hnorm.weight"
    output_norm: str = f"{LAYER}.shared_head.norm.weight"
    copies: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=dict)
    count_key: str = "num_nextn_predict_layers"


DEEPSEEK = ModuleLayout(
    copies={
        f"{LAYER}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{LAYER}.shared_head.head.weight": "lm_head.weight",
    }
)
WITHOUT_COPIES = ModuleLayout()
LING = ModuleLayout(output_norm=f"{LAYER}.final_layernorm.weight")
QWEN = ModuleLayout(
    layer="mtp.layers.0",
    join="mtp.fc.weight",
    token_norm="mtp.pre_fc_norm_embedding.weight",
    hidden_norm="mtp.pre_fc_norm_hidden.weight",
    output_norm="mtp.norm.weight",
    count_key="mtp_num_hidden_layers",
)
MIMO = ModuleLayout(
    layer="model.mtp.layers.{module}",
    join="model.mtp.layers.{module}.eh_proj.weight",
    token_norm="model.mtp.layers.{module}.enorm.weight",
    hidden_norm="model.mtp.layers.{module}.hnorm.weight",
    output_norm="model.mtp.layers.{module}.final_layernorm.weight",
    suffixes={"post_attention_layernorm": "pre_mlp_layernorm"},
)


@dataclass(frozen=True)
class ModuleCase:
    """A tiny model of a family and the layers of its modules, which are all alike."""

    name: str
    layout: ModuleLayout
    num_layers: int = 3
    num_modules: int = 2
    layer_types: tuple[str, ...] = ()
    """Of the model's layers, and last of the modules'."""
    mlp_types: tuple[str, ...] = ()
    """Likewise."""
    module_settings: Mapping[str, object] = field(default_factory=dict)
    """Of a model of a module's layer alone."""


ALL_SPARSE = {"first_k_dense_replace": 0}
LINEAR, FULL, LOCAL = "linear_attention", "full_attention", "sliding_attention"
CASES = {
    case.name: case
    for case in (
        ModuleCase("deepseek_v3", DEEPSEEK, module_settings=ALL_SPARSE),
        ModuleCase("glm4_moe", DEEPSEEK, num_modules=1, module_settings=ALL_SPARSE),
        ModuleCase("glm4_moe_lite", DEEPSEEK, mlp_types=("dense", "sparse", "sparse")),
        ModuleCase("deepseek_v32", DEEPSEEK, module_settings=ALL_SPARSE),
        ModuleCase(
            "glm_moe_dsa", WITHOUT_COPIES, mlp_types=("dense", "sparse", "sparse")
        ),
        ModuleCase("hy_v3", LING, mlp_types=("dense", "sparse", "sparse")),
        ModuleCase(
            "bailing_hybrid",
            LING,
            num_layers=4,
            layer_types=(LINEAR, FULL, LINEAR, LINEAR, FULL),
            module_settings=ALL_SPARSE,
        ),
        ModuleCase(
            "qwen3_next", QWEN, num_modules=1, layer_types=(LINEAR, LINEAR, FULL, FULL)
        ),
        ModuleCase(
            "qwen3_5_moe", QWEN, num_modules=1, layer_types=(FULL, LINEAR, LINEAR, FULL)
        ),
        ModuleCase(
            "qwen3_5", QWEN, num_modules=1, layer_types=(LINEAR, FULL, LINEAR, FULL)
        ),
        ModuleCase(
            "mimo_v2_flash",
            MIMO,
            layer_types=(FULL, LOCAL, FULL, LOCAL),
            mlp_types=("dense", "sparse", "sparse", "dense"),
        ),
    )
}
each_case = pytest.mark.parametrize("name", CASES)


def build(name: str, **changes: Any) -> Any:
    architecture, settings = tiny.CASES[name]
    cls = getattr(transformers, architecture)
    config = cls.config_class(**(settings | changes))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return tiny.randomize(cls(config).eval())


def list_kinds(case: ModuleCase, start: int, stop: int) -> dict[str, list[str]]:
    """Settings that name the kinds of layers from ``start`` on."""
    lists = {"layer_types": case.layer_types, "mlp_layer_types": case.mlp_types}
    settings: dict[str, list[str]] = {}
    for key, kinds in lists.items():
        if kinds:
            last = len(kinds) - 1
            settings[key] = [kinds[min(i, last)] for i in range(start, stop)]
    return settings


class Reference:
    """A model of transformers, and modules composed of its layers, in float64."""

    def __init__(self, case: ModuleCase):
        torch.manual_seed(0)
        self.case = case
        first = case.num_layers
        kinds = list_kinds(case, 0, first)
        self.model = build(case.name, num_hidden_layers=first, **kinds)
        kinds = list_kinds(case, first, first + 1)
        self.layers = [
            build(case.name, num_hidden_layers=1, **({**kinds, **case.module_settings}))
            for _ in range(case.num_modules)
        ]
        norm = self.model.model.norm
        width = self.model.config.hidden_size

        def make_norm() -> Any:
            copied = type(norm)(width, eps=self.model.config.rms_norm_eps)
            return tiny.randomize(copied)

        self.token_norms = [make_norm() for _ in self.layers]
        self.hidden_norms = [make_norm() for _ in self.layers]
        self.joins = [torch.randn(width, 2 * width) / width**0.5 for _ in self.layers]

    def save(self, folder: Path) -> None:
        """Writes a folder in bf16 as it would be published."""
        case = self.case
        layout = case.layout
        self._round()
        # Copies: in bf16 RoPE's frequencies, which are no parameters, are rounded too.
        copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(folder)
        values, _ = compare.tensors_of(folder)
        family, _ = compare.read(values)
        tensors = self._get_published(family, self.model)
        for module, layer in enumerate(self.layers):
            numbers = {"layer": case.num_layers + module, "module": module}
            stem = layout.layer.format(**numbers)
            published = self._get_published(family, layer)
            for name, tensor in published.items():
                if not name.startswith("model.layers.0."):
                    continue
                for usual, other in layout.suffixes.items():
                    name = name.replace(usual, other)
                tensors[name.replace("model.layers.0", stem)] = tensor
            pieces = {
                layout.join: self.joins[module],
                layout.token_norm: self.token_norms[module].weight.data,
                layout.hidden_norm: self.hidden_norms[module].weight.data,
                layout.output_norm: layer.model.norm.weight.data,
            }
            for name, tensor in pieces.items():
                tensors[name.format(**numbers)] = tensor.to(torch.bfloat16)
            for name, original in layout.copies.items():
                tensors[name.format(**numbers)] = tensors[original].clone()
        save_file(tensors, folder / "model.safetensors")
        values[layout.count_key] = case.num_modules
        (folder / "config.json").write_text(json.dumps(values))

    def _get_published(self, family: Any, model: Any) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
            tensors = load_file(Path(folder) / "model.safetensors")
        return compare.spell_as_published(family, tensors, tensors)

    def _round(self) -> None:
        """Rounds all to bf16, which both sides then have exactly."""
        for part in (self.model, *self.layers, *self.token_norms, *self.hidden_norms):
            with torch.no_grad():
                for tensor in part.state_dict().values():
                    tensor.copy_(tensor.to(torch.bfloat16))
        self.joins = [join.to(torch.bfloat16).float() for join in self.joins]

    def compute(self, tokens: Any) -> list[np.ndarray]:
        """Hidden states behind each module, for the tokens that it sees."""
        parts = (self.model, *self.layers, *self.token_norms, *self.hidden_norms)
        for part in parts:
            part.double()
        states: list[np.ndarray] = []
        with torch.no_grad():
            hidden = self.model.model(tokens).last_hidden_state
            for module, layer in enumerate(self.layers):
                embedded = self.model.get_input_embeddings()(tokens[:, module + 1 :])
                hidden = hidden[:, : embedded.shape[1]]
                both = [
                    self.token_norms[module](embedded),
                    self.hidden_norms[module](hidden),
                ]
                # h' = M [norm(embedding); norm(h)], in the order of the files.
                joined = torch.cat(both, dim=-1) @ self.joins[module].double().T
                hidden = layer.model(inputs_embeds=joined).last_hidden_state
                states.append(hidden.numpy())
        return states


def compute_ours(config: Any, flat: Any, tokens: np.ndarray) -> list[np.ndarray]:
    mesh = compare.one_device()
    with jax.set_mesh(mesh):
        model = config.build(rules=AxisRules(), dtype=jnp.float32)
        params = compare.placed(flat, mesh)
        ids = jnp.asarray(tokens, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

        @jax.jit
        def run(params: Any) -> list[jax.Array]:
            bound = bind(model, params)
            hidden, _ = bound(ids, positions)
            targets = jnp.roll(ids, -1, 1)
            ahead = bound.predict_ahead(
                hidden, positions, None, targets, jnp.ones(ids.shape)
            )
            return [module.hidden for module in ahead.predictions]

        return [np.asarray(x) for x in run(params)]


@each_case
def test_modules_of_files_compute_what_the_paper_says_and_come_back(name, tmp_path):
    case = CASES[name]
    reference = Reference(case)
    published, run, again = (tmp_path / part for part in ("published", "run", "again"))
    reference.save(published)
    values, tensors = compare.tensors_of(published)
    result = convert(published, run)
    assert not [note for note in result.notes if "left out: model" in note], result
    config = load_config(RunConfig, run / "config.yaml").value.model
    assert config.mtp is not None
    assert config.mtp.num_modules == case.num_modules

    convert(run, again)
    values_again, back = compare.tensors_of(again)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype, key
        assert back[key].tobytes() == tensor.tobytes(), key
    assert values_again[case.layout.count_key] == case.num_modules

    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, SEQ))
    expected = reference.compute(torch.tensor(tokens))
    family, _ = compare.read(values, tensors)
    arrays = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    flat = compare.parameters(config, family.list_entries(config, tensors), arrays)
    states = compute_ours(config, flat, tokens)
    for ahead, (ours, theirs) in enumerate(zip(states, expected, strict=True), 1):
        error = np.abs(ours[:, : SEQ - ahead] - theirs).max() / np.abs(theirs).max()
        # A delta rule before them magnifies fp32's rounding.
        assert error < (1e-4 if LINEAR in case.layer_types else 1e-5), ahead
