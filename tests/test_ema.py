import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from clip_train.ema import (
    WIDTHS,
    Average,
    PowerAverage,
    PowerAverages,
    coefficients,
    gamma_of,
    profile,
    read_snapshots,
    reconstruct,
)
from clip_train.fit import FitConfig, fit
from clip_train.settings import UserError
from clip_train.tensors import load_tensors, save_tensors


def tied():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight
    return model


def test_the_average_takes_the_place_of_the_weights_and_gives_it_back_bit_for_bit_tied_weights_too():
    model = tied()
    average = Average(model, 0.5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    average.update(model, 100)
    weights, mean = ({n: t.clone() for n, t in d.items()} for d in (model.state_dict(), average.tensors))
    with average.in_place_of_weights(model):
        assert all(torch.equal(t, mean[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, mean[name]) for name, t in average.tensors.items())


def test_whole_numbers_are_copied_and_fractions_averaged():
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.75)
    model.num_batches_tracked.fill_(8)
    nn.init.constant_(model.weight, 3.0)
    average.update(model, 1000)
    assert average.tensors["num_batches_tracked"] == 8
    assert average.tensors["weight"].tolist() == [1.5, 1.5]


def test_the_first_steps_are_forgotten_faster():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, 0.999)
    nn.init.ones_(model.weight)
    average.update(model, 1)
    assert average.tensors["weight"].item() == pytest.approx(1 - 1 / 10)  # decay step / (step + 9)


def walk(steps, seed=0):
    """A model in float64 whose weights wander; yields it after each step, counted from 1."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2).double()
    for step in range(1, steps + 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=rng, dtype=torch.float64)
        yield step, model


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_the_width_of_a_profile_is_the_one_that_was_asked_for(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)
    steps = np.arange(1, 40001, dtype=np.float64)
    counts = profile(steps, 40000, gamma)
    mean = (counts * steps).sum()
    assert counts.sum() == pytest.approx(1, abs=1e-12)
    assert ((counts * (steps - mean) ** 2).sum() ** 0.5) / 40000 == pytest.approx(sigma_rel, rel=1e-3)


def test_the_published_exponents_come_out():
    """arXiv 2312.02696, section 3.1: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert [round(gamma_of(width), 2) for width in WIDTHS] == [16.97, 6.94]
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-6)
    for width in (0.0, 0.3):
        with pytest.raises(UserError, match="sigma_rel"):
            gamma_of(width)


def test_a_power_average_is_the_sum_of_all_weights_in_the_shares_of_its_profile():
    average, seen = None, []
    for _, model in walk(50):
        average = average or PowerAverage(model, 0.1)
        seen.append(model.weight.detach().clone())
        average.update(model, len(seen))
    shares = torch.from_numpy(profile(np.arange(1, 51, dtype=np.float64), 50, gamma_of(0.1)))
    truth = (shares[:, None, None] * torch.stack(seen)).sum(0)
    assert torch.allclose(average.tensors["weight"], truth, rtol=0, atol=1e-12)


def test_an_average_of_another_width_is_what_would_have_been_tracked_directly(tmp_path):
    """In float64: what is left is the profile's distance times how far the weights wander, and nothing else."""
    steps, wanted = 800, {0.05: 1e-9, 0.1: 1e-9, 0.07: 0.01, 0.15: 0.01}
    power, direct, seen = None, {}, []
    for step, model in walk(steps):
        power = power or PowerAverages(model, steps, 32)
        direct = direct or {width: PowerAverage(model, width) for width in wanted}
        power.update(model, step, tmp_path)
        for average in direct.values():
            average.update(model, step)
        seen.append(model.weight.detach().clone())
    snapshots = read_snapshots(tmp_path)
    assert len(snapshots) == 64 and snapshots[-1].step == steps
    spread = torch.stack(seen).std().item()
    for width, error in wanted.items():
        tensors, distance = reconstruct(snapshots, width)
        assert tensors["weight"].dtype == torch.float64 and distance < max(error, 1e-9)
        assert (tensors["weight"] - direct[width].tensors["weight"]).abs().max() < max(error * spread, 1e-8)
        # a plain exponential average of weights that wander is elsewhere: the test can tell
        assert (tensors["weight"] - seen[-1]).abs().max() > 0.1 * spread


