"""The attention kernel: its KV cache, the packed inputs of a step, and attention."""
