"""In one dimension the walk to sigma 0 keeps every sample's rank: where it ends is known from the two distributions."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from clip_train.fit import FitConfig
from clip_train.model import Clip
from clip_train.settings import Interrupted, UserError
from diffusion.decoder import DecoderConfig, null_cond
from diffusion.distill import (
    DistillConfig,
    denoised_to_land,
    distillation_loss,
    few_sampling,
    few_sigmas,
    walk_on,
)
from diffusion.generate import Generator
from diffusion.samplers import sample_ddim, sample_heun
from diffusion.sampling import Sampling
from diffusion.train_decoder import train_decoder
from diffusion.train_distilled import stage_loss, train_distilled
from diffusion.trained import load_decoder

CENTRES, SHARES, STD = torch.tensor([-1.0, 1.5]), torch.tensor([0.3, 0.7]), 0.3
FIT = FitConfig(steps=6, batch_size=4, ema=0.5, precision="fp32", save_every=0)
DECODER = DecoderConfig(
    image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32, text=True
)


def mixture(x, sigma, cond=None):
    """E[x0 | x] of the mixture of two Gaussians, in one dimension."""
    variance = STD**2 + sigma[:, None] ** 2
    belongs = torch.softmax(SHARES.log() - (x[..., None] - CENTRES) ** 2 / (2 * variance[..., None]), -1)
    return (belongs * (CENTRES + STD**2 / variance[..., None] * (x[..., None] - CENTRES))).sum(-1)


def rank_of(x, sigma):
    """Share of the mixture, noised by sigma, that lies below x."""
    std = (STD**2 + sigma**2) ** 0.5
    return (SHARES * torch.special.ndtr((x[..., None] - CENTRES) / std)).sum(-1)


def endpoint(x, sigma):
    """Where the walk from x at sigma ends: the point of the same rank in the mixture itself."""
    places = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    at = torch.searchsorted(rank_of(places, 0.0), rank_of(x.double(), sigma)).clamp(max=8000)
    return places[at].to(x)


class Small(nn.Module):
    """A network of one number and the level, as a denoiser."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))

    def forward(self, x, sigma, cond=None):
        scaled = x / (1 + sigma[:, None] ** 2).sqrt()
        return self.net(torch.cat([2 * scaled, sigma.log()[:, None] / 2], dim=1))


