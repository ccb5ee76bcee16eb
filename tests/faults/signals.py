"""SIGTERM and Ctrl-C, once or twice, at random moments: one line, 143 or 130, and run again nothing is lost."""

import random
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from broken_runs import COMMANDS, Bench, Command, run_cases
from outcome import Outcome, Tally

WAYS = {
    "SIGTERM": (signal.SIGTERM,),
    "Ctrl-C": (signal.SIGINT,),
    "Ctrl-C twice": (signal.SIGINT, signal.SIGINT),
}


@dataclass(frozen=True)
class Case:
    """A command, what it is struck with, the first time as a share of the time it takes, and seconds to the second."""

    command: Command
    way: str
    moment: float
    pause: float

    @property
    def kind(self) -> str:
        return f"{self.way}, {'training' if self.command.trains else 'others'}"

    def __str__(self) -> str:
        return f"{self.command}, {self.way} at {self.moment:.3f}, {self.pause:.4f}"


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"signals {seed} {n}")
    command = COMMANDS[n % len(COMMANDS)]
    return Case(command, list(WAYS)[n // len(COMMANDS) % len(WAYS)], rng.random(), rng.choice((0.0, 0.002, 0.05)))


def attempt(bench: Bench, one: Case, folder: Path) -> Outcome:
    """Strike it, look at its exit code, its line and what is there, and run it to its end."""
    bench.fresh(one.command, folder)
    seconds, numbers = bench.whole(one.command)[1], WAYS[one.way]
    strikes = [(0.02 + one.moment * seconds + n * one.pause, number) for n, number in enumerate(numbers)]
    ended = bench.forks.run(one.command.words, folder, strikes)
    # Ctrl-C in the middle of a __del__: Python prints it, and nobody can catch it
    err = re.sub(r"Exception ignored in:.*?\nKeyboardInterrupt: *\n", "", ended.err, flags=re.S)
    if "Traceback" in err or "Exception ignored" in err:
        return Outcome("traceback", ended.err[-500:])
    if ended.code not in (0, 128 + numbers[0]):
        return Outcome("hang" if ended.code == 124 else "wrong", f"exit code {ended.code}: {ended.err[-300:]}")
    said = [line for line in ended.said if line.startswith("unclip: ")]
    if ended.code and len(said) != 1 and len(numbers) == 1:
        return Outcome("silence", f"{len(said)} lines: {ended.err[-300:]!r}")
    wrong = bench.untouched(one.command, folder)
    if wrong:
        return Outcome("loss", wrong)
    kept = [path.name for path in (folder / "out.partial").glob("checkpoint*")]
    if one.command.trains and said and "checkpoint" in said[0] and not kept:
        return Outcome("loss", f"no checkpoint, although: {said[0]}")
    return bench.finish(one.command, folder)


def run(numbers: Iterable[int], seed: int, folder: Path, tell, bench: Bench | None = None) -> Tally:
    return run_cases(numbers, seed, folder, tell, case, attempt, bench)
