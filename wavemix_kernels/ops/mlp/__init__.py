"""conv1x1 -> GELU -> Dropout -> conv1x1, hidden activations never in memory; Wave-MLP's channel MLP."""

from wavemix_kernels.ops.mlp.op import pointwise_mlp

__all__ = ["pointwise_mlp"]
