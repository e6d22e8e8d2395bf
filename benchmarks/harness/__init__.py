"""What every benchmark shares: cases and gates, clocks, memory, providers, the machine."""
