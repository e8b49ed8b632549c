"""Bars of what was measured, on a logarithmic scale."""

from benchmarks.report import TIMES, plural
from benchmarks.sides import OURS, PEERS

# Told apart by the colour-blind (Okabe and Ito): warm colours for peers, ours in cold ones.
COLORS = dict(
    zip(PEERS + OURS, ("#777777", "#E69F00", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#8FD9BF"), strict=True)
)
STEPS = ("forward", "feature gradient")


def draw(report, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    runs = report[TIMES]
    height = 3.6 * len(runs) + 0.8
    figure, grid = plt.subplots(
        len(runs), len(STEPS), figsize=(13, height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    handles = {}
    for row, (threads, workloads) in zip(grid, runs.items(), strict=True):
        for axes, step in zip(row, STEPS, strict=True):
            for place, steps in enumerate(workloads.values()):
                present = [side for side in COLORS if side in steps[step]]
                width = 0.84 / len(present)
                for number, side in enumerate(present):
                    x = place + (number - (len(present) - 1) / 2) * width
                    seconds = [ms / 1e3 for ms in steps[step][side]]
                    handles[side] = axes.bar(x, seconds[0], width, color=COLORS[side])
                    axes.plot([x, x], seconds[1:], color="black", linewidth=0.8)
            axes.set(title=f"{step}, {plural(int(threads))}", yscale="log")
            axes.yaxis.set_major_formatter(EngFormatter("s"))
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xticks(range(len(workloads)), list(workloads))
    shown = [side for side in COLORS if side in handles]
    labels = [f"ours: {side}" if side in OURS else side for side in shown]
    figure.legend(
        [handles[side] for side in shown], labels, loc="outside lower center", ncols=len(shown), frameon=False
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
