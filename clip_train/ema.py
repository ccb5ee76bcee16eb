"""Averages of a model's weights while it trains: one of a fixed decay, and those from which any other can be had later.

Post-hoc EMA (Karras et al. 2023, arXiv 2312.02696, section 3). How long an average should be is known only when the
training is over. A power-function average after step t weighs the weights of step s by s^gamma, so that its length
grows with the training; two of different gamma, kept now and then as snapshots, span a space in which a power-function
average of any other gamma nearly lies: least squares finds it.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clip_train import ranks
from clip_train.parallel import local, whole
from clip_train.settings import UserError
from clip_train.tensors import load_tensors, save_tensors

WIDTHS = (0.05, 0.10)  # sigma_rel of the averages that are tracked (section 3.2)
SNAPSHOTS = "snapshots"  # folder, in the one that a training writes


class Average:
    """Averaged weights and buffers, on the model's device and sharded as it is; made at the first weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """decay: of the average, in (0, 1); in the first steps a smaller one, so that the start is forgotten."""
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights after `step` steps, counted from 1."""
        current = {name: local(t) for name, t in model.state_dict().items()}
        floating = [name for name, t in current.items() if t.is_floating_point()]
        pull = self.pull(step)
        torch._foreach_lerp_([local(self.tensors[n]) for n in floating], [current[n] for n in floating], pull)
        for name in current.keys() - set(floating):
            self.tensors[name].copy_(current[name])

    def pull(self, step: int) -> float:
        """The share of the way to the new weights."""
        return 1 - min(self.decay, step / (step + 9))

    @contextlib.contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average meanwhile, and afterwards its weights again, bit for bit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        swapped = set()
        for name, tensor in model.state_dict().items():
            mine, theirs = local(self.tensors[name]), local(tensor)
            if theirs.data_ptr() not in swapped:  # tied weights have several names
                swapped.add(theirs.data_ptr())
                kept = theirs.clone()
                theirs.copy_(mine)
                mine.copy_(kept)


class PowerAverage(Average):
    """The average in which the weights after step s count s^gamma - exactly: s^(gamma+1) - (s-1)^(gamma+1)."""

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        super().__init__(model, decay=0.0)
        self.gamma = gamma_of(sigma_rel)

    def pull(self, step: int) -> float:
        """1 - beta of arXiv 2312.02696, eq. 127; the first step takes the weights as they are."""
        return 1 - (1 - 1 / step) ** (self.gamma + 1)


class PowerAverages:
    """Two power-function averages of a model, which are written to files at `count` steps, equally far apart.

    So the disk they need is bounded: 2 * count times the weights.
    """

    def __init__(self, model: nn.Module, steps: int, count: int) -> None:
        """steps: of the training."""
        self.averages = [PowerAverage(model, sigma_rel) for sigma_rel in WIDTHS]
        self.due = {round(number * steps / count) for number in range(1, count + 1)}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a killed run needs to go on, by name."""
        return {f"{n}.{name}": t for n, average in enumerate(self.averages) for name, t in average.tensors.items()}

    def update(self, model: nn.Module, step: int, folder: Path) -> None:
        """Move towards the weights after `step` steps; write the snapshots if they are due. On all ranks."""
        for average in self.averages:
            average.update(model, step)
        if step not in self.due:
            return
        for number, average in enumerate(self.averages):
            tensors = {name: whole(t).cpu() for name, t in average.tensors.items()}
            if ranks.is_main():
                (folder / SNAPSHOTS).mkdir(exist_ok=True)
                path = folder / SNAPSHOTS / f"{step:09d}-{number}.safetensors"
                save_tensors(path, tensors, {"step": step, "gamma": average.gamma})


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it was after some step."""

    path: Path
    step: int
    gamma: float


def read_snapshots(folder: Path | str) -> list[Snapshot]:
    """The snapshots in a trained folder, in the order of their steps. UserError if there are none."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in sorted((Path(folder) / SNAPSHOTS).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                numbers = json.loads(file.metadata()["json"])
            found.append(Snapshot(path, int(numbers["step"]), float(numbers["gamma"])))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or not a snapshot ({error}); remove it to go without it") from error
    if not found:
        raise UserError(f"{folder}/ holds no snapshots to average; train it with --set ema_snapshots=16")
    return sorted(found, key=lambda one: (one.step, one.gamma))


