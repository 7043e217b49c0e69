"""A plan's report works in a browser, and shows the plan's figures and JAX's own
shards."""

import json
from dataclasses import asdict
from math import prod
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.config.load import load_config
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.plan.served_model import ServingOptions
from maxlm.plan.serving import search_serving
from maxlm.plan.show import format_bytes, format_seconds
from maxlm.run.config import RunConfig
from maxlm.sharding import MESH_AXES

RUNS = {
    "llama3_8b": ("h100x64", ()),
    "mixtral_8x7b": ("v5p-128", ("mesh.expert=8", "train.micro_batches=4")),
    "llama3_405b": (
        "v5p-8192",
        ("mesh.tensor=8", "sharding.compute.residual=[context,tensor]"),
    ),
}


def make(name: str, machine: str | None = None, *settings: str) -> dict[str, Any]:
    config = load_config(RunConfig, name, list(settings)).value
    sizes = {axis: 2 if axis in ("data", "fsdp", "tensor") else 1 for axis in MESH_AXES}
    where = Machine.from_name(machine) if machine else None
    plan = plan_run(config, where, sizes=None if machine else sizes)
    return json.loads(json.dumps(plan.to_json()))


@pytest.fixture(params=RUNS)
def plan(request) -> dict[str, Any]:
    machine, settings = RUNS[request.param]
    return make(request.param, machine, *settings)


def visible(report, table: str) -> list[list[str]]:
    rows = report.page.evaluate(
        "id => [...document.querySelectorAll(`#${id} tbody tr`)].filter(r => "
        "r.offsetParent)"
        ".map(r => [...r.cells].map(c => c.innerText))",
        table,
    )
    return [[cell.replace("\u00a0", " ") for cell in row] for row in rows]


def slices(shape: list[int], index: tuple[slice, ...]) -> str:
    """``[:, 0:4]``, as the page writes them."""
    parts = []
    for size, part in zip(shape, index, strict=True):
        start, stop, _ = part.indices(size)
        parts.append(":" if (start, stop) == (0, size) else f"{start}:{stop}")
    return f"[{', '.join(parts)}]"


def test_the_headline_has_the_plans_figures(open_report, plan):
    report = open_report(plan)
    head = report.text("header")
    assert report.text("h1") == plan["name"]
    assert plan["machine"]["words"] in head
    assert f"Fits: {format_bytes(plan['memory']['margin'])}" in head
    assert format_bytes(plan["memory"]["total"]) in head
    for mfu in ("mfu", "mfu_full_attention"):
        assert f"{100 * plan['time'][mfu]:.1f}%" in head
    for note in plan["notes"]:
        assert note in head
    for error in plan["known_time_errors"]:
        assert f"{error['plans']} {error['deviation']}" in report.text(
            "#known-time-errors"
        )
    warnings = report.page.locator("#known-time-errors").count()
    assert warnings == (1 if plan["known_time_errors"] else 0)
    assert f"The peak is at {plan['memory']['peak_at']}." in report.text("#memory")


def test_figures_read_as_on_the_terminal(open_report):
    page = open_report(make("llama3_8b")).page
    numbers = [
        2**e * k / 100 for e in range(0, 44, 3) for k in (25, 98, 99.94, 99.96, 1225)
    ]
    for name, python in (
        ("humanBytes", format_bytes),
        ("humanSeconds", format_seconds),
    ):
        values = numbers if python is format_bytes else [n / 2**18 for n in numbers]
        shown = page.evaluate(f"values => values.map(maxlmReport.{name})", values)
        assert [text.replace("\u00a0", " ") for text in shown] == [
            python(v) for v in values
        ]


