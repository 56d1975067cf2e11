"""What happened: the log of a run, its replay, and what devices and links did.

`EventLog` is an observer of `serve`. `replay` checks that a controller decides again
as the log says. `read_occupancy` gives the work of each device and link, and
`chrome_trace` draws it. `StepKinds` is an observer that tells without a log how long
stages worked on prompts and on decodes.
"""

from disagg_jax.runlog.chrome_trace import chrome_trace
from disagg_jax.runlog.event_log import EventLog, read_turns, replay
from disagg_jax.runlog.step_kinds import StageShares, StepKinds
from disagg_jax.runlog.utilisation import Occupancy, read_occupancy

__all__ = [
    "EventLog",
    "Occupancy",
    "StageShares",
    "StepKinds",
    "chrome_trace",
    "read_occupancy",
    "read_turns",
    "replay",
]
