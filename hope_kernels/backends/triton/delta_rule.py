"""Delta gradient descent (``dgd``) inside a chunk: corrected errors ``R`` of ``(I + L) R = E + diag(before) (U W)``.

``L_ts = e_s (u_s . u_t) prod_{s<j<t} alpha_j`` for ``s < t``, ``e`` the effective steps,
``before_t = prod_{s<t} alpha_s``. ``(I + L)^-1`` depends on the chunk and the layer's inputs only, so it is formed once
and applied block by block as a product. Products of alpha are formed as products, never as quotients: alpha may be
exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_products(retention, row, plan: tl.constexpr):
    """Products of one chunk's retention, ``retention [M, heads, C]`` at flat row ``row`` (None: all ones).

    Returns ``before [BC]`` over earlier tokens, ``after [BC]`` over later ones, ``between [BC, BC]`` over those
    strictly between s and t (row t, column s; 0 unless s < t), and ``decay`` over all.
    """
    o_c = tl.arange(0, plan.block_chunk)
    lower = o_c[:, None] > o_c[None, :]
    if retention is None:
        ones = tl.full([plan.block_chunk], 1.0, tl.float32)
        return ones, ones, tl.where(lower, 1.0, 0.0), 1.0
    else:
        base = retention + row * plan.chunk
        earlier = tl.load(base + o_c - 1, mask=(o_c >= 1) & (o_c <= plan.chunk), other=1.0)  # alpha_{t-1}
        later = tl.load(base + o_c + 1, mask=o_c + 1 < plan.chunk, other=1.0)  # alpha_{t+1}
        before = tl.cumprod(earlier, 0)
        after = tl.cumprod(later, 0, reverse=True)
        # Down column s: 1 up to row s + 1, then times alpha_{t-1}.
        factors = tl.where(o_c[:, None] > o_c[None, :] + 1, earlier[:, None], 1.0)
        between = tl.where(lower, tl.cumprod(factors, 0), 0.0)
        decay = tl.load(base) * tl.sum(tl.where(o_c == 0, after, 0.0))
        return before, after, between, decay


@triton.jit
def effective_step(lr, square):
    """``lr / (1 + lr |u|^2)``, the exact proximal step of a layer with input ``u``."""
    return lr / (1.0 + lr * square)


@triton.jit
def overlap_inverse(gram, step, between, plan: tl.constexpr):
    """``(I + L)^-1 [BC, BC]`` from ``gram = U U^T``, by forward substitution, one row after the other."""
    o_c = tl.arange(0, plan.block_chunk)
    lower = gram * step[None, :] * between
    inverse = -lower  # row t holds row t of the inverse below the diagonal once it is its turn
    for t in range(1, plan.chunk):
        row = tl.sum(tl.where((o_c == t)[:, None], -lower, 0.0), 0)  # -L_t
        row += tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where((o_c == t)[:, None], row[None, :], inverse)
    return inverse + tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)


# ---- adjoints --------------------------------------------------------------------------------------------------------


@triton.jit
def gradient_product(a, b, plan: tl.constexpr):
    """``a @ b`` of ``[BC, BC]`` gradients, which 16-bit factors would round or flush to 0: at least 10 bits of mantissa
    and the exponents of float32."""
    precision: tl.constexpr = plan.precision if plan.operand == tl.float32 else "tf32"
    return tl.dot(a, b, input_precision=precision, out_dtype=tl.float32)


@triton.jit
def overlap_adjoint(d_lower, d_weight, gram, lr, square, between, after):
    """Adjoint of ``L`` and of the weights ``e after`` of the layers that share inputs ``u``.

    ``d_lower [BC, BC]`` counts below the diagonal only. Returns the gradient ``[BC, BC]`` of ``u_t . u_s``, 0 unless s
    < t; twice that of ``|u_t|^2``, the factor of ``u_t`` in its own gradient; those of ``lr`` and ``after``, all
    ``[BC]``; and that of ``between``, which is meaningless unless s < t.
    """
    step = effective_step(lr, square)
    d_step = tl.sum(d_lower * gram * between, 0) + d_weight * after
    shrink = 1.0 / (1.0 + lr * square)
    return (
        d_lower * step[None, :] * between,
        -2.0 * d_step * step * step,
        d_step * shrink * shrink,
        d_weight * step,
        d_lower * step[None, :] * gram,
    )


@triton.jit
def retention_adjoint(between, between_t, before, after, d_between, d_before, d_after, d_decay, plan: tl.constexpr):
    """Gradient ``[BC]`` of the retentions from those of their products.

    With ``P_ts`` the product strictly between s and t, where s = -1 stands for the start of the chunk and t = C for
    its end, ``d alpha_j = sum_{s<j<t} P_js P_tj dP_ts``: products again, right for an alpha of 0.
    """
    inner = gradient_product(between_t, d_between, plan) + after[:, None] * d_after[None, :]
    from_start = tl.sum(between * d_before[:, None], 0) + after * d_decay
    return tl.sum(between * inner, 1) + before * from_start
