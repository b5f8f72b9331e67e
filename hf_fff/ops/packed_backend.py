"""Packed layers in plain PyTorch: the definition of their format and of their arithmetic, for where there is no compiler.

The format is described in ``kernels/cpu/layout.h``. Buffers are the same byte for byte as those of the native library; outputs
over int8 rows are too, since integers are exact and every floating point operation around them rounds once, in the same order.
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ._schema import ACTIVATIONS, PACKED_DTYPES, ROWS, check_arguments
from .torch_backend import pieces

_MAGIC, _VERSION = b"HFFFPACK", 1
_HEADER = struct.Struct("<8sIIqqqqQQ")
_PIECE_COLUMNS, _PIECE_BYTES = 64, 256
_SMALLEST = 2.0**-100  # a row whose numbers are all below it is a row of zeros
_WORD = 1 << 64


@dataclass(frozen=True)
class Layout:
    """Where a packed layer keeps what."""

    rows: str
    hidden: int
    n_trees: int
    depth: int

    @property
    def levels(self) -> int:
        return self.depth + 1

    @property
    def tree_nodes(self) -> int:
        return 2**self.levels - 1

    @property
    def nodes(self) -> int:
        return self.n_trees * self.tree_nodes

    @property
    def padded(self) -> int:
        return -(-self.hidden // _PIECE_COLUMNS) * _PIECE_COLUMNS

    @property
    def parts(self) -> int:
        return self.padded // _PIECE_COLUMNS

    @property
    def slots(self) -> int:
        return 4 if self.rows == "int8" else 2

    @property
    def row_bytes(self) -> int:
        return self.padded * 4 // self.slots

    @property
    def top_levels(self) -> int:
        return self.levels % self.slots

    @property
    def top_trees(self) -> int:
        return self.slots // self.top_levels if self.top_levels else 1

    @property
    def groups(self) -> int:
        top, last = self.top_levels, range(self.top_levels + self.slots - 1, self.levels, self.slots)
        tops = -(-self.n_trees // self.top_trees) << (top - 1) * self.top_trees if top else 0
        return tops + self.n_trees * sum(2**level for level in last)

    @property
    def in_at(self) -> int:
        return _HEADER.size + -(-self.nodes * 16 // 64) * 64

    @property
    def out_at(self) -> int:
        return self.in_at + self.nodes * self.row_bytes

    @property
    def bytes(self) -> int:
        return self.out_at + self.groups * self.parts * _PIECE_BYTES

    def members(self) -> Tensor:
        """The node in each slot of each group, ``[groups, slots]``; -1 where the slot stands empty."""
        rows: list[list[int]] = []
        top, slots, trees = self.top_levels, self.slots, self.top_trees
        for first in range(0, self.n_trees if top else 0, trees):
            for choice in range(1 << (top - 1) * trees):
                row = [-1] * slots
                for i in range(min(trees, self.n_trees - first)):
                    last = choice >> i * (top - 1) & ((1 << (top - 1)) - 1)
                    for level in range(top):
                        node = (1 << level) - 1 + (last >> (top - 1 - level))
                        row[i * top + level] = (first + i) * self.tree_nodes + node
                rows.append(row)
        for tree in range(self.n_trees):
            for last in range(top + slots - 1, self.levels, slots):
                for place in range(2**last, 2 ** (last + 1)):
                    rows.append([tree * self.tree_nodes + (place >> slots - 1 - slot) - 1 for slot in range(slots)])
        return torch.tensor(rows)


def read_header(packed: Tensor, *, whole: bool = False) -> Layout:
    """The layout of a packed layer.

    Args:
        packed: ``[bytes]``, uint8.
        whole: also look for damage in all that follows the header.

    Raises:
        ValueError: it is no packed layer, of another version, or damaged.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"the packed layer cannot be used: {why}")

    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise refuse(f"it is {packed.dtype} {list(packed.shape)}; hf_fff::pack makes torch.uint8 [bytes]")
    if len(packed) < _HEADER.size:
        raise refuse("it is shorter than a header")
    head = bytes(packed[: _HEADER.size].tolist())
    magic, version, rows, hidden, n_trees, depth, size, content, own = _HEADER.unpack(head)
    if magic != _MAGIC:
        raise refuse("it does not start as a packed layer does")
    if version != _VERSION:
        raise refuse("it was packed by another version of hf_fff; pack the layer again")
    if own != _checksum(packed[: _HEADER.size - 8]):
        raise refuse("its header is damaged")
    if size != len(packed):
        raise refuse("it is not as long as its header says")
    if whole and content != _checksum(packed[_HEADER.size :]):
        raise refuse("it is damaged")
    return Layout(ROWS[rows], hidden, n_trees, depth)


