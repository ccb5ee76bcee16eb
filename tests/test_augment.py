import torch

from clip_train.augment import augment


def test_no_strength_changes_nothing():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(augment(pixels, 0.0, torch.Generator()), pixels.float())


def test_white_stays_white_at_the_border_and_values_stay_in_range():
    pixels = torch.full((8, 3, 16, 16), 255, dtype=torch.uint8)
    pixels[:, :, 6:10, 6:10] = 0
    moved = augment(pixels, 1.0, torch.Generator().manual_seed(0))
    assert moved.min() >= 0 and moved.max() <= 255
    assert (moved[:, :, 0, 0] > 200).all()  # outside comes in as white, up to contrast and brightness
    assert moved[:, :, 8, 8].max() < 60


def test_each_picture_moves_by_its_own_draw_and_the_same_generator_repeats_it():
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(2, -1, -1, -1)
    once, twice = (augment(pixels, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, twice)
    assert not torch.equal(once[0], once[1])
