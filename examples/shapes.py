"""The examples' images: shapes of one colour each on a plain ground, with noise."""

import torch
from torch import Tensor

SIZE = 16
SHAPES = {  # of the coordinates (u, v), in which the shape fills the square from −1 to 1
    "disc": lambda u, v: u**2 + v**2 < 1,
    "ring": lambda u, v: ((u**2 + v**2) - 0.65).abs() < 0.35,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.85,
    "diamond": lambda u, v: u.abs() + v.abs() < 1,
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.35) & (u.abs() + v.abs() < 1.2),
    "triangle": lambda u, v: (v < 0.8) & (2 * u.abs() < v + 1),
    "bar": lambda u, v: (u.abs() < 1) & (v.abs() < 0.4),
    "arrow": lambda u, v: (v.abs() < 0.9) & ((u - v.abs() / 2).abs() < 0.4),
}


def paint(images: Tensor, shape: Tensor, centre: Tensor, radius: Tensor, colour: Tensor) -> None:
    """Put one shape on each image.

    Args:
        images: [B, 3, SIZE, SIZE], changed in place.
        shape: [B], positions in SHAPES.
        centre: [B, 2], x and y between −1 and 1.
        radius: [B]; 1 is half an image.
        colour: [B, 3].
    """
    line = torch.linspace(-1, 1, SIZE)
    u = (line - centre[:, :1])[:, None, :] / radius[:, None, None]
    v = (line - centre[:, 1:])[:, :, None] / radius[:, None, None]
    inside = torch.zeros(len(images), SIZE, SIZE, dtype=torch.bool)
    for number, function in enumerate(SHAPES.values()):
        rows = shape == number
        inside[rows] = function(u[rows], v[rows])
    images.copy_(torch.where(inside[:, None], colour[:, :, None, None], images))
