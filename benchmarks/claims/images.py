"""What the claims about mixers of images share: two image tasks, and a small vision transformer.

glyphs: an image of 32 x 32 holds three 6 x 6 glyphs out of ten, at even places, in noise; two of them are alike.
Which one? Telling glyphs apart is local, finding the pair is not. Glyphs and images come from seeds.
fashion-mnist: which of ten kinds of clothes; Debian's package dataset-fashion-mnist, padded to 32 x 32.

Every script takes --data, --folder, --device, --steps, --seeds, --batch and --out; fashion-mnist's result is
<system>_fashion.json.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import claim as claims
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import create_mixer

TASKS = {
    "glyphs": "which of ten glyphs is there twice in a noisy image of 32 x 32 (chance 0.1)",
    "fashion-mnist": "which of ten kinds of clothes, Fashion-MNIST's 60,000 images to train and 10,000 to test",
}
CLOTHES = Path("/usr/share/datasets/fashion-mnist")
SIDE, GLYPH, KINDS, PATCH = 32, 6, 10, 4
GRID = (SIDE // PATCH, SIDE // PATCH)


def arguments(doc: str | None, *, steps: int = 1500, seeds: int = 2) -> argparse.Namespace:
    made = claims.parser(doc, steps=steps, seeds=seeds, batch=128, folder=CLOTHES)
    made.add_argument("--data", choices=tuple(TASKS), default="glyphs")
    given = made.parse_args()
    if given.data == "fashion-mnist" and not (given.folder / "t10k-images-idx3-ubyte.gz").is_file():
        made.error(f"{given.folder} has no Fashion-MNIST: apt install dataset-fashion-mnist, or give --folder")
    return given


def record(name: str, claim: str, given: argparse.Namespace, started: float, **rows: Any) -> None:
    """`claim.record`, with the task; each task has its own file."""
    suffix = "" if given.data == "glyphs" else "_fashion"
    claims.record(name + suffix, claim, given, started, task=TASKS[given.data], **rows)


def scenes(count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 32, 32] and the kind of the glyph that is there twice, [count]."""
    glyphs = torch.randint(0, 2, (KINDS, GLYPH, GLYPH), generator=torch.Generator().manual_seed(1234)).float()
    random = torch.Generator().manual_seed(seed)
    kinds = torch.rand(count, KINDS, generator=random).argsort(1)[:, :2]
    # One place in each of three of the four quarters, so that glyphs do not cover each other.
    quarters = torch.rand(count, 4, generator=random).argsort(1)[:, :3]
    room = (SIDE // 2 - GLYPH) // 2 + 1
    at = 2 * torch.randint(room, (count, 3, 2), generator=random)
    top = quarters // 2 * (SIDE // 2) + at[..., 0]
    left = quarters % 2 * (SIDE // 2) + at[..., 1]
    images = 0.3 * torch.randn(count, SIDE, SIDE, generator=random)
    line = torch.arange(GLYPH)
    rows = (top[..., None] + line)[..., None].expand(-1, -1, -1, GLYPH)
    columns = (left[..., None] + line)[..., None, :].expand(-1, -1, GLYPH, -1)
    drawn = glyphs[torch.stack((kinds[:, 0], kinds[:, 0], kinds[:, 1]), 1)]
    images[torch.arange(count)[:, None, None, None], rows, columns] += drawn
    return images[:, None].to(device), kinds[:, 0].to(device)


@functools.cache
def clothes(part: str, folder: Path, device: str) -> tuple[Tensor, Tensor]:
    """All images [N, 1, 32, 32] of mean 0 and deviation 1, and their kinds [N]. part: "train" or "t10k"."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        kinds = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()
    images = F.pad(pixels.float() / 255, (2, 2, 2, 2))
    return ((images - 0.219) / 0.332).to(device), kinds.to(device)


def batch_of(given: argparse.Namespace, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """What is trained on at one step."""
    if given.data == "glyphs":
        return scenes(given.batch, seed * 10**6 + step, given.device)
    images, kinds = clothes("train", given.folder, given.device)
    random = torch.Generator().manual_seed(seed * 10**6 + step)
    chosen = torch.randint(len(images), (given.batch,), generator=random).to(given.device)
    return images[chosen], kinds[chosen]


def tests_of(given: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    if given.data == "glyphs":
        return scenes(2048, 10**9 + seed, given.device)
    return clothes("t10k", given.folder, given.device)


class Block(nn.Module):
    """A transformer block around a mixer."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.mixer(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Patches, blocks (called with tokens and the grid), the mean token, a linear head."""

    def __init__(self, block: Callable[[int], nn.Module], dim: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(GRID[0] * GRID[1], dim))
        self.blocks = nn.ModuleList(block(layer) for layer in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, KINDS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x, GRID)
        return self.head(self.norm(x).mean(1))


def with_mixer(spec: str, dim: int = 64, heads: int = 4) -> Callable[[int], nn.Module]:
    """Blocks around one mixer; mixers of a grid get the task's."""
    name = spec.partition(":")[0]
    grid = {"height": GRID[0], "width": GRID[1]} if name in ("mala", "inline", "agent") else {}
    return lambda layer: Block(dim, create_mixer(spec, dim=dim, heads=heads, **grid))


def trained(block: Callable[[int], nn.Module], given: argparse.Namespace, seed: int) -> tuple[Classifier, float]:
    """A classifier after `--steps` steps, and its accuracy on images it has not seen."""
    torch.manual_seed(seed)
    model = Classifier(block).to(given.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=given.steps, pct_start=0.1)
    for step in range(given.steps):
        images, kinds = batch_of(given, seed, step)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), kinds).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    images, kinds = tests_of(given, seed)
    with torch.no_grad():
        found = torch.cat([model(each).argmax(-1) for each in images.split(256)])
    return model, float((found == kinds).float().mean())


def accuracies(
    blocks: dict[str, Callable[[int], nn.Module]],
    given: argparse.Namespace,
    save: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], dict[str, Classifier]]:
    """A row for each kind of block, with the accuracy of every seed, and the last seed's models.

    save: called with the rows so far after each of them."""
    rows: list[dict[str, Any]] = []
    models = {}
    for name, block in blocks.items():
        started, reached = time.perf_counter(), []
        for seed in range(given.seeds):
            models[name], accuracy = trained(block, given, seed)
            reached.append(round(accuracy, 4))
        parameters = sum(each.numel() for each in models[name].parameters())
        seconds = round(time.perf_counter() - started, 1)
        rows.append(
            {
                "blocks": name,
                "accuracy": sum(reached) / len(reached),
                "by_seed": reached,
                "parameters": parameters,
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
        save(rows)
    return rows, models
