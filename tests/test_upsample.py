import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import nn

from clip_train.pictures import decode_picture
from clip_train.settings import UserError, config_from_json, config_to_json
from diffusion import upsample
from diffusion.evaluate_upsampler import evaluate_upsampler_folder, pictures_of, psnr, table_of
from diffusion.train_upsampler import (
    UPSAMPLER_PRESETS,
    crop_loss,
    load_upsampler,
    noise_levels,
    random_crops,
    train_upsampler,
)
from diffusion.upsample import (
    UpsamplerConfig,
    UpsamplerDenoiser,
    bicubic,
    blurred,
    degraded,
    drop_some,
    enlarge,
    null_cond,
    small_cond,
)
from diffusion.upsample_commands import enlarge as enlarge_command

SMALL = {"embed_dim": 8, "crop": 16, "widths": (16, 24), "blocks": (1, 1), "cond_width": 32}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(rows, seed, wide=8):
    return F.normalize(torch.randn(rows, wide, generator=rng(seed)), dim=-1)


def small_upsampler(loud=True, **more):
    torch.manual_seed(0)
    upsampler = UpsamplerDenoiser(UpsamplerConfig(**SMALL | more)).eval()
    if loud:  # silent layers would hide every mistake
        for layer in upsampler.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        nn.init.normal_(upsampler.network.null_image)
    return upsampler


