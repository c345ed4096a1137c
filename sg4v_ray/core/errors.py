# SPDX-License-Identifier: Apache-2.0
"""Every error that sg4v_ray raises on purpose.

    Sg4vError
      ConfigError           a recipe or an argument is wrong; raised before any work
      ContractError         data is not what the previous stage promised
        TemplateError       a conversation cannot be rendered or masked exactly
        ImageTokenMismatch  placeholders and images of a request differ in number
        WeightsError        missing, extra or misshapen keys in a checkpoint
      ArtifactError
        ArtifactMissing     name@version was never committed
        ArtifactDrift       it was, but from another config
        ArtifactCorrupt     files are damaged, missing, or not those that its manifest lists
      LeaseError
        LeaseHeld           another driver is writing this artifact
        LeaseLost           another driver took over, or the folder was deleted; commit nothing
      StorageError          a path is missing, exists already, or cannot be reached
      TeacherError
        TeacherBusy         retry: rate limit, timeout, connection, 5xx
        TeacherUnusable     do not retry: bad key, unknown model, wrong URL
      EngineError           the engine stopped or refused a request
        EngineDead          its process is gone; only a new engine helps
      WorkersLost           training workers failed more often than they are started again
      TooManyRejects        a job spent its reject budget
      MoneySpent            a job stopped before it cost more than it may
      Stopped               a signal asked a job to save and to end

A bad image or a bad caption is not an error. It is a row with a `reject` reason.
"""


class Sg4vError(Exception):
    """Root of the tree; the command line prints its text without a traceback."""


class ConfigError(Sg4vError):
    """A recipe or an argument is wrong; raised before any work."""


class ContractError(Sg4vError):
    """Data is not what the previous stage promised."""


class TemplateError(ContractError):
    """A conversation cannot be rendered, or its labels cannot be placed exactly."""


class ImageTokenMismatch(ContractError):
    """A request has another number of image placeholders than images."""


class WeightsError(ContractError):
    """A checkpoint has missing, extra or misshapen keys."""


class ArtifactError(Sg4vError):
    """Something is wrong with `name@version`."""


class ArtifactMissing(ArtifactError):
    """`name@version` was never committed."""


class ArtifactDrift(ArtifactError):
    """`name@version` was made from another config."""


class ArtifactCorrupt(ArtifactError):
    """Files of an artifact are damaged, missing, or not those that its manifest lists."""


class LeaseError(Sg4vError):
    """Two drivers want to write one artifact."""


class LeaseHeld(LeaseError):
    """Another driver is writing this artifact and is alive."""


class LeaseLost(LeaseError):
    """Another driver took over while this one was silent."""


class StorageError(Sg4vError):
    """A path is missing, exists already, or cannot be reached."""


class TeacherError(Sg4vError):
    """The teacher did not answer with a caption."""


class TeacherBusy(TeacherError):
    """Worth a retry: rate limit, timeout, dropped connection or a 5xx."""


class TeacherUnusable(TeacherError):
    """Not worth a retry: wrong key, unknown model, wrong URL."""


class EngineError(Sg4vError):
    """The engine stopped, or refused a request."""


class EngineDead(EngineError):
    """The engine's own process is gone; only a new engine helps."""


class WorkersLost(Sg4vError):
    """Training workers failed more often than they are started again."""


class TooManyRejects(Sg4vError):
    """A job spent its reject budget."""


class MoneySpent(Sg4vError):
    """A job stopped before it cost more than it may; what is finished is kept."""


class Stopped(Sg4vError):
    """A signal asked a job to save and to end; the same command goes on."""
