"""A run beside a stored one: how much slower, or faster, this package has become."""

from typing import NamedTuple

from benchmarks.report import TIMES, peers
from benchmarks.sides import OURS


class Change(NamedTuple):
    case: str
    peer: str | None  # in each run ours are measured by this peer, so that the runs may be of two machines
    slower: float  # times, 1 where nothing has changed


def changes(then, now):
    """Of all that was measured in both runs, with as many threads."""
    found = []
    for name, steps in now[TIMES].items():
        if then["threads"] != now["threads"] or then["workloads"].get(name) != now["workloads"][name]:
            continue
        for step, times in steps.items():
            before = then[TIMES].get(name, {}).get(step, {})
            common = peers({side: ms for side, ms in times.items() if side in before})
            peer = min(common, key=lambda side: before[side][0], default=None)
            for side in OURS:
                if side in times and side in before:
                    slower = times[side][0] / before[side][0]
                    if peer:
                        slower *= before[peer][0] / times[peer][0]
                    found.append(Change(f"{name}, {step}: {side}", peer, slower))
    return found


def lines(found, tolerance):
    rows = [f"{'now and then':50} {'slower':>8}   measured by"]
    for change in sorted(found, key=lambda change: -change.slower):
        mark = "  SLOWER" if change.slower > tolerance else ""
        rows.append(f"{change.case:50} {change.slower:>7.2f}x   {change.peer or 'the clock'}{mark}")
    return "\n".join(rows)
