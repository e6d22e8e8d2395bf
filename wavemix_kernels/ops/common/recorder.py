"""Writes down what a function does with tensors, as a Python function of straight lines.

Inside ``with Recorder(tensors) as recorder`` the operators of PyTorch, the launches of Triton's kernels
(:mod:`wavemix_kernels.ops.common.triton_launch`) and the CUDA kernels' (:func:`wavemix_kernels._native.launch`) are
noted as they run. :meth:`Recorder.compiled` makes a function of them. Kernels get addresses there, so views that
nothing else looks at are left out, and Triton's compiled kernels are called past its binder.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wavemix_kernels import _native
from wavemix_kernels.ops.common.plan_lines import STREAM, At, Made, Slot, Step, Writer

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Address(int):
    """An address that knows its tensor."""

    slot: Slot | None


class Recorder(TorchDispatchMode):
    """
    Args:
        tensors: inputs of the function, no two of them the same object.
        implementation: the function of one of this package's operators, whose parts are noted instead of it.

    Attributes:
        refused: why what was seen cannot be repeated, or None.
    """

    def __init__(self, tensors: Sequence[Tensor], implementation: Callable[[Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.refused: str | None = None
        self._implementation = implementation
        self._steps: list[Step] = []
        # By the address of the object, as long as it lives: what the function drops is to be freed.
        self._alive: dict[int, tuple[Slot, Any]] = {}
        self._count = 0
        self._inputs = [self._add(t) for t in tensors]

    def __enter__(self) -> Recorder:
        _native.recorders[threading.get_ident()] = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del _native.recorders[threading.get_ident()]

    # --- What happens ---------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "wavemix_kernels":
            with _Again(self):
                return self._implementation(func)(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if any(isinstance(t, Tensor) and t.requires_grad for t in args):
            self.refuse("it differentiates")
        step = Step("call", func, self._symbol(args), self._symbol(kwargs))
        result = func(*args, **kwargs)
        if func.namespace != "aten":
            self.refuse(f"{func} is no operator of PyTorch")
        view_of = None
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            source = next(t for t in args if isinstance(t, Tensor))
            if _of_one_memory(result, source):  # contiguous and its like copy where they have to
                step.kind, view_of = "view", source
        elif name in _ALLOCATIONS:
            step.kind = "allocation"
        step.out = self._made(result, view_of, func)
        self._steps.append(step)
        return result

    def _made(self, result: Any, view_of: Tensor | None, func: Any) -> Any:
        if isinstance(result, Tensor):
            known = self._alive.get(id(result))
            if known is not None:  # an operator that writes to its argument
                return known[0]
            slot = self._add(result)
            if view_of is not None:
                slot.root = self._slot(view_of).root
            return slot
        if isinstance(result, (tuple, list)):
            return [self._made(one, view_of, func) for one in result]
        if result is not None:
            self.refuse(f"{func} gives a number, which depends on values")
        return None

    def address(self, tensor: Tensor) -> Address:
        made = Address(tensor.data_ptr())
        made.slot = self._slot(tensor)
        return made

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> None:
        """``function(*args, stream, **more)`` was, with :class:`Address` for tensors."""
        self._steps.append(Step("call", function, (*self._symbol(args), STREAM), self._symbol(more)))

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """``kernel[grid](*args, **constants)`` was, in Triton's interpreter."""
        call = (kernel, grid, self._symbol(args), constants)
        self._steps.append(Step("call", lambda k, g, a, c: k[g](*a, **c), call, {}))

    def launched_compiled(self, kernel: Any, again: Callable[[], Any]) -> None:
        """A kernel that Triton has compiled was launched; ``again`` does it once more."""
        with _spying:
            launcher, args = _launcher(kernel, again)
        if launcher is None:
            import triton

            self.refuse(f"Triton {triton.__version__} launches kernels in a way that plans do not know")
            return
        self._steps.append(Step("call", launcher, (*args[:3], STREAM, *self._pointers(args[4:])), {}, owner=kernel))

    def _pointers(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return At(self._slot(value))
        if type(value) in (tuple, list):
            return tuple(self._pointers(one) for one in value)
        return value

    # --- Symbols --------------------------------------------------------------------------------------------

    def _add(self, tensor: Tensor) -> Slot:
        shape, on_gpu = (tuple(tensor.shape), tensor.stride()), tensor.get_device() >= 0
        slot = Slot(self._count, *shape, tensor.dtype, tensor.device, on_gpu, tensor.data_ptr())
        self._count += 1
        number, alive = id(tensor), self._alive
        alive[number] = slot, weakref.ref(tensor, lambda _: alive.pop(number, None))
        return slot

    def _slot(self, tensor: Tensor) -> Slot:
        found = self._alive.get(id(tensor))
        if found is None:
            self.refuse(f"a tensor {tuple(tensor.shape)} comes from outside")
            return self._add(tensor)
        return found[0]

    def _symbol(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._slot(value)
        if isinstance(value, Address):
            return At(value.slot) if value.slot is not None else 0
        if isinstance(value, dict):
            return {name: self._symbol(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._symbol(one) for one in value]
        if isinstance(value, tuple):
            parts = [self._symbol(one) for one in value]
            return Made(type(value), parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def compiled(self, result: Any) -> Callable[..., Any]:
        """A function ``(stream, *tensors)`` that does the same and returns the like of ``result``."""
        return Writer(self._inputs, self._steps, self._symbol(result)).function()


def _of_one_memory(result: Any, source: Tensor) -> bool:
    one = result[0] if isinstance(result, (tuple, list)) and result else result
    return not isinstance(one, Tensor) or one.untyped_storage()._cdata == source.untyped_storage()._cdata


class _Again:
    """The mode on again, inside its own handler."""

    def __init__(self, mode: Recorder) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchDispatchMode.__enter__(self._mode)

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self._mode, *error)


_spying = threading.Lock()


def _launcher(kernel: Any, again: Callable[[], Any]) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    """The deepest function of Triton that launches a compiled kernel, and its arguments: the grid, the stream, and
    others. None where Triton is made otherwise. Nothing is launched."""
    caught = _caught(kernel, "_run" if "_run" in vars(kernel) else "run", again)
    # Grid, stream, function, packed metadata, metadata for hooks, two hooks, arguments.
    if caught is None or len(caught) < 9 or caught[4] != kernel.function or not _is_launch(caught):
        return None, ()
    args = (*caught[:6], None, None, None, *caught[9:])
    launcher = kernel.run
    # Memory for the kernel itself is allocated on the way.
    if getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 0):
        return launcher, args
    inner = _caught(launcher, "launch", lambda: launcher(*args))
    return (launcher.launch, inner) if inner is not None and inner[:5] == args[:5] else (launcher, args)


def _is_launch(args: tuple[Any, ...]) -> bool:
    return all(type(number) is int for number in args[:4])


def _caught(holder: Any, name: str, call: Callable[[], Any]) -> tuple[Any, ...] | None:
    """The arguments that ``call`` gives to a function that ``holder`` has, without a call of it; None for none."""
    real = vars(holder).get(name)
    if not callable(real):
        return None
    thread, caught = threading.get_ident(), list[tuple[Any, ...]]()

    def spy(*args: Any) -> None:
        if threading.get_ident() == thread:
            caught.append(args)
        else:
            real(*args)

    setattr(holder, name, spy)
    try:
        call()
    finally:
        setattr(holder, name, real)
    return caught[0] if len(caught) == 1 else None
