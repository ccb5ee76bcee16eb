"""metrics.jsonl: what a training says about its steps, one json object a line."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_train import ranks
from clip_train.folder import write_file

OnLog = Callable[[dict[str, float]], None]


class StepLog:
    """Appends lines; those after the checkpoint that a run resumes from are dropped, as they will come again."""

    def __init__(self, path: Path, step: int, on_log: OnLog | None = None) -> None:
        """step: of the checkpoint. on_log: gets each new line as a dict, on the main rank, the only one that writes."""
        self._losses: list[float] = []
        self._path = path if ranks.is_main() else None
        self._on_log = on_log if ranks.is_main() else None
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError):
                    entry = json.loads(line)
                    if entry["step"] <= step:
                        kept.append(line)
                        self._losses += [entry["loss"]] if "loss" in entry else []
        if self._path:
            write_file(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, **numbers: Any) -> None:
        """One line: "step" and other numbers or scalar tensors, six digits of each."""
        entry = {name: value if name == "step" else float(f"{float(value):.6g}") for name, value in numbers.items()}
        self._losses += [entry["loss"]] if "loss" in entry else []
        if self._path:
            with open(self._path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if self._on_log:
            self._on_log(entry)

    def recent_loss(self) -> float:
        """Mean loss over the last tenth of the lines that have one."""
        last = self._losses[-max(1, len(self._losses) // 10) :]
        return sum(last) / len(last) if last else math.nan
