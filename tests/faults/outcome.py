"""How a fault ended, and the tally of many: what the fault bench counts and prints."""

from collections import Counter
from dataclasses import dataclass, field

GOOD = ("done", "skipped", "refused")  # did its work; said and counted what it left out; one line and exit code 2
BAD = ("traceback", "hang", "silence", "loss", "wrong")  # silence: wrong or left out, and nothing said


@dataclass(frozen=True)
class Outcome:
    """How one case ended."""

    how: str  # one of GOOD or BAD
    line: str = ""  # what was said, or what was wrong

    def __post_init__(self) -> None:
        if self.how not in GOOD + BAD:
            raise ValueError(f"no outcome {self.how!r}")


@dataclass
class Tally:
    """Outcomes by kind of fault."""

    counts: dict[str, Counter] = field(default_factory=dict)
    losses: list[tuple[str, str, Outcome]] = field(default_factory=list)  # (kind, what the case was, outcome)
    notes: list[str] = field(default_factory=list)  # markdown below the table: bands, worst errors

    def add(self, kind: str, case: str, outcome: Outcome) -> None:
        self.counts.setdefault(kind, Counter())[outcome.how] += 1
        if outcome.how in BAD:
            self.losses.append((kind, case, outcome))

    def table(self) -> str:
        """Markdown: a row for each kind, and one for all."""
        rows = [*sorted(self.counts.items()), ("all", sum(self.counts.values(), Counter()))]
        head = "| kind | cases | done | counted skip | exit 2, one line | losses |\n|---|---|---|---|---|---|"
        cells = [[kind, sum(n.values()), *(n[how] for how in GOOD), sum(n[how] for how in BAD)] for kind, n in rows]
        return "\n".join([head, *("| " + " | ".join(map(str, row)) + " |" for row in cells)])
