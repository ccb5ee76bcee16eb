"""What a CLIP training will take, before it is started: parameters, FLOPs, memory, and time on this device."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clip_train.ema import Average
from clip_train.fit import FitConfig, parameter_groups
from clip_train.gradients import Batch, make_gradients, unchanged_buffers
from clip_train.model import Clip
from clip_train.objective import ClipObjective
from clip_train.parallel import Team
from clip_train.precision import autocast, resolved_precision
from clip_train.settings import UserError, config_to_json

if TYPE_CHECKING:
    from clip_train.train import ClipConfig

TOWERS = ("image", "text")
MFU_ELSEWHERE = 0.4  # share of a device's peak that a large ViT's training is assumed to reach on it


def estimate(
    clip: Clip,
    clip_config: "ClipConfig",
    fit_config: FitConfig,
    device: torch.device | str = "cpu",
    *,
    teacher: Clip | None = None,
    ranks: int = 1,
    pairs: int | None = None,
    caption_tokens: int | None = None,
    peak: float | None = None,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Count, measure and extrapolate; `render` makes a table of it.

    Steps on made-up pairs are run on `device` through the code that trains, as large as about `seconds` allow, never
    the whole batch of a cluster's preset. The weights come out as they went in, on `device`, in training mode.

    ranks: devices that share a batch; the time is then that of each without the talk between them. pairs: in the set,
    for epochs. caption_tokens: of a typical caption, start and end included; None: the whole context, an upper bound.
    peak: TFLOP/s of the devices, all together, that a real run would have; it is extrapolated to, too.
    Returns: config, parameters, flops (of a picture, a caption, a pair), memory (bytes on each device), time; "mfu"
    counts open_clip's dense FLOPs, those that are left out too, against a matrix product timed in the same call.
    """
    device = torch.device(device)
    local = fit_config.batch_size // (ranks * fit_config.accumulate)
    if local < 1:
        shares = f"{ranks} devices x accumulate {fit_config.accumulate}"
        raise UserError(f"batch_size {fit_config.batch_size} is too small for {shares}")
    team = Team(clip, "ddp", device)
    objective = ClipObjective(
        loss=clip_config.loss, augment=clip_config.augment, teacher=teacher, distill=clip_config.distill
    )
    made = _Made(team, objective, fit_config, caption_tokens or clip.model_cfg["text_cfg"].get("context_length", 77))

    flops = count_flops(clip)
    with unchanged_buffers(clip):
        flops["executed"] = made.executed_flops()
        memory = _memory(made, fit_config, ranks)
        timed = _timed(made, fit_config, local, memory, seconds)
    frozen = [t for t in TOWERS if not any(p.requires_grad for p in tower_parameters(clip, t))]
    flops["train"] = sum(flops[t] * (1 if t in frozen else 3) for t in TOWERS)
    steps = fit_config.steps or max(1, int(fit_config.minutes * 60 / timed["step"]))
    rate = fit_config.batch_size / timed["step"]
    timed |= {
        "pairs_per_second": rate,
        "steps": steps,
        "hours": steps * timed["step"] / 3600,
        "pairs_seen": steps * fit_config.batch_size,
        "epochs": steps * fit_config.batch_size / pairs if pairs else None,
        "mfu": rate / ranks * flops["train"] / timed["matmul"],
    }
    if peak:
        there = MFU_ELSEWHERE * peak * 1e12 / flops["train"]
        timed["elsewhere"] = {"peak": peak, "mfu": MFU_ELSEWHERE, "pairs_per_second": there}
        timed["elsewhere"]["hours"] = timed["pairs_seen"] / there / 3600 if fit_config.steps else None
    return {
        "config": {"clip": config_to_json(clip_config), "fit": config_to_json(fit_config)},
        "device": str(device),
        "precision": resolved_precision(fit_config.precision, device),
        "ranks": ranks,
        "parameters": {t: count_parameters(clip, t) for t in TOWERS},
        "flops": flops,
        "memory": memory,
        "time": timed,
        "caption_tokens": made.caption_tokens,
        "local_batch": local,
    }


