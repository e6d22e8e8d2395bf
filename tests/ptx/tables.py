"""`python -m tests.ptx.tables`: the Triton kernels of the compile tables, as tests/ptx/launch.py names them, a line
each."""

from tests.aot.triton_launches import points
from tests.ptx.launch import kernel_name

if __name__ == "__main__":
    print(*sorted({kernel_name(point.launch) for point in points()}), sep="\n")