def taught(steps, teacher, teacher_steps, second_order):
    torch.manual_seed(0)
    student, rng, count = Small(), torch.Generator().manual_seed(0), 300
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / count)
        which = (torch.rand(128, 1, generator=rng) > SHARES[0]).long()
        x0 = CENTRES[which] + STD * torch.randn(128, 1, generator=rng)
        noise, uniform = torch.randn(128, 1, generator=rng), torch.rand(128, generator=rng)
        loss = distillation_loss(
            student, teacher, x0, {}, noise, uniform, torch.ones_like,
            steps=steps, teacher_steps=teacher_steps, second_order=second_order,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.requires_grad_(False)


def error_of(denoise, steps):
    """Mean distance of DDIM in that many steps from the exact end of the walk; the samples' std is 1.2."""
    x = few_sigmas(steps)[0] * torch.randn(2000, 1, generator=torch.Generator().manual_seed(9))
    reached = sample_ddim(denoise, x, few_sigmas(steps))
    return (reached - endpoint(x, float(few_sigmas(steps)[0]))).abs().mean().item()


def test_one_step_of_the_distilled_map_ends_where_the_teachers_walk_does():
    student = taught(1, mixture, 8, second_order=True)  # whose own end is 0.08 off
    assert error_of(student, 1) < 0.15
    assert error_of(mixture, 1) > 0.9  # what the teacher itself does in one step: the mean of all samples


def test_students_that_teach_students_end_there_as_well():
    two = taught(2, mixture, 8, second_order=True)
    one = taught(1, two, 2, second_order=False)
    assert error_of(two, 2) < 0.15 and error_of(one, 1) < 0.15
    assert error_of(mixture, 2) > 0.3


def test_heun_between_levels_ends_at_the_known_points_and_each_sample_walks_its_own_part():
    grid, place = few_sigmas(16).double(), torch.tensor([0, 4, 8, 12])
    x = grid[place][:, None] * torch.tensor([[0.3], [-0.8], [1.2], [0.5]], dtype=torch.float64)
    landed = walk_on(mixture, x, grid, place, 4, second_order=True)
    for i, start in enumerate(place.tolist()):
        before, after = rank_of(x[i], float(grid[start])), rank_of(landed[i], float(grid[start + 4]))
        assert torch.allclose(before, after, atol=0.01)
    whole = walk_on(mixture, x[:1], grid, place[:1], 16, second_order=True)
    assert torch.allclose(whole, sample_heun(mixture, x[:1], grid), atol=1e-6)


@pytest.mark.parametrize("second_order", [True, False])
def test_a_batch_walks_as_its_samples_do_alone(second_order):
    grid, place = few_sigmas(8), torch.tensor([0, 6, 3])
    x = grid[place][:, None]
    together = walk_on(mixture, x, grid, place, 2, second_order)
    alone = [walk_on(mixture, x[i : i + 1], grid, place[i : i + 1], 2, second_order) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_ddim_with_the_target_lands_where_it_should():
    x, landed = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    target = denoised_to_land(x, landed, torch.tensor([20.0, 20.0]), torch.tensor([0.9, 0.0]))
    for i, after in enumerate((0.9, 0.0)):
        there = sample_ddim(lambda x, sigma, i=i: target[i : i + 1], x[i : i + 1], torch.tensor([20.0, after]))
        assert torch.allclose(there, landed[i : i + 1], atol=1e-5)
    assert torch.equal(target[1], landed[1])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_draws_on_the_levels_it_was_taught(steps):
    assert torch.allclose(few_sampling(steps).sigmas(), few_sigmas(steps), rtol=1e-5, atol=0)
    taught_levels = few_sigmas(8)
    assert all(level in taught_levels for level in few_sigmas(steps))


def test_a_chain_that_cannot_be_walked_is_refused():
    assert DistillConfig(few_steps=1).chain == (4, 2, 1) and DistillConfig(few_steps=8).chain == (8,)
    assert DistillConfig(few_steps=1, stages=(1,)).chain == (1,)
    with pytest.raises(UserError, match="1, 2, 4 or 8 steps, not 3"):
        DistillConfig(few_steps=3)
    for wrong in ({"teacher_steps": 2}, {"stages": (2,)}, {"stages": (3, 4)}, {"teacher_steps": 12}):
        with pytest.raises(UserError, match="each must divide the one before"):
            DistillConfig(**wrong)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    shards, clip = tiny.shards(root / "shards"), tiny.clip(root / "clip")
    train_decoder(shards, clip, root / "decoder", DECODER, FIT, device="cpu")
    return root


def distilled(house, out, **more):
    given = {"decoder": house / "decoder", "shards": house / "shards", "clip": house / "clip"} | more
    progress = given.pop("on_progress", None)
    config = DistillConfig(few_steps=1, stages=(2, 1), teacher_steps=8)
    return train_distilled(out=out, config=config, fit_config=FIT, device="cpu", on_progress=progress, **given)


def test_what_is_made_is_a_decoder_that_draws_in_so_many_steps_by_itself(house):
    calls = []
    made = distilled(house, house / "one", on_progress=lambda done, total, stage, **_: calls.append((stage, done)))
    assert [calls.count((f"to {steps} steps", 3)) for steps in (2, 1)] == [1, 1]  # the 6 steps are shared out
    assert made.kind == "decoder" and made.inputs["teacher"]["fingerprint"]
    assert load_decoder(house / "one")[0].config == replace(load_decoder(house / "decoder")[0].config, few_steps=1)
    generator, seen = Generator.open(house / "one", clip=house / "clip"), []
    rows = tiny.unit_rows(2, 32)
    drawn = generator.from_embeddings(rows, on_step=lambda step, denoised: seen.append(step))
    assert seen == [0] and drawn[0].provenance["sampling"]["guidance"] == 1.0
    before = Generator.open(house / "decoder", clip=house / "clip").from_embeddings(rows, None, generator.how)
    assert not np.array_equal(np.asarray(drawn[0].picture), np.asarray(before[0].picture))
    assert distilled(house, house / "one").fingerprint == made.fingerprint  # done already


def test_distillation_killed_between_and_within_stages_ends_in_the_same_weights(house):
    whole = distilled(house, house / "whole")
    for stop in [("to 2 steps", 2), ("to 1 steps", 1), ("to 1 steps", 3)]:

        def killer(done, total, stage, stop=stop, **_):
            if (stage, done) == stop:
                raise Interrupted(2, done)

        with pytest.raises(Interrupted):
            distilled(house, house / "parts", on_progress=killer)
        assert not (house / "parts").exists()
    assert distilled(house, house / "parts").fingerprint == whole.fingerprint


def test_the_first_teacher_is_the_guided_decoder_and_the_next_is_asked_once(house):
    teacher = load_decoder(house / "decoder")[0]
    batch = {"pixels": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "image": torch.from_numpy(tiny.unit_rows(4, 32))}
    asked = []
    teacher.register_forward_hook(lambda module, inputs, out: asked.append(len(inputs[0])))
    student = lambda x, sigma, cond: torch.zeros_like(x)  # noqa: E731
    for guided, count in [(True, 8), (False, 4)]:
        loss = stage_loss(teacher, None, 2, 1, DistillConfig(guidance=3.0), guided)
        asked.clear()
        value, _ = loss(student, batch, torch.Generator().manual_seed(0))
        assert set(asked) == {count} and len(asked) == (3 if guided else 2)  # Heun's last step needs one call


def test_the_decoders_guidance_is_baked_in(house):
    teacher, seen = load_decoder(house / "decoder")[0], []
    batch = {"pixels": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "image": torch.from_numpy(tiny.unit_rows(4, 32))}
    loss = stage_loss(teacher, None, 1, 1, DistillConfig(guidance=3.0, clamp=1.0), guided=True)

    def student(x, sigma, cond):
        null, told = teacher(x, sigma, null_cond(cond)), teacher(x, sigma, cond)
        seen.append((x.std() / sigma[0]).item())
        return (null + 3 * (told - null)).clamp(-1, 1)  # what one step of the guided decoder lands on

    with torch.no_grad():
        value, _ = loss(student, batch, torch.Generator().manual_seed(0))
    assert value.item() == pytest.approx(0.0, abs=1e-8)
    assert seen[0] == pytest.approx(1.0, abs=0.15)  # noise alone at the first level


def test_a_student_also_learns_to_draw_without_words(house):
    clip, seen = Clip.load(house / "clip"), []
    teacher = load_decoder(house / "decoder")[0]
    batch = {"pixels": torch.zeros(64, 3, 8, 8, dtype=torch.uint8), "image": torch.from_numpy(tiny.unit_rows(64, 32))}
    batch["tokens"] = clip.tokenize(["a fox"] * 64)

    def student(x, sigma, cond):
        seen.append(cond)
        return x

    stage_loss(teacher, clip, 1, 1, DistillConfig(), True)(student, batch, torch.Generator().manual_seed(0))
    assert 16 < seen[0]["keep_text"].any(1).sum() < 48 and not seen[0]["drop_image"].any()


def test_a_student_is_not_asked_for_noise_levels_it_does_not_know(house):
    distilled(house, house / "one")
    student, rows = Generator.open(house / "one", clip=house / "clip"), tiny.unit_rows(1, 32)
    for how in (Sampling(), replace(student.how, steps=4), replace(student.how, sampler="heun")):
        with pytest.raises(UserError, match="distilled to draw in 1 steps"):
            student.from_embeddings(rows, how=how)
    with pytest.raises(UserError, match="distilled to draw in 1 steps"):
        student.walk(student.rows(rows), None, [0], start=torch.zeros(1, 3, 8, 8), sigma=2.0)
    student.from_embeddings(rows, how=replace(student.how, eta=1.0, precision="bf16"))


def test_another_clip_and_a_student_as_teacher_are_refused(house, tmp_path):
    with pytest.raises(UserError, match="trained with another CLIP"):
        distilled(house, tmp_path / "out", clip=tiny.clip(tmp_path / "other", seed=1))
    distilled(house, house / "one")
    with pytest.raises(UserError, match="distilled already, to 1 steps"):
        distilled(house, tmp_path / "out", decoder=house / "one")
