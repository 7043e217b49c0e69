"""A layout as tables for a terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from maxlm.plan.layout import Layout, ParamRow


def human_bytes(size: float) -> str:
    """``1.5 GiB``: three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.5:
            return f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} TiB"


def human_count(count: float) -> str:
    """``6.74B``: thousands, millions, billions, trillions."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{_three_digits(count / limit)}{unit}"
    return f"{count:.0f}"


def _three_digits(value: float) -> str:
    """Never in scientific notation."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def tables(layout: Layout) -> Group:
    """Facts, one row a parameter, and totals per device."""
    axes = " ".join(f"{axis}={size}" for axis, size in layout.mesh.items() if size > 1)
    sparse = layout.active_parameters < layout.parameters
    active = f", {layout.active_parameters:,} of them active" if sparse else ""
    facts = Text.assemble(
        (layout.name, "bold"),
        f" · {layout.parameters:,} parameters{active} · {layout.devices:,} devices"
        f" ({axes or 'one of each axis'})\n",
        f"{layout.tokens_per_step:,} tokens a step · {human_count(layout.tokens_total)} in the run"
        f" ({layout.tokens_total / layout.parameters:.3g} a parameter)\n",
        f"{layout.flops_per_token:.4g} FLOPs a token with causal attention at half,"
        f" {layout.flops_per_token_full_attention:.4g} in full",
        *(f"\n{note}" for note in layout.notes),
    )
    return Group(facts, _parameters(layout), _totals(layout))


def _parameters(layout: Layout) -> Table:
    table = Table(title="Parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("parameter", overflow="fold")
    table.add_column("layout: logical axis = size → mesh axes", overflow="fold")
    for column in ("bytes", "a device", "copies"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in layout.rows:
        table.add_row(
            row.path,
            _dimensions(row),
            human_bytes(row.bytes_total),
            human_bytes(row.bytes_per_device),
            str(row.replicas),
        )
    return table


def _dimensions(row: ParamRow) -> str:
    """``layers=32 · embed=4096→fsdp · mlp=14336→tensor``"""
    parts = []
    for axis, size, mesh_axes in zip(row.axes, row.shape, row.spec, strict=True):
        name = f"{axis}={size}" if axis else str(size)
        parts.append(f"{name}→{'+'.join(mesh_axes)}" if mesh_axes else name)
    return " · ".join(parts)


def _totals(layout: Layout) -> Table:
    table = Table(title="Bytes on each device", title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    parts = {
        "parameters (fp32)": layout.parameter_bytes,
        "gradients (fp32)": layout.gradient_bytes,
        "optimizer state": layout.optimizer_bytes,
    }
    if layout.average_bytes:
        parts["moving average (fp32)"] = layout.average_bytes
    for name, size in {**parts, "together": sum(parts.values())}.items():
        table.add_row(name, f"{size:,}", human_bytes(size))
    return table
