"""Timings to JSON: runs one of benchmarks/, each a file with a `main(arguments)`.

    python bench.py sft [flags]        prints its figures and writes results/sft.json
    python bench.py sft --help         lists the flags of that benchmark
    python bench.py gpu --minutes 9    what matters most on a GPU, in the time that there is

plot.py draws the files of results/.
"""

import importlib
import sys
from pathlib import Path

from program import threads  # noqa: F401, before torch
from program.errors import InputError, reported


def main(arguments):
    files = {path.stem for path in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py")}
    shared = {"decoding", "inputs", "loops", "measure", "peer", "trace", "trl_trainer"}
    names = sorted(files - shared)
    name = arguments[0] if arguments else "nothing"
    if name not in names:
        raise InputError(f"bench.py: found {name}, expected one of {', '.join(names)}")
    importlib.import_module(f"benchmarks.{name}").main(arguments[1:])


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
