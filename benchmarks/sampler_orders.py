"""How exactly each sampler follows the ODE, and how well inversion comes back: on mixtures whose denoiser is known.

    python benchmarks/sampler_orders.py

Float64, seconds. Prints four tables: the order of convergence (log2 of the error's ratio from 128 to 256 steps; karras
grid, sigma 20 to 0.05, the last step to 0 left out), the error by calls of the denoiser (karras, sigma 20 to 0.01, then
0), the distance after inverting and sampling again by `ddim`, and the variance that is left of the mixture by `ddpm`
with and without its noise. The mixtures and their exact ends are those of tests/gauss.py.
"""

import math
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent / "tests")  # in place of this folder

from gauss import LINE, PLANE  # noqa: E402

from diffusion.samplers import SAMPLERS, invert, sample  # noqa: E402
from diffusion.schedule import karras_sigmas  # noqa: E402

TOP = 20.0
SHARES = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def main() -> None:
    exact = [name for name, one in SAMPLERS.items() if not one.random and name != "ddpm_mean"]
    start = LINE.quantile(SHARES, TOP)
    orders = []
    for name in exact:
        errors = []
        for steps in (128, 256):
            sigmas = karras_sigmas(steps + 1, 0.05, TOP).double()[:-1]
            reached = sample(name, LINE.denoise, sigmas, None, eta=0.0, start=start)
            errors.append((reached - LINE.quantile(SHARES, 0.05)).abs().mean().item())
        orders.append((name, f"{math.log2(errors[0] / errors[1]):.2f}"))
    table(("sampler", "order"), orders)

    calls, rows, end = (8, 12, 16, 24, 32, 48), [], LINE.quantile(SHARES, 0.0)
    for name in exact:
        cells = []
        for count in calls:
            steps = count // 2 if name == "heun" else count
            reached = sample(name, LINE.denoise, karras_sigmas(steps, 0.01, TOP).double(), None, eta=0.0, start=start)
            cells.append(f"{(reached - end).abs().mean().item():.2g}")
        rows.append((name, *cells))
    table(("mean error by calls", *map(str, calls)), rows)

    rows, x0 = [], PLANE.draw(200, 0)[0]
    for steps in (10, 20, 50):
        sigmas, cells = karras_sigmas(steps, 0.01, TOP).double(), []
        for rounds in (1, 2, 4):
            back = sample("ddim", PLANE.denoise, sigmas, None, start=invert(PLANE.denoise, x0, sigmas, rounds=rounds))
            cells.append(f"{(back - x0).norm(dim=1).median().item():.1g}")
        rows.append((str(steps), *cells))
    table(("steps", "1 call a step", "2", "4"), rows)

    rng, rows = torch.Generator().manual_seed(0), []
    for name in ("ddpm", "ddpm_mean"):

        def noise() -> torch.Tensor:
            return torch.randn(4000, 2, generator=rng, dtype=torch.float64)

        reached = sample(name, PLANE.denoise, karras_sigmas(100, 0.01, TOP).double(), noise)
        rows.append((name, f"{reached.var(dim=0).sum().item():.2f}"))
    rows.append(("true samples", f"{PLANE.draw(4000, 1)[0].var(dim=0).sum().item():.2f}"))
    table(("total variance", ""), rows)


def table(head: tuple, rows: list) -> None:
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n")


if __name__ == "__main__":
    main()
