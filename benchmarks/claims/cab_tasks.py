"""Small stand-ins for CAB's tasks, and a tiny model around a mixer for each of the four patterns.

    lm                causal-self       bytes of the manual: perplexity of a byte (`language.on_text`)
    masked-lm         noncausal-self    bytes of the manual, 15 % hidden: perplexity of those
    super-resolution  noncausal-self    `images.scenes` from half their resolution, 256 tokens: PSNR
    pairs             noncausal-cross   a context of keys with values, queries that name keys: accuracy of the values
    walk              causal-cross      a context of arrows that form a circle, a walk along them: accuracy of each next

Self tasks: the mixer is in every layer after a short convolution, which binds neighbours for mixers that lack
positions (`baseconv` as the first layer of lm). Cross tasks: softmax attention over the context and over the queries,
and the mixer between the two. A token of the context is a pair, and pairs stand in random order.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from images import GRID, SIDE, Block, scenes, with_mixer
from language import on_text
from torch import Tensor, nn

from foveate.lm.data import load_tokenizer, pack, read_documents
from foveate.lm.synthetic import IGNORED, TEST_SEEDS
from foveate.mixers.base import create_mixer

LENGTH, HIDDEN_SHARE = 256, 0.15
SYMBOLS, PAIRS, ASKED = 128, 64, 32
VANILLA = "softmax:rotary=false"

Batch = tuple[tuple[Tensor, ...], Tensor]


class Encoder(nn.Module):
    """A short convolution, learned places, blocks around a mixer, a linear head."""

    def __init__(self, spec: str, convolution: nn.Module, tokens: int, outputs: int, given: argparse.Namespace) -> None:
        super().__init__()
        self.convolution = convolution
        self.places = nn.Parameter(0.02 * torch.randn(tokens, given.dim))
        make = with_mixer(spec, given.dim)
        self.blocks = nn.ModuleList(make(layer) for layer in range(given.layers))
        self.norm, self.head = nn.LayerNorm(given.dim), nn.Linear(given.dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x, GRID)
        return self.head(self.norm(x))


class ByteConvolution(nn.Module):
    """Embedded bytes [B, N] and their neighbours, [B, C, N]."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(vocab, dim), nn.Conv1d(dim, dim, 5, padding=2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.convolution(self.embedding(tokens).transpose(1, 2))


class Reading(Block):
    """A block that also reads a context, through a mixer of its own."""

    def __init__(self, dim: int, mixer: nn.Module, cross: nn.Module) -> None:
        super().__init__(dim, mixer)
        self.cross, self.norm3 = cross, nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.mixer(self.norm1(x))[0]
        x = x + self.cross(self.norm3(x), context=context)[0]
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """One layer over the context, pairs of symbols [B, M, 2], and two that read it for queries [B, N]."""

    def __init__(self, spec: str, given: argparse.Namespace, *, causal: bool) -> None:
        super().__init__()
        dim = given.dim

        def mixer(made: str) -> nn.Module:
            return create_mixer(made, dim=dim, heads=4)

        self.first, self.second, self.asked = (nn.Embedding(SYMBOLS, dim) for _ in range(3))
        self.encoder = Block(dim, mixer(f"{VANILLA},causal=false"))
        own = f"{VANILLA},causal={str(causal).lower()}"
        self.decoder = nn.ModuleList(Reading(dim, mixer(own), mixer(spec)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS)

    def forward(self, pairs: Tensor, queries: Tensor) -> Tensor:
        context = self.encoder(self.first(pairs[..., 0]) + self.second(pairs[..., 1]), GRID)
        x = self.asked(queries)
        for block in self.decoder:
            x = block(x, context)
        return self.head(self.norm(x))


@cache
def manual() -> tuple[Tensor, Tensor, int]:
    """Blocks of bytes [n, LENGTH] to train on and to test on, and how many different bytes there are."""
    tokenizer = load_tokenizer("bytes")
    train, test = pack(read_documents(["manual"]), tokenizer, LENGTH).split(0.03)
    return train.tokens, test.tokens, len(tokenizer)


def hidden_bytes(count: int, seed: int) -> Batch:
    """Bytes [n, LENGTH], hidden ones as a kind of their own; the hidden bytes, -100 elsewhere."""
    train, test, vocab = manual()
    random = torch.Generator().manual_seed(seed)
    text = test if seed >= TEST_SEEDS else train
    tokens = text[torch.randint(len(text), (count,), generator=random)]
    hidden = torch.rand(tokens.shape, generator=random) < HIDDEN_SHARE
    return (tokens.masked_fill(hidden, vocab),), tokens.masked_fill(~hidden, IGNORED)


def coarse_images(count: int, seed: int) -> Batch:
    """Images [n, 1, 16, 16] of the means of 2 x 2 pixels, and these pixels [n, 256, 4]."""
    images, _ = scenes(count, seed, "cpu")
    return (F.avg_pool2d(images, 2),), F.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)


