"""Every option of every command at its edges: the tree of commands is walked, so a new option is covered at once.

A command line here is one that works (BASE) with one option changed. No NUL: no system passes one in an argument.
"""

import contextlib
import random
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from outcome import Outcome, Tally
from tiny_world import copy_of
from trial import Case, commanded, tried_all

import cli

EVERYTHING = ["shards", "clip", "emb", "index", "prior", "decoder", "upsampler", "made.png", "fox.png",
              "mask.png", "rows.npy", "captions.txt", "table.csv"]  # fmt: skip
DRAW = "--decoder decoder --device cpu --set steps=1 --set prior_steps=1"
FEW = "--steps 1 --batch-size 4 --device cpu --set precision=fp32"
JUDGE = "--decoder decoder --embeddings emb --count 20 --steps 1 --device cpu"
CLIP = """--set 'vision={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}' --set image_size=16
          --set text_width=32 --set text_heads=2 --set text_layers=1 --set context_length=16 --set embed_dim=32"""
SMALL = "--set image_size=8 --set widths=[16] --set blocks=[1] --set head_width=16 --set cond_width=16"
BASE = {
    "data check": "shards --threads 1",
    "data bench": "--shards shards --seconds 0.1 --batch-size 2 --device cpu --clip clip",
    "train clip": f"--shards shards --out new {FEW} {CLIP}",
    "train prior": f"--embeddings emb --out new {FEW} --set width=32 --set depth=1 --set heads=2",
    "train decoder": f"--shards shards --clip clip --out new {FEW} {SMALL}",
    "train upsampler": f"--shards shards --clip clip --out new {FEW} --set factor=2 --set crop=16 --set widths=[16] "
    "--set blocks=[1] --set cond_width=16",
    "train distilled": "--decoder decoder --shards shards --out new --steps 1 --batch-size 4 --device cpu "
    "--minutes 0.001",
    "evaluate clip": "--shards shards --clip clip --device cpu",
    "evaluate prior": "--embeddings emb --prior prior --device cpu",
    "evaluate decoder": JUDGE,
    "evaluate generation": f"{JUDGE} --prior prior",
    "evaluate loop": "--embeddings emb --prior prior --decoder decoder --count 4 --steps 1 --device cpu",
    "evaluate ablation": f"{JUDGE} --prior prior",
    "evaluate sweep": "--decoder decoder --embeddings emb --count 20 --steps 1 --sampler ddim --eta 0 --guidance 1 "
    "--out new --device cpu",
    "evaluate copies": "fox.png --train emb --clip clip --device cpu",
    "evaluate upsampler": "--upsampler upsampler --shards shards --clip clip --count 40 --steps 1 --device cpu",
    "export hf": "clip --out new",
    "export onnx": "clip --out new",
    "lab spiral": "--steps 1 --out new",
    "lab sampling": "--steps 1 --out new",
    "lab guidance": "--steps 1 --out new",
    "lab space": "--clip clip --shards shards --count 8 --out new --device cpu",
    "lab forward": "fox.png --out new",
    "lab denoise": "--decoder decoder --embeddings emb --count 8 --steps 2 --out new --device cpu",
    "lab unclip": "--decoder decoder --prior prior --embeddings emb --count 8 --out new --device cpu",
    "lab all": "--run . --out new --steps 1 --count 8 --device cpu",
    "shard": "table.csv --out new --threads 1",
    "wise-ft": "clip clip --shards shards --alpha 0.5 --out new --device cpu",
    "embed": "--shards shards --clip clip --out new --device cpu",
    "index add": "--index index --embeddings emb",
    "index delete": "s001 --index index",
    "index compact": "--index index",
    "index": "--embeddings emb --out new",
    "search": "'a fox' --index index --device cpu",
    "dedup": "--index index",
    "cluster": "--index index --out new --count 2 --no-sheets",
    "classify": "fox cat --index index --out new.parquet --device cpu",
    "serve": "--index index --port 0 --device cpu",
    "generate": f"'a fox' --prior prior --out new.png {DRAW}",
    "vary": f"fox.png --out new --count 1 {DRAW}",
    "interpolate": f"fox.png made.png --out new --frames 3 {DRAW}",
    "edit": f"fox.png --to 'a dog' --from 'a cat' --prior prior --out new {DRAW}",
    "reconstruct": f"fox.png --embeddings emb --out new.png {DRAW}",
    "img2img": f"fox.png 'a fox' --prior prior --out new.png {DRAW}",
    "inpaint": f"fox.png 'a fox' --mask mask.png --prior prior --out new.png {DRAW}",
    "outpaint": f"fox.png 'a fox' --left 2 --prior prior --out new.png {DRAW}",
    "enlarge": "fox.png --upsampler upsampler --out new.png --steps 1 --blind",
    "ema": "decoder --embeddings emb --shards shards --out new --count 4 --device cpu",
    "quickstart": "--out new --device cpu --minutes 0.1",
}
SLOW = ("serve", "quickstart", "lab ", "data bench", "export onnx")  # at work still when their time is up
LONG = {"steps", "minutes", "count", "seconds", "frames", "repeats", "candidates", "settings", "grid",
        "batch_size", "left", "right", "top", "workers", "bottom", "factor", "size", "axis", "features",
        "neighbours"}  # fmt: skip
