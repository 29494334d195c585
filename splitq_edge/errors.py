"""The errors a user can cause. Each message is one line: what, where, expected, got, what to do."""


class SplitQError(Exception):
    """Something outside the program is wrong (input, file, setting); the message tells what to do."""


class ArtifactError(SplitQError):
    """A file of this project is damaged, incomplete or of a newer schema."""


class UnsupportedModelError(SplitQError):
    """No adapter describes this model type."""
