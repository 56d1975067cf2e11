"""Sharding: meshes, rules from logical to mesh axes, and the layout of heads."""

from sharding.heads import HeadLayout, head_layout
from sharding.mesh import cut_meshes, make_mesh
from sharding.rules import RULES, named_sharding

__all__ = [
    "RULES",
    "HeadLayout",
    "cut_meshes",
    "head_layout",
    "make_mesh",
    "named_sharding",
]
