import pytest
import torch
from torch import nn

from clip_train.ema import Average


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
