"""Writes tables, numbers with their intervals, and pictures, for every command.

`table` aligns columns, `intervals` writes numbers, `panel` describes pictures as data,
and `draw` makes PNGs of them. Only `draw` imports matplotlib; the others are light.
"""
