"""What was measured, as JSON, on the screen, and as tables.

python -m benchmarks.report    # brings docs/speed (one thread) and benchmarks/README up to date with results/cpu.json
"""

import json
import re
from pathlib import Path

from benchmarks.sides import ONE_THREAD, OURS, PEERS, STEPS

TIMES = "ms: median, least, most"
DIFFERENCES = "largest difference from the first of ours, in units of the largest value"


def duration(ms):
    return f"{ms:.1f} ms" if ms >= 1 else f"{1e3 * ms:.0f} µs"


def factor(number):
    return f"{number:.1f}x" if 1 <= number < 100 else f"{number:.0f}x" if number >= 100 else f"{number:.2g}x"


def plural(threads):
    return "one thread" if threads == 1 else f"{threads} threads"


def is_ours(side):
    return side.removesuffix(ONE_THREAD) in OURS


def peers(times):
    return [side for side in PEERS if side in times]


def machine(report):
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['processor']} ({report['system']}); {versions}"


def lines(title, times):
    """A step, as the screen shows it: medians, the fastest and slowest run, and how much faster ours are than peers."""
    rows = [title]
    for side in sorted(times, key=lambda side: (is_ours(side), times[side][0])):
        median, least, most = map(duration, times[side])
        faster = [f"{factor(times[peer][0] / times[side][0])} {peer}" for peer in peers(times) if is_ours(side)]
        row = f"  {side:38} {median:>10}   {least:>10} to {most:<10} {', '.join(faster)}"
        rows.append(row.rstrip())
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


BEGIN, END = "<!-- times: made by python -m benchmarks.report -->", "<!-- end of times -->"


PAGES = {"docs/speed.md": lambda threads: threads == 1, "benchmarks/README.md": lambda threads: threads > 1}
"""Which tables stand where."""


def section(report, page):
    """What a page says of it."""
    parts = [f"Median of {report['runs']}. {machine(report)}."]
    for threads, table in tables(report).items():
        if PAGES[page](threads):
            parts += [f"**{plural(threads).capitalize()}**", table]
    return "\n\n".join([BEGIN, *parts, END])


def tables(report):
    """{number of threads: table}."""
    return {int(threads): _table(report, threads) for threads in report[TIMES]}


def _table(report, threads):
    ways = [side for side in OURS if _measured(report, threads, side)]
    reference = ways[0] + ONE_THREAD
    columns = ["", "", "fastest peer", *ways]
    if _measured(report, threads, reference):
        columns.append(f"{ways[0]}: over one thread")
    rows = [columns, ["---"] * len(columns)]
    for name, steps in report[TIMES][threads].items():
        spec = report["workloads"][name]
        for step in STEPS:
            times = {side: times[0] for side, times in steps[step].items()}
            fastest = min(peers(times), key=times.get, default=None)
            cells = [f"{name} {spec['title']}" if step == STEPS[0] else "", step]
            cells.append(f"{duration(times[fastest])}, {fastest}" if fastest else "")
            for way in ways:
                faster = f" ({factor(times[fastest] / times[way])})" if fastest else ""
                cells.append(duration(times[way]) + faster)
            if len(columns) > len(cells):
                cells.append(factor(times[reference] / times[ways[0]]) if reference in times else "")
            rows.append(cells)
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell.strip("-") else cell or " " for cell in row) + "|" for row in rows
    )


def _measured(report, threads, side):
    return any(side in times for steps in report[TIMES][threads].values() for times in steps.values())


def main():
    root = Path(__file__).parents[1]
    report = json.loads((root / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    for page in PAGES:
        before, rest = (root / page).read_text(encoding="utf-8").split(BEGIN)
        (root / page).write_text(before + section(report, page) + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
