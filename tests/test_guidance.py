import pytest
import torch
import torch.nn.functional as F

from diffusion.guidance import (
    autoguided,
    between,
    blurred,
    clamped,
    classifier_free,
    clip_guided,
    conditioned,
    rescaled,
    salient,
    self_attention,
    two_conditions,
)
from diffusion.layers import Attention


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
FULL = {"label": torch.tensor([7.0, 7.0])}


def guided(guidance, sigma=SIGMA, **options):
    denoiser = Counting()
    out = classifier_free(denoiser, COND, NULL, guidance, **options)(X, sigma)
    return out[:, 0].tolist(), denoiser.calls


def two(image_scale, text_scale):
    denoiser = Counting()
    return two_conditions(denoiser, FULL, COND, NULL, image_scale, text_scale)(X, SIGMA)[:, 0].tolist(), denoiser.calls


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


def test_outside_its_interval_even_guidance_zero_is_one():
    assert guided(0.0, interval=(5.0, 9.0)) == ([3, 5], [2])


def test_what_is_always_inside_its_interval_is_left_as_it_is():
    assert between(clamped, guided, (0.0, float("inf"))) is clamped


def test_a_network_prepares_its_conditions_once_for_all_steps():
    class Network:
        prepared_for = []

        def prepared(self, cond):
            self.prepared_for.append(len(cond["label"]))
            return cond

    denoiser = Counting()
    denoiser.network = Network()
    denoise = classifier_free(denoiser, COND, NULL, 2.0)
    for _ in range(3):
        denoise(X, SIGMA)
    assert Network.prepared_for == [4] and denoiser.calls == [4, 4, 4]


def test_rescaling_brings_back_the_contrast_that_guidance_adds():
    rng = torch.Generator().manual_seed(0)
    plain, wild = torch.randn(2, 3, 4, 4, generator=rng), 5 * torch.randn(2, 3, 4, 4, generator=rng) + 1
    full, half = rescaled(wild, plain, 1.0), rescaled(wild, plain, 0.5)
    assert torch.allclose(full.flatten(1).std(1), plain.flatten(1).std(1))
    assert torch.allclose(half, (full + wild) / 2)  # phi * rescaled + (1 - phi) * guided
    assert rescaled(wild, plain, 0.0) is wild


def test_guidance_rescales_by_the_conditioned_guess():
    def denoiser(x, sigma, cond):
        return x * cond["label"][:, None]

    x = torch.tensor([[1.0, -1.0, 3.0]]).expand(2, -1)
    out = classifier_free(denoiser, COND, NULL, 3.0, rescale=1.0)(x, SIGMA)
    assert torch.allclose(out, denoiser(x, SIGMA, COND))  # here guidance adds contrast and nothing else
    assert not torch.allclose(out, classifier_free(denoiser, COND, NULL, 3.0)(x, SIGMA))


def test_two_conditions_have_a_scale_each_in_one_call_of_three_times_the_batch():
    assert two(2.0, 3.0) == ([17, 15], [6])  # 1 + 2 (3 - 1) + 3 (7 - 3), 1 + 2 (5 - 1) + 3 (7 - 5)


def test_two_equal_scales_are_classifier_free_guidance():
    assert two(2.0, 2.0) == ([13, 13], [4])  # 1 + 2 (7 - 1)
    assert two(1.0, 1.0) == ([7, 7], [2])
    assert two(0.0, 0.0) == ([1, 1], [2])


def test_a_term_that_falls_away_is_not_computed():
    assert two(2.0, 0.0) == ([5, 9], [4])  # 1 + 2 (3 - 1), 1 + 2 (5 - 1)
    assert two(1.0, 0.0) == ([3, 5], [2])
    assert two(1.0, 2.0) == ([11, 9], [4])  # 3 + 2 (7 - 3), 5 + 2 (7 - 5)
    assert two(0.0, 2.0) == ([9, 5], [6])  # 1 + 2 (7 - 3), 1 + 2 (7 - 5)


def test_autoguidance_overshoots_away_from_the_weaker_model():
    strong, weak = Counting(), Counting()
    out = autoguided(conditioned(strong, COND), conditioned(weak, NULL), 3.0)(X, SIGMA)
    assert out[:, 0].tolist() == [7, 13] and strong.calls == weak.calls == [2]  # 1 + 3 (3 - 1), 1 + 3 (5 - 1)


def test_autoguidance_one_is_off_and_zero_is_the_weaker_model():
    strong, weak = conditioned(Counting(), COND), conditioned(Counting(), NULL)
    assert autoguided(strong, weak, 1.0) is strong and autoguided(strong, weak, 0.0) is weak


class Watched:
    """A denoise that halves x, and whose one layer, of 4 cells, looks at the first alone."""

    def __init__(self):
        self.layer, self.seen = Attention(4, 1), []

    def __call__(self, x, sigma):
        self.seen.append(x)
        if self.layer.watch is not None:
            shares = torch.zeros(len(x), 4, 6)  # two context tokens, then the cells
            shares[:, :, :2], shares[:, :, 2] = 0.3, 0.4
            self.layer.watch.append(shares)
        return x / 2


