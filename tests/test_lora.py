import open_clip
import pytest
import torch
from torch import nn

from clip_train.depth import depths
from clip_train.fit import FitConfig, fit
from clip_train.lora import add_lora, has_lora, merge_lora
from clip_train.model import Clip, preprocess_config
from clip_train.settings import UserError

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOWERS = {
    "vit": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "convolutions": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
}
TOKENS = ["a red fox", "two hearts", "c"]


def clip(vision="vit"):
    torch.manual_seed(0)
    cfg = {"embed_dim": 32, "vision_cfg": TOWERS[vision], "text_cfg": TEXT}
    return Clip(cfg, preprocess_config(TOWERS[vision]["image_size"])).eval()


def inputs(model):
    pixels = torch.randint(0, 256, (3, 3, model.image_size, model.image_size), dtype=torch.uint8)
    return pixels, model.tokenize(TOKENS)


def train(model, pixels, tokens, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        image, text, scale = model(pixels, tokens)
        loss = nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("vision", TOWERS)
def test_merged_weights_are_open_clips_own_and_give_the_adapted_outputs(vision, tmp_path):
    model = clip(vision)
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    pixels, tokens = inputs(model)
    before = model(pixels, tokens)[0]
    add_lora(model, rank=4, conv=True)
    assert torch.allclose(model(pixels, tokens)[0], before, atol=1e-6)
    train(model, pixels, tokens)
    adapted = [t.detach() for t in model(pixels, tokens)]
    assert not torch.allclose(adapted[0], before, atol=1e-2)

    model.save(tmp_path)  # folded into what is written
    assert has_lora(model)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    with torch.no_grad():
        assert torch.allclose(theirs.encode_text(tokens, normalize=True), adapted[1], atol=1e-5)
    merge_lora(model)
    assert not has_lora(model) and model.state_dict().keys() == plain.keys()
    for found, wanted in zip(model(pixels, tokens), adapted, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    for name, tensor in Clip.load(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_only_the_adapters_and_the_temperature_train():
    model = clip()
    names = add_lora(model, rank=4)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trained} == {"up", "down", "logit_scale"}
    assert len(trained) == 2 * len(names) + 1
    train(model, *inputs(model))
    for name, tensor in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], tensor), name
    assert depths(model.model)["image"]  # every name, wrapped or not, has its place


def test_the_change_of_a_matrix_has_the_rank_asked_for_and_the_strength_of_alpha():
    model = clip()
    weight = model.model.visual.transformer.resblocks[0].attn.in_proj_weight.clone()
    add_lora(model, rank=3, alpha=6, towers=["image"])
    attention = model.model.visual.transformer.resblocks[0].attn
    adapter = attention.parametrizations.in_proj_weight[0]
    with torch.no_grad():
        adapter.up.normal_()
    change = (attention.in_proj_weight - weight).detach()
    assert torch.allclose(change, 2 * adapter.up @ adapter.down, atol=1e-5)
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 3


def test_the_other_tower_is_left_alone():
    model = clip()
    assert all(name.startswith("visual.") for name in add_lora(model, rank=2, towers=["image"]))
    assert not any(name.startswith("visual.") for name in add_lora(clip(), rank=2, towers=["text"]))


def test_what_cannot_be_adapted_is_refused_in_one_line():
    model = clip()
    for arguments, words in (
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0.0}, "alpha 0"),
        ({"towers": []}, "towers"),
        ({"towers": ["picture"]}, "picture must be out of: image, text"),
    ):
        with pytest.raises(UserError, match=words):
            add_lora(model, **arguments)
    add_lora(model)
    with pytest.raises(UserError, match="has LoRA adapters already"):
        add_lora(model)


def test_averaged_weights_are_folded_under_their_own_names(tmp_path):
    model = clip()
    add_lora(model, rank=2)
    averaged = {name: t.clone() for name, t in model.model.state_dict().items()}
    train(model, *inputs(model))
    model.save(tmp_path, averaged)  # of before training: the adapters were zero
    written = Clip.load(tmp_path).model.state_dict()
    for name, tensor in clip().model.state_dict().items():
        assert torch.allclose(written[name], tensor, atol=1e-6), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("vision", TOWERS)
def test_adapters_trained_by_fit_killed_and_resumed_equal_adapters_trained_unbroken(vision, tmp_path):
    def adapted():
        model = clip(vision)
        add_lora(model, rank=2, conv=True)
        if vision == "vit":
            model.set_patch_dropout(0.5)
        return model

    pixels, tokens = inputs(clip(vision))

    def batches(start):
        while True:
            yield {"pixels": pixels, "tokens": tokens}

    def loss_fn(model, batch, rng):
        image, text, scale = model(batch["pixels"], batch["tokens"])
        return nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3)), {}

    def die(done, total, **_):
        if done == 3:
            raise Killed

    config = FitConfig(steps=5, lr=1e-2, batch_size=3, ema=0.5, save_every=0.0)
    whole, resumed = adapted(), adapted()
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    unbroken = fit(whole, batches, loss_fn, config, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(adapted(), batches, loss_fn, config, tmp_path / "broken", on_progress=die)
    again = fit(resumed, batches, loss_fn, config, tmp_path / "broken")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert torch.equal(unbroken.averaged[name], again.averaged[name]), name
    plain, trained = clip(vision).state_dict(), whole.state_dict()
    frozen = plain.keys() & trained.keys() - {"model.logit_scale"}
    assert frozen and all(torch.equal(plain[name], trained[name]) for name in frozen)  # running statistics as well
