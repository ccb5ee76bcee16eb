"""The fault bench in full: thousands of broken inputs, killed runs and attacks, tallied; the goal is no loss.

    python benchmarks/faults.py shards --cases 1000 --seed 0
    python benchmarks/faults.py all

Prints a markdown table for each class and every loss in full; exit code 1 if there was one. CI runs a subset of the
same cases (tests/faults). A case is a function of (class, seed, number), so a loss can be tried again with --only N.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

CLASSES: dict[str, tuple[str, int]] = {  # class of faults -> its module in tests/faults, cases by default
    "shards": ("bad_shards", 576),
    "pictures": ("bad_pictures", 600),
    "captions": ("bad_captions", 400),
    "numbers": ("bad_numbers", 400),
    "folders": ("bad_folders", 600),
    "options": ("bad_options", 1200),
    "service": ("service", 400),
    "attack": ("attack", 400),
    "kills": ("kills", 240),
    "signals": ("signals", 120),
    "disks": ("disks", 120),
    "locks": ("locks", 72),
    "rot": ("rot", 160),
    "ranks": ("lost_ranks", 24),
    "numerics": ("numerics", 600),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", choices=[*CLASSES, "all"])
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    sys.path[0] = str(here)  # not this folder: a benchmark in it has the name of the package
    sys.path += [str(here / "tests"), str(here / "tests" / "faults")]
    lost = 0
    for name in CLASSES if options.faults == "all" else [options.faults]:
        module, cases = CLASSES[name]
        numbers = range(options.cases or cases) if options.only is None else [options.only]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tally = importlib.import_module(module).run(numbers, options.seed, Path(folder), tell(name))
        print(f"\n## {name} ({time.monotonic() - began:.0f} s)\n\n{tally.table()}\n")
        print("".join(f"{note}\n\n" for note in tally.notes), end="")
        for kind, case, outcome in tally.losses:
            print(f"- LOSS in {kind}, {case}: {outcome.how}: {outcome.line}")
        lost += len(tally.losses)
    sys.exit(1 if lost else 0)


def tell(name: str):
    """on_progress of a class: a bar on stderr."""
    from clip_train.console import Bars

    return Bars(name)


if __name__ == "__main__":
    main()
