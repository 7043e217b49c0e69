"""The plan is what happens: its bytes add up, and are those of the arrays a run really
makes; and it says in words how a run is parallel."""

import json
from math import prod

import jax
import pytest

from maxlm.cli.main import main
from maxlm.config.assets import list_shipped_configs
from maxlm.config.load import load_config
from maxlm.models.params import flatten_names
from maxlm.plan.layout import RunLayout, compute_run_layout
from maxlm.plan.show import format_bytes, format_count
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.sharding import MESH_AXES
from tests.train import tiny


def tiny_run(mesh: dict[str, int], optimizer: str = "adamw") -> RunConfig:
    settings = tiny.settings("runs", "text")
    settings |= {"mesh": mesh, "optimizer": {"kind": optimizer}}
    return RunConfig.model_validate(settings)


def sizes(**axes: int) -> dict[str, int]:
    return {axis: axes.get(axis, 1) for axis in MESH_AXES}


def llama(**settings) -> RunConfig:
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_config(RunConfig, "llama3_8b", overrides).value


@pytest.mark.heavy
def test_a_run_makes_the_arrays_that_were_planned():
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    run = tiny_run(mesh=axes)
    setup = set_up_run(run)
    layout = compute_run_layout(run, sizes(**axes))
    state = setup.init_train_state()
    arrays = flatten_names(state.params)
    assert [row.path for row in layout.rows] == list(arrays)
    for row in layout.rows:
        array = arrays[row.path]
        assert row.shape == array.shape
        assert row.dtype == array.dtype.name
        assert row.bytes_per_device == array.addressable_shards[0].data.nbytes
        copies = sum(
            s.index == array.addressable_shards[0].index
            for s in array.addressable_shards
        )
        assert row.replicas == copies
        spec = [(p,) if isinstance(p, str) else p or () for p in array.sharding.spec]
        assert list(row.spec) == spec
    assert (
        layout.parameter_bytes
        == layout.gradient_bytes
        == bytes_on_a_device(state.params)
    )
    assert layout.optimizer_bytes == bytes_on_a_device(state.opt_state)


