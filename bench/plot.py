"""Draws one picture per device from its rows: the newest gain of every backend over torch at every size.

python bench/plot.py            every file in bench/results
python bench/plot.py nvidia-h100-80gb-hbm3
"""

from __future__ import annotations

import sys
from pathlib import Path

from timing import RESULTS, read_rows

METRIC = "ms p50, p20, p80"


def newest(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """op -> setting -> backend -> its last row; of torch's forms in a run only the fastest, as "torch"."""
    ops: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        if row["metric"] == METRIC:
            settings = ops.setdefault(row["benchmark"], {})
            settings.setdefault(f"{row['shape']} {row['dtype']}", {})[row["backend"]] = row

    for settings in ops.values():
        for name, backends in settings.items():
            forms = [row for backend, row in backends.items() if backend.startswith("torch")]
            others = {name: row for name, row in backends.items() if not name.startswith(("torch", "yardstick"))}
            settings[name] = {"torch": min(forms, key=lambda row: float(row["median"])), **others} if forms else others
    return ops


def draw(device: str) -> str:
    """Write bench/results/<device>.png and return its name, or say why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (pip install 'fastedit-engine[plot]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = newest(read_rows(RESULTS / f"{device}.csv"))
    if not ops:
        return f"no picture: {device}.csv has no rows of ops"
    heights = [max(1, len(settings)) for settings in ops.values()]
    figure, axes = pyplot.subplots(
        len(ops), 1, figsize=(9, 1.2 * len(ops) + 0.42 * sum(heights)), squeeze=False, height_ratios=heights,
        constrained_layout=True,
    )  # fmt: skip

    backends = sorted({backend for settings in ops.values() for row in settings.values() for backend in row})
    colours = {backend: f"C{place}" for place, backend in enumerate(backends)}

    for axis, (op, settings) in zip(axes[:, 0], ops.items(), strict=True):
        for line, measured in enumerate(settings.values()):
            for place, (backend, row) in enumerate(sorted(measured.items())):
                height, milliseconds = 0.8 / len(measured), float(row["median"])
                middle = line + (place + 0.5) * height - 0.4
                gain = float(measured["torch"]["median"]) / milliseconds if "torch" in measured else 0.0
                axis.barh(middle, gain, height, color=colours[backend])
                words = f" {milliseconds:.3g} ms, {float(row['roof_share'] or 'nan'):.0%} of its roof"
                axis.text(gain, middle, words, va="center", fontsize=5)

        axis.set(title=op, yticks=range(len(settings)), yticklabels=list(settings))
        axis.axvline(1, color="black", linewidth=0.5)
        axis.margins(x=0.3)
        axis.tick_params(axis="y", labelsize=6)
        axis.invert_yaxis()

    axes[-1, 0].set_xlabel("speed, the fastest form in torch = 1 (medians)")

    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper right", ncols=len(colours))
    figure.suptitle(device, x=0.01, ha="left")
    figure.savefig(RESULTS / f"{device}.png", dpi=110)
    return f"{device}.png"


def main() -> None:
    devices = sys.argv[1:] or sorted(path.stem for path in Path(RESULTS).glob("*.csv"))
    for device in devices:
        print(draw(device))


if __name__ == "__main__":
    main()