def _checksum(data: Tensor) -> int:
    words = data.clone().view(torch.int64)
    return int((words * (2 * torch.arange(len(words)) + 1)).sum()) % _WORD


def scales(row: Tensor) -> tuple[Tensor, Tensor]:
    """What makes integers of a row, and what one of them is worth: ``[..., n] -> [..., 1]``. Where the row is not finite, 0 and NaN."""
    most = row.abs().amax(-1, keepdim=True)
    used, finite = most >= _SMALLEST, most < torch.inf
    up = torch.where(used & finite, torch.full_like(most, 127.0) / most, 0.0)  # 127 / most is two roundings in torch
    return up, torch.where(finite, torch.where(used, most / 127.0, 0.0), torch.nan)


def pack(weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, n_trees: int, rows: str) -> Tensor:
    depth = check_arguments(weight_in, weight_in, bias_in, weight_out, n_trees)
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r} is not known (allowed: {', '.join(ROWS)})")
    layout = Layout(rows, weight_in.shape[1], n_trees, depth)
    weights = [w.detach().float() for w in (weight_in, bias_in, weight_out)]
    if not all(bool(w.isfinite().all()) for w in weights):
        raise ValueError("a weight is not finite: it cannot be packed")
    into, bias, out = weights
    width = layout.padded - layout.hidden
    packed = torch.zeros(layout.bytes, dtype=torch.uint8)
    node = torch.zeros(layout.nodes, 4)
    node[:, 0], node[:, 1], node[:, 2] = 1.0, bias, 1.0
    if rows == "int8":
        (up_in, node[:, :1]), (up_out, node[:, 2:3]) = scales(into), scales(out)
        q_in, q_out = (torch.round(w * up).to(torch.int32) for w, up in ((into, up_in), (out, up_out)))
        node.view(torch.int32)[:, 3] = q_in.sum(1)
        in_rows, out_rows = q_in.to(torch.int8), (q_out + 128).to(torch.uint8)
        empty = 128
    else:
        in_rows, out_rows = into.bfloat16().view(torch.int16), out.bfloat16().view(torch.int16)
        empty = 0
    packed[_HEADER.size :][: layout.nodes * 16] = node.view(torch.uint8).flatten()
    in_rows = torch.nn.functional.pad(in_rows, (0, width))
    packed[layout.in_at : layout.out_at] = in_rows.view(torch.uint8).flatten()
    out_rows = torch.nn.functional.pad(out_rows, (0, width, 0, 1), value=empty)  # the last row is that of empty slots
    pieces_of = out_rows[layout.members()].unflatten(2, (layout.parts, _PIECE_COLUMNS)).permute(0, 2, 3, 1)
    if n_trees > 1:
        pieces_of = pieces_of.transpose(0, 1)
    packed[layout.out_at :] = pieces_of.contiguous().view(torch.uint8).flatten()
    fields = (_MAGIC, _VERSION, ROWS.index(rows), layout.hidden, n_trees, depth, layout.bytes)
    head = bytearray(_HEADER.pack(*fields, _checksum(packed[_HEADER.size :]), 0))
    packed[: _HEADER.size] = torch.frombuffer(head, dtype=torch.uint8)
    packed[_HEADER.size - 8 : _HEADER.size] = torch.tensor(
        list(_checksum(packed[: _HEADER.size - 8]).to_bytes(8, "little")), dtype=torch.uint8
    )
    return packed


