"""Runs a script with the emulated CuPy: python -m tests.emulate SCRIPT [ARGS]"""

import runpy
import sys

from tests.emulate import installed

if len(sys.argv) < 2:
    sys.exit(__doc__)
sys.argv = sys.argv[1:]
with installed():
    runpy.run_path(sys.argv[0], run_name="__main__")
