"""Tables of a plan at a terminal's width."""

import pytest
from rich.console import Console

from maxlm.plan.show import make_table

NAME = "first_layers.linear_attention.kimi_delta_attention.decay_down.kernel"
DIMENSIONS = "layers=26 · embed=2304→fsdp · latent=128"
ROWS = [
    (NAME, DIMENSIONS, "1.12 MiB", "16,307,453,952"),
    ("head.kernel", "vocab=163840 · embed=2304→fsdp", "1.41 GiB", "9"),
]


def render(width: int) -> list[str]:
    """Returns the lines of the table at a console's width."""
    console = Console(width=width, color_system=None)
    columns = ("parameter", "layout", "bytes", "number")
    table = make_table(None, columns, ROWS, right=columns[2:], wrap=("layout",))
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 101, 200])
def test_names_and_numbers_are_whole_at_any_width(width):
    lines = render(width)
    assert all(len(line) <= width for line in lines)
    for *_, size, number in ROWS:
        assert any(line.endswith(f" {size}  {number:>14}") for line in lines)
    # A name that is too long goes on below, a layout between its dimensions.
    first_column = "".join(line.partition(" ")[0] for line in lines)
    assert NAME in first_column
    words = [word for line in lines for word in line.split()]
    assert "embed=2304→fsdp" in words


def test_a_wide_table_has_a_line_a_row():
    assert len(render(200)) == 1 + len(ROWS)
