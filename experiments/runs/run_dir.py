"""A run directory of a sweep, written: its config, its points and its results."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from experiments.runs import folder
from experiments.runs.folder import record_start, whole, write_json, write_text
from experiments.runs.saved_run import EVENTS, REQUESTS, Point, SavedRun


class RunDir(SavedRun):
    """Writes a run directory; a killed run goes on where it was.

    `config.json`, `env.json` and `step_times.json` are written first; each point's
    files appear whole or not at all; `requests.jsonl` and `summary.json` come last. The
    requests and events of a point are kept where its programs ran.

    Raises:
      ValueError: if `path` cannot be written, or holds a run of another config or of
        an older format.
    """

    def __init__(self, path: pathlib.Path, config: dict[str, Any]):
        super().__init__(path)
        try:
            self._points.mkdir(parents=True, exist_ok=True)
            write_text(path / ".writable", "")
            (path / ".writable").unlink()
        except OSError as error:
            raise ValueError(f"--out: cannot write to '{path}': {error}") from error
        self.expect_resumable()
        record_start(path, config, environment())

    def write_json(self, name: str, content: Any) -> None:
        write_json(self.path / name, content)

    def save(
        self,
        point: Point,
        metrics: dict[str, Any],
        requests: Sequence[dict[str, Any]] = (),
        events: Iterable[str] = (),
    ) -> None:
        """Save a point's requests, event log and metrics; the metrics mark it done.

        Without requests there are files of neither.
        """
        marker = self._file(point, ".json")
        marker.parent.mkdir(exist_ok=True)
        marker.unlink(missing_ok=True)  # while its files are replaced it is not done
        if requests:
            lines = (json.dumps({**point.fields, **row}) for row in requests)
            _write_gz(self._file(point, REQUESTS), lines)
            _write_gz(self._file(point, EVENTS), events)
        write_text(marker, json.dumps(metrics, indent=1, allow_nan=False))

    def write_requests(self, points: Iterable[Point]) -> None:
        """Write `requests.jsonl`: a line for each request that is kept of `points`."""
        with whole(self.path / "requests.jsonl") as temporary:
            with temporary.open("w") as file:
                for point in filter(self.has_requests, points):
                    file.writelines(self.request_lines(point))


def environment() -> dict[str, Any]:
    """Return where and when this runs, which may differ between equal configs."""
    return {
        **folder.environment(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _write_gz(path: pathlib.Path, lines: Iterable[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    with whole(path) as temporary:
        # No time stamp: equal content, equal bytes.
        temporary.write_bytes(gzip.compress(data, compresslevel=1, mtime=0))
