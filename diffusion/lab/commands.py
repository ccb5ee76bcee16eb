"""The commands of the lab: each runs one experiment into a folder and says its verdicts.

Heavy imports are inside, so that --help answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from clip_train.console import Bars, say

SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of everything random.")


def run(name: str, out: Path, config: Any, experiment: Callable, inputs: dict | None = None) -> None:
    """Run `experiment` with its config dataclass, then say each finding and where the figures are."""
    from clip_train.settings import config_to_json
    from diffusion.lab.experiment import Finding, read_numbers, run_experiment

    bars = Bars(f"lab {name}")
    run_experiment(
        name,
        out,
        config_to_json(config),
        lambda folder, tell: experiment(config, folder, tell),
        inputs,
        on_progress=bars,
    )
    numbers = read_numbers(out)
    for one in numbers["findings"]:
        say(Finding(**{key: value for key, value in one.items() if key != "holds"}).verdict)
    say(f"look at: {', '.join(str(out / one['file']) for one in numbers['figures'])}")


COMMANDS: list[click.Command] = []
