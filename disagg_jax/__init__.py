"""Disaggregated and colocated LLM serving: one controller, two kinds of time."""

from disagg_jax.compiled import check_compiled

check_compiled()
