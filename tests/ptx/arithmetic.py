"""Instructions that compute: for each opcode and its types, what it reads, and a NumPy function of all threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.memory import UINT, Array
from tests.ptx.parser import SIZES, Instruction

#: Types of the sources, and the function of them.
Meaning = tuple[Sequence[type], Callable[..., Array]]
F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64


@functools.cache
def numpy_type(name: str) -> type | None:
    """The NumPy type of a PTX type, and None for any other word; bfloat16 is its bits, and so are packed pairs."""
    if name in ("pred", "f16", "f32", "f64", "tf32"):
        return {"pred": np.bool_, "f16": np.float16, "f32": F32, "f64": F64, "tf32": U32}[name]
    size = SIZES.get(name.lstrip("busf"))
    if size is None or name[0] not in "busf":
        return None
    return {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[size] if name[0] == "s" else UINT[size]


# --- Floating point ----------------------------------------------------------------------------------------------


def from_bf16(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: Array) -> Array:
    """To nearest, ties to even."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def to_tf32(x: Array) -> Array:
    """To nearest, ties away from zero; infinities and NaN have no bits to round."""
    bits = x.view(U32)
    special = (bits & U32(0x7F800000)) == U32(0x7F800000)
    return np.where(special, bits, (bits + U32(0x1000)) & U32(0xFFFFE000))


def flushed(x: Array) -> Array:
    """Numbers of float32 that are too small for its exponent become zero; other types stay."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x) if x.dtype == F32 else x


def fma32(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in float64."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


def _sum_and_error(a: Array, b: Array) -> tuple[Array, Array]:
    """Knuth's exact sum."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Dekker's exact product and an exact sum; their errors are added at the end."""

    def split(x: Array) -> tuple[Array, Array]:
        big = x * F64(134217729)
        high = big - (big - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    error = a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)
    total, lost = _sum_and_error(product, c)
    return np.where(np.isfinite(error + lost), total + (error + lost), total)


def _to_odd(x: Array, error: Array, bits: type) -> Array:
    """x + error rounded to odd: a later rounding is then that of the exact value."""
    inexact = np.isfinite(error) & (error != 0)
    away = inexact & (np.signbit(error) != np.signbit(x))
    return np.where(inexact, (x.view(bits) - away.astype(bits)) | bits(1), x.view(bits)).view(x.dtype)


def fma_bf16(a: Array, b: Array, c: Array) -> Array:
    product = np.multiply(from_bf16(a), from_bf16(b), dtype=F64)  # exact
    total = _to_odd(*_sum_and_error(product, from_bf16(c).astype(F64)), U64)
    single = total.astype(F32)
    return to_bf16(_to_odd(single, total - single, U32))


def as_wrong_as_allowed(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Sine or cosine with the largest error that the PTX ISA admits up to 2 pi, always upwards, so that sums do not
    cancel it. Beyond 2 pi, where its bound is larger, nothing may depend on the result: NaN."""
    return lambda x: np.where(np.abs(x) <= 2 * np.pi, function(x.astype(F64)) + 2.0**-20.5, np.nan).astype(F32)


# --- Integers ----------------------------------------------------------------------------------------------------


