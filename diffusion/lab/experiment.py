"""What an experiment of the lab leaves: figures, and findings, each a number with the band that the claim asks for."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.settings import Progress, config_to_json


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number, and whether it bears the claim out."""

    name: str  # snake_case, unique in its experiment
    says: str  # the claim, one sentence without the number, e.g. "ddpm keeps the spiral's variance"
    value: float
    low: float = float("-inf")  # the claim holds where low <= value <= high
    high: float = float("inf")
    unit: str = ""  # "%", "x", "nats", ...; empty: a plain number

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.low <= self.value <= self.high

    @property
    def found(self) -> str:
        """The number with its unit."""
        return f"{_digits(self.value, self._digits)}{f' {self.unit}' if self.unit else ''}"

    @property
    def asked(self) -> str:
        """The band: "at least 2 and at most 3", or nothing."""
        low, high = (_digits(end, self._digits) for end in (self.low, self.high))
        ends = (
            f"at least {low}" if self.low > float("-inf") else "",
            f"at most {high}" if self.high < math.inf else "",
        )
        return " and ".join(end for end in ends if end)

    @property
    def _digits(self) -> int:
        """Three, or as many as it takes to see on which side of its band the value lies."""
        ends = [end for end in (self.low, self.high) if math.isfinite(end) and end != self.value]
        enough = (n for n in range(3, 17) if _digits(self.value, n) not in [_digits(end, n) for end in ends])
        return next(enough, 17)

    @property
    def verdict(self) -> str:
        """One line: what was found, what was asked for, and yes or no."""
        answer = "yes" if self.holds else "NO"
        return f"{answer}: {self.says}: {self.found}" + (f" ({self.asked})" if self.asked else "")

    def to_json(self) -> dict[str, Any]:
        """A value that is no number is null; an end that is not there is left out."""
        finite = {end: value for end, value in (("low", self.low), ("high", self.high)) if abs(value) < math.inf}
        return {"name": self.name, "says": self.says, "value": _plain(self.value), "unit": self.unit, **finite,
                "holds": self.holds}  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Finding":
        own = {key: value for key, value in data.items() if key != "holds"}
        return cls(**own | ({"value": math.nan} if own["value"] is None else {}))


def _digits(value: float, count: int) -> str:
    """So many digits, never an exponent for sizes that people read."""
    return f"{value:.0f}" if 10**count <= abs(value) < 1e7 else f"{value:.{count}g}"


def _plain(value: Any) -> Any:
    """What json can hold: None for NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture or animation that the experiment wrote, and what to see in it."""

    file: str  # name in the folder
    caption: str  # one or two sentences: what is drawn, and what to look at


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that one lab command made."""

    title: str  # a headline of a few words
    figures: Sequence[Figure]
    findings: Sequence[Finding]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # the numbers that the figures plot


@dataclass(frozen=True, kw_only=True)
class Part:
    """An experiment that is ready to run: its command's name, what decides its outcome, and how it is made."""

    name: str  # of its command
    config: Any  # a dataclass
    make: Callable[[Any, Path, Progress | None], Experiment]  # (config, folder to write figures into, on_progress)
    inputs: dict[str, Input] = field(default_factory=dict)


def run_part(part: Part, out: Path | str, on_progress: Progress | None = None) -> Manifest:
    """Run it in a folder that gets its name when it is whole; found done where the settings are those of before.

    Writes numbers.json (title, settings, findings, figures, tables) beside the figures; the manifest's result is the
    findings.
    """
    settings = config_to_json(part.config)
    plan = {"experiment": part.name, **settings}
    space = Workspace.open(out, "lab", plan, part.inputs, f"unclip lab {part.name}")
    if space.done:
        return space.done
    made = part.make(part.config, space.path, on_progress)
    findings = [finding.to_json() for finding in made.findings]
    numbers = {
        "experiment": part.name,
        "title": made.title,
        "settings": settings,
        "findings": findings,
        "figures": [{"file": one.file, "caption": one.caption} for one in made.figures],
        "tables": _plain(made.tables),
    }
    write_file(space.path / "numbers.json", json.dumps(numbers, indent=1, allow_nan=False).encode())
    return space.publish({"findings": findings})


def read_numbers(folder: Path | str) -> dict[str, Any]:
    """numbers.json of a finished lab folder."""
    return json.loads((Path(folder) / "numbers.json").read_text())