def lookups(count: int, seed: int, *, walk: bool) -> Batch:
    """Pairs [n, PAIRS, 2] and queries [n, ASKED], and what stands beside each: a value, or where its arrow leads."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, SYMBOLS, generator=random).argsort(1)[:, :PAIRS]
    values = keys.roll(-1, 1) if walk else torch.randint(SYMBOLS, keys.shape, generator=random)
    order = torch.rand(keys.shape, generator=random).argsort(1)
    pairs = torch.stack((keys.gather(1, order), values.gather(1, order)), -1)
    return (pairs, keys[:, :ASKED]), values[:, :ASKED]


def byte_encoder(spec: str, given: argparse.Namespace) -> nn.Module:
    vocab = manual()[2]
    return Encoder(spec, ByteConvolution(vocab + 1, given.dim), LENGTH, vocab, given)


def image_encoder(spec: str, given: argparse.Namespace) -> nn.Module:
    return Encoder(spec, nn.Conv2d(1, given.dim, 3, padding=1), (SIDE // 2) ** 2, 4, given)


@dataclass(frozen=True)
class Task:
    """pattern: which the mixer is used in.    metric: what counts, and sign: -1 where less is better.
    make: a model from a mixer's spec.    batch: inputs and targets (a class, -100: none; or numbers), from a seed.
    rate: peak learning rate.    tested: test examples."""

    pattern: str
    metric: str
    sign: int
    make: Callable[..., nn.Module] | None = None
    batch: Callable[..., Batch] | None = None
    rate: float = 1e-3
    tested: int = 512


TASKS = {
    "lm": Task("causal-self", "perplexity", -1),
    "masked-lm": Task("noncausal-self", "perplexity", -1, byte_encoder, hidden_bytes),
    "super-resolution": Task("noncausal-self", "PSNR", 1, image_encoder, coarse_images),
    "pairs": Task("noncausal-cross", "accuracy", 1, partial(Reader, causal=False), partial(lookups, walk=False), 2e-3),
    "walk": Task("causal-cross", "accuracy", 1, partial(Reader, causal=True), partial(lookups, walk=True), 2e-3),
}


def measured(name: str, spec: str, given: argparse.Namespace, seed: int) -> tuple[float | None, int]:
    """Train a model of a mixer on a task; its metric on the test (None: not finite), and its parameters."""
    task = TASKS[name]
    if task.make is None or task.batch is None:
        stack = ["baseconv", *[spec] * (given.layers - 1)]
        row = on_text(stack, argparse.Namespace(**{**vars(given), "seed": seed}))
        return row["perplexity"], row["parameters"]
    torch.manual_seed(seed)
    model = task.make(spec, given).to(given.device)
    fit(model, task, given, seed)
    value = examined(model, task, given, seed)
    return value if math.isfinite(value) else None, sum(each.numel() for each in model.parameters())


def fit(model: nn.Module, task: Task, given: argparse.Namespace, seed: int) -> None:
    """`--steps` steps of AdamW on fresh batches."""
    assert task.batch is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=given.steps, pct_start=0.1)
    model.train()
    for step in range(given.steps):
        inputs, targets = task.batch(given.examples, seed * 10**6 + step)
        outputs = model(*(each.to(given.device) for each in inputs))
        optimizer.zero_grad(set_to_none=True)
        loss(outputs, targets.to(given.device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean square error, or cross entropy in nats where targets are classes."""
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def examined(model: nn.Module, task: Task, given: argparse.Namespace, seed: int) -> float:
    """The task's metric on examples that training does not draw."""
    assert task.batch is not None
    model.eval()
    inputs, targets = task.batch(task.tested, TEST_SEEDS + seed)
    pieces: Any = zip(*(each.to(given.device).split(64) for each in inputs))
    outputs = torch.cat([model(*each) for each in pieces]).cpu()
    if task.metric == "accuracy":
        return float((outputs.argmax(-1) == targets).float().mean())
    mean = float(loss(outputs, targets))
    return -10 * math.log10(mean) if task.metric == "PSNR" else math.exp(min(mean, 700.0))
