import json
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from clip_train.model import Clip, preprocess_config
from clip_train.settings import UserError

TINY = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
CAPTIONS = ["a red fox", "two", "a very long caption that goes on and on and on past the end of the short context"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    Clip(TINY, preprocess_config(32)).save(folder)
    return folder


def test_the_folder_loads_in_open_clip_bit_equal_and_encodes_the_same(folder):
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    clip = Clip.load(folder)
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(tokenizer(CAPTIONS), clip.tokenize(CAPTIONS))

    picture = Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    from clip_train.pictures import to_pixels

    pixels = to_pixels(picture, 32)[None]
    with torch.no_grad():
        theirs = model.encode_image(transform(picture)[None], normalize=True)
        assert torch.allclose(clip.encode_image(pixels), theirs, atol=2e-6)
        assert torch.allclose(
            clip.encode_text(CAPTIONS), model.encode_text(tokenizer(CAPTIONS), normalize=True), atol=2e-6
        )


def test_convolutional_towers_encode_as_in_open_clip(tmp_path):
    import open_clip

    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    clip = Clip({**TINY, "vision_cfg": vision}, preprocess_config(32))
    clip.save(tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        theirs = model.encode_image((pixels - clip.mean) / clip.std, normalize=True)
    assert torch.allclose(Clip.load(tmp_path).encode_image(pixels), theirs, atol=1e-5)


def test_a_resnet_of_open_clip_comes_back_from_its_folder(tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    clip = Clip({**TINY, "vision_cfg": vision}, preprocess_config(32)).eval()
    clip.save(tmp_path)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(Clip.load(tmp_path).encode_image(pixels), clip.encode_image(pixels))


def test_no_config_of_open_clips_list_is_taken_for_malformed(tmp_path, monkeypatch):
    import open_clip

    class Built(Exception):
        pass

    monkeypatch.setattr(Clip, "__init__", Mock(side_effect=Built))  # the config was accepted
    names = open_clip.list_models()
    assert len(names) > 100
    for name in names:
        config = open_clip.get_model_config(name)
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        with pytest.raises(Built):
            Clip.load(tmp_path)


def test_embeddings_are_unit_rows_of_the_space(folder):
    clip = Clip.load(folder)
    rows = clip.encode_text(CAPTIONS)
    assert rows.shape == (3, 512) and rows.dtype == torch.float32
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6)


def test_an_embedding_does_not_depend_on_its_neighbours_in_the_batch(folder):
    clip = Clip.load(folder)
    together = clip.encode_text(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):  # alone, a short caption is cut to fewer tokens
        assert torch.allclose(clip.encode_text([caption])[0], together[i], atol=1e-6)


def test_the_state_of_the_end_token_projects_to_the_text_embedding(folder):
    clip = Clip.load(folder)
    states, real = clip.text_states(CAPTIONS)
    assert real.sum(1).tolist() == [5, 3, 16]
    last = states[torch.arange(3), real.sum(1) - 1] @ clip.model.text_projection
    assert torch.allclose(torch.nn.functional.normalize(last, dim=-1), clip.encode_text(CAPTIONS), atol=1e-5)


def test_a_caption_of_ten_thousand_characters_and_an_empty_one_are_read(folder):
    rows = Clip.load(folder).encode_text(["word " * 2000, ""])
    assert torch.isfinite(rows).all()


def test_the_temperature_is_clamped_at_one_hundredth(folder):
    clip = Clip(TINY, preprocess_config(32))
    clip.model.logit_scale.data.fill_(9.0)
    clip.clamp_temperature()
    assert clip.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_model_with_a_bias_returns_it_and_keeps_it_in_its_folder(tmp_path):
    clip = Clip({**TINY, "init_logit_bias": -10.0, "init_logit_scale": 0.0}, preprocess_config(32))
    image, text, scale, bias = clip(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), clip.tokenize(["a", "b"]))
    assert bias.item() == -10 and scale.item() == 1 and bias.shape == scale.shape == ()
    bias.backward()
    assert clip.model.logit_bias.grad.item() == 1
    clip.save(tmp_path)
    assert Clip.load(tmp_path).model.logit_bias.item() == -10
    import open_clip

    assert open_clip.create_model(f"local-dir:{tmp_path}").logit_bias.item() == -10


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """open_clip's list with weights "here" for a model "tiny-vit", whose file lies in tmp_path, and "away", nowhere."""
    import open_clip

    torch.manual_seed(1)
    model = open_clip.CLIP(**TINY, quick_gelu=True)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    here = {"file": str(tmp_path / "weights.bin"), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    here |= {"interpolation": "bicubic", "resize_mode": "shortest", "quick_gelu": True}
    tags = {"here": here, "away": here | {"file": None}, "squash": here | {"resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", TINY)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)
    return model


def test_weights_of_open_clips_list_become_a_clip_with_their_own_preprocessing(listed, tmp_path):
    clip = Clip.pretrained("tiny-vit:here")
    for name, tensor in listed.state_dict().items():
        assert torch.equal(clip.model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in clip.parameters()) and not clip.training
    assert clip.preprocess_cfg["mean"] == [0.5, 0.5, 0.5] and clip.image_size == 32
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():  # quick GELU, as these weights were trained
        theirs = listed.eval().encode_image((pixels / 255 - 0.5) / 0.25, normalize=True)
    assert torch.allclose(clip.encode_image(pixels), theirs, atol=1e-5)
    (tmp_path / "clip").mkdir()
    clip.save(tmp_path / "clip")
    again = Clip.pretrained(tmp_path / "clip")
    assert torch.equal(again.encode_image(pixels), clip.encode_image(pixels)) and again.fingerprint != ""
    assert Clip.pretrained(f"local-dir:{tmp_path / 'clip'}").fingerprint == again.fingerprint


def test_weights_that_cannot_be_had_are_refused_in_one_line(listed, tmp_path, monkeypatch):
    import open_clip

    with pytest.raises(UserError, match="no weights 'there' for tiny-vit; there are: here, away, squash"):
        Clip.pretrained("tiny-vit:there")
    with pytest.raises(UserError, match="no weights for a model 'ViT-B-23'.*ViT-B-32"):
        Clip.pretrained("ViT-B-23:openai")
    with pytest.raises(UserError, match="nowhere/ does not exist; give a clip/ folder, or"):
        Clip.pretrained("nowhere")
    with pytest.raises(UserError, match="this model wants bicubic, squash"):
        Clip.pretrained("tiny-vit:squash")
    with pytest.raises(UserError, match="text tower that unclip does not train"):
        Clip.pretrained("coca_ViT-B-32:laion2b_s13b_b90k")

    def no_network(_):
        raise OSError("we couldn't connect to 'https://some.host'")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(UserError, match="cannot fetch tiny-vit:away .*couldn't connect.*copy its cache"):
        Clip.pretrained("tiny-vit:away")


def test_weights_of_another_shape_than_the_list_says_are_refused_by_name(listed, tmp_path):
    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "weights.bin")
    with pytest.raises(UserError, match="weights.bin does not hold tiny-vit:here"):
        Clip.pretrained("tiny-vit:here")


def test_a_model_with_another_tokenizer_is_refused_before_its_weights_are_fetched(monkeypatch):
    import open_clip

    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: pytest.fail("fetched"))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "t5", TINY | {"text_cfg": {"hf_tokenizer_name": "t5"}})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "t5", {"a": {"file": "x"}})
    with pytest.raises(UserError, match="t5 tokenizer"):
        Clip.pretrained("t5:a")


