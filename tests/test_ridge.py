import pytest
import torch
import torch.nn.functional as F

from diffusion.ridge import LinearGuess, ridge_regression

D = 8


def unit(rows, seed):
    return F.normalize(torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_ridge_regression_equals_least_squares_where_there_is_no_noise():
    text = unit(500, 0)
    matrix, offset = torch.randn(D, D, generator=torch.Generator().manual_seed(1)), unit(1, 2)[0]
    image = text @ matrix + offset
    linear = ridge_regression([(text[:200], image[:200]), (text[200:], image[200:])])
    assert torch.allclose(linear(text), image, atol=1e-2)
    assert linear.spread < 0.05


def test_ridge_regression_is_the_textbook_formula_at_its_penalty():
    text, image = unit(60, 0), unit(60, 1)
    linear = ridge_regression([(text, image)])
    x, y = (text - text.mean(0)).double(), (image - image.mean(0)).double()
    size = x.square().sum() / D  # mean eigenvalue of x^T x
    expected = torch.linalg.solve(x.T @ x + linear.penalty * size * torch.eye(D).double(), x.T @ y)
    assert torch.allclose(linear.weight.double(), expected, atol=1e-5)


def test_ridge_regression_of_unrelated_rows_falls_back_to_the_mean():
    linear = ridge_regression([(unit(40, 0), unit(40, 1))])
    assert (linear(unit(40, 3)) - linear.output_mean).norm(dim=1).mean() < 0.1
    assert linear.spread * D**0.5 == pytest.approx(1, abs=0.1)  # all of the unit rows is left over


def test_inputs_and_outputs_may_differ_in_width_and_the_spread_is_that_of_the_noise():
    rows = unit(4000, 0)
    noise = 0.3 * torch.randn(4000, 20, generator=torch.Generator().manual_seed(1))
    matrix = torch.randn(D, 20, generator=torch.Generator().manual_seed(2))
    linear = ridge_regression([(rows, rows @ matrix + 5 + noise)])
    assert linear.weight.shape == (D, 20)
    assert linear.spread == pytest.approx(0.3, rel=0.02)
    assert torch.allclose(linear(rows), rows @ matrix + 5, atol=0.2)


def test_a_dropped_row_is_guessed_as_the_mean():
    linear = ridge_regression([(unit(100, 0), unit(100, 0) @ torch.ones(D, 3))])
    guess = LinearGuess(D, 3)
    guess.take(linear)
    rows = unit(2, 7)
    made = guess(rows, torch.tensor([False, True]))
    assert torch.allclose(made[0], linear(rows)[0]) and torch.equal(made[1], linear.output_mean)
