"""A network on the plane: a multi-layer perceptron for pictures of two pixels, trained by fit; scores of points."""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import fingerprint_json
from clip_train.gradients import LossFunction
from clip_train.settings import Progress, UserError, config_to_json
from diffusion.denoiser import Cond, Denoiser, Scaling, denoising_loss, loss_weight, refuse_unknown
from diffusion.distances import variance_ratio
from diffusion.lab.spiral import BINS, CLASSES, NOTHING, Spiral, coverage, nearest, seeded
from diffusion.layers import silent
from diffusion.schedule import karras_sigmas, log_sigmas, stratified

TARGETS = ("total", "step")
SIGMA_DATA = 0.5  # std of a pixel, about


@dataclass(frozen=True, kw_only=True)
class PlaneConfig:
    """What a network on the plane is, and how it is trained."""

    target: str = "total"  # what it learns to tell from x: the total noise in it, or that of the walk's last step alone
    level: bool = True  # whether it is told the noise level
    labels: bool = False  # whether it is told the class of a point
    drop_label: float = 0.15  # share of points that lose their label, so that guidance works
    wrong_label: float = 0.0  # share of points whose label is drawn blindly, as captions are not always right
    predict: str = "eps"  # what the raw output means (diffusion.denoiser.KINDS)
    walk_steps: int = 1000  # of the random walk from the data to noise
    sigma_min: float = 0.01  # noise level after its first step
    sigma_max: float = 20.0  # and after its last
    width: int = 64
    depth: int = 3  # hidden layers
    waves: int = 5  # sines and cosines of each pixel, each twice as fast as the one before
    steps: int = 3000  # of the optimizer
    batch_size: int = 256
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_unknown("the plane", self.predict, "log_normal")
        if self.target not in TARGETS:
            raise UserError(f"the plane: no target {self.target!r}: take {', '.join(TARGETS)}")
        if self.walk_steps < 2:
            raise UserError(f"the plane: a walk of {self.walk_steps} steps is none; take at least 2")
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(f"the plane needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")
        for name in ("drop_label", "wrong_label"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"the plane: {name} {getattr(self, name):g} must be in [0, 1]")

    @property
    def walk(self) -> Tensor:
        """(walk_steps,) rising noise levels of the random walk: each step makes sigma grow by the same factor."""
        return log_sigmas(self.walk_steps, self.sigma_min, self.sigma_max)[:-1].flip(0)

    @property
    def step_share(self) -> float:
        """Share of a single step of the walk in the variance of all steps up to it: the same at every noise level."""
        return 1 - (self.sigma_min / self.sigma_max) ** (2 / (self.walk_steps - 1))

    def grid(self, steps: int) -> Tensor:
        """The way back down: (steps + 1,) falling noise levels, the last 0."""
        return karras_sigmas(steps, self.sigma_min, self.sigma_max)


class PlaneNetwork(nn.Module):
    """(x (B, 2), noise_level (B,), cond {"label": (B,)} or None) -> raw (B, 2)."""

    def __init__(self, config: PlaneConfig):
        super().__init__()
        self.level, self.labels, self.waves = config.level, config.labels, config.waves
        wide = 2 + 4 * config.waves + 7 * config.level + (NOTHING + 1) * config.labels
        layers: list[nn.Module] = []
        for _ in range(config.depth):
            layers += [nn.Linear(wide, config.width), nn.SiLU()]
            wide = config.width
        self.body = nn.Sequential(*layers, silent(nn.Linear(wide, 2)))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond | None) -> Tensor:
        seen = [x, _waves(x, self.waves)]
        if self.level:
            seen += [noise_level[:, None], _waves(math.pi * noise_level[:, None], 3)]
        if self.labels:
            label = torch.full_like(noise_level, NOTHING).long() if cond is None else cond["label"]
            seen.append(nn.functional.one_hot(label, NOTHING + 1).to(x))
        return self.body(torch.cat(seen, dim=1))


def _waves(values: Tensor, count: int) -> Tensor:
    """Sines and cosines of values (B, D) at 1, 2, 4, ... times their size: (B, 2 count D)."""
    angles = (values[..., None] * 2.0 ** torch.arange(count)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True, eq=False)
class Trained:
    """A denoiser of the plane, and what its training says of itself."""

    denoiser: Denoiser
    config: PlaneConfig
    loss: float  # squared error of what it had to tell, per pixel, near the end of the training

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        """denoised (B, 2), without gradients."""
        with torch.no_grad():
            return self.denoiser(x, sigma, cond)


