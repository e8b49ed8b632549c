"""python -m cupy_roialign: is it working? And `warmup`: compiles kernels ahead."""

from __future__ import annotations

import argparse
import json
import sys

DESCRIPTION = """\
Says what is installed, where arrays of each kind are computed on and why not elsewhere, tests that, and says what to do
about each problem.

Exit status: 0 where all is well, 1 where a problem stops something that should work. On the CPU that is everything
that is installed; on the GPU, where the NVIDIA driver (or CuPy, or PyTorch) shows one, CuPy arrays and CUDA tensors. A
machine without a GPU is well.
"""


def main(arguments: list[str] | None = None) -> int:
    from cupy_roialign import doctor, warmup

    formatter = argparse.RawDescriptionHelpFormatter
    program = "python -m cupy_roialign"
    parser = argparse.ArgumentParser(
        program, f"{program} [--json]\n       {program} warmup [OPTIONS]", DESCRIPTION, formatter_class=formatter
    )
    parser.add_argument("--json", action="store_true", help="write the same as JSON")
    commands = parser.add_subparsers(
        title="another command",
        dest="command",
        metavar="warmup",
        help="compile kernels ahead; warmup --help tells more",
        prog=program,
    )
    warmup.add_arguments(commands.add_parser("warmup", description=warmup.DESCRIPTION, formatter_class=formatter))
    options = parser.parse_args(arguments)
    if options.command == "warmup":
        return warmup.run(options)
    facts = doctor.examine()
    print(json.dumps(facts, indent=1) if options.json else doctor.report(facts))
    return int(facts["exit_status"])


if __name__ == "__main__":
    sys.exit(main())
