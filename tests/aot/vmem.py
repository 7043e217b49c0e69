"""VMEM of a compiled program's kernels, and the table of it that a session ends with."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from pallas_kernels.chips import CHIPS

_MIB = 1 << 20


class Vmem(NamedTuple):
    """Bytes of one kernel."""

    name: str
    limit: int
    """That it asks for; all of the chip's if it says nothing."""
    used: int
    """That the compiler takes."""


def kernels(text: str) -> list[Vmem]:
    """Of each Pallas kernel in a TPU program's text, by the names that they were given."""
    found = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call', line)
            limit, used = (
                re.search(rf'"{key}":\[{{"memory_space":"1","offset":"0","size":"(\d+)"', line)
                for key in ("scoped_memory_configs", "used_scoped_memory_configs")
            )
            assert name is not None
            assert limit is not None
            assert used is not None
            found.append(Vmem(name[1], int(limit[1]), int(used[1])))
    return found


def table(rows: Iterable[tuple[str, str, str, int, int]]) -> list[str]:
    """Lines of (chip, case, kernel, bytes used, bytes asked for): a chip a column, in MiB; of
    several such kernels in a program the one that takes most."""
    cells: dict[str, dict[str, dict[str, tuple[int, int]]]] = {}
    for chip, case, kernel, used, limit in rows:
        own = cells.setdefault(kernel, {}).setdefault(case, {})
        own[chip] = max(own.get(chip, (0, 0)), (used, limit))
    lines = []
    for kernel, cases in sorted(cells.items()):
        lines.append(f"{kernel:<40}" + "".join(f"{chip:>12}" for chip in CHIPS))
        for case, own in sorted(cases.items()):
            found = (own.get(chip) for chip in CHIPS)
            shown = (f"{x[0] / _MIB:.1f}/{x[1] / _MIB:.1f}" if x else "-" for x in found)
            lines.append(f"  {case:<38}" + "".join(f"{cell:>12}" for cell in shown))
    return lines
