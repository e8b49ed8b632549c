"""How many times faster this package is, as dots on a logarithmic scale."""

from benchmarks.report import TIMES, speedup
from benchmarks.workloads import GPU_SPECS

COLORS = ("#0072B2", "#D55E00")  # told apart by the colour-blind
STEPS = ("forward", "feature gradient")


def draw(report, path):
    """The CPU's: the compiled way beside the fastest peer of each workload."""
    names = list(report[TIMES])
    titles = [f"{report['workloads'][name]['title']} ({name})" for name in names]
    _draw(report, path, titles, ("compiled, NCHW", "compiled, channels-last"), "the fastest peer", speedup)


def draw_gpu(report, path):
    """The GPU's, beside torchvision."""
    titles = []
    for case in report[TIMES]:
        name, dtype = case.split()
        titles.append(f"{GPU_SPECS[name]['title']} ({name}), {dtype}" if name in GPU_SPECS else case)

    def ratio(times, way):
        return times["torchvision"][0] / times[way][0] if "torchvision" in times else None

    _draw(report, path, titles, ("NCHW", "channels-last"), f"torchvision, {report['gpu']}", ratio)


def _draw(report, path, titles, ways, peer, ratio):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _figure(report[TIMES].values(), titles, ways, peer, ratio)
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _figure(workloads, titles, ways, peer, ratio):
    from matplotlib import pyplot

    size = (12, 0.45 * len(titles) + 2)
    figure, grid = pyplot.subplots(1, len(STEPS), figsize=size, sharey=True, layout="constrained")
    for axes, step in zip(grid, STEPS, strict=True):
        for way, color in zip(ways, COLORS, strict=True):
            ratios = [ratio(times[step], way) if way in times[step] else None for times in workloads]
            dots = [(found, place) for place, found in enumerate(ratios) if found]
            axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=color, label=way)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=step, xscale="log", xlabel=f"speedup over {peer}")
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(titles)), titles)
    grid[0].set_ylim(len(titles) - 0.5, -0.5)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ways), frameon=False)
    return figure
