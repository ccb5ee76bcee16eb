"""Targets, labels and levels of the networks on the plane, and the distances that their points are judged by."""

from dataclasses import replace

import gauss
import pytest
import torch

from clip_train.settings import UserError
from diffusion.lab import plane
from diffusion.lab.plane import (
    PlaneConfig,
    PlaneNetwork,
    energy_distance,
    noise_and_step,
    one_step_target,
    point_batches,
    scores,
    scratch_of,
    train_plane,
)
from diffusion.lab.spiral import NOTHING, Spiral
from diffusion.lab.walks import walk

SPIRAL = Spiral.of(120)
SMALL = PlaneConfig(width=16, depth=2, steps=30, batch_size=32)


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def awake(config):
    """A network whose last layer is not silent."""
    torch.manual_seed(0)
    network = PlaneNetwork(config)
    torch.nn.init.normal_(network.body[-1].weight)
    return network


def test_every_step_of_the_walk_is_the_same_share_of_all_steps_up_to_it():
    config = PlaneConfig(walk_steps=50)
    variance = config.walk.double() ** 2
    assert len(variance) == 50
    shares = variance.diff() / variance[1:]
    assert shares.tolist() == pytest.approx([config.step_share] * 49, rel=1e-4)


def test_total_noise_and_last_step_are_unit_gaussians_correlated_by_the_steps_share():
    noise, step = noise_and_step(torch.zeros(200_000, 2), 0.3, torch.Generator().manual_seed(0))
    assert noise.var().item() == pytest.approx(1, abs=0.01) and step.var().item() == pytest.approx(1, abs=0.01)
    assert (noise * step).mean().item() == pytest.approx(0.3**0.5, abs=0.01)


def test_the_one_step_target_leaves_x_where_it_is_and_is_right_on_average_with_far_more_variance():
    x0, sigma, share = normal(200_000, 2), torch.full((200_000,), 0.7), 0.02
    noise, step = noise_and_step(x0, share, torch.Generator().manual_seed(1))
    stand_in, guess = one_step_target(x0, sigma, noise, step, share)
    assert torch.allclose(stand_in + 0.7 * guess, x0 + 0.7 * noise, atol=1e-4)
    # guess = noise + what has nothing to do with it: regression on the noise has slope 1, not sqrt(share), not -1
    slope = (guess * noise).mean() / noise.square().mean()
    assert slope.item() == pytest.approx(1, abs=0.05)
    assert guess.var().item() == pytest.approx(1 / share, rel=0.02)


