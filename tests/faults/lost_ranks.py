"""Ranks that are lost under torchrun: kill -9 of one, of both, or of torchrun with them, once or again after a restart.

torchrun starts all ranks again, or a person types the same command; either way the training goes on from its checkpoint
and leaves, bit for bit, what two ranks leave that nobody killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import broken_runs
from broken_runs import Command, contents, run_cases
from outcome import Outcome, Tally
from tiny_world import CLIP, DECODER, PRIOR, sets

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
RESTARTS = 3  # that torchrun is allowed
LIMIT = 180.0  # seconds from a start to what is waited for: longer is a hang
VICTIMS = ("rank 1", "rank 0", "both ranks", "torchrun and both ranks")
MOMENTS = ("while it starts", "in its steps", "at its end")


def _command(name: str, needs: str, *words: str) -> Command:
    train = ["--steps", str(STEPS), "--batch-size", "4", "--device", "cpu", "--set", "save_every=0", "--set"]
    words = (*name.partition(",")[0].split(), *words, *train, "log_every=1", "--out", "out")
    return Command(name, words, tuple(needs.split()))


COMMANDS = [
    _command("train clip", "shards", "--shards", "in/shards", *sets(CLIP)),
    _command("train prior", "emb clip", "--embeddings", "in/emb", *sets(PRIOR)),
    _command("train decoder", "shards clip", "--shards", "in/shards", "--clip", "in/clip", *sets(DECODER)),
    _command("train clip, sharded", "shards", "--shards", "in/shards", *sets([*CLIP, "parallel=fsdp"])),
]


@dataclass(frozen=True)
class Strike:
    """Who is killed, and when: in which part of the training, and how far into that part, in [0, 1)."""

    victim: str
    moment: str
    share: float

    def __str__(self) -> str:
        return f"{self.victim} {self.moment} {self.share:.3f}"


@dataclass(frozen=True)
class Case:
    """A training and the strikes that meet it, one after the other."""

    command: Command
    strikes: tuple[Strike, ...]

    @property
    def kind(self) -> str:
        return f"{self.strikes[0].victim} lost{', then more' * (len(self.strikes) > 1)}"

    def __str__(self) -> str:
        return f"{self.command}, {', then '.join(map(str, self.strikes))}"


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"lost ranks {seed} {n}")
    count, command = rng.choice((1, 1, 1, 2, 2, 3)), COMMANDS[n % len(COMMANDS)]
    strikes = [Strike(rng.choice(VICTIMS), rng.choices(MOMENTS, (1, 3, 1))[0], rng.random()) for _ in range(count)]
    first = VICTIMS[n // len(COMMANDS) % len(VICTIMS)]
    return Case(command, (Strike(first, strikes[0].moment, strikes[0].share), *strikes[1:]))


class Torchrun:
    """`torchrun --nproc-per-node=2 unclip WORDS` in a folder, on this machine's CPU."""

    def __init__(self, command: Command, folder: Path) -> None:
        launch = ["--standalone", "--nproc-per-node=2", f"--max-restarts={RESTARTS}", "--monitor-interval=0.05"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "torch.distributed.run", *launch, str(ROOT / "cli.py"), *command.words]
        self.folder, self.began, self._seen = folder, time.monotonic(), 0
        self._err = open(folder / "err.txt", "a+b")  # noqa: SIM115
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=self._err, start_new_session=True
        )

    def ranks(self) -> dict[int, int]:
        """rank -> process, of those that run now."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in _words(task):
                environment = [word for word in _bytes(Path(f"/proc/{int(pid)}/environ")).split(b"\0")]
                if number := [word for word in environment if word.startswith(b"RANK=")]:
                    found[int(number[0][5:])] = int(pid)
        return found

    def steps(self) -> int:
        """How many steps metrics.jsonl has; all once the folder has its name."""
        if (self.folder / "out").exists():
            return STEPS
        return _bytes(self.folder / "out.partial" / "metrics.jsonl").count(b"\n")

    def reaches(self, moment: str, share: float) -> bool:
        """Wait for that moment; False if the command ended before. TimeoutError if it never comes."""
        if moment == "while it starts":
            self._until(lambda: len(self.ranks()) == 2)
            pause = 6 * share
        else:
            wanted = STEPS if moment == "at its end" else 1 + int(share * (STEPS - 2))
            self._until(lambda: self.steps() >= wanted)
            pause = 0.5 * share if moment == "at its end" else 0.01 * share
        time.sleep(pause)
        return self.process.poll() is None

    def kill(self, victim: str) -> None:
        """SIGKILL, to processes that this object started."""
        ranks = self.ranks()
        wanted = [ranks.get(int(victim[-1]))] if victim in ("rank 0", "rank 1") else list(ranks.values())
        if victim.startswith("torchrun"):
            self.process.kill()
            self.process.wait()
        for pid in [pid for pid in wanted if pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def fell_back(self, to: int) -> bool:
        """Wait for it to end; whether metrics.jsonl ever had fewer than `to` steps on the way."""
        least = STEPS

        def over() -> bool:
            nonlocal least
            least = min(least, self.steps() or least)
            return self.process.poll() is not None

        self._until(over)
        return least < to

    def close(self) -> str:
        """End what is left of it; what it said."""
        ranks = list(self.ranks().values())
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in ranks:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._err.seek(0)
        said = self._err.read().decode("utf-8", "replace")
        self._err.close()
        return said

    def _until(self, true) -> None:
        until = time.monotonic() + LIMIT
        while not true() and self.process.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.steps()} steps, and nothing more in {LIMIT:.0f} s")
            time.sleep(0.002)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # not there yet, or gone
        return b""


def _words(path: Path) -> list[bytes]:
    return _bytes(path).split()


class Bench(broken_runs.Bench):
    """The inputs, what two ranks leave when nobody kills one, and at which steps strikes found them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.struck: list[int] = []

    def whole(self, command: Command) -> tuple[dict[str, str], float]:
        if command.name not in self._whole:
            folder = self.fresh(command, self.folder / command.name.replace(" ", "-"))
            run = Torchrun(command, folder)
            try:
                code = run.process.wait(LIMIT)
            finally:
                said = run.close()
            assert code == 0, said[-3000:]
            self._whole[command.name] = contents(folder / "out"), time.monotonic() - run.began
            (folder / "err.txt").unlink()
        return self._whole[command.name]