def divide(a: Array, b: Array) -> Array:
    """Towards zero; by zero all bits are set, as on the chips."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~np.zeros_like(quotient), quotient)


def high_product(a: Array, b: Array) -> Array:
    if a.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    (a1, a0), (b1, b0) = ((v >> U64(32), v & U64(0xFFFFFFFF)) for v in (a.view(U64), b.view(U64)))
    middle = a1 * b0 + ((a0 * b0) >> U64(32))
    result = a1 * b1 + (middle >> U64(32)) + ((a0 * b1 + (middle & U64(0xFFFFFFFF))) >> U64(32))
    if a.dtype.kind == "i":
        result = result - np.where(a < 0, b.view(U64), U64(0)) - np.where(b < 0, a.view(U64), U64(0))
    return result.view(a.dtype)


def field_extract(a: Array, position: Array, length: Array) -> Array:
    bits = U32(8 * a.itemsize)
    first = np.minimum(position & U32(255), bits)
    count = np.minimum(length & U32(255), bits - first)
    shifted = (a << (bits - first - count).astype(a.dtype)) >> (bits - count).astype(a.dtype)
    return np.where(count == 0, a.dtype.type(0), shifted)


def field_insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    first, count = ((v & U32(255)).astype(U64) for v in (position, length))
    mask = (np.where(count >= 64, U64(0), U64(1) << count) - U64(1)) << first
    return ((b.astype(U64) & ~mask) | ((a.astype(U64) << first) & mask)).astype(a.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    both, out = a.astype(U64) | b.astype(U64) << U64(32), np.zeros(1, U32)
    for i in range(4):
        chosen = selector >> U32(4 * i)
        byte = (both >> ((chosen & U32(7)).astype(U64) * U64(8))).astype(U32) & U32(255)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        out = out | np.where(chosen & U32(8), sign, byte) << U32(8 * i)
    return out


def funnel(low: Array, high: Array, by: Array, left: bool, wraps: bool) -> Array:
    """A word out of two that are shifted together."""
    both = high.astype(U64) << U64(32) | low.astype(U64)
    by = (by & U32(31) if wraps else np.minimum(by, U32(32))).astype(U64)
    return (((both << by) >> U64(32)) if left else both >> by).astype(U32)


# --- The table ---------------------------------------------------------------------------------------------------

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
#: Functions of one source, and of two, of the result's type.
_UNARY = {
    "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rcp": lambda x: F32(1) / x,
    "rsqrt": lambda x: F32(1) / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2, "sin": as_wrong_as_allowed(np.sin),
    "cos": as_wrong_as_allowed(np.cos), "tanh": np.tanh, "mov": lambda x: x, "cvta": lambda x: x,
}  # fmt: skip
_BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "rem": lambda a, b: np.where(b == 0, a, a - divide(a, b) * b),
    "copysign": lambda sign, size: np.copysign(size, sign),
}  # fmt: skip
#: Classes of work; every other opcode is integer work.
MUFU = ("rcp", "rsqrt", "sqrt", "ex2", "lg2", "sin", "cos", "tanh")
_WORK = {
    **dict.fromkeys(("ld", "st", "ldmatrix", "atom", "red", "cp"), "load/store"), **dict.fromkeys(MUFU, "MUFU"),
    "bar": "barrier", "barrier": "barrier", "mma": "tensor", "shfl": "shuffle", "redux": "shuffle",
    "movmatrix": "shuffle", "bra": "branch", "ret": "branch", "mov": "move", "cvt": "convert",
}  # fmt: skip


def work(made: Instruction) -> str:
    """The class in which an instruction is counted."""
    floating = made.modifiers and "f" in made.modifiers[-1]
    if floating and made.opcode in ("add", "sub", "mul", "fma", "div"):
        return "MUFU" if made.opcode == "div" else "FMA"
    return _WORK.get(made.opcode, "integer")


@functools.cache
def meaning(code: str, words: tuple[str, ...]) -> Meaning | None:
    """None for what does not compute."""
    types = [word for word in words if numpy_type(word)]
    kinds = [numpy_type(word) for word in types]
    found = _convert(words, types, kinds) if code == "cvt" else _meaning(code, words, types, *kinds[-1:])
    if found is None or "ftz" not in words or code == "cvt":
        return found
    sources, function = found
    return sources, lambda *values: flushed(function(*map(flushed, values)))


def _meaning(code: str, words: tuple[str, ...], types: list[str], kind: type = U32) -> Meaning | None:
    floating = issubclass(kind, np.floating)
    if (code, *words) == ("fma", "rn", "bf16"):  # sums of two, too: times 1
        return [U16] * 3, fma_bf16
    if any("bf16" in t or "x2" in t for t in types):
        return None
    if code in _UNARY:
        return [kind], _UNARY[code]
    if code in _BINARY:
        return [kind, kind], _BINARY[code]
    if code == "div":
        return [kind, kind], np.divide if floating else divide
    if code in ("min", "max"):
        quiet = (np.fmin if code == "min" else np.fmax) if floating and "NaN" not in words else None
        return [kind, kind], quiet or (np.minimum if code == "min" else np.maximum)
    if code == "setp":
        return [kind, kind], _comparison(words[0], floating)
    if code == "selp":
        return [kind, kind, np.bool_], lambda a, b, p: np.where(p, a, b)
    if code in ("shl", "shr"):
        shift, most = np.left_shift if code == "shl" else np.right_shift, U32(8 * np.dtype(kind).itemsize)
        return [kind, U32], lambda a, n: shift(a, np.minimum(n, most).astype(kind))  # NumPy's by `most` are PTX's
    if code == "fma":
        return [kind] * 3, fma32 if kind is F32 else fma64
    if code == "mul" or (code == "mad" and not floating):
        return _product(code, words, kind)
    if code in ("bfe", "bfi"):
        return ([kind, U32, U32], field_extract) if code == "bfe" else ([kind, kind, U32, U32], field_insert)
    if code == "prmt":
        return [U32] * 3, permute
    if code == "shf":
        return [U32] * 3, functools.partial(funnel, left=words[0] == "l", wraps=words[1] == "wrap")
    return None


def _comparison(word: str, floating: bool) -> Callable[..., Array]:
    if floating and word.endswith("u") and word[:-1] in _COMPARE:
        ordered = _COMPARE[word[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if floating and word == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARE[word]


def _product(code: str, words: tuple[str, ...], kind: type) -> Meaning:
    multiply = high_product if "hi" in words else np.multiply
    wide = kind
    if "wide" in words:
        wide = {np.int16: np.int32, U16: U32, np.int32: np.int64, U32: U64}[kind]
        multiply = functools.partial(np.multiply, dtype=wide)
    return ([kind, kind], multiply) if code == "mul" else ([kind, kind, wide], lambda a, b, c: multiply(a, b) + c)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(words: tuple[str, ...], types: list[str], kinds: list[type]) -> Meaning | None:
    """cvt.to.from; rounding to an integer is by `rni`, `rzi`, `rmi` or `rpi`."""
    (to, source), (kind, of) = types, kinds
    if "sat" in words:  # to [0, 1], and NaN to 0
        return ([of], lambda x: np.clip(np.nan_to_num(x, nan=0.0), F32(0), F32(1))) if to == source == "f32" else None
    if to in ("f16x2", "bf16x2"):
        narrow = to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16)
        return [of, of], lambda high, low: narrow(low).view(U16) | narrow(high).view(U16).astype(U32) << U32(16)
    if to == "tf32":
        return ([of], to_tf32) if "rna" in words else None
    if "bf16" in types:
        return {"f32.bf16": ([of], from_bf16), "rn.bf16.f32": ([of], to_bf16)}.get(".".join(words))
    if source[0] == "f" and to[0] != "f":
        rounding, limits = next(_ROUND[word] for word in words if word in _ROUND), np.iinfo(kind)

        def to_integer(x: Array) -> Array:
            inside = np.clip(rounding(np.nan_to_num(x.astype(F64), nan=0.0)), limits.min, limits.max)
            top = inside >= float(limits.max)
            return np.where(top, limits.max, np.where(top, 0, inside).astype(kind)).astype(kind)

        return [of], to_integer
    return None if to[0] == "f" and words[0] not in ("rn", to) else ([of], lambda x: x.astype(kind))
