"""Cases of bad input tried in process, each within a time limit: how the library or a whole command line ended."""

import contextlib
import io
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
from outcome import Outcome, Tally

import cli
from clip_train.console import Bars
from clip_train.settings import UserError

SECONDS = 60  # that one case may take: longer is a hang. The longest takes 8 of a core, which others may be using, too


@dataclass(frozen=True)
class Case:
    """One bad input: what kind, what it is in particular, and what happens when it is tried in an empty folder."""

    kind: str
    what: str
    attempt: Callable[[Path], Outcome]


class TimeUp(BaseException):
    """Out of time. No Exception, or a reader that takes anything for damage would go on."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """TimeUp in the middle of whatever runs too long (and again each 5 s, in what cleans up after it)."""

    def ring(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bounded(work: Callable[[], object], *refusals: type[Exception], seconds: float = SECONDS) -> Outcome:
    """How a call ended. It returns what is wrong with its result ("": nothing), or an Outcome of its own.

    refusals: what it may raise, with one line; a UserError by default.
    """
    told = refusals or (UserError, click.ClickException)
    try:
        with limited(seconds):
            said = work()
    except TimeUp:
        return Outcome("hang", f"more than {seconds} s")
    except told as error:
        text = str(error)
        one_line = text and "\n" not in text.strip() and len(text) < 3000
        return Outcome("refused", text) if one_line else Outcome("wrong", f"no one line: {text[:200]!r}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "/site-packages/" not in f.filename]
        return Outcome("traceback", f"{type(error).__name__}: {str(error)[:300]} at {' '.join(ours[-3:])}")
    return said if isinstance(said, Outcome) else Outcome("wrong", said) if said else Outcome("done")


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


def run_command(arguments: Sequence[str]) -> Ended:
    """`unclip ARGUMENTS` in this process, from the parsing of the arguments to the line about what went wrong."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as Python opens them
    Bars.moving = None
    with mock.patch.object(sys, "argv", ["unclip", *arguments]), mock.patch.object(sys, "stdin", io.StringIO()):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.run()
            except SystemExit as exit:
                code = exit.code or 0
            finally:
                Bars.moving = None
    for stream in (out, err):
        stream.flush()
    return Ended(code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)))


def commanded(
    arguments: Sequence[str], wrong: Callable[[Ended], str | Outcome] | None = None, seconds: float = SECONDS
) -> Outcome:
    """How a command ended. wrong: asked about one that ended well, for what is wrong with what it made."""

    def work() -> Outcome | str:
        ended = run_command(arguments)
        if ended.code == 2:
            lines = [line for line in ended.err.splitlines() if line.startswith(("unclip: ", "Error: "))]
            one = len(lines) == 1 and "Traceback" not in ended.err and ended.err.rstrip().endswith(lines[0].rstrip())
            return Outcome("refused", lines[0]) if one else Outcome("wrong", f"no one line: {ended.err[-300:]!r}")
        if ended.code != 0:
            return Outcome("wrong", f"exit code {ended.code}: {ended.err[-300:]!r}")
        if "Warning: " in ended.err:
            return Outcome("wrong", f"a library's warning: {ended.err[-300:]!r}")
        return wrong(ended) if wrong else ""

    return bounded(work, seconds=seconds)


def tried_all(
    case: Callable[[int, int], Case], numbers: Iterable[int], seed: int, folder: Path, tell: Callable
) -> Tally:
    """Every numbered case in an empty folder of its own."""
    tally, numbers = Tally(), list(numbers)
    for done, n in enumerate(numbers, 1):
        one, here = case(seed, n), folder / f"{n:05d}"
        here.mkdir(parents=True)
        tally.add(one.kind, f"--only {n} ({one.what})", one.attempt(here))
        shutil.rmtree(here, ignore_errors=True)
        tell(done, len(numbers), losses=len(tally.losses))
    return tally
