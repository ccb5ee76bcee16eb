"""Two processes that write one folder: one wins, the other says so in a line; and the lock of a dead one is none."""

import fcntl
import os
import random
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from broken_runs import COMMANDS, Bench, Command, judged, run_cases
from outcome import Outcome, Tally

WAYS = ("two at once", "held by another", "left by a dead one")


@dataclass(frozen=True)
class Case:
    """A command, who else is there, and when that one dies, as a share of the time that the command takes."""

    command: Command
    kind: str
    moment: float

    def __str__(self) -> str:
        return f"{self.command}, {self.kind}, {self.moment:.3f}"


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"locks {seed} {n}")
    return Case(COMMANDS[n % len(COMMANDS)], WAYS[n // len(COMMANDS) % len(WAYS)], rng.random())


def attempt(bench: Bench, one: Case, folder: Path) -> Outcome:
    bench.fresh(one.command, folder)
    seconds, words = bench.whole(one.command)[1], one.command.words
    if one.kind == "held by another":
        outcome = _held(bench, one, folder)
    elif one.kind == "two at once":
        ended = bench.forks.run_all([words, words], folder)
        lost = [judged(run) for run in ended if run.code]
        outcome = next((way for way in lost if way.how != "refused"), lost[0] if lost else Outcome("done"))
        if len(lost) == 2:
            outcome = Outcome("wrong", f"neither won: {lost}")
        elif lost and "another process" not in lost[0].line:
            outcome = Outcome("wrong", f"the other one said: {lost[0].line}")
        if outcome.how in ("refused", "done"):
            same = bench.compare(one.command, folder)
            outcome = outcome if same.how == "done" else same
    else:
        bench.forks.run(words, folder, [(one.moment * seconds, signal.SIGKILL)])
        outcome = Outcome("done")
    if outcome.how not in ("refused", "done"):
        return outcome
    last = bench.finish(one.command, folder)
    return outcome if last.how == "done" else last


def _held(bench: Bench, one: Case, folder: Path) -> Outcome:
    """Refused, as this process holds the lock."""
    out = folder / one.command.out
    place = {"generate": out, "index add": out}.get(one.command.name, out.with_name(out.name + ".partial"))
    place.mkdir(exist_ok=True)
    path = place if one.command.name == "generate" else place / ".lock"
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        ended = bench.forks.run(one.command.words, folder)
    finally:
        os.close(descriptor)
    if not ended.code:
        return Outcome("silence", "wrote into a folder that another process holds")
    outcome = judged(ended)
    said = "another process is" in outcome.line or outcome.how != "refused"
    return outcome if said else Outcome("wrong", f"another line: {outcome.line}")


def run(numbers: Iterable[int], seed: int, folder: Path, tell, bench: Bench | None = None) -> Tally:
    return run_cases(numbers, seed, folder, tell, case, attempt, bench)
