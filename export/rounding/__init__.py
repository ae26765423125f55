"""From a weight and what its inputs look like to integers on a grid: W [N, K] -> QuantizedLinear.

All of it is pure functions on tensors, on any device. `linear.round_linear` is the way in.
"""