def _unpacked(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """``weight_in`` and ``weight_out`` as they were packed, ``[nodes, hidden]`` (int8 or bf16), and the nodes' ``[nodes, 4]``."""
    node = packed[_HEADER.size :][: layout.nodes * 16].clone().view(torch.float32).view(layout.nodes, 4)
    kind = torch.int8 if layout.rows == "int8" else torch.bfloat16
    weight_in = packed[layout.in_at : layout.out_at].clone().view(kind).view(layout.nodes, layout.padded)
    stored = packed[layout.out_at :].clone()
    stored = (stored ^ 128).view(torch.int8) if layout.rows == "int8" else stored.view(torch.bfloat16)
    outer = (layout.parts, layout.groups) if layout.n_trees > 1 else (layout.groups, layout.parts)
    stored = stored.view(*outer, _PIECE_COLUMNS, layout.slots)
    stored = (stored.transpose(0, 1) if layout.n_trees > 1 else stored).permute(0, 3, 1, 2).reshape(-1, layout.padded)
    members = layout.members().flatten()
    weight_out = stored.new_zeros(layout.nodes, layout.padded)
    weight_out[members[members >= 0]] = stored[members >= 0]
    return weight_in[:, : layout.hidden], weight_out[:, : layout.hidden], node


def _exp(x: Tensor) -> Tensor:
    x = torch.where(x < -87.0, -87.0, x)
    x = torch.where(x > 87.0, 87.0, x)
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2^23: the integer part ends up in the last bits
    n = shifted - 12582912.0
    r = x - n * 0.693145752
    r = r - n * 1.42860677e-6
    p = torch.full_like(x, 1.98756915e-4)
    for c in (1.39819995e-3, 8.33345192e-3, 4.16657962e-2, 1.66666655e-1, 5.00000012e-1):
        p = p * r + c
    p = p * (r * r) + r
    return (p + 1.0) * ((shifted.view(torch.int32) << 23) + 0x3F800000).view(torch.float32)


def _erf(x: Tensor) -> Tensor:
    x = torch.where(x < -4.0, -4.0, x)
    x = torch.where(x > 4.0, 4.0, x)
    s = x * x
    p, q = torch.full_like(x, -2.72614225801306e-10), torch.full_like(x, -1.45660718464996e-05)
    for c in (
        2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03,
        -1.60960333262415e-02,
    ):  # fmt: skip
        p = p * s + c
    for c in (-2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02):
        q = q * s + c
    return x * p / q


def _activated(name: str, z: Tensor) -> Tensor:
    """As ``packed.h`` computes it, one rounding an operation."""
    if name == "gelu":
        return (z * 0.5) * (_erf(z * 0.70710678118654752440) + 1.0)
    if name == "gelu_new":
        u = (z * 1.59576912160573071176) * (z * z * 0.044715 + 1.0)
        return z * (1.0 / (1.0 + _exp(-u)))
    if name == "relu":
        return torch.where(z <= 0.0, 0.0, z)
    return z * (1.0 / (1.0 + _exp(-z))) if name == "silu" else z


def packed_path(x: Tensor, packed: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The output, of ``x``'s shape and dtype, and the visited nodes, ``[..., n_trees, depth + 1]``."""
    layout = read_header(packed)
    if x.ndim < 1 or x.shape[-1] != layout.hidden:
        raise ValueError(f"x is {list(x.shape)}; it must be [..., {layout.hidden}], as the packed layer is")
    if x.dtype not in PACKED_DTYPES:
        raise ValueError(f"x is {x.dtype}; packed layers take {', '.join(map(str, PACKED_DTYPES))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known (allowed: {', '.join(ACTIVATIONS)})")
    int8 = layout.rows == "int8"
    weight_in, weight_out, node = _unpacked(packed, layout)
    tokens = x.detach().reshape(-1, layout.hidden)
    y = torch.empty_like(tokens)
    path = torch.empty(len(tokens), layout.n_trees, layout.levels, dtype=torch.int32)
    roots = torch.arange(layout.n_trees) * layout.tree_nodes
    exact = torch.float64 if int8 else torch.float32  # integers beyond float32's
    for piece in pieces(len(tokens), 2 * layout.n_trees * layout.levels * layout.hidden):
        xs = tokens[piece].float()
        up, down = scales(xs) if int8 else (None, None)
        row = (torch.round(xs * up).nan_to_num(0.0) if up is not None else xs.bfloat16()).to(exact)
        at, values, rows = torch.zeros(len(xs), layout.n_trees, dtype=torch.long), [], []
        for level in range(layout.levels):
            path[piece, :, level], here = at.int(), roots + at
            sums = (weight_in[here].to(exact) @ row.unsqueeze(-1)).squeeze(-1).float()
            z = sums * (down * node[here, 0]) + node[here, 1] if down is not None else sums + node[here, 1]
            value = _activated(activation, z)
            values.append(value * node[here, 2] if int8 else value)
            rows.append(here)
            at = 2 * at + 1 + (z > 0)
        every = torch.stack(values, -1).flatten(1)  # tree after tree
        of = torch.stack(rows, -1).flatten(1)
        up, down = scales(every) if int8 else (None, None)
        factor = torch.round(every * up).nan_to_num(0.0) if up is not None else every.bfloat16()
        result = (factor.to(exact).unsqueeze(1) @ weight_out[of].to(exact)).squeeze(1).float()
        y[piece] = (result * down if down is not None else result).to(y.dtype)
    return y.view(x.shape), path.view(*x.shape[:-1], layout.n_trees, layout.levels)


def fff_packed(x: Tensor, packed: Tensor, activation: str) -> Tensor:
    return packed_path(x, packed, activation)[0]
