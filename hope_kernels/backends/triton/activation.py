"""The activations of a memory's hidden layer and their first two derivatives, in float32.

``gelu_tanh`` is written ``z sigmoid(2u)`` with ``u = sqrt(2/pi) (z + 0.044715 z^3)``: the same function as
``z (1 + tanh u) / 2`` without the cancellation at large negative ``z``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x, plan: tl.constexpr):
    if plan.fast_activation:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], tl.float32, True, 1)
        return 0.5 * t + 0.5
    else:
        # Both branches are finite: exp of a non-positive number.
        e = tl.exp(-tl.abs(x))
        return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _normal_pdf(z):
    return 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def activate(z, plan: tl.constexpr):
    """``act(z)``"""
    if plan.activation == "gelu_tanh":
        return z * _sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z), plan)
    elif plan.activation == "gelu":
        return z * _normal_cdf(z)
    elif plan.activation == "silu":
        return z * _sigmoid(z, plan)
    else:
        r = tl.where(z <= 0, 0.0, z)  # keeps a NaN
        return r * r


@triton.jit
def activate_with_slope(z, plan: tl.constexpr):
    """``act(z), act'(z)``"""
    if plan.activation == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z), plan)
        rate = 1.5957691216057308 * (1.0 + 0.134145 * z * z)  # derivative of the sigmoid's argument
        return z * s, s + z * s * (1.0 - s) * rate
    elif plan.activation == "gelu":
        cdf = _normal_cdf(z)
        return z * cdf, cdf + z * _normal_pdf(z)
    elif plan.activation == "silu":
        s = _sigmoid(z, plan)
        return z * s, s + z * s * (1.0 - s)
    else:
        r = tl.where(z <= 0, 0.0, z)  # keeps a NaN
        return r * r, 2.0 * r


@triton.jit
def activate_with_curve(z, plan: tl.constexpr):
    """``act(z), act'(z), act''(z)``"""
    if plan.activation == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z), plan)
        rate = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        first = s * (1.0 - s) * rate
        second = first * (1.0 - 2.0 * s) * rate + s * (1.0 - s) * (0.42813 * z)  # 2 * 0.134145 * sqrt(8/pi) z
        return z * s, s + z * first, 2.0 * first + z * second
    elif plan.activation == "gelu":
        cdf = _normal_cdf(z)
        pdf = _normal_pdf(z)
        return z * cdf, cdf + z * pdf, pdf * (2.0 - z * z)
    elif plan.activation == "silu":
        s = _sigmoid(z, plan)
        first = s * (1.0 - s)
        return z * s, s + z * first, 2.0 * first + z * first * (1.0 - 2.0 * s)
    else:
        r = tl.where(z <= 0, 0.0, z)  # keeps a NaN
        return r * r, 2.0 * r, tl.where(z > 0, 2.0, 0.0)
