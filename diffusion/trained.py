"""Trained folders of this room: presets, and config.json + model.safetensors written and read again."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train import ranks
from clip_train.fit import FitConfig, FitResult
from clip_train.folder import Manifest, Workspace, read_manifest, write_file
from clip_train.settings import UserError, config_from_json, config_to_json, override
from clip_train.store import EmbeddingStore
from clip_train.tensors import load_tensors, load_weights, save_tensors
from diffusion.decoder import DecoderConfig, DecoderDenoiser
from diffusion.denoiser import Denoiser
from diffusion.prior import PriorConfig, PriorDenoiser
from diffusion.schedule import DENSITIES


@dataclass(frozen=True)
class Preset:
    """A model and a schedule that belong together, and what they are for."""

    about: str
    config: PriorConfig | DecoderConfig
    fit: FitConfig


def settings(presets: dict[str, Preset], name: str = "tiny", pairs: Sequence[str] = ()) -> list:
    """The two configs of a preset out of PRIOR_PRESETS or DECODER_PRESETS, with --set pairs applied."""
    if name not in presets:
        raise UserError(f"no preset {name!r}; there are: {', '.join(presets)}")
    return override([presets[name].config, presets[name].fit], pairs)


def density_of(config: PriorConfig | DecoderConfig) -> Callable[[Tensor], Tensor]:
    """The config's noise-level density: u in (0, 1) -> sigma."""
    if config.density == "log_normal":
        return lambda u: DENSITIES["log_normal"](u, config.sigma_mean, config.sigma_std)
    return DENSITIES[config.density]


def load_prior(folder: Path | str, device: torch.device | str = "cpu") -> tuple[PriorDenoiser, Manifest]:
    """A diffusion prior's folder, ready for use; baselines.open_prior opens the other kind as well."""
    kind = kind_of(folder)
    if kind == "contrastive":
        raise UserError(f"{folder}/ holds a contrastive prior; a diffusion prior is needed here: unclip train prior")
    if not kind:  # its weights would load, and mean something else
        raise UserError(f"{folder}/ is of a version whose prior was not causal; train it again: unclip train prior")
    manifest, config = saved(folder, "prior", PriorConfig)
    return ready(PriorDenoiser(config), folder, device), manifest


def kind_of(folder: Path | str) -> str:
    """What a prior folder holds: "diffusion" or "contrastive"; "" if it was made before there were two."""
    try:
        return json.loads((Path(folder) / "config.json").read_text()).get("kind", "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "diffusion"  # saved() says what is wrong


def load_decoder(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Denoiser, Manifest]:
    """A decoder folder, ready for use."""
    manifest, config = saved(folder, "decoder", DecoderConfig)
    return ready(DecoderDenoiser(config), folder, device), manifest


def saved(folder: Path | str, kind: str, cls: type) -> tuple[Manifest, Any]:
    """The manifest and the config, an instance of `cls`, of a trained folder of that kind."""
    manifest, path = read_manifest(folder, kind), Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); train again: unclip train {kind}") from error
    return manifest, config_from_json(cls, data, str(path))


def ready(denoiser: Denoiser, folder: Path | str, device: torch.device | str) -> Any:
    """The model with the folder's weights, on the device, in eval mode, without gradients."""
    path = Path(folder) / "model.safetensors"
    load_weights(denoiser, load_tensors(path)[0], path)
    return denoiser.to(device).eval().requires_grad_(False)


def publish(
    space: Workspace, denoiser: Denoiser, config: PriorConfig | DecoderConfig, result: FitResult, notes: dict
) -> Manifest:
    """Save the averaged weights (the last ones where there is no average) and finish the folder."""
    manifest = None
    if ranks.is_main():
        save_tensors(space.path / "model.safetensors", result.averaged or denoiser.state_dict())
        write_file(space.path / "config.json", json.dumps(config_to_json(config), indent=1).encode())
        manifest = space.publish({"steps": result.steps, "seconds": result.seconds, "loss": result.loss} | notes)
    return ranks.broadcast(manifest)


def refuse_other_clip(store: EmbeddingStore, embeddings: Path | str, made: Manifest, folder: Path | str) -> None:
    """UserError unless the embeddings and what was trained (its manifest `made`, its folder) share a CLIP."""
    if store.manifest.inputs["clip"]["fingerprint"] != made.inputs["clip"]["fingerprint"]:
        raise UserError(
            f"{embeddings}/ and {folder}/ were made with different CLIPs; embed again with the latter's: "
            f"unclip embed --clip {made.input_path('clip') or 'clip'}"
        )