def test_a_step_that_is_the_whole_walk_is_the_total_noise():
    noise, step = noise_and_step(torch.zeros(5, 2), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(noise, step)


def test_only_a_network_that_is_told_the_noise_level_sees_it():
    x, low, high = normal(8, 2), torch.full((8,), -1.0), torch.full((8,), 0.5)
    for config, sees in ((SMALL, True), (replace(SMALL, level=False), False)):
        network = awake(config)
        assert torch.equal(network(x, low, None), network(x, high, None)) != sees


def test_only_a_network_with_labels_sees_them_and_no_condition_is_the_label_of_nothing():
    x, level = normal(8, 2), torch.zeros(8)
    cat, nothing = ({"label": torch.full((8,), label)} for label in (2, NOTHING))
    network = awake(replace(SMALL, labels=True))
    assert not torch.equal(network(x, level, cat), network(x, level, nothing))
    assert torch.equal(network(x, level, None), network(x, level, nothing))
    blind = awake(SMALL)
    assert torch.equal(blind(x, level, cat), blind(x, level, nothing))


def test_a_batch_follows_from_seed_and_step_and_loses_the_asked_share_of_labels():
    config = replace(SMALL, labels=True, batch_size=4000, drop_label=0.25)
    batches = point_batches(SPIRAL, config)
    first, stream = next(batches(3)), batches(2)
    next(stream)
    assert all(torch.equal(first[name], value) for name, value in next(stream).items())
    assert not torch.equal(first["x0"], next(stream)["x0"])
    assert (first["label"] == NOTHING).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not (next(point_batches(SPIRAL, replace(config, labels=False))(0))["label"] == NOTHING).any()


def test_wrong_labels_are_drawn_blindly_once_for_each_training_point():
    spiral = Spiral.of(3000)
    config = replace(SMALL, labels=True, drop_label=0.0, wrong_label=0.3, batch_size=9000)
    batch = next(point_batches(spiral, config)(0))
    row = torch.cdist(batch["x0"], spiral.points).argmin(1)
    assert (batch["label"] != spiral.label[row]).float().mean().item() == pytest.approx(0.3 * 2 / 3, abs=0.03)


def test_the_same_seed_trains_the_same_network_and_another_another():
    x, sigma = normal(4, 2), torch.full((4,), 0.3)
    one, two, other = (train_plane(replace(SMALL, seed=seed), SPIRAL) for seed in (0, 0, 1))
    assert torch.equal(one(x, sigma), two(x, sigma)) and not torch.equal(one(x, sigma), other(x, sigma))
    assert one.loss == two.loss


def test_a_network_that_was_killed_in_training_goes_on_in_its_experiments_folder(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def hear(at, total, **_):
        heard.append(at)
        if len(heard) == 2:
            raise Killed

    x, sigma, heard = normal(4, 2), torch.full((4,), 0.3), []
    config = replace(SMALL, steps=110)
    whole = train_plane(config, SPIRAL)
    fit, often = plane.fit, {"save_every": 0.0}
    with monkeypatch.context() as patched:
        patched.setattr(
            plane, "fit", lambda *args, **more: fit(*args[:3], replace(args[3], **often), *args[4:], **more)
        )
        with pytest.raises(Killed):
            train_plane(config, SPIRAL, hear, folder=tmp_path)
    resumed = train_plane(config, SPIRAL, hear, folder=tmp_path)
    assert (
        heard == [50, 100, 100, 110] and torch.equal(resumed(x, sigma), whole(x, sigma)) and resumed.loss == whole.loss
    )
    assert torch.equal(train_plane(config, SPIRAL, hear, folder=tmp_path)(x, sigma), whole(x, sigma))
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_networks_of_other_settings_and_other_points_are_trained_elsewhere(tmp_path):
    places = {scratch_of(tmp_path, config, spiral) for config in (SMALL, replace(SMALL, target="step"))
              for spiral in (SPIRAL, Spiral.of(120, seed=1), Spiral.of(120, spread=0.03))}  # fmt: skip
    assert len(places) == 6 and {place.parent for place in places} == {tmp_path / "scratch"}


def test_the_largest_seed_trains_and_walks():
    config = replace(SMALL, seed=2**63 - 1, steps=2)
    spiral = Spiral.of(120, seed=2**64 + 1)
    assert not torch.equal(next(point_batches(spiral, config)(0))["x0"], next(point_batches(spiral, config)(1))["x0"])
    network = train_plane(config, spiral)
    assert walk("ddim", network, config.grid(2), 5, 4 * config.seed + 2).end.isfinite().all()


def test_who_says_nothing_loses_the_whole_variance_of_either_unit_noise():
    for target in ("total", "step"):
        still = train_plane(
            replace(SMALL, target=target, lr=1e-9, steps=5, batch_size=4096), SPIRAL
        )  # the last layer begins silent
        assert still.loss == pytest.approx(1, abs=0.1)


def test_progress_names_its_stage():
    heard = []
    train_plane(SMALL, SPIRAL, lambda done, total, **more: heard.append((done, total, more["stage"])), "one step")
    assert heard == [(30, 30, "one step")]


def test_energy_distance_is_that_of_the_samplers_tests_but_for_its_unbiasedness_and_nothing_for_equal_sets():
    a, b = normal(300, 2), normal(400, 2, seed=1) + 1
    within = torch.pdist(a).mean() / 300 + torch.pdist(b).mean() / 400
    assert energy_distance(a, b) == pytest.approx(gauss.energy_distance(a, b) + within.item(), rel=1e-4)
    assert energy_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert 0 < energy_distance(a, normal(400, 2, seed=2)) < 0.03 < energy_distance(a, b)


def test_scores_of_true_points_and_of_points_fallen_together():
    rng = torch.Generator().manual_seed(0)
    true, again = SPIRAL.draw(2000, rng)[0], SPIRAL.draw(2000, rng)[0]
    good = scores(SPIRAL, again, true)
    assert good["distance"] == pytest.approx(0.02 * (2 / torch.pi) ** 0.5, rel=0.1)  # mean of |N(0, spread)|
    assert good["coverage"] == 1 and good["variance"] == pytest.approx(1, abs=0.05) and abs(good["energy"]) < 0.005
    fallen = scores(SPIRAL, SPIRAL.points[:1] + 0.001 * again, true)
    assert fallen["distance"] < 0.01 and fallen["coverage"] < 0.05
    assert fallen["variance"] < 1e-4 and fallen["energy"] > 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "half"}, "no target 'half'"),
        ({"predict": "y"}, "no parametrisation"),
        ({"walk_steps": 1}, "at least 2"),
        ({"sigma_max": 0.001}, "sigma_min < sigma_max"),
        ({"drop_label": 1.5}, "drop_label 1.5 must be in [0, 1]"),
    ],
)
def test_what_the_plane_cannot_be_is_said_in_one_line(change, words):
    with pytest.raises(UserError) as error:
        PlaneConfig(**change)
    assert words in str(error.value) and "\n" not in str(error.value)
