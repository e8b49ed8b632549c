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
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _figure(report[TIMES])
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _figure(times):
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    size = (13, 3.4 * len(times) + 1)
    figure, grid = pyplot.subplots(
        len(times), len(STEPS), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    bars = {}
    for row, (threads, workloads) in zip(grid, times.items(), strict=True):
        for axes, step in zip(row, STEPS, strict=True):
            for place, steps in enumerate(workloads.values()):
                present = [side for side in COLORS if side in steps[step]]
                width = 0.84 / len(present)
                for number, side in enumerate(present):
                    x = place + (number - (len(present) - 1) / 2) * width
                    median, least, most = (ms / 1e3 for ms in steps[step][side])
                    bars[side] = axes.bar(x, median, width, color=COLORS[side])
                    axes.plot([x, x], [least, most], color="black", linewidth=0.8)
            axes.set(title=f"{step}, {plural(int(threads))}", yscale="log")
            axes.yaxis.set_major_formatter(EngFormatter("s"))
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.set_xticks(range(len(workloads)), list(workloads))
    for whose, names, place in (("", PEERS, "outside upper center"), ("ours: ", OURS, "outside lower center")):
        shown = [side for side in names if side in bars]
        if not shown:
            continue
        labels = [whose + side for side in shown]
        figure.legend([bars[side] for side in shown], labels, loc=place, ncols=len(names), frameon=False)
    return figure
