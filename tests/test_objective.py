import math

import crew
import pytest
import tiny
import torch
import torch.nn.functional as F

from clip_train.fit import FitConfig, fit
from clip_train.gradients import make_gradients
from clip_train.loss import contrastive_loss, same_caption, sigmoid_loss
from clip_train.model import Clip
from clip_train.objective import ClipObjective, as_long_as
from clip_train.parallel import Team
from clip_train.settings import UserError


def student(tmp_path, seed=0, dim=32):
    return Clip.load(tiny.clip(tmp_path / f"clip{seed}-{dim}", dim, seed)).requires_grad_(True)


def batch(size=8, side=16, context=16):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.zeros(size, context, dtype=torch.int64)
    tokens[:, :4] = torch.randint(1, 40_000, (size, 4), generator=rng)
    tokens[:, 0], tokens[:, 4] = 49406, 49407
    return {
        "pixels": torch.randint(0, 256, (size, 3, side, side), generator=rng, dtype=torch.uint8),
        "tokens": tokens,
        "caption": torch.arange(size),
        "group": torch.tensor([0, 1, 2, 3, 0, 5, 6, 7][:size]),
    }


def loss_of(objective, model, given, seed=0):
    return objective.loss(objective.rows(model, given, torch.Generator().manual_seed(seed)), given)


def test_infonce_takes_the_rows_groups_and_temperature_that_the_model_and_the_batch_give(tmp_path):
    clip, given = student(tmp_path), batch()
    objective = ClipObjective(loss="infonce", augment=0.0)
    loss, numbers = loss_of(objective, clip, given)
    image, text, scale = clip(given["pixels"], given["tokens"])
    same = same_caption(given["group"])
    assert torch.equal(loss, contrastive_loss(image, text, scale, same)) and same.sum() == 10
    assert numbers["chance"] == pytest.approx(math.log(8)) and float(numbers["scale"]) == pytest.approx(1 / 0.07)
    assert all(
        torch.equal(a, b) and not a.requires_grad for a, b in zip(objective.last_rows, (image, text), strict=True)
    )


def test_siglip_uses_the_bias_and_needs_one(tmp_path):
    torch.manual_seed(0)
    given, towers = crew.batches(12)(0), crew.Towers(bias=True)
    given = next(given)
    loss, numbers = loss_of(ClipObjective(loss="siglip", augment=0.0), towers, given)
    image, text, scale, bias = towers(given["pixels"], given["tokens"])
    assert torch.equal(loss, sigmoid_loss(image, text, scale, bias, (given["group"], given["caption"])))
    assert numbers["bias"] == bias
    right = same_caption(given["group"], given["caption"]).float().mean()
    constant = torch.logit(right)  # the best single logit for all pairs
    z = 2 * same_caption(given["group"], given["caption"]).float() - 1
    assert float(numbers["chance"]) == pytest.approx(-float(F.logsigmoid(z * constant).sum() / 12), rel=1e-5)
    with pytest.raises(UserError, match="logit_bias"):
        loss_of(ClipObjective(loss="siglip", augment=0.0), student(tmp_path), batch())


def test_a_bias_that_infonce_has_no_use_for_gets_a_zero_gradient_so_that_ranks_do_not_wait_for_it():
    towers = crew.Towers(bias=True)
    loss_of(ClipObjective(loss="infonce", augment=0.0), towers, next(crew.batches(8)(0)))[0].backward()
    assert towers.logit_bias.grad == 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(tmp_path):
    clip, given = student(tmp_path), batch()
    teacher = Clip.load(tmp_path / "clip0-32")
    loss, numbers = loss_of(ClipObjective(loss="infonce", augment=0.5, teacher=teacher, distill=1.0), clip, given)
    assert float(numbers["distill"]) == pytest.approx(0, abs=1e-5) and loss.item() == pytest.approx(0, abs=1e-5)


def test_the_loss_is_mixed_of_truth_and_teacher_as_distill_says(tmp_path):
    clip, given = student(tmp_path), batch()
    teacher = Clip.load(tiny.clip(tmp_path / "teacher", 16, 1))  # another width
    plain, _ = loss_of(ClipObjective(loss="infonce", augment=0.0), clip, given)
    mixed, numbers = loss_of(
        ClipObjective(loss="infonce", augment=0.0, teacher=teacher, distill=0.3), clip, dict(given)
    )
    assert float(numbers["distill"]) > 0.01
    assert mixed.item() == pytest.approx(0.7 * plain.item() + 0.3 * float(numbers["distill"]), rel=1e-5)


def test_distillation_brings_the_student_near_its_teacher(tmp_path):
    clip, given = student(tmp_path), batch()
    teacher = Clip.load(tiny.clip(tmp_path / "teacher", 16, 1))
    objective = ClipObjective(loss="infonce", augment=0.0, teacher=teacher, distill=1.0)

    def same_batch(step):
        while True:
            yield given

    before = loss_of(objective, clip, dict(given))[0].item()
    fit(clip, same_batch, objective, FitConfig(steps=30, batch_size=8, lr=3e-3, precision="fp32"), tmp_path)
    assert loss_of(objective, clip.eval(), dict(given))[0].item() < 0.2 * before
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_sees_the_moved_pictures_at_its_own_size_and_runs_once_for_both_passes(tmp_path):
    clip, given = student(tmp_path), batch(side=20)
    clip.preprocess_cfg["size"] = [20, 20]
    teacher, seen = Clip.load(tiny.clip(tmp_path / "teacher", 16, 1)), []
    teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective = ClipObjective(loss="infonce", augment=1.0, teacher=teacher, distill=0.5)

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = clip

        def forward(self, pixels, tokens):
            return self.clip(F.interpolate(pixels, 16), tokens)

    team = Team(Small(), "ddp", torch.device("cpu"))
    make_gradients(team, objective, given, accumulate=2, precision="fp32", seed=0, step=0)
    assert [tuple(pixels.shape) for pixels in seen] == [(4, 3, 16, 16)] * 2
    still = F.interpolate(given["pixels"][:4].float(), (16, 16), mode="bicubic", antialias=True).clamp(0, 255)
    assert seen[0].min() >= 0 and seen[0].max() <= 255 and not torch.allclose(seen[0], still)


def test_tokens_are_those_of_the_tokenizer_at_another_length():
    import open_clip

    captions = ["a red fox", "one two three four five six seven eight nine ten eleven twelve", ""]
    short, long = (open_clip.SimpleTokenizer(context_length=n)(captions) for n in (8, 24))
    assert torch.equal(as_long_as(long, 8), short)
    assert torch.equal(as_long_as(short[[0, 2]], 24), long[[0, 2]])


@pytest.mark.parametrize(
    "bad", [{"loss": "hinge"}, {"distill": 0.5}, {"distill": 2.0}], ids=["loss", "no teacher", "share"]
)
def test_objectives_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        ClipObjective(**{"loss": "infonce", "augment": 0.0} | bad)