NEVER = {"show", "compile", "engine"}  # open a window; take a minute; need Ray
NUMBERS = ["-1", "0", "1", "3", "1000000000000000000", "9223372036854775808", "nan", "1.5", "", " 7", "0x10", "--help"]
FLOATS = ["-1", "0", "1", "0.5", "1e18", "nan", "inf", "-inf", "1e-320", "1e400", "1,5", "", "x"]
PATHS = [
    "nowhere",
    "nowhere/at/all",
    "fox.png",
    "shards",
    "fox.png/x",
    "loop",
    "dev/null",
    "",
    ".",
    "..",
    "a\nb",
    "é/ü",
    "x" * 300,
    "\udcff",
    "-",
    "table.csv",
    "captions.txt",
    "new.txt",
    "new.json",
    "rows.npy",
    "decoder",
    "a b",
]
TEXTS = [
    "",
    " ",
    "x" * 10_000,
    "'",
    '"',
    "a'b\"c",
    "a\nb",
    "\udcff",
    "=",
    "=1",
    "x=",
    ",",
    "1,nan",
    "0",
    "nan",
    "nowhere",
    "fox.png",
    "{",
    "[",
    "*",
    "{}",
    "%s",
    "a - a",
    "image:",
    "key:none",
    "../..",
    "none",
    "null",
    "1e18",
    "-",
    "true",
]
SETTINGS = [
    "",
    "-1",
    "0",
    "1e18",
    "nan",
    "inf",
    "x",
    "[]",
    "[0]",
    "[-1]",
    "{}",
    "null",
    "none",
    "true",
    '"',
    "1e-320",
    "3",
    "1000000000000000000",
    "[1, 2, 3]",
    "0.5",
    "2",
]


def commands(group: click.Group = cli.cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield " ".join((*path, name)), command


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
            "steps",
            "seed",
            "lr",
            "width",
            "heads",
            "eta",
            "guidance",
            "precision",
            "widths",
            "blocks",
            "image_size",
            "batch_size",
            "ema",
            "warmup",
            "sigma_min",
            "sigma_max",
            "sampler",
            "prior_steps",
            "queue",
            "loss",
            "words",
            "accumulate",
            "save_every",
            "validate_every",
            "log_every",
            "clip_norm",
            "caption_mix",
            "rho",
            "interval",
            "rescale",
            "candidates",
            "patch",
            "drop_text",
            "smoothing",
            "workers",
            "cache_gb",
            "context_length",
            "text_layers",
            "vision",
            "label_field",
            "few_steps",
            "draws",
            "dropout",
            "",
            "x",
        ]
        return f"{rng.choice(keys)}={rng.choice(SETTINGS)}"
    if isinstance(kind, click.Path):
        return rng.choice(PATHS)
    if isinstance(kind, click.types.FloatParamType | click.FloatRange):
        return rng.choice(FLOATS)
    if isinstance(kind, click.types.IntParamType | click.IntRange):
        return rng.choice(NUMBERS)
    return rng.choice([*TEXTS, *PATHS, *FLOATS])


def line(name: str, param: click.Parameter, value: str) -> list[str]:
    """The command line that works, with this in the place of what it says of the parameter."""
    words = shlex.split(BASE[name])
    if isinstance(param, click.Argument):
        places = [n for n, word in enumerate(words) if word[:1] != "-" and (n == 0 or words[n - 1][:2] != "--")]
        arguments = [p for p in dict(commands())[name].params if isinstance(p, click.Argument)]
        at = places[min(arguments.index(param), len(places) - 1)] if places else 0
        rest = words[:at] + words[at + 1 :] if places else words
        return [*name.split(), *rest, "--", value]
    option = max(param.opts, key=len)
    if option in words and not param.multiple:
        at = words.index(option)
        words = words[:at] + words[at + 2 :]
    if param.is_flag:
        return [*name.split(), *words, option]
    return [*name.split(), *words, *([f"{option}={value}"] if option[:2] == "--" else [option, value])]


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
        outcome = commanded(words, seconds=2 if patient else 20)
    if outcome.how == "hang" and patient:
        return Outcome("done", "at work when its time was up")
    return outcome


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    return tried_all(case, numbers, seed, folder, tell)
