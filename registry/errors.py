"""
RegistryError
├── RecordNotFound      no such id
├── IllegalTransition   the state machine has no such arrow
├── Superseded          another attempt, a cancellation or a deletion has overtaken this work
├── IdempotencyConflict the same key was used for another request
├── ModelGone           the model was deleted, cancelled or failed after the request was accepted
└── ArtifactError       an artifact is missing, corrupt, or of another family
"""


class RegistryError(Exception):
    pass


class RecordNotFound(RegistryError):
    pass


class IllegalTransition(RegistryError):
    pass


class Superseded(RegistryError):
    pass


class IdempotencyConflict(RegistryError):
    pass


class ModelGone(RegistryError):
    pass


class ArtifactError(RegistryError):
    pass
