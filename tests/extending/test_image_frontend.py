"""A frontend of images, and a task on them, as an external package writes them: they
train, resume, load and generate as any model does."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.build_context import BuildContext
from maxlm.models.frontends import (
    FRONTENDS,
    FrontendConfig,
    InputVectors,
    ItemArraySpec,
    RegisteredFrontend,
)
from maxlm.models.layers.linear import Linear
from maxlm.models.params import bind, flatten_names
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig
from maxlm.run.load import load_run
from maxlm.tasks import TASKS, SourceInputs
from maxlm.tasks.text import TokenPredictionTask
from maxlm.train.program import train_model
from tests.train import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]

PATCHES = 3


class ImagesConfig(FrontendConfig):
    kind: Literal["images"] = "images"
    patch_size: int = 10
    width: int = 20

    @property
    def vectors_per_item(self) -> int:
        return PATCHES

    def item_arrays(self) -> Mapping[str, ItemArraySpec]:
        return {"images": ItemArraySpec((PATCHES, self.patch_size))}


class Images(nnx.Module):
    """``down(gelu(up(patch)))`` of each patch of an image."""

    def __init__(self, config: ImagesConfig, context: BuildContext):
        hidden = {"mlp": config.width}
        self.up = Linear({None: config.patch_size}, hidden, context, bias=True)
        self.down = Linear(hidden, {"embed": context.d_model}, context, bias=True)

    def encode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        images = arrays["images"]  # [B, images, PATCHES, patch size]
        num_rows, num_images, _, patch_size = images.shape
        patches = images.reshape(num_rows, num_images * PATCHES, patch_size)
        hidden = jax.nn.gelu(self.up(patches, seq_axis=None))
        return self.down(hidden, seq_axis=None)


FRONTENDS.register("images", RegisteredFrontend(ImagesConfig, Images))


@dataclass(frozen=True)
class CaptionSource:
    """Rows of two captions, each behind its image; pure in (seed, step, row)."""

    frontend: ImagesConfig
    seq_len: int
    seed: int
    num_steps: None = None

    def rows(self, step: int, row_numbers: Sequence[int], /) -> dict[str, np.ndarray]:
        rows = [self.make_row(step, int(number)) for number in row_numbers]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def make_row(self, step: int, number: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self.seed, step, number))
        row = {
            name: np.zeros(array.shape, array.dtype)
            for name, array in self.frontend.batch_arrays(self.seq_len).items()
        }
        row |= {
            name: np.zeros(self.seq_len, np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        }
        start = 0
        for document in range(2):
            # The brighter an image, the larger the ids of its caption.
            brightness = int(random.integers(4))
            shape = (PATCHES, self.frontend.patch_size)
            row["frontend.images"][document] = brightness - random.random(shape)
            placeholders = [self.frontend.placeholder_id] * PATCHES
            caption = [70 + brightness, 80 + brightness, 90 + brightness]
            ids = [65, *placeholders, *caption]
            stop = start + len(ids) - 1
            row["tokens"][start:stop] = ids[:-1]
            row["targets"][start:stop] = ids[1:]
            row["segment_ids"][start:stop] = document + 1
            row["positions"][start:stop] = np.arange(stop - start)
            start = stop
        row["weights"] = (row["segment_ids"] > 0).astype(np.float32)
        numbers = self.frontend.number_vectors(row["tokens"])
        row["frontend.vector_numbers"] = numbers
        return row


@TASKS.register("captions")
class CaptionTask(TokenPredictionTask):
    """Predicts captions from images."""

    reads_text: ClassVar[bool] = False
    reads_frontend: ClassVar[bool] = True

    kind: Literal["captions"] = "captions"

    def batch_source(self, inputs: SourceInputs) -> CaptionSource:
        assert isinstance(inputs.frontend, ImagesConfig)
        return CaptionSource(inputs.frontend, inputs.loader.seq_len, inputs.seed)


SEQ = 16
FRONTEND = {"kind": "images", "placeholder_id": 303, "width": 12, "max_items": 2}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TokenizerConfig(vocab_size=300), [tiny.TEXT * 9]).save(folder)
    return str(folder)


@pytest.fixture
def make_config(tmp_path, tokenizer_folder):
    """``make_config(name, steps, **parts)``: a run on images."""

    def make(name: str, steps: int, **parts: Any) -> RunConfig:
        settings = tiny.settings(tmp_path, "") | {"name": name, "seed": 3}
        settings["model"] |= {"frontend": FRONTEND, "embedding_scale": 3.0}
        settings["tokenizer"] = {"path": tokenizer_folder}
        settings["data"] = {"seq_len": SEQ, "batch_size": 8, "workers": 0}
        settings |= {"task": {"kind": "captions"}, "train": {"steps": steps}}
        settings |= {"checkpoint": {"every_steps": 2}, "compute_dtype": "float32"}
        settings |= {"reporting": {"tensorboard": False}}
        return RunConfig.model_validate(settings | parts)

    return make


train = partial(train_model, say=lambda _: None)


@pytest.mark.more
def test_a_run_trains_resumes_loads_and_generates_what_it_sees(
    make_config, tmp_path, capsys
):
    whole = train(make_config("whole", 4))
    losses = [record["loss"] for record in tiny.read_metrics(whole.folder)]
    assert losses[-1] < losses[0] - 0.5
    before = flatten_names(whole.setup.init_train_state().params)
    after = flatten_names(whole.state.params)
    frontend_names = [name for name in after if name.startswith("frontend.")]
    assert len(frontend_names) == 4
    for name in frontend_names:  # patches reach the loss
        assert not np.array_equal(before[name], after[name]), name

    # A run that was killed before its last checkpoint.
    other = shutil.copytree(whole.folder, whole.folder.with_name("cut"))
    shutil.rmtree(other / "checkpoints" / "4")
    cut = train(make_config("cut", 4))
    assert cut.start_step == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.state, cut.state))

    saved = load_config(RunConfig, whole.folder / "config.yaml").value
    assert saved.model.frontend == ImagesConfig.model_validate(FRONTEND)
    loaded = load_run(whole.folder)
    params = flatten_names(loaded.params)
    for name in frontend_names:
        np.testing.assert_array_equal(params[name], after[name])
    check_generation(loaded)

    # The command finds the kind as this program has registered it.
    dark, bright = tmp_path / "dark.npz", tmp_path / "bright.npz"
    np.savez(dark, images=np.zeros((1, PATCHES, 10)))
    np.savez(bright, images=np.full((1, PATCHES, 10), 9.0))
    command = ["generate", str(whole.folder), "A", "--temperature=0"]
    command.append("--max-new-tokens=4")
    texts = []
    for options in ([], [f"--items={dark}"], [f"--items={bright}"]):
        assert main([*command, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("A") for text in texts)
    assert texts[1] != texts[2]


def check_generation(loaded: Any) -> None:
    """Greedy tokens of the engine, whose prompts come in chunks, are the likeliest of a
    full forward pass; other images give other tokens, whatever a cache holds."""
    prompt = [65, 66, *[303] * (2 * PATCHES), 70, 80, 65, *[303] * PATCHES]
    random = np.random.default_rng(0)
    images = [random.normal(size=(3, PATCHES, 10)) for _ in range(2)]
    settings = EngineConfig(
        max_sequences=2, max_length=32, page_size=4, prefill_tokens=8
    )
    engine = Engine(loaded.model, loaded.params, settings)
    sampling = SamplingConfig(temperature=0, max_new_tokens=5)

    def likeliest(prompt: list[int], images: np.ndarray) -> np.ndarray:
        tokens = jnp.asarray([prompt], jnp.int32)
        with jax.set_mesh(loaded.mesh):
            model = bind(loaded.model, loaded.params)
            vectors = model.encode_items({"images": jnp.asarray(images[None], "f4")})
            numbers = loaded.config.model.frontend.number_vectors(np.asarray(tokens))
            positions = jnp.arange(len(prompt))[None]
            hidden, _ = model(
                tokens, positions, None, InputVectors(vectors, jnp.asarray(numbers))
            )
            return np.asarray(model.logits(hidden)[0].argmax(-1))

    generated = []
    for name in ("first", "second", "first"):
        items = {"images": images[name == "second"]}
        request = GenerationRequest("a", tuple(prompt), sampling, items=items)
        outputs = list(engine.run([request]))
        tokens = [token for output in outputs for token in output.token_ids]
        predicted = likeliest([*prompt, *tokens], items["images"])
        assert tokens == predicted[len(prompt) - 1 : -1].tolist()
        generated.append((tokens, outputs[0].num_cached_tokens))
    # The first page has a placeholder: only the same image shares it.
    assert [num_cached for _, num_cached in generated] == [0, 0, 12]


@pytest.mark.more
@pytest.mark.parametrize(
    "parts",
    [
        {"mesh": {"data": 2, "tensor": 2}},
        {"mesh": {"fsdp": 4, "context": 2}},
        {"mesh": {"data": 2, "stage": 2}, "parallel": {"schedule": "circular"}},
        {"mesh": {"data": 2, "stage": 2}, "parallel": {"schedule": "1f1b"}},
    ],
    ids=["tensor", "context", "circular", "1f1b"],
)
def test_a_mesh_trains_as_one_device_does(parts, make_config):
    train_settings = {
        "train": {"steps": 2, "micro_batches": 2},
        # Two rows of a micro-batch on each of eight devices.
        "data": {"seq_len": SEQ, "batch_size": 16, "workers": 0},
        "sharding": {"max_unsharded": 1.0},
    }
    one = train(make_config("one", 2, **train_settings))
    many = train(make_config("many", 2, **train_settings, **parts))
    for (step, expected), (_, result) in zip(
        tiny.read_results(one.folder), tiny.read_results(many.folder), strict=True
    ):
        for name in expected:
            assert result[name] == pytest.approx(expected[name], rel=2e-5), (step, name)


@pytest.mark.more
def test_a_run_may_start_from_a_model_of_text_and_train_the_frontend_alone(
    make_config, tmp_path, tokenizer_folder
):
    tiny.write_text(tmp_path / "text")
    settings = tiny.settings(tmp_path, str(tmp_path / "text")) | {"name": "base"}
    settings["model"] |= {"embedding_scale": 3.0}
    settings |= {"tokenizer": {"path": tokenizer_folder}, "train": {"steps": 1}}
    settings["compute_dtype"] = "float32"
    base = train(RunConfig.model_validate(settings))
    parts = {"steps": 2, "start_from": str(base.folder), "trainable": ["frontend.*"]}
    tuned = train(make_config("tuned", 2, train=parts))
    before = flatten_names(base.state.params)
    fresh = flatten_names(tuned.setup.init_train_state().params)
    for name, value in flatten_names(tuned.state.params).items():
        if name.startswith("frontend."):
            assert name not in before
            assert not np.array_equal(value, fresh[name]), name
        else:
            np.testing.assert_array_equal(value, before[name])


def test_the_plan_counts_the_frontend(make_config):
    config = make_config("plan", 1)
    plain_model = config.model.model_copy(update={"frontend": None})
    plain = config.model_copy(update={"model": plain_model})
    machine = Machine.from_name("h100x1")
    plan = plan_run(config, machine)
    plain_plan = plan_run(plain, machine)
    num_weights = 10 * 12 + 12 * 32
    added = plan.layout.parameters - plain_plan.layout.parameters
    assert added == num_weights + 12 + 32
    # Two images a row, of PATCHES patches each, which every matrix maps.
    flops = plan.layout.flops_per_token - plain_plan.layout.flops_per_token
    assert flops == pytest.approx(6 * num_weights * 2 * PATCHES / SEQ)
    bytes_of_images = 8 * 2 * PATCHES * 10 * 4
    bytes_of_numbers = 8 * SEQ * 4
    assert plan.memory.batch - plain_plan.memory.batch == (
        bytes_of_images + bytes_of_numbers
    )


def test_a_mistyped_kind_and_a_placeholder_outside_the_table_are_one_line(
    tmp_path, make_config
):
    path = tmp_path / "config.yaml"
    shutil.copy(write_config(make_config("a", 1), tmp_path), path)
    message = r"model\.frontend\.kind must be .*did you mean images\?"
    with pytest.raises(MaxlmError, match=message):
        load_config(RunConfig, path, ["model.frontend.kind=imagse"])
    message = r"frontend\.placeholder_id: 304 is no row of the model's table"
    with pytest.raises(MaxlmError, match=message):
        load_config(RunConfig, path, ["model.frontend.placeholder_id=304"])


def write_config(config: RunConfig, folder: Path) -> Path:
    from maxlm.config.show import to_yaml

    path = folder / "written.yaml"
    path.write_text(to_yaml(config))
    return path
