"""What the command lines of all rooms share: talking, progress bars, tables, options that several commands have."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


# of captions and names that strangers wrote: a terminal would obey them, or show words backwards
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """The text without characters that a terminal does not show but do."""
    return OBEYED.sub("\ufffd", text)


LARGEST = 100_000_000  # of all that can be counted


class Whole(click.IntRange):
    """A number of things: within its range, and not larger than anything that there is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if number > LARGEST:
            self.fail(f"{number} is more than {LARGEST}.", param, ctx)
        return number


def is_main() -> bool:
    """Whether this is the process that talks; torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Talk to the person, not to the pipe; on a line of its own, below a bar that was still moving."""
    if Bars.moving is not None:
        Bars.moving.close()
    if is_main():
        click.echo(harmless(text), err=True)


def put(text: Any, bold: bool = False, nl: bool = True) -> None:
    """A result, to stdout: as it is into a file or a pipe, and harmless in a terminal."""
    if not sys.stdout.isatty():
        click.echo(str(text), nl=nl, color=True)  # or click takes out what looks like a colour
        return
    shown = harmless(str(text))
    click.echo(click.style(shown, bold=True) if bold else shown, nl=nl)


def warn(text: str) -> None:
    """on_warning of the library's long calls."""
    say(f"warning: {text}")


class Bars:
    """Progress bars on stderr, one per `task`, with rate and remaining time; plain lines now and then in a log file."""

    moving: "Bars | None" = None  # the one on the screen

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = None
        self.shown = ("", 0)

    def __call__(self, done: int, total: int, **numbers: Any) -> None:
        """on_progress of the library's long calls; text among the numbers (which part of the work) names the bar."""
        from tqdm import tqdm

        if not is_main():
            return
        words = [value for value in numbers.values() if isinstance(value, str)]
        title = " ".join([self.title, *words])
        if self.bar is not None and self.shown != (title, total):
            self.close()
        if self.bar is None:
            quiet = 0.1 if sys.stderr.isatty() else 15.0
            self.bar = tqdm(total=total, desc=title, initial=done, mininterval=quiet, dynamic_ncols=True)
            self.shown, Bars.moving = (title, total), self
        figures = {name: value for name, value in numbers.items() if not isinstance(value, str)}
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self.bar is not None:
            self.bar.close()
            self.bar, Bars.moving = None, None


def device_option(command: Callable) -> Callable:
    """--device"""
    text = "cpu, cuda, cuda:1, mps, or auto: the best there is."
    return click.option("--device", default="auto", show_default=True, help=text)(command)


def out_option(default: str) -> Callable:
    """--out"""
    text = "Folder to write; an unfinished one is resumed."
    return click.option("--out", default=default, show_default=True, type=click.Path(path_type=Path), help=text)


def shards_option(text: str, required: bool = True) -> Callable:
    """--shards: several are one set, as if they were joined by '::'."""

    def joined(context: click.Context, option: click.Parameter, specs: tuple[str, ...]) -> str | None:
        return "::".join(specs) or None

    return click.option("--shards", multiple=True, required=required, help=f"{text} Repeatable.", callback=joined)


def training_options(command: Callable) -> Callable:
    """What the three trainers share."""
    for option in (
        click.option("--steps", type=Whole(1), help="Optimizer steps."),
        click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train for about this long instead."),
        click.option("--batch-size", type=Whole(1), help="Samples per step, all ranks together."),
        click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate."),
        click.option("--seed", type=click.IntRange(0), help="Seed of everything random."),
        click.option("--caption-mix", help="Weights of a sample's 1st, 2nd, ... caption, e.g. 0.3,0.7."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; repeatable."),
        device_option,
    ):
        command = option(command)
    return command


def training_settings(steps, minutes, batch_size, lr, seed, caption_mix, settings) -> list[str]:
    """The named training options as --set pairs."""
    from clip_train.settings import UserError

    if steps and minutes:
        raise UserError(f"--steps {steps} and --minutes {minutes} contradict each other; give one")
    pairs = []
    if steps:
        pairs += [f"steps={steps}", "minutes=0"]
    if minutes:
        pairs += [f"minutes={minutes}", "steps=0"]
    if caption_mix:
        pairs.append(f"caption_mix={json.dumps(numbers_in(caption_mix, '--caption-mix'))}")
    named = {"batch_size": batch_size, "lr": lr, "seed": seed}
    return pairs + [f"{k}={v}" for k, v in named.items() if v is not None] + list(settings)


def numbers_in(text: str | None, option: str) -> list[float]:
    """ "3,1" as [3.0, 1.0]."""
    from clip_train.settings import UserError

    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UserError(f"{option} {text}: expected numbers with commas between, e.g. 3,1") from error


def print_table(head: tuple[str, ...], rows: list[tuple]) -> None:
    """Columns as wide as they need to be; the last one is cut at the edge of the terminal."""
    import shutil

    lines = [tuple(harmless(" ".join(str(cell).split())) for cell in row) for row in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    edge = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()[:edge])


def write_figures(figures: dict[str, Any], out: Path | None, tables: list[tuple] | None = None) -> None:
    """Figures in a json file if one is named, and on stdout: as tables in a terminal if there are any, else as json."""
    text = json.dumps(figures, indent=1)
    if out:
        from clip_train.folder import write_file

        write_file(out, text.encode())
    if tables is None or not sys.stdout.isatty():
        put(text)
        return
    for n, (title, head, rows) in enumerate(tables):
        if n:
            click.echo()
        if title:
            put(title, bold=True)
        print_table(head, rows)
