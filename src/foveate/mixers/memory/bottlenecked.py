"""The cache processor of Bottlenecked Transformers: a small network that rewrites keys and values of a pretrained model
whenever a step of reasoning ends, so that they hold what the future needs rather than the text.

Of one layer, P entries: those of the finished step and the few older ones that it attended to most. For entry j, at
position p_j, with its keys before rotary embedding k_j and values v_j of all KV heads side by side:
    u_j = W_in LN [k_j; v_j] + e_(new or recalled)
    u   = blocks(u)                     pre-norm transformer blocks; attention over P in both directions, rotary by p_j
    [dk_j; dv_j] = W_out u_j            W_out = 0 at first: nothing is rewritten until trained
    k_j += g dk_j,  v_j += g dv_j       g: a learned number per layer, 1 at first
Every layer has weights of its own: 4 Hkv D width + 12 blocks width^2 each. Cost O(P (Hkv D + width) width + P^2 width).

Paper: 2025 (arXiv 2505.16950), no code. Newlines as steps' ends, what is rewritten, attention in both directions and
the frozen model are the paper's; the processor's form and sizes are this library's. A layer's processor does not read
other layers' entries, because layers recall different ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.positions import Positions, Rope
from foveate.attention.shapes import match
from foveate.attention.softmax import attend
from foveate.errors import OptionError
from foveate.registry import register


class ProcessorBlock(nn.Module):
    """A pre-norm transformer block over u [B, P, width], in both directions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rope = Rope(width // heads)
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, u: Tensor, at: Tensor, places: Positions) -> Tensor:
        """at: [B, P] positions.    places: the same for queries and keys, -1 for keys that are none."""
        q, k, v = self.qkv(self.norm(u)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = attend(self.rope.rotate(q, at), self.rope.rotate(k, at), v, positions=places, causal=False)
        u = u + self.o(o.transpose(1, 2).flatten(2))
        return u + self.down(F.gelu(self.up(self.mlp_norm(u))))


class LayerProcessor(nn.Module):
    """What rewrites the entries of one layer; features: Hkv (D + Dv)."""

    def __init__(self, features: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.enter = nn.Linear(features, width)
        self.kind = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(ProcessorBlock(width, heads) for _ in range(blocks))
        self.leave = nn.Linear(width, features, bias=False)
        self.gate = nn.Parameter(torch.ones(()))
        nn.init.zeros_(self.leave.weight)

    def forward(self, k: Tensor, v: Tensor, at: Tensor, new: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([each.transpose(1, 2).flatten(2) for each in (k, v)], -1).to(self.gate.dtype)
        # Padding is not read; a row of nothing else reads itself, so that no softmax is empty.
        places = at.masked_fill(~real & real.any(1, keepdim=True), -1)
        u = self.enter(self.norm(x)) + self.kind(new.long())
        for block in self.blocks:
            u = block(u, at, Positions(at, places[:, None], holes=True))
        change = self.gate * self.leave(u)
        sizes = [k.shape[1] * k.shape[3], v.shape[1] * v.shape[3]]
        dk, dv = (each.unflatten(-1, (k.shape[1], -1)).transpose(1, 2) for each in change.split(sizes, -1))
        return dk, dv


@register(
    "bottlenecked",
    kind="adapter",
    paper="Bottlenecked Transformers: Periodic KV Cache Consolidation for Generalised Reasoning",
    arxiv="2505.16950",
    year=2025,
    applies_to="pretrained causal language models, after training the processor",
    claim=(
        "Chains of four operations, trained on up to four, a small model of 1500 steps and 300 more: solved 0.555 "
        "with the cache processor, 0.496 by the model alone, 0.586 with an adapter of that size; six and eight "
        "operations none by all: above the model, not above an adapter (benchmarks/results/claims/bottlenecked.json)."
    ),
)
class CacheProcessor(nn.Module):
    """Rewrites keys and values of the step just finished and of what it attended to most.

    layers, kv_heads, head_dim: of the model.    width, heads, blocks: of the processor, per layer.
    recall: older entries per layer and step.    sinks: first tokens that are never recalled.
    prompt: whether the prompt is a step.    rotated: keys are read with their rotary embedding.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        width: int = 512,
        heads: int = 8,
        blocks: int = 1,
        recall: int = 32,
        sinks: int = 4,
        prompt: bool = True,
        rotated: bool = False,
    ) -> None:
        for name, value in {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "blocks": blocks}.items():
            _require(value >= 1, f"{name}={value}, allowed: >= 1")
        _require(recall >= 0 and sinks >= 0, f"recall={recall}, sinks={sinks}, allowed: >= 0")
        even = heads >= 1 and width >= 1 and width % (2 * heads) == 0
        _require(even, f"width={width}, heads={heads}, allowed: a multiple of 2 * heads")
        super().__init__()
        self.recall, self.sinks, self.prompt, self.rotated = recall, sinks, prompt, rotated
        self.shape = (kv_heads, head_dim)
        features = 2 * kv_heads * head_dim
        self.layers = nn.ModuleList(LayerProcessor(features, width, heads, blocks) for _ in range(layers))

    def forward(self, layer: int, k: Tensor, v: Tensor, at: Tensor, new: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be added to the entries of one layer.

        Args:
            k, v: [B, Hkv, P, D], keys before rotary embedding (unless `rotated`).    at: [B, P] int64, positions >= 0.
            new: [B, P] bool, entries of the finished step.    real: [B, P] bool, false: padding, which is not read.
        Returns:
            dk, dv: [B, Hkv, P, D], in the processor's dtype.
        Raises:
            ShapeError.
        """
        sizes = match(k=(k, "B Hkv P D"), v=(v, "B Hkv P D"), at=(at, "B P"), new=(new, "B P"), real=(real, "B P"))
        _require(
            (sizes["Hkv"], sizes["D"]) == self.shape, f"k {list(k.shape)}, allowed: {self.shape} as KV heads and D"
        )
        dk, dv = self.layers[layer](k, v, at, new, real)
        return dk, dv


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise OptionError(f"CacheProcessor: {message}")
