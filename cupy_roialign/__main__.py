"""`python -m cupy_roialign`: checks the installation. With `warmup`: compiles ahead."""

from __future__ import annotations

import argparse
import json
import os
import sys

DESCRIPTION = """\
Reports what is installed and where each kind of array is computed, tests that, and says what to do about each problem.

Exit status: 1 if something that should work does not, otherwise 0. On the CPU everything that is installed should work;
on the GPU, if the NVIDIA driver, CuPy or PyTorch shows one, CuPy arrays and CUDA tensors should. A machine without a
GPU has no problem.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    from cupy_roialign.diagnose import doctor, warmup

    formatter = argparse.RawDescriptionHelpFormatter
    program = "python -m cupy_roialign"
    parser = argparse.ArgumentParser(
        program, f"{program} [--json]\n       {program} warmup [OPTIONS]", DESCRIPTION, formatter_class=formatter
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    commands = parser.add_subparsers(
        title="another command",
        dest="command",
        metavar="warmup",
        help="compile ahead; see warmup --help",
        prog=program,
    )
    warmup.add_arguments(commands.add_parser("warmup", description=warmup.DESCRIPTION, formatter_class=formatter))
    options = parser.parse_args(arguments)
    status = 0
    try:
        if options.command == "warmup":
            status = warmup.run(options)
        else:
            facts = doctor.examine()
            status = int(facts["exit_status"])
            print(json.dumps(facts, indent=1) if options.json else doctor.report(facts))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe; the interpreter flushes again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
