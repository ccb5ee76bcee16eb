"""Small random moves of a batch of pictures, on the device that trains."""

import torch
import torch.nn.functional as F


def augment(pixels: torch.Tensor, strength: float, rng: torch.Generator) -> torch.Tensor:
    """Zoom, stretch, turn, shift, and change contrast and brightness, each picture by its own draw.

    No mirroring: letters, arrows and flags do not survive it. What comes in from outside the frame is white.
    pixels: (B, 3, S, S) uint8. strength: 0 none; 1: zoom 0.75..1.1, stretch and turn 0.1 and 0.15 rad, shift 6 %,
    contrast 20 %, brightness 10 %. Returns (B, 3, S, S) float32 in 0..255.
    """
    pixels = pixels.float()
    if not strength:
        return pixels

    def draw(low: float, high: float) -> torch.Tensor:
        uniform = torch.rand(len(pixels), generator=rng, device=pixels.device)
        return strength * (low + (high - low) * uniform)

    zoom, stretch, turn = 1 + draw(-0.25, 0.1), draw(-0.1, 0.1).exp(), draw(-0.15, 0.15)
    shift_x, shift_y = draw(-0.12, 0.12), draw(-0.12, 0.12)  # of half the side, as affine_grid counts
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    moves = torch.stack([cos * stretch, -sin, shift_x, sin, cos / stretch, shift_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(moves, list(pixels.shape), align_corners=False)
    pixels = 255 - F.grid_sample(255 - pixels, grid, align_corners=False)
    contrast, brightness = (1 + draw(-0.2, 0.2)).view(-1, 1, 1, 1), draw(-25, 25).view(-1, 1, 1, 1)
    return ((pixels - 128) * contrast + 128 + brightness).clamp(0, 255)
