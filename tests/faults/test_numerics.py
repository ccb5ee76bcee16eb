"""A fixed share of the numbers that benchmarks/faults.py holds against their bands, and that the bench sees wrong ones.

Two ranks against one: tests/test_ranks.py and tests/test_parallel.py.
"""

import random

import added_deleted
import doors
import lost_ranks
import numerics
import numpy as np
import pytest
import torch
import trainings
from bands import Bands
from double import doubled, in_double
from trainings import TRAININGS

SHARE = (1, 7, 13, 18, 24, 29, 32, 37, 41, 43, 48, 50, 51, 54, 57)  # of every kind but two ranks
INFONCE = 14  # a seed: of the losses of rows, that one


def test_numbers_lie_within_their_bands(tmp_path):
    assert {numerics.ORDER[n] for n in SHARE} == numerics.ROUND.keys() - {"two ranks against one"}
    tally = numerics.run(SHARE, 0, tmp_path, lambda *_, **__: None)
    assert tally.losses == []
    assert "| prior | " in tally.notes[0] and "| embeddings of captions, by batch size | " in tally.notes[1]


def test_every_number_that_is_measured_has_a_band():
    for name in TRAININGS:
        for n in range(3):
            special = TRAININGS[name](random.Random(n)).special
            assert f"{name}{special}" in numerics.BANDS


@pytest.mark.parametrize("name", ["contrastive losses of rows", "prior", "decoder"])
def test_the_truth_is_in_float64_throughout_and_its_gradient_is_the_slope_of_its_loss(name):
    torch.manual_seed(1)
    training = TRAININGS[name](random.Random(INFONCE))
    loss, gradients = training.truth()
    assert loss.dtype == gradients.dtype == torch.float64
    with in_double():
        model = doubled(training.model)
    every = [p for p in model.parameters() if p.requires_grad]
    trained = torch.cat([p.detach().flatten() for p in every])
    ways = torch.randn(len(trained), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = []
    for step in (1e-5, -1e-5):
        moved = trained + step * ways
        for p, part in zip(every, moved.split([p.numel() for p in every]), strict=True):
            p.data = part.view_as(p).clone()
        training.model = model
        values.append(training.truth()[0])
    slope = float(values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(gradients @ ways), rel=1e-5)


def test_a_loss_of_rows_that_were_rounded_to_bf16_is_outside_its_bands(monkeypatch):
    name, plain = "contrastive losses of rows", trainings.contrastive_loss

    def rounded(image, *rest):
        return plain(image if image.dtype == torch.float64 else image.bfloat16().float(), *rest)

    for loss, how in ((plain, "done"), (rounded, "wrong")):
        monkeypatch.setattr(trainings, "contrastive_loss", loss)
        torch.manual_seed(0)
        training = trainings.row_training(random.Random(INFONCE))
        assert training.what.startswith("infonce"), training.what
        assert Bands(numerics.LIMITS).judge(training.errors(name)).how == how


def test_a_number_that_is_none_is_outside_every_band():
    bands = Bands({"a": 1.0, "b": 1.0})
    assert bands.judge({"a": 0.5, "b": 1.0}).how == "done"
    assert "a: nan" in bands.judge({"a": float("nan")}).line
    assert bands.seen["a"].worst == float("inf") and bands.seen["b"].worst == 1.0


def test_a_door_that_forgets_to_turn_a_picture_is_noticed(tmp_path, monkeypatch):
    from clip_train import pictures

    monkeypatch.setattr(doors, "KINDS", {"turned JPEG": doors.KINDS["turned JPEG"]})
    monkeypatch.setattr(doors, "COUNT", 3)
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    assert Bands(numerics.LIMITS).judge(doors.errors(random.Random(1), tmp_path / "right")[0]).how == "done"
    monkeypatch.setattr(pictures, "_upright", lambda picture: picture)
    found, _ = doors.errors(random.Random(1), tmp_path / "wrong")
    assert found["one picture, every door: vectors"] > 0.01


def test_other_rows_and_other_scores_are_noticed():
    scores = np.array([0.9, 0.5, 0.1], dtype=np.float32)
    one = [[(["a", "b", "c"], scores)]]
    assert added_deleted.difference(one, one) == 0
    assert added_deleted.difference(one, [[(["a", "c", "b"], scores)]]) == 9
    assert added_deleted.difference(one, [[(["a", "b"], scores[:2])]]) == 9
    assert added_deleted.difference(one, [[(["a", "b", "c"], scores + 1e-3)]]) == pytest.approx(1e-3, rel=1e-3)
    equal = np.array([0.9, 0.5, 0.5], dtype=np.float32)
    assert added_deleted.difference([[(["a", "b", "c"], equal)]], [[(["a", "c", "b"], equal)]]) == 0


def test_the_same_number_is_the_same_case():
    for n in range(8):
        assert str(lost_ranks.case(2, n)) == str(lost_ranks.case(2, n))
    assert len({str(lost_ranks.case(2, n)) for n in range(24)}) == 24
