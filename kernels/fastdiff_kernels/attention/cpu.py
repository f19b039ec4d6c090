"""Attention on CPUs, by whatever measures fastest there.

Sparse: the chosen key blocks of every query block are gathered and all query blocks become rows of one batched SDPA.
`masked` is for 8-bit emulation and for comparison: scores of all keys are formed, a stretch of queries at a time, and
those left out are masked. `flex` is compiled flex attention, the fastest in float32, without log-sum-exp.
Eight bits are emulated: no CPU matrix product gets faster by them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels.quantise import FP8_MAX, quantise
from fastdiff_kernels.quantise.reference import dequantised

from .blocks import Selection, blocks_in

GATHER_BYTES = 1 << 28
# scores that are read again before they leave the cache: several times faster than all at once
MASKED_BYTES = 1 << 22


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    selection: Selection | None,
    precision: str,
    lengths: Tensor | None,
    far: tuple[Tensor, Tensor] | None,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """See `fastdiff_kernels.attention.attention`; defined for finite inputs."""
    from . import groups_of, merge

    if masked or precision == "int8_fp8" or q.device.type != "cpu":
        output, lse = _masked(q, k, v, scale, selection, precision, lengths)
    else:
        shift: Tensor | float = 0.0
        if precision == "int8":
            q, k, shift = _emulated(q, k, v, scale, groups_of(selection))
        output, lse = _gathered(q, k, v, scale, selection, lengths)
        lse = lse + shift
    if far is not None:
        output, lse = merge(output, lse, *far)
    return output, lse


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SDPA with its log-sum-exp; `mask` is added to the scores, of q's dtype, broadcast to [B, N, S, T]."""
    k, v = repeated(q, k, v)
    # the operation reads channels as if they lay side by side
    q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v))
    operation: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = operation(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return output, lse


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    if selection is None:
        mask = None if lengths is None else _bias(_seen(lengths, k.shape[2]), q.dtype)
        output, lse = dense(q, k, v, scale, mask)
        return _cleared(output, lse, None if lengths is None else (lengths > 0)[:, None, None].expand_as(lse))
    k, v = repeated(q, k, v)
    batch, heads, queries, head = q.shape
    rows, width = selection.blocks.shape[2:]
    size = selection.key_block
    every = rows * width * size * head * q.element_size() * 2
    if width == 0:
        return q.new_zeros(q.shape), _wide(q.new_full(q.shape[:3], float("-inf")))
    keys, values = (in_blocks(one, size) for one in (k, v))  # [B * N * J, size, D]
    offsets = torch.arange(batch * heads).view(batch, heads, 1, 1) * blocks_in(k.shape[2], size)
    places = selection.blocks + offsets  # [B, N, I, M]
    tiles = in_tiles(q, selection.query_block)  # [B, N, I, query_block, D]
    bias = tail_bias(selection, k.shape[2], lengths, q.dtype)
    step = max(1, GATHER_BYTES * rows // max(1, every * batch * heads))
    outputs, sums = [], []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        chosen = places[:, :, part].flatten()
        shape = (-1, 1, width * size, head)
        output, lse = dense(
            tiles[:, :, part].reshape(-1, 1, selection.query_block, head),
            keys.index_select(0, chosen).view(shape),
            values.index_select(0, chosen).view(shape),
            scale,
            None if bias is None else bias[:, :, part].reshape(-1, 1, 1, width * size),
        )
        outputs.append(output.view(batch, heads, -1, head))
        sums.append(lse.view(batch, heads, -1))
    output, lse = torch.cat(outputs, 2)[:, :, :queries], torch.cat(sums, 2)[:, :, :queries]
    if bias is None:
        return output, lse
    any_key = (bias == 0).any(-1).repeat_interleave(selection.query_block, 2)[:, :, :queries]
    return _cleared(output, lse, any_key)


def tail_bias(selection: Selection, keys: int, lengths: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores of gathered keys [B, N, I, M * key_block]; None where every one of them counts."""
    full = int(selection.counts.min()) == selection.blocks.shape[-1]
    if full and keys % selection.key_block == 0 and lengths is None:
        return None
    used = torch.arange(selection.blocks.shape[-1]) < selection.counts[..., None]
    number = selection.blocks[..., None] * selection.key_block + torch.arange(selection.key_block)
    limit = keys if lengths is None else lengths.clamp(max=keys).view(-1, 1, 1, 1, 1)
    return _bias((used[..., None] & (number < limit)).flatten(-2), dtype)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    selection: Selection | None,
    precision: str,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    fp8 = precision == "int8_fp8"
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    values, v_scale, v_mean = v, 1.0, 0.0
    if fp8:
        v_mean = v.float().mean(2, keepdim=True)
        v_scale = (v - v_mean).abs().amax(2, keepdim=True) / FP8_MAX
        v_scale = torch.where(v_scale == 0, 1, v_scale)
        values = ((v - v_mean) / v_scale).to(torch.float8_e4m3fn)
        v_mean, v_scale = (one.repeat_interleave(groups, 1) for one in (v_mean, v_scale))
    dtype, shift = q.dtype, 0.0
    if precision != "exact":
        from . import groups_of

        q, k, shift = _emulated(q, k, v, scale, groups_of(selection))
    k, values = k.to(wide), values.to(wide)
    k, values = repeated(q, k, values)
    step = max(1, MASKED_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    step = -(-step // selection.query_block) * selection.query_block if selection else step
    parts = []
    for start in range(0, q.shape[2], step):
        rows = slice(start, min(start + step, q.shape[2]))
        seen = token_mask(selection, rows, k.shape[2], lengths)
        parts.append(_masked_rows(q[:, :, rows].to(wide) * scale, k, values, seen, precision, dtype))
    output, lse, any_key = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    if fp8:
        output = output * v_scale + v_mean
    return _cleared(output.to(dtype), lse + shift, any_key)


def _masked_rows(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, precision: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and whether there is any key, of some rows of scaled q."""
    scores = q @ k.mT
    if seen is not None:
        scores = scores.masked_fill_(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0, top)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if precision == "int8_fp8":
        weights = (weights * FP8_MAX).to(torch.float8_e4m3fn).to(q.dtype) / FP8_MAX
    elif precision == "int8":
        weights = weights.to(dtype).to(q.dtype)
    return weights @ v / total, (top + total.log())[..., 0], total[..., 0] > 0


def _emulated(q: Tensor, k: Tensor, v: Tensor, scale: float, groups: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q and the smoothed k as their int8 values stand for, and what smoothing took from the log-sum-exp."""
    made = quantise(q, k, v, scale=1.0, path="reference", **groups)
    unit = torch.log2(torch.tensor(torch.e))  # the kernels' scale holds log2 e
    whole_q = dequantised(made.q, made.q_scale / unit, made.q_group).to(q.dtype)
    return whole_q, dequantised(made.k, made.k_scale, made.k_group).to(k.dtype), made.shift * scale


def token_mask(selection: Selection | None, rows: slice, keys: int, lengths: Tensor | None) -> Tensor | None:
    """Bool [B, N, rows, T] or a shape that broadcasts to it, True where a key counts; None where all do.

    `rows` begins with a query block.
    """
    seen = None if lengths is None else _seen(lengths, keys)
    if selection is None:
        return seen
    size = selection.query_block
    part = slice(rows.start // size, blocks_in(rows.stop, size))
    some = Selection(selection.blocks[:, :, part], selection.counts[:, :, part], size, selection.key_block)
    mask = some.mask(blocks_in(keys, selection.key_block)).repeat_interleave(size, 2)[:, :, : rows.stop - rows.start]
    mask = mask.repeat_interleave(selection.key_block, 3)[..., :keys]
    return mask if seen is None else mask & seen


def _seen(lengths: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=lengths.device) < lengths.view(-1, 1, 1, 1)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))


def _cleared(output: Tensor, lse: Tensor, any_key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows without keys give 0 and -inf."""
    if any_key is None:
        return output, _wide(lse)
    return torch.where(any_key[..., None], output, 0), torch.where(any_key, _wide(lse), float("-inf"))


def _wide(lse: Tensor) -> Tensor:
    return lse.to(torch.promote_types(lse.dtype, torch.float32))


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, N, S, D] with as many heads as the queries: grouped ones are repeated."""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def in_tiles(x: Tensor, size: int) -> Tensor:
    """[B, N, S, D] as [B, N, blocks, size, D], the last block filled up with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def in_blocks(x: Tensor, size: int) -> Tensor:
    """[B, N, S, D] as [B * N * blocks, size, D], the last block filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return padded.reshape(-1, size, x.shape[3])


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection) -> Tensor:
    """Output [B, N, S, D] by compiled flex attention; the first call of a shape compiles for seconds."""
    from torch.nn.attention.flex_attention import BlockMask

    if q.shape[2] % selection.query_block or k.shape[2] % selection.key_block:
        raise ValueError("flex attention is given whole blocks here; use path='gather' for ragged lengths")
    k, v = repeated(q, k, v)
    width = blocks_in(k.shape[2], selection.key_block)
    spare = width - selection.blocks.shape[-1]
    # given as partial blocks: of full ones only, torch 2.13 writes C++ that does not compile
    mask = BlockMask.from_kv_blocks(
        selection.counts,
        torch.nn.functional.pad(selection.blocks, (0, spare)),
        BLOCK_SIZE=(selection.query_block, selection.key_block),
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    return _compiled()(q, k, v, block_mask=mask, scale=scale)
