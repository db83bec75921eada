"""Rows of activations, sorted by group, with the weight of their group: a layer of experts.

y = kernels.ragged_matmul(x, w, sizes, "bfloat16")                       # w: [E, N, K]
y = kernels.ragged_matmul(x, w, sizes, "bfloat16", scales=s, mode=mode)  # w: int8, s: [E, N]
"""
