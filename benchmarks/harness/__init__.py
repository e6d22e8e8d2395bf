"""The shared parts of all benchmarks: cases and gates, clocks, memory, providers, the machine."""
