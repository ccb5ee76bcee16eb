"""Commands in forked children of a process that has imported everything: a case costs what the command does, not its
imports. The children are struck with signals at given moments; each is a process group of its own.

`python forks.py` is that process: a line of json on stdin asks for commands to be run at once, one on stdout says how
they ended.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IMPORTS = """cli clip_train.embed clip_train.engines clip_train.ingest clip_train.train clip_train.track
clip_train.inference diffusion.asked diffusion.generate diffusion.gallery diffusion.grid diffusion.neighbours
diffusion.train_decoder diffusion.train_prior diffusion.again retrieval.changes retrieval.index faiss matplotlib.pyplot
open_clip pandas pyarrow.parquet tensorboard.summary.writer.event_file_writer torch._dynamo torch.utils.tensorboard
tqdm""".split()
LIMIT = 60.0  # seconds that a command may take: longer is a hang


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: of its exit, 128 + number for a signal that killed it; 124: it hung."""

    code: int
    seconds: float
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines on stderr, without what the progress bars leave."""
        lines = [line.rsplit("\r", 1)[-1].strip() for line in self.err.splitlines()]
        return [line for line in lines if line and "it/s" not in line and "s/it" not in line and "?it" not in line]


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        here = Path(__file__).resolve()
        paths = [str(here.parents[2]), str(here.parents[1]), str(here.parent)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(here)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run(
        self, words: Sequence[str], folder: Path, strikes: Sequence[tuple[float, int]] = (), before: str = ""
    ) -> Ended:
        """`unclip WORDS` in a folder. strikes: (seconds after its start, signal). before: MODULE.FUNCTION, called first
        in the child, to break something there."""
        return self.run_all([words], folder, strikes, before)[0]

    def run_all(
        self, all_words: Sequence[Sequence[str]], folder: Path, strikes: Sequence[tuple[float, int]] = (), before=""
    ) -> list[Ended]:
        """Several at once."""
        asked = {"commands": [list(words) for words in all_words], "folder": str(folder)}
        asked |= {"strikes": list(strikes), "before": before}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return [Ended(**one) for one in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    from retrieval import tune

    tune.SECONDS = 0.001  # of each measurement of an index
    sys.modules["clip_train.train"].curves = lambda folder: None  # matplotlib takes longer than all the rest
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        strikes = sorted(map(tuple, asked["strikes"]))
        running = [_start(n, words, asked["folder"], asked["before"]) for n, words in enumerate(asked["commands"])]
        ended = [_finish(pid, began, strikes, outputs) for pid, began, outputs in running]
        answers.write(json.dumps(ended).encode() + b"\n")


def _start(n: int, words: list[str], folder: str, before: str) -> tuple[int, float, list]:
    outputs = [os.memfd_create(f"{name}{n}") for name in ("out", "err")]
    # a strike is felt when the command has begun, not in Python's own preparations of a child
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        _be(words, folder, before, outputs)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setpgid(pid, pid)  # as the child does, whoever is first
    return pid, began, outputs


def _be(words: list[str], folder: str, before: str, outputs: list[int]) -> None:
    """The child: from here to its end."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before:
            module, _, function = before.rpartition(".")
            getattr(importlib.import_module(module), function)()
        import cli

        real, sys.argv = cli.run, ["unclip", *words]
        cli.run = lambda: (signal.pthread_sigmask(signal.SIG_SETMASK, ()), real())[1]
        code = 130  # of a Ctrl-C between here and the next line
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        except Exception:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:  # a second one, after the command
        pass
    finally:
        os._exit(code)


def _finish(pid: int, began: float, strikes: list[tuple[float, int]], outputs: list[int]) -> dict:
    handle, code = os.pidfd_open(pid), 0
    for moment, number in [*strikes, (LIMIT, 0)]:
        if select.select([handle], [], [], max(0.0, began + moment - time.monotonic()))[0]:
            break
        if number == signal.SIGKILL:
            os.killpg(pid, number)
        elif number:
            os.kill(pid, number)
        else:
            code = 124
    seconds = time.monotonic() - began
    try:
        os.killpg(pid, signal.SIGKILL)  # what is left of the group
    except ProcessLookupError:
        pass
    status = os.waitpid(pid, 0)[1]
    os.close(handle)
    code = code or (128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    texts = []
    for output in outputs:
        texts.append(os.pread(output, 1 << 20, 0).decode("utf-8", "replace"))
        os.close(output)
    return {"code": code, "seconds": seconds, "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    serve()
