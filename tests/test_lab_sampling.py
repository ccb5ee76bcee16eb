"""`lab sampling` on a briefly trained network, and with the exact denoiser in its place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.settings import UserError
from diffusion.lab.plane import PlaneConfig, scores
from diffusion.lab.sampling import SamplingConfig, findings, sampling
from diffusion.lab.spiral import Spiral
from diffusion.lab.walks import walk

SMALL = SamplingConfig(plane=PlaneConfig(steps=1500), points=300, drawn=1500, steps=(2, 4, 16, 32), frames=2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    heard = []
    made = sampling(SMALL, folder, lambda done, total, stage, **more: heard.append((stage, done, total)))
    return made, folder, heard


def value(experiment, name):
    return next(one.value for one in experiment.findings if one.name == name)


def test_every_claim_of_the_experiment_holds(done):
    assert [one.verdict for one in done[0].findings if not one.holds] == []


def test_ddpm_keeps_the_variance_and_without_its_noise_loses_more_than_half(done):
    assert 90 < value(done[0], "ddpm_variance") < 110
    assert value(done[0], "no_noise_variance") < 50 and value(done[0], "no_noise_coverage") < 50


def test_ddim_at_16_steps_is_nearer_the_spiral_than_ddpm_at_16(done):
    rows = {(row["sampler"], row["steps"]): row for row in done[0].tables["evaluations"]}
    assert rows["ddim", 16]["energy"] < rows["ddpm", 16]["energy"]
    assert abs(rows["ddim", 16]["variance"] - 1) < abs(rows["ddpm", 16]["variance"] - 1)


def test_evaluations_are_the_calls_of_the_network_two_a_step_for_heun(done):
    rows = done[0].tables["evaluations"]
    assert len(rows) == 4 * 4
    for row in rows:
        assert row["evaluations"] == (2 * row["steps"] - 1 if row["sampler"] == "heun" else row["steps"])


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
    assert ended == ["training", "walks", "samplers", "figures", "animation"]


def test_the_collapse_is_the_samplers_and_not_the_networks_for_the_exact_denoiser_falls_together_too():
    spiral = Spiral.of(100)
    true = spiral.draw(1000, torch.Generator().manual_seed(1))[0]
    grid = PlaneConfig().grid(64)
    kept = {name: scores(spiral, walk(name, spiral.denoise, grid, 1000).end, true) for name in ("ddpm", "ddpm_mean")}
    assert kept["ddpm"]["variance"] == pytest.approx(1, abs=0.1) and kept["ddpm"]["coverage"] == 1
    assert kept["ddpm_mean"]["variance"] < 0.1 and kept["ddpm_mean"]["coverage"] < 0.3


def test_the_claims_fall_when_the_samplers_change_places():
    good = {"variance": 1.0, "coverage": 1.0, "distance": 0.02, "energy": 0.001}
    bad = {"variance": 0.6, "coverage": 0.6, "distance": 0.2, "energy": 0.01}
    walks = {"ddpm": bad, "ddpm without noise": good, "ddim": good}
    rows = [{"sampler": name, "steps": steps, "evaluations": steps, **(good if name == "ddpm" else bad)}
            for name in ("ddpm", "ddim", "heun", "dpmpp_2m") for steps in (2, 16, 64)]  # fmt: skip
    held = {one.name for one in findings(SamplingConfig(), walks, rows) if one.holds}
    assert held.isdisjoint({"ddpm_variance", "ddpm_coverage", "no_noise_variance", "no_noise_coverage",
                            "ddim_over_ddpm", "ddim_variance_at_few", "fewest_over_many"})  # fmt: skip


def test_a_config_that_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="at least 2 steps"):
        replace(SMALL, steps=(1, 4))
