"""A WaveMix model's stem: convolutions with nothing between them, as one."""
