"""`maxlm smoke` passes what works, whatever the model, and fails what does not."""

from dataclasses import replace
from typing import Any

import jax
import pytest

from maxlm.checkpoint.folder import FolderTier
from maxlm.cli.main import main
from maxlm.config.assets import list_shipped_configs
from maxlm.config.load import load_config
from maxlm.run.config import RunConfig
from maxlm.run.setup import RunSetup
from maxlm.train import smoke as smoke_program
from maxlm.train.smoke import shrink_config, smoke

CHECKS = [
    "parameters lie as planned",
    "the step compiles and runs",
    "losses are finite",
    "the loss falls",
    "a checkpoint restores bit for bit",
    "restored steps repeat exactly",
    "the model generates",
]


@pytest.fixture(autouse=True)
def quick_to_compile():
    """Not what is measured here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # Programs hold memory maps, of which Linux gives a process 65,530: those of 80
    # configs.
    jax.clear_caches()


# Settings that reach what is shrunk.
MORE = (
    "optimizer.kind=muon",
    "train.ema_decay=0.9",
    "train.micro_batches=2",
    "data.batch_size=8",
)


def read(name: str, *settings: str) -> RunConfig:
    return load_config(RunConfig, name, ["compilation_cache=null", *settings]).value


# `make test-more` tries a decoder, and an encoder with one, `make test-layouts` all.
FEW = ("models/deepseek_v2_lite", "models/t5_v1_1_xxl")
# Methods take their model from the one that they tune.
COMPLETE = [name for name in list_shipped_configs() if not name.startswith("methods/")]
SHIPPED = [
    pytest.param(name, marks=pytest.mark.more if name in FEW else pytest.mark.slow)
    for name in COMPLETE
]


@pytest.mark.heavy
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_passes(name, tmp_path, monkeypatch):
    (tmp_path / "corpora/demo").mkdir(parents=True)  # `make corpus-demo` makes it
    (tmp_path / "corpora/demo/a.txt").write_text("a text")
    monkeypatch.chdir(tmp_path)
    run = read(name, *(MORE if "deepseek" in name else ()))
    checks = list(smoke(run, jax.devices()[:1]))
    # An encoder continues nothing.
    names = CHECKS[:-1] if run.model.architecture == "encoder" else CHECKS
    assert [check.name for check in checks] == names
    assert [check for check in checks if not check.passed] == []


@pytest.fixture
def two_devices(monkeypatch, compiled_once):
    """All there are; both tests compile the same."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(smoke_program.jax, "devices", lambda: devices)


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.usefixtures("two_devices")
def test_it_passes_on_all_devices_and_says_so(capsys):
    assert main(["smoke", "smollm2_135m", "compilation_cache=null"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["pass  "] * len(CHECKS)
    assert all(
        line.startswith(f"pass  {name}")
        for line, name in zip(lines, CHECKS, strict=True)
    )
    assert lines[0].endswith("on 2 device(s)")
    assert last == "smollm2_135m: works"


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.usefixtures("two_devices")
def test_a_step_that_learns_nothing_and_a_checkpoint_that_loses_something_fail(
    monkeypatch, capsys
):
    jit_train_step, restore = RunSetup.jit_train_step, FolderTier.restore

    def broken(self):
        step = jit_train_step(self)

        def forgetful(state, batch):
            params = jax.tree.map(lambda p: p.copy(), state.params)
            new, metrics = step(state, batch)
            return replace(new, params=params), metrics

        return forgetful

    def lossy(self, step, abstract):
        state = restore(self, step, abstract)
        return replace(
            state, params=jax.tree.map(lambda p: p * (1 + 1e-3), state.params)
        )

    monkeypatch.setattr(RunSetup, "jit_train_step", broken)
    monkeypatch.setattr(FolderTier, "restore", lossy)
    assert main(["smoke", "smollm2_135m", "compilation_cache=null"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    failed = [line[6:40].strip() for line in lines if line.startswith("FAIL")]
    assert failed == CHECKS[3:6]
    assert last == "smollm2_135m: 3 checks failed"


def turned(positions: Any) -> dict[str, Any]:
    """Positions, with no more of a rotary size than whether there is one."""
    return positions.model_dump() | {"rotary_dim": positions.rotary_dim is None}


@pytest.mark.parametrize("name", COMPLETE)
def test_shrinking_keeps_the_structure(name):
    run = read(name)
    small = shrink_config(run, 8)
    num_kinds = len(dict.fromkeys(run.model.pattern)) + min(run.model.dense_layers, 1)
    num_layers = max(2, num_kinds)
    assert small.model.num_layers <= num_layers
    assert small.model.d_model <= 256
    assert small.data.batch_size % 8 == 0
    sizes = {
        "vocab_size",
        "num_layers",
        "encoder_layers",
        "d_model",
        "max_seq_len",
        "attention",
        "mlp",
        "moe",
        "logit_scale",
    }
    # Kinds of layers and mixers are made small each by its own rule (``shrunk``).
    sizes |= {"mixer", "kinds", "dense_layers", "layer_inputs"}
    unchanged = set(type(run.model).model_fields) - sizes - {"positions", "pattern"}
    assert small.model.model_dump(include=unchanged) == run.model.model_dump(
        include=unchanged
    )
    by_width = run.model.logit_scale == pytest.approx(run.model.d_model**-0.5, rel=1e-3)
    same = small.model.d_model**-0.5 if by_width else run.model.logit_scale
    assert small.model.logit_scale == pytest.approx(same)
    for trunk, was in zip(small.model.trunks, run.model.trunks, strict=True):
        assert trunk.num_layers == min(was.num_layers, num_layers)
    assert turned(small.model.positions) == turned(run.model.positions)
    assert small.model.dense_layers == min(run.model.dense_layers, 1)
    # Each kind once, and of the same mixers.
    assert [bool(kind.window) for kind in small.model.layer_kinds] == [
        bool(kind.window) for kind in dict.fromkeys(run.model.layer_kinds)
    ]
    mixers = [type(mixer) for mixer in run.model.list_mixers()]
    assert {type(mixer) for mixer in small.model.list_mixers()} == set(mixers)
    names, small_names = (
        {name for layer_run in model.layer_runs for name in layer_run.kind_names}
        for model in (run.model, small.model)
    )
    assert small_names == names
    if small.model.layer_inputs is not None:
        # Published tables have 262,144 rows.
        assert small.model.layer_inputs.vocab_size <= small.model.vocab_size
    was, now = run.model.attention, small.model.attention
    assert (now is None) == (was is None)
    if now is not None:
        assert now.bias == was.bias
        assert (now.num_kv_heads == 1) == (was.num_kv_heads == 1)
        group_size = was.num_heads // was.num_kv_heads
        assert now.num_heads // now.num_kv_heads == min(group_size, 8)
        assert now.num_heads * now.head_dim == small.model.d_model
    for wide, narrow in (
        (run.model.mlp, small.model.mlp),
        (run.model.moe, small.model.moe),
    ):
        assert (narrow is None) == (wide is None)
        if wide is None or narrow is None:
            continue
        as_wide = wide.d_ff / run.model.d_model * small.model.d_model
        assert narrow.d_ff == pytest.approx(as_wide, abs=4)  # a multiple of 8
        of_experts = {"num_experts", "experts_per_token", "groups", "groups_per_token"}
        of_experts |= {"shared_d_ff", "latent_dim"}
        unchanged = set(type(wide).model_fields) - of_experts - {"d_ff"}
        assert narrow.model_dump(include=unchanged) == wide.model_dump(
            include=unchanged
        )
    assert small.task == run.task.for_small_model()
    for part in ("optimizer", "sharding", "compute_dtype", "seed"):
        assert getattr(small, part) == getattr(run, part)
    assert small.data.packing == run.data.packing
