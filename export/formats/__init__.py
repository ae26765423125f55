"""Containers for quantised linear layers: pack, unpack, and the configuration that readers look for.

Each module has `pack(linear, module)`, `unpack(tensors, scheme)` and `config(scheme, ...)`. A format says
how W = s (q - z) is stored, nothing of how q was chosen.
"""
