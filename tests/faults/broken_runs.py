"""Eight commands on the smallest inputs, and what each leaves: run unbroken once, and then broken in every way."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tiny
from forks import Ended, Forks
from outcome import Outcome, Tally
from tiny_world import CLIP, DECODER, PRIOR, sets, world
from trial import run_command

TRAIN = ["--batch-size", "4", "--device", "cpu", "--set", "save_every=0", "--set", "log_every=1"]
PICTURES, CAPTIONS = 24, 6
TIMED = {"seconds", "samples_per_second", "queries_per_second", "created", "queries_per_second_by_64", "build_seconds"}
LEFT_OUT = (".lock", ".plan.lock", "curves.png")


@dataclass(frozen=True)
class Command:
    """A command line, as typed in a folder that holds `needs` in in/; it writes `out`."""

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    out: str = "out"

    @property
    def trains(self) -> bool:
        """Whether it stops between two steps, with a checkpoint."""
        return self.name.startswith("train ")

    def __str__(self) -> str:
        return self.name


def _command(name: str, needs: str, *words: str, out: str = "out") -> Command:
    where = ("--index", out) if name == "index add" else ("--out", out)
    return Command(name, (*name.split(), *words, *where), tuple(needs.split()), out)


COMMANDS = [
    _command("shard", "pics", "in/pics", "--per-shard", "5", "--threads", "1"),
    _command("train clip", "shards", "--shards", "in/shards", "--steps", "6", *TRAIN, *sets(CLIP)),
    _command("embed", "shards clip", "--shards", "in/shards", "--clip", "in/clip", "--batch-size=8", "--device=cpu"),
    _command("index", "emb", "--embeddings", "in/emb", "--kind", "flat"),
    _command("index add", "emb more index", "--embeddings", "in/more", out="in/index"),
    _command("train prior", "emb clip", "--embeddings", "in/emb", "--steps", "8", *TRAIN, *sets(PRIOR)),
    _command(
        "train decoder", "shards clip", "--shards", "in/shards", "--clip", "in/clip", "--steps=6", *TRAIN,
        *sets(DECODER),
    ),
    _command(
        "generate", "clip emb shards prior decoder captions.txt", "--file", "in/captions.txt", "--prior", "in/prior",
        "--decoder", "in/decoder", "--set", "steps=3", "--batch-size", "1", "--device", "cpu",
    ),
]  # fmt: skip


class Bench:
    """The inputs, the process that forks the commands, and what each leaves when nothing breaks it."""

    def __init__(self, folder: Path) -> None:
        """folder: empty, for the inputs."""
        self.folder = folder
        self._whole: dict[str, tuple[dict[str, str], float]] = {}
        self._sizes: dict[str, list[int]] = {}
        self._make_inputs()

    @functools.cached_property
    def forks(self) -> Forks:
        """What runs the commands."""
        return Forks()

    def _make_inputs(self) -> None:
        place = self.folder / "in"
        place.mkdir(parents=True)
        for name in ("shards", "clip", "emb", "index", "prior", "decoder"):
            shutil.copytree(world() / name, place / name, copy_function=os.link)
        (place / "pics").mkdir()
        for n in range(PICTURES):
            (place / "pics" / f"{n:03d}.png").write_bytes(tiny.picture(100 + n))
            (place / "pics" / f"{n:03d}.txt").write_text(f"picture {n}")
        (place / "captions.txt").write_text("".join(f"a caption, number {n}\n" for n in range(CAPTIONS)))
        tiny.write_shards(tiny.samples(12, prefix="t"), place / "other", samples_per_shard=4)
        words = ["embed", "--shards", str(place / "other"), "--clip", str(place / "clip"), "--device", "cpu"]
        ended = run_command([*words, "--out", str(place / "more")])
        assert ended.code == 0, ended.err

    def fresh(self, command: Command, folder: Path) -> Path:
        """A new folder that holds what the command needs, in in/."""
        (folder / "in").mkdir(parents=True)
        for name in command.needs:
            given, here = self.folder / "in" / name, folder / "in" / name
            if given.is_file():
                shutil.copy2(given, here)
            else:  # links: nothing changes a file in place; but a lock is in its inode
                ignored = shutil.ignore_patterns("*.index.json", ".lock")
                shutil.copytree(given, here, copy_function=os.link, ignore=ignored)
        return folder

    def whole(self, command: Command) -> tuple[dict[str, str], float]:
        """What the command leaves when nothing breaks it (see contents()), and how many seconds it takes."""
        if command.name not in self._whole:
            folder = self.fresh(command, self.folder / command.name.replace(" ", "-"))
            ended = self.forks.run(command.words, folder)
            assert ended.code == 0, (command.name, ended)
            self._whole[command.name] = contents(folder / command.out), ended.seconds
            files = [path for path in (folder / command.out).rglob("*") if path.is_file()]
            self._sizes[command.name] = [path.stat().st_size for path in files]
            shutil.rmtree(folder)
        return self._whole[command.name]

    def sizes(self, command: Command) -> list[int]:
        """Bytes of each file that it leaves."""
        self.whole(command)
        return self._sizes[command.name]

    def finish(self, command: Command, folder: Path, before: str = "") -> Outcome:
        """Run it to its end: exit 0 and what an unbroken run leaves, or what is wrong."""
        ended = self.forks.run(command.words, folder, before=before)
        if ended.code:
            return judged(ended, "run again: ")
        return self.compare(command, folder)

    def compare(self, command: Command, folder: Path) -> Outcome:
        """What the finished command left against what an unbroken run leaves."""
        left, right = contents(folder / command.out), self.whole(command)[0]
        differ = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
        beside = {path.name for path in (folder / command.out).parent.iterdir()} - set(command.needs)
        litter = sorted(beside - {Path(command.out).name, "in"})
        if differ or litter:
            return Outcome("wrong", f"files differ: {differ}; left beside: {litter}")
        return Outcome("done")

    def untouched(self, command: Command, folder: Path) -> str:
        """What is wrong with what a broken run left ("" if nothing): `out` is absent or whole, an index searchable."""
        out = folder / command.out
        if command.name == "index add":
            from retrieval.live import LiveIndex

            live = LiveIndex.open(out)
            rows = live.search(tiny.unit_rows(3, live.dim), 5, "image")[1]
            return "" if len(live) in (44, 56) and rows.shape == (3, 5) else f"{len(live)} rows"
        if command.name == "generate":
            expected = self.whole(command)[0]
            wrong = [name for name, seen in contents(out).items() if name[0] != "." and expected.get(name) != seen]
            return f"pictures differ: {wrong}" if wrong else ""
        if not out.exists():
            return ""
        return "" if (out / "manifest.json").exists() else "out is there and not whole"

    def close(self) -> None:
        if "forks" in vars(self):
            self.forks.close()


def run_cases(
    numbers: Iterable[int], seed: int, folder: Path, tell, case, attempt, bench: Bench | None = None
) -> Tally:
    """attempt(bench, case(seed, n), an empty folder) for all n, on one bench."""
    tally, numbers = Tally(), list(numbers)
    own = bench or Bench(folder / "bench")
    try:
        for done, n in enumerate(numbers, 1):
            one, here = case(seed, n), folder / f"{n:05d}"
            tally.add(one.kind, f"--only {n} ({one})", attempt(own, one, here))
            shutil.rmtree(here, ignore_errors=True)
            tell(done, len(numbers), losses=len(tally.losses))
    finally:
        if bench is None:
            own.close()
    return tally


def judged(ended: Ended, what: str = "") -> Outcome:
    """How a run that failed ended: refused with one line, or badly."""
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        return Outcome("traceback", what + ended.err.strip()[-400:])
    if ended.code == 124:
        return Outcome("hang", what + ended.err.strip()[-300:])
    if ended.code != 2:
        return Outcome("wrong", f"{what}exit code {ended.code}: {ended.err[-300:]}")
    complaints = [line for line in ended.said if line.startswith(("unclip: ", "Error: "))]
    if len(complaints) != 1 or ended.said[-1] != complaints[0]:
        return Outcome("wrong", f"{what}no one line: {ended.err[-400:]!r}")
    return Outcome("refused", complaints[0])


def contents(folder: Path) -> dict[str, str]:
    """name -> sha256 of every file in a folder; of json files and logs, without times."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in LEFT_OUT and not name.startswith("logs/"):
            data = path.read_bytes()
            if path.name in ("manifest.json", "metrics.jsonl"):
                lines = data.splitlines() if path.suffix == ".jsonl" else [data]
                said = [_timeless(json.loads(line)) for line in lines]
                if path.suffix == ".jsonl":  # what a watcher sees now and then, a resumed one sees at other steps
                    said = [[line[name] for name in ("step", "loss", "lr", "norm")] for line in said]
                data = json.dumps(said).encode()
            found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(one) for name, one in value.items() if name not in TIMED}
    return [_timeless(one) for one in value] if isinstance(value, list) else value
