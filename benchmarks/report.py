"""What was measured, as JSON, on the screen, and as tables.

python -m benchmarks.report    # brings the tables of README.md and docs/ up to date with results/
"""

import json
import re
from pathlib import Path

from benchmarks.sides import OURS, PEERS, STEPS
from benchmarks.workloads import GPU_SPECS

TIMES = "ms: median, least, most"


def duration(ms):
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{1e3 * ms:.0f} µs"


def factor(number):
    return f"{number:.1f}x" if 1 <= number < 100 else f"{number:.0f}x" if number >= 100 else f"{number:.2g}x"


def peers(times):
    return [side for side in PEERS if side in times]


def fastest(times):
    """The fastest peer and its median, or None."""
    return min(((side, times[side][0]) for side in peers(times)), key=lambda found: found[1], default=None)


def speedup(times, side):
    """How many times faster than the fastest peer, or None."""
    found = fastest(times)
    return found[1] / times[side][0] if found else None


def conditions(report):
    """Where and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    threads = "one thread" if report["threads"] == 1 else f"{report['threads']} threads"
    busy = "another process was busy" if report["another process is busy"] else "no other process was started"
    settings = ", ".join(f"{name}={value}" for name, value in report["environment"].items())
    return (
        f"{report['processor']} ({report['system']}); {versions}. {threads.capitalize()}; medians of {report['runs']} "
        f"rounds, in which {busy}; set in the environment: {settings or 'nothing'}."
    )


def lines(title, times):
    """A step, as the screen shows it: ratios to the fastest peer, then medians, the fastest and the slowest run."""
    rows = [title]
    for side in sorted(times, key=lambda side: (side in OURS, times[side][0])):
        ratio = speedup(times, side) if side in OURS else None
        median, least, most = map(duration, times[side])
        rows.append(f"  {factor(ratio) if ratio else '':>6} {side:24} {median:>10}   {least:>10} to {most}")
    return "\n".join(rows) + "\n"


def write(report, path):
    text = json.dumps(_rounded(report), indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list is one line
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- tables ----

ROWS = {
    "box head of a detector (W1)": ("W1", "forward"),
    "the same, gradient with respect to the features": ("W1", "feature gradient"),
    "5,000 small crops of 3 channels (W6)": ("W6", "forward"),
    "crops of photos, 224 x 224 (W4)": ("W4", "forward"),
    "one small box (tiny)": ("tiny", "forward"),
}
"""Those of README, where they were measured."""


def table(report):
    """All workloads and steps, for docs/speed.md."""
    ways = [way for way in OURS if any(way in times for steps in report[TIMES].values() for times in steps.values())]
    rows = [["workload", "step", *ways, "fastest peer"]]
    for name, steps in report[TIMES].items():
        for step, times in steps.items():
            title = f"{name}, {report['workloads'][name]['title']}" if step == STEPS[0] else ""
            rows.append([title, step, *(_ours(times, way) for way in ways), _peer(times)])
    return f"{conditions(report)}\n\n{_markdown(rows)}"


def short_table(report):
    """README's."""
    ways = ("compiled, NCHW", "compiled, channels-last")
    what = "one CPU thread, float32, with Numba"
    rows = [[what, "fastest peer", "cupy_roialign, NCHW", "cupy_roialign, channels-last"]]
    for title, (name, step) in ROWS.items():
        if times := report[TIMES].get(name, {}).get(step):
            rows.append([title, _peer(times), *(_ours(times, way) for way in ways)])
    return _markdown(rows)


def _ours(times, way):
    if way not in times:
        return ""
    ratio = speedup(times, way)
    return f"{factor(ratio)} ({duration(times[way][0])})" if ratio else duration(times[way][0])


def _peer(times):
    found = fastest(times)
    note = ", boxes rounded" if found and found[0] == "OpenCV" else ""
    return f"{found[0]} ({duration(found[1])}){note}" if found else ""


def _markdown(rows):
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("|" + "|".join("---" if cell == "---" else f" {cell} " for cell in row) + "|" for row in rows)


def gpu_table(report):
    """All workloads on a GPU, for docs/gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    ways = ("NCHW", "channels-last")
    rows = [["workload", "dtype", "step", *ways, "torchvision, NCHW"]]
    for case, steps in report[TIMES].items():
        name, dtype = case.split()
        for step, times in steps.items():
            peer = times.get("torchvision")
            cells = [
                f"{factor(peer[0] / times[way][0])} ({_us(times[way])})" if peer else _us(times[way]) for way in ways
            ]
            first = step == STEPS[0]
            title = f"{name}, {GPU_SPECS[name]['title']}" if first and dtype == "float32" else ""
            rows.append([title, dtype * first, step, *cells, _us(peer) if peer else ""])
    return f"{report['gpu']}; {versions}.\n\n{_markdown(rows)}"


def _us(times):
    return f"{1e3 * times[0]:.0f} µs"


PAGES = {
    "docs/speed.md": ("cpu", "<!-- times: made by python -m benchmarks.report -->", table, "<!-- end of times -->"),
    "README.md": ("cpu", "<!-- speed -->", short_table, "<!-- end of speed -->"),
    "docs/gpu.md": ("gpu", "<!-- times: made by python -m benchmarks.report -->", gpu_table, "<!-- end of times -->"),
}
"""Of each page with a table: which results it is of, and what stands before and behind it."""


def section(report, page):
    """What a page says of it."""
    _, begin, make, end = PAGES[page]
    gap = "\n\n" if page.startswith("docs") else "\n"
    return gap.join([begin, make(report), end])


def read(name, root=Path(__file__).parents[1]):
    """Stored results."""
    return json.loads((root / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def main(root=Path(__file__).parents[1]):
    for page, (name, begin, _, end) in PAGES.items():
        before, rest = (root / page).read_text(encoding="utf-8").split(begin)
        text = before + section(read(name, root), page) + rest.split(end)[1]
        (root / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