def tower_parameters(clip: Clip, tower: str) -> list[nn.Parameter]:
    """Those of the "image" or the "text" tower; temperature and bias belong to neither."""
    named = [(n, p) for n, p in clip.model.named_parameters() if not n.endswith(("logit_scale", "logit_bias"))]
    return [p for n, p in named if n.startswith("visual.") == (tower == "image")]


def count_parameters(clip: Clip, tower: str) -> dict[str, int]:
    """How many numbers of a tower train, and how many do not."""
    counts = {"trainable": 0, "frozen": 0}
    for parameter in tower_parameters(clip, tower):
        counts["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def count_flops(clip: Clip) -> dict[str, float]:
    """Forward FLOPs of one picture and of one caption as long as the context, in open_clip's own dense computation.

    A multiplication and an addition are two, as in open_clip's docs/model_profile.csv: 8.82 and 5.96 GFLOP for
    ViT-B/32. Counted without weights, on the meta device.
    """
    import open_clip
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = {k: v for k, v in clip.model_cfg.items() if k != "custom_text"}
    kind = open_clip.CustomTextCLIP if clip.model_cfg.get("custom_text") else open_clip.CLIP
    count, size = 2, clip.image_size  # BatchNorm wants two
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = kind(**config).train()
        tokens = torch.zeros(count, config["text_cfg"].get("context_length", 77), dtype=torch.long)
        with FlopCounterMode(display=False) as image:
            model.encode_image(torch.empty(count, 3, size, size))
        with FlopCounterMode(display=False) as text:
            model.encode_text(tokens)
    return {"image": image.get_total_flops() / count, "text": text.get_total_flops() / count}


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s that a large square matrix product reaches here: the median of a few, of 1024 rows (CPU) or 8192."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = [_seconds(lambda: torch.mm(left, right, out=out), device) for _ in range(12)]
    return 2 * size**3 / sorted(times[1:])[5]


class _Made:
    """Steps on made-up pairs, through the code that trains."""

    def __init__(self, team: Team, objective: ClipObjective, config: FitConfig, caption_tokens: int) -> None:
        self.team = team
        self.objective = objective
        self.config = config
        self.clip = team.model
        self.device = team.device
        context = self.clip.model_cfg["text_cfg"].get("context_length", 77)
        self.caption_tokens = max(3, min(caption_tokens, context))

    def batch(self, count: int) -> Batch:
        """`count` random pictures and captions of `caption_tokens`, all different."""
        rng = torch.Generator().manual_seed(0)
        size, text = self.clip.image_size, self.clip.model_cfg["text_cfg"]
        vocabulary, context = text.get("vocab_size", 49408), text.get("context_length", 77)
        tokens = torch.randint(1, vocabulary - 2, (count, context), generator=rng)
        tokens[:, 0] = vocabulary - 2
        tokens[:, self.caption_tokens - 1] = vocabulary - 1
        tokens[:, self.caption_tokens :] = 0
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=rng)
        ids = torch.arange(count)
        made = {"pixels": pixels, "tokens": tokens, "caption": ids, "group": ids}
        return {name: t.to(self.device) for name, t in made.items()}

    def gradients(self, batch: Batch, parts: int = 1) -> None:
        """Forward and backward."""
        how = {"accumulate": parts, "precision": self.config.precision, "seed": 0, "step": 0}
        make_gradients(self.team, self.objective, batch, **how)

    def executed_flops(self, count: int = 2) -> float:
        """FLOPs that a pair really takes in training: what is left out or made twice is counted so."""
        parts = 2 if self.config.accumulate > 1 else 1
        with FlopCounterMode(display=False) as counter:
            self.gradients(self.batch(count * parts), parts)
        self.clip.zero_grad(set_to_none=True)
        return counter.get_total_flops() / (count * parts)

    def saved_bytes(self, count: int) -> int:
        """Bytes that a forward pass over `count` pairs keeps for its backward pass, weights not among them."""
        batch, known = self.batch(count), {p.untyped_storage().data_ptr() for p in self.clip.parameters()}
        with _saved(known) as total, autocast(self.config.precision, self.device):
            self.objective.rows(self.clip, batch, torch.Generator(self.device))
        return total[0]

    def loss_bytes(self, count: int) -> int:
        """Bytes that the loss of `count` pairs keeps, its rows among them."""
        width = self.clip.embed_dim
        rows = [torch.randn(count, width, device=self.device, requires_grad=True) for _ in TOWERS]
        rows += [torch.randn(count, width, device=self.device) for _ in TOWERS if self.objective.teacher]
        scalars = [torch.ones((), device=self.device)] * 2
        ids = torch.arange(count, device=self.device)
        with _saved(set()) as total:
            self.objective.loss((*rows, *scalars), {"caption": ids, "group": ids})
        return total[0]


