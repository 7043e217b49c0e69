"""`maxlm smoke` passes what works, whatever the model, and fails what does not."""

from typing import Any

import jax
import pytest

from maxlm.cli.main import main
from maxlm.config import load_config
from maxlm.config.assets import list_shipped_configs
from maxlm.programs import smoke as smoke_program
from maxlm.programs.setup import Setup
from maxlm.programs.smoke import shrink_config, smoke
from maxlm.run import RunConfig
from maxlm.train.checkpoint import FolderTier

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


def read(name: str) -> RunConfig:
    return load_config(RunConfig, name, ["compilation_cache=null"]).value


def _feed_forward(run: RunConfig) -> tuple[str, Any]:
    """A model's MLP, or the experts in its place."""
    return ("mlp", run.model.mlp) if run.model.mlp else ("moe", run.model.moe)


def structure(run: RunConfig) -> str:
    """What a family's sizes have in common: all but widths, numbers of heads and constants."""
    small = shrink_config(run, 1)
    model, heads = small.model, small.model.attention
    name_of, layer = _feed_forward(small)
    same = {"num_heads": 1, "num_kv_heads": 1, "scale": heads.scale and 1.0}
    scaling = model.positions.scaling
    alike = {
        "d_model": 1,
        "attention": heads.model_copy(update=same),
        name_of: layer.model_copy(update={"d_ff": 1}),
        "norm": model.norm.kind,
        "positions": (model.positions.kind, scaling and scaling.kind),
        "embedding_scale": model.embedding_scale == 1,
        "logit_scale": model.logit_scale == 1,
    }
    shared = (heads.num_kv_heads == 1, heads.num_kv_heads == heads.num_heads)
    train = (small.train.micro_batches, small.train.ema_decay, small.data.packing)
    optimizer = (small.optimizer.kind, small.task, small.sharding)
    return str((vars(model.model_copy(update=alike)), shared, train, optimizer, run.compute_dtype))


def distinct() -> list[str]:
    """One shipped config of each structure."""
    return list({structure(read(name)): name for name in list_shipped_configs()}.values())


@pytest.mark.parametrize("name", distinct())
def test_every_shipped_config_passes(name):
    run = read(name)
    checks = list(smoke(run, jax.devices()[:1]))
    # An encoder continues nothing.
    made = CHECKS[:-1] if run.model.architecture == "encoder" else CHECKS
    assert [check.name for check in checks] == made
    assert [check for check in checks if not check.passed] == []


def test_it_passes_on_all_devices_and_says_so(capsys):
    assert main(["smoke", "smollm2_135m", "compilation_cache=null"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["pass  "] * len(CHECKS)
    assert all(line.startswith(f"pass  {name}") for line, name in zip(lines, CHECKS, strict=True))
    assert lines[0].endswith("on 8 device(s)")
    assert last == "smollm2_135m: works"


def failed(name: str) -> list[str]:
    return [check.name for check in smoke(read(name), jax.devices()[:1]) if not check.passed]


def test_a_step_that_learns_nothing_fails(monkeypatch, capsys):
    step_function = Setup.step_function

    def broken(self):
        step = step_function(self)

        def forgetful(state, batch):
            params = jax.tree.map(lambda p: p.copy(), state.params)
            new, metrics = step(state, batch)
            return type(new)(new.step, params, new.opt_state, new.ema), metrics

        return forgetful

    monkeypatch.setattr(Setup, "step_function", broken)
    first = jax.devices()[:1]
    monkeypatch.setattr(smoke_program.jax, "devices", lambda: first)
    assert main(["smoke", "llama3_8b", "compilation_cache=null"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[6:40].strip() for line in lines if line.startswith("FAIL")] == ["the loss falls"]
    assert last == "llama3_8b: 1 checks failed"


def test_a_checkpoint_that_loses_something_fails(monkeypatch):
    restore = FolderTier.restore

    def lossy(self, step, abstract):
        state = restore(self, step, abstract)
        params = jax.tree.map(lambda p: p * (1 + 1e-3), state.params)
        return type(state)(state.step, params, state.opt_state, state.ema)

    monkeypatch.setattr(FolderTier, "restore", lossy)
    assert failed("llama3_8b") == [
        "a checkpoint restores bit for bit",
        "restored steps repeat exactly",
    ]


def turned(positions: Any) -> dict[str, Any]:
    """Positions, with no more of a rotary size than whether there is one."""
    return positions.model_dump() | {"rotary_dim": positions.rotary_dim is None}


@pytest.mark.parametrize("name", list_shipped_configs())
@pytest.mark.parametrize("devices", [1, 8])
def test_shrinking_keeps_the_structure(name, devices):
    run = read(name)
    small = shrink_config(run, devices)
    assert small.model.num_layers <= 2
    assert small.model.d_model <= 256
    assert small.data.batch_size % devices == 0
    sizes = {"vocab_size", "num_layers", "d_model", "max_seq_len", "attention", "mlp", "moe"}
    sizes |= {"encoder_layers", "logit_scale"}
    kept = set(type(run.model).model_fields) - sizes - {"positions", "pattern"}
    assert small.model.model_dump(include=kept) == run.model.model_dump(include=kept)
    by_width = run.model.logit_scale == pytest.approx(run.model.d_model**-0.5, rel=1e-3)
    same = small.model.d_model**-0.5 if by_width else run.model.logit_scale
    assert small.model.logit_scale == pytest.approx(same)
    for trunk, was in zip(small.model.trunks, run.model.trunks, strict=True):
        assert trunk.depth == min(was.depth, 2)
    assert turned(small.model.positions) == turned(run.model.positions)
    assert [bool(kind.window) for kind in small.model.pattern] == [
        bool(kind.window) for kind in dict.fromkeys(run.model.pattern)
    ]
    was, now = run.model.attention, small.model.attention
    assert now.bias == was.bias
    assert (now.num_kv_heads == 1) == (was.num_kv_heads == 1)
    group = was.num_heads // was.num_kv_heads
    assert now.num_heads // now.num_kv_heads == min(group, 8)
    assert now.num_heads * now.head_dim == small.model.d_model
    of_mlp, of_moe = (run.model.mlp, small.model.mlp), (run.model.moe, small.model.moe)
    for wide, narrow in (of_mlp, of_moe):
        assert (narrow is None) == (wide is None)
        if wide is None or narrow is None:
            continue
        as_wide = wide.d_ff / run.model.d_model * small.model.d_model
        assert narrow.d_ff == pytest.approx(as_wide, abs=4)  # a multiple of 8
        of_experts = {"num_experts", "experts_per_token", "groups", "groups_per_token"}
        kept = set(type(wide).model_fields) - of_experts - {"d_ff"}
        assert narrow.model_dump(include=kept) == wide.model_dump(include=kept)
    for part in ("task", "optimizer", "sharding", "compute_dtype", "seed"):
        assert getattr(small, part) == getattr(run, part)
    assert small.data.packing == run.data.packing


def test_every_setting_of_a_run_can_be_smoked():
    settings = [
        "compilation_cache=null",
        "optimizer.kind=muon",
        "train.ema_decay=0.9",
        "train.micro_batches=2",
        "data.batch_size=8",
        "data.packing=best_fit",
        "task.z_loss=1e-4",
    ]
    run = load_config(RunConfig, "smollm2_135m", settings).value
    small = shrink_config(run, 1)
    assert small.train.ema_decay == 0.9
    assert small.train.micro_batches == 2
    assert [c.name for c in smoke(run, jax.devices()[:1]) if not c.passed] == []
