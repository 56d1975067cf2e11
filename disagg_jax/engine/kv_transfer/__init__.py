"""KV from instance to instance: gathered, copied between devices, and inserted."""
