"""Wave-MLP: PATM, MLP and the block around them, plain and fused, and their inference forms."""
