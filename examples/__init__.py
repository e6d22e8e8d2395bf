"""Example programs: training on a CPU or many GPUs, and export. docs/use/training.md and docs/use/serving.md."""
