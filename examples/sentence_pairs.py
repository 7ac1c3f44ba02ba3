"""Sentence pairs: questions learn to find their answers, made by a small grammar, with hard negatives.

    python examples/sentence_pairs.py
    python examples/sentence_pairs.py --batch 8192 --loss ours

A fact is who did what to which thing. Question and answer put it in different words ("when did anna buy the
crimson car", "anna acquired a ruby automobile yesterday"), so the encoder, a mean of word vectors and a layer,
must learn which words mean the same. A hard negative is an answer with one part wrong. Recall@1: how many
held-out questions are nearer to their answer than to any other held-out fact's.

The same training runs twice, with the `MultipleNegativesRankingLoss` of `hdc_kernels.compat` and with that of
sentence-transformers, or the plain formula where that cannot be imported: the losses agree, the memory does not.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from compare import Row, compare, measured, parser, top_1
from torch import Tensor, nn

from hdc_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss

SCALE = 20.0
TEST = 1000
# Each part of a fact: its meanings, and the words for each of them. Of four words, questions use the first
# two and answers the last two; a name is the same in both.
NAMES = "anna ben carla david emma finn greta hugo ivy jack kate liam"
DEEDS = (
    "buy/order/purchased/acquired sell/trade/auctioned/flogged lose/misplace/forgot/mislaid "
    "find/locate/discovered/spotted break/smash/damaged/wrecked fix/mend/repaired/restored "
    "hide/bury/concealed/stashed paint/draw/portrayed/sketched wash/clean/rinsed/scrubbed "
    "steal/take/grabbed/swiped"
)
COLOURS = (
    "red/crimson/scarlet/ruby blue/azure/navy/cobalt green/emerald/olive/lime white/ivory/pale/snowy "
    "black/dark/ebony/inky yellow/golden/amber/lemon brown/tan/chestnut/hazel pink/rosy/magenta/salmon"
)
THINGS = (
    "bike/cycle/bicycle/tandem car/motor/automobile/vehicle hat/cap/bonnet/beret boat/ship/vessel/yacht "
    "cup/mug/beaker/goblet couch/sofa/settee/divan coat/jacket/parka/anorak lamp/light/lantern/torch "
    "book/novel/volume/tome phone/mobile/handset/receiver rug/carpet/mat/runner photo/picture/snapshot/image"
)
PARTS = [
    [meaning.split("/") for meaning in part.split()] for part in (NAMES, DEEDS, COLOURS, THINGS)
]
OPENINGS = ["when", "where", "why", "how"]
ENDINGS = ["yesterday", "today", "outside", "downtown", "secretly", "cheerfully"]
ARTICLES = ["a", "the", "that"]
WORDS = {word for part in PARTS for words in part for word in words} | {"did"}
NUMBERS = {word: i for i, word in enumerate(sorted(WORDS.union(OPENINGS, ENDINGS, ARTICLES)))}

Features = dict[str, Tensor]  # a column of a batch, as a tokenizer makes it


class Encoder(nn.Module):
    """In place of a SentenceTransformer: what the losses need of one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(len(NUMBERS), width, mode="mean")
        self.layer = nn.Linear(width, width)

    def forward(self, features: Features) -> Features:
        return {"sentence_embedding": self.layer(self.words(features["input_ids"]))}


class PlainLoss(nn.Module):
    """InfoNCE from questions to answers and hard negatives, with the whole B × 2B matrix."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, columns: list[Features], labels: None = None) -> Tensor:
        question, *others = (F.normalize(self.model(x)["sentence_embedding"]) for x in columns)
        logits = self.scale * question @ torch.cat(others).T
        return F.cross_entropy(logits, torch.arange(len(logits)))


def loss_class(which: str) -> tuple[str, Callable[..., nn.Module]]:
    """The loss and its name."""
    if which == "ours":
        return "hdc_kernels.compat.sentence_transformers", MultipleNegativesRankingLoss
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError as error:
        return f"plain PyTorch (sentence_transformers: {error})", PlainLoss
    return "sentence_transformers", losses.MultipleNegativesRankingLoss


def choose(*choices: list[str], rows: int) -> Tensor:
    """One word of each list, at random, in every row: [rows, lists]."""
    columns = [torch.tensor([NUMBERS[word] for word in words]) for words in choices]
    return torch.stack([words[torch.randint(len(words), (rows,))] for words in columns], dim=1)


def put(facts: Tensor, answer: bool) -> Tensor:
    """Random words [B, 4] for the parts of facts [B, 4], of those for questions or for answers."""
    columns = []
    for part, meanings in zip(PARTS, facts.T, strict=True):
        words = torch.tensor([[NUMBERS[w[k % len(w)]] for k in range(4)] for w in part])
        columns.append(words[meanings, torch.randint(2, meanings.shape) + 2 * answer])
    return torch.stack(columns, dim=1)


def questions(facts: Tensor) -> Features:
    around = choose(OPENINGS, ["did"], ARTICLES, rows=len(facts))
    return {"input_ids": torch.cat((around, put(facts, answer=False)), dim=1)}


def answers(facts: Tensor) -> Features:
    around = choose(ARTICLES, ENDINGS, rows=len(facts))
    return {"input_ids": torch.cat((around, put(facts, answer=True)), dim=1)}


def one_part_wrong(facts: Tensor) -> Tensor:
    sizes = torch.tensor([len(part) for part in PARTS])
    part = torch.randint(len(PARTS), (len(facts), 1))
    size = sizes[part]
    step = 1 + (torch.rand(size.shape) * (size - 1)).long()
    return facts.scatter(1, part, (facts.gather(1, part) + step) % size)


def train(which: str, options: argparse.Namespace) -> Row:
    name, make_loss = loss_class(which)
    torch.manual_seed(0)
    facts = torch.cartesian_prod(*(torch.arange(len(part)) for part in PARTS))
    facts = facts[torch.randperm(len(facts))]
    test, known = facts[:TEST], facts[TEST:]
    model = Encoder(options.width)
    loss_of = make_loss(model, scale=SCALE)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    asked, held_out = questions(test), answers(test)
    untrained = recall(model, asked, held_out)
    with measured() as cost:
        for _ in range(options.steps):
            batch = known[torch.randperm(len(known))[: options.batch]]
            columns = [questions(batch), answers(batch), answers(one_part_wrong(batch))]
            loss = loss_of(columns, None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = {"untrained": untrained, "recall@1": recall(model, asked, held_out)}
    return Row(name, loss.item(), found, cost)


@torch.no_grad()
def recall(model: Encoder, asked: Features, held_out: Features) -> float:
    return top_1(model(asked)["sentence_embedding"], model(held_out)["sentence_embedding"])


if __name__ == "__main__":
    command = parser(__doc__, batch=4096, most=math.prod(map(len, PARTS)) - TEST, steps=20)
    command.add_argument("--width", type=int, default=128, help="of the embeddings")
    command.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    note = f"Recall: among the answers of {TEST} held-out facts; chance is {1 / TEST:.1%}."
    compare(train, command.parse_args(), note)
