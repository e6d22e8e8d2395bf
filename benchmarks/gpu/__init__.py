"""The run on a machine with a GPU, behind ``benchmarks/gpu.sh``: proofs, then timings, then sanitizers.

`plan` has the stages as data, `jobs` runs processes side by side, and each kind of job reads its own result:
`exercise` (self-tests), `parity` (the test-suite), `timing` and `sanitizer`. Nothing here imports torch before
`requirements` has looked for it.
"""
