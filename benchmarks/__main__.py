"""Times this package on the CPU, beside every peer that is installed. What that means: benchmarks/README.md."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import compare, measure, report, workloads

LATEST = Path(__file__).parent / "results" / "latest"


def numbers(count, kind=int):
    """A type of argparse: so many numbers above 0, with commas between; or, of two, one that stands for both."""

    def read(text):
        parts = text.split(",")
        try:
            found = tuple(kind(part) for part in (parts * 2 if count == 2 and len(parts) == 1 else parts))
        except ValueError:
            found = ()
        if len(found) != count or not all(0 < number < float("inf") for number in found):
            what = "whole number" if kind is int else "number"
            many = f"{count} {what}s above 0 with commas between" if count > 1 else f"a {what} above 0"
            raise argparse.ArgumentTypeError(f"must be {many}; got {text!r}")
        return found if count > 1 else found[0]

    return read


def arguments(given=None):
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="workload", help=f"of {' '.join(workloads.SPECS)} (default: all)")
    parser.add_argument(
        "--threads", type=numbers(1), default=1, metavar="N", help="of each side (default: %(default)s)"
    )
    parser.add_argument("--idle", action="store_true", help="without another process that is busy beside this one")
    parser.add_argument(
        "--runs", type=numbers(1), default=9, metavar="N", help="runs of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--save", type=Path, metavar="PATH", help="write PATH.json and PATH.png (default: benchmarks/results/latest)"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="JSON", help="with a stored run; then nothing is saved unless --save says where"
    )
    parser.add_argument(
        "--tolerance",
        type=numbers(1, float),
        default=1.25,
        metavar="TIMES",
        help="of --compare: status 1 where ours are more times slower (default: %(default)s)",
    )
    own = parser.add_argument_group("a workload of your own")
    options = [
        own.add_argument("--features", type=numbers(4), metavar="N,C,H,W", help="shape"),
        own.add_argument("--boxes", type=numbers(1), default=512, metavar="K", help="how many (default: %(default)s)"),
        own.add_argument("--output", type=numbers(2), default=(7, 7), metavar="H,W", help="bins (default: 7,7)"),
        own.add_argument(
            "--scale",
            type=numbers(1, float),
            default=1.0,
            metavar="TIMES",
            help="size of the features over that of the image (default: %(default)s)",
        ),
        own.add_argument(
            "--sampling-ratio",
            type=int,
            default=0,
            metavar="N",
            help="samples a bin and axis; 0, the default: adaptive",
        ),
        own.add_argument("--aligned", action="store_true", help="shift by half a pixel"),
        own.add_argument(
            "--box-side",
            type=numbers(2, float),
            default=(16, 224),
            metavar="LEAST,MOST",
            help="in pixels of the image (default: 16,224)",
        ),
        own.add_argument(
            "--operator",
            choices=("roi_align", "crop_and_resize"),
            default="roi_align",
            help="and peers that have it (default: %(default)s)",
        ),
        own.add_argument("--seed", type=int, default=0, metavar="N", help="of random numbers (default: %(default)s)"),
    ]
    chosen = parser.parse_args(given)
    if unknown := [name for name in chosen.names if name not in workloads.SPECS]:
        parser.error(f"workload must be some of {' '.join(workloads.SPECS)}; got {' '.join(unknown)}")
    if chosen.features is None:
        for option in options:
            if getattr(chosen, option.dest) != option.default:
                parser.error(f"{option.option_strings[0]} is of a workload of your own, which needs --features N,C,H,W")
    elif chosen.names:
        parser.error("--features makes a workload of your own: name no other one beside it")
    if chosen.box_side[0] > chosen.box_side[1]:
        parser.error(f"argument --box-side: must be the least and the most; got {chosen.box_side}")
    if chosen.sampling_ratio < 0 or chosen.seed < 0:
        parser.error("--sampling-ratio and --seed must be 0 or more")
    if chosen.save is None and chosen.compare is None:
        chosen.save = LATEST
    return parser, chosen


def specs(chosen):
    if chosen.features is None:
        return {name: workloads.SPECS[name] for name in chosen.names or workloads.SPECS}
    own = {
        "title": f"{chosen.boxes} boxes, {'x'.join(map(str, chosen.features))}",
        "operator": chosen.operator,
        "shape": chosen.features,
        "image": tuple(max(1, round(side / chosen.scale)) for side in chosen.features[2:]),
        "K": chosen.boxes,
        "side": chosen.box_side,
        "scale": chosen.scale,
        "out": chosen.output,
        "sr": chosen.sampling_ratio,
        "aligned": chosen.aligned,
        "seed": chosen.seed,
    }
    return {"own": own}


def stored(parser, path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"argument --compare: {path} cannot be read: {error}")
    if not isinstance(found, dict) or not {report.TIMES, "workloads"} <= set(found):
        parser.error(f"argument --compare: {path} is not what --save writes")
    return found


def run(chosen):
    """The report, as it is when it is read again."""
    return json.loads(json.dumps(measure.run(specs(chosen), chosen.threads, chosen.runs, chosen.idle)))


def main(given=None):
    parser, chosen = arguments(given)
    then = stored(parser, chosen.compare) if chosen.compare else None
    now = run(chosen)
    if chosen.save:
        from benchmarks import picture

        paths = [chosen.save.with_name(f"{chosen.save.name}.{kind}") for kind in ("json", "png")]
        report.write(now, paths[0])
        picture.draw(now, paths[1])
        print(f"wrote {paths[0]} and {paths[1]}")
    if then is None:
        return 0
    found = compare.changes(then, now)
    if not found:
        return f"nothing that was measured is in {chosen.compare} too: no workload, number of threads or way"
    print(f"then: {report.conditions(then)}")
    print(compare.lines(found, chosen.tolerance))
    return int(any(change.slower > chosen.tolerance for change in found))


if __name__ == "__main__":
    sys.exit(main())
