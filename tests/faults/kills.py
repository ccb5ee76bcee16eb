"""kill -9 at random moments of eight commands: the same command, run again, makes what an unbroken run makes."""

import random
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from broken_runs import COMMANDS, Bench, Command, run_cases
from outcome import Outcome, Tally


@dataclass(frozen=True)
class Case:
    """A command, and when it is killed, and perhaps killed again, as shares of the time that it takes unbroken."""

    command: Command
    moments: tuple[float, ...]

    @property
    def kind(self) -> str:
        return self.command.name

    def __str__(self) -> str:
        return f"{self.command}, {self.moments}"


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"kills {seed} {n}")
    return Case(COMMANDS[n % len(COMMANDS)], tuple(rng.random() for _ in range(rng.choice((1, 1, 2, 3)))))


def attempt(bench: Bench, one: Case, folder: Path) -> Outcome:
    """Kill it at its moments, look at what is there after each, and run it to its end."""
    bench.fresh(one.command, folder)
    seconds = bench.whole(one.command)[1]
    for moment in one.moments:
        ended = bench.forks.run(one.command.words, folder, [(moment * seconds, signal.SIGKILL)])
        wrong = bench.untouched(one.command, folder)
        if wrong:
            return Outcome("loss", f"after a kill: {wrong}")
        if ended.code != 128 + signal.SIGKILL and ended.code:
            return Outcome("wrong", f"after a kill, exit code {ended.code}: {ended.err[-300:]}")
    return bench.finish(one.command, folder)


def run(numbers: Iterable[int], seed: int, folder: Path, tell, bench: Bench | None = None) -> Tally:
    return run_cases(numbers, seed, folder, tell, case, attempt, bench)
