import json
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from clip_train.fit import FitConfig, fit, learning_rate, parameter_groups
from clip_train.settings import Interrupted, UserError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))


def batches(start):
    """y = x . (1, 2, 3, 4): the batch of a step is a function of the step."""
    step = start
    while True:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        yield {"x": x, "y": x @ torch.tensor([[1.0], [2.0], [3.0], [4.0]])}
        step += 1


def squared_error(model, batch, rng):
    noise = 0.01 * torch.randn(batch["x"].shape, generator=rng, device=batch["x"].device)
    return (model(batch["x"] + noise) - batch["y"]).square().mean(), {"size": len(batch["x"])}


def config(**settings):
    return FitConfig(**{"steps": 60, "batch_size": 32, "lr": 0.02, "precision": "fp32", "ema": 0.9} | settings)


class Killed(Exception):
    pass


def test_the_loop_learns_a_linear_map_to_a_fraction_of_its_first_error(tmp_path):
    fit(network(), batches, squared_error, config(steps=300), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.2 * losses[0]


def test_training_killed_and_resumed_equals_training_unbroken(tmp_path):
    whole, broken = network(), network()
    (tmp_path / "whole").mkdir(), (tmp_path / "broken").mkdir()
    unbroken = fit(whole, batches, squared_error, config(), tmp_path / "whole")

    def die(done, total, **_):
        if done == 37:
            raise Killed

    with pytest.raises(Killed):  # save_every=0: a checkpoint after each step, so the last is of step 36
        fit(broken, batches, squared_error, config(save_every=0.0), tmp_path / "broken", on_progress=die)
    resumed_model = network(seed=5)  # its own weights must not matter
    resumed = fit(resumed_model, batches, squared_error, config(), tmp_path / "broken")

    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed_model.state_dict()[name]), name
        assert torch.equal(unbroken.averaged[name], resumed.averaged[name]), name
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_a_finished_training_run_again_takes_no_further_step(tmp_path):
    first = network()
    fit(first, batches, squared_error, config(), tmp_path)
    again = network(seed=1)
    fit(again, lambda start: iter(()), squared_error, config(), tmp_path)
    assert torch.equal(first[0].weight, again[0].weight)


def test_accumulated_parts_make_the_gradient_of_the_whole_batch(tmp_path):
    def plain(model, batch, rng):
        return (model(batch["x"]) - batch["y"]).square().mean(), {}

    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        (tmp_path / str(parts)).mkdir()
        fit(model, batches, plain, config(steps=5, accumulate=parts), tmp_path / str(parts))
        weights.append(model.weight.detach())
    assert weights[0].allclose(weights[1], atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    def breaks(model, batch, rng):
        loss, numbers = squared_error(model, batch, rng)
        breaks.calls += 1
        return loss * (math.inf if breaks.calls == 4 else 1.0), numbers

    breaks.calls = 0
    with pytest.raises(UserError, match="broke at step 3"):
        fit(network(), batches, breaks, config(), tmp_path)


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint_to_go_on_from(tmp_path):
    def interrupt(done, total, **_):
        if done == 11:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        fit(network(), batches, squared_error, config(), tmp_path, on_progress=interrupt)
    assert stop.value.number == signal.SIGTERM and "after step 11" in str(stop.value)
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []
    fit(network(), batches, squared_error, config(), tmp_path, on_progress=lambda done, total, **_: seen.append(done))
    assert seen[0] == 12


def test_the_loop_runs_outside_the_main_thread_where_signals_cannot_be_caught(tmp_path):
    thread = threading.Thread(target=fit, args=(network(), batches, squared_error, config(steps=3), tmp_path))
    thread.start()
    thread.join()
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_a_budget_in_minutes_becomes_a_number_of_steps_that_a_resume_keeps(tmp_path):
    budget = config(steps=0, minutes=0.01)
    result = fit(network(), batches, squared_error, budget, tmp_path)
    chosen = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert result.steps == chosen > 10
    (tmp_path / "checkpoint.safetensors").unlink()
    assert fit(network(), batches, squared_error, budget, tmp_path).steps == chosen


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    c = config(steps=1000, lr=1.0, warmup=0.1, min_lr=0.05)
    rates = [learning_rate(step, c) for step in range(1000)]
    assert max(rates) == pytest.approx(1.0, abs=0.02) and rates.index(max(rates)) in range(99, 103)
    assert rates[0] == pytest.approx(0.01, rel=0.02) and rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert rates[550] == pytest.approx((1 + 0.05) / 2, abs=1e-3)  # half way down the cosine


def test_only_matrices_and_kernels_decay():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.LayerNorm(4), "table": nn.Embedding(9, 4)})
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model["conv"].weight)]
    assert len(plain["params"]) == 4


def test_averaged_weights_are_the_exponential_mean_of_the_weights(tmp_path):
    seen = []
    model = nn.Linear(4, 1)
    seen.append(model.weight.detach().clone())
    result = fit(
        model, batches, squared_error, config(steps=12, ema=0.5), tmp_path,
        on_progress=lambda *_, **__: seen.append(model.weight.detach().clone()),
    )  # fmt: skip
    mean = seen[0]
    for step, weight in enumerate(seen[1:], 1):
        decay = min(0.5, step / (step + 9))
        mean = decay * mean + (1 - decay) * weight
    assert result.averaged["weight"].allclose(mean, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"minutes": 2.0},
        {"seed": -1},
        {"log_every": 0},
        {"beta1": 1.0},
        {"lr": -1.0},
        {"batch_size": 0},
        {"accumulate": 3},
        {"precision": "f"},
    ],
)
def test_settings_that_cannot_train_are_refused(bad):
    with pytest.raises(UserError):
        config(**bad)


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match="damaged"):
        fit(network(), batches, squared_error, config(), tmp_path)
