"""Bands: how far a number may lie from the truth, why as far as that, and how far the worst one lay."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from outcome import Outcome


@dataclass
class Band:
    """One kind of error, and what was seen of it."""

    limit: float
    worst: float = 0.0
    count: int = 0

    @property
    def cells(self) -> str:
        return f"{self.worst:.1e} | {self.limit:.1e} | {self.count}"

    def take(self, error: float) -> bool:
        """Note an error; whether it lies within the band. Not-a-number never does."""
        self.count += 1
        self.worst = max(self.worst, error) if error == error else float("inf")
        return error <= self.limit


@dataclass
class Bands:
    """All of them by name: of what, and how it is counted."""

    limits: dict[str, float]
    seen: dict[str, Band] = field(default_factory=dict)

    def judge(self, errors: dict[str, float]) -> Outcome:
        """One case: its errors by the names of their bands."""
        wrong = []
        for name, error in errors.items():
            band = self.seen.setdefault(name, Band(self.limits[name]))
            if not band.take(error):
                wrong.append(f"{name}: {error:.2e} (band {band.limit:.1e})")
        return Outcome("wrong", "; ".join(wrong)) if wrong else Outcome("done")

    def table(self, names: Iterable[str]) -> str:
        """Markdown: these bands, the worst that was seen, and how many numbers were held against each."""
        lines = "".join(f"\n| {name} | {self.seen[name].cells} |" for name in names if name in self.seen)
        return f"| error | worst seen | band | measured |\n|---|---|---|---|{lines}"

    def grid(self, rows: Iterable[str], columns: Sequence[str]) -> str:
        """Markdown: the bands "ROW: COLUMN", each with the worst that was seen before its limit."""
        head = "".join(f"| {column} " for column in columns)
        lines = ""
        for row in rows:
            seen = [self.seen[name] for column in columns if (name := f"{row}: {column}") in self.seen]
            if seen:
                lines += f"\n| {row} |" + "".join(f" {one.worst:.1e} of {one.limit:.1e} |" for one in seen)
                lines += f" {seen[0].count} |"
        return f"| worst seen of band {head}| measured |\n|---{'|---' * len(columns)}|---|{lines}"
