"""Every option of every command at its edges: the tree of commands is walked, so a new option is covered at once.

A command line here is one that works (command_lines.py) with one option changed. No NUL: no system passes one on.
"""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import click
from command_lines import EVERYTHING, commands, line
from outcome import Outcome, Tally
from tiny_world import copy_of
from trial import SECONDS, Case, commanded, tried_all

SLOW = ("serve", "quickstart", "lab ", "data bench", "export onnx")  # at work still when their time is up
LONG = {"steps", "minutes", "count", "seconds", "frames", "repeats", "candidates", "settings", "grid",
        "batch_size", "left", "right", "top", "workers", "bottom", "factor", "size", "axis", "features",
        "neighbours"}  # fmt: skip
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
    patient = name.startswith(SLOW) or param.name in LONG
    return Case(name.split()[0], what, lambda folder: attempt(folder, words, patient))


def attempt(folder: Path, words: list[str], patient: bool) -> Outcome:
    """patient: a command that is at work when its time is up is one that does what it was told."""
    copy_of(EVERYTHING, folder)
    (folder / "loop").symlink_to("loop")
    with contextlib.chdir(folder):
        outcome = commanded(words, seconds=2 if patient else SECONDS)
    if outcome.how == "hang" and patient:
        return Outcome("done", "at work when its time was up")
    return outcome


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    return tried_all(case, numbers, seed, folder, tell)
