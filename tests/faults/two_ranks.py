"""Two ranks (gloo) against one: gathered losses and their gradients, and what trainings make in a few steps."""

import random
from pathlib import Path

import crew
import tiny
import torch
from torch.nn.functional import normalize

from clip_train import ranks
from clip_train.fit import FitConfig
from clip_train.loss import contrastive_loss, distillation_loss, right_share, same_caption, sigmoid_loss
from clip_train.settings import config_from_json
from clip_train.train import ClipConfig, train_clip

LOSSES = ("infonce", "infonce with groups", "siglip", "distillation")
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TINY = {"vision": VISION, "image_size": 16, "text_width": 32, "text_heads": 2, "text_layers": 1, "context_length": 16}
TINY |= {"embed_dim": 32, "augment": 0.0}


def settings(rng: random.Random) -> dict:
    """Of crew.train: everything that several ranks compute in another way."""
    made = {"loss": rng.choice(("infonce", "siglip")), "parallel": rng.choice(("ddp", "fsdp"))}
    made |= {"accumulate": rng.choice((1, 1, 2, 3, 4)), "steps": rng.randint(3, 8), "seed": rng.randrange(1000)}
    made |= {"lr": rng.choice((1e-3, 1e-2)), "clip_norm": rng.choice((0.1, 1.0)), "ema": rng.choice((0.5, 0.9))}
    return made | {"weight_decay": rng.choice((0.0, 0.05))}


def loss_of(kind: str, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of this rank's rows; scale 20, bias -5."""
    scale, bias = torch.tensor(20.0, dtype=image.dtype), torch.tensor(-5.0, dtype=image.dtype)
    if kind == "siglip":
        return sigmoid_loss(image, text, scale, bias, [ids], chunk=3) + right_share(ids)
    if kind == "distillation":
        return distillation_loss(image, text, scale, normalize(text + 1, dim=1), normalize(image, dim=1), scale)
    return contrastive_loss(image, text, scale, same_caption(ids) if "groups" in kind else None)


def rows(seed: int, size: int, dim: int) -> tuple[torch.Tensor, ...]:
    """image, text (size, dim) unit rows in float32, and ids (size,)."""
    rng = torch.Generator().manual_seed(seed)
    made = [normalize(torch.randn(size, dim, generator=rng), dim=1) for _ in range(2)]
    return *made, torch.randint(0, size // 2 + 1, (size,), generator=rng)


def gathered(kind: str, seed: int, size: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch's loss, and the gradients by this rank's rows, (2, b, dim)."""
    share = size // ranks.world_size()
    image, text, ids = (t[ranks.rank() * share :][:share] for t in rows(seed, size, dim))
    image, text = (t.clone().requires_grad_() for t in (image, text))
    loss = loss_of(kind, image, text, ids)
    (loss / ranks.world_size()).backward()
    return ranks.total(loss.detach()) / ranks.world_size(), torch.stack([image.grad, text.grad])


def work(folder: Path, given: dict, batches: list[tuple], steps: int) -> None:
    """On each rank."""
    made = [gathered(*batch) for batch in batches]
    torch.save(made, folder / f"gathered-{ranks.rank()}.pt")
    trained = crew.train(folder / "two", **given)
    if ranks.is_main():
        torch.save(trained, folder / "two.pt")
    clip(folder, "clip-two", steps)


def clip(folder: Path, name: str, steps: int) -> None:
    """`unclip train clip` with nothing random in it but the order of the pictures."""
    fit = FitConfig(steps=steps, batch_size=8, precision="fp32", lr=1e-3)
    train_clip(folder / "shards", folder / name, config_from_json(ClipConfig, TINY, "tiny"), fit, device="cpu")


def errors(rng: random.Random, folder: Path) -> tuple[dict[str, float], str]:
    """Relative errors of losses and gradients to float64; largest differences of weights."""
    given, steps = settings(rng), rng.randint(2, 5)
    shape = 2 * rng.randint(1, 40), rng.choice((4, 64))
    batches = [(kind, rng.randrange(1 << 20), *shape) for kind in LOSSES]
    tiny.shards(folder / "shards", n=20, per_shard=7)
    crew.run(2, work, folder, given, batches, steps)

    found = {"two ranks: gathered loss": 0.0, "two ranks: gathered gradients": 0.0}
    both = [torch.load(folder / f"gathered-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for n, (kind, *how) in enumerate(batches):
        image, text, ids = rows(*how)
        image, text = (t.double().requires_grad_() for t in (image, text))
        loss = loss_of(kind, image, text, ids)
        loss.backward()
        wanted, made = torch.stack([image.grad, text.grad]), torch.cat([both[0][n][1], both[1][n][1]], dim=1)
        far = float(abs(both[0][n][0].double() - loss.detach()) / loss.detach().clamp(min=0.1))
        apart = float((made - wanted).norm() / wanted.norm().clamp(min=0.2))
        found["two ranks: gathered loss"] = max(found["two ranks: gathered loss"], far)
        found["two ranks: gathered gradients"] = max(found["two ranks: gathered gradients"], apart)
    two = torch.load(folder / "two.pt", weights_only=True)
    alone = {name: value for name, value in given.items() if name not in ("accumulate", "parallel")}
    found["two ranks: weights of the small towers"] = crew.difference(crew.train(folder / "one", **alone), two)
    clip(folder, "clip-one", steps)
    found["two ranks: weights of train clip"] = apart_by(folder / "clip-one", folder / "clip-two")
    return found, f"{given}, {shape}, {steps} steps"


def apart_by(one: Path, other: Path) -> float:
    """The largest difference between the weights of two CLIP folders."""
    from clip_train.model import Clip

    weights = [Clip.load(folder).model.state_dict() for folder in (one, other)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