def smooth(count, side, seed=0):
    """Pictures in [-1, 1] without fine structure."""
    return bicubic(0.8 * torch.rand(count, 3, side // 4, side // 4, generator=rng(seed)) - 0.4, 4)


def test_bicubic_enlargement_is_pillows():
    pixels = torch.randint(60, 196, (1, 3, 7, 5), generator=rng(), dtype=torch.uint8)  # Pillow clips between its passes
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    theirs = np.array(picture.resize((20, 28), Image.Resampling.BICUBIC)).astype(float)
    ours = ((bicubic(pixels / 127.5 - 1, 4) + 1) * 127.5).clamp(0, 255)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() < 1.5  # they round twice


def test_a_blurred_point_is_a_gaussian_of_its_own_width_in_each_direction():
    point = torch.zeros(3, 3, 9, 9)
    point[:, :, 4, 4] = 1
    along, across = torch.tensor([0.0, 0.6, 0.8]), torch.tensor([0.7, 0.6, 0.0])
    made = blurred(point, along, across)
    place = torch.arange(9.0) - 4
    assert torch.allclose(made.sum((2, 3)), torch.ones(3, 3), atol=1e-6)
    for row, x, y in zip(made[:, 0], along, across, strict=True):
        assert (row.sum(0) * place**2).sum().sqrt() == pytest.approx(x.item(), abs=0.02)
        assert (row.sum(1) * place**2).sum().sqrt() == pytest.approx(y.item(), abs=0.02)


def test_the_network_is_told_how_much_noise_the_small_picture_got():
    config = UpsamplerConfig(**SMALL, noise=0.4)
    flat = torch.full((50, 3, 128, 128), 0.3)
    small, level = degraded(flat, config, rng())
    assert small.shape == (50, 3, 32, 32) and (0 <= level).all() and (level <= 0.4).all() and level.std() > 0.05
    assert torch.allclose((small - 0.3).flatten(1).std(1), level, rtol=0.06, atol=1e-6)


def test_half_of_the_small_pictures_are_blurred_and_none_is_moved():
    config = UpsamplerConfig(**SMALL, noise=0.0)
    x0 = torch.randn(400, 3, 32, 32, generator=rng())
    small, _ = degraded(x0, config, rng(1))
    power = small.square().mean((1, 2, 3))
    plain, _ = degraded(x0, UpsamplerConfig(**SMALL, noise=0.0, blurred=0.0), rng(1))
    unblurred = torch.isclose(power, plain.square().mean((1, 2, 3)), rtol=1e-3)
    assert unblurred.float().mean() == pytest.approx(0.5, abs=0.08)
    edge = torch.ones(1, 3, 32, 32)
    edge[..., 16:] = -1
    steps = degraded(edge.expand(64, -1, -1, -1), config, rng(2))[0].mean((1, 2))  # (64, 8)
    assert torch.allclose(steps, -steps.flip(1), atol=1e-5) and (steps[:, 3] > 0.4).all()


def test_a_fresh_upsampler_is_bicubic_enlargement():
    pixels = smooth(2, 16)
    large = enlarge(small_upsampler(loud=False), pixels, unit(2, 0), [0, 1], steps=1, noise_level=0.0)
    expected = bicubic(pixels, 4)
    assert large.shape == (2, 3, 64, 64)
    assert (large - expected).abs().max() < 0.15 / 6 * 5  # what is left of the noise: 5 std


@pytest.mark.parametrize("grey", [-0.7, 0.7])
def test_a_plain_picture_keeps_its_shade(grey):
    """Whatever network: a walk that begins at noise alone would end 0.7 / 6 nearer to middle grey."""
    large = enlarge(small_upsampler(loud=False), torch.full((1, 3, 16, 16), grey), None, [0], steps=6, noise_level=0.0)
    assert large.mean().item() == pytest.approx(grey, abs=0.01)


def test_a_fresh_upsampler_has_loss_one():
    config = UpsamplerConfig(**SMALL, noise=0.0, blurred=0.0)
    x0 = torch.randn(64, 3, 16, 16, generator=rng())
    spread = (x0 - bicubic(F.avg_pool2d(x0, 4), 4)).square().mean().sqrt().item()
    config = UpsamplerConfig(**SMALL, noise=0.0, blurred=0.0, sigma_data=spread)
    torch.manual_seed(0)
    loss = crop_loss(UpsamplerDenoiser(config), x0, unit(64, 0), config, rng())
    assert loss.item() == pytest.approx(1, abs=0.1)


def test_every_weight_takes_part():
    upsampler = small_upsampler()
    cond = small_cond(smooth(4, 16)[:, :, :4, :4], torch.full((4,), 0.1), unit(4, 0), 4)
    cond["drop_image"] = torch.tensor([True, False, False, False])
    upsampler(torch.randn(4, 3, 16, 16), torch.ones(4), cond).square().sum().backward()
    assert [n for n, weight in upsampler.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_the_picture_depends_on_level_and_embedding_and_not_on_one_that_is_dropped():
    upsampler, x, sigma = small_upsampler(), torch.randn(4, 3, 16, 16, generator=rng()), torch.full((4,), 0.2)
    small, level = smooth(4, 16, 1)[:, :, :4, :4], torch.full((4,), 0.1)
    a, b = (small_cond(small, level, unit(4, seed), 4) for seed in (1, 2))
    drop = torch.tensor([False, True, True, False])
    a["drop_image"] = b["drop_image"] = drop
    assert torch.equal((upsampler(x, sigma, a) == upsampler(x, sigma, b)).flatten(1).all(1), drop)
    assert torch.equal(upsampler(x, sigma, null_cond(a)), upsampler(x, sigma, null_cond(b)))
    assert not torch.allclose(upsampler(x, sigma, a), upsampler(x, sigma, a | {"level": level + 0.1}), atol=1e-3)


def test_embeddings_are_dropped_in_their_share():
    cond = small_cond(torch.zeros(4000, 3, 1, 1), torch.zeros(4000), torch.zeros(4000, 8), 4)
    dropped = drop_some(cond, UpsamplerConfig(**SMALL, drop_image=0.1), rng())["drop_image"].float()
    assert dropped.mean().item() == pytest.approx(0.1, abs=0.02) and not cond["drop_image"].any()


def test_a_place_far_from_a_change_does_not_see_it_whatever_the_size_of_the_picture():
    """So weights trained on crops fit pictures of any size: no norm, attention or position knows the whole."""
    upsampler, reach = small_upsampler(), 36  # pixels that 3x3 convolutions of two levels see to each side
    x, small = torch.randn(1, 3, 160, 160, generator=rng()), smooth(1, 160, 3)[:, :, ::4, ::4]
    sigma, level, image = torch.tensor([0.2]), torch.tensor([0.1]), unit(1, 0)
    whole = upsampler(x, sigma, small_cond(small, level, image, 4))
    part = upsampler(x[..., 32:128, 32:128], sigma, small_cond(small[..., 8:32, 8:32], level, image, 4))
    inner = slice(reach, 96 - reach)
    assert torch.allclose(whole[..., 32:128, 32:128][..., inner, inner], part[..., inner, inner], atol=1e-4)
    assert not torch.allclose(whole[..., 32:128, 32:128], part, atol=1e-2)  # at the rim it does


def test_a_picture_is_its_seeds_alone_and_neither_its_batch_nor_how_many_are_in_work_at_once(monkeypatch):
    upsampler, pixels, rows = small_upsampler(), smooth(5, 16, 4)[:, :, :8, :8], unit(5, 0)
    together = enlarge(upsampler, pixels, rows, [3, 4, 5, 6, 7], steps=3)
    assert torch.equal(together, enlarge(upsampler, pixels, rows, [3, 4, 5, 6, 7], steps=3))
    alone = enlarge(upsampler, pixels[2:3], rows[2:3], [5], steps=3)
    assert torch.allclose(together[2:3], alone, atol=1e-4)
    assert (together[2:3] - enlarge(upsampler, pixels[2:3], rows[2:3], [6], steps=3)).abs().max() > 0.01
    monkeypatch.setattr(upsample, "AT_ONCE", 2 * 32 * 32)
    assert torch.allclose(together, enlarge(upsampler, pixels, rows, [3, 4, 5, 6, 7], steps=3), atol=1e-4)


@pytest.mark.parametrize("height, width", [(5, 7), (8, 3), (1, 1)])
def test_pictures_of_any_size_are_enlarged_at_their_own_shape(height, width):
    upsampler = small_upsampler(loud=False, patch=4, crop=32, widths=(16, 16, 16), blocks=(1, 1, 1))
    pixels = smooth(1, 16)[:, :, :height, :width]
    large = enlarge(upsampler, pixels, None, [0], steps=1, noise_level=0.0)
    assert large.shape == (1, 3, 4 * height, 4 * width)
    inner = F.avg_pool2d(large, 4)
    assert (inner - pixels).abs().max() < 0.25


def test_no_pictures_make_no_pictures_and_wrong_arguments_are_named():
    upsampler = small_upsampler()
    assert enlarge(upsampler, torch.zeros(0, 3, 4, 4), None, []).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match="2 pictures but 1 seeds"):
        enlarge(upsampler, torch.zeros(2, 3, 4, 4), None, [0])
    with pytest.raises(UserError, match=r"noise_level 0.5 must be in \[0, 0.3\]"):
        enlarge(upsampler, torch.zeros(1, 3, 4, 4), None, [0], noise_level=0.5)


def test_what_bicubic_cannot_know_is_learnt_and_the_embedding_decides_it():
    """Every square of 4 x 4 has a fixed pattern of mean 0 that no small picture shows; the embedding says its sign."""
    pattern = torch.tensor([[1.0, -1], [-1, 1]]).repeat(8, 8) * 0.3
    colours, signs, rows = torch.rand(64, 3, 1, 1, generator=rng()) - 0.5, torch.ones(64), unit(2, 0)
    signs[::2] = -1
    x0, image = colours + signs[:, None, None, None] * pattern, rows[(signs > 0).long()]
    config = UpsamplerConfig(**SMALL, noise=0.0, blurred=0.0, sigma_data=0.3, drop_image=0.0)
    torch.manual_seed(0)
    upsampler = UpsamplerDenoiser(config)
    optimizer, draws = torch.optim.Adam(upsampler.parameters(), lr=6e-3), rng(1)
    for _ in range(100):
        some = torch.randint(0, 64, (16,), generator=draws)
        loss = crop_loss(upsampler, x0[some], image[some], config, draws, drop=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small = F.avg_pool2d(x0[:8], 4)
    for steps in (1, 4):
        large = enlarge(upsampler.eval(), small, image[:8], list(range(8)), steps=steps, noise_level=0.0)
        nearest = (large - x0[:8]).square().mean().sqrt()
        other = enlarge(upsampler, small, image[:8].flip(0), list(range(8)), steps=steps, noise_level=0.0)
        # bicubic is off by 0.3 (the pattern), the other sign by 0.6; whoever does not read the embedding, by as much
        assert nearest < 0.29 and (other - x0[:8]).square().mean().sqrt() > 1.7 * nearest


def test_crops_are_squares_of_their_picture_from_all_over_it():
    place = torch.arange(24 * 20).view(24, 20)
    pixels = torch.stack([place // 20, place % 20, torch.zeros_like(place)]).expand(300, -1, -1, -1).byte()
    crops = ((random_crops(pixels, 8, rng()) + 1) * 127.5).round().long()
    top, left = crops[:, 0, 0, 0], crops[:, 1, 0, 0]
    assert torch.equal(crops[:, 0], top[:, None, None] + torch.arange(8)[:, None].expand(8, 8))
    assert torch.equal(crops[:, 1], left[:, None, None] + torch.arange(8)[None].expand(8, 8))
    assert (top.min(), top.max(), left.min(), left.max()) == (0, 16, 0, 12)


def test_noise_levels_follow_the_density_in_units_of_the_residual():
    config = UpsamplerConfig(**SMALL, sigma_data=0.2, sigma_mean=0.5, sigma_std=1.0)
    ln = (noise_levels(4000, config, rng()) / 0.2).log()
    assert ln.mean().item() == pytest.approx(0.5, abs=0.01) and ln.std().item() == pytest.approx(1, abs=0.02)
    cosine = noise_levels(4001, UpsamplerConfig(**SMALL, density="cosine", sigma_data=0.2), rng())
    assert cosine.median().item() == pytest.approx(0.2, rel=0.01)


def test_psnr_of_one_grey_level_everywhere():
    true = torch.full((2, 3, 4, 4), 100 / 127.5 - 1)
    off = [Image.new("RGB", (4, 4), (101, 101, 101)), Image.new("RGB", (4, 4), (100, 100, 100))]
    assert psnr(true, off[:1] * 2).value == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    assert psnr(true, off).value == pytest.approx((48.13 + 60) / 2, abs=0.01)
    assert np.array(pictures_of(true)[0]).tolist() == np.full((4, 4, 3), 100).tolist()


@pytest.mark.parametrize("preset", UPSAMPLER_PRESETS)
def test_presets_are_whole_and_survive_json(preset):
    config = UPSAMPLER_PRESETS[preset].config
    assert config_from_json(UpsamplerConfig, config_to_json(config), "here") == config
    assert config.factor == 4 and config.crop == 64


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"crop": 20}, "multiple of factor 4 and of 8"),
        ({"crop": 18, "factor": 4}, "multiple of factor"),
        ({"factor": 1}, "at least 2"),
        ({"blocks": (1,)}, "one number per level"),
        ({"picture_size": 32}, "smaller than crop"),
        ({"blur": 2.0}, "blur and blurred"),
        ({"density": "none"}, "no density"),
        ({"sigma_min": 20.0}, "sigma_min"),
        ({"drop_image": 1.5}, "drop_image 1.5"),
    ],
)
def test_an_upsampler_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        UpsamplerConfig(**wrong)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Shards of 20-pixel pictures, a CLIP, and an upsampler trained on them for two steps."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("upsampler")
    tiny.shards(folder / "shards", 40), tiny.clip(folder / "clip")
    config = UpsamplerConfig(**SMALL | {"embed_dim": 0})
    how = replace(UPSAMPLER_PRESETS["tiny"].fit, minutes=0.0, steps=4, batch_size=4, ema=0.5, ema_snapshots=2)
    made = train_upsampler(folder / "shards", folder / "clip", folder / "up", config, how, device="cpu")
    return folder, config, how, made


def test_training_writes_a_folder_that_loads_and_finds_itself_done(trained):
    folder, config, how, made = trained
    upsampler, manifest = load_upsampler(folder / "up")
    assert manifest.kind == "upsampler" and set(manifest.inputs) == {"shards", "clip"}
    assert upsampler.config.embed_dim == 32 and upsampler.config.picture_size == 20
    assert upsampler.config.sigma_data == pytest.approx(manifest.result["residual_spread"]) and not upsampler.training
    assert enlarge(upsampler, torch.zeros(1, 3, 5, 5), None, [0], steps=2).shape == (1, 3, 20, 20)
    again = train_upsampler(folder / "shards", folder / "clip", folder / "up", config, how, device="cpu")
    assert again.created == made.created and len(list((folder / "up" / "snapshots").iterdir())) == 4


def test_pictures_smaller_than_a_crop_are_refused_with_the_way_out(trained):
    folder, *_ = trained
    with pytest.raises(UserError, match="20 pixels wide.*crop=16"):
        train_upsampler(folder / "shards", folder / "clip", folder / "no", UpsamplerConfig(), device="cpu")


def test_evaluation_has_every_way_in_one_table_and_a_sheet_of_the_crops(trained):
    folder, *_ = trained
    figures, sheet = evaluate_upsampler_folder(folder / "up", folder / "shards", count=40, steps=1)
    ways = figures["ways"]
    assert list(ways) == ["bicubic", "lanczos", "mean", "samples", "samples, noise 0.05"]
    assert ways["bicubic"]["psnr"] > 10
    assert all(np.isfinite([way["psnr"], way["kernel"]]).all() and -1 < way["cosine"] <= 1 for way in ways.values())
    assert sheet.width > 7 * 32 and len(table_of(figures)[2]) == 5


def test_the_command_enlarges_files_and_refuses_what_it_cannot_read(trained, tmp_path):
    folder, *_ = trained
    (tmp_path / "a.png").write_bytes(tiny.picture(0, 6))
    (tmp_path / "b.png").write_bytes(b"no picture")

    def run(*arguments):
        how = ["--upsampler", str(folder / "up"), "--steps", "2", "--device", "cpu"]
        return CliRunner().invoke(enlarge_command, [*map(str, arguments), *how])

    assert run(tmp_path / "a.png", "--out", tmp_path / "large.png").exit_code == 0
    assert run(tmp_path / "a.png", "--blind", "--out", tmp_path / "blind").exit_code == 0
    for path in (tmp_path / "large.png", tmp_path / "blind" / "a.png"):
        assert decode_picture(path.read_bytes()).size == (24, 24)
    assert "b.png cannot be read" in str(run(tmp_path / "b.png", "--out", tmp_path / "large").exception)
    two = run(tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "one.png")
    assert "name of one picture" in str(two.exception)
