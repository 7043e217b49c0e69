"""RoPE's wavelengths and what each scaling by 8 makes of them: the plot of
docs/positions.md.

    python benchmarks/rope_wavelengths.py [--plot FILE]

A head of 128 dimensions, at theta 10,000 with 4,096 tokens to begin with (Llama 2) and
at 500,000 with 8,192 (Llama 3). Prints the longest wavelength; how many of the 64 pairs
never complete a turn, in 8 times as many tokens where they are scaled; and how many are
stretched by less than 1 % and by the whole factor.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.models.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    YarnScaling,
    compute_frequencies,
)

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "rope_wavelengths.png"
HEAD_DIM, FACTOR = 128, 8.0


@dataclass(frozen=True)
class RopeCase:
    theta: float
    length: int

    @property
    def scalings(self) -> dict[str, Any]:
        yarn = YarnScaling(factor=FACTOR, original_length=self.length)
        llama3 = Llama3Scaling(factor=FACTOR, original_length=self.length)
        return {
            "none": None,
            "linear": LinearScaling(factor=FACTOR),
            "ntk": NtkScaling(factor=FACTOR),
            "yarn": yarn,
            "llama3": llama3,
        }

    def wavelengths(self, scaling: Any) -> np.ndarray:
        """Tokens a full turn of each pair takes, float64 [64]."""
        return 2 * np.pi / compute_frequencies(self.theta, HEAD_DIM, scaling)


CASES = RopeCase(1e4, 4096), RopeCase(5e5, 8192)
COLOURS = {
    "none": "#888",
    "linear": "#4C78A8",
    "ntk": "#F58518",
    "yarn": "#54A24B",
    "llama3": "#B279A2",
}


def plot(path: Path) -> None:
    """Wavelengths above, and below what they are multiplied by."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=75, layout="constrained")
    grid = FigureCanvasAgg(figure).figure.subplots(
        2, 2, sharex=True, height_ratios=(3, 2)
    )
    for (above, below), case in zip(grid.T, CASES, strict=True):
        for name, scaling in case.scalings.items():
            wavelengths = case.wavelengths(scaling)
            style = {"color": COLOURS[name], "label": name}
            above.semilogy(wavelengths, **style)
            below.plot(wavelengths / case.wavelengths(None), **style)
        for length, text in (
            (case.length, "trained"),
            (FACTOR * case.length, f"×{FACTOR:.0f}"),
        ):
            above.axhline(length, color="black", linewidth=0.6, linestyle=":")
            above.annotate(f"{length:,.0f} {text}", (0, length * 1.15), fontsize=8)
        above.set(title=f"theta {case.theta:,.0f}", ylabel="wavelength, tokens")
        below.set(xlabel="pair of dimensions", ylabel="stretched by")
    grid[0, 1].legend(frameon=False, loc="lower right")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", default=IMAGE, help="where it goes"
    )
    args = parser.parse_args()
    print(
        f"{'theta':>9} {'scaling':<8}{'longest':>12}{'no turn':>9}{'kept':>6}{'whole':>7}"
    )
    for case in CASES:
        plain = case.wavelengths(None)
        for name, scaling in case.scalings.items():
            wavelengths = case.wavelengths(scaling)
            stretch = wavelengths / plain
            length = case.length if scaling is None else FACTOR * case.length
            counts = (wavelengths > length, stretch < 1.01, stretch > FACTOR * 0.9999)
            num_no_turn, num_kept, num_scaled_fully = (
                int(np.sum(mask)) for mask in counts
            )
            print(
                f"{case.theta:>9,.0f} "
                f"{name:<8}{wavelengths[-1]:>12,.0f}{num_no_turn:>9}{num_kept:>6}{num_scaled_fully:>7}"
            )
    plot(args.plot)


if __name__ == "__main__":
    main()
