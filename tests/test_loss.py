import math

import pytest
import torch
import torch.nn.functional as F

from clip_train.loss import contrastive_loss, same_caption


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_contrastive_loss_of_identical_embeddings_is_chance():
    one = rows(1, 8).expand(10, 8)
    assert contrastive_loss(one, one, torch.tensor(5.0)).item() == pytest.approx(math.log(10))


def test_contrastive_loss_of_two_orthogonal_pairs_is_log_of_one_plus_e_to_minus_scale():
    pairs = torch.eye(2)
    assert contrastive_loss(pairs, pairs, torch.tensor(3.0)).item() == pytest.approx(math.log(1 + math.exp(-3)))


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
