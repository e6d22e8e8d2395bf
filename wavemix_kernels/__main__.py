"""``python -m wavemix_kernels``: ``doctor`` (what works here and why the rest does not), ``tune`` (what is fastest
here), ``bench`` (the harness)."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wavemix_kernels",
        description="Fused kernels for Haar wavelets, WaveMix and Wave-MLP.",
        epilog="`python -m wavemix_kernels tune --help` and `... bench --help` list their own options.",
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(
        "doctor", help="what is installed, which backends work, why the others do not, a self-test of each"
    )
    commands.add_parser("tune", help="measure what is fastest on this device, for auto to take", add_help=False)
    commands.add_parser("bench", help="the benchmark harness", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    if arguments.command == "bench":
        from wavemix_kernels.benchmarks.__main__ import main as bench

        return bench(rest)
    if arguments.command == "tune":
        from wavemix_kernels.tune.cli import main as tune

        return tune(rest)
    if rest:
        parser.error(f"doctor takes no further arguments, got {' '.join(rest)}")
    from wavemix_kernels.doctor import main as doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
