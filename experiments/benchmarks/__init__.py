"""Measurements of the engine beside bounds; the commands that print them are above.

engines          engines with only the programs of one measurement
no_op_programs   host time of a step
handoff          KV from mesh to mesh
transfers        KV transfers as one request sees them
stall            requests that decode while a prompt arrives
dense_baseline   decode without an engine
peaks            the peaks of a device, and the bound of a step
timing           figures beside bounds, and medians
"""
