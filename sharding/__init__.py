"""Sharding: meshes, rules from logical to mesh axes, and the layout of heads."""
