"""Files that changed while nobody looked, between two runs of one command, and clocks that went backwards.

What a run goes on from is either found damaged, and then the checkpoint before it is used and that is said, or the run
is refused in a line. Never is anything made from it that an unbroken run would not make.
"""

import os
import random
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from broken_runs import COMMANDS, Bench, Command, judged, run_cases
from outcome import Outcome, Tally

TRAININGS = [command for command in COMMANDS if command.trains]
CHECKPOINTS = ("flipped bit in a checkpoint", "checkpoint cut short", "empty checkpoint", "both checkpoints damaged")
WAYS = (*CHECKPOINTS, "plan.json damaged", "finished weights, flipped bit", "clock going backwards")
YEAR = 365 * 86400


@dataclass(frozen=True)
class Case:
    """A command, what happens to its unfinished folder, when it is stopped, and a seed of the damage."""

    command: Command
    kind: str
    moment: float
    seed: int

    def __str__(self) -> str:
        return f"{self.command}, {self.kind}, {self.moment:.3f}, {self.seed}"


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"rot {seed} {n}")
    kind = WAYS[n % len(WAYS)]
    commands = COMMANDS if kind.startswith("clock") else TRAININGS
    if kind.startswith("plan"):
        commands = [command for command in COMMANDS if command.name not in ("index add", "generate")]
    return Case(commands[n // len(WAYS) % len(commands)], kind, rng.random(), rng.randrange(1 << 30))


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    """What is left of a file."""
    if "empty" in kind:
        return b""
    if "cut" in kind:
        return data[: rng.randrange(len(data))]
    bit = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def attempt(bench: Bench, one: Case, folder: Path) -> Outcome:
    bench.fresh(one.command, folder)
    seconds, rng = bench.whole(one.command)[1], random.Random(one.seed)
    if one.kind.startswith("finished"):
        return _finished(bench, one, folder, rng)
    before = "rot.ahead" if one.kind.startswith("clock") else ""
    number = signal.SIGTERM if one.command.trains and one.kind in CHECKPOINTS else signal.SIGKILL
    bench.forks.run(one.command.words, folder, [(one.moment * seconds, number)], before)
    partial = folder / "out.partial"
    if one.kind.startswith("clock"):
        return bench.finish(one.command, folder, "rot.behind")
    if one.kind in CHECKPOINTS:
        return _checkpoints(bench, one, folder, rng)
    plan = partial / "plan.json"
    if not plan.exists():
        return bench.finish(one.command, folder)
    whole, how = plan.read_bytes(), rng.choice(("empty", "cut", "flip", "[]", "3", '{"kind": 1}', "\udcff"))
    plan.write_bytes(damaged(whole, how, rng) if how in ("empty", "cut", "flip") else os.fsencode(how))
    ended = bench.forks.run(one.command.words, folder)
    outcome = judged(ended) if ended.code else bench.compare(one.command, folder)
    if outcome.how == "refused":
        plan.write_bytes(whole)
        last = bench.finish(one.command, folder)
        return outcome if last.how == "done" else last
    return outcome


def _checkpoints(bench: Bench, one: Case, folder: Path, rng: random.Random) -> Outcome:
    partial = folder / "out.partial"
    newest, older = partial / "checkpoint.safetensors", partial / "checkpoint-before.safetensors"
    whole = {path: path.read_bytes() for path in (newest, older) if path.exists()}
    for path in [path for path in whole if path == newest or one.kind.startswith("both")]:
        path.write_bytes(damaged(whole[path], one.kind, rng))
    ended = bench.forks.run(one.command.words, folder)
    if not ended.code:
        outcome = bench.compare(one.command, folder)
        said = any("warning: " in line and "checkpoint before" in line for line in ended.said)
        if newest in whole and not said:
            return Outcome("silence", f"nothing said of the damage: {ended.err[-300:]}")
        return Outcome("skipped", ended.err) if said and outcome.how == "done" else outcome
    outcome = judged(ended)
    if outcome.how == "refused":
        if older in whole and not one.kind.startswith("both"):
            return Outcome("wrong", f"the checkpoint before was not used: {outcome.line}")
        for path, data in whole.items():
            path.write_bytes(data)
        last = bench.finish(one.command, folder)
        return outcome if last.how == "done" else last
    return outcome


def _finished(bench: Bench, one: Case, folder: Path, rng: random.Random) -> Outcome:
    """Weights that rotted after the training, in the hands of the commands that use them."""
    uses = COMMANDS[2] if one.command.name == "train clip" else COMMANDS[7]
    bench.fresh(uses, folder / "next")
    name = "clip" if uses is COMMANDS[2] else one.command.name.removeprefix("train ")
    (path,) = (folder / "next" / "in" / name).glob("*model.safetensors")
    data = path.read_bytes()
    path.unlink()  # it is a link
    path.write_bytes(damaged(data, one.kind, rng))
    ended = bench.forks.run(uses.words, folder / "next")
    return judged(ended) if ended.code else Outcome("silence", "weights that changed were used")


def ahead() -> None:
    """In a child: the clock stands a year ahead."""
    _shift(YEAR)


def behind() -> None:
    """In a child: the clock stands a year behind, so that all files are of the future."""
    _shift(-YEAR)
    for path in Path().rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            os.utime(path, (time.time() + 3 * YEAR, time.time() + 3 * YEAR))


def _shift(seconds: float) -> None:
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)


def run(numbers: Iterable[int], seed: int, folder: Path, tell, bench: Bench | None = None) -> Tally:
    return run_cases(numbers, seed, folder, tell, case, attempt, bench)
