"""The training loop. CLIP, prior and decoder all train through fit().

Everything random in step k is a function of (seed, k, rank), and so is its batch: a run that is killed and started
again goes on from its last checkpoint exactly as if it had never stopped.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clip_train import ranks
from clip_train.checkpoint import Training, load_training, save_training
from clip_train.ema import Average, PowerAverages
from clip_train.folder import write_file
from clip_train.gradients import Batch, LossFunction, RowsLoss, make_gradients, unchanged_buffers
from clip_train.parallel import KINDS, Team, is_sharded
from clip_train.precision import PRECISIONS, LossScale, autocast, resolved_precision
from clip_train.settings import Interrupted, Progress, UserError
from clip_train.steplog import OnLog, StepLog

# batches(k) yields the batches of steps k, k+1, ...; the batch of a step depends on nothing but the step.
Batches = Callable[[int], Iterator[Batch]]
# validate(model, step) -> numbers; on every rank, the model in eval mode and with averaged weights, if there are any
Validate = Callable[[nn.Module, int], dict[str, float]]


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
    ema_snapshots: int = 0  # how often two averages are kept from which `unclip ema` makes any other later; 0: never
    accumulate: int = 1  # parts a batch is cut into, to fit the memory; CLIP still tells all of its pairs apart
    precision: str = "auto"  # fp32, bf16, fp16 (CUDA only), or auto: bf16 where the hardware multiplies it
    parallel: str = "ddp"  # under torchrun: ddp, a copy of the model on each rank, or fsdp, a part of each weight
    compile: bool = False  # torch.compile
    seed: int = 0
    save_every: float = 60.0  # seconds between checkpoints
    log_every: int = 10  # steps between lines of metrics.jsonl
    validate_every: int = 0  # steps between validations, and one at the end; 0: none

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.minutes <= 0:
            raise UserError("training needs steps or minutes above 0")
        if self.steps > 0 and self.minutes > 0:
            raise UserError(f"steps = {self.steps} and minutes = {self.minutes:g} contradict each other; set one to 0")
        if max(self.batch_size, self.steps, self.accumulate) > 2**40:
            raise UserError(f"batch_size {self.batch_size}, steps {self.steps} and accumulate must be at most 2^40")
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        for name, known in (("precision", PRECISIONS), ("parallel", KINDS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.seed >= 2**63:
            raise UserError(f"seed {self.seed} must be below 2^63")
        at_least_0 = "seed weight_decay min_lr warmup ema ema_snapshots validate_every save_every"
        for name in at_least_0.split():
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} must be at least 0")
        if self.log_every < 1:
            raise UserError(f"log_every {self.log_every} must be at least 1")
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
    loss_fn: LossFunction | RowsLoss,
    config: FitConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
    after_step: Callable[[], None] | None = None,
    lr_scales: Mapping[str, float] | None = None,
    on_log: OnLog | None = None,
    validate: Validate | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> FitResult:
    """Train `model` in place; write metrics.jsonl and checkpoints into `folder`; go on from the checkpoint found there.

    `loss_fn` must reach the model only by calling what it is given (a wrapper, with several ranks). `after_step` runs
    after each update, e.g. to clamp a parameter (with fsdp only single numbers: other weights come back at the end).
    `lr_scales`: parameter name -> factor on the learning rate. `on_log` gets each line of metrics.jsonl. The numbers
    of `validate` are logged as val_NAME; training goes on as if it had not been called.
    on_warning gets a line if a checkpoint is damaged and the one before is gone on from.
    Raises UserError, naming the step, when a gradient is not finite.
    """
    device = torch.device(device)
    if config.batch_size % (ranks.world_size() * config.accumulate):
        shares = f"{ranks.world_size()} ranks x accumulate {config.accumulate}"
        raise UserError(f"batch_size {config.batch_size} must be a multiple of {shares}")
    scale = LossScale(resolved_precision(config.precision, device) == "fp16")
    team = Team(model, config.parallel, device, config.compile)
    groups = parameter_groups(team.model, config.weight_decay, lr_scales)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    average = Average(team.model, config.ema) if config.ema else None

    def gradients(batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        how = {"accumulate": config.accumulate, "precision": config.precision, "seed": config.seed}
        return make_gradients(team, loss_fn, batch, **how, step=step, factor=scale.factor)

    if not config.steps:
        config = replace(config, steps=_steps_in_budget(team.model, gradients, batches, config, folder), minutes=0.0)
    power = PowerAverages(team.model, config.steps, config.ema_snapshots) if config.ema_snapshots else None
    averaged = average.tensors if average else None
    training = Training(team.model, optimizer, averaged, power.tensors if power else None)
    step, seconds, kept = 0, 0.0, -1  # kept: step of the checkpoint
    if found := load_training(folder, training, on_warning):
        step, seconds, kept = found["step"], found["seconds"], found["step"]
        scale.load(found["scale"])
    log = StepLog(folder / "metrics.jsonl", step, on_log)
    started, saved = time.monotonic() - seconds, time.monotonic()

    def save() -> None:
        numbers = {"step": step, "seconds": time.monotonic() - started, "scale": scale.numbers()}
        save_training(folder, training, numbers, team.sharded)

    stream = batches(step) if step < config.steps else iter(())
    with _signals() as came:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config) * group["lr_scale"]

            loss, numbers = gradients(next(stream), step)
            norm = team.clip(config.clip_norm, scale.factor)
            loss = ranks.total(loss) / ranks.world_size()
            finite = math.isfinite(norm + loss)
            if not scale.update(finite):
                raise UserError(
                    f"training broke at step {step}: loss {float(loss):.4g}, gradient norm {float(norm):.4g}; "
                    f"lower the learning rate (lr {config.lr:g}) or use precision fp32, and remove {folder}/"
                )

            if finite:
                optimizer.step()
                if after_step:
                    after_step()
            optimizer.zero_grad(set_to_none=True)
            team.share_statistics()
            step += 1
            if average:
                average.update(team.model, step)
            if power:
                power.update(team.model, step, folder)

            last = step == config.steps
            if finite and (step % config.log_every == 0 or last):
                log.write(step=step, loss=loss, lr=learning_rate(step - 1, config), norm=norm, **numbers)
            if validate and config.validate_every and (step % config.validate_every == 0 or last):
                log.write(step=step, **_validated(validate, team, average, config, step))
            if on_progress and ranks.is_main():
                on_progress(step, config.steps, loss=float(loss))
            stopping, due = _agreed(came, time.monotonic() - saved > config.save_every, device)
            if stopping or (due and not last):
                save()
                saved = time.monotonic()
            if stopping:
                raise Interrupted(stopping, step)

    if step != kept:
        save()
    averaged = team.finish(averaged)
    return FitResult(config.steps, time.monotonic() - started, log.recent_loss(), averaged)


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear rise over the warm-up, then half a cosine down to min_lr * lr (SGDR, arXiv 1608.03983, one period)."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, config.steps - warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * done)) / 2)


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Matrices and kernels decay; gains, biases, scalars, lookup tables and positions do not. Each group has one factor
    on the learning rate, "lr_scale": that of its parameters' names, 1 for those not named."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in tables and not name.endswith("positional_embedding")
            scale = (lr_scales or {}).get(name, 1.0)
            group = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
            # fused AdamW takes sharded and whole parameters, but not mixed
            groups.setdefault((not decays, scale, is_sharded(p)), group)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def _agreed(came: list[int], due: bool, device: torch.device) -> tuple[int, bool]:
    """For all ranks alike: a signal that any of them got, 0 for none, and whether the main rank wants to save."""
    if ranks.world_size() == 1:
        return came[0] if came else 0, due
    flags = [signal.SIGINT in came, signal.SIGTERM in came, due and ranks.is_main()]
    interrupt, terminate, save = ranks.total(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()
    return signal.SIGINT if interrupt else signal.SIGTERM if terminate else 0, bool(save)


def _validated(
    validate: Validate, team: Team, average: Average | None, config: FitConfig, step: int
) -> dict[str, float]:
    """validate()'s numbers as val_NAME; weights, modes and random numbers are afterwards what they were."""
    modes = {module: module.training for module in team.model.modules()}
    swapped = average.in_place_of_weights(team.model) if average else contextlib.nullcontext()
    cuda = [team.device] if team.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.no_grad(), swapped, team.assembled():
        team.model.eval()
        try:
            with autocast(config.precision, team.device):
                numbers = validate(team.model, step)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return {f"val_{name}": value for name, value in numbers.items()}


