"""Hardware in simulation: devices, their memory, and the links between them."""
