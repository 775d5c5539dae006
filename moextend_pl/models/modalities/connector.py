"""From the frames of an encoder to a fixed number of tokens: joined neighbours, or learned queries.

Shapes: N sounds, F frames, C channels of the encoder, T tokens of a sound, D width of the language model.
"""

from __future__ import annotations

import math
import re

from torch import Tensor, nn
from torch.nn import functional as F

from moextend_pl.contracts import UserError
from moextend_pl.models.fusion import dense_layers

QFORMER = "qformer"
HEADS, WIDER = 8, 4
"""Most heads of a query block, and how much wider its inner layer is."""


class JoinedFrames(nn.Module):
    """Joins neighbouring frames into one token with all their channels, then linear maps with GELU between them.

    Args:
        frames: F; the last token is filled with zeros where F does not divide.
        tokens: T.
        channels: C.
        width: D.
        depth: Number of linear maps.
    """

    def __init__(self, frames: int, tokens: int, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.joined = tokens, math.ceil(frames / tokens)
        self.layers = dense_layers(channels * self.joined, width, depth)

    def forward(self, features_NFC: Tensor) -> Tensor:
        """Returns (N, T, D)."""
        missing = self.tokens * self.joined - features_NFC.shape[1]
        return self.layers(F.pad(features_NFC, (0, 0, 0, missing)).reshape(len(features_NFC), self.tokens, -1))


class QueryBlock(nn.Module):
    """A block of a Q-Former: self-attention, cross-attention to the frames, an MLP; each with norm and residual.

    Source: BLIP-2, arXiv 2301.12597, as Uni-MoE uses it for sounds (arXiv 2405.11273).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        heads = math.gcd(channels, HEADS)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.own = nn.MultiheadAttention(channels, heads)
        self.cross = nn.MultiheadAttention(channels, heads)
        inner = channels * WIDER
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels))

    def forward(self, queries_TNC: Tensor, features_FNC: Tensor) -> Tensor:
        """Returns the queries, (T, N, C)."""
        x = self.norms[0](queries_TNC)
        queries_TNC = queries_TNC + self.own(x, x, x, need_weights=False)[0]
        x = self.norms[1](queries_TNC)
        queries_TNC = queries_TNC + self.cross(x, features_FNC, features_FNC, need_weights=False)[0]
        return queries_TNC + self.mlp(self.norms[2](queries_TNC))


class QFormer(nn.Module):
    """Learned queries that read the frames in blocks, and a linear map.

    Args:
        tokens: T, the queries.
        channels: C.
        width: D.
        depth: Blocks (Uni-MoE: 4).
    """

    def __init__(self, tokens: int, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.queries = nn.Embedding(tokens, channels)
        self.norm = nn.LayerNorm(channels)
        self.blocks = nn.ModuleList(QueryBlock(channels) for _ in range(depth))
        self.out = nn.Linear(channels, width)

    def forward(self, features_NFC: Tensor) -> Tensor:
        """Returns (N, T, D)."""
        # Contiguous: for what is not, torch's products are other ones, with other last bits, once weights are frozen.
        features_FNC = self.norm(features_NFC).transpose(0, 1).contiguous()
        queries_TNC = self.queries.weight.unsqueeze(1).expand(-1, len(features_NFC), -1).contiguous()
        for block in self.blocks:
            queries_TNC = block(queries_TNC, features_FNC)
        out_NTD: Tensor = self.out(queries_TNC.transpose(0, 1).contiguous())
        return out_NTD


def linear_maps(kind: str) -> int:
    """Returns how many linear maps a connector of joined frames has; 0 for a Q-Former.

    Raises:
        UserError: If there is no such kind.
    """
    match = re.fullmatch(r"linear|mlp([1-9])x_gelu", kind)
    if match is None and kind != QFORMER:
        raise UserError(
            f"Expected `hearing.connector` to be {QFORMER}, linear or mlpNx_gelu with N in 1..9, got {kind!r}."
        )
    return int(match[1] or 1) if match else 0
