"""Disaggregated and colocated LLM serving: one controller, two kinds of time."""