def reconstruct(
    snapshots: Sequence[Snapshot], sigma_rel: float, step: int = 0
) -> tuple[dict[str, torch.Tensor], float]:
    """The average of width sigma_rel after `step` steps (0: the last), made of the snapshots up to there.

    Returns the tensors, and how far its profile is from the true one, as a share of that (the root of the squared
    distance): 0.01 is as good as exact, from 0.1 on it is another average than was asked for. One snapshot is in memory
    at a time.
    """
    step = step or snapshots[-1].step
    usable = [one for one in snapshots if one.step <= step]
    if not usable:
        raise UserError(f"no snapshot is of step {step} or before; the first is of step {snapshots[0].step}")
    shares, error = coefficients([(one.step, one.gamma) for one in usable], step, gamma_of(sigma_rel))
    total: dict[str, torch.Tensor] = {}
    for one, share in zip(usable, shares.tolist(), strict=True):
        for name, tensor in load_tensors(one.path)[0].items():
            if not tensor.is_floating_point():
                total[name] = tensor  # a counter: that of the last snapshot
            elif name in total:
                total[name] += share * tensor.double()
            else:
                total[name] = share * tensor.double()
    like = load_tensors(usable[-1].path)[0]
    return {name: tensor.to(like[name].dtype) for name, tensor in total.items()}, error


def coefficients(have: Sequence[tuple[int, float]], step: int, gamma: float) -> tuple[np.ndarray, float]:
    """Shares, adding up to 1, of the averages (step, gamma) in `have` whose mix is nearest to (step, gamma).

    Algorithm 3 of arXiv 2312.02696, with the sums over steps that the averages are, not the integrals they approach:
    min |sum_i share_i profile_i - profile|^2. Returns the shares (float64), and the distance left over, relative.
    """
    most = max(step, *(own for own, _ in have))
    triangle = np.zeros((0, len(have) + 1))  # R of a QR decomposition, block by block: any number of steps fits
    for start in range(1, most + 1, 65536):
        steps = np.arange(start, min(start + 65536, most + 1), dtype=np.float64)
        block = np.stack([profile(steps, *one) for one in (*have, (step, gamma))], axis=1)
        triangle = np.linalg.qr(np.concatenate([triangle, block]), mode="r")
    basis, target = triangle[:, :-1], triangle[:, -1]
    # shares that add up to 1: the last one is what the others leave, so the rest is a problem without a condition
    reduced = basis[:, :-1] - basis[:, -1:]
    free = np.linalg.lstsq(reduced, target - basis[:, -1], rcond=None)[0]
    shares = np.append(free, 1 - free.sum())
    return shares, float(np.linalg.norm(basis @ shares - target) / np.linalg.norm(target))


def profile(steps: np.ndarray, step: int, gamma: float) -> np.ndarray:
    """What the weights after each of `steps` count in the power-function average after `step`; it sums to 1 over all.

    The integral over (s - 1, s] of the density (gamma + 1) u^gamma / step^(gamma + 1) (arXiv 2312.02696, eq. 3).
    """
    high, low = np.minimum(steps / step, 1), np.minimum((steps - 1) / step, 1)
    return high ** (gamma + 1) - low ** (gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has the std sigma_rel, a share of the training so far (arXiv 2312.02696, algorithm 2).

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2), at most 0.289 (gamma = 0: all steps alike).
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise UserError(f"sigma_rel {sigma_rel:g} must be above 0 and at most 0.288, a plain mean of all steps")
    square = sigma_rel**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())
