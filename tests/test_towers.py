import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clip_train.lora import add_lora
from clip_train.model import Clip, preprocess_config
from clip_train.settings import UserError
from clip_train.towers import Packing, is_quick

SIZE = 32
CAPTIONS = [
    "a red fox",
    "",
    "two hearts",
    "a caption that goes on and on past the end of this context",
    "fox",
    "a b c d",
]


def config(vision=(), text=(), **more):
    return {
        "embed_dim": 48,
        "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8, **dict(vision)},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2, **dict(text)},
        **more,
    }


def pair(cfg):
    """The same weights in our Clip and in open_clip's own class, and pixels and tokens for both."""
    torch.manual_seed(0)
    clip = Clip(cfg, preprocess_config(SIZE))
    kind = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
    theirs = kind(**{k: v for k, v in cfg.items() if k != "custom_text"})
    theirs.load_state_dict(clip.model.state_dict())
    pixels = torch.randint(0, 256, (len(CAPTIONS), 3, SIZE, SIZE), dtype=torch.uint8)
    return clip, theirs, pixels, clip.tokenize(CAPTIONS)


def loss_and_gradients(model, image, tokens):
    model.zero_grad()
    found, wanted = model.encode_image(image, normalize=True), model.encode_text(tokens, normalize=True)
    loss = open_clip.ClipLoss()(found, wanted, model.logit_scale.exp())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


KNOWN = {
    "class token": config(),
    "average": config({"pool_type": "avg"}),
    "norm after the pool": config({"pool_type": "avg", "final_ln_after_pool": True}),
    "class token, norm after the pool": config({"final_ln_after_pool": True}),
    "no first norm, fixed places, layer scale": config(
        {"no_ln_pre": True, "pos_embed_type": "sin_cos_2d", "ls_init_value": 0.1}, {"ls_init_value": 0.1}
    ),
    "quick gelu, wide epsilon": config({"norm_kwargs": {"eps": 1e-3}}, quick_gelu=True),
    "own text tower": config(custom_text=True),
    "own text tower, biased projection": config((), {"proj_bias": True}, custom_text=True),
    "no text projection": config({}, {"width": 48, "proj_type": "none"}),
    "one layer each": config({"layers": 1}, {"layers": 1}),
}


