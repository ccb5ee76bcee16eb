import importlib.util
import json

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file

import cli
from clip_train import export
from clip_train.export import export_hf, export_onnx, hf_config
from clip_train.model import WEIGHTS_FILE, Clip, preprocess_config
from clip_train.settings import UserError
from clip_train.tensors import load_tensors

CAPTIONS = ["a red fox", "one of many", "x", "a caption that is longer than the context of this model by some tokens"]
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def saved(folder, **changes):
    """A CLIP folder in which every weight matters: no bias is 0 and no norm 1."""
    torch.manual_seed(0)
    clip = Clip({**CONFIG, **changes}, preprocess_config(16))
    with torch.no_grad():
        for name, weight in clip.named_parameters():
            if weight.ndim == 1 and name != "model.logit_scale":
                weight.add_(0.2 * torch.randn_like(weight))
        clip.model.token_embedding.weight.mul_(20)
        clip.model.positional_embedding.mul_(20)
    folder.mkdir(parents=True)
    clip.save(folder)
    return folder


def as_clip_model(folder, tokens=None, pixels=None):
    """transformers' CLIPModel.get_text_features / get_image_features, written out anew from its folder's files."""
    config, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def norm(x, name, c):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], c["layer_norm_eps"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def layers(x, tower, c, mask):
        act = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[c["hidden_act"]]
        for i in range(c["num_hidden_layers"]):
            at = f"{tower}.encoder.layers.{i}"
            y = norm(x, f"{at}.layer_norm1", c)
            q, k, v = (
                linear(y, f"{at}.self_attn.{n}_proj").unflatten(-1, (c["num_attention_heads"], -1)).transpose(1, 2)
                for n in "qkv"
            )
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
            x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{at}.self_attn.out_proj")
            y = act(linear(norm(x, f"{at}.layer_norm2", c), f"{at}.mlp.fc1"))
            x = x + linear(y, f"{at}.mlp.fc2")
        return x

    if tokens is not None:
        c, length = config["text_config"], tokens.shape[1]
        at = "text_model.embeddings"
        x = w[f"{at}.token_embedding.weight"][tokens] + w[f"{at}.position_embedding.weight"][:length]
        x = layers(x, "text_model", c, torch.full((length, length), -torch.inf).triu(1))
        x = norm(x, "text_model.final_layer_norm", c)
        ends = (tokens == c["eos_token_id"]).int().argmax(-1)
        return x[torch.arange(len(x)), ends] @ w["text_projection.weight"].T
    c, at = config["vision_config"], "vision_model.embeddings"
    patches = F.conv2d(pixels, w[f"{at}.patch_embedding.weight"], stride=c["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{at}.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = norm(x + w[f"{at}.position_embedding.weight"], "vision_model.pre_layrnorm", c)
    x = norm(layers(x, "vision_model", c, 0)[:, 0], "vision_model.post_layernorm", c)
    return x @ w["visual_projection.weight"].T


def padded(tokens, to):
    """Tokens as transformers' tokenizer pads them: the end token again and again."""
    tokens = F.pad(tokens, (0, to - tokens.shape[1]))
    return torch.where(torch.arange(to) > tokens.argmax(-1, keepdim=True), 49407, tokens)


@pytest.mark.parametrize("quick", [False, True])
def test_the_transformers_folder_computes_what_the_clip_computes(tmp_path, quick):
    folder = saved(tmp_path / "clip", quick_gelu=quick)
    export_hf(folder, tmp_path / "hf")
    clip = Clip.load(folder)
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = as_clip_model(tmp_path / "hf", pixels=(pixels - clip.mean) / clip.std)
    torch.testing.assert_close(F.normalize(image, dim=-1), clip.encode_image(pixels), atol=1e-5, rtol=0)
    tokens = clip.tokenize(CAPTIONS)
    text = as_clip_model(tmp_path / "hf", tokens=padded(tokens, 16))
    torch.testing.assert_close(F.normalize(text, dim=-1), clip.encode_text(CAPTIONS), atol=1e-5, rtol=0)
    other = as_clip_model(tmp_path / "hf", tokens=padded(clip.tokenize(["two hearts"] * 4), 16))
    assert (text - other).abs().max() > 0.1  # the captions do make a difference


def test_a_context_padded_to_77_changes_no_caption(tmp_path):
    export_hf(saved(tmp_path / "clip"), tmp_path / "hf")
    clip = Clip.load(tmp_path / "clip")
    positions = load_file(tmp_path / "hf/model.safetensors")["text_model.embeddings.position_embedding.weight"]
    assert positions.shape == (77, 32) and (positions[16:] == 0).all() and (positions[:16] != 0).any(1).all()
    long = as_clip_model(tmp_path / "hf", tokens=padded(clip.tokenize(CAPTIONS), 77))
    torch.testing.assert_close(F.normalize(long, dim=-1), clip.encode_text(CAPTIONS), atol=1e-5, rtol=0)


def test_transformers_itself_agrees_where_it_is_installed(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_hf(saved(tmp_path / "clip"), tmp_path / "hf")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")(
        CAPTIONS, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        text = model.get_text_features(**tokens)
    text = getattr(text, "pooler_output", text)
    truth = Clip.load(tmp_path / "clip").encode_text(CAPTIONS)
    torch.testing.assert_close(F.normalize(text, dim=-1), truth, atol=1e-5, rtol=0)


def test_every_weight_goes_out_once_and_the_scale_with_it(tmp_path):
    export_hf(saved(tmp_path / "clip", init_logit_bias=-10.0), tmp_path / "hf")
    own, _ = load_tensors(tmp_path / "clip" / WEIGHTS_FILE)
    made = load_file(tmp_path / "hf/model.safetensors")
    total = sum(t.numel() for t in own.values()) - 1  # all but the logit bias
    assert sum(t.numel() for t in made.values()) == total + (77 - 16) * 32
    assert made["logit_scale"].shape == () and made["logit_scale"] == own["logit_scale"]
    assert sum(t.double().abs().sum().item() for t in made.values()) == pytest.approx(
        sum(t.double().abs().sum().item() for name, t in own.items() if name != "logit_bias")
    )


def test_the_tokenizer_files_are_clips_own(tmp_path):
    export.write_tokenizer(tmp_path, 16)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    version, *merges, last = (tmp_path / "merges.txt").read_text().split("\n")
    assert (
        version == "#version: 0.2" and last == "" and len(merges) == 48894 and sorted(vocab.values()) == [*range(49408)]
    )
    # OpenAI's order: 256 bytes, the same at the end of a word, one token a merge, and the two special ones
    assert all(vocab["".join(pair.split(" "))] == 512 + i for i, pair in enumerate(merges))
    assert (
        vocab["!"] == 0
        and vocab["!</w>"] == 256
        and vocab["<|startoftext|>"] == 49406
        and vocab["<|endoftext|>"] == 49407
    )
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 16 and settings["pad_token"] == "<|endoftext|>"


def test_the_preprocessor_says_what_to_pixels_does(tmp_path):
    export_hf(saved(tmp_path / "clip"), tmp_path / "hf")
    said = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert said["size"] == {"shortest_edge": 16} and said["crop_size"] == {"height": 16, "width": 16}
    assert said["resample"] == 3 and said["rescale_factor"] == 1 / 255  # PIL's number of bicubic
    assert said["image_mean"] == preprocess_config(16)["mean"] and said["image_std"] == preprocess_config(16)["std"]


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("vision_cfg", {"timm_model_name": "resnet10t"}, "timm's resnet10t"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg has pool_type = avg"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "a ResNet"),
        ("vision_cfg", {"image_size": [16, 24]}, "no square"),
        ("vision_cfg", {"no_ln_pre": True}, "no_ln_pre"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "roberta-base"),
        ("text_cfg", {"no_causal_mask": True}, "no_causal_mask"),
        ("text_cfg", {"ls_init_value": 0.1}, "ls_init_value"),
        (None, {"custom_text": True}, "CustomTextCLIP"),
    ],
)
def test_what_clip_model_cannot_hold_is_refused_by_name(part, change, words):
    config = {**CONFIG, **change} if part is None else {**CONFIG, part: {**CONFIG[part], **change}}
    with pytest.raises(UserError, match=f"cannot hold clip: .*{words}.*unclip export onnx") as told:
        hf_config(config, "clip")
    assert "\n" not in str(told.value)


def test_settings_that_are_said_but_usual_are_no_hindrance():
    usual = {"pool_type": "tok", "timm_pool": "avg", "ls_init_value": None, "norm_kwargs": {"eps": 1e-6}}
    made = hf_config({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **usual}}, "clip")["vision_config"]
    assert made["layer_norm_eps"] == 1e-6 and made["num_attention_heads"] == 3 and made["intermediate_size"] == 96
    assert hf_config(CONFIG, "clip")["text_config"]["max_position_embeddings"] == 77
    assert hf_config(CONFIG, "clip")["text_config"]["hidden_act"] == "gelu"


def test_an_export_is_made_once_and_another_clip_is_not_written_over_it(tmp_path):
    folder = saved(tmp_path / "clip")
    first = CliRunner().invoke(cli.cli, ["export", "hf", str(folder), "--out", str(tmp_path / "hf")])
    assert first.exit_code == 0 and "cut at 16 tokens" in first.stderr
    before = (tmp_path / "hf/model.safetensors").stat().st_mtime_ns
    export_hf(folder, tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made from other clip"):
        export_hf(tiny.clip(tmp_path / "other"), tmp_path / "hf")


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    missing = lambda name: None if name == "onnxscript" else importlib.util.spec_from_loader(name, None)  # noqa: E731
    monkeypatch.setattr(export.importlib.util, "find_spec", missing)
    with pytest.raises(UserError, match=r"needs onnxscript; install them: pip install 'unclip\[onnx\]'"):
        export_onnx(tmp_path / "clip", tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_both_onnx_towers_agree_with_torch_at_any_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = saved(tmp_path / "clip")
    made = CliRunner().invoke(cli.cli, ["export", "onnx", str(folder), "--out", str(tmp_path / "onnx")])
    assert made.exit_code == 0, made.output
    clip, said = Clip.load(folder), json.loads((tmp_path / "onnx/config.json").read_text())
    assert said["image_size"] == 16 and said["context_length"] == 16 and said["embed_dim"] == 32
    assert said["logit_scale"] == pytest.approx(1 / 0.07) and said["logit_bias"] is None
    towers = {
        name: onnxruntime.InferenceSession(tmp_path / f"onnx/{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("image", "text")
    }
    rng = np.random.default_rng(1)
    for count in (1, 2, 5):
        pixels = rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
        (image,) = towers["image"].run(["image_embedding"], {"pixels": pixels})
        np.testing.assert_allclose(image, clip.encode_image(torch.from_numpy(pixels)), atol=1e-5)
        captions = (CAPTIONS * 2)[:count]
        tokens = clip.tokenize(captions)
        (text,) = towers["text"].run(["text_embedding"], {"tokens": tokens.numpy()})
        np.testing.assert_allclose(text, clip.encode_text(captions), atol=1e-5)
        (ended,) = towers["text"].run(None, {"tokens": padded(tokens, 16).numpy()})  # as transformers pads
        np.testing.assert_allclose(ended, text, atol=1e-6)
    assert "onnxruntime" in (tmp_path / "onnx/README.md").read_text()


def test_a_clip_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere/open_clip_config.json does not exist"):
        export_hf(tmp_path / "nowhere", tmp_path / "hf")
