"""Few bits for states of a cache, in blocks of tokens that are coded once and never again (KIVI, arXiv 2402.02750, section 3).

Keys have channels that are large at every token, so a scale there is for one channel of all tokens of a block; values do not, and have one for each
token. A code stands for ``code * scale + low``. ``low`` is kept as a number of its own: as a zero point among the codes it could not reach
the range of channels that are far from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Tokens coded together."""
SMALLEST = 2.0**-14
"""The least scale, which float16 holds without loss."""


@dataclass(frozen=True)
class Coding:
    """Codes of `bits`, 2 or 4; a scale is for a channel of a block (`along_tokens`), or for a token."""

    bits: int
    along_tokens: bool

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [rows, blocks, `BLOCK`, ceil(channels * bits / 8)], scales and lows float16, of ``states`` [rows, tokens, channels].

        Tokens are so many whole blocks. Scales and lows are [rows, blocks, 1, channels] or [rows, blocks, `BLOCK`, 1].
        """
        blocks = torch.unflatten(states.float(), 1, (-1, BLOCK))
        along = 2 if self.along_tokens else 3
        low = blocks.amin(along, keepdim=True).half()
        scale = ((blocks.amax(along, keepdim=True) - low.float()) / (2**self.bits - 1)).clamp_min(SMALLEST).half()
        codes = ((blocks - low.float()) / scale.float()).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        each = 8 // self.bits
        codes = torch.unflatten(torch.nn.functional.pad(codes, (0, -codes.shape[3] % each)), 3, (-1, each))
        places = torch.arange(each, dtype=torch.uint8, device=codes.device) * self.bits
        packed: Tensor = (codes << places).sum(4, dtype=torch.uint8)
        return packed, scale, low

    def decode(self, parts: tuple[Tensor, ...], channels: int) -> Tensor:
        """[rows, tokens, channels] float32."""
        packed, scale, low = parts
        places = torch.arange(8 // self.bits, dtype=torch.uint8, device=packed.device) * self.bits
        codes = ((packed[..., None] >> places) & (2**self.bits - 1)).flatten(3)[..., :channels]
        states: Tensor = codes.float().mul_(scale.float()).add_(low.float()).flatten(1, 2)
        return states

    def round(self, states: Tensor) -> Tensor:
        """``states`` [rows, tokens, channels] as read back, in their dtype; in a block that is not full, the last token stands for those lacking."""
        tokens = states.shape[1]
        full = torch.cat([states, states[:, -1:].expand(-1, -tokens % BLOCK, -1)], 1)
        decoded: Tensor = self.decode(self.encode(full), states.shape[2])[:, :tokens]
        return decoded.to(states.dtype)
