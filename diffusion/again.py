"""A picture made again, from its record and whatever that names."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_train.settings import UserError, config_from_json
from diffusion.generate import Generated, Generator, Sampling
from diffusion.img2img import img2img
from diffusion.inpaint import inpaint
from diffusion.inversion import picture_noise, redrawn
from diffusion.manipulate import between_noises
from diffusion.outpaint import outpaint
from diffusion.provenance import short
from diffusion.source import Source, read_mask

OWN = ("vary", "edit", "interpolate", "img2img", "inpaint", "outpaint")  # tasks with a walk of their own


def make_again(generator: Generator, record: dict[str, Any], sources: Sequence[Source] = ()) -> Generated:
    """The same picture again. sources: the pictures that it was made from, if it was, in any order.

    UserError: other weights made it, a source is missing (the line says which), or the record is damaged.
    """
    task = record.get("task")
    if not isinstance(task, dict) or "embedding" not in task:
        return generator.regenerate(record)
    refuse_other_weights(generator, record)
    try:
        given = [_found(told, sources) for told in task["sources"]]
        how = config_from_json(Sampling, record["sampling"], "the picture's record")
        row = np.frombuffer(base64.b64decode(task["embedding"], validate=True), "<f4")
        return _drawn(generator, task, row, int(record["seed"]), how, given)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the picture's record is damaged: {error!r}") from error


def sees(record: dict[str, Any]) -> bool:
    """Whether making the picture again takes CLIP beyond what the generator itself needs."""
    task, how = record.get("task"), record.get("sampling")
    inside = isinstance(task, dict) and bool(task.get("sources"))
    judged = isinstance(how, dict) and (how.get("candidates", 1) != 1 or how.get("clip_guidance", 0) != 0)
    return inside or judged


def refuse_other_weights(generator: Generator, record: dict[str, Any]) -> None:
    """UserError unless the models of the generator made the picture."""
    made_with = record.get("fingerprints")
    if not isinstance(made_with, dict):
        raise UserError("the picture's record is damaged: it names no models")
    for name, fingerprint in made_with.items():
        if generator.fingerprints.get(name) != fingerprint:
            raise UserError(
                f"the picture was made with {name} {short(str(fingerprint))}, but this one is "
                f"{short(generator.fingerprints.get(name, 'none'))}; pass the folder it was made with"
            )


def _drawn(
    generator: Generator, task: dict[str, Any], row: np.ndarray, seed: int, how: Sampling, sources: list[Source]
) -> Generated:
    name, rows = task["name"], row[None]
    more = {"captions": [task["caption"]] if "caption" in task else None}
    if name == "img2img":
        return img2img(generator, rows, sources[0], [seed], how, strength=task["strength"], **more)[0]
    if name == "inpaint":
        picture, mask = sources
        more |= {"mask_told": mask.told, "repeats": task["repeats"], "jump": task["jump"]}
        return inpaint(generator, rows, picture, read_mask(mask, picture), [seed], how, **more)[0]
    if name == "outpaint":
        more |= {"repeats": task["repeats"], "jump": task["jump"]}
        return outpaint(generator, rows, sources[0], task["margins"], [seed], how, **more)[0]
    if name == "interpolate":
        known = {source.sha256: source for source in sources}
        ends = [None if end is None else known[end] for end in task["ends"]]
        own_rows = [row if end is None else end.row(generator.clip) for end in ends]
        ends_rows = np.stack(own_rows)
        noise = lambda: between_noises(generator, ends_rows, rows, [task["share"]], seed, how, ends)  # noqa: E731
    elif name in ("vary", "edit"):
        noise = lambda: picture_noise(generator, sources[0].row(generator.clip)[None], sources, how)  # noqa: E731
    else:
        raise UserError(f"the picture's record says {name!r}, which this unclip cannot do; its tasks: {', '.join(OWN)}")
    told = {key: value for key, value in task.items() if key != "embedding"}
    return redrawn(generator, rows, noise, [seed], how, [told])[0]


def _found(told: dict[str, str], sources: Sequence[Source]) -> Source:
    for source in sources:
        if source.sha256 == told["sha256"]:
            return source
    raise UserError(
        f"the picture was made from {told['name']} (sha256 {told['sha256'][:10]}...); pass that file: "
        f"--source {told['name']}"
    )
