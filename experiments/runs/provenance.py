"""The version of this project that runs."""

from __future__ import annotations

import pathlib
import subprocess


def commit() -> str | None:
    """Return the checkout's commit, marked where files differ; None outside git."""
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