@contextlib.contextmanager
def _saved(known: set[int]) -> Iterator[list[int]]:
    """Counts the bytes that autograd keeps meanwhile, each storage once, those of `known` addresses not at all."""
    total, seen, kept = [0], set(known), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)  # so that its address is not given out again
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _memory(made: _Made, config: FitConfig, ranks: int) -> dict[str, Any]:
    """Bytes on one device, by what they hold. Activations grow with the batch: they are measured on 2 and 4 pairs."""
    trainable = sum(p.numel() * p.element_size() for p in made.clip.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in made.clip.state_dict().values())
    two, four = made.saved_bytes(2), made.saved_bytes(4)
    per_pair = (four - two) / 2
    # a loss that compares all pairs keeps c B^2 + d B: c from two sizes
    one, double = made.loss_bytes(256), made.loss_bytes(512)
    square = max(0.0, (double - 2 * one) / (512**2 - 2 * 256**2))
    held = config.batch_size // ranks  # pairs of this device, whose rows meet those of the whole batch
    fixed = {
        "weights": weights,
        "gradients": trainable,
        "adamw": 2 * trainable,
        "ema": weights if config.ema else 0,
        "loss": square * held * config.batch_size,
    }
    casts = max(0.0, two - 2 * per_pair)  # weights in bf16

    def total(parts: int) -> float:
        return sum(fixed.values()) + casts + per_pair * held / parts

    device = _memory_of(made.device)
    more = [n for n in range(1, held // 2 + 1) if held % n == 0 and total(n) < 0.9 * device]
    return fixed | {
        "activations": casts + per_pair * held / config.accumulate,
        "total": total(config.accumulate),
        "activations_per_pair": per_pair,
        "device": device,
        "accumulate": more[0] if more else None,  # the least that fits this device
    }


def _timed(made: _Made, config: FitConfig, local: int, memory: dict[str, float], seconds: float) -> dict[str, Any]:
    """Seconds of a step: forward and backward at the largest batch that time and memory allow, times the rest of it."""
    matmul = matmul_rate(made.device, resolved_precision(config.precision, made.device))
    parts = 2 if config.accumulate > 1 else 1
    count = min(2, local)
    while True:
        batch = made.batch(count * parts)
        work = functools.partial(made.gradients, batch, parts)
        took = _seconds(work, made.device)
        fits = 2 * count * memory["activations_per_pair"] < 0.5 * _memory_of(made.device, free=True)
        if count == local or took > seconds / 8 or not fits:
            break
        made.clip.zero_grad(set_to_none=True)
        count = min(2 * count, local)
    times = [took] if took > seconds else []
    while len(times) < 5 and sum(times) < seconds / 2:
        made.clip.zero_grad(set_to_none=True)
        times.append(_seconds(work, made.device))
    per_pair = sorted(times)[len(times) // 2] / (count * parts)

    clip = made.clip
    groups = parameter_groups(clip, config.weight_decay)
    for group in groups:
        group["lr"] = 0.0  # nothing moves
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
    average = Average(clip, config.ema) if config.ema else None

    def update() -> None:
        made.team.clip(config.clip_norm)
        optimizer.step()
        if average:
            average.update(clip, 1)

    updates = [_seconds(update, made.device) for _ in range(4)]
    clip.zero_grad(set_to_none=True)
    step = per_pair * local * config.accumulate + sorted(updates[1:])[1]
    return {"step": step, "update": sorted(updates[1:])[1], "measured_batch": count, "matmul": matmul}


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes until the device is done with it."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _memory_of(device: torch.device, free: bool = False) -> float:
    """Bytes of a device, or those of them to be had now; where the system does not tell, 4e9."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0 if free else 1]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * (0.5 if free else 1)
    return 4e9


def render(found: dict[str, Any]) -> str:
    """The estimate as an aligned table of lines."""
    flops, memory, timed, fit = found["flops"], found["memory"], found["time"], found["config"]["fit"]
    local, measured = found["local_batch"], found["time"]["measured_batch"]
    on = f"{found['device']} in {found['precision']}"
    rows: list[tuple[str, str, str]] = []
    for group, config in found["config"].items():
        rows += [(f"{group}.{name}", _shown(value), "") for name, value in config.items()]
    rows.append(("", "", ""))
    for tower, counts in found["parameters"].items():
        frozen = f"{_si(counts['frozen'])} more are frozen" if counts["frozen"] else ""
        rows.append((f"{tower} tower", f"{_si(counts['trainable'])} parameters", frozen))
    rows += [
        ("FLOPs of a picture", _si(flops["image"], "FLOP"), "forward"),
        ("FLOPs of a caption", _si(flops["text"], "FLOP"), f"forward, {_context(found)} tokens"),
        ("FLOPs of a pair", _si(flops["train"], "FLOP"), "forward and backward"),
        ("  really executed", _si(flops["executed"], "FLOP"), f"at {found['caption_tokens']} tokens a caption"),
        ("", "", ""),
    ]
    many = f" x {fit['accumulate']} parts" if fit["accumulate"] > 1 else ""
    why = {
        "activations": f"{local} pairs{many}, {_si(memory['activations_per_pair'], 'B')} each",
        "loss": "pair by pair",
    }
    for name in ("weights", "gradients", "adamw", "ema", "activations", "loss"):
        if memory[name]:
            rows.append((f"memory: {name}", _si(memory[name], "B"), why.get(name, "")))
    fits = f"of {_si(memory['device'], 'B')} that {found['device']} has"
    if memory["total"] > 0.9 * memory["device"]:
        least = memory["accumulate"]
        fits += f"; accumulate={least} would fit" if least else "; use more devices or a smaller batch"
    rows.append(("memory in all", _si(memory["total"], "B"), fits))
    rows.append(("", "", ""))
    how = "measured" if measured == local else f"extrapolated from {measured} pairs"
    rows += [
        ("a step", f"{timed['step']:.3g} s", f"{how}, on {on}; {timed['update']:.2g} s of it the update"),
        ("speed", f"{timed['pairs_per_second']:.4g} pairs/s", f"{timed['mfu']:.0%} of what matrix products reach here"),
        ("matrix products", f"{_si(timed['matmul'], 'FLOP')}/s", on),
        ("steps", f"{timed['steps']:,}", f"{timed['pairs_seen']:,} pairs seen{_epochs(timed)}"),
        ("time", _duration(timed["hours"]), "without reading the data, validation and talk between devices"),
    ]
    if there := timed.get("elsewhere"):
        what = f"at {there['mfu']:.0%} of {there['peak']:g} TFLOP/s"
        rows.append(("speed elsewhere", f"{there['pairs_per_second']:.4g} pairs/s", what))
        if there["hours"]:
            rows.append(("time elsewhere", _duration(there["hours"]), ""))
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:{wide[0]}}  {value:{wide[1]}}  {note}".rstrip() for name, value, note in rows)


def _context(found: dict[str, Any]) -> int:
    return found["config"]["clip"]["context_length"]


def _epochs(timed: dict[str, Any]) -> str:
    return f", {timed['epochs']:.3g} epochs" if timed["epochs"] else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return "-" if value in ("", [], None) else str(value)


def _si(value: float, unit: str = "") -> str:
    """1234567 -> 1.23 M"""
    power = min(5, int(math.log10(value) // 3)) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}".rstrip()


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} min"
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:,.3g} days"