def test_self_attention_guidance_takes_off_what_is_blurred_where_the_network_looks():
    plain, rng = Watched(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=rng)
    out = self_attention(plain, plain, [plain.layer], 0.5, blur=1.0)(x, SIGMA)
    degraded = x / 2
    degraded[:, :, :4, :4] = blurred(x / 2, 1.0)[:, :, :4, :4]
    assert len(plain.seen) == 2 and torch.allclose(plain.seen[1], x + degraded - x / 2)
    # in noise: eps + 0.5 (eps - eps of degraded), sigma = 1
    eps, eps_degraded = x - x / 2, plain.seen[1] - plain.seen[1] / 2
    assert torch.allclose(x - out, eps + 0.5 * (eps - eps_degraded), atol=1e-6)
    assert plain.layer.watch is None


def test_self_attention_guidance_adds_to_another_guidance_and_may_be_off():
    plain, rng = Watched(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=rng)
    alone = self_attention(plain, plain, [plain.layer], 0.5)(x, SIGMA)
    over = self_attention(lambda x, sigma: x * 7, plain, [plain.layer], 0.5)(x, SIGMA)
    assert torch.allclose(over - x * 7, alone - x / 2, atol=1e-5)
    assert self_attention(plain, plain, [], 0.0) is plain
    with pytest.raises(ValueError, match="attention"):
        self_attention(plain, plain, [], 0.5)


def test_the_attention_of_a_real_layer_is_watched_and_let_go_even_after_an_error():
    layer = Attention(4, 2, 3)
    cells, context = torch.randn(2, 4, 4), torch.randn(2, 5, 3)

    def plain(x, sigma):
        layer(cells, context)
        return x

    def fails(x, sigma):
        raise RuntimeError("out of memory")

    x = torch.randn(2, 3, 8, 8)
    assert self_attention(plain, plain, [layer], 0.5)(x, SIGMA).shape == x.shape
    with pytest.raises(RuntimeError):
        self_attention(fails, fails, [layer], 0.5)(x, SIGMA)
    assert layer.watch is None


def test_salient_is_what_is_looked_at_more_than_on_average():
    shares = torch.full((1, 4, 5), 0.1)
    shares[:, :, 3] = 0.6  # the third cell, after one context token
    mask = salient(shares, (4, 4))
    assert mask.shape == (1, 1, 4, 4) and mask[0, 0, 2:, :2].all() and mask.sum() == 4


def test_blur_is_a_gaussian_that_keeps_flat_pictures_flat():
    dot = torch.zeros(1, 2, 21, 21)
    dot[:, 0, 10, 10] = 1.0
    out = blurred(dot, 1.5)
    at = torch.arange(21.0) - 10
    assert out.sum() == pytest.approx(1, abs=1e-5) and not out[:, 1].any()
    assert (out[0, 0].sum(0) * at**2).sum() == pytest.approx(1.5**2, rel=0.03)
    assert torch.allclose(blurred(torch.full((1, 3, 8, 8), 0.3), 2.0), torch.tensor(0.3))


def look(pixels):
    return F.normalize(pixels.flatten(1), dim=-1)


@torch.no_grad()
def test_clip_guidance_goes_up_the_slope_of_the_cosine_by_a_set_step():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=rng) * torch.tensor([1.0, 9.0])[:, None, None, None]
    target, sigma = look(torch.randn(2, 48, generator=rng)), torch.tensor([1.0, 0.1])
    moved = clip_guided(lambda x, sigma: x, look, target, 0.2)(x, sigma) - x
    sizes = moved.square().flatten(1).mean(1).sqrt()
    assert torch.allclose(sizes, 0.2 * sigma / (1 + sigma**2).sqrt(), rtol=1e-4)
    unit = look(x)
    slope = target - (unit * target).sum(1, keepdim=True) * unit  # of the cosine with respect to x, but for its size
    assert torch.allclose(look(moved), look(slope), atol=1e-4)
    assert torch.allclose(clip_guided(lambda x, sigma: x, look, target[1:], 0.2)(x[1:], sigma[1:]) - x[1:], moved[1:])


def test_clip_guidance_zero_is_off_and_no_slope_is_no_step():
    denoise = clamped(lambda x, sigma: x)
    assert clip_guided(denoise, look, X, 0.0) is denoise
    x = torch.ones(1, 3)
    still = clip_guided(lambda x, sigma: x, lambda x: 0 * x, torch.ones(1, 3), 0.5)(x, SIGMA[:1])
    assert torch.equal(still, x)


def test_clamping_cuts_what_lies_outside_and_leaves_the_rest():
    x = torch.tensor([[0.5, -3.0, 2.0]])
    assert clamped(lambda x, sigma: x)(x, SIGMA[:1]).tolist() == [[0.5, -1.0, 1.0]]


def test_dynamic_clamping_scales_only_the_sample_that_overshoots():
    x = torch.tensor([[0.5, -0.2, 0.1], [1.0, -2.0, 4.0]])
    out = clamped(lambda x, sigma: x, quantile=1.0)(x, SIGMA)
    assert torch.allclose(out, torch.tensor([[0.5, -0.2, 0.1], [0.25, -0.5, 1.0]]))
