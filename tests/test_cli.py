import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import cli
from clip_train import console
from clip_train.settings import Interrupted, UserError


def commands(group=cli.cli, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())


def test_the_commands_of_the_plan_are_there():
    plan = ["shard", "train clip", "train prior", "train decoder", "embed", "index", "search", "generate"]
    plan += ["evaluate loop", "evaluate clip", "evaluate prior", "quickstart"]
    plan += ["data check", "data bench", "wise-ft", "export hf", "export onnx"]
    assert {tuple(name.split()) for name in plan} <= ALL.keys()


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help_and_every_option_says_what_it_does(path):
    command = ALL[path]
    answer = CliRunner().invoke(cli.cli, [*path, "--help"])
    assert answer.exit_code == 0
    if not isinstance(command, click.Group):
        assert "Example:" in answer.output
        missing = [p.name for p in command.params if isinstance(p, click.Option) and not p.help and p.name != "k"]
        assert missing == []


def test_help_takes_under_four_tenths_of_a_second_of_computing():
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "cli", "train", "clip", "--help"], check=True, capture_output=True)
        now = os.times()  # CPU time of children: what else the machine does is not the command's fault
        times.append(now.children_user + now.children_system - before.children_user - before.children_system)
    assert min(times) < 0.4


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("two\nlines of\n  trouble"), 2, "unclip: two lines of trouble\n"),
        (Interrupted(15, 7), 143, "stopped after step 7"),
        (
            OSError(28, "No space left on device", "clip.partial/x"),
            2,
            "unclip: clip.partial/x: No space left on device\n",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, words):
    def broken(**_):
        raise error

    monkeypatch.setattr(cli.cli, "main", broken)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == code
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "clip", "--shards", "nowhere"], "nowhere"),
        (["embed", "--shards", "nowhere", "--clip", "clip"], "nowhere"),
        (["index", "--embeddings", "nowhere"], "nowhere/ does not exist; make it: unclip embed"),
        (["search", "fox", "--index", "nowhere"], "nowhere/ does not exist; make it: unclip index"),
        (["search", "--index", "nowhere"], "nothing to search for"),
        (["shard", "nowhere"], "nowhere"),
        (["generate", "fox", "--decoder", "nowhere"], "--prior"),
        (["generate", "--decoder", "nowhere"], "one of the four"),
        (["train", "prior", "--embeddings", "nowhere"], "nowhere/ does not exist"),
        (["train", "clip", "--shards", "x", "--preset", "huge"], "no preset 'huge'"),
        (["train", "clip", "--shards", "x", "--set", "depth=3"], "--set depth=3"),
        (["train", "clip", "--shards", "x", "--steps", "3", "--minutes", "2"], "contradict"),
        (["embed", "--shards", "x", "--clip", "c", "--device", "cuda:99"], "--device cuda:99"),
        (["embed", "--shards", "x", "--clip", "c", "--device", "meta"], "--device meta"),
        (["generate", "--again", "x.png", "--decoder", "d", "--seed", "3"], "--again"),
        (["generate", "a", "b", "--decoder", "d", "--prior", "p", "--out", "x.png"], "give a folder"),
        (["generate", "a", "--decoder", "d", "--prior", "p", "--set", "eta=2"], "eta 2.0"),
        (["train", "decoder", "--shards", "x", "--clip", "c", "--set", "predict=dog"], "no parametrisation 'dog'"),
        (["train", "prior", "--embeddings", "x", "--set", "heads=0"], "heads 0"),
        (["train", "prior", "--embeddings", "x", "--set", "log_every=0"], "log_every 0"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_command_that_cannot_run_says_why_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unclip", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    told = capsys.readouterr().err
    assert exit.value.code == 2
    assert words in told and told.count("\n") == 1 and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []  # and nothing was left behind


class DistError(RuntimeError):
    """As torch's, whose children tell of NCCL and of the meeting of the ranks."""


@pytest.mark.parametrize(
    "error, world, code",
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset"), "2", 1),
        (type("DistBackendError", (DistError,), {})("NCCL error: remote process exited"), "2", 1),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] out of memory"), "2", 2),
        (RuntimeError("a size that does not fit"), "2", None),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error"), "1", None),
    ],
)
def test_a_rank_that_loses_another_says_so_in_one_line_and_a_bug_is_still_seen(monkeypatch, capsys, error, world, code):
    def fall(**_):
        raise error

    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "1" if world == "2" else "0")
    monkeypatch.setattr(cli.cli, "main", fall)
    if code is None:
        with pytest.raises(RuntimeError):
            cli.run()
        return
    assert cli.run() == code
    told = capsys.readouterr().err
    assert told.startswith("unclip: rank 1: ") and told.count("\n") == 1
    assert ("another rank was lost" in told) == (code == 1) and ("not enough memory" in told) == (code == 2)


def test_a_table_lines_up_its_columns(capsys):
    console.print_table(("rank", "caption"), [(1, "a"), (10, "two\nlines")])
    assert capsys.readouterr().out == "rank  caption\n1     a\n10    two lines\n"


def test_progress_bars_show_the_rate_and_end_when_done(capsys):
    bars = console.Bars("work")
    bars(1, 400, loss=0.5)
    first = bars.bar
    for i in range(2, 400):
        bars(i, 400, loss=0.5)
    assert bars.bar is first  # one bar all the way
    bars(400, 400, loss=0.25)
    assert bars.bar is None
    told = capsys.readouterr().err
    assert "work" in told and "400/400" in told and "loss=0.25" in told and "it/s" in told
    bars(1, 2, stage="encode")
    assert "work encode" in capsys.readouterr().err
    bars.close()


def test_ctrl_c_in_the_middle_of_a_command_is_one_line_and_130(monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_train.ingest.shard_source", pressed)
    monkeypatch.setattr(sys, "argv", ["unclip", "shard", "pictures"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 130 and "run the same command again" in capsys.readouterr().err


def test_only_the_main_rank_talks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    console.Bars("work")(1, 2)
    assert capsys.readouterr().err == ""


def test_a_message_stands_on_a_line_of_its_own_below_a_bar_that_was_still_moving(capsys):
    bars = console.Bars("work")
    bars(1, 400)
    console.say("unclip: it broke")
    assert capsys.readouterr().err.endswith("\nunclip: it broke\n") and bars.bar is None


def test_several_shards_are_one_set_in_every_command_that_takes_some(monkeypatch):
    seen = []
    monkeypatch.setattr("clip_train.embed.embed", lambda shards, *rest, **options: seen.append(shards))
    assert CliRunner().invoke(cli.cli, ["embed", "--shards", "a", "--shards", "b", "--clip", "c"]).exit_code == 0
    assert seen == ["a::b"]
    for path, command in ALL.items():
        for option in (p for p in command.params if p.name == "shards" and isinstance(p, click.Option)):
            assert option.multiple, path


def test_a_second_sigterm_ends_a_command_whatever_it_waits_for(tmp_path):
    program = """
import signal, sys, time, cli
def wait():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        print("closing", flush=True)
        time.sleep(600)
cli.run = wait
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "closing\n"
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
