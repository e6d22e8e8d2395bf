"""Shared by every op family: autograd, memory order, dtypes, products, self-tests, Triton launches."""
