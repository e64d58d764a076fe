"""A pre-norm transformer that predicts the next token."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def micro_sites(depth: int) -> tuple[str, ...]:
    """Three sites in each block, as Launay et al. 2020 have them: after attention, in the FFN, and at the block's end."""
    parts = ("attended", "ffn.act", "")
    return tuple(f"blocks.{i}.{part}".rstrip(".") for i in range(depth) for part in parts)


class Attention(nn.Module):
    """Self-attention [N, T, d] -> [N, T, d], its projections Linear modules of their own.

    Causal, unless it is told at which places a token is `there`, bool [N, T]: then all tokens see all that are.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        # the heads' outputs, a module so that they can be a site
        self.mixed = nn.Identity()

    def forward(self, h: Tensor, there: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if there is None else there[:, None, None],
            is_causal=there is None,
        )
        return self.out(self.mixed(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """`h + attention(norm(h))`, then `h + ffn(norm(h))`.

    Told at which places a token is `there`, bool [N, T], its output is zero elsewhere.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.drop1 = nn.Dropout(dropout)
        # the sum after attention, a module so that it can be a site
        self.attended = nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            OrderedDict(
                into=nn.Linear(width, 4 * width),
                act=nn.GELU(),
                out=nn.Linear(4 * width, width),
                drop=nn.Dropout(dropout),
            )
        )

    def forward(self, h: Tensor, there: Tensor | None = None) -> Tensor:
        h = self.attended(h + self.drop1(self.attention(self.norm1(h), there)))
        h = h + self.ffn(self.norm2(h))
        return h if there is None else h * there.unsqueeze(-1)


class Stage(nn.Module):
    """Blocks that read the same activity: `h`, and of each block `attention(norm(h)) + ffn(norm(h))`."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, h: Tensor) -> Tensor:
        out = h
        for block in self.blocks:
            assert isinstance(block, Block)
            # one after another, so that each sum is of a branch and what has none
            out = out + block.drop1(block.attention(block.norm1(h)))
            out = out + block.ffn(block.norm2(h))
        return out


class Embedding(nn.Module):
    """Tokens and their positions: int64 [N, T] -> [N, T, d]."""

    def __init__(self, context: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.token(tokens) + self.position(places)


class Transformer(nn.Module):
    """Embedding, `depth` blocks, a norm and a linear head: int64 [N, T] -> scores [N, T, vocabulary].

    `in_shape` is (T,): T is the longest sequence. Weights start as GPT-2's: normal with 0.02, and the last layer of each
    branch smaller by the root of the number of branches.

    stages: into how many stages the blocks are divided. All branches of a stage read the same activity, as in GPT-J and PaLM
        (a stage per block) and in Touvron et al. 2022 (two blocks beside each other; arXiv:2203.09795). By default each
        branch reads what the one before it left.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        norm: bool = True,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        stages: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = Embedding(in_shape[0], classes, width)
        blocks = [Block(width, heads, dropout) for _ in range(depth)]
        self.blocks = nn.Sequential(*(blocks if stages is None else _staged(blocks, stages)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                last = name.endswith(("attention.out.weight", "ffn.out.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * depth) if last else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def _staged(blocks: Sequence[Block], stages: int) -> list[Stage]:
    """The blocks in so many stages of equal size."""
    size, rest = divmod(len(blocks), stages)
    if rest:
        raise ValueError(f"{len(blocks)} blocks cannot be divided into {stages} stages")
    return [Stage(blocks[i : i + size]) for i in range(0, len(blocks), size)]
