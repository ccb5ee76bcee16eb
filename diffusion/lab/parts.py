"""What each lab command runs: paths and settings -> a Part, its inputs opened, checked and fingerprinted."""

from functools import partial
from pathlib import Path
from typing import Any

from clip_train.folder import Input, fingerprint_files
from clip_train.model import Clip
from clip_train.ranks import pick_device
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from diffusion.examine import open_generator, open_held
from diffusion.lab.belief import Real, pictures_for
from diffusion.lab.denoise import DenoiseConfig, denoise
from diffusion.lab.experiment import Part
from diffusion.lab.field import FieldConfig, field
from diffusion.lab.forward import ForwardConfig, forward
from diffusion.lab.plane import PlaneConfig
from diffusion.lab.sampling import SamplingConfig, sampling
from diffusion.lab.space import SpaceConfig, space
from diffusion.lab.steering import SteeringConfig, steering
from diffusion.lab.unclip import UnclipConfig, unclip
from diffusion.source import Source


def spiral_part(steps: int, seed: int) -> Part:
    return Part(name="spiral", config=FieldConfig(plane=PlaneConfig(steps=steps, seed=seed)), make=field)


def sampling_part(steps: int, seed: int) -> Part:
    return Part(name="sampling", config=SamplingConfig(plane=PlaneConfig(steps=steps, seed=seed)), make=sampling)


def guidance_part(steps: int, seed: int, wrong_label: float = 0.2) -> Part:
    plane = PlaneConfig(labels=True, wrong_label=wrong_label, steps=steps, seed=seed)
    return Part(name="guidance", config=SteeringConfig(plane=plane), make=steering)


def forward_part(image: Path | Source, **options: Any) -> Part:
    """image: a file, or a picture that is open already."""
    source, where = (image, image.name) if isinstance(image, Source) else (Source.open(image), image)
    return Part(
        name="forward",
        config=ForwardConfig(**options),
        make=partial(forward, source=source),
        inputs={"picture": Input(f"sha256:{source.sha256}", where)},
    )


def space_part(clip: Path | str, shards: str, device: str = "auto", **options: Any) -> Part:
    """options: of SpaceConfig."""
    config = SpaceConfig(**options)
    samples, encoder = ShardSet(shards), Clip.load(clip, pick_device(device))
    inputs = {"shards": Input(samples.fingerprint, shards), "clip": Input(encoder.fingerprint, clip)}
    if config.picture and Path(config.picture).is_file():
        picture = Path(config.picture)
        inputs["picture"] = Input(fingerprint_files([picture], picture.parent), picture)
    return Part(name="space", config=config, make=partial(space, clip=encoder, samples=samples), inputs=inputs)


def denoise_part(
    decoder: Path | str,
    embeddings: Path | str | None = None,
    shards: str | None = None,
    clip: Path | str | None = None,
    device: str = "auto",
    **options: Any,
) -> Part:
    """embeddings: of pictures kept from training; by default pictures of the decoder's own shards. options: of
    DenoiseConfig."""
    config = DenoiseConfig(**options)
    generator = open_generator(decoder, None, clip, device=pick_device(device))
    held = pictures_for(generator, decoder, embeddings, shards, config.count, config.seed)
    real = Real.drawn_from(generator, held, config.count, config.seed)
    inputs = {
        "decoder": Input(generator.fingerprints["decoder"], decoder),
        "pictures": Input(held.fingerprint, embeddings or str(held.shards)),
    }
    return Part(name="denoise", config=config, make=partial(denoise, real=real), inputs=inputs)


def unclip_part(
    decoder: Path | str,
    prior: Path | str,
    embeddings: Path | str,
    clip: Path | str | None = None,
    fit: Path | str | None = None,
    device: str = "auto",
    **options: Any,
) -> Part:
    """prior: a folder, or the name of a baseline, most of which are fitted to the folder `fit`. options: of
    UnclipConfig."""
    config = UnclipConfig(**options)
    generator = open_generator(decoder, prior, clip, embeddings=fit, device=pick_device(device))
    held = open_held(embeddings, None, generator)
    if held.shards is None:
        raise UserError(f"the shards that {embeddings}/ was made from are not where they were; embed them again")
    known = generator.fingerprints
    inputs = {
        name: Input(known[name], path) for name, path in (("decoder", decoder), ("prior", prior)) if name in known
    }
    inputs["embeddings"] = Input(held.fingerprint, embeddings)
    return Part(name="unclip", config=config, make=partial(unclip, generator=generator, held=held), inputs=inputs)
