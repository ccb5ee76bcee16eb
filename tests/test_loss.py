import math

import pytest
import torch
import torch.nn.functional as F

from clip_train.loss import (
    contrastive_loss,
    distillation_loss,
    right_share,
    same_caption,
    sigmoid_chance,
    sigmoid_loss,
)


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_contrastive_loss_of_identical_embeddings_is_chance():
    one = rows(1, 8).expand(10, 8)
    assert contrastive_loss(one, one, torch.tensor(5.0)).item() == pytest.approx(math.log(10))


def test_contrastive_loss_of_two_orthogonal_pairs_is_log_of_one_plus_e_to_minus_scale():
    pairs = torch.eye(2)
    assert contrastive_loss(pairs, pairs, torch.tensor(3.0)).item() == pytest.approx(math.log(1 + math.exp(-3)))


def test_smoothing_spreads_a_share_of_the_target_over_the_batch():
    pairs, right, wrong = torch.eye(2), math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    expected = 0.8 * right + 0.2 * (right + wrong) / 2
    for same in (None, same_caption(torch.arange(2))):
        found = contrastive_loss(pairs, pairs, torch.tensor(3.0), same, smoothing=0.2)
        assert found.item() == pytest.approx(expected)


def test_contrastive_loss_is_open_clips_when_all_captions_differ():
    from open_clip.loss import ClipLoss

    image, text = rows(16, 32, seed=1), rows(16, 32, seed=2)
    scale = torch.tensor(14.0, dtype=torch.float64)
    same = same_caption(torch.arange(16))
    assert contrastive_loss(image, text, scale, same).item() == pytest.approx(ClipLoss()(image, text, scale).item())
    assert contrastive_loss(image, text, scale).item() == pytest.approx(ClipLoss()(image, text, scale).item())


def test_equal_captions_share_the_target_and_the_loss_reaches_its_floor_of_log_two():
    # two captions, each with two pictures: the best one can do is 50:50 between the two right answers
    image = torch.eye(2).repeat_interleave(2, 0)
    same = same_caption(torch.tensor([0, 0, 1, 1]))
    assert contrastive_loss(image, image, torch.tensor(100.0), same).item() == pytest.approx(math.log(2))
    # without groups the same embeddings would be punished, and their gradient would push equal captions apart
    image.requires_grad_()
    contrastive_loss(image, image.detach(), torch.tensor(10.0), same).backward()
    assert image.grad[0].allclose(image.grad[1])


def test_pairs_are_the_same_when_any_of_their_ids_agree():
    same = same_caption(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 6]))
    assert same.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def naive_sigmoid(image, text, scale, bias, same):
    z = 2 * same.double() - 1
    return -F.logsigmoid(z * (scale * image @ text.T + bias)).sum() / len(image)


def test_sigmoid_loss_is_open_clips_when_all_captions_differ():
    from open_clip.loss import SigLipLoss

    image, text = rows(16, 32, seed=1), rows(16, 32, seed=2)
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-9.0, dtype=torch.float64)
    expected = SigLipLoss()(image, text, scale, bias).item()
    assert sigmoid_loss(image, text, scale, bias).item() == pytest.approx(expected)
    assert sigmoid_loss(image, text, scale, bias, [torch.arange(16)], chunk=5).item() == pytest.approx(expected)


def test_sigmoid_loss_and_its_gradients_do_not_depend_on_the_chunk_and_are_those_of_the_plain_formula():
    ids = [torch.tensor([0, 1, 2, 0, 4, 5, 1]), torch.tensor([0, 1, 2, 3, 3, 5, 6])]
    made = []
    for chunk in (None, 1, 3, 100):
        inputs = [rows(7, 5, seed=3), rows(7, 5, seed=4), torch.tensor(6.0).double(), torch.tensor(-2.0).double()]
        for tensor in inputs:
            tensor.requires_grad_()
        loss = sigmoid_loss(*inputs, ids, chunk) if chunk else naive_sigmoid(*inputs, same_caption(*ids))
        (3 * loss).backward()
        made.append([loss.detach(), *(tensor.grad for tensor in inputs)])
    for other in made[1:]:
        assert all(torch.allclose(a, b) for a, b in zip(made[0], other, strict=True))


def test_sigmoid_chance_is_what_the_best_constant_logit_reaches():
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7])
    share = right_share(ids, chunk=3)
    assert share.item() == pytest.approx(10 / 64)
    zero, scale = torch.zeros(8, 3), torch.tensor(1.0)  # rows that say nothing
    constants = torch.linspace(-6, 2, 801)
    best = min(sigmoid_loss(zero, zero, scale, c, [ids]).item() for c in constants)
    assert sigmoid_chance(share, 8).item() == pytest.approx(best, abs=1e-4)
    assert sigmoid_chance(1 / 4096, 4096).item() == pytest.approx(math.log(4096) + 1, abs=1e-3)


def test_distillation_is_zero_for_equal_probabilities_and_else_open_clips_less_the_teachers_entropy():
    from open_clip.loss import DistillClipLoss

    image, text, far, away = (rows(9, 6, seed=s) for s in range(4))
    scale, teacher_scale = torch.tensor(5.0), torch.tensor(8.0)
    assert distillation_loss(far, away, teacher_scale, far, away, teacher_scale).item() == pytest.approx(0, abs=1e-9)
    made = distillation_loss(image, text, scale, far, away, teacher_scale).item()
    _, crossed = DistillClipLoss()(image, text, scale, far, away, teacher_scale)
    logits = teacher_scale * far @ away.T
    entropy = sum(torch.distributions.Categorical(logits=z).entropy().mean() for z in (logits, logits.T)) / 2
    assert made == pytest.approx((crossed - entropy).item(), rel=1e-6) and made > 0