def attempt(bench: Bench, one: Case, folder: Path) -> Outcome:
    """Strike it at its moments and let it end; it must go on where it was and leave what it would have left."""
    bench.whole(one.command)
    bench.fresh(one.command, folder)
    run, kept = Torchrun(one.command, folder), 0
    try:
        for strike in one.strikes:
            if not run.reaches(strike.moment, strike.share):
                break
            bench.struck.append(run.steps())
            kept = max(kept, run.steps() - 2)  # a step is logged and then saved, so that is in the checkpoint
            run.kill(strike.victim)
            if strike.victim.startswith("torchrun"):
                run.close()
                run = Torchrun(one.command, folder)
        fell_back, code = run.fell_back(kept), run.process.returncode
    except TimeoutError as error:
        return Outcome("hang", f"{error}: {run.close()[-600:]}")
    said = run.close()
    if code or "Traceback" in said:
        return Outcome("traceback", f"exit code {code}: {said[-1500:]}")
    if fell_back:
        return Outcome("loss", f"it was at step {kept}, and began again before that")
    (folder / "err.txt").unlink()
    return bench.compare(one.command, folder)


def run(numbers: Iterable[int], seed: int, folder: Path, tell) -> Tally:
    bench = Bench(folder / "bench")
    tally = run_cases(numbers, seed, folder, tell, case, attempt, bench)
    times = {name: round(seconds) for name, (_, seconds) in bench._whole.items()}
    inside = sum(0 < step < STEPS for step in bench.struck)
    tally.notes.append(
        f"Two ranks over gloo, {STEPS} steps, a checkpoint after each. {len(bench.struck)} times somebody was killed, "
        f"{inside} of them between the first step and the last. Seconds of an unbroken run: {json.dumps(times)}."
    )
    return tally
