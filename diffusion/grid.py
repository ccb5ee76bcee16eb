"""A grid of pictures: one thing drawn with every combination of one or two settings, side by side."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from clip_train.settings import UserError, override
from clip_train.sheet import contact_sheet
from diffusion.generate import Generated, Sampling

MOST = 400  # pictures of a grid
SEED = "seed"  # an axis that is no field of Sampling


@dataclass(frozen=True)
class Axis:
    """A setting and the values it takes along one side."""

    name: str  # of a field of Sampling, or "seed"
    values: tuple[str, ...]  # as they were written


def read_axis(text: str) -> Axis:
    """'guidance=1,2,4' -> an axis. UserError: no such setting, a value that does not fit it, or the same one twice."""
    name, equals, rest = text.strip().partition("=")
    known = [SEED, *(f.name for f in dataclasses.fields(Sampling))]
    values = tuple(value.strip() for value in rest.split(","))
    if not equals or name not in known or not all(values):
        raise UserError(f"--grid {text}: expected SETTING=VALUE,VALUE,... with a setting out of: {', '.join(known)}")
    for value in values:
        apply(Sampling(), 0, name, value)
    if len(set(values)) < len(values):
        raise UserError(f"--grid {text}: a value stands there twice")
    return Axis(name, values)


def apply(how: Sampling, seed: int, name: str, value: str) -> tuple[Sampling, int]:
    """The sampling and the seed with one of them set."""
    if name != SEED:
        return override([how], [f"{name}={value}"])[0], seed
    if not value.isdecimal():
        raise UserError(f"--grid seed: {value!r} is not a non-negative integer")
    return how, int(value)


def draw_grid(
    draw: Callable[[Sampling, int], Generated],
    axes: Sequence[Axis],
    how: Sampling,
    seed: int = 0,
    on_progress: Callable[..., None] | None = None,
) -> Iterator[tuple[str, Generated]]:
    """(label, picture) for every combination, row by row: the first axis goes along a row, the second down.

    draw(how, seed) draws one. UserError: see check_axes.
    """
    across, down, total, done = *check_axes(axes), 0
    for low in down.values:
        for value in across.values:
            here, number, label = how, seed, []
            for name, chosen in ((across.name, value), (down.name, low)):
                if name:
                    here, number = apply(here, number, name, chosen)
                    label.append(f"{name} {chosen}")
            yield ", ".join(label), draw(here, number)
            done += 1
            if on_progress:
                on_progress(done, total)


def check_axes(axes: Sequence[Axis]) -> tuple[Axis, Axis, int]:
    """The axis along a row, the one down, and how many pictures there are.

    UserError: not one or two axes, one setting on both, or too many pictures.
    """
    if not 1 <= len(axes) <= 2:
        raise UserError(f"a grid has one or two axes, not {len(axes)}")
    across, down = axes[0], axes[1] if len(axes) == 2 else Axis("", ("",))
    if across.name == down.name:
        raise UserError(f"both axes of the grid are {across.name}; write its values after one another")
    total = len(across.values) * len(down.values)
    if total > MOST:
        raise UserError(f"a grid of {len(across.values)} x {len(down.values)} = {total} pictures; {MOST} are the most")
    return across, down, total


def grid_sheet(made: Sequence[tuple[str, Generated]], axes: Sequence[Axis], title: str | None = None) -> Image.Image:
    """The grid as a contact sheet, a column for each value of the first axis."""
    pictures, labels = [one.picture for _, one in made], [label for label, _ in made]
    return contact_sheet(pictures, labels, columns=len(axes[0].values), title=title)


def axes_among(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line, as those that look like an axis and the others (captions)."""
    known: set[Any] = {SEED, *(f.name for f in dataclasses.fields(Sampling))}
    looks = [word.partition("=")[0] in known and "=" in word and " " not in word.strip() for word in words]
    found = [word for word, axis in zip(words, looks, strict=True) if axis]
    return found, [word for word, axis in zip(words, looks, strict=True) if not axis]
