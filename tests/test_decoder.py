import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_train.settings import UserError, config_from_json, config_to_json
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, noised, null_cond, picture_cond
from diffusion.denoiser import denoising_loss
from diffusion.layers import Attention
from diffusion.levels import PLANS
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


@pytest.mark.parametrize("network", PLANS)
def test_a_fresh_decoder_has_loss_one(network):
    decoder = small_decoder(loud=False, network=network)
    x0 = 0.5 * torch.randn(64, 3, 8, 8)
    for sigma in (0.05, 0.5, 5.0):
        level = torch.full((64,), sigma)
        loss = denoising_loss(
            decoder, x0, picture_cond(unit(64, 0)), level, torch.randn_like(x0), decoder.scaling.weight(level)
        )
        assert loss.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("network", PLANS)
def test_every_weight_of_the_decoder_takes_part(network):
    decoder = small_decoder(network=network, text=True, text_width=6, noise_image=0.5, align=1.0, align_width=3)
    cond = picture_cond(unit(4, 0), torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.bool), torch.full((4,), 0.3))
    cond["drop_image"] = torch.tensor([True, False, False, False])
    denoised, features = decoder(X, SIGMA, cond, features=True)
    assert features.shape == (4, 3, 2, 2)
    (denoised.square().sum() + features.square().sum()).backward()
    silent = [name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []


@pytest.mark.parametrize("network", PLANS)
def test_the_picture_depends_on_the_embedding_unless_it_is_dropped(network):
    decoder = small_decoder(network=network)
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


def test_a_prepared_condition_gives_the_same_pictures_and_does_not_outlive_a_change_of_it():
    decoder = small_decoder(text=True, text_width=6, noise_image=0.5)
    nn.init.normal_(decoder.network.linear.weight)
    cond = picture_cond(unit(4, 1), torch.randn(4, 3, 6), torch.ones(4, 3, dtype=torch.bool), torch.full((4,), 0.2))
    ready = decoder.network.prepared(cond)
    assert all(len(value) == 4 for value in ready.values())  # guidance joins conditions along this axis
    plain = decoder(X, SIGMA, cond)
    assert torch.equal(decoder(X, SIGMA, ready), plain)
    assert torch.equal(decoder(X, SIGMA, null_cond(ready)), decoder(X, SIGMA, null_cond(cond)))
    assert not torch.allclose(decoder(X, SIGMA, null_cond(ready)), plain)
    everything = DecoderConfig(**SMALL, drop_image=1.0, drop_text=1.0)
    lost = drop_some(ready, everything, torch.Generator().manual_seed(0))
    assert torch.equal(decoder(X, SIGMA, lost), decoder(X, SIGMA, null_cond(cond)))


def test_who_looks_at_what_can_be_watched_and_changes_nothing():
    decoder, cond = small_decoder(network="dit", widths=(16,), blocks=(1,), patch=2), picture_cond(unit(4, 1))
    plain = decoder(X, SIGMA, cond)
    looks = [layer for layer in decoder.modules() if isinstance(layer, Attention)]
    for layer in looks:
        layer.watch = []
    assert torch.equal(decoder(X, SIGMA, cond), plain)
    for layer in looks:
        [shares] = layer.watch
        assert shares.shape == (4, 16, 4 + 16)  # each cell looks at the embedding's tokens, then at the cells
        assert torch.allclose(shares.sum(-1), torch.ones(4, 16), atol=1e-5)
    layer = looks[0]
    with torch.no_grad():  # of the two halves of the look, turn off the score: all places are equally interesting
        layer.qkv.weight[:16] = 0
        layer.qkv.bias[:16] = 0
    decoder(X, SIGMA, cond)
    assert torch.allclose(layer.watch[1], torch.full((4, 16, 20), 1 / 20))


def test_a_noised_embedding_is_as_noisy_as_it_says_and_the_network_is_told():
    rows, level = unit(4, 0, 4096), torch.tensor([0.0, 0.1, 0.5, 1.0])
    noise = torch.randn(4, 4096, generator=torch.Generator().manual_seed(1))
    away = (noised(rows, level, noise) - rows).norm(dim=1)
    assert torch.allclose(away, level, rtol=0.05)  # a row has length 1
    decoder, rows = small_decoder(noise_image=0.5), unit(4, 1)
    told = [decoder(X, SIGMA, picture_cond(rows, image_noise=torch.full((4,), level))) for level in (0.0, 0.4)]
    assert torch.equal(decoder(X, SIGMA, picture_cond(rows)), told[0])
    assert (told[0] - told[1]).abs().flatten(1).amax(1).min() > 1e-3


def test_a_sample_does_not_see_its_neighbours():
    decoder, image = small_decoder(), unit(4, 1)
    together = decoder(X, SIGMA, picture_cond(image))
    assert torch.allclose(decoder(X[2:3], SIGMA[2:3], picture_cond(image[2:3])), together[2:3], atol=1e-4)


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_presets_are_whole_and_survive_json(preset):
    config = DECODER_PRESETS[preset].config
    assert config_from_json(DecoderConfig, config_to_json(config), "here") == config
    assert config.network != "hybrid" or set(config.attention) & {
        config.image_size // config.patch // 2**n for n in range(len(config.widths))
    }


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
    with pytest.raises(UserError, match="no network 'vit': take hybrid, unet, uvit, dit"):
        DecoderConfig(embed_dim=8, network="vit")
    with pytest.raises(UserError, match="no loss weighting"):
        DecoderConfig(embed_dim=8, weighting="snr")
    with pytest.raises(UserError, match="at least 0"):
        DecoderConfig(embed_dim=8, noise_image=-0.1)


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
