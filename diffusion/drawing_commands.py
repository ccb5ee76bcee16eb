"""The commands that draw from points of the space: generate, vary, interpolate, reconstruct.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path
from typing import Any

import click

from clip_train.console import CONTEXT, Bars, Whole, say
from diffusion.drawing_options import FILE, Drawing, model_options, numbers, sampling_options, tell_copies, write_sheet


@click.command(context_settings=CONTEXT)
@click.argument("captions", nargs=-1)
@click.option("--file", "caption_file", type=FILE, help="Text file with a caption on each line.")
@click.option("--embedding", type=FILE, help="A .npy of (N, 512) image embeddings.")
@click.option("--key", "keys", multiple=True, help="A sample's key, of --embeddings: its embedding. Repeatable.")
@click.option("--neighbours", type=Whole(1), help="Draw captions from the K nearest pictures of --embeddings.")
@click.option("--again", type=FILE, help="Make this picture again, from its own record.")
@click.option("--source", "sources", multiple=True, type=FILE, help="With --again: what the picture was made from.")
@click.option("--count", default=1, show_default=True, type=Whole(1), help="Pictures per caption.")
@click.option("--candidates", type=Whole(1), help="Draw so many for each, and keep the one CLIP likes most.")
@click.option(
    "--grid", "grids", multiple=True, metavar="KEY=A,B,..", help="Draw with each of these values; 1 or 2 axes."
)
@click.option("--strip", is_flag=True, help="Also write what the steps looked like, NAME-steps.png.")
@click.option("--batch-size", default=32, show_default=True, type=Whole(1), help="Pictures at a time.")
@model_options
@sampling_options
def generate(
    captions, caption_file, embedding, keys, neighbours, again, sources, count, grids, strip, batch_size, **options: Any
) -> None:
    """Make pictures from captions, embeddings or samples; each file holds the record it can be made again from.

    A folder is added to: what is there already is not drawn again, so a run that was killed goes on.

    \b
    Example:  unclip generate "a red fox" "two hearts" --prior prior --decoder decoder --out pictures
              unclip generate --key train000123 --embeddings emb --decoder decoder --count 4
              unclip generate "a red fox" --neighbours 8 --embeddings emb --decoder decoder
              unclip generate "a red fox" --prior prior --decoder decoder --grid guidance=1,2,4 steps=10,20
    """
    from clip_train.settings import UserError
    from diffusion.asked import fill
    from diffusion.gallery import read_record
    from diffusion.generate import read_captions
    from diffusion.grid import axes_among, read_axis

    words, captions = axes_among(captions) if grids else ([], list(captions))
    axes = [read_axis(word) for text in (*grids, *words) for word in text.split()]
    if sum(map(bool, (captions or caption_file, embedding, keys, again))) != 1:
        raise UserError("give captions (or --file), or --embedding, or --key, or --again: one of the four")
    if again:
        draw_again(again, sources, options, count != 1 or axes or strip or neighbours)
        return
    if sources:
        raise UserError("--source goes with --again; to change a picture: unclip edit, vary, img2img, inpaint")
    texts = [*captions, *(read_captions(caption_file) if caption_file else [])]
    if texts and not (options["prior"] or neighbours):
        raise UserError("captions need a prior; pass --prior prior (made by unclip train prior), or --neighbours 8")
    if neighbours and not texts:
        raise UserError("--neighbours are those of a caption; give one")
    if (keys or neighbours) and not options["embeddings"]:
        raise UserError("keys and neighbours are of an embeddings folder; say which: --embeddings emb")
    if axes:
        if count != 1 or strip:
            raise UserError(
                "a grid draws one picture for each setting; leave --count and --strip out, or take seed=0,1"
            )
        draw_grid_of(texts, keys, embedding, neighbours, axes, options)
        return
    known = 1 if embedding else len(texts or keys) * count
    drawing = Drawing("generate", options, sees=bool(neighbours), count=known, recalls=False)
    asked = what_is_asked(drawing, texts, keys, embedding, neighbours).repeated(count)
    drawing.gallery.room_for(len(asked))
    seeds, paths = range(drawing.seed, drawing.seed + len(asked)), []
    how = {"batch_size": batch_size, "strips": strip, "on_progress": Bars("generate")}
    for path in fill(drawing.gallery, drawing.generator, asked, seeds, drawing.how, **how):
        click.echo(path)
        paths.append(path)
    if options["copies"]:
        tell_copies([read_record(path) for path in paths])
    if options["sheet"]:
        write_sheet(options["sheet"], paths, asked.labels)


def what_is_asked(
    drawing: Drawing, texts: list[str], keys: tuple, embedding: Path | None, neighbours: int | None
) -> Any:
    """The arguments of generate as points to draw."""
    from diffusion.asked import Asked

    if embedding:
        return Asked.of_vectors(embedding)
    if keys:
        return Asked.of_keys(drawing.store, keys)
    if neighbours:
        return Asked.of_neighbours(drawing.generator, drawing.store, texts, neighbours)
    return Asked.of_captions(texts)


def draw_again(again: Path, sources: tuple[Path, ...], options: dict[str, Any], more: Any) -> None:
    """The picture of a record, once more."""
    from clip_train.settings import UserError
    from diffusion.again import make_again, sees
    from diffusion.gallery import read_record
    from diffusion.source import Source

    decided = ("steps", "sampler", "guidance", "negative", "candidates")
    if more or options["seed"] or options["settings"] or any(options[name] is not None for name in decided):
        raise UserError("--again makes the picture as its record says; leave the other options of how to draw it out")
    record, given = read_record(again), [Source.open(path) for path in sources]
    drawing = Drawing("generate", options, sees=sees(record), given=[again, *sources], recalls=False)
    drawing.write([make_again(drawing.generator, record, given)])


def draw_grid_of(
    texts: list[str], keys: tuple, embedding: Path | None, neighbours: int | None, axes: list, options
) -> None:
    """One thing with every combination of settings: the pictures in the folder, and grid.png; or that alone."""
    from clip_train.settings import UserError
    from clip_train.sheet import save_sheet
    from diffusion.asked import drawn
    from diffusion.grid import check_axes, draw_grid, grid_sheet

    check_axes(axes)
    sees = {"candidates", "clip_guidance"} & {axis.name for axis in axes}
    drawing = Drawing("grid", options, sees=bool(neighbours or sees), recalls=False)
    asked = what_is_asked(drawing, texts, keys, embedding, neighbours)
    if len(asked) != 1:
        raise UserError(f"a grid is of one caption, key or embedding, not of {len(asked)}")
    gallery = drawing.gallery
    made = list(
        draw_grid(
            lambda how, seed: drawn(asked, drawing.generator, None if gallery.one else gallery, seed, how),
            axes, drawing.how, drawing.seed, on_progress=Bars("grid"),
        )
    )  # fmt: skip
    sheet = options["sheet"] or (gallery.out if gallery.one else gallery.out / "grid.png")
    save_sheet(grid_sheet(made, axes, asked.labels[0]), sheet)
    click.echo(sheet)


@click.command(context_settings=CONTEXT)
@click.argument("picture", required=False)
@click.option("--key", help="Of a sample of --embeddings, in place of PICTURE.")
@click.option("--count", default=4, show_default=True, type=Whole(1), help="Variations.")
@click.option(
    "--eta", type=click.FloatRange(0, 1), help="Of a picture: 0 keeps its noise, 1 forgets it.  [default: 0.5]"
)
@model_options
@sampling_options
def vary(picture, key, count, eta, **options: Any) -> None:
    """Other pictures of what a picture is about: the same embedding, other noise.

    A picture's own noise is found first (DDIM inversion), and eta says how much of it is drawn anew. A sample of
    --embeddings has an embedding only: its variations are of different seeds.

    \b
    Example:  unclip vary fox.jpg --decoder decoder --eta 0.8 --count 8 --sheet foxes.png
              unclip vary --key train000123 --embeddings emb --decoder decoder
    """
    from clip_train.settings import UserError
    from diffusion.inversion import FAITHFUL
    from diffusion.manipulate import vary
    from diffusion.points import kind_of

    if bool(picture) == bool(key):
        raise UserError("give a picture, or a sample's --key: one of the two")
    name = f"key:{key}" if key else picture
    of_picture = kind_of(name)[0] == "image"
    if eta is not None and not of_picture:
        raise UserError("--eta is of a picture's own noise; variations of an embedding differ by their seeds")
    base = FAITHFUL | {"eta": 0.5} if of_picture else None
    drawing = Drawing("vary", {**options, "eta": eta}, sees=of_picture, base=base, given=[picture], count=count)
    point = drawing.point(name)
    made = vary(
        drawing.generator, point.row, count, drawing.seed, drawing.how, picture=point.picture, on_step=drawing.steps()
    )
    drawing.write(made, [f"seed {one.provenance['seed']}" for one in made], [point])


@click.command(context_settings=CONTEXT)
@click.argument("points", nargs=-1)
@click.option("--key", "keys", multiple=True, help="Of a sample of --embeddings, as one of the points. Repeatable.")
@click.option("--frames", default=9, show_default=True, type=Whole(2), help="Pictures, both ends included.")
@click.option(
    "--in", "kind", type=click.Choice(["embedding", "noise", "both"]), help="What changes on the way.  [default: both]"
)
@click.option("--animation", type=FILE, help="Also write the way there and back, as a .gif, .webp or .mp4.")
@click.option("--seconds", default=0.15, show_default=True, type=click.FloatRange(0.02, 10), help="A frame's time.")
@model_options
@sampling_options
def interpolate(points, keys, frames, kind, animation, seconds, **options: Any) -> None:
    """Pictures on the way from A to B, each a picture, a caption, key:KEY of --embeddings, or vector:FILE.npy.

    In CLIP space the way is an arc between the embeddings; in noise it is one between the pictures' own noises (found
    by DDIM inversion), or two seeds' where there is no picture. Both, between two pictures, begins and ends in them.

    \b
    Example:  unclip interpolate fox.jpg owl.jpg --decoder decoder --animation fox-owl.gif --sheet fox-owl.png
              unclip interpolate "a red fox" "an owl" --in embedding --prior prior --decoder decoder
    """
    from clip_train.settings import UserError
    from diffusion.animation import check_suffix, save_animation, there_and_back
    from diffusion.inversion import FAITHFUL
    from diffusion.manipulate import interpolate
    from diffusion.points import kind_of

    names = [*points, *(f"key:{key}" for key in keys)]
    if len(names) != 2:
        raise UserError(f"an interpolation is between two points, not {len(names)}: pictures, captions or --key")
    if animation:
        check_suffix(animation)
    pictured = [kind_of(name)[0] == "image" for name in names]
    kind = kind or ("both" if any(pictured) else "embedding")
    base = FAITHFUL if kind != "embedding" and any(pictured) else None
    drawing = Drawing(
        "interpolate", {**options, "animation": animation}, sees=any(pictured), base=base, given=points, count=frames
    )
    ends = [drawing.point(name) for name in names]
    made = interpolate(
        drawing.generator,
        [end.row for end in ends],
        frames,
        drawing.seed,
        drawing.how,
        kind=kind,
        pictures=[end.picture for end in ends],
        on_step=drawing.steps(),
    )
    drawing.write(made, [f"{one.provenance['task']['share']:.2f}" for one in made], ends)
    if animation:
        save_animation(there_and_back([one.picture for one in made]), animation, seconds)
        say(f"wrote {animation}")


@click.command(context_settings=CONTEXT)
@click.argument("picture", required=False)
@click.option("--key", help="Of a sample of --embeddings, in place of PICTURE.")
@click.option("--pca", default="20,40,80,160,320", show_default=True, help="How many axes to keep, a picture for each.")
@model_options
@sampling_options
def reconstruct(picture, key, pca, **options: Any) -> None:
    """A picture from only so many principal axes of the embeddings: what each of them adds (unCLIP, figure 7).

    \b
    Example:  unclip reconstruct fox.jpg --pca 20,40,80,160,320 --embeddings emb --decoder decoder --sheet axes.png
    """
    from clip_train.settings import UserError
    from diffusion.pca import Pca, reconstruct

    counts = numbers(pca, "--pca", whole=True)
    if bool(picture) == bool(key):
        raise UserError("give a picture, or a sample's --key: one of the two")
    if not options["embeddings"]:
        raise UserError("the axes are those of an embeddings folder; say which: --embeddings emb")
    drawing = Drawing("reconstruct", options, sees=not key, given=[picture], count=len(counts))
    point = drawing.point(f"key:{key}" if key else picture)
    axes = Pca.fit(drawing.store)
    made = reconstruct(drawing.generator, point.row, axes, counts, drawing.seed, drawing.how, on_step=drawing.steps())
    notes = [one.provenance["task"] for one in made]
    labels = [f"{note['axes']} axes, cosine {note['cosine']:.2f}" for note in notes]
    drawing.write(made, labels, [point])
