"""Merged and quantised checkpoints: written shard by shard, checked before they get their name.

Importing this package imports nothing else; take what is needed from its modules.
"""
