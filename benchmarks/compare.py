"""A run beside a stored one: how much slower, or faster, ours have become."""

from typing import NamedTuple

from benchmarks.report import TIMES, is_ours, peers, plural


class Change(NamedTuple):
    case: str
    peer: str | None  # in each run ours are measured by this peer, so that the runs may be of two machines
    slower: float  # times, 1 where nothing has changed


def changes(then, now):
    """Of all that was measured in both runs."""
    found = []
    for threads, workloads in now[TIMES].items():
        for name, steps in workloads.items():
            if then["workloads"].get(name) != now["workloads"][name]:
                continue
            for step, times in steps.items():
                before = then[TIMES].get(threads, {}).get(name, {}).get(step, {})
                common = peers({side: ms for side, ms in times.items() if side in before})
                peer = min(common, key=lambda side: before[side][0], default=None)
                for side in times:
                    if is_ours(side) and side in before:
                        slower = times[side][0] / before[side][0]
                        if peer:
                            slower *= before[peer][0] / times[peer][0]
                        found.append(Change(f"{name}, {step}, {plural(int(threads))}: {side}", peer, slower))
    return found


def lines(found, tolerance):
    rows = [f"{'ours, now and then':68} {'slower':>8}   measured by"]
    for change in sorted(found, key=lambda change: -change.slower):
        mark = "  SLOWER" if change.slower > tolerance else ""
        rows.append(f"{change.case:68} {change.slower:>7.2f}x   {change.peer or 'the clock'}{mark}")
    return "\n".join(rows)
