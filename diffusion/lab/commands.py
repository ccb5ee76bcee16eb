"""The commands of the lab: each runs one experiment into a folder and writes its verdicts to stdout.

Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_train.console import CONTEXT, Bars, Whole, device_option, out_option, put, say, shards_option, warn

if TYPE_CHECKING:
    from diffusion.lab.experiment import Part

FOLDER = click.Path(path_type=Path)
SEED = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of everything random."
)


def run(part: "Part", out: Path) -> None:
    """Run it, then say each finding and where the figures are."""
    from diffusion.lab.experiment import Finding, read_numbers, run_part

    run_part(part, out, Bars(f"lab {part.name}"))
    numbers = read_numbers(out)
    for one in numbers["findings"]:
        put(Finding.from_json(one).verdict)
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
@click.option("--count", default=2000, show_default=True, type=Whole(8), help="Pictures looked at.")
@SEED
@out_option("lab-space")
@device_option
def lab_space(clip, shards, words, classnames, out, device, **options) -> None:
    """The space that pictures and captions share: matrix, map, gap, sums of texts and of pictures, temperature.

    \b
    Example:  unclip lab space --clip clip --shards 'shards/val-*.tar'
              unclip lab space --clip clip --shards shards --expression 'person with hat - person' --out hats
    """
    from clip_train.zeroshot import read_lines
    from diffusion.lab.parts import space_part

    options["words"] = tuple(read_lines(words, "words")) if words else ()
    options["classes"] = tuple(read_lines(classnames, "names")) if classnames else ()
    run(space_part(clip, shards, device, **options), out)


@click.command("forward", context_settings=CONTEXT)
@click.argument("image", type=FOLDER)
@click.option("--size", default=96, show_default=True, type=Whole(8), help="Pixels a side.")
@click.option("--steps", default=200, show_default=True, type=Whole(8), help="Steps of each schedule.")
@SEED
@out_option("lab-forward")
def lab_forward(image, out, **options) -> None:
    """A picture's way to static: schedules, signal-to-noise, three pixels in the RGB cube, the variance of each step.

    \b
    Example:  unclip lab forward fox.png --out forward
    """
    from diffusion.lab.parts import forward_part

    run(forward_part(image, **options), out)


@click.command("denoise", context_settings=CONTEXT)
@click.option("--decoder", required=True, type=FOLDER, help="Decoder folder.")
@click.option("--embeddings", type=FOLDER, help="Of pictures kept from training; default: some it was trained on.")
@shards_option("Tars of the pictures; default: where the embeddings, or the decoder, were made from.", required=False)
@click.option("--clip", type=FOLDER, help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=12, show_default=True, type=Whole(5), help="Pictures measured.")
@click.option("--steps", default=16, show_default=True, type=Whole(2), help="Steps of a full walk.")
@SEED
@out_option("lab-denoise")
@device_option
def lab_denoise(decoder, embeddings, shards, clip, out, device, **options) -> None:
    """What a decoder believes: one step against the walk, the walk without its noise, steps and guidance, zero steps.

    \b
    Example:  unclip lab denoise --decoder decoder --embeddings emb-val
    """
    from diffusion.lab.parts import denoise_part

    run(denoise_part(decoder, embeddings, shards, clip, device, **options), out)


@click.command("unclip", context_settings=CONTEXT)
@click.option("--decoder", required=True, type=FOLDER, help="Decoder folder.")
@click.option("--prior", required=True, type=FOLDER, help="Prior folder, or text, shift, ridge, knn, mean.")
@click.option("--embeddings", required=True, type=FOLDER, help="Of captioned pictures, best kept from training.")
@click.option("--fit", type=FOLDER, help="Embeddings that ridge, knn and the like are fitted to.")
@click.option("--clip", type=FOLDER, help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=32, show_default=True, type=Whole(8), help="Captions drawn, in three ways.")
@SEED
@out_option("lab-unclip")
@device_option
def lab_unclip(decoder, prior, embeddings, fit, clip, out, device, **options) -> None:
    """From words to a picture: what the prior is for, what an embedding holds, what lies between two of them.

    \b
    Example:  unclip lab unclip --decoder decoder --prior prior --embeddings emb-val
    """
    from diffusion.lab.parts import unclip_part

    run(unclip_part(decoder, str(prior), embeddings, clip, fit, device, **options), out)


STEPS = click.option("--steps", default=3000, show_default=True, type=Whole(1), help="Training steps of each network.")


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
    from diffusion.lab.parts import spiral_part

    run(spiral_part(steps, seed), out)


@click.command("sampling", context_settings=CONTEXT)
@STEPS
@SEED
@out_option("lab-sampling")
def lab_sampling(steps, seed, out) -> None:
    """The way back on the plane: what the noise of ddpm is for, and what few steps cost each sampler.

    \b
    Example:  unclip lab sampling
    """
    from diffusion.lab.parts import sampling_part

    run(sampling_part(steps, seed), out)


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
    from diffusion.lab.parts import guidance_part

    run(guidance_part(steps, seed, wrong_label), out)


@click.command("all", context_settings=CONTEXT)
@click.option(
    "--run",
    "folder",
    type=FOLDER,
    help="Folder that holds your clip, prior, decoder and embeddings. Default: quickstart, which is made if need be.",
)
@click.option(
    "--embeddings", type=FOLDER, help="Of the pictures to look at; default: the most that were not trained on."
)
@click.option("--image", type=FOLDER, help="The picture that goes to static; default: one of the run's.")
@STEPS
@click.option("--count", type=Whole(8), help="Pictures that the decoder draws; default: what each wants.")
@SEED
@out_option("lab")
@device_option
def lab_all(folder, embeddings, image, steps, count, seed, out, device) -> None:
    """Every experiment, in the order of the story, as one page: lab.html needs no other file.

    \b
    Example:  unclip lab all
              unclip lab all --run . --embeddings emb-val --image fox.png
    """
    from diffusion.lab.experiment import Finding
    from diffusion.lab.run import Run
    from diffusion.lab.story import PAGE, story_of, tell

    if folder is None:
        folder = Path("quickstart")
        embeddings = embeddings or folder / "emb" / "recombined"  # it knows the words, and not these pictures
        if not (folder / "report.json").exists():
            from diffusion.quickstart import run_quickstart

            say("no --run: the quickstart's models, which are trained first (about ten minutes on a CPU)")
            run_quickstart(folder, device=device, bars=Bars, say=say, on_warning=warn)
    found = Run.find(folder, embeddings)
    story = story_of(found, image=image, steps=steps, count=count, seed=seed, device=device)
    for name, why in story.missing.items():
        say(f"lab {name} is left out: {why}")
    made = tell(story, out, lambda name: Bars(f"lab {name}"), say)
    for name, findings in made.result["findings"].items():
        for one in findings:
            put(f"{name}: {Finding.from_json(one).verdict}")
    say(f"look at: {out / PAGE}")


COMMANDS: list[click.Command] = [
    lab_spiral, lab_sampling, lab_guidance, lab_space, lab_forward, lab_denoise, lab_unclip, lab_all,
]  # fmt: skip
