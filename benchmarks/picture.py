"""How many times faster the compiled way is than the fastest peer of each workload, as dots on a logarithmic scale."""

from benchmarks.report import TIMES, speedup

COLORS = {"compiled, NCHW": "#0072B2", "compiled, channels-last": "#D55E00"}  # told apart by the colour-blind
STEPS = ("forward", "feature gradient")


def draw(report, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _figure(report)
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _figure(report):
    from matplotlib import pyplot

    names = list(report[TIMES])
    titles = [f"{report['workloads'][name]['title']} ({name})" for name in names]
    size = (12, 0.45 * len(names) + 2)
    figure, grid = pyplot.subplots(1, len(STEPS), figsize=size, sharey=True, layout="constrained")
    for axes, step in zip(grid, STEPS, strict=True):
        for way, color in COLORS.items():
            found = [report[TIMES][name][step] for name in names]
            ratios = [speedup(times, way) if way in times else None for times in found]
            dots = [(ratio, place) for place, ratio in enumerate(ratios) if ratio]
            axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=color, label=way)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=step, xscale="log", xlabel="speedup over the fastest peer")
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(names)), titles)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS), frameon=False)
    return figure
