"""The story that `lab all` tells: which experiments, in what order, about whose models; one folder, one page."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_train.folder import Manifest, Workspace, partial_of, write_file
from clip_train.pictures import PictureError
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.shards import ShardSet
from diffusion.lab import parts
from diffusion.lab.experiment import Part, read_numbers, run_part
from diffusion.lab.page import page_of
from diffusion.lab.run import Run
from diffusion.source import Source

PAGE = "lab.html"


@dataclass(frozen=True)
class Chapter:
    """A part of the story: what it is about, and the experiments that show it."""

    title: str
    text: str
    experiments: Sequence[str]  # names of lab commands


STORY = (
    Chapter(
        "The space",
        "CLIP turns a picture into 512 numbers and a caption into 512 numbers. It is shown a batch of pairs and "
        "asked, for each picture, which caption is its own, and for each caption, which picture. Nothing else is "
        "taught; a space in which one can search, name and calculate is what comes of it.",
        ("space",),
    ),
    Chapter(
        "Noise",
        "Making pictures begins with destroying them. Add a little noise to a picture again and again, and it "
        "walks to static. Many small steps are as good as one large jump, so training may begin anywhere on the "
        "way.",
        ("forward",),
    ),
    Chapter(
        "Walking back",
        "A network is shown a noisy picture and asked what the noise was. Its answer is an arrow towards the mean "
        "of all pictures that could have become this one. Pictures of two pixels are points on a plane, where the "
        "arrows can be drawn and the right ones are known exactly; after them, a decoder that was trained on real "
        "pictures.",
        ("spiral", "sampling", "denoise"),
    ),
    Chapter(
        "Steering",
        "Two arrows, one with a condition and one without. Their difference is what the condition adds; to go "
        "farther along it than was trained is guidance.",
        ("guidance",),
    ),
    Chapter(
        "unCLIP",
        "CLIP goes from pictures to points. unCLIP goes back: a prior guesses, from a caption's point, where its "
        "picture's point would be, and a decoder walks from noise to a picture that lies there.",
        ("unclip",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that is to be run, and why the rest is not."""

    parts: Sequence[Part]
    missing: Mapping[str, str]  # experiment -> why it is left out
    about: str  # what models these are


def story_of(
    run: Run, *, image: Path | None = None, steps: int = 3000, count: int | None = None, seed: int = 0,
    device: str = "auto",
) -> Story:  # fmt: skip
    """Every experiment that the run's folders allow.

    image: the picture that goes to static; default: one of the run's. steps: of the networks on the plane. count:
    pictures that the decoder draws in each of its experiments.
    """
    drawn = {} if count is None else {"count": count}
    ready, missing = [], {}

    def add(name: str, lacks: str, make: Callable[[], Part]) -> None:
        try:
            if lacks:
                raise UserError(lacks)
            ready.append(make())
        except UserError as error:
            missing[name] = str(error)

    lacks = {
        "shards": "" if run.shards else f"the pictures of {run.folder}/ are not where they were",
        "decoder": "" if run.decoder else f"{run.folder}/ holds no decoder: unclip train decoder",
        "prior": "" if run.prior else f"{run.folder}/ holds no prior of this CLIP: unclip train prior",
        "embeddings": "" if run.embeddings else f"{run.folder}/ holds no embeddings of this CLIP: unclip embed",
    }
    add("space", lacks["shards"], lambda: parts.space_part(run.clip, run.shards, device, seed=seed))
    add("forward", "" if image else lacks["shards"],
        lambda: parts.forward_part(image or a_picture(run.shards, seed), seed=seed))  # fmt: skip
    add("spiral", "", lambda: parts.spiral_part(steps, seed))
    add("sampling", "", lambda: parts.sampling_part(steps, seed))
    add("denoise", lacks["decoder"] or lacks["shards"],
        lambda: parts.denoise_part(run.decoder, run.embeddings, run.shards, run.clip, device, seed=seed,
                                   **drawn))  # fmt: skip
    add("guidance", "", lambda: parts.guidance_part(steps, seed))
    add("unclip", lacks["decoder"] or lacks["prior"] or lacks["embeddings"],
        lambda: parts.unclip_part(run.decoder, run.prior, run.embeddings, run.clip, None, device, seed=seed,
                                  **drawn))  # fmt: skip
    known = {True: ", which they were trained on", False: ", which they were not trained on", None: ""}[run.seen]
    pictures = f" and the pictures of {run.pictures}{known}" if run.shards else ""
    return Story(parts=ready, missing=missing, about=f"Made with the models in {run.folder}/{pictures}.")


def a_picture(shards: str, seed: int) -> Source:
    """One of the shards' pictures, chosen by seed."""
    samples = ShardSet(shards)
    for place in np.random.default_rng(seed).permutation(len(samples)).tolist():
        try:
            source = Source.read(samples.picture(place), samples.keys[place])
        except (PictureError, UserError):
            continue
        if float(source.pixels(32).flatten(1).std(dim=1).max()) > 0.1:  # not one of a single colour
            return source
    raise UserError(f"{shards} holds no picture of more than one colour that can be decoded")


def tell(
    story: Story, out: Path | str, bars: Callable[[str], Progress | None] = lambda name: None,
    say: Callable[[str], None] = lambda text: None,
) -> Manifest:  # fmt: skip
    """Run every part into a folder of its own in `out`, then write lab.html; a killed run goes on with its next part.

    bars: makes a progress bar by a part's name.
    """
    settings = {part.name: config_to_json(part.config) for part in story.parts}
    inputs = {f"{part.name}: {name}": one for part in story.parts for name, one in part.inputs.items()}
    space = Workspace.open(out, "lab", {"experiment": "all", "parts": settings, "missing": sorted(story.missing)},
                           inputs, "unclip lab all")  # fmt: skip
    if space.done:
        return space.done
    missing = dict(story.missing)
    for number, part in enumerate(story.parts, 1):
        say(f"[{number}/{len(story.parts)}] lab {part.name}")
        try:
            run_part(part, space.path / part.name, bars(part.name))
        except UserError as error:  # such as too few pictures; the others are not lost by it
            say(f"lab {part.name} is left out: {error}")
            missing[part.name] = str(error)
            shutil.rmtree(partial_of(space.path / part.name), ignore_errors=True)
    made = [part.name for part in story.parts if part.name not in missing]
    findings = {name: read_numbers(space.path / name)["findings"] for name in made}
    verdicts = [one["holds"] for found in findings.values() for one in found]
    count = f"{sum(verdicts)} of {len(verdicts)} claims hold in this run; their numbers are below their pictures."
    page = page_of(STORY, space.path, f"{story.about} {count}", missing)
    write_file(space.path / PAGE, page.encode())
    return space.publish({"findings": findings, "missing": missing})
