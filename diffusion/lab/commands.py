"""The commands of the lab: each runs one experiment into a folder and says its verdicts.

Heavy imports are inside, so that --help answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from clip_train.console import CONTEXT, Bars, device_option, out_option, say, shards_option

FOLDER = click.Path(path_type=Path)
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of everything random.")


def run(name: str, out: Path, config: Any, experiment: Callable, inputs: dict | None = None) -> None:
    """Run `experiment` with its config dataclass, then say each finding and where the figures are."""
    from clip_train.settings import config_to_json
    from diffusion.lab.experiment import Finding, read_numbers, run_experiment

    bars = Bars(f"lab {name}")
    run_experiment(
        name,
        out,
        config_to_json(config),
        lambda folder, tell: experiment(config, folder, tell),
        inputs,
        on_progress=bars,
    )
    numbers = read_numbers(out)
    for one in numbers["findings"]:
        say(Finding(**{key: value for key, value in one.items() if key != "holds"}).verdict)
    say(f"look at: {', '.join(str(out / one['file']) for one in numbers['figures'])}")


@click.command("space", context_settings=CONTEXT)
@click.option("--clip", required=True, type=FOLDER, help="CLIP folder, or MODEL:TAG of open_clip's list.")
@shards_option("Captioned pictures, best those that the CLIP has not seen.")
@click.option(
    "--expression",
    "expressions",
    multiple=True,
    metavar="'A - B'",
    help="A sum to show, as 'person with hat - person'; repeatable. Default: some that the labels hold.",
)
@click.option("--words", type=FOLDER, help="File of words to rank, one a line; by default those of the captions.")
@click.option("--classnames", type=FOLDER, help="File of names to choose from; by default the commonest labels.")
@click.option("--picture", default="", metavar="KEY|FILE", help="The one picture; by default one of the shards.")
@click.option("--label-field", default="label", show_default=True, help='Of the samples\' json; "cls" is KEY.cls.')
@click.option("--count", default=2000, show_default=True, type=click.IntRange(8), help="Pictures looked at.")
@SEED
@out_option("lab-space")
@device_option
def lab_space(clip, shards, expressions, words, classnames, picture, out, device, **options) -> None:
    """The space that pictures and captions share: matrix, map, gap, sums of texts and of pictures, temperature.

    \b
    Example:  unclip lab space --clip clip --shards 'shards/val-*.tar'
              unclip lab space --clip clip --shards shards --expression 'person with hat - person' --out hats
    """
    from functools import partial

    from clip_train.folder import Input, fingerprint_files
    from clip_train.model import Clip
    from clip_train.ranks import pick_device
    from clip_train.shards import ShardSet
    from clip_train.zeroshot import read_lines
    from diffusion.lab.space import SpaceConfig, space

    config = SpaceConfig(
        expressions=expressions,
        words=tuple(read_lines(words, "words")) if words else (),
        classes=tuple(read_lines(classnames, "names")) if classnames else (),
        picture=picture,
        **options,
    )
    samples, encoder = ShardSet(shards), Clip.load(clip, pick_device(device))
    inputs = {"shards": Input(samples.fingerprint, shards), "clip": Input(encoder.fingerprint, clip)}
    if picture and Path(picture).is_file():
        inputs["picture"] = Input(fingerprint_files([Path(picture)], Path(picture).parent), picture)
    run("space", out, config, partial(space, clip=encoder, samples=samples), inputs)


@click.command("forward", context_settings=CONTEXT)
@click.argument("image", type=FOLDER)
@click.option("--size", default=96, show_default=True, type=click.IntRange(8), help="Pixels a side.")
@click.option("--steps", default=200, show_default=True, type=click.IntRange(8), help="Steps of each schedule.")
@SEED
@out_option("lab-forward")
def lab_forward(image, out, **options) -> None:
    """A picture's way to static: schedules, signal-to-noise, three pixels in the RGB cube, the variance of each step.

    \b
    Example:  unclip lab forward fox.png --out forward
    """
    from functools import partial

    from clip_train.folder import Input
    from diffusion.lab.forward import ForwardConfig, forward
    from diffusion.source import Source

    source = Source.open(image)
    inputs = {"picture": Input(f"sha256:{source.sha256}", image)}
    run("forward", out, ForwardConfig(**options), partial(forward, source=source), inputs)


@click.command("denoise", context_settings=CONTEXT)
@click.option("--decoder", required=True, type=FOLDER, help="Decoder folder.")
@click.option("--embeddings", type=FOLDER, help="Of pictures kept from training; default: some it was trained on.")
@shards_option("Tars of the pictures; default: where the embeddings, or the decoder, were made from.", required=False)
@click.option("--clip", type=FOLDER, help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=12, show_default=True, type=click.IntRange(5), help="Pictures measured.")
@click.option("--steps", default=16, show_default=True, type=click.IntRange(2), help="Steps of a full walk.")
@SEED
@out_option("lab-denoise")
@device_option
def lab_denoise(decoder, embeddings, shards, clip, out, device, **options) -> None:
    """What a decoder believes: one step against the walk, the walk without its noise, steps and guidance, zero steps.

    \b
    Example:  unclip lab denoise --decoder decoder --embeddings emb-val
    """
    from functools import partial

    from clip_train.folder import Input
    from clip_train.ranks import pick_device
    from diffusion.examine import open_generator
    from diffusion.lab.belief import Real, pictures_for
    from diffusion.lab.denoise import DenoiseConfig, denoise

    config = DenoiseConfig(**options)
    generator = open_generator(decoder, None, clip, device=pick_device(device))
    held = pictures_for(generator, decoder, embeddings, shards, config.count, config.seed)
    real = Real.drawn_from(generator, held, config.count, config.seed)
    inputs = {
        "decoder": Input(generator.fingerprints["decoder"], decoder),
        "pictures": Input(held.fingerprint, embeddings or str(held.shards)),
    }
    run("denoise", out, config, partial(denoise, real=real), inputs)


STEPS = click.option(
    "--steps", default=3000, show_default=True, type=click.IntRange(1), help="Training steps of each network."
)


@click.command("spiral", context_settings=CONTEXT)
@STEPS
@SEED
@out_option("lab-spiral")
def lab_spiral(steps, seed, out) -> None:
    """Pictures of two pixels: what is trained, why on the total noise, why with the noise level, and how exactly.

    \b
    Example:  unclip lab spiral
              unclip lab spiral --steps 6000 --seed 1 --out longer
    """
    from diffusion.lab.field import FieldConfig, field
    from diffusion.lab.plane import PlaneConfig

    run("spiral", out, FieldConfig(plane=PlaneConfig(steps=steps, seed=seed)), field)


@click.command("sampling", context_settings=CONTEXT)
@STEPS
@SEED
@out_option("lab-sampling")
def lab_sampling(steps, seed, out) -> None:
    """The way back on the plane: what the noise of ddpm is for, and what few steps cost each sampler.

    \b
    Example:  unclip lab sampling
    """
    from diffusion.lab.plane import PlaneConfig
    from diffusion.lab.sampling import SamplingConfig, sampling

    run("sampling", out, SamplingConfig(plane=PlaneConfig(steps=steps, seed=seed)), sampling)


@click.command("guidance", context_settings=CONTEXT)
@STEPS
@click.option(
    "--wrong-label",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of the training points whose label is drawn blindly, as captions are not always right.",
)
@SEED
@out_option("lab-guidance")
def lab_guidance(steps, wrong_label, seed, out) -> None:
    """Three classes on the spiral: classifier-free guidance from 0 to 10, its arrows, and what is not wanted.

    \b
    Example:  unclip lab guidance
    """
    from diffusion.lab.plane import PlaneConfig
    from diffusion.lab.steering import SteeringConfig, steering

    plane = PlaneConfig(labels=True, wrong_label=wrong_label, steps=steps, seed=seed)
    run("guidance", out, SteeringConfig(plane=plane), steering)


COMMANDS: list[click.Command] = [lab_spiral, lab_sampling, lab_guidance, lab_space, lab_forward, lab_denoise]