@pytest.mark.parametrize("cfg", KNOWN.values(), ids=KNOWN)
def test_loss_and_gradients_are_those_of_open_clip(cfg):
    clip, theirs, pixels, tokens = pair(cfg)
    assert is_quick(clip.model) == (True, True) and is_quick(theirs) == (False, False)
    image = (pixels - clip.mean) / clip.std
    wanted_loss, wanted = loss_and_gradients(theirs.train(), image, tokens)
    loss, found = loss_and_gradients(clip.model.train(), image, tokens)
    assert torch.allclose(loss, wanted_loss, atol=1e-5, rtol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error < 1e-5, name


UNKNOWN = {
    "attentional pool": (config({"attentional_pool": True}), (False, True)),
    "custom blocks": (config({"qk_norm": True}, {"scale_attn": True}), (False, False)),
    "convolutional tower": (config({"timm_model_name": "resnet10t"}), (False, True)),
    "own convolutional tower": (config({"layers": [1, 1, 1, 1], "width": 32, "head_width": 64}), (False, True)),
    "text pooled at its last token": (config((), {"pool_type": "last"}), (True, False)),
    "text without a causal mask": (config((), {"no_causal_mask": True}, custom_text=True), (True, False)),
    "text with a class token": (config((), {"embed_cls": True}, custom_text=True), (True, False)),
}


@pytest.mark.parametrize("cfg, quick", UNKNOWN.values(), ids=UNKNOWN)
def test_a_tower_of_another_kind_keeps_the_forward_of_open_clip(cfg, quick):
    clip, theirs, pixels, tokens = pair(cfg)
    assert is_quick(clip.model) == quick
    image, text, _ = clip.eval()(pixels, tokens)
    theirs.eval()
    with torch.no_grad():
        assert torch.allclose(image, theirs.encode_image((pixels - clip.mean) / clip.std, normalize=True), atol=1e-5)
        assert torch.allclose(text, theirs.encode_text(tokens, normalize=True), atol=1e-5)


def test_bf16_rows_point_where_the_exact_ones_do():
    clip, _, pixels, tokens = pair(config())
    with torch.no_grad():
        exact = clip(pixels, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            short = clip(pixels, tokens)
    for found, wanted in zip(short[:2], exact[:2], strict=True):
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found, wanted).min() > 0.999


def test_patch_dropout_leaves_out_the_patches_that_open_clip_would():
    clip, theirs, pixels, tokens = pair(config())
    clip.set_patch_dropout(0.5)
    theirs.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    image = (pixels - clip.mean) / clip.std
    rows = []
    for model in (clip.model.train(), theirs.train()):
        torch.manual_seed(3)
        rows.append(model.encode_image(image, normalize=True))
    assert torch.allclose(*rows, atol=1e-5)
    whole = clip.eval()(pixels, tokens)[0]
    assert not torch.allclose(rows[0], whole, atol=1e-3)  # it did leave out
    clip.train().set_patch_dropout(0)
    assert torch.allclose(clip(pixels, tokens)[0], whole, atol=1e-6)
    with pytest.raises(UserError, match="patch dropout 1 must be"):
        clip.set_patch_dropout(1)


def test_patch_dropout_of_a_tower_without_patches_is_refused_in_one_line():
    clip = Clip(config({"timm_model_name": "resnet10t"}), preprocess_config(SIZE))
    with pytest.raises(UserError, match="made of patches"):
        clip.set_patch_dropout(0.5)
    clip.set_patch_dropout(0)


def test_gradient_checkpointing_changes_no_gradient():
    clip, _, pixels, tokens = pair(config())
    image = (pixels - clip.mean) / clip.std
    clip.set_patch_dropout(0.25)
    runs = []
    for enable in (False, True):
        clip.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        runs.append(loss_and_gradients(clip.model.train(), image, tokens))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name]), name


def test_gradients_reach_the_adapters_of_wrapped_weights():
    clip, _, pixels, tokens = pair(config())
    before = clip(pixels, tokens)[0]
    add_lora(clip, rank=2)
    image, text, scale = clip(pixels, tokens)
    assert torch.allclose(image, before, atol=1e-6)  # the added matrices start at zero
    (scale * (image * text).sum()).backward()
    reached = {n for n, p in clip.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n for n, p in clip.named_parameters() if n.endswith(".up")} <= reached


def test_a_copy_computes_the_same_and_open_clips_intermediate_states_still_work():
    clip, theirs, pixels, tokens = pair(config())
    image = (pixels - clip.mean) / clip.std
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(clip)(pixels, tokens)[0], clip(pixels, tokens)[0])
        ours = clip.model.forward_intermediates(image, tokens)
        wanted = theirs.forward_intermediates(image, tokens)
    assert torch.allclose(ours["image_features"], wanted["image_features"], atol=1e-5)
    assert torch.allclose(ours["image_intermediates"][0], wanted["image_intermediates"][0], atol=1e-4)


def test_hooks_on_blocks_are_called_as_sharded_training_needs():
    clip, _, pixels, tokens = pair(config())
    called = []
    for tower in (clip.model.visual.transformer, clip.model.transformer):
        for block in tower.resblocks:
            block.register_forward_pre_hook(lambda *_: called.append(1))
    clip(pixels, tokens)
    assert len(called) == 5


def test_packed_rows_spread_back_to_where_they_stood():
    packing = Packing.of(torch.tensor([2, 1, 3]))
    rows = torch.arange(6.0)[:, None]
    assert packing.spread(rows)[..., 0].tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    assert torch.equal(packing.pack(packing.spread(rows)), rows)
    assert packing.ends.tolist() == [1, 2, 5]
