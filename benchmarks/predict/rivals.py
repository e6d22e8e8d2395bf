"""The cost of a step without this package: operator by operator, or as an ideal torch.compile would run it.

Both are counted generously. Every operator takes the longer of its bytes at the speed of a copy and its products at the
rate that a library reaches at its best; conversions between memory orders and a library's own work space are free.

An ideal compiler makes each product one kernel of the library, with the bias. Between those it writes only what a
library's kernel, a reduction or the caller needs: everything else is computed again wherever it is read, also in
backward. Values of one shape that read the same tensors are made in one pass. Normalisation is two passes: sums, then
whatever follows.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from .chips import Chip
from .record import Array, Launch

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward"}
_NORMS = {
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::native_batch_norm_backward",
    "aten::native_group_norm", "aten::native_group_norm_backward", "aten::_softmax", "aten::_softmax_backward_data",
    "aten::native_layer_norm", "aten::native_layer_norm_backward",
}  # fmt: skip
_REDUCTIONS = {"aten::sum", "aten::mean", "aten::_adaptive_avg_pool2d", "aten::var_mean", "aten::amax"}
# Pointwise, though their tags do not say so: copies, constants and random numbers.
_COPIES = {
    f"aten::{name}"
    for name in (
        *("clone", "copy_", "_to_copy", "cat", "stack", "fill_", "zero_", "zeros", "ones", "full", "zeros_like"),
        *(
            "ones_like",
            "new_zeros",
            "new_ones",
            "constant_pad_nd",
            "slice_backward",
            "select_backward",
            "native_dropout",
        ),
        *(
            "native_dropout_backward",
            "randint",
            "rand",
            "bernoulli_",
            "uniform_",
            "rsub",
            "_adaptive_avg_pool2d_backward",
        ),
        *(
            "_native_batch_norm_legit_no_training",
            "lift_fresh_copy",
            "scalar_tensor",
            "new_full",
            "index_select",
            "rand_like",
            "bernoulli",
        ),
    )
}
#: A value of so many reads is written rather than made twice, or where parts of it are read; Inductor has this rule.
_READS = 4


@dataclass(frozen=True)
class Pass:
    """A kernel: name, bytes, products (FLOP) and their dtype."""

    name: str
    bytes: float
    flops: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def seconds(self, chip: Chip) -> float:
        """Without the launch. Nothing takes less than the way of one value from memory and back."""
        return max(self.bytes / chip.copy_bandwidth, self.flops / chip.library_flops(self.dtype), 2 * chip.latency)

    def bound(self, chip: Chip) -> str:
        times = {
            "memory": self.bytes / chip.copy_bandwidth,
            "tensor": self.flops / chip.library_flops(self.dtype),
            "latency": 2 * chip.latency,
        }
        return max(times, key=lambda name: times[name])


def flops(launch: Launch) -> float:
    """Multiplications and additions of a product; 0 for other operators and for depthwise convolutions."""
    if launch.name not in _PRODUCTS:
        return 0.0
    shapes = [a.shape for a in tree_leaves(launch.args) if isinstance(a, Array)]
    if "convolution" not in launch.name:
        (*batch, rows, inner), columns = shapes[-2], shapes[-1][-1]
        return 2.0 * math.prod(batch) * rows * inner * columns
    backward = launch.name.endswith("_backward")
    image, weight = (launch.args[1], launch.args[2]) if backward else (launch.args[0], launch.args[1])
    other = launch.args[0] if backward else launch.arrays[-1]
    transposed, groups = (launch.args[7], launch.args[9]) if backward else (launch.args[6], launch.args[8])
    if groups > 1 and weight.shape[1] < 8:
        return 0.0
    # Each weight meets each pixel of the smaller image: of the input where the convolution is transposed.
    pixels = math.prod((image if transposed else other).shape[2:]) * image.shape[0]
    times = sum(launch.args[10][:2]) if backward else 1
    return 2.0 * pixels * math.prod(weight.shape) * times


def operator(launch: Launch) -> Pass:
    """An operator of PyTorch's as one kernel; normalisation reads once more, since its sums come first."""
    again = 0.0
    if launch.name in _NORMS and "softmax" not in launch.name and _takes_sums(launch):
        inputs = [a for a in tree_leaves(launch.args) if isinstance(a, Array)]
        largest = max((a.bytes for a in inputs), default=0)
        again = sum(a.bytes for a in inputs if a.bytes == largest)
    return Pass(launch.name, launch.bytes + again, flops(launch), _dtype(launch))