def _steps_in_budget(
    model: nn.Module,
    gradients: Callable[[Batch, int], tuple[torch.Tensor, dict[str, Any]]],
    batches: Batches,
    config: FitConfig,
    folder: Path,
) -> int:
    """How many steps fit into config.minutes: timed once on real batches, then kept in steps.json for every resume."""
    record = folder / "steps.json"
    if not ranks.broadcast(record.exists()):
        stream, times = batches(0), []
        for step in range(10):  # on every rank alike: the gradients of wrapped models meet
            tick = time.monotonic()
            with unchanged_buffers(model):
                loss, _ = gradients(next(stream), step)
            float(loss)  # a GPU has finished only when asked for a number
            model.zero_grad(set_to_none=True)
            times.append(time.monotonic() - tick)
        # the median without the first, slow steps; 1.08 for the optimizer, logging and checkpoints
        step_seconds = sorted(times[3:])[3] * 1.08
        if ranks.is_main():
            steps = max(1, int(config.minutes * 60 / step_seconds))
            write_file(record, json.dumps({"steps": steps, "step_seconds": step_seconds}).encode())
    return ranks.broadcast(json.loads(record.read_text())["steps"] if ranks.is_main() else 0)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second Ctrl-C ends at once."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if came and number == signal.SIGINT:
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
