import pytest
import torch

from clip_train.depth import depths
from clip_train.lora import add_lora
from clip_train.model import Clip, preprocess_config
from clip_train.settings import UserError

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


def clip(vision=VIT, **more):
    size = vision["image_size"]
    return Clip({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT, **more}, preprocess_config(size))


def test_the_rate_falls_by_the_decay_with_every_layer_below_the_projection():
    scales = clip(init_logit_bias=-10).lr_scales(0.5)
    expected = {
        "visual.proj": 1,
        "visual.ln_post.weight": 1 / 2,
        "visual.transformer.resblocks.1.attn.in_proj_weight": 1 / 2,
        "visual.transformer.resblocks.0.mlp.c_fc.bias": 1 / 4,
        "visual.conv1.weight": 1 / 8,
        "visual.class_embedding": 1 / 8,
        "visual.positional_embedding": 1 / 8,
        "visual.ln_pre.bias": 1 / 8,
        "text_projection": 1,
        "ln_final.weight": 1 / 2,
        "transformer.resblocks.2.ln_1.weight": 1 / 2,
        "transformer.resblocks.0.ln_1.weight": 1 / 8,
        "token_embedding.weight": 1 / 16,
        "positional_embedding": 1 / 16,
        "logit_scale": 1,
        "logit_bias": 1,
    }
    assert {name: scales[f"model.{name}"] for name in expected} == expected


def test_every_weight_has_a_rate_under_the_name_that_training_knows():
    adapted = clip()
    add_lora(adapted, rank=1)
    own = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    for model in (clip(), clip(custom_text=True), clip(RESNET), clip(own), adapted):
        assert model.lr_scales(0.9).keys() == dict(model.named_parameters()).keys()
    assert adapted.lr_scales(0.5)["model.transformer.resblocks.2.attn.parametrizations.in_proj_weight.0.up"] == 0.5


def test_a_decay_that_is_none_is_refused():
    for decay in (0, -1, 1.5):
        with pytest.raises(UserError, match="layer-wise decay"):
            clip().lr_scales(decay)


def test_stages_of_a_timm_tower_are_its_depths():
    found = depths(clip(RESNET).model)["image"]
    wanted = {"conv1.0.weight": 0, "bn1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.0.bn2.bias": 4}
    assert {name: found[f"visual.trunk.{name}"] for name in wanted} == wanted
    assert found["visual.head.proj.weight"] == 5


def test_a_locked_tower_trains_its_last_groups_alone():
    model = clip()
    model.lock("image", unlocked_groups=2)  # the projection and the last block with the norm after it
    trained = {name for name, p in model.model.visual.named_parameters() if p.requires_grad}
    last = {n for n, _ in model.model.visual.named_parameters() if n.startswith("transformer.resblocks.1.")}
    assert trained == {"proj", "ln_post.weight", "ln_post.bias"} | last
    assert all(p.requires_grad for n, p in model.model.named_parameters() if not n.startswith("visual."))
    model = clip(custom_text=True)
    model.lock("text")
    assert not any(p.requires_grad for p in model.model.text.parameters())
    assert all(p.requires_grad for p in model.model.visual.parameters())
    assert model.model.logit_scale.requires_grad
    with pytest.raises(UserError, match="no tower 'both'"):
        model.lock("both")


def test_locking_agrees_with_open_clips_own():
    for groups in (0, 1, 2, 3):
        ours, theirs = clip(), clip().model
        ours.lock("image", groups)
        ours.lock("text", groups)
        theirs.lock_image_tower(groups)
        theirs.lock_text_tower(groups)
        locked = {name for name, p in theirs.named_parameters() if not p.requires_grad}
        assert {name for name, p in ours.model.named_parameters() if not p.requires_grad} == locked


def test_the_running_statistics_of_locked_layers_stay_through_training():
    model = clip(RESNET)
    model.lock("image", unlocked_groups=2)  # projection and last stage
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items() if "running" in name}
    model(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), model.tokenize(["a", "b", "c", "d"]))
    moved = {name for name, t in before.items() if not torch.equal(t, model.state_dict()[name])}
    assert moved == {name for name in before if ".layer4." in name} and moved
