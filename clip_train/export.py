"""A clip/ folder in the formats of others: transformers' CLIPModel, and ONNX.

open_clip needs no export: it reads the clip/ folder itself, as "local-dir:clip". Both exports write plain files
(json, safetensors, onnx, text), and need neither transformers nor the network.
"""

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.model import WEIGHTS_FILE, Clip
from clip_train.settings import UserError
from clip_train.tensors import load_tensors, load_weights

HF_CONTEXT = 77  # positions that clients of CLIPModel count on; OpenAI's
START, END = "<|startoftext|>", "<|endoftext|>"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_OPSET = 18


def export_hf(clip: Path | str, out: Path | str) -> Manifest:
    """Write the folder that transformers' CLIPModel, CLIPProcessor and CLIPTokenizer load with from_pretrained.

    Embeddings are the same (CLIPModel leaves it to its caller to make them unit rows). A context shorter than 77 is
    padded with zero positions that no caption reaches: the tokenizer still cuts at the trained context.
    UserError: a model that CLIPModel cannot hold.
    """
    model = Clip.load(clip)
    config = hf_config(model.model_cfg, str(clip))
    work = _workspace(clip, model, out, "hf")
    if work.done:
        return work.done
    tensors, _ = load_tensors(Path(clip) / WEIGHTS_FILE)
    context = model.model_cfg["text_cfg"].get("context_length", 77)
    _write_tensors(
        work.path / "model.safetensors", hf_tensors(tensors, config["text_config"]["max_position_embeddings"])
    )
    _write_json(work.path / "config.json", config)
    _write_json(work.path / "preprocessor_config.json", hf_preprocessor(model.preprocess_cfg, model.image_size))
    write_tokenizer(work.path, context)
    bias = tensors.get("logit_bias")
    return work.publish({"context": context, "logit_bias_left_out": None if bias is None else float(bias)})


