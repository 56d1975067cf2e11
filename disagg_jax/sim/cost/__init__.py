"""Cost models: how long a step or a transfer takes, predicted without running it.

One seam (`interface`) with several models: linear coefficients, a roofline of a named
model on named hardware, DistServe's fits, and times measured on an engine.
"""
