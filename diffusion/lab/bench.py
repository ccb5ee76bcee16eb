"""What the parts of `lab space` share, and where they put what they find."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.model import Clip
from diffusion.lab.chance import above_chance
from diffusion.lab.experiment import Figure, Finding
from diffusion.lab.pairs import Pairs

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.lab.space import SpaceConfig


@dataclass
class Bench:
    """What the parts share, and where they put what they find."""

    config: "SpaceConfig"
    folder: Path
    clip: Clip
    pairs: Pairs
    picture: tuple["Image.Image", str | None] | None = None  # the one that was asked for, and its name
    figures: list[Figure] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, part])

    def show(self, file: str, caption: str, draw: Callable[[Path], None]) -> None:
        draw(self.folder / file)
        self.figures.append(Figure(file=file, caption=caption))

    def above(self, name: str, says: str, value: float, null: np.ndarray, unit: str = "") -> None:
        """A finding whose band begins above chance; shares are said in per cent."""
        times = 100 if unit == "%" else 1
        low = times * above_chance(null)
        self.findings.append(Finding(name=name, says=says, value=float(times * value), low=float(low), unit=unit))