def bytes_on_a_device(tree) -> int:
    arrays = jax.tree.leaves(tree)
    return sum(prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


@pytest.mark.parametrize("kind", ["lion", "muon", "adafactor"])
def test_other_optimizers_lie_as_planned(kind):
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    run = tiny_run(mesh={"fsdp": 1, **axes}, optimizer=kind)
    state = set_up_run(run).abstract_state.opt_state
    assert compute_run_layout(run, sizes(**axes)).optimizer_bytes == bytes_on_a_device(
        state
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [name for name in list_shipped_configs() if not name.startswith("methods/")]
)
def test_every_shipped_config_plans(name, capsys):
    assert main(["plan", name, "--json"]) == 0  # mesh axes of -1 filled
    plan = json.loads(capsys.readouterr().out)
    assert plan["devices"] == prod(plan["mesh"].values())
    assert plan["parameters"] == sum(prod(row["shape"]) for row in plan["rows"])
    # Arrays as they lie, and formulas over sizes.
    assert plan["parameter_bytes"] == plan["memory"]["parameters"]
    assert plan["optimizer_bytes"] == plan["memory"]["optimizer"]
    assert plan["average_bytes"] == plan["memory"]["average"]
    for row in plan["rows"]:
        pieces = prod(plan["mesh"][axis] for axes in row["spec"] for axis in axes)
        assert (
            row["bytes_per_device"] * pieces
            == row["bytes_total"]
            == 4 * prod(row["shape"])
        )


# The first lines, and some of those after them, in order.
TABLES = """\
tiny · 38,048 parameters · 8 devices (fsdp=4 tensor=2)
256 tokens a step · 5.12K in the run (0.135 a parameter, 0.0067× of 20:1)
1.812e+05 FLOPs a token with causal attention at half, 1.935e+05 in full
devices, from the slowest links to the fastest: fsdp=4 → tensor=2
ZeRO-3: parameters over fsdp=4, gradients over fsdp=4, optimizer state over fsdp=4
Parameters (float32)
parameter                      layout: logical axis = size → mesh axes   bytes  a device  copies
embedding.table                vocab=304→tensor · embed=32→fsdp         38 KiB  4.75 KiB       1
layers.attention.key.kernel    layers=2 · embed=32→fsdp ·                4 KiB     512 B       1
                               kv_heads=2→tensor · head_dim=8
layers.mlp_norm.scale          layers=2 · 32                             256 B     256 B       8
what                                   bytes
optimizer state                       39,176  38.3 KiB
working set of the loss              108,032   106 KiB
  head, gathered                       9,728   9.5 KiB
  logits of a chunk                   58,368    57 KiB
together                             238,728   233 KiB
caches of one row of 32 tokens in generation: 4 KiB
what                                        kind            over    runs      sent  computation
kernels                                     all-gather      fsdp      29  34.1 KiB  can hide it
kernels: gradients                          reduce-scatter  fsdp      15  20.6 KiB  can hide it
mlp: gate, up: its gradient                 all-reduce      tensor     2     8 KiB  waits
embedding: gradient                         all-to-all      fsdp       1     3 KiB  waits
"""


def test_tables(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "96")
    config = tiny.write_config(tmp_path, "text")
    assert main(["plan", config, "--mesh", "fsdp=4,tensor=2"]) == 0
    out = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert [line for line in TABLES.splitlines() if line not in out] == []


def test_kernels_of_several_kinds_of_layers_share_a_row(capsys):
    assert main(["plan", "demo_hybrid", "--mesh", "fsdp=4"]) == 0
    out = capsys.readouterr().out
    rows = out[out.index("Communication of each device") :]
    contents = {line.split()[0] for line in rows.splitlines() if "all-gather" in line}
    assert contents == {"kernels"}


@pytest.mark.heavy
def test_words_of_tables_are_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    mesh = ["--mesh", "fsdp=8,tensor=2,context=2,expert=2"]
    for choice in mesh, ["--search"]:
        assert main(["plan", "mixtral_8x7b", "--on", "v5p-128", *choice]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    words = {word for line in out.splitlines() for word in line.split()}
    assert words >= {
        "batches",
        "residual",
        "ragged-all-to-all",
        "embedding:",
        "computation",
    }


def test_figures_for_people():
    sizes = (0, 1023, 1536, 1023 << 10, (1 << 20) - 1, 5 << 30, 3 << 50)
    texts = ["0 B", "1023 B", "1.5 KiB", "1023 KiB", "1 MiB", "5 GiB", "3072 TiB"]
    assert [format_bytes(size) for size in sizes] == texts
    counts = (12, 1500, 6.738e9, 1.5e13, 9.996e8)
    assert [format_count(count) for count in counts] == [
        "12",
        "1.5K",
        "6.74B",
        "15T",
        "1000M",
    ]


def lay_out(mesh: dict[str, int], links=None, **settings: object) -> RunLayout:
    run = llama(**{"data.batch_size": 512, **settings})
    return compute_run_layout(run, sizes(**mesh), links)


def test_axes_are_named_with_what_they_run_over():
    links = {"data": "network between slices", "fsdp": "torus of a slice"}
    assert lay_out({}).notes == ()  # one device needs no words
    notes = lay_out({"data": 2, "fsdp": 4}, links).notes
    assert notes == (
        "devices, from the slowest links to the fastest: data=2 (network between "
        "slices) → fsdp=4 "
        "(torus of a slice)",
        "ZeRO-3: parameters over fsdp=4, gradients over fsdp=4, optimizer state over "
        "fsdp=4, 2 "
        "replicas over data",
    )


WHOLE = {"embed": "null"}
SPLIT = {"embed": "fsdp"}
ZERO = {
    0: {"storage": WHOLE},
    1: {"storage": WHOLE, "gradients": WHOLE, "optimizer": SPLIT},
    2: {"storage": WHOLE, "gradients": SPLIT},
    3: {},
}


@pytest.mark.parametrize("kind", ZERO)
def test_zero_splits_what_its_number_says(kind):
    """Norms alone (4,096 · 65 fp32) are whole in any case."""
    settings = {
        f"sharding.{part}.{axis}": value
        for part, rules in ZERO[kind].items()
        for axis, value in rules.items()
    }
    ways = 8
    norms = 4096 * 65 * 4
    layout = lay_out({"fsdp": ways}, **settings, **{"sharding.max_unsharded": 1})
    whole = 4 * layout.parameters
    split = (whole - norms) // ways + norms
    assert layout.parameter_bytes == (split if kind >= 3 else whole)
    assert layout.gradient_bytes == (split if kind >= 2 else whole)
    assert layout.optimizer_bytes == 2 * (split if kind >= 1 else whole) + 8
    parts = ("parameters", "gradients", "optimizer state")[-kind:]
    over = ", ".join(f"{part} over fsdp=8" for part in parts)
    assert layout.notes[1:] == ((f"ZeRO-{kind}: {over}",) if kind else ())


def test_kv_heads_that_are_whole_on_purpose():
    settings = {
        "sharding.storage.kv_heads": "null",
        "sharding.compute.kv_heads": "null",
    }
    layout = lay_out({"tensor": 16, "fsdp": 2}, **settings)
    assert layout.notes[2] == (
        "8 kv heads are whole on every device of tensor=16, each of which computes "
        "them all and "
        "reads those of its own query heads"
    )
    (key,) = [row for row in layout.rows if row.path == "layers.attention.key.kernel"]
    assert key.replicas == 16
