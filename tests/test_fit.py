import json
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from clip_train import precision
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


def test_each_parameter_moves_at_its_own_share_of_the_learning_rate(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(4, 1) for name in ("all", "part", "none")})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(model, batch, rng):
        return sum(layer(batch["x"]).sum() for layer in model.values()), {}

    scales = {"part.weight": 0.5, "part.bias": 0.5, "none.weight": 0.0, "none.bias": 0.0}
    once = config(steps=1, warmup=0.0, lr=0.1, weight_decay=0.0)
    fit(model, batches, loss, once, tmp_path, lr_scales=scales)
    # Adam's first step is the learning rate, whatever the gradient
    for name, p in model.named_parameters():
        share = {"all": 1.0, "part": 0.5, "none": 0.0}[name.partition(".")[0]]
        assert torch.allclose((p - start[name]).abs(), torch.tensor(0.1 * share), atol=1e-6), name


def test_every_logged_line_is_handed_on_as_it_is_written(tmp_path):
    heard = []
    fit(network(), batches, squared_error, config(steps=25), tmp_path, on_log=heard.append)
    assert heard == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in heard] == [10, 20, 25] and heard[0]["size"] == 32


def test_validation_sees_averaged_weights_in_eval_mode_and_training_goes_on_as_if_it_had_not_been(tmp_path):
    whole, checked = network(), network()
    whole[1].eval(), checked[1].eval()  # a frozen layer, as CLIP's locked towers have them
    (tmp_path / "whole").mkdir(), (tmp_path / "checked").mkdir()
    unbroken = fit(whole, batches, squared_error, config(), tmp_path / "whole")
    seen = {}

    def validate(model, step):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        seen[step] = {name: t.clone() for name, t in model.state_dict().items()}
        torch.rand(100)
        return {"error": step / 7}

    after = fit(checked, batches, squared_error, config(validate_every=25), tmp_path / "checked", validate=validate)
    assert list(seen) == [25, 50, 60] and checked[0].training
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, checked.state_dict()[name]), name
        assert torch.equal(after.averaged[name], unbroken.averaged[name]), name
        assert torch.equal(seen[60][name], after.averaged[name]), name
    lines = [json.loads(line) for line in (tmp_path / "checked" / "metrics.jsonl").read_text().splitlines()]
    assert [e for e in lines if "val_error" in e][0] == {"step": 25, "val_error": 3.57143}
    rest = "".join(json.dumps(e) + "\n" for e in lines if "loss" in e)
    assert rest == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_layer_that_is_frozen_keeps_its_mode_through_validation(tmp_path):
    model = network()

    def frozen(mode=True):
        nn.Sequential.train(model, mode)
        model[1].training = False
        return model

    model.train = frozen
    modes = []

    def loss(model, batch, rng):
        modes.append([module.training for module in model])
        return squared_error(model, batch, rng)

    fit(model, batches, loss, config(steps=4, validate_every=2), tmp_path, validate=lambda model, step: {})
    assert modes == [[True, False, True, True, True]] * 4


def test_validation_that_was_logged_before_a_kill_is_not_lost(tmp_path):
    def die(done, total, **_):
        if done == 37:
            raise Killed

    def check(model, step):
        return {"step": step}

    settings = config(save_every=0.0, validate_every=5)
    with pytest.raises(Killed):
        fit(network(), batches, squared_error, settings, tmp_path, on_progress=die, validate=check)
    fit(network(), batches, squared_error, settings, tmp_path, validate=check)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["val_step"] for entry in lines if "val_step" in entry] == list(range(5, 61, 5))


def test_fp16_leaves_out_steps_that_overflow_and_gives_up_when_all_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        fit(network(), batches, squared_error, config(precision="fp16"), tmp_path)
    monkeypatch.setattr(precision, "FP16_DEVICES", ("cpu",))
    weights = []

    def overflows(model, batch, rng):
        weights.append(model[0].weight.detach().clone())
        loss, numbers = squared_error(model, batch, rng)
        return loss * (math.inf if len(weights) in (3, 4) else 1e-3), numbers

    factors = []
    real = precision.LossScale.update
    monkeypatch.setattr(precision.LossScale, "update", lambda s, ok: (real(s, ok), factors.append(s.factor))[0])
    fit(network(), batches, overflows, config(precision="fp16", steps=6), tmp_path)
    moved = [not torch.equal(a, b) for a, b in zip(weights[:-1], weights[1:], strict=True)]
    assert moved == [True, True, False, False, True]
    assert factors == [2.0**16] * 2 + [2.0**15] + [2.0**14] * 3
    (tmp_path / "never").mkdir()
    with pytest.raises(UserError, match="broke at step 16"):
        fit(
            network(),
            batches,
            lambda *a: (squared_error(*a)[0] * math.inf, {}),
            config(precision="fp16"),
            tmp_path / "never",
        )


def test_fp16_and_fp32_learn_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "FP16_DEVICES", ("cpu",))
    losses = []

    def small(model, batch, rng):  # so that the first steps do not overflow
        return squared_error(model, batch, rng)[0] * 1e-3, {}

    for name in ("fp32", "fp16"):
        (tmp_path / name).mkdir()
        losses.append(fit(network(), batches, small, config(precision=name), tmp_path / name).loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_factor_of_fp16_doubles_after_two_thousand_good_steps_and_survives_a_resume():
    scale = precision.LossScale(True)
    for _ in range(1999):
        scale.update(True)
    resumed = precision.LossScale(True)
    resumed.load(json.loads(json.dumps(scale.numbers())))
    assert resumed.factor == 2.0**16
    resumed.update(True)
    assert resumed.factor == 2.0**17


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
        {"parallel": "both"},
        {"validate_every": -1},
    ],
)
def test_settings_that_cannot_train_are_refused(bad):
    with pytest.raises(UserError):
        config(**bad)


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match="damaged"):
        fit(network(), batches, squared_error, config(), tmp_path)