def train_plane(
    config: PlaneConfig,
    spiral: Spiral,
    on_progress: Progress | None = None,
    stage: str = "training",
    folder: Path | None = None,
) -> Trained:
    """Train a network on the spiral's points. One core, a few milliseconds a step.

    folder: of the experiment. Its scratch/ keeps the network, so that a killed run does not train it again;
    Workspace.publish removes that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        denoiser = Denoiser(PlaneNetwork(config), Scaling(config.predict, SIGMA_DATA))
    how = FitConfig(
        steps=config.steps, batch_size=config.batch_size, lr=config.lr, weight_decay=0.0, precision="fp32",
        seed=config.seed, save_every=20.0, log_every=5,
    )  # fmt: skip

    def tell(done: int, total: int, **numbers: float) -> None:
        if on_progress and (done % 50 == 0 or done == total):
            on_progress(done, total, stage=stage, **numbers)

    with tempfile.TemporaryDirectory() if folder is None else nullcontext(scratch_of(folder, config, spiral)) as place:
        Path(place).mkdir(parents=True, exist_ok=True)
        result = fit(denoiser, point_batches(spiral, config), plane_loss(config), how, Path(place), on_progress=tell)
    return Trained(denoiser.eval().requires_grad_(False), config, result.loss)


def scratch_of(folder: Path, config: PlaneConfig, spiral: Spiral) -> Path:
    """Where in the experiment's folder a network is trained: another one, or on other points, is elsewhere."""
    points = hashlib.sha256(spiral.points.numpy().tobytes()).hexdigest()
    known = fingerprint_json({"plane": config_to_json(config), "points": points, "spread": spiral.spread})
    return folder / "scratch" / known.removeprefix("sha256:")[:16]


def point_batches(spiral: Spiral, config: PlaneConfig) -> Callable[[int], Iterator[Batch]]:
    """Batches for fit: each step's points and labels are a function of (seed, step)."""
    rng = seeded(config.seed)
    blind = torch.rand(len(spiral.points), generator=rng) < config.wrong_label
    shown = torch.where(blind, torch.randint(len(CLASSES), blind.shape, generator=rng), spiral.label)

    def batches(step: int) -> Iterator[Batch]:
        while True:
            rng = seeded(1 + config.seed * 1_000_003 + step)
            x0, row = spiral.draw(config.batch_size, rng)
            label = shown[row]
            if config.labels:
                label[torch.rand(len(label), generator=rng) < config.drop_label] = NOTHING
            yield {"x0": x0, "label": label}
            step += 1

    return batches


def plane_loss(config: PlaneConfig) -> LossFunction:
    """The denoising loss of a batch, each point at a level of the walk drawn evenly."""
    walk, scaling = config.walk, Scaling(config.predict, SIGMA_DATA)

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        x0 = batch["x0"]
        sigma = walk[(stratified(len(x0), rng) * len(walk)).long()]
        noise, step = noise_and_step(x0, config.step_share, rng)
        weight = loss_weight(scaling, sigma)
        cond = {"label": batch["label"]} if config.labels else None
        if config.target == "step":
            x0, noise = one_step_target(x0, sigma, noise, step, config.step_share)
            weight = weight * config.step_share
        return denoising_loss(model, x0, cond, sigma, noise, weight), {}

    return loss


def noise_and_step(x0: Tensor, step_share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The total noise of a walk, and that of its last step, both unit Gaussians (B, 2), correlated as they are."""
    before, step = torch.randn(2, *x0.shape, generator=rng)
    return (1 - step_share) ** 0.5 * before + step_share**0.5 * step, step


def one_step_target(x0: Tensor, sigma: Tensor, noise: Tensor, step: Tensor, step_share: float) -> tuple[Tensor, Tensor]:
    """What stands for x0 and the noise when the last step alone is to be told from x = x0 + sigma noise.

    E[step | x] = sqrt(step_share) E[noise | x], by the symmetry of the steps: so step / sqrt(step_share) is right on
    average, and a denoiser trained on it has the same optimum; but its variance is 1 / step_share times as large.
    The loss times step_share is the squared error of the step's unit noise.
    """
    guess = step / step_share**0.5
    return x0 + sigma[:, None] * (noise - guess), guess


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of the points themselves (Szekely and Rizzo 2013, eq. 6). (N, D), (M, D).

    Never below 0, and 0 for equal sets alone; for two draws from one distribution about (1 / N + 1 / M) E|a - a'|.
    """
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def scores(spiral: Spiral, made: Tensor, true: Tensor) -> dict[str, float]:
    """How good drawn points (N, 2) are, beside true samples (M, 2).

    distance: mean way to the curve (true samples: 0.8 spread); coverage: share of the curve's parts that have points;
    variance: of the true samples' variance; energy: energy distance, which sees all of these.
    """
    distance, arc = nearest(made)
    return {
        "distance": distance.mean().item(),
        "coverage": coverage(arc[distance < spiral.reach], torch.arange(BINS), len(made)),
        "variance": variance_ratio(true.numpy(), made.numpy()),
        "energy": energy_distance(made, true),
    }
