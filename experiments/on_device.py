"""What to run on a borrowed accelerator: all that only it can tell, in one command.

    python -m experiments.on_device --minutes=8 --out=runs/h200
    python -m experiments.on_device --parts=kernels,steps --batches=1,64 --out=runs/h200
    JAX_PLATFORMS=cpu python -m experiments.on_device --out=runs/tried

tests        the tests that need a GPU or TPU; skipped without pytest
tokens       logits and greedy tokens in bfloat16 against float32
kernels      every attention kernel against float64, then their times beside the bytes
             and FLOPs they need
calibration  the profile of the model's programs and transfers: profile.json
steps        decode and prefill beside their bounds, at several batches and contexts
handoff      KV from a prefill pool to a decode pool; on one device the two share it
sweep        goodput of two systems, emulated with the profile's step times

Each part runs in a process of its own and writes at once: NAME.txt what it printed,
NAME.json what it came to. A part that fails leaves its traceback there, and the others
run; the status is 1 then. The same command again runs what failed or was left out, also
in part, and leaves the rest as it is (kernels, steps and the sweep go on where they
were); --parts chooses. table.txt has a line for each.

Weights are random, drawn on the device. With --minutes each part gets a share of what
is left, and begins nothing more after it. A part that goes on for a minute beyond twice
its share, or beyond --minutes, is killed: a kernel may hang. What is compiled for one
part is there for the next, and for the same command again: in `programs`, or where
JAX_COMPILATION_CACHE_DIR says. It is all that may be large.

Needs jax, flax, optax, orbax-checkpoint, absl-py, numpy, scipy and matplotlib. The
default model is llama-3-8b where a device has room for it, and tiny on a CPU, where all
parts together take 4 minutes on 2 cores.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from disagg_jax.errors import require
from experiments.cli.attention import attention_flag
from experiments.cli.command import command
from experiments.cli.flags import Flags, integers
from experiments.cli.names import ENGINE_MODEL
from experiments.cli.progress import ENDLESS, Deadline, MinutesFlag, ProgressLines
from experiments.device.calibration import PROFILE
from experiments.device.part import Found
from experiments.device.parts import PARTS, look, run_part
from experiments.device.process import WorkError, in_a_process
from experiments.device.sizes import DeviceSizes
from experiments.report.table import align
from experiments.runs.folder import plain, read_json, run_folder, write_json, write_text

FLAGS = Flags()
_MODEL = FLAGS.string(
    "model", None, f"By default what suits the device. {ENGINE_MODEL}"
)
_ATTENTION = attention_flag(FLAGS)
_PARTS = FLAGS.list("parts", list(PARTS), "To run, of these.")
_BATCHES = FLAGS.list("batches", [], "Requests in a decode step.")
_CONTEXTS = FLAGS.list("contexts", [], "Tokens that each of them attends to.")
_PROMPTS = FLAGS.list("prompts", [], "Tokens of a prefill step.")
_MINUTES = MinutesFlag(FLAGS, "parts, and what a part does last")
_OUT = FLAGS.string("out", "runs/on_device", "Folder.")

_TABLE = "table.txt"
_GRACE_S = 60.0  # beyond twice its share, or --minutes: then a part is killed
# What became of a part.
_DONE, _IN_PART, _SKIPPED = "done", "in part", "skipped"
_WRONG, _FAILED = "WRONG", "FAILED"
# Of a GPU's memory, under its newer name; JAX refuses both names at once.
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
Call = Callable[..., Any]  # `in_a_process`, or like it


def run(
    sizes: DeviceSizes,
    out: pathlib.Path,
    parts: Sequence[str],
    deadline: Deadline = ENDLESS,
    call: Call = in_a_process,
) -> tuple[str, bool]:
    """Run parts that are not done; return the table, and whether nothing went wrong.

    Args:
      deadline: after which no part is begun.

    Raises:
      ValueError: if another run is in the folder `out`, or one with other sizes.
    """
    progress = ProgressLines()
    with run_folder(out, plain(sizes), _TABLE):
        left = [name for name in PARTS if name in parts and not _is_done(out, name)]
        for name in parts:
            if name not in left:
                progress(f"{name}: found in {out}")
        while left and not deadline.passed():
            progress(f"{left[0]}: {PARTS[left[0]].about}")
            record = _record(left, sizes, out, deadline, call)
            write_json(out / f"{left[0]}.json", record)
            progress(f"{left.pop(0)}: {record['status']}, {record['result']}")
        text = _table(sizes, out, left)
        write_text(out / _TABLE, text + "\n")
    records = [read_json(out / f"{name}.json") or {} for name in parts]
    return text, not any(r.get("status") in (_WRONG, _FAILED) for r in records)


def _is_done(out: pathlib.Path, name: str) -> bool:
    record = read_json(out / f"{name}.json")
    return record is not None and record["status"] == _DONE


def _record(
    left: Sequence[str],
    sizes: DeviceSizes,
    out: pathlib.Path,
    deadline: Deadline,
    call: Call,
) -> dict[str, Any]:
    """Run the first part that is left, and return what it came to."""
    name, start_s = left[0], time.perf_counter()
    found, error = Found(PARTS[name].problem(sizes)), ""
    status = _SKIPPED if found.result else ""
    if not status:
        minutes, most_s = _share(left, deadline)
        try:
            found = call(run_part, name, sizes, out, minutes, most_s=most_s)
            status = _WRONG if found.wrong else _IN_PART if found.left_out else _DONE
        except WorkError as failure:
            status, error = _FAILED, str(failure)
            found = Found(error.strip().splitlines()[-1])
            print(error, file=sys.stderr)
    return {
        "part": name,
        "status": status,
        "seconds": round(time.perf_counter() - start_s, 1),
        "result": found.result,
        "left_out": found.left_out,
        "error": error,
    }


def _share(
    left: Sequence[str], deadline: Deadline
) -> tuple[float | None, float | None]:
    """Return the minutes of the first part that is left, and when it is killed."""
    if (left_s := deadline.left_s) is None:
        return None, None
    weights = [PARTS[name].weight for name in left]
    share_s = left_s * weights[0] / sum(weights)
    return share_s / 60, min(left_s, 2 * share_s) + _GRACE_S


def _table(sizes: DeviceSizes, out: pathlib.Path, not_begun: Sequence[str]) -> str:
    """Return a row for each part that has run, and what there was no time for."""
    rows = [("part", "", "s", "result")]
    missing: list[str] = []
    for name in PARTS:
        record = read_json(out / f"{name}.json")
        if name in not_begun:
            missing.append(name)
        elif record is not None:
            rows.append(
                (name, record["status"], f"{record['seconds']:g}", record["result"])
            )
            if record["left_out"]:
                missing.append(f"{name}: {record['left_out']}")
    lines = [f"{sizes.config.name} {sizes.dtype} on {sizes.devices}", ""]
    lines += align(rows, right=(2,))
    if missing:
        lines += ["", f"left out, as --minutes were spent: {'; '.join(missing)}"]
    if (out / PROFILE).exists():
        lines += ["", f"profile: {out / PROFILE}"]
    return "\n".join(lines)


@command(FLAGS)
def main() -> None:
    deadline, parts = _MINUTES.start(), _PARTS.value
    for name in parts:
        require(name in PARTS, f"--parts: expected some of {', '.join(PARTS)}", name)
    asked = {
        flag.name: integers(flag.name, flag.value)
        for flag in (_BATCHES, _CONTEXTS, _PROMPTS)
    }
    # For the processes of parts: JAX keeps to three quarters of a GPU otherwise.
    if not {_FRACTION, _OLD_FRACTION} & os.environ.keys():
        os.environ[_FRACTION] = "0.9"
    out = pathlib.Path(_OUT.value)
    programs = str((out / "programs").absolute())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    try:
        devices = in_a_process(look)
    except WorkError as failure:
        raise ValueError(f"no device: {failure}") from failure
    sizes = DeviceSizes.of(devices, _MODEL.value, _ATTENTION.value, **asked)
    text, right = run(sizes, out, parts, deadline)
    print(text)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
