"""Options that all commands share which draw, and what they do with them: open the models, write the pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clip_train.console import Bars, Whole, device_option, say

if TYPE_CHECKING:
    from clip_train.store import EmbeddingStore
    from diffusion.generate import Generated
    from diffusion.points import Point
    from diffusion.source import Source

FILE = click.Path(path_type=Path)
SAMPLING = ("steps", "sampler", "guidance", "eta", "negative", "candidates")  # settings with an option of their own


def model_options(command: Callable) -> Callable:
    """Which models draw."""
    for option in (
        device_option,
        click.option("--compile", is_flag=True, help="Let torch.compile translate the decoder: a minute, then faster."),
        click.option("--copies", type=FILE, help="Embeddings of the training pictures: record each one's nearest."),
        click.option("--guide", type=FILE, help="A weaker decoder's folder, for --set autoguidance=1.5."),
        click.option("--upsampler", type=FILE, help="Upsampler folder: make the pictures larger."),
        click.option("--clip", type=FILE, help="CLIP folder; by default where the decoder says it was."),
        click.option("--embeddings", type=FILE, help="Embeddings folder: for keys, neighbours, axes, --prior knn."),
        click.option("--prior", help="Prior folder, or text, shift, ridge, knn, mean with --embeddings; for captions."),
        click.option("--decoder", required=True, type=FILE, help="Decoder folder."),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable) -> Callable:
    """How they draw, and where the pictures go."""
    formats = click.Choice(["png", "jpg", "webp"])
    for option in (
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other sampling setting."),
        click.option("--negative", help="A caption to draw away from; needs --prior."),
        click.option(
            "--guidance", type=click.FloatRange(0), help="1 follows the embedding as trained, more overshoots."
        ),
        click.option("--sampler", help="heun, ddim, dpmpp_2m, ... : docs/sampling.md."),
        click.option("--steps", type=Whole(1), help="Sampling steps of the decoder."),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first picture."),
        click.option("--sheet", type=FILE, help="Write a contact sheet to this PNG as well."),
        click.option("--format", "form", type=formats, help="Of the files in a folder; png unless told."),
        click.option("--out", default="generated", show_default=True, type=FILE, help="Picture file, or a folder."),
    ):
        command = option(command)
    return command


class Drawing:
    """What a command works with: the generator, how it samples, the embeddings, and where its pictures go."""

    def __init__(
        self,
        title: str,
        options: dict[str, Any],
        *,
        sees: bool = False,
        base: dict[str, Any] | None = None,
        given: Sequence[Path | str | None] = (),
        count: int = 1,
        recalls: bool = True,
    ) -> None:
        """Check the options, then load the models. sees: whether CLIP is needed without a prior.

        base: settings that are the command's own defaults. given: files that nothing may be written over. count: of the
        pictures. recalls: whether those that are there are not drawn again.
        """
        from clip_train.ranks import pick_device
        from clip_train.settings import override
        from diffusion.gallery import Gallery, refuse_overwriting
        from diffusion.generate import Generator, Sampling

        for out in (options["out"], options["sheet"], options.get("animation")):
            refuse_overwriting(out, [str(name).removeprefix("image:") for name in given if name])
        Gallery(options["out"], options["form"]).room_for(count)
        named = {name: options.get(name) for name in SAMPLING}
        pairs = [f"{name}={value}" for name, value in named.items() if value is not None] + list(options["settings"])
        (asked,) = override([Sampling(**(base or {}))], pairs)  # complain before anything is loaded
        sees = sees or asked.candidates > 1 or asked.clip_guidance > 0
        self.options, self.title = options, title
        device = pick_device(options["device"])
        self.store = open_store(options["embeddings"])
        clip = options["clip"] or (clip_of(options["decoder"]) if sees else None)
        self.generator = Generator.open(
            options["decoder"],
            options["prior"],
            clip,
            guide=options["guide"],
            upsampler=options["upsampler"],
            embeddings=options["embeddings"],
            copies=options["copies"],
            device=device,
            compile=options["compile"],
        )
        if self.store is not None:
            from diffusion.neighbours import refuse_other_clip

            refuse_other_clip(self.store, self.generator.fingerprints["clip"])
        own = base or {}
        self.how = override([dataclasses.replace(self.generator.how, **own)], pairs)[0]
        self.seed: int = options["seed"]
        self.gallery = Gallery(options["out"], options["form"], self.generator)
        click.get_current_context().call_on_close(self.gallery.close)
        if recalls:
            self.generator.recall = self.gallery.recall

    def steps(self, total: int | None = None) -> Callable[[int, Any], None]:
        """on_step of a drawing of so many steps: a bar; steps counted beyond it start a new one."""
        bars, told = Bars(self.title), [0]
        total = total or self.how.steps

        def on_step(step: int, denoised: Any) -> None:
            told[0] += 1
            bars((told[0] - 1) % total + 1, total)

        return on_step

    def point(self, name: str) -> "Point":
        """The point of the space that has this name; see points.py."""
        from diffusion.points import point

        return point(self.generator, name, self.store, seed=self.seed, how=self.how)

    def write(
        self, made: "Sequence[Generated]", labels: Sequence[str] = (), given: "Sequence[Point | Source]" = ()
    ) -> None:
        """Write the pictures that are not there yet, name them on stdout, and draw the contact sheet if one is wanted.

        given: what they were made from; its pictures stand first on the sheet.
        """
        self.gallery.room_for(len(made))
        for one in made:
            click.echo(self.gallery.find(one.provenance) or self.gallery.add(one))
        tell_copies([one.provenance for one in made])
        if self.options["sheet"]:
            sources = [getattr(one, "picture", None) for one in given]
            sources = [getattr(one, "picture", one) for one in sources if one is not None]
            made_pictures, labels = [one.picture for one in made], labels or [""] * len(made)
            write_sheet(self.options["sheet"], [*sources, *made_pictures], ["given"] * len(sources) + list(labels))


def tell_copies(records: Sequence[dict[str, Any]]) -> None:
    """Say how many pictures are suspiciously near to a training picture, if they were looked at for that."""
    found = [record["nearest"] for record in records if "nearest" in record]
    near = sum(one["is_copy"] for one in found)
    if found:
        say(f"{near} of {len(found)} nearer to a training picture than 95 % of those are to one another")


def write_sheet(path: Path, pictures: Sequence[Any], labels: Sequence[str]) -> None:
    """A contact sheet of pictures or their files, and a line about it."""
    from PIL import Image

    from clip_train.sheet import contact_sheet, save_sheet

    cells = []
    for one in pictures:
        if isinstance(one, Path):
            with Image.open(one) as file:
                one = file.convert("RGB")
        cells.append(one)
    save_sheet(contact_sheet(cells, labels, cell=128), path)
    say(f"wrote {path}")


def open_store(folder: Path | None) -> "EmbeddingStore | None":
    """The embeddings folder, if one is named."""
    if folder is None:
        return None
    from clip_train.store import EmbeddingStore

    return EmbeddingStore.open(folder)


def clip_of(decoder: Path) -> Path:
    """Where the CLIP is that the decoder was trained with."""
    from clip_train.folder import read_manifest
    from clip_train.settings import UserError

    found = read_manifest(decoder, "decoder").input_path("clip")
    if found is None:
        raise UserError(f"the CLIP that {decoder}/ was trained with is not where it was; say where: --clip")
    return found


def numbers(text: str, option: str, whole: bool = False) -> list:
    """ "0.2,0.4" as [0.2, 0.4]; whole: as integers."""
    from clip_train.console import numbers_in
    from clip_train.settings import UserError

    found = numbers_in(text, option)
    if not found or (whole and not all(number.is_integer() for number in found)):
        raise UserError(f"{option} {text}: expected {'whole ' if whole else ''}numbers with commas between")
    return [int(number) for number in found] if whole else found
