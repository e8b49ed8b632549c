"""Runs a script or a module with the emulated CuPy: python -m tests.emulate SCRIPT [ARGS], or -m MODULE [ARGS]"""

import runpy
import sys

from tests.emulate import installed

arguments = sys.argv[1:]
if not arguments or arguments == ["-m"]:
    sys.exit(__doc__)
with installed():
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
