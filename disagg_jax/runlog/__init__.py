"""What happened: the log of a run, its replay, and what devices and links did.

`EventLog` is an observer of `serve`. `replay` checks that a controller decides again
as the log says. `read_occupancy` gives the work of each device and link, and
`chrome_trace` draws it.
"""
