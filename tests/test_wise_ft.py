import json
import shutil

import pytest
import tiny
import torch
from click.testing import CliRunner

import cli
from clip_train import wise_ft
from clip_train.evaluate import Validation
from clip_train.folder import read_manifest
from clip_train.model import Clip, preprocess_config
from clip_train.settings import UserError

RESNET = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shards, and two CLIPs of one architecture with other weights."""
    place = tmp_path_factory.mktemp("wise")
    tiny.shards(place / "shards")
    tiny.clip(place / "base", seed=0)
    tiny.clip(place / "tuned", seed=1)
    return place


def point(alpha, target, kept=None):
    return {"alpha": alpha, "target": {"acc": target}} | ({} if kept is None else {"kept": {"acc": kept}})


def test_a_mix_lies_on_the_line_between_the_two_and_its_ends_are_exact():
    base, tuned = {"w": torch.tensor([0.1, 2.0])}, {"w": torch.tensor([0.3, -2.0])}
    assert torch.allclose(wise_ft.mix(base, tuned, 0.25)["w"], torch.tensor([0.15, 1.0]))
    assert torch.equal(wise_ft.mix(base, tuned, 0.0)["w"], base["w"])
    assert torch.equal(wise_ft.mix(base, tuned, 1.0)["w"], tuned["w"])


def test_running_statistics_are_mixed_and_counters_are_the_tuned_models():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        cfg = {"embed_dim": 32, "vision_cfg": RESNET, "text_cfg": TEXT}
        models.append(Clip(cfg, preprocess_config(16)).train())
        models[-1].model.visual(torch.randn(4, 3, 16, 16))
    models[1].model.visual(torch.randn(4, 3, 16, 16))
    states = [model.model.state_dict() for model in models]
    mixed = wise_ft.mix(*states, 0.5)
    name = "visual.trunk.bn1.running_var"
    assert torch.allclose(mixed[name], (states[0][name] + states[1][name]) / 2)
    assert mixed["visual.trunk.bn1.num_batches_tracked"] == 2
    models[0].model.load_state_dict(mixed)


def test_the_best_mix_has_the_highest_target_score_that_loses_nothing_kept():
    table = [point(0, 0.5), point(0.5, 0.8), point(1, 0.7)]
    assert wise_ft.best(table, "acc") == 0.5
    table = [point(0, 0.5, 0.9), point(0.25, 0.6, 0.895), point(0.5, 0.8, 0.7), point(1, 0.7, 0.2)]
    assert wise_ft.best(table, "acc", keep_loss=0.01) == 0.25
    assert wise_ft.best(table, "acc", keep_loss=0.0) == 0
    assert wise_ft.best(table, "acc", keep_loss=0.5) == 0.5
    assert wise_ft.best([point(0, 0.5), point(1, 0.5)], "acc") == 0  # of equals the one nearer to the base
    with pytest.raises(UserError, match="no metric 'loss' of the target shards; there are: acc"):
        wise_ft.best(table, "loss")


def test_the_sweep_scores_the_ends_as_the_models_themselves_and_writes_the_mix(place, tmp_path):
    out = tmp_path / "mixed"
    made = wise_ft.wise_ft(
        place / "base", place / "tuned", place / "shards", out, alphas=[0.5], alpha=0.5, keep_shards=place / "shards"
    )
    table = made.result["table"]
    assert [row["alpha"] for row in table] == [0, 0.5, 1] and made.result["alpha"] == 0.5
    for row, name in ((table[0], "base"), (table[-1], "tuned")):
        clip = Clip.load(place / name)
        assert row["target"] == Validation(place / "shards", clip)(clip)
        assert row["kept"] == row["target"]
    states = [Clip.load(folder).model.state_dict() for folder in (place / "base", place / "tuned", out)]
    for name, tensor in states[2].items():
        assert torch.allclose(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-6), name
    manifest = read_manifest(out, "clip")
    assert manifest.inputs["base"]["fingerprint"] == Clip.load(place / "base").fingerprint
    assert manifest.inputs["tuned"]["fingerprint"] == Clip.load(place / "tuned").fingerprint
    assert json.loads((out / "wise_ft.json").read_text()) == manifest.result
    assert (out / "wise_ft.png").read_bytes().startswith(b"\x89PNG")


def test_models_that_do_not_fit_are_refused_by_what_differs(place, tmp_path):
    wider = tiny.clip(tmp_path / "wider", dim=48)
    with pytest.raises(UserError, match=r"do not mix: text_projection is \(32, 32\) in one, \(32, 48\)"):
        wise_ft.wise_ft(place / "base", wider, place / "shards", tmp_path / "out")
    for part, name, value, words in (
        ("preprocess_cfg", "mean", [0.5, 0.5, 0.5], r"prepare pictures differently \(mean\)"),
        ("model_cfg", "quick_gelu", True, "quick_gelu is False in one, True in the other"),
    ):
        other = tmp_path / name
        shutil.copytree(place / "tuned", other)
        config = json.loads((other / "open_clip_config.json").read_text())
        config[part][name] = value
        (other / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            wise_ft.wise_ft(place / "base", other, place / "shards", tmp_path / "out")
    with pytest.raises(UserError, match="alphas 1.5 must be in"):
        wise_ft.wise_ft(place / "base", place / "tuned", place / "shards", tmp_path / "out", alphas=[1.5])
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table_and_a_second_run_finds_it_done(place, tmp_path):
    out = tmp_path / "mixed"
    arguments = ["wise-ft", place / "base", place / "tuned", "--shards", place / "shards", "--alphas", "0.5"]
    arguments = [str(word) for word in [*arguments, "--out", out]]
    first, second = (CliRunner().invoke(cli.cli, arguments, catch_exceptions=False) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    lines = first.stdout.splitlines()
    assert lines[0].split()[:3] == ["alpha", "target", "t2i_R@1"] and len(lines) == 4
    assert sum(line.endswith("written") for line in lines) == 1 and second.stdout == first.stdout
    result = read_manifest(out).result
    assert result["metric"] == "zero_shot_acc1"  # all samples have a label
    best = max(result["table"], key=lambda row: (row["target"]["zero_shot_acc1"], -row["alpha"]))
    assert result["alpha"] == best["alpha"]


@pytest.mark.parametrize(
    "words, told",
    [(["--alpha", "most"], "--alpha most: best, or a number"), (["--alphas", "0,x"], "--alphas 0,x: expected numbers")],
)
def test_options_that_say_nothing_are_refused_in_one_line(place, words, told):
    with pytest.raises(UserError, match=told):
        CliRunner().invoke(
            cli.cli, ["wise-ft", "a", "b", "--shards", "c", "--out", "d", *words], catch_exceptions=False
        )
