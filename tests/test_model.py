import json

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


def test_the_folder_loads_in_open_clip_and_encodes_bit_equal(folder):
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
        # bit equal when both get the same tensor and the same attention kernel
        plain = (pixels - clip.mean) / clip.std
        assert torch.equal(clip.model.encode_image(plain), model.encode_image(plain))
        assert torch.allclose(
            clip.encode_text(CAPTIONS), model.encode_text(tokenizer(CAPTIONS), normalize=True), atol=2e-6
        )


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
