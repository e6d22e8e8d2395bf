"""WaveMix: the Waveblock, plain and fused, and its inference form."""
