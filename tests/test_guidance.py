import pytest
import torch

from diffusion.guidance import clamped, classifier_free


class Counting:
    """A denoiser whose answer is the condition itself, so guidance can be worked by hand."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, cond):
        self.calls.append(len(x))
        assert len(sigma) == len(x) == len(cond["label"])
        return x * 0 + cond["label"][:, None]


X, SIGMA = torch.zeros(2, 3), torch.full((2,), 1.0)
COND, NULL = {"label": torch.tensor([3.0, 5.0])}, {"label": torch.tensor([1.0, 1.0])}


def guided(guidance, sigma=SIGMA, **options):
    denoiser = Counting()
    out = classifier_free(denoiser, COND, NULL, guidance, **options)(X, sigma)
    return out[:, 0].tolist(), denoiser.calls


def test_guidance_one_follows_the_condition_with_one_network_call():
    assert guided(1.0) == ([3, 5], [2])


def test_guidance_zero_ignores_the_condition_with_one_network_call():
    assert guided(0.0) == ([1, 1], [2])


def test_guidance_overshoots_along_the_difference_in_one_call_of_twice_the_batch():
    assert guided(2.0) == ([5, 9], [4])  # 1 + 2 (3 - 1), 1 + 2 (5 - 1)
    assert guided(0.5) == ([2, 3], [4])


def test_guidance_of_any_size_changes_nothing_where_both_agree():
    denoiser = Counting()
    assert torch.equal(classifier_free(denoiser, COND, COND, 7.0)(X, SIGMA), denoiser(X, SIGMA, COND))


@pytest.mark.parametrize("sigma, expected", [(0.1, [3, 5]), (1.0, [5, 9]), (9.0, [3, 5])])
def test_outside_its_interval_guidance_is_one(sigma, expected):
    out, calls = guided(2.0, torch.full((2,), sigma), interval=(0.5, 2.0))
    assert out == expected and calls == [4 if sigma == 1.0 else 2]


def test_clamping_cuts_what_lies_outside_and_leaves_the_rest():
    x = torch.tensor([[0.5, -3.0, 2.0]])
    assert clamped(lambda x, sigma: x)(x, SIGMA[:1]).tolist() == [[0.5, -1.0, 1.0]]


def test_dynamic_clamping_scales_only_the_sample_that_overshoots():
    x = torch.tensor([[0.5, -0.2, 0.1], [1.0, -2.0, 4.0]])
    out = clamped(lambda x, sigma: x, quantile=1.0)(x, SIGMA)
    assert torch.allclose(out, torch.tensor([[0.5, -0.2, 0.1], [0.25, -0.5, 1.0]]))
