"""The command line: the commands of all rooms under one name. Results go to stdout, talk to stderr."""

import os
import re
import signal
import sys

import click

import clip_train.commands as clip_commands
import diffusion.changing_commands as changing_commands
import diffusion.commands as diffusion_commands
import diffusion.drawing_commands as drawing_commands
import diffusion.ema_commands as ema_commands
import diffusion.evaluate_commands as evaluate_commands
import diffusion.lab.commands as lab_commands
import diffusion.upsample_commands as upsample_commands
import retrieval.commands as retrieval_commands
from clip_train.console import CONTEXT, harmless, is_main, say


def main() -> None:
    """Entry point of `unclip`: a UserError is one line and exit code 2, an interrupted training exits 128 + signal."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        signal.signal(signal.SIGTERM, terminated)
        try:
            sys.exit(run())
        except KeyboardInterrupt:  # before click is there to answer it, or while it does
            sys.exit(stopped())
    from clip_train.ranks import leave

    try:
        code = run()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    leave(code)


def run() -> int:
    """The command that the arguments name; returns the exit code."""
    from clip_train.settings import Interrupted, UserError

    if hasattr(sys.stdout, "reconfigure"):  # a name that is not UTF-8 is printed as it can be, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return cli.main(standalone_mode=False) or 0
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        return stopped()
    except click.ClickException as error:
        if is_main():
            error.show()
        return error.exit_code
    except Interrupted as stop:
        say(f"unclip: {stop}")
        return 128 + stop.number
    except UserError as error:
        complain(error, " ".join(str(error).split()))
        return 2
    except (MemoryError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        if isinstance(error, MemoryError) or re.search("(not enough|allocate|out of) memory", str(error)):
            complain(error, f"not enough memory ({said}); ask for less: fewer steps, pictures or samples at a time")
            return 2
        if not lost_rank(error):
            raise
        why = re.sub(r"^\[\S+\] ", "", said)[:100]  # without the place in gloo's code
        complain(error, f"another rank was lost ({why}); if torchrun does not start all again, run the same command")
        return 1
    except OSError as error:  # a full disk, a folder that went away: not bugs, and they have a line of their own
        where = f"{error.filename}: " if error.filename else ""
        complain(error, f"{where}{error.strerror or error}")
        return 2


def lost_rank(error: Exception) -> bool:
    """Whether this is torch saying that it cannot reach another rank: one that was killed, or has said why it fell."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    names = [kind.__name__ for kind in type(error).__mro__]
    return "DistError" in names or re.search("gloo/transport|connectFullMesh", str(error)) is not None


TERMINATED: list[int] = []  # SIGTERM, when it came


def terminated(number: int, _frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does: what is open is closed, and one line says how to go on.

    A second one ends it at once, whatever it is still waiting for.
    """
    signal.signal(number, signal.SIG_DFL)
    TERMINATED.append(number)
    raise KeyboardInterrupt


def stopped() -> int:
    """Say that a signal ended the command; returns the exit code."""
    sys.unraisablehook = lambda _: None  # what was left half made (a bar of tqdm's) complains as it goes
    say("unclip: stopped; run the same command again to go on")
    return 143 if TERMINATED else 130


def complain(error: Exception, text: str) -> None:
    """Say what went wrong, on whichever rank it did; what the main rank says itself is not said again."""
    if is_main():
        say(f"unclip: {text}")
    elif type(error).__name__ != "ToldByMain":
        click.echo(harmless(f"unclip: rank {os.environ['RANK']}: {text}"), err=True)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="unclip")
def cli() -> None:
    """Train CLIP on your own captioned pictures, search them, and generate new ones from the same space.

    \b
    See the whole loop run on real pictures:  unclip quickstart
    On your own:  shard -> train clip -> embed -> index -> search
                  -> train prior -> train decoder -> generate
    """


@cli.group(context_settings=CONTEXT)
def data() -> None:
    """Look at shards before training on them."""


@cli.group(context_settings=CONTEXT)
def train() -> None:
    """Train CLIP, the prior, or the decoder."""


@cli.group(context_settings=CONTEXT)
def evaluate() -> None:
    """Put a number on CLIP, the prior, or the whole loop."""


@cli.group(context_settings=CONTEXT)
def export() -> None:
    """Write a CLIP in the formats of other tools.

    open_clip needs no export: it reads the folder itself, as "local-dir:clip".
    """


@cli.group(context_settings=CONTEXT)
def lab() -> None:
    """See contrastive learning and diffusion work: each claim as pictures and as numbers with a verdict."""


COMMANDS = {
    cli: [
        clip_commands.shard,
        clip_commands.wise_ft,
        clip_commands.embed,
        retrieval_commands.index,
        retrieval_commands.search,
        retrieval_commands.dedup,
        retrieval_commands.cluster,
        retrieval_commands.classify,
        retrieval_commands.serve,
        drawing_commands.generate,
        drawing_commands.vary,
        drawing_commands.interpolate,
        changing_commands.edit,
        drawing_commands.reconstruct,
        changing_commands.img2img,
        changing_commands.inpaint,
        changing_commands.outpaint,
        upsample_commands.enlarge,
        ema_commands.ema,
        diffusion_commands.quickstart,
    ],
    data: [clip_commands.data_check, clip_commands.data_bench],
    train: [
        clip_commands.train_clip,
        diffusion_commands.train_prior,
        diffusion_commands.train_decoder,
        diffusion_commands.train_upsampler,
        diffusion_commands.train_distilled,
    ],
    evaluate: [
        clip_commands.evaluate_clip,
        evaluate_commands.evaluate_prior,
        evaluate_commands.evaluate_decoder,
        evaluate_commands.evaluate_generation,
        evaluate_commands.evaluate_loop,
        evaluate_commands.evaluate_ablation,
        evaluate_commands.evaluate_sweep,
        evaluate_commands.evaluate_copies,
        upsample_commands.evaluate_upsampler,
    ],
    retrieval_commands.index: [
        retrieval_commands.index_add,
        retrieval_commands.index_delete,
        retrieval_commands.index_compact,
    ],
    export: [clip_commands.export_hf, clip_commands.export_onnx],
    lab: lab_commands.COMMANDS,
}
for group, commands in COMMANDS.items():
    for command in commands:
        group.add_command(command)


if __name__ == "__main__":
    main()
