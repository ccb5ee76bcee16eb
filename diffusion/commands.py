"""The commands around diffusion: train prior, train decoder, generate, evaluate prior, evaluate loop, quickstart.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path
from typing import Any

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    device_option,
    out_option,
    say,
    shards_option,
    training_options,
    training_settings,
    write_figures,
)


@click.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Folder made by unclip embed.")
@out_option("prior")
@click.option("--preset", default="tiny", show_default=True, help="tiny (CPU, a minute) or small (one GPU).")
@training_options
def train_prior(embeddings: Path, out: Path, preset: str, device: str, **options: Any) -> None:
    """Train the diffusion prior: text embedding -> image embedding.

    \b
    Example:  unclip train prior --embeddings emb --out prior
    """
    from clip_train.ranks import start
    from diffusion import train

    config, fit_config = train.settings(train.PRIOR_PRESETS, preset, training_settings(**options))
    bars = Bars("train prior")
    made = train.train_prior(
        embeddings, out, config=config, fit_config=fit_config, device=start(device), on_progress=bars
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f"next: unclip train decoder --shards shards --clip {made.input_path('clip') or 'clip'} --out decoder")


@click.command("decoder", context_settings=CONTEXT)
@shards_option("Folder of tars, a tar, a glob or a {000..010} range.")
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="CLIP folder that makes the embeddings.")
@out_option("decoder")
@click.option("--preset", default="tiny", show_default=True, help="tiny (32 px, CPU) or small (64 px, one GPU).")
@training_options
def train_decoder(shards: str, clip: Path, out: Path, preset: str, device: str, **options: Any) -> None:
    """Train the decoder: image embedding -> picture.

    \b
    Example:  unclip train decoder --shards shards --clip clip --out decoder --minutes 30
    """
    from clip_train.ranks import start
    from diffusion import train

    config, fit_config = train.settings(train.DECODER_PRESETS, preset, training_settings(**options))
    bars = Bars("train decoder")
    made = train.train_decoder(
        shards, clip, out, config=config, fit_config=fit_config, device=start(device), on_progress=bars
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f'next: unclip generate "a red fox" --prior prior --decoder {out} --out fox.png')


@click.command(context_settings=CONTEXT)
@click.argument("captions", nargs=-1)
@click.option("--file", "caption_file", type=click.Path(path_type=Path), help="Text file with a caption on each line.")
@click.option("--embedding", type=click.Path(path_type=Path), help="A .npy of (N, 512) image embeddings.")
@click.option("--again", type=click.Path(path_type=Path), help="Make this picture again, from its own record.")
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="Decoder folder.")
@click.option("--prior", type=click.Path(path_type=Path), help="Prior folder; needed for captions.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the decoder says it was.")
@click.option(
    "--out", default="generated", show_default=True, type=click.Path(path_type=Path), help="PNG, or a folder."
)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet to this PNG as well.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="Pictures per caption.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first picture.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Pictures at a time.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps of the decoder.")
@click.option("--sampler", help="heun, ddim, ddpm or euler.")
@click.option("--guidance", type=click.FloatRange(0), help="1 follows the embedding as trained, more overshoots.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other sampling setting; repeatable.")
@device_option
def generate(
    captions, caption_file, embedding, again, decoder, prior, clip, out, sheet, count, seed, batch_size, settings,
    device, **named: Any,
) -> None:  # fmt: skip
    """Make pictures from captions or from image embeddings; each PNG holds the record it can be made again from.

    \b
    Example:  unclip generate "a red fox" "two hearts" --prior prior --decoder decoder --out pictures
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError, override
    from diffusion.generate import Generator, Sampling, read_captions, read_provenance, save_png

    if sum(map(bool, (captions or caption_file, embedding, again))) != 1:
        raise UserError("give captions (or --file), or --embedding, or --again: one of the three")
    texts = [*captions, *(read_captions(caption_file) if caption_file else [])]
    if texts and not prior:
        raise UserError("captions need a prior; pass --prior prior (made by unclip train prior)")
    asked = count != 1 or seed != 0 or settings or any(value is not None for value in named.values())
    if again and asked:
        raise UserError("--again makes the picture as its record says; leave the other options of how to draw it out")
    if out.suffix.lower() == ".png" and (embedding or len(texts) * count > 1):
        raise UserError(f"{out} is the name of one picture; give a folder for several")
    (how,) = override([Sampling()], [f"{k}={v}" for k, v in named.items() if v is not None] + list(settings))
    record = read_provenance(again) if again else None
    generator = Generator.open(decoder, prior, clip, device=pick_device(device))
    bars = Bars("generate")
    if record:
        made = [generator.regenerate(record)]
    elif embedding:
        from clip_train.store import read_vectors

        rows = read_vectors(embedding).repeat(count, 0)
        seeds = range(seed, seed + len(rows))
        made = generator.from_embeddings(rows, seeds, how, batch_size=batch_size, on_progress=bars)
    else:
        texts = [text for text in texts for _ in range(count)]
        seeds = range(seed, seed + len(texts))
        made = generator.from_captions(texts, seeds, how, batch_size=batch_size, on_progress=bars)
    paths = [out] if out.suffix.lower() == ".png" else [out / f"{i:05d}.png" for i in range(len(made))]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for one, path in zip(made, paths, strict=True):
        save_png(one.picture, path, one.provenance)
        click.echo(path)
    if sheet:
        from clip_train.sheet import contact_sheet, save_sheet

        labels = [one.provenance.get("caption", f"seed {one.provenance['seed']}") for one in made]
        save_sheet(contact_sheet([one.picture for one in made], labels), sheet)
        say(f"wrote {sheet}")


