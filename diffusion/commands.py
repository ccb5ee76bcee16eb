"""The commands that train: train prior, train decoder, train distilled, train upsampler, quickstart.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path
from typing import Any

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    Whole,
    device_option,
    out_option,
    say,
    shards_option,
    training_options,
    training_settings,
    warn,
)


@click.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Folder made by unclip embed.")
@out_option("prior")
@click.option("--preset", default="tiny", show_default=True, help="tiny (CPU, a minute) or small (one GPU).")
@click.option(
    "--kind", default="diffusion", show_default=True, type=click.Choice(["diffusion", "contrastive"]),
    help="contrastive: one guess per text, trained in seconds.",
)  # fmt: skip
@training_options
def train_prior(embeddings: Path, out: Path, preset: str, kind: str, device: str, **options: Any) -> None:
    """Train the prior: text embedding -> image embedding.

    \b
    Example:  unclip train prior --embeddings emb --out prior
    """
    from clip_train.ranks import start
    from diffusion import train_prior as train
    from diffusion.trained import settings

    config, fit_config = settings(train.KINDS[kind], preset, training_settings(**options))
    bars = Bars("train prior")
    made = train.train_prior(
        embeddings,
        out,
        config=config,
        fit_config=fit_config,
        device=start(device),
        on_progress=bars,
        on_warning=warn,
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f"next: unclip train decoder --shards shards --clip {made.input_path('clip') or 'clip'} --out decoder")


@click.command("decoder", context_settings=CONTEXT)
@shards_option("Folder of tars, a tar, a glob or a {000..010} range.")
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="CLIP folder that makes the embeddings.")
@out_option("decoder")
@click.option(
    "--preset",
    default="tiny",
    show_default=True,
    help="tiny (32 px, CPU, minutes), laptop (64 px, CPU, an hour), small (64 px, one GPU) or base (a cluster).",
)
@click.option(
    "--init", type=click.Path(path_type=Path),
    help="Go on from this decoder's weights and network, longer or with other pictures; --preset gives the schedule.",
)  # fmt: skip
@training_options
def train_decoder(
    shards: str, clip: Path, out: Path, preset: str, init: Path | None, device: str, **options: Any
) -> None:
    """Train the decoder: image embedding -> picture.

    \b
    Example:  unclip train decoder --shards shards --clip clip --out decoder --preset laptop --minutes 60
              unclip train decoder --shards shards --clip clip --out longer --preset laptop --init decoder --lr 1e-3
    """
    from clip_train.ranks import start
    from diffusion import train_decoder as train
    from diffusion.trained import settings

    pairs = training_settings(**options)
    config, fit_config = (
        train.settings_from(init, preset, pairs) if init else settings(train.DECODER_PRESETS, preset, pairs)
    )
    bars = Bars("train decoder")
    made = train.train_decoder(
        shards,
        clip,
        out,
        config=config,
        fit_config=fit_config,
        init=init,
        device=start(device),
        on_progress=bars,
        on_warning=warn,
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f'next: unclip generate "a red fox" --prior prior --decoder {out} --out fox.png')


@click.command("distilled", context_settings=CONTEXT)
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="Decoder folder: the teacher.")
@shards_option("Folder of tars, a tar, a glob or a {000..010} range.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the decoder says it was.")
@out_option("distilled")
@click.option(
    "--steps", "few_steps", default="4", show_default=True, type=click.Choice(["1", "2", "4", "8"]),
    help="Network calls that a picture takes afterwards.",
)  # fmt: skip
@click.option("--guidance", type=click.FloatRange(0), help="Of the teacher: baked in.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train for about this long.")
@click.option("--batch-size", type=Whole(1), help="Samples per optimizer step, all ranks together.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--seed", type=click.IntRange(0), help="Seed of everything random.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; repeatable.")
@device_option
def train_distilled(
    decoder: Path, shards: str, clip: Path | None, out: Path, few_steps: str, guidance: float | None, device: str,
    **options: Any,
) -> None:  # fmt: skip
    """Distil a decoder: a student that draws in 1 to 8 steps what its teacher draws in 16, guidance baked in.

    \b
    Example:  unclip train distilled --decoder decoder --shards shards --steps 4 --out quick
    """
    from clip_train.folder import read_manifest
    from clip_train.ranks import start
    from clip_train.settings import UserError, override
    from diffusion import train_distilled as train
    from diffusion.distill import DistillConfig

    clip = clip or read_manifest(decoder, "decoder").input_path("clip")
    if clip is None:
        raise UserError(f"the CLIP that {decoder}/ was trained with is not where it was; say where: --clip")
    pairs = training_settings(steps=None, caption_mix=None, **options)
    pairs += [f"guidance={guidance}"] if guidance is not None else []
    config, fit_config = override([DistillConfig(few_steps=int(few_steps)), train.DISTILLED_FIT], pairs)
    bars = Bars("train distilled")
    made = train.train_distilled(
        decoder,
        shards,
        clip,
        out,
        config=config,
        fit_config=fit_config,
        device=start(device),
        on_progress=bars,
        on_warning=warn,
    )
    say(f"{out}/: loss {made.result['loss']:.4f} after {made.result['steps']} steps of the last stage")
    say(f'next: unclip generate "a red fox" --prior prior --decoder {out} --out fox.png')


@click.command("upsampler", context_settings=CONTEXT)
@shards_option("Folder of tars, a tar, a glob or a {000..010} range.")
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="CLIP folder that makes the embeddings.")
@out_option("upsampler")
@click.option("--preset", default="tiny", show_default=True, help="tiny (CPU, minutes) or small (one GPU).")
@training_options
def train_upsampler(shards: str, clip: Path, out: Path, preset: str, device: str, **options: Any) -> None:
    """Train the upsampler: a small picture and its embedding -> the picture at four times the size.

    \b
    Example:  unclip train upsampler --shards shards --clip clip --out upsampler
    """
    from clip_train.ranks import start
    from diffusion import train_upsampler as train
    from diffusion.trained import settings

    config, fit_config = settings(train.UPSAMPLER_PRESETS, preset, training_settings(**options))
    bars = Bars("train upsampler")
    made = train.train_upsampler(
        shards,
        clip,
        out,
        config=config,
        fit_config=fit_config,
        device=start(device),
        on_progress=bars,
        on_warning=warn,
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f"next: unclip enlarge picture.png --upsampler {out} --out large.png")


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

    told = {"bars": Bars, "say": say, "on_warning": warn}
    report = run_quickstart(out, minutes=minutes, image_size=size, seed=seed, device=device, **told)
    say(f"look at: {report}")
