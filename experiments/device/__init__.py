"""The parts of `experiments.on_device`: what to run on a borrowed accelerator.

part       what a part is, where it runs, what it leaves behind
sizes      the devices there are, and what they have room for
process    a part in a process of its own
parts      all of them, in order

device_tests, tokens, kernels, calibration, steps, handoff, sweep: one each
"""