def _takes_sums(launch: Launch) -> bool:
    if launch.name == "aten::native_batch_norm":
        return bool(launch.args[5])  # training
    if launch.name == "aten::native_batch_norm_backward":
        return bool(launch.args[7])
    return True


def _dtype(launch: Launch) -> torch.dtype:
    found: torch.dtype = next((a.dtype for a in launch.arrays if a.dtype.is_floating_point), torch.float32)
    return found


# --- The ideal compiler -----------------------------------------------------------------------------------------


@dataclass
class _Kernel:
    """A pass over values of one size."""

    size: int
    number: int
    reads: set[Array] = field(default_factory=set)
    writes: dict[int, int] = field(default_factory=dict)  # storage -> bytes
    sums: set[int] = field(default_factory=set)  # storages among them that are complete at the end only


class _Flow:
    """Follows values through a step: each storage is in memory, or made of others that are."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.bytes: dict[int, int] = {}  # of each storage
        self.elements: dict[int, int] = {}
        self.size: dict[int, int] = {}  # elements of the pass that makes it: of the largest part of what is joined
        self.reads: dict[int, int] = {}  # for one element of those that are not in memory
        self.uses: Counter[int] = Counter()  # in this graph
        self.made_of: dict[int, set[Array]] = {}  # of those that are not in memory
        self.made_in: dict[int, int] = {}  # number of the kernel that wrote it
        self.used: set[int] = set()
        self.kernels: list[_Kernel | Pass] = []
        self.first = 0  # kernels before it belong to another graph

    def storage(self, array: Array) -> int:
        """The storage that an array is a view of; one that was not seen begins with it."""
        at = bisect.bisect_right(self.starts, array.address) - 1
        if at >= 0 and array.address < self.starts[at] + max(self.bytes[self.starts[at]], 1):
            return self.starts[at]
        bisect.insort(self.starts, array.address)
        self.bytes[array.address] = array.bytes
        self.elements[array.address] = self.size[array.address] = math.prod(array.shape)
        return array.address

    def sources(self, arrays: Sequence[Array], joined: bool = False) -> set[Array]:
        """The arrays in memory that a kernel reads to make something of ``arrays``. A value of many reads is written
        first where it would be made more than once, or is needed by parts."""
        found: set[Array] = set()
        for array in arrays:
            storage = self.storage(array)
            self.used.add(storage)
            part = not joined and math.prod(array.shape) != self.elements[storage]
            if storage in self.made_of and self.reads[storage] >= _READS and (part or self.uses[storage] > 1):
                self.write(storage)
            found |= self.made_of.get(storage, {array})
        return found

    def write(self, storage: int) -> None:
        """Puts a value that is made of others into memory."""
        behind = self.made_of.pop(storage, None)
        if behind is not None:
            self.join(self.size[storage], behind, {storage: self.bytes[storage]}, ())

    def join(self, size: int, reads: set[Array], writes: dict[int, int], sums: Sequence[int]) -> None:
        """A value or sums over values of some size: by an earlier pass that reads some of the same, or a new one."""
        needed = {self.storage(a) for a in reads}
        for kernel in reversed(self.kernels[self.first :]):
            if not isinstance(kernel, _Kernel) or kernel.size != size:
                continue
            shared = needed & ({self.storage(a) for a in kernel.reads} | set(kernel.writes))
            late = any(self.made_in.get(s, -1) > kernel.number or s in kernel.sums for s in needed)
            if shared and not late:
                break
        else:
            kernel = _Kernel(size, len(self.kernels))
            self.kernels.append(kernel)
        kernel.reads |= {a for a in reads if self.storage(a) not in kernel.writes}
        kernel.writes |= writes
        kernel.sums |= set(sums)
        for storage in writes:
            self.made_in[storage] = kernel.number

    def begin(self, graph: Sequence[Launch]) -> None:
        """Starts the next graph. Values that the one before made and this one does not use go to the caller, and passes
        of the two do not join."""
        inputs = ({self.storage(a) for a in _inputs(launch)} for launch in graph)
        uses = Counter(storage for one in inputs for storage in one)
        self.finish(uses)
        self.uses, self.first = uses, len(self.kernels)

    def add(self, launch: Launch) -> None:
        inputs = _inputs(launch)
        outputs = list(launch.arrays[len(inputs) :])
        if launch.name in _PRODUCTS or not (inputs or outputs):
            self.library(launch, inputs, outputs)
        elif launch.name in _NORMS and _takes_sums(launch):
            self.norm(inputs, outputs)
        elif launch.name in _REDUCTIONS:
            self.reduce(inputs, outputs)
        elif launch.name in _COPIES or launch.name in _NORMS or _pointwise(launch.name):
            self.pointwise(launch.name, inputs, outputs)
        else:
            self.library(launch, inputs, outputs)

    def library(self, launch: Launch, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        for array in inputs:
            self.used.add(self.storage(array))
            self.write(self.storage(array))
        for array in outputs:
            self.made_of.pop(self.storage(array), None)
            self.made_in[self.storage(array)] = len(self.kernels)
            self.used.add(self.storage(array))
        self.kernels.append(operator(launch))

    def pointwise(self, name: str, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        joins = name in ("aten::cat", "aten::stack")
        reads = self.sources(inputs, joins)
        for array in outputs:
            storage, elements = self.storage(array), math.prod(array.shape)
            if name.endswith("_") and storage not in self.made_of and storage in self.used:
                reads = reads | {array}
            alike = [self.size[s] for a in inputs if self.elements[s := self.storage(a)] == elements]
            self.size[storage] = max(math.prod(a.shape) for a in inputs) if joins else max(alike, default=elements)
            large = [self.storage(a) for a in inputs if 16 * math.prod(a.shape) >= elements]
            self.reads[storage] = sum(self.reads[s] if s in self.made_of else 1 for s in large)
            self.made_of[storage] = self.made_of.get(storage, set()) | reads
            self.used.discard(storage)

    def reduce(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        size = max(math.prod(a.shape) for a in inputs)
        storages = {self.storage(a): a.bytes for a in outputs}
        self.join(size, self.sources(inputs), storages, list(storages))
        self.used |= set(storages)

    def norm(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        image, *small = sorted(outputs, key=lambda a: -a.bytes)
        size = math.prod(image.shape)
        reads = self.sources(inputs)
        sums = {self.storage(a): a.bytes for a in small}
        if not sums:  # softmax: its sums are a value for each row, which nobody sees
            self.join(size, reads, {self.storage(image): image.bytes}, [])
            return
        self.join(size, reads, sums, list(sums))
        self.used |= set(sums)
        self.made_of[self.storage(image)] = reads | set(small)
        self.reads[self.storage(image)] = sum(16 * a.bytes >= image.bytes for a in inputs)

    def finish(self, still: Container[int] = ()) -> None:
        """Writes what nobody used, or will still use."""
        for storage in list(self.made_of):
            if storage not in self.used and storage not in still:
                self.write(storage)

    def passes(self) -> list[Pass]:
        """Every kernel."""
        self.finish()
        return [k if isinstance(k, Pass) else Pass("pointwise", self._moved(k)) for k in self.kernels]

    def _moved(self, kernel: _Kernel) -> float:
        read: dict[int, int] = {}
        for array in kernel.reads:
            read[self.storage(array)] = read.get(self.storage(array), 0) + array.bytes
        return sum(min(total, self.bytes[s]) for s, total in read.items()) + sum(kernel.writes.values())


def _inputs(launch: Launch) -> list[Array]:
    return [a for a in tree_leaves((launch.args, launch.constants)) if isinstance(a, Array)]


@functools.cache
def _pointwise(name: str) -> bool:
    namespace, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), base)
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def compiled(forward: Sequence[Launch], backward: Sequence[Launch] = ()) -> list[Pass]:
    """The kernels of an ideal torch.compile for the operators of a step."""
    flow = _Flow()
    for graph in (forward, backward):
        flow.begin(graph)
        for launch in graph:
            flow.add(launch)
    return flow.passes()