@click.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Embeddings kept from training.")
@click.option("--prior", required=True, type=click.Path(path_type=Path), help="Prior folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@device_option
def evaluate_prior(embeddings: Path, prior: Path, out: Path | None, device: str) -> None:
    """The prior beside what it must beat: cosine to the true image embedding, and the true picture's rank.

    \b
    Example:  unclip evaluate prior --embeddings emb-val --prior prior
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_prior_folder

    write_figures(evaluate_prior_folder(embeddings, prior, device=pick_device(device)), out)


@click.command("loop", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Rows to generate from and to rank.")
@click.option("--prior", required=True, type=click.Path(path_type=Path), help="Prior folder.")
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="Decoder folder.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=100, show_default=True, type=click.IntRange(1), help="Captions tried.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides which captions.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the pictures of all three ways to this PNG.")
@device_option
def evaluate_loop(embeddings, prior, decoder, clip, count, seed, out, sheet, device) -> None:
    """The round trip: generate, embed the picture, rank the true one; from true, prior and text embeddings.

    \b
    Example:  unclip evaluate loop --embeddings emb --prior prior --decoder decoder
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_loop_folders

    figures, drawn = evaluate_loop_folders(
        embeddings, prior, decoder, clip, count=count, seed=seed, device=pick_device(device), on_progress=Bars("loop")
    )
    if sheet:
        from clip_train.sheet import save_sheet

        save_sheet(drawn, sheet)
        say(f"wrote {sheet}")
    write_figures(figures, out)


@click.command(context_settings=CONTEXT)
@out_option("quickstart")
@click.option("--minutes", default=8.5, show_default=True, type=click.FloatRange(0.1), help="Time for all stages.")
@click.option("--size", default=32, show_default=True, type=click.Choice([32, 64]), help="Side of generated pictures.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of everything random.")
@device_option
def quickstart(out: Path, minutes: float, size: int, seed: int, device: str) -> None:
    """The whole loop on real pictures: shard, train CLIP, embed, index, search, train prior and decoder, generate.

    The pictures are the Twemoji drawings (CC-BY-4.0) with their Unicode names, from pip install 'unclip[demo]'.
    Writes OUT/report.html to look at and OUT/report.json to read; a second run resumes, or finds everything done.

    \b
    Example:  unclip quickstart --minutes 5
    """
    from diffusion.quickstart import run_quickstart

    report = run_quickstart(out, minutes=minutes, image_size=size, seed=seed, device=device, bars=Bars, say=say)
    say(f"look at: {report}")