def hf_config(model_cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers' config.json of an open_clip model_cfg. UserError naming what CLIPModel has no place for."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    def refuse(what: str) -> UserError:
        return UserError(
            f"transformers' CLIPModel cannot hold {where}: {what}; use unclip export onnx, or open_clip, which reads "
            "the folder as it is"
        )

    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if vision.get("timm_model_name"):
        raise refuse(f"its vision tower is timm's {vision['timm_model_name']}")
    if text.get("hf_model_name"):
        raise refuse(f"its text tower is {text['hf_model_name']}")
    if model_cfg.get("custom_text"):
        raise refuse("it is a CustomTextCLIP")
    if not isinstance(vision.get("layers", 12), int):
        raise refuse("its vision tower is a ResNet")
    either = {"layers", "width", "mlp_ratio", "norm_kwargs"}
    fits = {
        "vision_cfg": (vision, CLIPVisionCfg, either | {"head_width", "patch_size", "image_size", "patch_dropout"}),
        "text_cfg": (text, CLIPTextCfg, either | {"context_length", "vocab_size", "heads", "pad_id", "eos_id"}),
    }
    for part, (given, kind, known) in fits.items():
        usual = {f.name: f.default for f in dataclasses.fields(kind)}
        for name, value in given.items():
            if name not in known and value != usual.get(name):
                raise refuse(f"{part} has {name} = {value}")
        if set(given.get("norm_kwargs") or {}) - {"eps"}:
            raise refuse(f"{part} has norm_kwargs = {given['norm_kwargs']}")

    def of(given: dict[str, Any], kind: type) -> dict[str, Any]:
        full = dataclasses.asdict(kind(**given))
        return {
            "hidden_size": full["width"],
            "intermediate_size": int(full["width"] * full["mlp_ratio"]),
            "num_hidden_layers": full["layers"],
            "num_attention_heads": full["width"] // full["head_width"] if "head_width" in full else full["heads"],
            "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
            "layer_norm_eps": (full["norm_kwargs"] or {}).get("eps", 1e-5),
            "projection_dim": model_cfg["embed_dim"],
            "attention_dropout": 0.0,
        }

    square = {name: vision.get(name, usual) for name, usual in (("image_size", 224), ("patch_size", 16))}
    for name, value in square.items():
        if not isinstance(value, int):
            if len(set(value)) != 1:
                raise refuse(f"vision_cfg has {name} = {value}, which is no square")
            square[name] = value[0]
    words = {
        "vocab_size": text.get("vocab_size", 49408),
        "max_position_embeddings": max(HF_CONTEXT, text.get("context_length", 77)),
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_cfg["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": {"model_type": "clip_text_model", **of(text, CLIPTextCfg), **words},
        "vision_config": {"model_type": "clip_vision_model", **of(vision, CLIPVisionCfg), **square, "num_channels": 3},
    }


def hf_tensors(tensors: dict[str, torch.Tensor], positions: int) -> dict[str, torch.Tensor]:
    """CLIPModel's tensors from open_clip's, both by name; the text tower's positions are padded to `positions`."""
    made: dict[str, torch.Tensor] = {}
    context = tensors["positional_embedding"]
    ends = {
        "logit_scale": tensors["logit_scale"].reshape(()),
        "text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": F.pad(context, (0, 0, 0, positions - len(context))),
        "text_projection.weight": tensors["text_projection"].T,
        "vision_model.embeddings.class_embedding": tensors["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": tensors["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": tensors["visual.positional_embedding"],
        "visual_projection.weight": tensors["visual.proj"].T,
    }
    norms = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",  # transformers' own spelling
        "vision_model.post_layernorm": "visual.ln_post",
    }
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer["self_attn.out_proj"] = "attn.out_proj"
    for kind in ("weight", "bias"):
        made |= {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for theirs, ours in norms.items()}
        for tower, stack in (("text_model", "transformer.resblocks"), ("vision_model", "visual.transformer.resblocks")):
            for i in range(_layers(tensors, stack)):
                block, ours = f"{tower}.encoder.layers.{i}", f"{stack}.{i}"
                made |= {f"{block}.{name}.{kind}": tensors[f"{ours}.{own}.{kind}"] for name, own in layer.items()}
                three = tensors[f"{ours}.attn.in_proj_{kind}"].chunk(3)
                made |= {f"{block}.self_attn.{n}_proj.{kind}": t for n, t in zip("qkv", three, strict=True)}
    return {name: tensor.float().contiguous() for name, tensor in (ends | made).items()}


def hf_preprocessor(preprocess_cfg: dict[str, Any], size: int) -> dict[str, Any]:
    """transformers' preprocessor_config.json: short side to `size` (bicubic), the middle, then mean and std."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
    }


def write_tokenizer(folder: Path, context: int) -> None:
    """vocab.json, merges.txt and the two json files that transformers' CLIPTokenizer reads, from open_clip's BPE.

    It pads with the end token where open_clip pads with 0: the causal tower never sees what follows the end.
    """
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    vocab = {
        token: i for token, i in tokenizer.encoder.items() if i not in (tokenizer.sot_token_id, tokenizer.eot_token_id)
    }
    vocab |= {START: tokenizer.sot_token_id, END: tokenizer.eot_token_id}  # open_clip spells these two otherwise
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_file(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
    write_file(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]).encode())
    _write_json(folder / "special_tokens_map.json", special)
    own = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, "do_lower_case": True, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", {**own, "add_prefix_space": False, **special})


def export_onnx(clip: Path | str, out: Path | str) -> Manifest:
    """Write image.onnx and text.onnx, both towers for any batch size, with what one needs to use them beside.

    image.onnx: "pixels" uint8 (B, 3, S, S), RGB, as they come out of the picture file, resized and cropped; the
    normalising is inside -> "image_embedding" float32 (B, D), unit rows. text.onnx: "tokens" int64 (B, T), padded with
    0 to the context T -> "text_embedding". config.json holds S, T, D and the logit scale; README.md an example. Any
    open_clip tower will do. What was written is run and compared with torch. UserError: the extra is not installed.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"unclip export onnx needs {', '.join(missing)}; install them: pip install 'unclip[onnx]'")
    model = Clip.load(clip)
    work = _workspace(clip, model, out, "onnx")
    if work.done:
        return work.done
    towers = _plain_towers(Path(clip), model)
    size, context = model.image_size, model.tokenizer.context_length
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 3, size, size), dtype=np.uint8))
    tokens = model.tokenize(["a", "a red fox", " ".join(["red fox"] * context)])
    agreement = {}
    for name, tower, sample in (("image", towers[0], pixels), ("text", towers[1], tokens)):
        path = work.path / f"{name}.onnx"
        _write_onnx(path, tower, sample, "pixels" if name == "image" else "tokens", f"{name}_embedding")
        agreement[f"{name}_cosine"] = _agreement(path, tower, sample)
    bias = model.model.logit_bias
    figures = {
        "image_size": size,
        "context_length": context,
        "embed_dim": model.embed_dim,
        "resize": "short side to image_size, bicubic (antialiased), then the middle square",
        "logit_scale": float(model.model.logit_scale.exp()),
        "logit_bias": None if bias is None else float(bias),
        "start_token": 49406,
        "end_token": 49407,
        "pad_token": 0,
        "clip": model.fingerprint,
    }
    _write_json(work.path / "config.json", figures)
    write_tokenizer(work.path, context)
    write_file(work.path / "README.md", ONNX_README.format(size=size, context=context, dim=model.embed_dim).encode())
    return work.publish(agreement)


