import json
import math

import pytest
import tiny
import torch
from click.testing import CliRunner

import cli
from clip_train.databench import STAGES, bench, conclusions
from clip_train.model import Clip
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import write_shard

TIMES = {"read": 10.0, "decode": 90.0, "tokenise": 50.0, "move": 1.0, "forward": 100.0, "backward": 199.0}
FIGURES = {
    "samples": 10**6,
    "image_size": 64,
    "short_side": 64.0,
    "device": "cuda",
    "cores": 4,
    "cached": False,
}


def found(figures=(), **times):
    return conclusions(FIGURES | dict(figures), TIMES | times)


def test_rates_shares_and_workers_follow_from_the_times():
    figures = found()
    assert figures["loader_per_core_second"] == 10_000 and figures["model_per_second"] == pytest.approx(
        1e6 / 300, 0.001
    )
    shares = {stage["stage"]: stage["share"] for stage in figures["stages"]}
    assert shares == pytest.approx(
        {"read": 0.025, "decode": 0.225, "tokenise": 0, "move": 0.0025, "forward": 0.25, "backward": 0.4975}
    )
    assert (figures["bottleneck"], figures["bottleneck_share"], figures["workers"]) == ("backward", 0.4975, 1)


def test_tokenising_counts_where_it_is_done_again_each_time():
    figures = found({"samples": None})
    assert figures["loader_per_core_second"] == pytest.approx(1e6 / 150, 0.001)
    assert {s["stage"]: s["share"] for s in figures["stages"]}["tokenise"] == pytest.approx(50 / 450, 0.001)


@pytest.mark.parametrize(
    "figures, times, workers, words",
    [
        ({}, {}, 1, "the model is what takes the time .*--set workers=1"),
        ({}, {"decode": 990.0}, 4, "--set workers=4 keeps the device busy"),
        ({}, {"decode": 1490.0}, 5, "5 workers would feed it, but there are 4 cores: use a machine with more"),
        ({"short_side": 256.0}, {"decode": 2990.0}, 10, "10 workers .* unclip shard --resize 64"),
        ({}, {"read": 3000.0}, 11, "copy the shards to a disk of this machine"),
        ({"cached": True}, {}, 0, "decoded once, in about 100 core-seconds; after that the model"),
        ({"device": "cpu"}, {"decode": 20.0}, 1, "the model is what takes the time .*a GPU or a smaller preset"),
        ({"device": "cpu", "short_side": 300.0}, {"decode": 290.0}, 1, "loading takes 50% .*--resize 64"),
    ],
)
def test_the_advice_follows_from_what_is_slow(figures, times, workers, words):
    import re

    made = found(figures, **times)
    assert made["workers"] == workers and re.search(words, made["advice"]) and "\n" not in made["advice"]


def test_every_stage_is_timed_on_real_shards_and_the_weights_stay(tmp_path):
    clip = Clip.load(tiny.clip(tmp_path / "clip"))
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    seen = []
    figures = bench(
        tiny.shards(tmp_path / "s"),
        clip,
        batch_size=8,
        seconds=0.1,
        on_progress=lambda done, total, **_: seen.append((done, total)),
    )
    assert [stage["stage"] for stage in figures["stages"]] == list(STAGES)
    times = [stage["microseconds"] for stage in figures["stages"]]
    assert all(0 <= time < 1e6 and math.isfinite(time) for time in times) and min(times[1:3] + times[4:]) > 0
    assert sum(stage["share"] for stage in figures["stages"]) == pytest.approx(1, abs=0.001)
    assert (figures["samples"], figures["cached"], figures["workers"], figures["device"]) == (10, True, 0, "cpu")
    assert figures["picture"].startswith("20 x 20 png") and seen[-1] == (0.1, 0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())


def test_remote_shards_are_timed_too(tmp_path):
    tiny.shards(tmp_path / "s")
    clip = Clip.load(tiny.clip(tmp_path / "clip"))
    figures = bench(f"file://{tmp_path}/s/", clip, batch_size=4, samples=6, seconds=0)
    assert figures["samples"] is None and not figures["cached"]
    with pytest.raises(UserError, match="gone.tar cannot be read"):
        bench(f"file://{tmp_path}/gone.tar", clip)


def test_shards_whose_pictures_cannot_be_decoded_are_refused(tmp_path):
    rows = [Sample(key="a", image=b"x", ext="png", captions=["a"], meta={"width": 1, "height": 1})]
    write_shard(rows, tmp_path / "0.tar")
    with pytest.raises(UserError, match="none of 1 pictures can be decoded; the first: a: not a"):
        bench(tmp_path / "0.tar", Clip.load(tiny.clip(tmp_path / "clip")))


def test_the_command_prints_json_into_a_pipe_and_advice_beside_it(tmp_path):
    tiny.shards(tmp_path / "s"), tiny.clip(tmp_path / "clip")
    arguments = ["--shards", f"{tmp_path}/s", "--clip", f"{tmp_path}/clip", "--batch-size", "4", "--seconds", "0"]
    done = CliRunner().invoke(cli.cli, ["data", "bench", *arguments, "--device", "cpu", "--out", f"{tmp_path}/b.json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "b.json").read_text()) and figures["advice"] in done.stderr
    assert len(figures["stages"]) == len(STAGES)