def test_an_earlier_step_has_its_average_too(tmp_path):
    power, direct = None, None
    for step, model in walk(400):
        power = power or PowerAverages(model, 400, 16)
        direct = direct or PowerAverage(model, 0.08)
        power.update(model, step, tmp_path)
        if step <= 275:
            direct.update(model, step)
    tensors, distance = reconstruct(read_snapshots(tmp_path), 0.08, step=275)
    assert distance < 0.01
    assert torch.allclose(tensors["weight"], direct.tensors["weight"], atol=0.02)
    with pytest.raises(UserError, match="first is of step 25"):
        reconstruct(read_snapshots(tmp_path), 0.08, step=10)


def test_no_other_shares_come_nearer_and_they_add_up_to_one():
    have = [(step, gamma_of(width)) for step in (50, 100, 150, 200) for width in WIDTHS]
    shares, distance = coefficients(have, 200, gamma_of(0.15))
    steps = np.arange(1, 201, dtype=np.float64)
    basis = np.stack([profile(steps, *one) for one in have], axis=1)
    target = profile(steps, 200, gamma_of(0.15))

    def distance_of(shares):
        return np.linalg.norm(basis @ shares - target) / np.linalg.norm(target)

    assert shares.sum() == pytest.approx(1, abs=1e-12) and distance_of(shares) == pytest.approx(distance, rel=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(200):
        move = rng.normal(size=len(have))
        move -= move.mean()  # still adding up to one
        assert distance_of(shares + 1e-3 * move / np.abs(move).max()) > distance


def test_snapshots_are_as_many_as_asked_for_and_no_more(tmp_path):
    power = None
    for step, model in walk(23):
        power = power or PowerAverages(model, 23, 4)
        power.update(model, step, tmp_path)
    assert [one.step for one in read_snapshots(tmp_path)] == [6, 6, 12, 12, 17, 17, 23, 23]


def test_a_damaged_snapshot_and_a_training_without_any_are_named(tmp_path):
    with pytest.raises(UserError, match="ema_snapshots"):
        read_snapshots(tmp_path)
    (tmp_path / "snapshots").mkdir()
    path = tmp_path / "snapshots" / "000000005-0.safetensors"
    save_tensors(path, {"weight": torch.ones(2)}, {"step": 5, "gamma": 7.0})
    assert read_snapshots(tmp_path)[0].gamma == 7.0
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="000000005-0.safetensors is damaged"):
        read_snapshots(tmp_path)


def test_a_training_killed_and_resumed_leaves_the_same_snapshots_to_the_bit(tmp_path):
    def batches(start):
        for step in itertools.count(start):
            yield {"x": torch.randn(8, 3, generator=torch.Generator().manual_seed(step))}

    def loss(model, batch, rng):
        return (model(batch["x"] + 0.1 * torch.randn(8, 3, generator=rng)) - 1).square().mean(), {}

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    how = {"steps": 20, "batch_size": 8, "precision": "fp32", "ema_snapshots": 3}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    fit(model(), batches, loss, FitConfig(**how), tmp_path / "whole")

    def die(done, total, **_):
        if done == 15:
            raise KeyError

    with pytest.raises(KeyError):
        fit(model(), batches, loss, FitConfig(**how, save_every=0.0), tmp_path / "broken", on_progress=die)
    fit(model(), batches, loss, FitConfig(**how), tmp_path / "broken")
    files = sorted((tmp_path / "whole" / "snapshots").iterdir())
    assert [file.name[:9] for file in files] == ["000000007"] * 2 + ["000000013"] * 2 + ["000000020"] * 2
    for file in files:
        (one, numbers), (other, same) = load_tensors(file), load_tensors(tmp_path / "broken" / "snapshots" / file.name)
        assert numbers == same and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert reconstruct(read_snapshots(tmp_path / "broken"), 0.08)[0]["1.num_batches_tracked"] == 20


def test_snapshots_do_not_change_what_is_trained(tmp_path):
    """They are averages beside the weights: with and without them the same numbers."""
    logs = []
    for count in (0, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        torch.manual_seed(0)
        batch = {"x": torch.randn(4, 3)}
        fit(
            nn.Linear(3, 1),
            lambda start, batch=batch: iter(lambda: batch, None),
            lambda model, batch, rng: (model(batch["x"]).square().mean(), {}),
            FitConfig(steps=20, batch_size=4, precision="fp32", ema_snapshots=count),
            folder,
        )
        logs.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
        assert (folder / "snapshots").exists() == bool(count)
    assert logs[0] == logs[1]
