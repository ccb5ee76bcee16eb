"""The commands that train: train prior, train decoder, quickstart.

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
    from diffusion import train_prior as train
    from diffusion.trained import settings

    config, fit_config = settings(train.PRIOR_PRESETS, preset, training_settings(**options))
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
    from diffusion import train_decoder as train
    from diffusion.trained import settings

    config, fit_config = settings(train.DECODER_PRESETS, preset, training_settings(**options))
    bars = Bars("train decoder")
    made = train.train_decoder(
        shards, clip, out, config=config, fit_config=fit_config, device=start(device), on_progress=bars
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f'next: unclip generate "a red fox" --prior prior --decoder {out} --out fox.png')


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
