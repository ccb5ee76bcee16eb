"""`lab guidance` on a briefly trained network, and with the exact denoiser of noisy labels in its place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion.lab.commands as commands
from clip_train.settings import UserError
from diffusion.lab.plane import PlaneConfig
from diffusion.lab.spiral import NOTHING, Spiral, curve
from diffusion.lab.steering import (
    CAT,
    SteeringConfig,
    class_scores,
    class_shares,
    draw,
    findings,
    mean_over_classes,
    oversaturated,
    right_share,
    steering,
)

NOISY = PlaneConfig(labels=True, wrong_label=0.2, steps=1500)
SMALL = SteeringConfig(plane=NOISY, points=300, drawn=300, scales=(0.0, 1.0, 3.0, 10.0), draw_steps=24)
SPIRAL = Spiral.of(100)


def exact(x, sigma, cond):
    return SPIRAL.denoise(x, sigma, cond, wrong=0.2)


def drawn(label, unwanted, scale):
    return draw(SMALL, exact, label, unwanted, scale)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    heard = []
    made = steering(SMALL, folder, lambda done, total, stage, **more: heard.append((stage, done, total)))
    return made, folder, heard


def test_every_claim_of_the_experiment_holds(done):
    assert [one.verdict for one in done[0].findings if not one.holds] == []


def test_guidance_from_1_to_3_raises_the_precision_of_every_class(done):
    found = {(row["scale"], row["class"]): row["precision"] for row in done[0].tables["scales"]}
    for name in ("person", "dog", "cat"):
        assert found[3.0, name] > found[1.0, name] + 0.04 > found[0.0, name] + 0.3


def test_not_cat_draws_hardly_any_cats_and_fewer_the_stronger(done):
    cats = [row["cat"] for row in done[0].tables["not_cat"]]
    assert cats == sorted(cats, reverse=True) and cats[-1] < 0.06


def test_figures_are_there_and_are_pictures(done):
    experiment, folder, _ = done
    assert {one.file for one in experiment.figures} == {path.name for path in folder.iterdir()} - {"scratch"}
    for one in experiment.figures:
        with Image.open(folder / one.file) as picture:
            assert min(picture.size) > 400 and one.caption.endswith(".")
            grey = np.asarray(picture.convert("L"))
            assert grey[:, [0, -1]].min() == grey[[0, -1]].min() == 255  # nothing is cut off at the edge


def test_every_stage_tells_how_far_it_is_to_its_end(done):
    assert [stage for stage, at, total in done[2] if at == total] == ["training", "scales", "figures"]


def test_as_trained_the_exact_denoiser_is_as_often_right_as_the_labels_and_guided_more_often():
    right = [class_scores(SPIRAL, drawn(1, NOTHING, scale), 1)["precision"] for scale in (0.0, 1.0, 3.0)]
    assert right[0] == pytest.approx(1 / 3, abs=0.1)
    assert right[1] == pytest.approx(0.8 + 0.2 / 3, abs=0.08)
    assert right[2] > 0.95


def test_guidance_with_its_two_conditions_exchanged_drives_points_out_of_the_class():
    assert class_shares(drawn(CAT, NOTHING, 3.0))["cat"] > 0.95
    assert class_shares(drawn(NOTHING, CAT, 3.0))["cat"] < 0.05


def test_a_point_counts_where_it_is_on_the_curve_and_in_the_part_of_its_class():
    spiral = Spiral.of(60, spread=0.02)
    on = curve(torch.tensor([0.1, 0.2, 0.5, 0.9]))
    points = torch.cat([on, torch.tensor([[3.0, 3.0]])])
    first = class_scores(spiral, points, 0)
    assert first["precision"] == pytest.approx(0.4) and first["outside"] == pytest.approx(0.2)
    assert first["coverage"] == pytest.approx(2 / 16)  # 16 of the 48 bins are the class's
    assert class_scores(spiral, points, 1)["precision"] == pytest.approx(0.2)
    last = class_scores(spiral, points, 2)  # what is nearest to it, but off the curve, does not count
    assert last["precision"] == pytest.approx(0.2) and last["coverage"] == pytest.approx(1 / 16)
    assert class_shares(on) == {"person": 0.5, "dog": 0.25, "cat": 0.25}


def test_over_saturation_begins_at_the_lowest_scale_above_1_that_throws_points_off():
    rows = [{"scale": scale, "class": name, "outside": outside}
            for scale, outside in ((0.0, 0.5), (1.0, 0.05), (3.0, 0.02), (5.0, 0.15), (10.0, 0.3))
            for name in ("person", "dog", "cat")]  # fmt: skip
    assert oversaturated(rows) == 5.0 and oversaturated(rows, 0.9) is None
    assert mean_over_classes(rows, 5.0, "outside") == pytest.approx(0.15)


def test_the_odds_of_the_labels_say_how_often_points_are_right():
    assert [right_share(1.0, wrong) for wrong in (0.0, 0.2, 1.0)] == pytest.approx([1, 1 - 0.2 * 2 / 3, 1 / 3])
    assert right_share(0.0, 0.2) == pytest.approx(1 / 3)
    assert right_share(3.0, 0.5) == pytest.approx(4**3 / (4**3 + 2))  # of one class 4 times as many as of another
    assert right_share(-2.0, 0.5) == pytest.approx(1 / (1 + 2 * 4**2)) and right_share(-2.0, 0.0) == 0


@pytest.mark.parametrize(
    ("wrong", "right", "gain"), [(0.0, (0.98, 0.985), False), (0.2, (0.82, 0.98), True), (0.5, (0.62, 0.93), True)]
)
def test_bands_follow_the_share_of_wrong_labels_and_no_gain_is_claimed_where_none_is_wrong(wrong, right, gain):
    def of(wrong, right):
        rows = [{"scale": scale, "precision": one, "coverage": 0.5, "outside": 0.2}
                for scale, one in zip((0.0, 1.0, 3.0), (1 / 3, *right), strict=True)]  # fmt: skip
        said = findings(rows, {"cat": 1 / 3}, [{"scale": 3.0, "cat": 0.0}], wrong)
        return {one.name: one for one in said if one.name.startswith(("precision", "cats_not"))}

    found = of(wrong, right)
    assert all(one.holds for one in found.values()) and ("precision_gain" in found) == gain
    assert not of(wrong, (0.4, 0.4))["precision_1"].holds and not of(wrong, (0.4, 0.4))["precision_3"].holds
    assert not gain or not of(wrong, (right[0], right[0]))["precision_gain"].holds
    assert set(of(1.0, (0.3, 0.3))) == {"precision_0", "precision_1", "precision_3"}  # labels that say nothing


def test_a_network_without_labels_and_scales_without_1_and_3_are_refused():
    with pytest.raises(UserError, match="labels = true"):
        SteeringConfig(plane=PlaneConfig())
    with pytest.raises(UserError, match="3 is missing"):
        replace(SMALL, scales=(0.0, 1.0))


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (commands.lab_spiral, ["--steps", "7"], ("spiral", {"steps": 7, "seed": 0})),
        (commands.lab_sampling, ["--seed", "4"], ("sampling", {"seed": 4, "steps": 3000})),
        (commands.lab_guidance, ["--wrong-label", "0.1"], ("guidance", {"wrong_label": 0.1, "labels": True})),
    ],
)
def test_the_options_of_the_commands_reach_the_network(monkeypatch, tmp_path, command, arguments, expected):
    calls = []
    monkeypatch.setattr(commands, "run", lambda *given: calls.append(given))
    answer = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert answer.exit_code == 0
    (part, out), (name, fields) = calls[0], expected
    assert (part.name, out) == (name, tmp_path / "out") and callable(part.make)
    assert {key: getattr(part.config.plane, key) for key in fields} == fields
