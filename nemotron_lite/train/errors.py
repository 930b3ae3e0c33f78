"""The error of a run that cannot be started or resumed in its folder."""

from __future__ import annotations


class ResumeError(RuntimeError):
    """A run that cannot be resumed. The message says why, and what to do instead."""
