import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_train.settings import UserError, config_from_json, config_to_json
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, null_cond, picture_cond
from diffusion.denoiser import denoising_loss
from diffusion.train_decoder import DECODER_PRESETS

SMALL = {
    "embed_dim": 8,
    "image_size": 8,
    "widths": (16, 32),
    "blocks": (1, 1),
    "attention": (2,),
    "head_width": 16,
    "cond_width": 32,
}


def unit(rows, seed, wide=8):
    return F.normalize(torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed)), dim=-1)


def small_decoder(loud=True, **more):
    torch.manual_seed(0)
    decoder = DecoderDenoiser(DecoderConfig(**SMALL | more)).eval()
    if loud:  # silent layers would hide every mistake
        for layer in decoder.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        nn.init.normal_(decoder.network.null_image)
    return decoder


X, SIGMA = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4)


def test_a_fresh_decoder_has_loss_one():
    decoder = small_decoder(loud=False)
    x0 = 0.5 * torch.randn(64, 3, 8, 8)
    for sigma in (0.05, 0.5, 5.0):
        level = torch.full((64,), sigma)
        loss = denoising_loss(
            decoder, x0, picture_cond(unit(64, 0)), level, torch.randn_like(x0), decoder.scaling.weight(level)
        )
        assert loss.item() == pytest.approx(1, abs=0.1)


def test_every_weight_of_the_decoder_takes_part():
    decoder = small_decoder(text=True, text_width=6)
    cond = picture_cond(unit(4, 0), torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.bool))
    cond["drop_image"] = torch.tensor([True, False, False, False])
    decoder(X, SIGMA, cond).square().sum().backward()
    silent = [name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []


def test_the_picture_depends_on_the_embedding_unless_it_is_dropped():
    decoder = small_decoder()
    a, b = picture_cond(unit(4, 1)), picture_cond(unit(4, 2))
    drop = torch.tensor([False, True, True, False])
    a["drop_image"] = b["drop_image"] = drop
    same = (decoder(X, SIGMA, a) == decoder(X, SIGMA, b)).flatten(1).all(1)
    assert torch.equal(same, drop)
    assert torch.equal(decoder(X, SIGMA, null_cond(a)), decoder(X, SIGMA, null_cond(b)))


def test_text_that_is_not_to_be_kept_leaves_no_trace():
    decoder, keep = small_decoder(text=True, text_width=6), torch.tensor([[True, True, False]] * 4)
    text = torch.randn(4, 3, 6)
    base = decoder(X, SIGMA, picture_cond(unit(4, 1), text, keep))
    for place, traced in [(1, True), (2, False)]:
        other = text.clone()
        other[:, place] += 1
        assert torch.allclose(decoder(X, SIGMA, picture_cond(unit(4, 1), other, keep)), base, atol=1e-5) != traced
    bare = decoder(X, SIGMA, picture_cond(unit(4, 1)))
    none = decoder(X, SIGMA, picture_cond(unit(4, 1), text, torch.zeros_like(keep)))
    assert torch.allclose(bare, none, atol=1e-5)


def test_conditions_are_dropped_independently_in_their_shares():
    config = DecoderConfig(**SMALL, drop_image=0.1, drop_text=0.5)
    cond = picture_cond(unit(4000, 0), torch.zeros(4000, 2, 1), torch.ones(4000, 2, dtype=torch.bool))
    dropped = drop_some(cond, config, torch.Generator().manual_seed(0))
    no_image, no_text = dropped["drop_image"].float(), (~dropped["keep_text"][:, 0]).float()
    assert no_image.mean().item() == pytest.approx(0.1, abs=0.02)
    assert no_text.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (no_image * no_text).mean().item() == pytest.approx(0.05, abs=0.015)
    assert cond["keep_text"].all() and not cond["drop_image"].any()


def test_a_sample_does_not_see_its_neighbours():
    decoder, image = small_decoder(), unit(4, 1)
    together = decoder(X, SIGMA, picture_cond(image))
    assert torch.allclose(decoder(X[2:3], SIGMA[2:3], picture_cond(image[2:3])), together[2:3], atol=1e-4)


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_presets_are_whole_and_survive_json(preset):
    config = DECODER_PRESETS[preset].config
    assert config_from_json(DecoderConfig, config_to_json(config), "here") == config
    assert set(config.attention) & {config.image_size // config.patch // 2**n for n in range(len(config.widths))}


def test_roughness_of_a_flat_noisy_picture_is_its_noise_in_units_of_sigma():
    network, sigma = small_decoder().network, torch.tensor([0.001, 0.1, 10.0])
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rough = network.roughness(0.7 + sigma[:, None, None, None] * noise, sigma.log() / 4).flatten(1)
    for row, own in zip(rough, noise.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([row, own]))[0, 1] > 0.9
        assert 0.7 < row.std() < 1.0  # the blur keeps a ninth of the variance, the limit takes some


def test_a_decoder_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="multiple of 8"):
        DecoderConfig(embed_dim=8, image_size=20)
    with pytest.raises(UserError, match="one number per level"):
        DecoderConfig(embed_dim=8, blocks=(1, 1))
    with pytest.raises(UserError, match="not a multiple of head_width"):
        DecoderConfig(embed_dim=8, widths=(48, 64, 72))


def test_a_decoder_learns_the_colour_of_an_embedding():
    decoder = small_decoder(loud=False)
    colours = unit(3, 4, 3)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in range(300):
        which = torch.randint(0, 3, (32,), generator=rng)
        x0 = colours[which][:, :, None, None].expand(-1, -1, 8, 8)
        sigma = torch.exp(torch.randn(32, generator=rng))
        noise = torch.randn(x0.shape, generator=rng)
        loss = denoising_loss(
            decoder, x0, picture_cond(torch.eye(8)[which]), sigma, noise, decoder.scaling.weight(sigma)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        guess = decoder(
            20 * torch.randn(3, 3, 8, 8, generator=rng), torch.full((3,), 20.0), picture_cond(torch.eye(8)[:3])
        ).mean((2, 3))
    assert (guess - colours).abs().max() < 0.25
