"""What an experiment of the lab leaves: figures, and findings, each a number with the band that the claim asks for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.settings import Progress


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
    def verdict(self) -> str:
        """One line: what was found, what was asked for, and yes or no."""
        ends = (f"at least {self.low:g}" if self.low > float("-inf") else "",
                f"at most {self.high:g}" if self.high < float("inf") else "")  # fmt: skip
        asked = " and ".join(end for end in ends if end)
        unit = f" {self.unit}" if self.unit else ""
        answer = "yes" if self.holds else "NO"
        return f"{answer}: {self.says}: {self.value:.3g}{unit}" + (f" ({asked})" if asked else "")

    def to_json(self) -> dict[str, Any]:
        finite = {end: value for end, value in (("low", self.low), ("high", self.high)) if abs(value) < float("inf")}
        return {"name": self.name, "says": self.says, "value": self.value, "unit": self.unit, **finite,
                "holds": self.holds}  # fmt: skip


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


def run_experiment(
    name: str,
    out: Path | str,
    settings: dict[str, Any],
    experiment: Callable[[Path, Progress | None], Experiment],
    inputs: dict[str, Input] | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Run it in a folder that gets its name when it is whole; found done where the settings are those of before.

    experiment: called with the folder to write figures into, and on_progress. Writes numbers.json (title, figures,
    findings, tables, settings) beside them; the manifest's result is the findings.
    """
    space = Workspace.open(out, "lab", {"experiment": name, **settings}, inputs or {}, f"unclip lab {name}")
    if space.done:
        return space.done
    made = experiment(space.path, on_progress)
    findings = [finding.to_json() for finding in made.findings]
    numbers = {
        "experiment": name,
        "title": made.title,
        "settings": settings,
        "findings": findings,
        "figures": [{"file": one.file, "caption": one.caption} for one in made.figures],
        "tables": made.tables,
    }
    write_file(space.path / "numbers.json", json.dumps(numbers, indent=1).encode())
    return space.publish({"findings": findings})


def read_numbers(folder: Path | str) -> dict[str, Any]:
    """numbers.json of a finished lab folder."""
    return json.loads((Path(folder) / "numbers.json").read_text())
