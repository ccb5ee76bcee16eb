"""`lab spiral` at a third of its training: every claim holds, and the measures that it rests on are worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.settings import UserError
from diffusion.lab import field as field_module
from diffusion.lab import field_figures
from diffusion.lab.field import STEP, TOTAL, FieldConfig, field, findings, known_and_unknown, relative_error
from diffusion.lab.plane import PlaneConfig
from diffusion.lab.plane_figures import draw_field
from diffusion.lab.spiral import Spiral, nearest

SPIRAL = Spiral.of(100)
SMALL = FieldConfig(plane=PlaneConfig(steps=1000), points=300, drawn=1000, draw_steps=32, levels=6, frames=2)


class Exact:
    """What knows everything, in the place of a trained network."""

    config = PlaneConfig()

    def __call__(self, x, sigma, cond=None):
        return SPIRAL.denoise(x, sigma, cond)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiral")
    heard = []
    made = field(SMALL, folder, lambda done, total, stage, **more: heard.append((stage, done, total)))
    return made, folder, heard


def value(experiment, name):
    return next(one.value for one in experiment.findings if one.name == name)


def test_every_claim_of_the_experiment_holds(done):
    assert [one.verdict for one in done[0].findings if not one.holds] == []


def test_training_on_the_total_noise_beats_training_on_one_step(done):
    assert value(done[0], "one_step_distance") > 3 and value(done[0], "one_step_energy") > 2
    assert value(done[0], "step_loss_over_total") > 2


def test_being_told_the_noise_level_beats_not_being_told(done):
    assert value(done[0], "blind_distance") > 3 and value(done[0], "blind_energy") > 3


def test_the_learned_field_is_near_the_exact_score_at_every_noise_level(done):
    rows = done[0].tables["field_error"]
    assert len(rows) == 6 and max(row[TOTAL] for row in rows) < 0.35 < 0.6 < max(row[STEP] for row in rows)


def test_losses_come_near_their_floors_and_not_below(done):
    for row in done[0].tables["loss"]:
        assert row["total_floor"] - 0.01 < row["total_loss"] < row["total_floor"] + 0.1
        assert row["step_floor"] - 0.06 < row["step_loss"] < row["step_floor"] + 0.06


def test_figures_are_there_and_are_pictures(done):
    experiment, folder, _ = done
    assert {one.file for one in experiment.figures} == {path.name for path in folder.iterdir()} - {"scratch"}
    for one in experiment.figures:
        with Image.open(folder / one.file) as picture:
            assert min(picture.size) > 400 and one.caption.endswith(".")
            grey = np.asarray(picture.convert("L"))
            assert grey[:, [0, -1]].min() == grey[[0, -1]].min() == 255  # nothing is cut off at the edge


def test_every_stage_tells_how_far_it_is_to_its_end(done):
    ended = [stage for stage, at, total in done[2] if at == total]
    training = [f"training, {name}" for name in ("total noise", "one step", "no noise level")]
    assert ended == [*training, "samples", "errors", "figures", "animation"]


def test_arrows_are_drawn_towards_the_data_and_none_longer_than_its_cell():
    class Axes:
        def quiver(self, x, y, u, v, **_):
            self.start, self.way = torch.stack([x, y], 1), torch.stack([u, v], 1)

    for vp in (False, True):
        axes = Axes()
        draw_field(axes, SPIRAL.denoise, 0.05, "black", cells=9, reach=1.4, vp=vp)
        away, ahead = (nearest(axes.start + share * axes.way)[0] for share in (0.0, 0.05))
        assert len(away) == 81 and (ahead < away).float().mean() > 0.9  # not all: between turns both ways are as long
        assert axes.way.norm(dim=1).max().item() == pytest.approx(1.8 * 1.4 / 9)


def test_the_relative_error_is_nothing_for_the_exact_field_one_for_none_and_two_for_the_field_turned_round():
    def turned(x, sigma):
        return 2 * x - SPIRAL.denoise(x, sigma)

    for sigma in (0.02, 1.0):
        assert relative_error(SPIRAL.denoise, SPIRAL, sigma, 0) == 0
        assert relative_error(lambda x, sigma: x, SPIRAL, sigma, 0) == pytest.approx(1)
        assert relative_error(turned, SPIRAL, sigma, 0) == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 10.0])
def test_who_knows_everything_has_the_floors_as_losses(sigma):
    row = known_and_unknown({TOTAL: Exact(), STEP: Exact()}, SPIRAL, sigma, 0, count=20_000)
    assert row["total_loss"] == row["total_floor"]
    assert row["step_loss"] == pytest.approx(row["step_floor"], abs=0.03)
    share = Exact.config.step_share
    assert row["step_over_total"] > 1 / share
    # the variance of the one-step target is that of the step's noise that cannot be known, scaled up by 1 / share
    assert row["step_over_total"] * row["total_floor"] == pytest.approx(row["step_floor"] / share, rel=1e-5)


def test_far_from_the_data_the_floor_is_its_variance_over_that_of_the_noise():
    row = known_and_unknown({TOTAL: Exact(), STEP: Exact()}, SPIRAL, 10.0, 0, count=20_000)
    variance = SPIRAL.points.var(0, correction=0).mean().item() + SPIRAL.spread**2
    assert row["total_floor"] == pytest.approx(variance / (100 + variance), rel=0.1)


def test_a_network_as_bad_as_its_rivals_bears_no_claim_out():
    same = {"distance": 0.1, "energy": 0.01}
    quality = {name: same for name in ("data", "total noise", "one step", "no noise level")}
    losses = [known_and_unknown({TOTAL: Exact(), STEP: Exact()}, SPIRAL, 1.0, 0, count=500)]
    untaught = [row | {"total_loss": 1.0, "step_loss": 1.0} for row in losses]
    said = findings(Exact.config, quality, {TOTAL: [0.9], STEP: [0.9]}, untaught)
    assert {one.name for one in said if one.holds} == {"total_floor", "one_step_field_error"}


def test_figures_say_what_was_found_and_not_what_was_hoped_for(done, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(field_figures, "headline", lambda _, message: said.append(message))
    monkeypatch.setattr(field_figures, "save", lambda *_: None)  # drawn above
    monkeypatch.setattr(field_figures, "draw_field", lambda *_, **__: None)
    untaught = [row | {"total_loss": 1.0, "step_loss": 1.0} for row in done[0].tables["loss"]]
    nothing = {name: [1.0] for name in (TOTAL, STEP, field_figures.BLIND)}
    still = Exact()
    made = [
        field_figures.figure_of_losses(tmp_path, [row["sigma"] for row in untaught], untaught),
        field_figures.figure_of_fields(tmp_path, SPIRAL, still, 1.0),
        field_figures.figure_of_blind_field(tmp_path, still, 1.0),
        field_figures.figure_of_errors(tmp_path, [1.0], nothing),
    ]
    assert len(said) == len(made) and all("100 %" in one for one in said)


def test_a_run_that_was_killed_takes_up_its_networks_and_finds_the_same(done, monkeypatch):
    experiment, folder, _ = done
    monkeypatch.setattr(field_module, "draw_all", lambda *_: [])  # drawn above
    heard = []
    again = field(replace(SMALL, frames=0), folder, lambda done, total, stage, **more: heard.append(stage))
    assert set(heard) == {"samples", "errors"}  # and no training
    assert again.findings == experiment.findings and again.tables == experiment.tables


def test_a_config_that_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="drawn >= 100"):
        replace(SMALL, drawn=5)
