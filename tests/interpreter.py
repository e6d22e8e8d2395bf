"""Triton's interpreter with the compiler's integers, and without work that changes nothing: a third of the time.

It changes private parts of :data:`VERSION` alone; other versions take their time, and 64 bits for 32.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter, jit

Function = Callable[..., Any]
VERSION = "3.9."


class _Wide(int):
    """An integer argument that its kernel annotates with 64 bits."""


def changes() -> bool:
    return triton.__version__.startswith(VERSION)


def spare_work() -> None:
    """Changes the interpreter in place."""
    if not changes():
        return
    _heed_annotations()
    # Sums and products of int32 are made again in int64, for an assertion that needs `debug`.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)  # makes its table at each look-up
    _patch_once_per_launch()
    # Every value has a type and a shape of its own, of which there are few different ones.
    tl.core.block_type.__init__ = _remembered(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _with_shared_shape(tl.core.tensor.__init__)


def _heed_annotations() -> None:
    """Small integers have 32 bits in the interpreter, whatever their annotation; products of strides overflow."""
    hosted, convert = interpreter.GridExecutor._init_args_hst, interpreter._implicit_cvt

    def init_args(self: Any, args: Any, keywords: Any) -> Any:
        made, keywords = hosted(self, args, keywords)
        types = inspect.get_annotations(self.fn)
        wide = [jit._normalize_ty(types.get(name, "")) == "i64" for name in self.arg_names]
        return [_Wide(a) if w and type(a) is int else a for a, w in zip(made, wide, strict=False)], keywords

    def implicit(arg: Any) -> Any:
        if type(arg) is _Wide:
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.int64), tl.int64), tl.int64)
        return convert(arg)

    interpreter.GridExecutor._init_args_hst, interpreter._implicit_cvt = init_args, implicit


def _by_name(function: Function) -> Function:
    made: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        found = made.get(dtype.name)
        if found is None:
            found = made[dtype.name] = function(dtype)
        return found

    return look_up


def _patch_once_per_launch() -> None:
    """A call of a function inside of a kernel patches `triton.language` as the launch did: once is enough."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: list[set[Any]] = []

    def patch_new(fn: Function) -> Any:
        new = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if patched and new <= patched[-1]:
            return None
        if patched:
            patched[-1] |= new
        return patch(fn)

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, remember


def _remembered(init: Function) -> Function:
    made: dict[Any, dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.value if type(shape) is tl.constexpr else shape
        key = (element_ty.name, *[s.value if type(s) is tl.constexpr else s for s in sizes])
        attributes = made.get(key)
        if attributes is None:
            init(self, element_ty, shape)
            made[key] = dict(vars(self))
        else:
            vars(self).update(attributes)

    return __init__


def _with_shared_shape(init: Function) -> Function:
    made: dict[str, tuple[Any, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:
        key = type.name
        shared = made.get(key)
        if shared is None:
            init(self, handle, type)
            made[key] = self.numel, self.shape
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shared

    return __init__
