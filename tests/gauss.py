"""A mixture of Gaussians, of which everything that a sampler should reach is known in closed form."""

import torch


class Gaussians:
    """Shares (K,) of N(centre, std^2 I): centres (K, D), stds (K,). Float64."""

    def __init__(self, centres, stds, shares):
        self.centres, self.stds, self.shares = (
            torch.tensor(values, dtype=torch.float64) for values in (centres, stds, shares)
        )

    def denoise(self, x, sigma):
        """E[x0 | x], the exact denoiser. x: (B, D), sigma (B,)."""
        spread = self.stds**2 + sigma[:, None] ** 2  # (B, K)
        away = x[:, None] - self.centres  # (B, K, D)
        score = self.shares.log() - away.square().sum(-1) / (2 * spread) - spread.log() * x.shape[1] / 2
        each = self.centres + (self.stds**2 / spread)[..., None] * away
        return (score.softmax(1)[..., None] * each).sum(1)

    def draw(self, count, seed):
        """(count, D) true samples, and which component each is of, (count,)."""
        rng = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.shares, count, replacement=True, generator=rng)
        noise = torch.randn(count, self.centres.shape[1], generator=rng, dtype=torch.float64)
        return self.centres[which] + self.stds[which, None] * noise, which

    def quantile(self, share, sigma):
        """x (B, 1) of the noisy distribution below which `share` (B,) of it lies, in one dimension, by bisection.

        The ODE keeps every x at its share: where it takes x is known to the last digit.
        """
        low = torch.full_like(share, -6 * sigma - 10)
        high, spread = -low, (self.stds**2 + sigma**2).sqrt()
        for _ in range(80):
            middle = (low + high) / 2
            below = (self.shares * torch.special.ndtr((middle[:, None] - self.centres[:, 0]) / spread)).sum(1) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2)[:, None]


LINE = Gaussians([[-1.0], [2.0]], [0.4, 0.3], [0.25, 0.75])  # one dimension, two unlike modes
PLANE = Gaussians([[-2.0, 0.0], [1.5, 2.0], [1.0, -1.5]], [0.3, 0.6, 0.15], [0.2, 0.5, 0.3])


def energy_distance(a, b):
    """Szekely and Rizzo: 2 E|a - b| - E|a - a'| - E|b - b'|, 0 only for equal distributions. (N, D), (M, D)."""

    def within(x):
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()
