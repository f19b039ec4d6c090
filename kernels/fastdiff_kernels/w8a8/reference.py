"""The 8-bit linear layer in float64, where sums of products of bytes are exact."""

from torch import Tensor

from . import quantise_rows


def product_reference(
    rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None
) -> Tensor:
    """[M, N] of x [M, K]; see `fastdiff_kernels.w8a8.linear`."""
    whole, token = quantise_rows(rows if smooth is None else rows.float() * smooth)
    product = whole.double() @ weight.double().mT * token.double() * scale.double()
    return (product if bias is None else product + bias.double()).to(rows.dtype)