def test_a_parameter_is_found_and_shown(open_report, plan):
    report = open_report(plan)
    page = report.page
    devices = plan["devices"]
    row = next(row for row in plan["rows"] if "attention.out" in row["path"])
    page.fill("#search", "heads out")
    assert row["path"] in page.inner_text("#tensor")
    assert "norm" not in page.inner_text("#tensor")
    page.fill("#search", "")
    page.select_option("#tensor", label=row["path"])
    ways = [prod(plan["mesh"][axis] for axis in axes) for axes in row["spec"]]
    shard = [size // way for size, way in zip(row["shape"], ways, strict=True)]
    chosen = report.text("#chosen")
    assert f"{prod(ways):,} shards of {shard}" in chosen
    assert format_bytes(row["bytes_per_device"]) in chosen
    assert (
        "one copy" if row["replicas"] == 1 else f"{row['replicas']} copies"
    ) in chosen

    page.focus("#all canvas")
    page.keyboard.press("End")
    assert report.text("#held").startswith(f"Device {devices - 1} (")
    last = tuple(slice(n - s, n) for n, s in zip(row["shape"], shard, strict=True))
    assert report.text("#held").endswith(slices(row["shape"], last))
    page.mouse.move(0, 0)
    page.hover("#all canvas", position={"x": 3, "y": 3})
    assert report.text("#held").startswith("Device 0 (")
    # A cell that is pointed at is the cell that is drawn there.
    axis = next(axis for axis in reversed(plan["mesh"]) if plan["mesh"][axis] > 1)
    page.fill(f"#at-{axis}", "3")
    assert report.text("#held").startswith("Device 3 (")


def test_tables_filter_sort_and_add_up(open_report, plan):
    report = open_report(plan)
    page = report.page
    page.fill("#sent-table-filter", "all-gather backward")
    all_gathers = [c for c in plan["collectives"] if c["kind"] == "all-gather"]
    matching = [c for c in all_gathers if c["phase"] == "backward"]
    rows = visible(report, "sent-table")
    assert sorted(row[0] for row in rows) == sorted(c["what"] for c in matching)
    assert f"{len(matching)} of {len(plan['collectives'])} rows" in report.text("#sent")
    total = format_bytes(sum(c["sent_bytes"] for c in matching))
    assert total in report.text("#sent-table tfoot")

    for direction in ("ascending", "descending"):
        page.get_by_role("button", name="Sent").click()
        assert (
            page.get_attribute("#sent-table th:has-text('Sent')", "aria-sort")
            == direction
        )
        sent = sorted(
            (c["sent_bytes"] for c in matching), reverse=direction == "descending"
        )
        assert [row[8] for row in visible(report, "sent-table")] == [
            format_bytes(s) for s in sent
        ]

    assert format_bytes(plan["parameter_bytes"]) in report.text(
        "#parameters-table tfoot"
    )
    page.click("#parameters-table button:has-text('final_norm.scale')")
    assert "final_norm.scale" in report.text("#chosen")
    assert "whole on every device" in report.text("#chosen")
    page.emulate_media(media="print")  # paper shows all rows
    assert len(visible(report, "parameters-table")) == len(plan["rows"])


def test_it_fits_a_phone(open_report, plan):
    wide, there = open_report(plan, width=360, color_scheme="dark").page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= there


def test_the_page_computes_what_the_plan_does(open_report, plan):
    page = open_report(plan).page
    good = plan["goodput"]
    time = plan["time"]
    drawn = page.evaluate("maxlmReport.schedule(maxlmReport.plan)")
    lane = [b["seconds"] for b in drawn["blocks"] if b["lane"] == "computation"]
    links = [b["seconds"] for b in drawn["blocks"] if b["lane"] != "computation"]
    assert (sum(lane), drawn["total"]) == pytest.approx((time["step"], time["step"]))
    # Collectives that send nothing are not listed, though their latency counts.
    assert sum(links) == pytest.approx(time["communication"], rel=1e-3)
    for name, share in (
        ("best_interval", "best"),
        ("configured_interval", "configured"),
    ):
        drawn = page.evaluate(
            "([t, g]) => maxlmReport.progress(t, g.mtbf_hours * 3600, "
            "g.checkpoint_seconds,"
            " g.restart_seconds)",
            [good[f"{name}_seconds"], good],
        )
        assert drawn == pytest.approx(good[share])


def test_shards_are_where_jax_puts_them(open_report):
    """On data=2, fsdp=2, tensor=2; rows with two axes on one dimension, in both orders,
    besides."""
    plan = make("llama3_8b")
    # Rows of which one dimension is sharded by two axes of the mesh, in either order.
    for n, axes in enumerate(
        (["fsdp", "tensor"], ["tensor", "fsdp"], ["tensor", "data"])
    ):
        changes = {
            "path": f"two.{n}",
            "spec": [axes, []],
            "shape": [16, 6],
            "axes": ["vocab", "embed"],
            "bytes_per_device": 96,
            "replicas": 2,
        }
        plan["rows"].append(plan["rows"][0] | changes)
    report = open_report(plan)
    page = report.page
    sizes = plan["mesh"]
    assert prod(sizes.values()) == 8
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(*sizes.values()), tuple(sizes))
    for row in plan["rows"]:
        spec = PartitionSpec(*(tuple(axes) or None for axes in row["spec"]))
        shape = tuple(row["shape"])
        indices_by_device = NamedSharding(mesh, spec).devices_indices_map(shape)
        expected = [
            slices(row["shape"], indices_by_device[device])
            for device in mesh.devices.flat
        ]
        page.select_option("#tensor", label=row["path"])
        page.focus("#all canvas")
        page.keyboard.press("Home")
        shown = []
        for _ in expected:
            shown.append(report.text("#held").partition(": ")[2])
            page.keyboard.press("ArrowRight")
        assert shown == expected, row["path"]
        # One colour and number for one piece, and no other.
        numbers = page.evaluate(
            "maxlmReport.shardMap(maxlmReport.state.row, maxlmReport.plan.mesh)"
        )
        assert len(set(zip(numbers, expected, strict=True))) == len(set(expected))
        assert set(numbers) == set(range(len(set(expected))))


