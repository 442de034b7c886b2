"""
RegistryError
├── RecordNotFound      no such id
├── RecordUnreadable    what is kept under an id is of another release, or corrupt
├── IllegalTransition   the state machine has no such arrow
├── Superseded          another attempt, a cancellation or a deletion has overtaken this work
├── IdempotencyConflict the same key was used for another request
├── QueueFull           as much is unfinished as may be; says when to ask again
├── KeysError           the file of API keys is missing or unreadable, or has no such key
├── StorageFull         there is no room on the disk of the artifacts
├── StoreAway           the bucket of the artifacts cannot be reached; later it may
├── StoreRefuses        the bucket of the artifacts is missing, or forbids what is to be done
├── DeadlineMissed      nobody waits for the images any more
├── ModelGone           the model was deleted, cancelled or failed after the request was accepted
└── ArtifactError       an artifact is missing, corrupt, or of another family
"""


class RegistryError(Exception): ...


class RecordNotFound(RegistryError): ...


class RecordUnreadable(RegistryError): ...


class IllegalTransition(RegistryError): ...


class Superseded(RegistryError): ...


class IdempotencyConflict(RegistryError): ...


class QueueFull(RegistryError):
    def __init__(self, message: str, retry_seconds: int) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class StorageFull(RegistryError): ...


class StoreAway(RegistryError): ...


class StoreRefuses(RegistryError): ...


class KeysError(RegistryError): ...


class DeadlineMissed(RegistryError): ...


class ModelGone(RegistryError): ...


class ArtifactError(RegistryError): ...


class Refused(Exception):
    """A request cannot be served by the time that it names, and its caller would not wait."""

    def __init__(self, message: str, retry_seconds: int | None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        """Seconds until as much may be asked for again; None where no wait would help."""
