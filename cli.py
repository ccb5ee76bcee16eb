"""The command line: parse, call one function, say what to do next. Results go to stdout, talk to stderr.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main() -> None:
    """Entry point of `unclip`: a UserError is one line and exit code 2, an interrupted training exits 128 + signal."""
    from clip_train.settings import Interrupted, UserError

    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Interrupted as stop:
        say(f"unclip: {stop}")
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        say("unclip: stopped; run the same command again to go on")
        sys.exit(130)
    except UserError as error:
        say(f"unclip: {' '.join(str(error).split())}")
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that went away: not bugs, and they have a line of their own
        where = f"{error.filename}: " if error.filename else ""
        say(f"unclip: {where}{error.strerror or error}")
        sys.exit(2)


def say(text: str) -> None:
    """Talk to the person, not to the pipe."""
    click.echo(text, err=True)


class Bars:
    """Progress bars on stderr, one per `task`, with rate and remaining time; plain lines now and then in a log file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = None

    def __call__(self, done: int, total: int, **numbers: Any) -> None:
        """on_progress of the library's long calls; `task` among the numbers renames the bar."""
        from tqdm import tqdm

        title = str(numbers.pop("task", self.title))
        if self.bar is not None and (self.bar.total != total or self.bar.desc != f"{title}: "):
            self.close()
        if self.bar is None:
            quiet = 0.1 if sys.stderr.isatty() else 15.0
            self.bar = tqdm(
                total=total, desc=title, initial=done, mininterval=quiet, file=sys.stderr, dynamic_ncols=True
            )
        self.bar.set_postfix({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in numbers.items()}, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def device_option(command: Callable) -> Callable:
    """--device"""
    text = "cpu, cuda, cuda:1, mps, or auto: the best there is."
    return click.option("--device", default="auto", show_default=True, help=text)(command)


def out_option(default: str) -> Callable:
    """--out"""
    text = "Folder to write; an unfinished one is resumed."
    return click.option("--out", default=default, show_default=True, type=click.Path(path_type=Path), help=text)


def training_options(command: Callable) -> Callable:
    """What the three trainers share."""
    for option in (
        click.option("--steps", type=click.IntRange(1), help="Optimizer steps."),
        click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train for about this long instead."),
        click.option("--batch-size", type=click.IntRange(1), help="Samples per step, all ranks together."),
        click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate."),
        click.option("--seed", type=int, help="Seed of everything random."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; repeatable."),
        device_option,
    ):
        command = option(command)
    return command


def training_settings(steps, minutes, batch_size, lr, seed, settings) -> list[str]:
    """The named training options as --set pairs."""
    from clip_train.settings import UserError

    if steps and minutes:
        raise UserError(f"--steps {steps} and --minutes {minutes} contradict each other; give one")
    pairs = []
    if steps:
        pairs += [f"steps={steps}", "minutes=0"]
    if minutes:
        pairs += [f"minutes={minutes}", "steps=0"]
    named = {"batch_size": batch_size, "lr": lr, "seed": seed}
    return pairs + [f"{k}={v}" for k, v in named.items() if v is not None] + list(settings)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="unclip")
def cli() -> None:
    """Train CLIP on your own captioned pictures, search them, and generate new ones from the same space.

    \b
    See the whole loop run on real pictures:  unclip quickstart
    On your own:  shard -> train clip -> embed -> index -> search
                  -> train prior -> train decoder -> generate
    """


if __name__ == "__main__":
    main()
