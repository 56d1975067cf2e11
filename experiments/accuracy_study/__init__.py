"""The engine and the simulator on the same requests, and their comparison."""
