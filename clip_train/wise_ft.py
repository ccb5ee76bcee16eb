"""WiSE-FT: mix the weights of a model and its fine-tuned self (Wortsman et al. 2021, arXiv 2109.01903).

(1 - alpha) base + alpha tuned, for every weight: often better on the new data than the tuned model, and on all that the
base could do before. The sweep says what each alpha is worth; one is written as a clip/ folder.
"""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clip_train import zeroshot
from clip_train.evaluate import Validation
from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.model import Clip
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet

ALPHAS = tuple(i / 10 for i in range(11))
TABLE, PLOT = "wise_ft.json", "wise_ft.png"


def mix(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """(1 - alpha) base + alpha tuned, name by name; alpha 0 and 1 give exactly the one and the other.

    The running mean and variance of BatchNorm layers are mixed like weights, which is near but not what a pass over the
    data would give; counters are the tuned model's. The temperature is mixed as its logarithm, as it is stored.
    """
    if alpha in (0, 1):
        return dict(tuned if alpha else base)
    return {n: base[n].lerp(t.to(base[n].dtype), alpha) if t.is_floating_point() else t for n, t in tuned.items()}


def wise_ft(
    base: str | Path,
    tuned: str | Path,
    shards: str | Path,
    out: str | Path,
    *,
    alphas: Sequence[float] = ALPHAS,
    alpha: float | None = None,
    keep_shards: str | Path | None = None,
    keep_loss: float = 0.01,
    metric: str = "",
    classnames: Sequence[str] | None = None,
    keep_classnames: Sequence[str] | None = None,
    templates: Sequence[str] = zeroshot.TEMPLATES,
    label_field: str = "label",
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> Manifest:
    """Measure the mixes of `base` and `tuned` (folders, or what Clip.pretrained takes) and write one as a clip/ folder.

    Every alpha of `alphas`, 0 and 1, is measured on `shards` (kept from the fine-tuning) and on `keep_shards`, whose
    scores are not to be lost. alpha: the mix to write; None: best() of them. metric: see evaluate.Validation; "":
    zero_shot_acc1 where all shards have classes, else t2i_R@1. Writes wise_ft.json and wise_ft.png beside the weights;
    the manifest's result holds "alpha", "metric" and "table". UserError: models that do not fit, an unknown metric.
    """
    wanted = sorted({0.0, 1.0, *alphas, *([] if alpha is None else [alpha])})
    if not all(0 <= a <= 1 for a in wanted):
        raise UserError(f"alphas {', '.join(f'{a:g}' for a in wanted if not 0 <= a <= 1)} must be in [0, 1]")
    if not 0 <= keep_loss <= 1:
        raise UserError(f"keep_loss {keep_loss:g} must be in [0, 1]")
    models = [Clip.pretrained(spec).requires_grad_(False) for spec in (base, tuned)]
    _refuse_strangers(*models, base, tuned)
    sets = {"target": (ShardSet(shards), classnames)}
    if keep_shards is not None:
        sets["kept"] = (ShardSet(keep_shards), keep_classnames)
    inputs = {"base": Input(models[0].fingerprint, base), "tuned": Input(models[1].fingerprint, tuned)}
    inputs["shards"] = Input(sets["target"][0].fingerprint, shards)
    if keep_shards is not None:
        inputs["keep_shards"] = Input(sets["kept"][0].fingerprint, keep_shards)
    config = {"alphas": wanted, "alpha": alpha, "keep_loss": keep_loss, "metric": metric, "label_field": label_field}
    config |= {"classnames": list(classnames or ()), "keep_classnames": list(keep_classnames or ())}
    config |= {"templates": list(templates)}
    work = Workspace.open(out, "clip", config, inputs, "unclip wise-ft")
    if work.done:
        return work.done

    validations = {
        name: Validation(
            samples,
            models[0],
            label_field=label_field,
            classnames=names,
            templates=templates,
            max_samples=len(samples),
            on_progress=on_progress,
        )
        for name, (samples, names) in sets.items()
    }
    weights = [{name: t.clone() for name, t in model.model.state_dict().items()} for model in models]
    clip = models[0].to(device)
    table: list[dict[str, Any]] = []
    for a in wanted:
        clip.model.load_state_dict(mix(*weights, a))
        table.append({"alpha": a, **{name: measure(clip) for name, measure in validations.items()}})
        metric = metric or _metric(table[0])
        chosen = best(table, metric, keep_loss)  # each time, so that an unknown metric is refused at once
        if on_progress:
            on_progress(len(table), len(wanted), part="mixes")
    chosen = chosen if alpha is None else alpha
    result = {"alpha": chosen, "metric": metric, "table": table}

    clip.save(work.path, mix(*weights, chosen))
    write_file(work.path / TABLE, json.dumps(result, indent=1).encode())
    write_file(work.path / PLOT, plot(table, metric, chosen))
    return work.publish(result)


def best(table: Sequence[dict[str, Any]], metric: str, keep_loss: float = 0.01) -> float:
    """The alpha of the highest target score, of those that lose no more than `keep_loss` of the base's kept score.

    table: rows of {"alpha", "target": {metric: score}, and maybe "kept"}, one of them of alpha 0. Of equal scores the
    smallest alpha wins. UserError for a metric that was not measured.
    """
    for name in ("target", "kept"):
        if name in table[0] and metric not in table[0][name]:
            raise UserError(f"no metric {metric!r} of the {name} shards; there are: {', '.join(table[0][name])}")
    least = -math.inf
    if "kept" in table[0]:
        least = next(row["kept"][metric] for row in table if row["alpha"] == 0) - keep_loss
    allowed = [row for row in table if "kept" not in row or row["kept"][metric] >= least]
    return max(allowed, key=lambda row: (row["target"][metric], -row["alpha"]))["alpha"]


def plot(table: Sequence[dict[str, Any]], metric: str, chosen: float) -> bytes:
    """A PNG: the target's score along alpha, or, with kept shards, against theirs, a point for each alpha."""
    from matplotlib.figure import Figure

    two = "kept" in table[0]
    across = [row["kept"][metric] if two else row["alpha"] for row in table]
    up = [row["target"][metric] for row in table]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(across, up, "o-", color="tab:blue", zorder=2)
    for row, x, y in zip(table, across, up, strict=True):
        axes.annotate(f"{row['alpha']:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if row["alpha"] == chosen:
            axes.plot([x], [y], "*", color="tab:red", markersize=16, zorder=3, label=f"written: alpha {chosen:g}")
    axes.set_xlabel(f"{metric}, kept shards" if two else "alpha: 0 base, 1 tuned")
    axes.set_ylabel(f"{metric}, target shards")
    axes.set_title("WiSE-FT: (1 - alpha) base + alpha tuned")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def rows_of(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple]]:
    """What a manifest's result holds as a table for people: column names and rows, the written mix marked."""
    names = [(part, metric) for part in ("target", "kept") for metric in result["table"][0].get(part, ())]
    head = ("alpha", *(f"{part} {metric}" for part, metric in names), "")
    rows = [
        (f"{row['alpha']:g}", *(f"{row[part][metric]:.3f}" for part, metric in names), _mark(row, result))
        for row in result["table"]
    ]
    return head, rows


def _metric(row: dict[str, Any]) -> str:
    zero_shot = all("zero_shot_acc1" in row[part] for part in ("target", "kept") if part in row)
    return "zero_shot_acc1" if zero_shot else "t2i_R@1"


def _mark(row: dict[str, Any], result: dict[str, Any]) -> str:
    return "written" if row["alpha"] == result["alpha"] else ""


def _refuse_strangers(one: Clip, other: Clip, base: str | Path, tuned: str | Path) -> None:
    """UserError unless the two are one architecture and look at pictures alike."""
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [tuple(state[name].shape) if name in state else "missing" for state in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{base} and {tuned} do not mix: {name} is {shapes[0]} in one, {shapes[1]} in the other")
    built = [_architecture(model.model_cfg) for model in (one, other)]
    for name, value in built[0].items():
        if built[1][name] != value:
            raise UserError(f"{base} and {tuned} do not mix: {name} is {value} in one, {built[1][name]} in the other")
    if one.preprocess_cfg != other.preprocess_cfg:
        differing = [k for k, v in one.preprocess_cfg.items() if other.preprocess_cfg.get(k) != v]
        raise UserError(f"{base} and {tuned} do not mix: they prepare pictures differently ({', '.join(differing)})")


def _architecture(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """What a model computes beyond the shapes of its weights (heads, activation, pooling ...), defaults filled in."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    found = {"quick_gelu": bool(model_cfg.get("quick_gelu"))}
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        found |= {f"{part}.{name}": value for name, value in vars(kind(**model_cfg[part])).items()}
    only_for_training = {"patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_model_pretrained"}
    return {name: value for name, value in found.items() if name.split(".")[-1] not in only_for_training}
