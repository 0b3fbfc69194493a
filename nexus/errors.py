"""The errors of nexus: one small tree under `NexusError`.

Each class is also the standard error that a caller would expect, pickles (errors cross Ray actors), and carries one line that
says what was expected, what was found and what to do about it. `jobs.cli` turns a `UserError` into exit code 2 and every other
`NexusError` into exit code 1.
"""

from __future__ import annotations


class NexusError(Exception):
    """Base of every error that nexus raises on purpose."""


class UserError(NexusError, ValueError):
    """A mistake in what the user typed or supplied; the message is one line: expected, found, remedy."""


class ConfigError(UserError):
    """The configuration cannot be used as it stands."""


class DataError(UserError):
    """Input data are missing, empty, or unreadable beyond the configured share of bad rows."""


class TowerLoadError(UserError):
    """A teacher's checkpoint cannot be loaded as its registry entry demands."""


class UnsupportedRoleError(TowerLoadError):
    """The teacher's role (diffusion, codec, ...) has no loader in this version."""


class ArtifactError(UserError):
    """A file of a run directory is missing, damaged, or belongs to another configuration."""


class ClusterError(UserError):
    """The Ray cluster that was asked for cannot be reached."""


class ProfilingError(NexusError, RuntimeError):
    """Layer profiling cannot give a truthful result, for example because ablations change nothing."""


class TeacherUnavailableError(NexusError, RuntimeError):
    """A teacher actor stayed away after every bounded retry."""


class TrainingDivergedError(NexusError, RuntimeError):
    """The recovery ladder is exhausted; the last good state has been kept."""


class StageFailedError(NexusError, RuntimeError):
    """A stage ended without all of its work done."""
