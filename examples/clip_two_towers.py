"""CLIP: a tower for images and one for their descriptions learn to find each other, with a learnable scale.

    python examples/clip_two_towers.py
    python examples/clip_two_towers.py --batch 8192 --chunk 256 --loss ours

An image shows two shapes, and its text says which, "a red disc above a blue ring" or, as well, "a blue ring
below a red disc". The loss sees the whole batch, the towers through `InChunks` only some rows at a time, so
that their activations stay small. What is held out are combinations: no test image's text occurs in training.

The same training runs twice, with `hdc_kernels.CLIP` and with open_clip's `ClipLoss`, or the plain formula
where open_clip cannot be imported: the losses agree, the memory does not.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from compare import Row, compare, measured, parser, top_1
from shapes import SHAPES, SIZE, paint
from torch import Tensor, nn

from hdc_kernels import CLIP, InChunks

SCALE = 1 / 0.07
TEST = 1000
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.2, 0.3, 1.0)}
COLOURS |= {"yellow": (0.9, 0.9, 0.1), "white": (1.0, 1.0, 1.0), "purple": (0.6, 0.1, 0.7)}
GROUNDS = {"black": 0.0, "grey": 0.4}
RELATIONS = (
    "left of",
    "above",
    "right of",
    "below",
)  # the last two say the first two the other way round
WORDS = {word: i for i, word in enumerate([*COLOURS, *SHAPES, *RELATIONS, *GROUNDS])}
CHOICES = (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(RELATIONS) // 2, len(GROUNDS))


class Peer(nn.Module):
    """A loss of normalised rows, with the parameter and the bound that `CLIP` has."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.loss = loss

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100))
        return self.loss(F.normalize(image), F.normalize(text), self.logit_scale.exp())


def loss_function(which: str) -> tuple[str, nn.Module]:
    """The loss and its name."""
    if which == "ours":
        return "hdc_kernels.CLIP", CLIP(SCALE)
    try:
        from open_clip import ClipLoss
    except ImportError as error:
        return f"plain PyTorch (open_clip: {error})", Peer(plain_clip)
    return "open_clip.ClipLoss", Peer(ClipLoss())


def plain_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As the paper's pseudocode has it, with the whole B × B matrix."""
    logits = scale * image @ text.T
    rows = torch.arange(len(logits))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def draw(scenes: Tensor) -> Tensor:
    """Images [B, 3, SIZE, SIZE] of scenes [B, 6], one of the CHOICES in each column."""
    palette = torch.tensor(list(COLOURS.values()))
    ground = torch.tensor(list(GROUNDS.values()))[scenes[:, 5]]
    images = ground[:, None, None, None].repeat(1, 3, SIZE, SIZE)
    towards_second = F.one_hot(scenes[:, 4], 2) * 0.5
    for sign, (colour, shape) in ((-1, (0, 1)), (1, (2, 3))):
        centre = sign * towards_second + 0.2 * torch.rand(len(scenes), 2) - 0.1
        radius = 0.4 + 0.1 * torch.rand(len(scenes))
        paint(images, scenes[:, shape], centre, radius, palette[scenes[:, colour]])
    return images + 0.05 * torch.randn_like(images)


def describe(scenes: Tensor) -> Tensor:
    """Texts [B, 6]: colour, shape, relation, colour, shape, ground; at random, the second shape is named first."""
    start = [WORDS[next(iter(words))] for words in (COLOURS, SHAPES, COLOURS, SHAPES)]
    first, second = (scenes[:, :4] + torch.tensor(start)).split(2, dim=1)
    turn = torch.rand(len(scenes), 1) < 0.5
    relation = scenes[:, 4:5] + 2 * turn + WORDS["left of"]
    ground = scenes[:, 5:6] + WORDS["black"]
    named = torch.where(turn, second, first), torch.where(turn, first, second)
    return torch.cat((named[0], relation, named[1], ground), dim=1)


class ImageTower(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (SIZE // 4) ** 2, 256),
            nn.ReLU(),
            nn.Linear(256, width),
        )


class TextTower(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Embedding(len(WORDS), 32),
            nn.Flatten(),  # all texts have six words: the place of a word tells its part
            nn.Linear(6 * 32, 256),
            nn.ReLU(),
            nn.Linear(256, width),
        )


def train(which: str, options: argparse.Namespace) -> Row:
    name, loss_of = loss_function(which)
    torch.manual_seed(0)
    scenes = torch.cartesian_prod(*map(torch.arange, CHOICES))
    scenes = scenes[torch.randperm(len(scenes))]
    held_out, known = scenes[:TEST], scenes[TEST:]
    images = InChunks(ImageTower(options.width), options.chunk)
    texts = InChunks(TextTower(options.width), options.chunk)
    everything = nn.ModuleList((images, texts, loss_of))
    optimizer = torch.optim.Adam(everything.parameters(), lr=options.rate)
    test = draw(held_out), describe(held_out)
    with measured() as cost:
        for _ in range(options.steps):
            batch = known[torch.randperm(len(known))[: options.batch]]
            loss = loss_of(images(draw(batch)), texts(describe(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        image, text = images(test[0]), texts(test[1])
    found = {"image to text": top_1(image, text), "text to image": top_1(text, image)}
    return Row(name, loss.item(), found, cost)


if __name__ == "__main__":
    command = parser(__doc__, batch=4096, most=math.prod(CHOICES) - TEST, steps=45)
    command.add_argument("--chunk", type=int, default=512, help="rows in a tower at a time")
    command.add_argument("--width", type=int, default=64, help="of the embeddings")
    command.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    note = f"Top-1 among {TEST} held-out pairs; chance is {1 / TEST:.1%}."
    compare(train, command.parse_args(), note)
