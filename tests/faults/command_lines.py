"""For every command a line of it that works, and the same line with one parameter given otherwise."""

import shlex
from collections.abc import Iterator

import click

import cli

EVERYTHING = ["shards", "others", "clip", "emb", "index", "prior", "decoder", "upsampler", "made.png", "fox.png",
              "mask.png", "rows.npy", "captions.txt", "table.csv"]  # fmt: skip
DRAW = "--decoder decoder --device cpu --set steps=1 --set prior_steps=1"
FEW = "--steps 1 --batch-size 4 --device cpu --set precision=fp32"
JUDGE = "--decoder decoder --embeddings emb --count 20 --steps 1 --device cpu"
CLIP = """--set 'vision={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}' --set image_size=16
          --set text_width=32 --set text_heads=2 --set text_layers=1 --set context_length=16 --set embed_dim=32"""
SMALL = "--set image_size=8 --set widths=[16] --set blocks=[1] --set head_width=16 --set cond_width=16"
BASE = {  # in a folder with EVERYTHING in it
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
    "evaluate sweep": "--decoder decoder --embeddings emb --count 20 --steps 1,2 --sampler ddim --eta 0 --guidance 1 "
    "--out new --device cpu",
    "evaluate copies": "fox.png --train emb --clip clip --device cpu",
    "evaluate upsampler": "--upsampler upsampler --shards shards --clip clip --count 40 --steps 1 --device cpu",
    "export hf": "clip --out new",
    "export onnx": "clip --out new",
    "lab spiral": "--steps 1 --out new",
    "lab sampling": "--steps 1 --out new",
    "lab guidance": "--steps 1 --out new",
    "lab space": "--clip clip --shards shards --count 16 --out new --device cpu",
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
    "reconstruct": f"fox.png --embeddings emb --pca 4,8 --out new {DRAW}",
    "img2img": f"fox.png 'a fox' --prior prior --out new.png {DRAW}",
    "inpaint": f"fox.png 'a fox' --mask mask.png --prior prior --out new.png {DRAW}",
    "outpaint": f"fox.png 'a fox' --left 2 --prior prior --out new.png {DRAW}",
    "enlarge": "fox.png --upsampler upsampler --out new.png --steps 1 --blind",
    "ema": "decoder --shards others --out new --count 4 --device cpu",
    "quickstart": "--out new --device cpu --minutes 0.1",
}


def commands(group: click.Group = cli.cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield " ".join((*path, name)), command


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
