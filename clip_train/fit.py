"""The training loop. CLIP, prior and decoder all train through fit().

Everything random in step k is a function of (seed, k, rank), and so is its batch: a run that is killed and started
again goes on from its last checkpoint exactly as if it had never stopped.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clip_train import ranks
from clip_train.checkpoint import load_training, save_training
from clip_train.folder import write_file
from clip_train.settings import Interrupted, Progress, UserError

Batch = dict[str, torch.Tensor]
# batches(k) yields the batches of steps k, k+1, ...; the batch of a step depends on nothing but the step.
Batches = Callable[[int], Iterator[Batch]]
# loss_fn(model, batch, rng) -> (scalar loss, numbers to log)
LossFunction = Callable[[nn.Module, Batch, torch.Generator], tuple[torch.Tensor, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train, whatever the model. Saved with what it made."""

    steps: int = 0  # optimizer steps; 0: as many as fit into `minutes`, measured at the start
    minutes: float = 0.0  # time budget, used when steps = 0
    batch_size: int = 128  # samples a step, all ranks together
    lr: float = 1e-3  # peak learning rate
    warmup: float = 0.05  # share of the steps in which lr rises linearly to its peak
    min_lr: float = 0.01  # lr at the end of the cosine, as a share of the peak
    weight_decay: float = 0.05  # on matrices and kernels, not on gains, biases, lookup tables and positions
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0  # gradients are scaled down to this norm
    ema: float = 0.0  # decay of the averaged weights; 0: none
    accumulate: int = 1  # parts a batch is cut into, to fit the memory; CLIP tells apart the pairs of one part only
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware multiplies it
    compile: bool = False  # torch.compile
    seed: int = 0
    save_every: float = 60.0  # seconds between checkpoints
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise UserError("training needs steps or minutes above 0")
        if self.steps > 0 and self.minutes > 0:
            raise UserError(f"steps = {self.steps} and minutes = {self.minutes:g} contradict each other; set one to 0")
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision {self.precision!r} must be auto, fp32 or bf16")
        for name, low in (("seed", 0), ("weight_decay", 0), ("log_every", 1), ("min_lr", 0), ("warmup", 0), ("ema", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name} {getattr(self, name)} must be at least {low}")
        if not self.lr > 0 or not self.clip_norm > 0 or self.warmup > 1 or self.ema >= 1:
            raise UserError(f"lr {self.lr}, clip_norm {self.clip_norm} must be above 0, ema below 1, warmup at most 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1 {self.beta1} and beta2 {self.beta2} must be in [0, 1)")


@dataclass(frozen=True)
class FitResult:
    """What fit() reports; the model it was given holds the final weights."""

    steps: int
    seconds: float  # of training, all runs together
    loss: float  # mean over the last tenth of the logged steps
    averaged: dict[str, torch.Tensor] | None  # EMA of the weights (on the model's device), None when off


def fit(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFunction,
    config: FitConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
    after_step: Callable[[], None] | None = None,
) -> FitResult:
    """Train `model` in place; write metrics.jsonl and checkpoints into `folder`; go on from the checkpoint found there.

    `loss_fn` must reach the model only by calling it (it may be wrapped for several devices). `after_step` runs after
    each update, e.g. to clamp a parameter. Raises UserError, naming the step, when a gradient is not finite.
    """
    device = torch.device(device)
    if config.batch_size % (ranks.world_size() * config.accumulate):
        shares = f"{ranks.world_size()} ranks x accumulate {config.accumulate}"
        raise UserError(f"batch_size {config.batch_size} must be a multiple of {shares}")
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )
    averaged = {n: t.detach().clone() for n, t in model.state_dict().items()} if config.ema else None
    runner = _wrapped(model, config, device)

    def micro_losses(batch: Batch, step: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        rng = _seed_step(config.seed, step, device)
        batch = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
        for part in _parts(batch, config.accumulate):
            with autocast(config.precision, device):
                yield loss_fn(runner, part, rng)

    if not config.steps:
        config = replace(config, steps=_steps_in_budget(model, micro_losses, batches, config, folder), minutes=0.0)
    step, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        numbers = load_training(checkpoint, model, optimizer, averaged)
        step, seconds = numbers["step"], numbers["seconds"]
    log = _MetricsFile(folder / "metrics.jsonl", step)
    started, saved = time.monotonic() - seconds, time.monotonic()

    def save() -> None:
        if ranks.is_main():
            numbers = {"step": step, "seconds": time.monotonic() - started}
            save_training(checkpoint, model, optimizer, averaged, numbers)

    stream = batches(step) if step < config.steps else iter(())
    with _signals() as came:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)

            total, logged = torch.zeros((), device=device), {}
            for i, (loss, numbers) in enumerate(micro_losses(next(stream), step)):
                with _no_sync(runner, i + 1 < config.accumulate):
                    (loss / config.accumulate).backward()
                total += loss.detach() / config.accumulate
                logged = numbers
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not math.isfinite(norm + total):
                raise UserError(
                    f"training broke at step {step}: loss {float(total):.4g}, gradient norm {float(norm):.4g}; "
                    f"lower the learning rate (lr {config.lr:g}) or use precision fp32, and remove {folder}/"
                )

            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after_step:
                after_step()
            step += 1
            if averaged:
                _average(averaged, model.state_dict(), min(config.ema, step / (step + 9)))

            if step % config.log_every == 0 or step == config.steps:
                log.write(step=step, loss=total, lr=learning_rate(step - 1, config), norm=norm, **logged)
            if on_progress and ranks.is_main():
                on_progress(step, config.steps, loss=float(total))
            stopping = ranks.broadcast(came[0] if came else 0) if ranks.world_size() > 1 else came and came[0]
            if stopping or (time.monotonic() - saved > config.save_every and step < config.steps):
                save()
                saved = time.monotonic()
            if stopping:
                raise Interrupted(stopping, step)

    save()
    return FitResult(config.steps, time.monotonic() - started, log.recent_loss(), averaged)


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear rise over the warm-up, then half a cosine down to min_lr * lr (SGDR, arXiv 1608.03983, one period)."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, config.steps - warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * done)) / 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; gains, biases, scalars, lookup tables and positions do not."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables |= {id(p) for name, p in model.named_parameters() if name.endswith("positional_embedding")}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    plain = [p for p in trained if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast when `precision` says so: "bf16", or "auto" on hardware that multiplies bf16 natively."""
    bf16 = resolved_precision(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def resolved_precision(precision: str, device: torch.device) -> str:
    """ "auto" as what it comes to on this hardware: "bf16" or "fp32"."""
    if precision != "auto":
        return precision
    return "bf16" if _multiplies_bf16(device) else "fp32"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _wrapped(model: nn.Module, config: FitConfig, device: torch.device) -> nn.Module:
    """The model as loss_fn sees it: synchronised over ranks under torchrun, compiled if asked for."""
    if ranks.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    return torch.compile(model) if config.compile else model


def _no_sync(runner: nn.Module, hold: bool) -> contextlib.AbstractContextManager:
    return runner.no_sync() if hold and hasattr(runner, "no_sync") else contextlib.nullcontext()


def _seed_step(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Seed torch's own generators (dropout) and make one for the loss, both from (seed, step, rank)."""
    number = ((seed * 1_000_003 + step) * 1_000_003 + ranks.rank()) % 2**63
    torch.manual_seed(number)
    return torch.Generator(device).manual_seed(number ^ 0x5DEECE66D)


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    if count == 1:
        yield batch
        return
    cut = {name: t.chunk(count) for name, t in batch.items()}
    for i in range(count):
        yield {name: parts[i] for name, parts in cut.items()}


@torch.no_grad()
def _average(averaged: dict[str, torch.Tensor], current: dict[str, torch.Tensor], decay: float) -> None:
    floating = [n for n, t in current.items() if t.is_floating_point()]
    torch._foreach_lerp_([averaged[n] for n in floating], [current[n] for n in floating], 1 - decay)
    for name in current.keys() - set(floating):
        averaged[name].copy_(current[name])


def _steps_in_budget(
    model: nn.Module,
    micro_losses: Callable[[Batch, int], Iterator[tuple[torch.Tensor, dict[str, Any]]]],
    batches: Batches,
    config: FitConfig,
    folder: Path,
) -> int:
    """How many steps fit into config.minutes: timed once on real batches, then kept in steps.json for every resume."""
    record = folder / "steps.json"
    if not record.exists():
        before = {name: t.clone() for name, t in model.state_dict().items()}
        stream, times = batches(0), []
        for step in range(10):  # on every rank alike: the gradients of wrapped models meet
            tick = time.monotonic()
            for loss, _ in micro_losses(next(stream), step):
                loss.backward()
            float(loss.detach())  # a GPU has finished only when asked for a number
            model.zero_grad(set_to_none=True)
            times.append(time.monotonic() - tick)
        model.load_state_dict(before)  # running statistics moved
        # the median without the first, slow steps; 1.08 for the optimizer, logging and checkpoints
        step_seconds = sorted(times[3:])[3] * 1.08
        if ranks.is_main():
            steps = max(1, int(config.minutes * 60 / step_seconds))
            write_file(record, json.dumps({"steps": steps, "step_seconds": step_seconds}).encode())
    ranks.barrier()
    return json.loads(record.read_text())["steps"]


class _MetricsFile:
    """metrics.jsonl: one line per logged step; lines after the checkpoint that a run resumes from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self._recent: list[float] = []
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError):
                    entry = json.loads(line)
                    if entry["step"] <= step:
                        kept.append(line)
                        self._recent.append(entry["loss"])
        self._path = path if ranks.is_main() else None
        if self._path:
            write_file(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, **numbers: Any) -> None:
        short = {name: value if name == "step" else float(f"{float(value):.6g}") for name, value in numbers.items()}
        self._recent.append(short["loss"])
        if self._path:
            with open(self._path, "a") as file:
                file.write(json.dumps(short) + "\n")

    def recent_loss(self) -> float:
        last = self._recent[-max(1, len(self._recent) // 10) :]
        return sum(last) / len(last) if last else math.nan


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second Ctrl-C ends at once."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield came
        return
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
