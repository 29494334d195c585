"""Names of the NPU targets that a static export can be checked for and compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from splitq_edge.errors import SplitQError

QNN_HTP = "qnn-htp"  # Qualcomm's Hexagon tensor processor through onnxruntime-qnn
ARCHITECTURES = (73, 75, 79)
TARGET_NAMES = tuple(f"{QNN_HTP}:v{arch}" for arch in ARCHITECTURES)


@dataclass(frozen=True)
class Target:
    """An NPU.

    Attributes:
        kind: `QNN_HTP`.
        arch: version of its instruction set.
    """

    kind: str
    arch: int

    @classmethod
    def parse(cls, name: str) -> Target:
        """Read a name such as qnn-htp:v73.

        Raises:
            SplitQError: no such target.
        """
        if name not in TARGET_NAMES:
            raise SplitQError(f"target: expected one of {', '.join(TARGET_NAMES)}, got {name!r}")
        kind, _, arch = name.partition(":v")
        return cls(kind, int(arch))

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.kind}:v{self.arch}"

    @property
    def folder(self) -> str:
        """Where an export keeps what was compiled for it."""
        return f"compiled/{self.kind}-v{self.arch}"
