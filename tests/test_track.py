import io
import json
import math
import sys

import pytest
from PIL import Image

from clip_train import track
from clip_train.settings import UserError

CONFIG = {"lr": 0.002, "vision": {"layers": 12}}


def lines(steps):
    return [{"step": s, "loss": 5 / s, "lr": 1e-3, "scale": 14.0 + s, "gap": 0.5, "val_t2i_R@1": 0.1} for s in steps]


def shown(folder):
    """What TensorBoard shows of a folder: name -> [(step, value)], and its texts."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    texts = [tag for tag in events.Tags()["tensors"]]
    text = "".join(t.tensor_proto.string_val[0].decode() for tag in texts for t in events.Tensors(tag))
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, text


def test_tensorboard_shows_numbers_in_groups_and_the_config(tmp_path):
    pytest.importorskip("tensorboard")
    with track.open_trackers(["tensorboard"], tmp_path, CONFIG) as tracker:
        for line in lines([10, 20]):
            tracker(line)
    scalars, text = shown(tmp_path / "logs")
    assert set(scalars) == {"train/loss", "train/lr", "train/scale", "watch/gap", "val/t2i_R@1"}
    assert scalars["train/loss"] == [(10, 0.5), (20, 0.25)]
    assert '"layers": 12' in text


def test_a_run_that_is_killed_and_resumed_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    with track.open_trackers(["tensorboard"], tmp_path, CONFIG) as tracker:
        for line in lines([10, 20, 30, 40]):  # the checkpoint was taken at 25
            tracker(line)
    with track.open_trackers(["tensorboard"], tmp_path, CONFIG) as tracker:
        for line in lines([30, 40, 50]):
            tracker(line)
    scalars, _ = shown(tmp_path / "logs")
    assert [step for step, _ in scalars["train/loss"]] == [10, 20, 30, 40, 50]


def test_auto_is_tensorboard_where_it_is_installed_and_nothing_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(track, "_installed", lambda name: True)
    assert isinstance(track.open_trackers(["auto"], tmp_path, {}).trackers[0], track.TensorBoard)
    monkeypatch.setattr(track, "_installed", lambda name: False)
    for names in (["auto"], ["none"], []):
        with track.open_trackers(names, tmp_path, {}) as tracker:
            tracker(lines([1])[0])
    assert list(tmp_path.iterdir()) == []
    for name, install in (("tensorboard", r"pip install 'unclip\[track\]'"), ("wandb", "pip install wandb")):
        with pytest.raises(UserError, match=install):
            track.open_trackers([name], tmp_path, {})
    with pytest.raises(UserError, match="'mlflow'; there are: auto, tensorboard, wandb, none"):
        track.open_trackers(["mlflow"], tmp_path, {})


FAKE_WANDB = """
calls = []
class Run:
    def log(self, numbers, step): calls.append((step, numbers))
    def finish(self): calls.append("finish")
def init(**options):
    calls.append(options)
    return Run()
"""


def test_wandb_goes_on_with_the_run_it_began(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    work = tmp_path / "clip.partial"
    work.mkdir()
    for steps in ([10, 20], [20, 30]):
        with track.open_trackers(["wandb", "wandb"], work, CONFIG) as tracker:
            for line in lines(steps):
                tracker(line)
    import wandb

    first, second = (c for c in wandb.calls if isinstance(c, dict))
    assert first == second and first["name"] == "clip" and first["resume"] == "allow" and first["config"] == CONFIG
    assert len(first["id"]) == 8 and first["dir"] == str(work / "logs")
    assert [c[0] for c in wandb.calls if isinstance(c, tuple)] == [10, 20, 20, 30]
    assert wandb.calls[1] == (10, {track.grouped(n): v for n, v in lines([10])[0].items() if n != "step"})
    assert wandb.calls.count("finish") == 2
    monkeypatch.delitem(sys.modules, "wandb")


def test_a_folder_called_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if not any((p / "wandb" / "__init__.py").exists() for p in map(track.Path, sys.path)):
        assert not track._installed("wandb")


def write(folder, entries):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_curves_are_drawn_of_whatever_a_run_has_recorded(tmp_path):
    write(tmp_path, [{"step": 10, "loss": 1.0, "lr": 1e-3}])  # two panels
    small = Image.open(io.BytesIO(track.curves(tmp_path).read_bytes())).size
    write(tmp_path, [{"step": 1, "loss": 1.0, "norm": 0.0, "rank_image": math.nan}])  # of weights that are destroyed
    track.curves(tmp_path)
    entries = [
        {"step": s, "loss": 5 * math.exp(-s / 300), "lr": 1e-3, "norm": 2.0, "scale": 14.0} for s in range(1, 900)
    ]
    entries = [e | {"chance": 5.5, "rank_image": 9.0, "rank_text": 7.0, "gap": 0.3, "cos_right": 0.7} for e in entries]
    write(tmp_path, entries + [{"step": 900, "val_t2i_R@1": 0.2}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 901, "lo')  # killed here
    path = track.curves(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "metrics.jsonl"} and path.name == "curves.png"
    large = Image.open(io.BytesIO(path.read_bytes()))
    assert large.format == "PNG" and large.width == 2 * small[0] and large.height > small[1]
    colours = {c for _, c in large.convert("RGB").getcolors(1 << 24)}
    assert (0x2B, 0x6C, 0xB0) in colours and (0xDD, 0x6B, 0x20) in colours  # a first and a second curve


def test_curves_of_nothing_say_so(tmp_path):
    with pytest.raises(UserError, match="no numbers to draw"):
        track.curves(tmp_path)


def test_smoothing_keeps_a_level_and_the_length():
    assert track._smoothed([2.0] * 100) == [2.0] * 100
    line = track._smoothed([float(i) for i in range(120)])
    assert len(line) == 120 and line[60] == 60.0 and line[0] == 1.0  # the mean of 0, 1 and 2