def test_without_a_machine_there_are_bytes_alone(open_report):
    plan = make("llama3_8b")
    report = open_report(plan)
    total = format_bytes(plan["memory"]["total"])
    assert f"Needs {total} a device" in report.text("header")
    assert "Times need a machine" in report.text("#step")


def test_stages_have_a_strip_each_and_idle_time(open_report):
    settings = (
        "mesh.stage=4",
        "mesh.tensor=2",
        "train.micro_batches=16",
        "parallel.schedule=1f1b",
    )
    report = open_report(make("llama3_8b", "h100x64", *settings))
    assert report.page.locator(".strip canvas").count() == 4
    assert "idle in the pipeline" in report.text("#step")


def test_a_run_that_does_not_fit_says_so_beside_the_compilers_verdict(open_report):
    plan = make("llama3_405b", "v5e-256")
    words = "does not fit: the compiler finds no room"
    report = open_report(
        {**plan, "compiled": {"fits": False, "words": words, "figures": {}}}
    )
    assert f"Does not fit: {format_bytes(-plan['memory']['margin'])}" in report.text(
        "header"
    )
    assert report.text("#compiled") == f"✗ Compiled, it {words}"
    assert report.page.is_visible("#memory .limit")


@pytest.mark.parametrize("width", [1200, 400])
def test_a_page_of_serving_plots_every_number_of_sequences(open_report, width):
    config = load_config(RunConfig, "models/llama3_1_8b").value
    machine = Machine.from_name("h100x8")
    options = ServingOptions(tpot_ms=30)
    (plan,), _ = search_serving(config, machine, options, tensor=2)
    report = open_report(json.loads(json.dumps(asdict(plan))), width)
    assert f"{plan.max_batch:,} sequences at most" in report.text("#fits")
    for plot in ("#rates", "#latencies"):
        assert report.page.locator(f"{plot} circle").count() == len(plan.curve)
    assert [row[2] for row in visible(report, "points-table")] == [
        format_seconds(point.tpot_seconds) for point in plan.curve
    ]
    assert report.page.evaluate("document.documentElement.scrollWidth") == width