def test_folders_that_hold_no_usable_model_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist; train one"):
        Clip.load(tmp_path / "missing")
    Clip(TINY, preprocess_config(32)).save(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 256
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_projection.*512.*256|visual.proj"):
        Clip.load(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="not an open_clip config"):
        Clip.load(tmp_path)
    (folder / "open_clip_config.json").replace(tmp_path / "open_clip_config.json")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="damaged or not a safetensors"):
        Clip.load(tmp_path)


def test_a_coca_embeds_as_in_open_clip_but_is_not_trained(tmp_path):
    import open_clip

    text = {**TINY["text_cfg"], "context_length": 16, "embed_cls": True, "output_tokens": True}
    vision = {**TINY["vision_cfg"], "attentional_pool": True, "output_tokens": True, "attn_pooler_heads": 4}
    decoder = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    clip = Clip(
        {**TINY, "text_cfg": text, "vision_cfg": vision, "multimodal_cfg": decoder, "custom_text": True},
        preprocess_config(32),
    )
    clip.save(tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert type(model).__name__ == "CoCa"
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        image = model.encode_image((pixels - clip.mean) / clip.std, normalize=True)
        text = model.encode_text(clip.tokenize(CAPTIONS), normalize=True)
    for made in (Clip.load(tmp_path), Clip.load(f"local-dir:{tmp_path}").for_inference("auto")):
        assert torch.nn.functional.cosine_similarity(made.encode_image(pixels), image).min() >= 0.9999
        assert torch.nn.functional.cosine_similarity(made.encode_text(CAPTIONS), text).min() >= 0.9999
    with pytest.raises(UserError, match="text tower that unclip does not train"):
        Clip.pretrained(tmp_path)


def test_a_named_model_is_loaded_for_use_whatever_its_way_to_resize(listed):
    clip = Clip.load("tiny-vit:squash")
    assert not any(p.requires_grad for p in clip.parameters()) and clip.picture_shape == (32, 32)
    assert clip.to_pixels(Image.new("RGB", (80, 40), "red")).shape == (3, 32, 32)
    with pytest.raises(UserError, match="this model wants bicubic, squash"):
        _ = clip.image_size


def test_pictures_that_are_not_square_are_resized_as_open_clip_does():
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from clip_train.model import pixel_maker

    picture = Image.effect_mandelbrot((50, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    for how in ({"size": [48, 32]}, {"resize_mode": "longest"}, {"interpolation": "bilinear", "resize_mode": "squash"}):
        cfg = preprocess_config(32) | how
        wanted = image_transform_v2(PreprocessCfg(**cfg), is_train=False)(picture)
        mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        assert torch.allclose((pixel_maker(cfg)(picture) / 255 - mean) / std, wanted, atol=1e-6)


def test_a_tokenizer_of_transformers_names_the_package_where_it_is_not_installed(monkeypatch):
    from open_clip import tokenizer

    text = {**TINY["text_cfg"], "hf_tokenizer_name": "some/t5"}
    clip = Clip({**TINY, "text_cfg": text}, preprocess_config(32))
    monkeypatch.setattr(tokenizer, "HFTokenizer", lambda *_, **__: __import__("no_such_transformers"))
    with pytest.raises(UserError, match="some/t5 tokenizer, which needs: pip install transformers"):
        clip.encode_text(["x"])
