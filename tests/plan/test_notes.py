"""A plan says in words how a run is parallel, and counts what ZeRO keeps where."""

import pytest

from maxlm.config import load_config
from maxlm.plan.layout import RunLayout, lay_out_run
from maxlm.run import RunConfig
from maxlm.sharding import MESH_AXES

LINKS = {"data": "network between slices", "fsdp": "torus of a slice"}


def layout(mesh: dict[str, int], links=None, **settings: object) -> RunLayout:
    sizes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    chosen = {"data.batch_size": 512, **settings}
    config = load_config(
        RunConfig, "llama3_8b", [f"{key}={value}" for key, value in chosen.items()]
    )
    return lay_out_run(config.value, sizes, links)


def test_axes_are_named_with_what_they_run_over():
    assert layout({}).notes == ()  # one device needs no words
    notes = layout({"data": 2, "fsdp": 4}, LINKS).notes
    assert notes == (
        "devices, from the slowest links to the fastest: data=2 (network between slices) → fsdp=4 "
        "(torus of a slice)",
        "ZeRO-3: parameters over fsdp=4, gradients over fsdp=4, optimizer state over fsdp=4, 2 "
        "replicas over data",
    )


WHOLE, SPLIT = {"embed": "null"}, {"embed": "fsdp"}
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
    ways, norms = 8, 4096 * 65 * 4
    found = layout({"fsdp": ways}, **settings, **{"sharding.max_unsharded": 1})
    whole = 4 * found.parameters
    split = (whole - norms) // ways + norms
    assert found.parameter_bytes == (split if kind >= 3 else whole)
    assert found.gradient_bytes == (split if kind >= 2 else whole)
    assert found.optimizer_bytes == 2 * (split if kind >= 1 else whole) + 8
    over = ("parameters over fsdp=8", "gradients over fsdp=8", "optimizer state over fsdp=8")
    assert found.notes[1:] == ((f"ZeRO-{kind}: {', '.join(over[-kind:])}",) if kind else ())


def test_kv_heads_that_are_whole_on_purpose():
    settings = {"sharding.storage.kv_heads": "null", "sharding.compute.kv_heads": "null"}
    found = layout({"tensor": 16, "fsdp": 2}, **settings)
    assert found.notes[2] == (
        "8 kv heads are whole on every device of tensor=16, each of which computes them all and "
        "reads those of its own query heads"
    )
    (key,) = [row for row in found.rows if row.path == "layers.attention.key.kernel"]
    assert key.replicas == 16
