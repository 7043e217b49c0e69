"""The final schedule of each kernel, read from a dump of the TPU compiler.

The dump is what ``LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"``
leaves in DIR: a file for each kernel (HLO operation) and compiler pass. A *bundle* is
one very long instruction word, issued in one cycle; latencies that nothing hides are
empty bundles. What waits for memory (DMA) is not in a schedule.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BUNDLES = "packed-bundles-post-ra"
REGIONS = "post-bundle-packing-post-ra"
UNIT_USE = "pre-delay_hlo-static-per-bundle-utilization"

# Pieces of control flow. The bodies are the rest: a region of these runs as part of its
# parent.
_STRUCTURE = {
    "pred_check",
    "pred_check_branch",
    "pred_fallthru",
    "loop_pre_header",
    "loop_header",
    "loop_header_branch",
    "loop_footer",
    "loop_footer_branch",
    "loop_exit",
}

_FILE = re.compile(rf"(\d+)-(.+)-\d+-({BUNDLES}|{REGIONS}|{UNIT_USE})\.txt")
_REGION = re.compile(
    r"\s*\$region(\d+)(?: \(\w+\))?: #\{.*?\}(?: parent=(\d+))?(?: \(\w+\))?(?: // "
    r"(\w+))?"
)
_RANGE = re.compile(r"\s*// region range: \[(\d+), (\d+)\)")
_BOUNDS = re.compile(r"iteration_bounds: \(([\d, ]*)\)")
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]+)?: *(?:> *)*\{", re.MULTILINE)
_DIVISION = re.compile(r"/\* (k(?:Div|Rem|DivAndRem)) \*/")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_OPERAND = re.compile(
    r"inlined_call_operand\.(?:\w+|<no memory space>) "
    r"\[shape: ([^,]+?(?:\[[\d,]*\])?), index: (\d+), kind: input"
)
_ALLOCATION = re.compile(
    r"#(allocation\w+) \[.*?space=(\w+), size = (\w+), offset = (\w+), (\w+)"
)


@dataclass
class Region:
    """A stretch of bundles that runs, or not, as one: the root, a loop's body, a
    predicated region.

    ``start`` and ``stop`` count bundles; the regions inside are ``children``.
    """

    name: str
    role: str
    start: int
    stop: int
    depth: int = 0
    children: list["Region"] = field(default_factory=list)

    @property
    def bundles(self) -> int:
        """With those of the regions inside."""
        return self.stop - self.start

    def own(self) -> list[tuple[int, int]]:
        """Ranges of bundles that no region inside holds."""
        ranges = []
        at = self.start
        for child in sorted(self.children, key=lambda r: r.start):
            if at < child.start:
                ranges.append((at, child.start))
            at = max(at, child.stop)
        return ranges + [(at, self.stop)] * (at < self.stop)


@dataclass
class Schedule:
    """A kernel as scheduled."""

    name: str
    """Of the HLO operation."""
    regions: list[Region]
    """In order of their start, each before those inside it."""
    grid: tuple[int, ...] | None
    """Of one core, where the compiler states it."""
    bundles: list[str]
    """Text of each, without comments."""
    branch_delay: int
    """Bundles after a branch that run whether it is taken or not: 1 on a v4, 4 on later
    chips."""
    units: list[str]
    capacity: np.ndarray
    """Slots of each unit in a cycle."""
    use: np.ndarray
    """[bundles, units]: slots used; for matrix units, cycles they are occupied."""
    operands: dict[int, str]
    """Shape ("s32[8]") of each input that the kernel reads, by its index."""
    scalar_memory: dict[str, tuple[int, bool]]
    """Allocations in SMEM: address in 4-byte words, and whether that is absolute."""


def read_schedules(directory: Path) -> list[Schedule]:
    """Every HLO operation's schedule in a dump, in the order they were compiled.

    Raises:
        ValueError: no schedule there.
    """
    files: dict[tuple[str, str], dict[str, Path]] = {}
    for path in sorted(directory.iterdir()):
        if match := _FILE.fullmatch(path.name):
            files.setdefault((match[1], match[2]), {})[match[3]] = path
    whole = {key: paths for key, paths in files.items() if len(paths) == 3}
    if not whole:
        raise ValueError(
            f"no schedule in {directory}: was it dumped with --xla_jf_dump_llo_text?"
        )
    return [
        parse_schedule(
            name,
            *(
                paths[kind].read_text("utf8", "replace")
                for kind in (BUNDLES, REGIONS, UNIT_USE)
            ),
        )
        for (_, name), paths in whole.items()
    ]


def parse_schedule(name: str, bundles: str, regions: str, unit_use: str) -> Schedule:
    """A :class:`Schedule` from the texts of its three files."""
    units, capacity, use = _parse_use(unit_use)
    bounds = _BOUNDS.search(regions)
    grid = tuple(int(x) for x in bounds[1].split(",") if x.strip()) if bounds else None
    texts = _parse_bundles(bundles)
    tree, branch_stops = _parse_regions(regions)
    for root in tree[:1]:
        root.stop = max(
            root.stop, len(texts)
        )  # The bundle that ends the program is in no range.
    if len(use) < len(texts):
        use = np.vstack([use, np.zeros((len(texts) - len(use), len(units)), int)])
    return Schedule(
        name=name,
        regions=tree,
        grid=grid,
        bundles=texts,
        branch_delay=_branch_delay(texts, branch_stops),
        units=units,
        capacity=capacity,
        use=use,
        operands={int(i): shape for shape, i in _OPERAND.findall(bundles)},
        scalar_memory={
            tag: (int(offset, 0) // 4, allocation_kind == "fixed_abs")
            for tag, space, _, offset, allocation_kind in _ALLOCATION.findall(regions)
            if space == "smem"
        },
    )


def _parse_use(text: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """A line of units' names, one of their capacities, then one of numbers for each
    bundle."""
    lines = text.splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    rows = [np.array(line.split(), int) for line in lines[4:] if line.strip()]
    return (
        units,
        np.array(lines[2].split(), int),
        np.array(rows).reshape(-1, len(units)),
    )


def _parse_bundles(text: str) -> list[str]:
    # A comment alone says which results of a division are popped.
    text = _COMMENT.sub("", _DIVISION.sub(r", \1", text))
    starts = list(_BUNDLE.finditer(text))
    ends = [m.start() for m in starts[1:]] + [len(text)]
    bundles = [""] * (int(starts[-1][1], 16) + 1 if starts else 0)
    for start, end in zip(starts, ends, strict=True):
        bundles[int(start[1], 16)] = text[start.end() : end].rpartition("}")[0].strip()
    return bundles


def _branch_delay(bundles: list[str], branch_stops: list[int]) -> int:
    """From where branches are to where the regions that end with one do."""
    delays: list[int] = []
    last = None
    stops = set(branch_stops)
    for at, bundle in enumerate(bundles):
        if at in stops and last is not None:
            delays.append(at - last - 1)
        if "= sbr" in bundle:
            last = at
    # A region whose branch the compiler removed would give more.
    return min(delays, default=0)


def _parse_regions(text: str) -> tuple[list[Region], list[int]]:
    """The tree of bodies, structural regions dissolved into the body that holds them;
    and where regions end that end with a branch."""
    parents: dict[str, str] = {}
    regions: dict[str, Region] = {}
    branch_stop: dict[str, int] = {}
    branch_stops: list[int] = []
    current, role = None, ""
    for line in text.splitlines():
        if match := _REGION.match(line):
            current, parent, role = match.groups("")
            parents[current] = parent
            continue
        bundle_range = _RANGE.match(line)
        if bundle_range and current is not None and current not in regions:
            start, stop = int(bundle_range[1]), int(bundle_range[2])
            if role in ("pred_check_branch", "loop_header_branch"):
                branch_stops.append(stop)
            if role == "pred_check_branch":
                branch_stop[parents[current]] = stop
            elif role == "pred_region":
                # Its range is counted from its check; the body follows the branch.
                start = max(start, branch_stop.get(parents[current], start))
            regions[current] = Region(current, role or "root", start, stop)
    bodies = {
        n: r for n, r in regions.items() if r.role not in _STRUCTURE and r.bundles
    }
    for name, region in bodies.items():
        up = parents[name]
        while up and up not in bodies:
            up = parents.get(up, "")
        if up:
            bodies[up].children.append(region)
            region.depth = bodies[up].depth + 1
    return list(bodies.values()), branch_stops
