"""SimCLR: a small convolutional network learns shapes from unlabelled images that it makes itself.

    python examples/simclr_images.py
    python examples/simclr_images.py --batch 4096 --steps 20 --loss ours

Two random views of every image (cut, flipped, recoloured) go through the network; NT-Xent pulls them together
and pushes all others of the batch away. Then each held-out image takes the shape of its nearest training
image, by the cosine of the network's features.

The same training runs twice, with `fused_nt_xent` and with lightly's `NTXentLoss`, or the plain formula where
lightly cannot be imported: the losses agree, the memory does not.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from compare import Row, compare, measured, parser
from shapes import SHAPES, SIZE, paint
from torch import Tensor, nn

from hdc_kernels import fused_nt_xent

TAU = 0.2
TRAIN, TEST = 8192, 1024
Loss = Callable[[Tensor, Tensor], Tensor]


def loss_function(which: str) -> tuple[str, Loss]:
    """The loss and its name."""
    if which == "ours":
        return "hdc_kernels.fused_nt_xent", partial(fused_nt_xent, temperature=TAU)
    try:
        from lightly.loss import NTXentLoss
    except ImportError as error:
        return f"plain PyTorch (lightly: {error})", plain_nt_xent
    return "lightly.loss.NTXentLoss", NTXentLoss(temperature=TAU)


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """As everyone writes it first, with the whole 2B × 2B matrix."""
    views = F.normalize(torch.cat((first, second)), dim=-1)
    logits = views @ views.T / TAU
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(first)))


class Images(NamedTuple):
    pixels: Tensor  # [N, 3, SIZE, SIZE], about 0
    shapes: Tensor  # [N], the labels, which training does not see


def make_images(count: int, generator: torch.Generator) -> Images:
    """Shapes anywhere, of any size and colour."""
    uniform = partial(torch.rand, generator=generator)
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    pixels = (uniform(count, 3, 1, 1) / 2).repeat(1, 1, SIZE, SIZE)
    centre, radius = uniform(count, 2) * 0.5 - 0.25, 0.5 + 0.25 * uniform(count)
    paint(pixels, shape, centre, radius, 0.4 + 0.6 * uniform(count, 3))
    return Images(pixels + 0.1 * torch.randn(pixels.shape, generator=generator) - 0.5, shape)


def view(pixels: Tensor) -> Tensor:
    """Cut, flip and recolour at random, each image in its own way."""
    batch = len(pixels)
    scale = 0.8 + 0.4 * torch.rand(batch, 1)
    flip = torch.randint(2, (batch, 1)) * 2.0 - 1
    shift = 0.5 * torch.rand(batch, 2) - 0.25
    zero = torch.zeros(batch, 1)
    matrix = torch.cat((scale * flip, zero, shift[:, :1], zero, scale, shift[:, 1:]), dim=1)
    grid = F.affine_grid(matrix.view(batch, 2, 3), list(pixels.shape), align_corners=False)
    cut = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    channels = torch.rand(batch, 3).argsort(1)  # red may become blue
    swapped = cut.gather(1, channels[:, :, None, None].expand_as(cut))
    return swapped * (0.6 + 0.8 * torch.rand(batch, 3, 1, 1))


class Network(nn.Module):
    """Features [B, 128] for the evaluation, and their projection [B, 64] for the loss."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 128))
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(128, 64))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.features(pixels))


@torch.no_grad()
def nearest_neighbour(network: Network, train: Images, test: Images) -> float:
    """How many of `test` have the shape of their nearest neighbour in `train`."""
    network.eval()
    known, asked = (F.normalize(network.features(x.pixels), dim=-1) for x in (train, test))
    nearest = (asked @ known.T).argmax(1)
    network.train()
    return (train.shapes[nearest] == test.shapes).float().mean().item()


def train(which: str, options: argparse.Namespace) -> Row:
    name, loss_of = loss_function(which)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    known, held_out = make_images(TRAIN, generator), make_images(TEST, generator)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=1e-4)
    untrained = nearest_neighbour(network, known, held_out)
    with measured() as cost:
        for _ in range(options.steps):
            pixels = known.pixels[torch.randperm(TRAIN)[: options.batch]]
            loss = loss_of(network(view(pixels)), network(view(pixels)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = nearest_neighbour(network, known, held_out)
    return Row(name, loss.item(), {"untrained": untrained, "accuracy": accuracy}, cost)


if __name__ == "__main__":
    command = parser(__doc__, batch=2048, most=TRAIN, steps=45)
    command.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    note = f"Accuracy: shapes of {TEST} held-out images by nearest neighbour; chance is {1 / len(SHAPES):.1%}."
    compare(train, command.parse_args(), note)
