"""What every op family uses: autograd, memory order, dtypes, products, self-tests, Triton launches."""
