"""RotaryEmbedding: rotary positions for a model of one's own, with rotary-embedding-torch's names and signatures.

    from rope import RotaryEmbedding, apply_rotary_emb      # in place of rotary_embedding_torch

Pairs are interleaved, (2m, 2m+1); dims past the rotated ones are left alone. Frequencies are fp32 (fp64 where
`custom_freqs` are), angles fp64, and cos and sin are rounded once, whatever the input's dtype. State dicts go either
way. Numbers agree with the package's to 1e-5 (tests/rope/test_embedding.py), except where its version 0.9.1 is wrong:

- *xPos with cached keys.* It centres the query's scale on the queries' length and the keys' on theirs, so one query's
  scores shrink as the cache grows: by ζ^(n/1024) a pair for n keys. Here both have one centre, the middle of the
  queries: scores depend on the distance alone, and far keys decay to zero instead of overflowing. With
  `seq_before_head_dim`, it puts the keys' scales on the heads; here any `seq_dim` will do.
- *Low precision.* It counts positions in the input's dtype: in bf16 there is no 257. And its frequency cache keeps
  those angles for later fp32 calls. Here no position, angle or table sees the input's dtype, and `module.bfloat16()`
  does not round the frequencies.
- *Its cache, elsewhere.* With `freqs_for="lang"`, the first axis's `offsets` count for every later axis and call.
  Frequencies loaded from a state dict are ignored once a length is cached. A number of frequencies other than dim/2
  (`constant`, `custom_freqs`) does not fit. Here a table is kept for whole positions of one frequency vector alone.
- *dim 2* is a division by zero there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from prerope.rope import frequencies
from prerope.rope.embedding.axial import along, apply_rotary_emb, broadcat, cos_sin, turn
from prerope.rope.embedding.table import PositionTable
from prerope.rope.rotation import Table
from torch import Tensor, nn

XPOS_SPAN = math.log(3.5)
"""−ln ζ_0 = ln 1.4/0.4: how fast xPos scales its fastest pair, for every dim."""


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions (Su 2021, arXiv 2104.09864); one for all layers will do.

    Tensors are [..., n, head_dim], or [..., n, H, head_dim] with `seq_before_head_dim`; n tokens at positions offset…
    The state dict holds `freqs` [D/2] alone.

    Args:
        dim: D, the dims that rotate, even: the leading ones of a head.
        custom_freqs: [m] radians a position, in place of `freqs_for`'s; then 2m dims rotate.
        freqs_for: `lang`: θ^(−2m/D). `pixel`: D/2 steps from π to π·max_freq/2, for coordinates in −1…1.
            `constant`: `num_freqs` ones.
        theta: the base of `lang`.
        max_freq: of `pixel`.
        num_freqs: of `constant`.
        learned_freq: `freqs` is trained.
        use_xpos: keys decay with distance (Sun 2022, arXiv 2212.10554); causal models only.
        xpos_scale_base: tokens over which a pair decays by its ζ.
        interpolate_factor: positions are divided by it (Chen 2023, arXiv 2306.15595); at least 1.
        theta_rescale_factor: NTK: s of θ·s^(D/(D−2)) (bloc97 2023).
        seq_before_head_dim: the sequence is axis −3 unless `seq_dim` says otherwise, else −2.
        cache_if_possible: keep cos and sin of the positions seen, where the frequencies are not learned.
        cache_max_seq_len: how many positions at most.

    Raises ValueError for an interpolation below 1, an odd dim, an unknown `freqs_for`, and frequencies that are not one
    vector or, with xPos, not dim/2.
    """

    freqs: nn.Parameter
    xpos_decay: Tensor
    apply_rotary_emb = staticmethod(apply_rotary_emb)

    def __init__(
        self,
        dim: int,
        custom_freqs: Tensor | None = None,
        freqs_for: Literal["lang", "pixel", "constant"] = "lang",
        theta: float = 10000,
        max_freq: float = 10,
        num_freqs: int = 1,
        learned_freq: bool = False,
        use_xpos: bool = False,
        xpos_scale_base: float = 512,
        interpolate_factor: float = 1.0,
        theta_rescale_factor: float = 1.0,
        seq_before_head_dim: bool = False,
        cache_if_possible: bool = True,
        cache_max_seq_len: int = 8192,
    ) -> None:
        super().__init__()
        if interpolate_factor < 1:
            raise ValueError(f"interpolate_factor divides positions and must be at least 1; got {interpolate_factor}")
        if custom_freqs is None:
            custom_freqs = _named_freqs(freqs_for, dim, theta, theta_rescale_factor, max_freq, num_freqs).float()
        self.freqs = nn.Parameter(_vector(custom_freqs), requires_grad=learned_freq)
        self.freqs_for = freqs_for
        self.learned_freq = learned_freq
        self.interpolate_factor = interpolate_factor
        self.seq_before_head_dim = seq_before_head_dim
        self.default_seq_dim = -3 if seq_before_head_dim else -2
        self.cache_if_possible = cache_if_possible
        self.cache_max_seq_len = cache_max_seq_len
        self._kept = PositionTable(cache_max_seq_len)
        self.use_xpos = use_xpos
        self.scale_base = xpos_scale_base
        if use_xpos:
            if dim != 2 * len(self.freqs):
                raise ValueError(
                    f"xPos needs a frequency for each pair of dim {dim}; got {len(self.freqs)} frequencies"
                )
            self.register_buffer("xpos_decay", frequencies.xpos_decay(dim, xpos_scale_base), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.freqs.device

    def forward(self, t: Tensor, seq_len: int | None = None, offset: int = 0) -> Tensor:
        """The angles of positions t [...], whole or not: [..., D] fp64, each twice. Positions count as they are given.

        seq_len and offset address the original's cache; here t alone decides.
        """
        del seq_len, offset
        return self._angles(t).repeat_interleave(2, dim=-1)

    def get_seq_pos(
        self,
        seq_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offset: float = 0,
    ) -> Tensor:
        """Positions offset…offset + seq_len − 1 over `interpolate_factor`: [seq_len], fp64 or `dtype`."""
        positions = torch.arange(seq_len, device=device or self.device, dtype=torch.float64) + offset
        return (positions / self.interpolate_factor).to(dtype or torch.float64)

    def rotate_queries_or_keys(
        self,
        t: Tensor,
        seq_dim: int | None = None,
        offset: int = 0,
        scale: Tensor | float | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """t rotated by its positions, times `scale` on the rotated dims; same shape and dtype.

        seq_dim: the axis of the n tokens.
        offset: the first token's position: cached keys less queries, for queries that follow a cache.
        scale: a number, or [n, D]; xPos needs it, and `rotate_queries_and_keys` gives it.
        position_ids: [n], or [B, n] for t's first axis, in place of 0…n−1.
        Raises ValueError for xPos without a scale, `position_ids` that do not fit t, and a t narrower than D.
        """
        if self.use_xpos and scale is None:
            raise ValueError(
                "xPos scales queries and keys together: use rotate_queries_and_keys or rotate_queries_with_cached_keys"
            )
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        if position_ids is None:
            by = self._table(t.shape[seq_dim], offset, t)
        else:
            by = cos_sin(self._angles((position_ids.double() + offset) / self.interpolate_factor), t.dtype)
        if isinstance(scale, Tensor) and scale.ndim == 2:
            scale = along(scale, t, seq_dim)
        by = Table(along(by.cos, t, seq_dim), along(by.sin, t, seq_dim))
        return turn(t, by, scale=1.0 if scale is None else scale)

    def rotate_queries_with_cached_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Queries that are the last tokens of the keys' sequence, `offset` tokens further; keys from position 0 on.

        With xPos both are scaled around the middle of the queries, so that any number of keys will do.
        Raises ValueError for more queries than keys, and for more queries than xPos can scale in their dtype.
        """
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        q_len, k_len = q.shape[seq_dim], k.shape[seq_dim]
        if q_len > k_len:
            raise ValueError(f"queries are the last of the keys' tokens: got {q_len} queries and {k_len} keys")
        q_offset = k_len - q_len + offset
        if not self.use_xpos:
            return self.rotate_queries_or_keys(q, seq_dim, q_offset), self.rotate_queries_or_keys(k, seq_dim)
        centre = (q_offset + q_len // 2) / self.interpolate_factor
        return self._xpos(q, seq_dim, q_offset, centre, 1), self._xpos(k, seq_dim, 0, centre, -1)

    def rotate_queries_and_keys(self, q: Tensor, k: Tensor, seq_dim: int | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys of the same n tokens, rotated and scaled by xPos around token n // 2.

        Raises ValueError without xPos, for lengths that differ, and for more tokens than xPos can scale in the dtype.
        """
        if not self.use_xpos:
            raise ValueError("use_xpos is False: use rotate_queries_or_keys on the queries and on the keys")
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        length = q.shape[seq_dim]
        if k.shape[seq_dim] != length:
            raise ValueError(
                f"got {length} queries and {k.shape[seq_dim]} keys: rotate_queries_with_cached_keys takes fewer queries"
            )
        centre = length // 2
        return self._xpos(q, seq_dim, 0, centre, 1), self._xpos(k, seq_dim, 0, centre, -1)

    def get_scale(
        self, t: Tensor, seq_len: int | None = None, offset: int = 0, *, centre: float | None = None
    ) -> Tensor:
        """xPos's ζ_m^((t − centre)/scale_base) of positions t [n]: [n, D] fp64, each twice; keys take the inverse.

        centre: n // 2 unless given. Scores need the same one for queries and keys.
        seq_len and offset address the original's cache; here t alone decides.
        """
        del seq_len, offset
        if not self.use_xpos:
            raise ValueError("use_xpos is False: there is no scale")
        power = t.double() - (len(t) // 2 if centre is None else centre)
        return (power.unsqueeze(-1) * self.xpos_decay).exp().repeat_interleave(2, dim=-1)

    def get_axial_freqs(self, *dims: int, offsets: tuple[float, ...] | Tensor | None = None) -> Tensor:
        """Angles of a grid of `dims`, for `apply_rotary_emb`: [*dims, D·len(dims)] fp64, axis after axis.

        Coordinates are −1…1 for `pixel`, else 0…dim − 1, plus the axis's offset; `interpolate_factor` does not apply.
        Raises ValueError unless there is one offset an axis.
        """
        if offsets is not None and len(offsets) != len(dims):
            raise ValueError(f"offsets are one an axis: got {len(offsets)} for {len(dims)} axes")
        angles = []
        for axis, dim in enumerate(dims):
            if self.freqs_for == "pixel":
                positions = torch.linspace(-1, 1, dim, device=self.device, dtype=torch.float64)
            else:
                positions = torch.arange(dim, device=self.device, dtype=torch.float64)
            if offsets is not None:
                positions = positions + offsets[axis]
            shape = [1] * len(dims) + [-1]
            shape[axis] = dim
            angles.append(self.forward(positions).reshape(shape))
        return broadcat(angles, dim=-1)

    def _angles(self, positions: Tensor) -> Tensor:
        """[...] to [..., D/2] fp64; a product, because autocast would round an einsum to bf16."""
        return positions.double().unsqueeze(-1) * self.freqs.double()

    def _xpos(self, t: Tensor, seq_dim: int, offset: int, centre: float, sign: int) -> Tensor:
        """t rotated and times ζ^(sign·(p − centre)/scale_base): 1 for queries, −1 for keys."""
        length = t.shape[seq_dim]
        first, last = offset / self.interpolate_factor, (offset + length - 1) / self.interpolate_factor
        reach = centre - first if sign > 0 else last - centre
        # Half of the exponents' range is for the scale; the other is for q and k themselves.
        most = math.log(torch.finfo(t.dtype).max) / 2 * self.scale_base / XPOS_SPAN
        if reach > most:
            raise ValueError(
                f"xPos can scale rows up to {most:.0f} positions from the middle of the queries in {t.dtype}; "
                f"got {reach:.0f}. Rotate fewer queries at a time, with rotate_queries_with_cached_keys, or in fp32"
            )
        positions = self.get_seq_pos(length, t.device, offset=offset)
        return self.rotate_queries_or_keys(t, seq_dim, offset, self.get_scale(sign * positions, centre=sign * centre))

    def _table(self, length: int, offset: int, t: Tensor) -> Table:
        """cos and sin of positions offset…offset + length − 1, from the kept table where there can be one."""
        stop = offset + length
        trained_or_exact = self.freqs.requires_grad or t.dtype == torch.float64
        within = isinstance(offset, int) and offset >= 0 and stop <= self.cache_max_seq_len
        if not (self.cache_if_possible and within) or trained_or_exact or self.freqs.is_inference():
            return cos_sin(self._angles(self.get_seq_pos(length, t.device, offset=offset)), t.dtype)
        return self._kept.rows(self.freqs, self.interpolate_factor, offset, stop)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Moves frequencies with the module and never casts them: bf16 ones are wrong within a few tokens."""
        self._kept = PositionTable(self.cache_max_seq_len)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _named_freqs(freqs_for: str, dim: int, theta: float, rescale: float, max_freq: float, num_freqs: int) -> Tensor:
    """[m] fp64 of `freqs_for`."""
    if freqs_for == "constant":
        return torch.ones(num_freqs, dtype=torch.float64)
    if dim < 2 or dim % 2:
        raise ValueError(f"dims rotate in pairs, so dim must be even and at least 2; got {dim}")
    if freqs_for == "pixel":
        return torch.linspace(1.0, max_freq / 2, dim // 2, dtype=torch.float64) * math.pi
    if freqs_for == "lang":  # with one pair, the base does not matter
        return frequencies.ntk(dim, theta, rescale) if dim > 2 else frequencies.plain(dim, theta)
    raise ValueError(f"freqs_for is lang, pixel or constant; got {freqs_for!r}")


def _vector(freqs: Tensor) -> Tensor:
    """A copy of freqs [m], fp32 unless fp64."""
    if freqs.ndim != 1:
        raise ValueError(f"frequencies are one vector, one a pair of dims; got the shape {tuple(freqs.shape)}")
    return freqs.detach().to(torch.promote_types(freqs.dtype, torch.float32), copy=True)
