"""GELU in its exact form for Triton kernels, with its derivative."""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import triton
import triton.language as tl


@triton.jit
def gelu(z):
    """GELU(z) and its derivative, of one exponential.

    With t = |z| and e = exp(-t^2 / 2), the normal distribution's tail 1 - cdf(t) is e P(t). P is the polynomial of
    degree 9 for which e P(t) errs least on [0, 5.5], by 2.6e-7; beyond, t = 5.5 will do: the tail is below 1.9e-8.
    GELU(z) = max(z, 0) - t (e P); its derivative is 1 - e (P - t / sqrt(2 pi)), that of -z the rest to 1.
    In fp32 (u = 2^-24) GELU errs by 5.6 u |z| at most, its derivative by 5.1 u (1 + |z|): largest of 400,001 values in
    [-12, 12], with an exact exponential.
    """
    t = tl.minimum(tl.abs(z), 5.5)
    e = tl.exp2(z * z * -0.7213475204444817)
    p = -8.063062523433473e-06 * t + 1.5194174193311483e-04
    p = p * t - 1.271161250770092e-03
    p = p * t + 6.382802501320839e-03
    p = p * t - 2.223087102174759e-02
    p = p * t + 5.949679017066956e-02
    p = p * t - 1.3177287578582764e-01
    p = p * t + 2.4975229799747467e-01
    p = p * t - 3.989226222038269e-01
    p = p * t + 4.999997317790985e-01
    tail = e * (p - 0.3989422804014327 * t)
    return tl.maximum(z, 0.0) - t * (e * p), tl.where(z < 0, tail, 1 - tail)
