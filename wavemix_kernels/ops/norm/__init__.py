"""BatchNorm behind a Waveblock's levels; the norm before a Wave-MLP branch, and the sum behind it."""
