"""The table of chips, for :mod:`benchmarks.predict.bound`.

Sources, by their letters below:

- D: NVIDIA's data sheets (A100 80GB SXM: 312 TFLOP/s bf16, 2,039 GB/s; H100 SXM: 989 TFLOP/s, 3.35 TB/s; H200 SXM:
  the same, 4.8 TB/s; HGX B200: 2,250 TFLOP/s, 8 TB/s; all dense) and the architecture whitepapers (multiprocessors,
  boost clocks, L2 sizes).
- G: CUDA C++ programming guide, tables "Throughput of native arithmetic instructions" and "Technical specifications
  per compute capability": lanes a clock of a multiprocessor, registers, shared memory, warps, blocks.
- M: microbenchmarks. Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
  Microbenchmarking" (mma.sync reaches 62 % of what wgmma does on an H100; memory latencies); Jia et al. 2018 and its
  successors for the shares of L2.
- C: what :mod:`benchmarks.predict.calibration` has: the time that a larger copy or sum of vectors takes longer.
- E: estimated, where nothing was found: 90 % of the data sheet for a copy by HBM3; about 80 % of a
  chip's tensor peak for a library's products; latency under load 1.3 times the unloaded one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        capability: compute capability, whose machine code it runs.
        sms: multiprocessors. Each has four schedulers, which issue one instruction of a warp a clock each.
        clock: Hz under load.
        copy_bandwidth: bytes/s, read and written, of a copy that does not fit L2.
        latency: seconds from a load to its value out of device memory, under load.
        l2_bytes, l2_bandwidth: size in bytes; bytes/s.
        tensor_flops: by dtype, of the fastest matrix instruction (FLOP/s, dense).
        warp_tensor_flops: by dtype, of mma.sync, which runs out of registers.
        library_share: of `tensor_flops` that a library's products reach.
        fp32_lanes, alu_lanes, fp64_lanes, mufu_lanes: results a clock of a multiprocessor: fp32 arithmetic; integers,
            logic, comparisons and selections; fp64; special functions and conversions from and to integers.
        shared_bytes_per_clock: of shared memory and the first-level cache, of a multiprocessor.
        l2_bytes_per_clock: between L2 and a multiprocessor.
        registers, shared_bytes, warps, blocks: of a multiprocessor.
        launch: seconds between the end of one kernel and the first instruction of the next in a stream.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    clock: float
    copy_bandwidth: float
    latency: float
    l2_bytes: int
    l2_bandwidth: float
    tensor_flops: dict[torch.dtype, float]
    warp_tensor_flops: dict[torch.dtype, float]
    library_share: float
    fp32_lanes: int
    fp64_lanes: int
    shared_bytes: int
    alu_lanes: int = 64
    mufu_lanes: int = 16
    shared_bytes_per_clock: int = 128
    l2_bytes_per_clock: int = 64
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    launch: float = 1.5e-6

    @property
    def shared_of_block(self) -> int:
        """Bytes of shared memory that a block may have: the system takes 1 KiB of each."""
        return self.shared_bytes - KIB

    @property
    def arch(self) -> int:
        """The number that nvcc and Triton use."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def slots(self) -> float:
        """Instructions of a warp that the chip issues in a second."""
        return self.sms * 4 * self.clock

    def peak_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of products; float64 and others without tensor cores: by ordinary units."""
        peak = self.tensor_flops.get(dtype)
        return self.fp64_lanes * 2 * self.sms * self.clock if peak is None else peak

    def library_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of a product by cuBLAS or cuDNN."""
        return self.library_share * self.peak_flops(dtype)


def _rates(sms: int, clock: float, fma16: int, share: float = 1.0) -> dict[torch.dtype, float]:
    """From fma16 products of 16-bit elements a clock of a multiprocessor; TF32 has half as many."""
    full = 2.0 * sms * clock * fma16 * share
    return {torch.float16: full, torch.bfloat16: full, torch.float32: full / 2}


CHIPS: dict[str, Chip] = {
    "a100": Chip(
        name="A100 SXM 80GB", capability=(8, 0),
        sms=108, clock=1.41e9,  # D
        copy_bandwidth=1.70e12, latency=0.60e-6,  # C (2,039 GB/s by D); M: 466 to 570 clocks unloaded
        l2_bytes=40 * MIB, l2_bandwidth=4.5e12,  # D; M
        tensor_flops=_rates(108, 1.41e9, 1024), warp_tensor_flops=_rates(108, 1.41e9, 1024),  # D: one kind
        library_share=0.85,  # E; cuBLAS is reported at 250 to 270 of 312 TFLOP/s
        fp32_lanes=64, fp64_lanes=32, shared_bytes=164 * KIB,  # G
    ),
    "h100": Chip(
        name="H100 SXM", capability=(9, 0),
        sms=132, clock=1.755e9,  # D: boost 1.98 GHz; what it keeps under load
        copy_bandwidth=3.0e12, latency=0.75e-6,  # E of 3.35 TB/s (D); M, E: 0.65 to 0.8 us
        l2_bytes=50 * MIB, l2_bandwidth=7.0e12,  # D; M
        tensor_flops=_rates(132, 1.755e9, 2048), warp_tensor_flops=_rates(132, 1.755e9, 2048, 0.62),  # D; M
        library_share=0.83,  # about 790 TFLOP/s of bf16
        fp32_lanes=128, fp64_lanes=64, shared_bytes=228 * KIB,  # G
    ),
    "h200": Chip(
        name="H200 SXM", capability=(9, 0),
        sms=132, clock=1.755e9,  # D, as the H100
        copy_bandwidth=4.3e12, latency=0.75e-6,  # E of 4.8 TB/s (D); as the H100
        l2_bytes=50 * MIB, l2_bandwidth=7.0e12,  # D; as the H100
        tensor_flops=_rates(132, 1.755e9, 2048), warp_tensor_flops=_rates(132, 1.755e9, 2048, 0.62),  # as the H100
        library_share=0.83,  # as the H100
        fp32_lanes=128, fp64_lanes=64, shared_bytes=228 * KIB,  # G
    ),
    "b200": Chip(
        name="B200", capability=(10, 0),
        sms=148, clock=1.85e9,  # D
        copy_bandwidth=6.4e12, latency=0.85e-6,  # C; E
        l2_bytes=126 * MIB, l2_bandwidth=12e12,  # D; E
        tensor_flops=_rates(148, 1.85e9, 4096),  # D
        warp_tensor_flops=_rates(148, 1.85e9, 1024),  # E: mma.sync at sm_80's rate
        library_share=0.75,  # E
        fp32_lanes=128, fp64_lanes=64, shared_bytes=228 * KIB,  # G
    ),
}  # fmt: skip


def chip(name: str) -> Chip:
    """By its name in :data:`CHIPS`.

    Raises:
        ValueError: unknown.
    """
    if name not in CHIPS:
        raise ValueError(f"gpu={name!r}: expected one of {', '.join(map(repr, CHIPS))}")
    return CHIPS[name]
