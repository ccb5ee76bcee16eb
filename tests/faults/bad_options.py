"""Every option of every command at its edges: the tree of commands is walked, so a new option is covered at once.

A command line here is one that works (command_lines.py) with one option changed. No NUL: no system passes one on.
"""

import contextlib
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import click
from command_lines import EVERYTHING, commands, line
from outcome import Outcome, Tally
from tiny_world import copy_of
from trial import SECONDS, Case, commanded, tried_all

if TYPE_CHECKING:
    from fastapi import FastAPI

SLOW = ("quickstart", "lab all", "lab sampling")  # take longer than a test has, whatever they are told
ENDLESS = {"1e18", "inf"}  # seconds that `data bench` takes, if one says so
NEVER = {"show", "compile", "engine"}  # open a window; take a minute; need Ray
NUMBERS = ["-1", "0", "1", "3", "1000000000000000000", "9223372036854775808", "nan", "1.5", "", " 7", "0x10", "--help"]
FLOATS = ["-1", "0", "1", "0.5", "1e18", "nan", "inf", "-inf", "1e-320", "1e400", "1,5", "", "x"]
PATHS = [
    "nowhere", "nowhere/at/all", "fox.png", "shards", "fox.png/x", "loop", "dev/null", "", ".", "..", "a\nb", "é/ü",
    "x" * 300, "\udcff", "-", "table.csv", "captions.txt", "new.txt", "new.json", "rows.npy", "decoder", "a b",
]  # fmt: skip
TEXTS = [
    "", " ", "x" * 10_000, "'", '"', "a'b\"c", "a\nb", "\udcff", "=", "=1", "x=", ",", "1,nan", "0", "nan", "nowhere",
    "fox.png", "{", "[", "*", "{}", "%s", "a - a", "image:", "key:none", "../..", "none", "null", "1e18", "-", "true",
]  # fmt: skip
SETTINGS = [
    "", "-1", "0", "1e18", "nan", "inf", "x", "[]", "[0]", "[-1]", "{}", "null", "none", "true", '"', "1e-320", "3",
    "1000000000000000000", "[1, 2, 3]", "0.5", "2",
]  # fmt: skip
EDGES = [
    (name, param)
    for name, command in commands()
    for param in command.params
    if param.name not in NEVER and not (isinstance(param, click.Option) and param.is_flag and not param.secondary_opts)
]


def edge(rng: random.Random, name: str, param: click.Parameter) -> str:
    """A value that one might give by mistake, or on purpose."""
    kind = param.type
    if param.name == "settings":
        keys = [
            "steps", "seed", "lr", "width", "heads", "eta", "guidance", "precision", "widths", "blocks", "image_size",
            "batch_size", "ema", "warmup", "sigma_min", "sigma_max", "sampler", "prior_steps", "queue", "loss",
            "words", "accumulate", "save_every", "validate_every", "log_every", "clip_norm", "caption_mix", "rho",
            "interval", "rescale", "candidates", "patch", "drop_text", "smoothing", "workers", "cache_gb",
            "context_length", "text_layers", "vision", "label_field", "few_steps", "draws", "dropout", "", "x",
        ]  # fmt: skip
        return f"{rng.choice(keys)}={rng.choice(SETTINGS)}"
    if isinstance(kind, click.Path):
        return rng.choice(PATHS)
    if isinstance(kind, click.types.FloatParamType | click.FloatRange):
        return rng.choice(FLOATS)
    if isinstance(kind, click.types.IntParamType | click.IntRange):
        return rng.choice(NUMBERS)
    return rng.choice([*TEXTS, *PATHS, *FLOATS])


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"options {seed} {n}")
    name, param = EDGES[(n * 7919) % len(EDGES)]  # so that a few cases are of many commands
    value = edge(rng, name, param)
    words = line(name, param, value)
    what = f"{name} {param.opts[0]}={value[:40]!r}"
    slow = name.startswith(SLOW) or name == "data bench" and value in ENDLESS
    kind = f"{name}, at most 2 s" if slow else name.split()[0]
    return Case(kind, what, lambda folder: attempt(folder, words, slow))


def attempt(folder: Path, words: list[str], slow: bool) -> Outcome:
    """slow: a command that is still at work when its time is up is one that does what it was told."""
    copy_of(EVERYTHING, folder)
    (folder / "loop").symlink_to("loop")
    serves = mock.patch("retrieval.server.run", served) if words[0] == "serve" else contextlib.nullcontext()
    with contextlib.chdir(folder), serves:
        outcome = commanded(words, seconds=2 if slow else SECONDS)
    if outcome.how == "hang" and slow:
        return Outcome("done", "at work when its time was up")
    return outcome


def served(app: "FastAPI", sock: socket.socket) -> None:
    """In the place of serving for ever: one request, which must be answered."""
    from starlette.testclient import TestClient

    sock.close()
    token = {"Authorization": f"Bearer {app.state.hall.config.token}"}
    with TestClient(app, base_url="http://127.0.0.1", headers=token) as client:
        assert client.get("/indices-list").status_code == 200


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    return tried_all(case, numbers, seed, folder, tell)