ONNX_README = """# CLIP as two ONNX models

| file | input | output, float32 (B, {dim}), unit rows |
|---|---|---|
| `image.onnx` | `pixels` uint8 (B, 3, {size}, {size}): RGB 0..255, not normalised | `image_embedding` |
| `text.onnx` | `tokens` int64 (B, {context}): start, caption, end, zeros | `text_embedding` |

Cosines are inner products: `image @ text.T`. `config.json` holds the sizes and the logit scale (softmax over captions:
`softmax(logit_scale * cosines)`). Pictures are resized so that the short side is {size} (bicubic), then cropped to the
middle. The tokens are CLIP's byte pairs: `open_clip.SimpleTokenizer(context_length={context})`, or transformers'
`CLIPTokenizer` on this folder (it pads with 49407, which gives the same embeddings).

    import numpy as np, onnxruntime, open_clip
    from PIL import Image, ImageOps

    picture = ImageOps.fit(Image.open("fox.png").convert("RGB"), ({size}, {size}), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture).transpose(2, 0, 1)[None]
    tokens = open_clip.SimpleTokenizer(context_length={context})(["a red fox", "two hearts"]).numpy()
    image = onnxruntime.InferenceSession("image.onnx").run(None, {{"pixels": pixels}})[0]
    text = onnxruntime.InferenceSession("text.onnx").run(None, {{"tokens": tokens}})[0]
    print(image @ text.T)
"""


class _ImageTower(nn.Module):
    """uint8 pixels -> unit rows."""

    def __init__(self, model: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, nn.Buffer(mean), nn.Buffer(std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_image((pixels.float() - self.mean) / self.std), dim=-1)


class _TextTower(nn.Module):
    """Tokens -> unit rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_text(tokens), dim=-1)


def _plain_towers(folder: Path, clip: Clip) -> tuple[nn.Module, nn.Module]:
    """Both towers with open_clip's own forward: ours cuts captions by what they hold, which no fixed graph can say."""
    import open_clip

    kind = open_clip.CustomTextCLIP if clip.model_cfg.get("custom_text") else open_clip.CLIP
    plain = kind(**{k: v for k, v in clip.model_cfg.items() if k != "custom_text"})
    tensors, _ = load_tensors(folder / WEIGHTS_FILE)
    load_weights(plain, tensors, folder / WEIGHTS_FILE)
    plain = plain.float().eval().requires_grad_(False)
    return _ImageTower(plain, clip.mean, clip.std).eval(), _TextTower(plain).eval()


def _write_onnx(path: Path, tower: nn.Module, sample: torch.Tensor, name: str, result: str) -> None:
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's and onnxscript's about each other; the result is checked below
        program = torch.onnx.export(
            tower,
            (sample,),
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=[name],
            output_names=[result],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        program.save(path)


def _agreement(path: Path, tower: nn.Module, sample: torch.Tensor) -> float:
    """The smallest cosine between onnxruntime's rows and torch's, for the whole batch and for one row alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    least = 1.0
    for some in (sample, sample[:1]):
        (found,) = session.run(None, {given.name: some.numpy()})
        with torch.no_grad():
            least = min(least, float((torch.from_numpy(found).double() * tower(some).double()).sum(-1).min()))
    if not least > 0.99999:
        raise UserError(f"{path.name} differs from torch (cosine {least:.6f}); this torch cannot export this model")
    return least


def _workspace(clip: Path | str, model: Clip, out: Path | str, kind: str) -> Workspace:
    inputs = {"clip": Input(model.fingerprint, clip)}
    return Workspace.open(out, kind, {}, inputs, command=f"unclip export {kind}")


def _layers(tensors: dict[str, torch.Tensor], stack: str) -> int:
    return len({name[len(stack) + 1 :].split(".")[0] for name in tensors if name.startswith(f"{stack}.")})


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    write_file(path, save(tensors, {"format": "pt"}))  # transformers refuses files that do not say so


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_file(path, json.dumps(data, indent=2, ensure_ascii=False).encode())
