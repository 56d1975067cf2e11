"""Which version of this project runs."""

from __future__ import annotations

import pathlib
import subprocess


def commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None outside."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
