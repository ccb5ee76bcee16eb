"""Disks that are full, out of file names or read-only: one line, nothing lost, and with room the run goes on."""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from broken_runs import COMMANDS, Bench, Command, judged, run_cases
from outcome import Outcome, Tally

WAYS = ("full", "full", "full", "no file names left", "read-only")
ROOM = 64 << 20


@dataclass(frozen=True)
class Case:
    """A command, what is wrong with the disk it writes to, and how much of it there is, as a share of what it needs."""

    command: Command
    way: str
    share: float

    @property
    def kind(self) -> str:
        return self.way

    def __str__(self) -> str:
        return f"{self.command}, {self.way}, {self.share:.4f}"


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"disks {seed} {n}")
    return Case(COMMANDS[n % len(COMMANDS)], WAYS[n // len(COMMANDS) % len(WAYS)], rng.random())


def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    here = os.getcwd()
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", here]).returncode == 0


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A small disk in this empty folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "unclip-faults", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def attempt(bench: Bench, one: Case, folder: Path) -> Outcome:
    """Run it on the broken disk, look at its line and at what is there; mend the disk, and run it to its end."""
    given, here = bench.fresh(one.command, folder / "given"), folder / "disk"
    here.mkdir()
    bench.whole(one.command)
    with disk(here):
        (here / "in").mkdir()
        for path in (given / "in").iterdir():
            if one.command.out == f"in/{path.name}":
                subprocess.run(["cp", "-r", str(path), str(here / "in")], check=True)
            else:
                (here / "in" / path.name).symlink_to(path)
        _break(one, here, sum(bench.sizes(one.command)))
        ended = bench.forks.run(one.command.words, here)
        if ended.code:
            outcome = judged(ended)
        elif one.way == "read-only":
            outcome = Outcome("silence", "exit code 0 on a read-only disk")
        else:  # there was room enough
            outcome = bench.compare(one.command, here)
        if outcome.how not in ("refused", "done"):
            return outcome
        wrong = bench.untouched(one.command, here)
        if wrong:
            return Outcome("loss", f"on a broken disk: {wrong}")
        _remount(here, f"rw,size={ROOM},nr_inodes=10000")
        last = bench.finish(one.command, here)
        return outcome if last.how == "done" else last


def _break(one: Case, here: Path, needed: int) -> None:
    said = os.statvfs(here)
    used = (said.f_blocks - said.f_bfree) * said.f_frsize
    if one.way == "full":  # a checkpoint is larger than what is left in the end
        size = used + int(one.share**2 * 4 * needed)
        _remount(here, f"size={max(4096, size // 4096 * 4096)}")
    elif one.way == "read-only":
        _remount(here, "ro")
    else:
        _remount(here, f"nr_inodes={said.f_files - said.f_ffree + 1 + int(one.share * 12)}")


def run(numbers: Iterable[int], seed: int, folder: Path, tell, bench: Bench | None = None) -> Tally:
    return run_cases(numbers, seed, folder, tell, case, attempt, bench)
