"""Rows of measurements of real engines on real devices, and the simulator beside them.

`rows` reads a file of them, `served` simulates what a row describes as it was measured,
`step_times` says where the time of its steps goes, `errors` holds one against the
other, `report` writes tables and pictures.
"""
