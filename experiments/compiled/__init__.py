"""What a compiled program does to a device: bytes, FLOPs, memory, copies of the pool.

All of it is read off the text of the optimised program, so that no device is needed.
"""
