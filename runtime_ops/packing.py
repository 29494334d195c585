"""Packed weights (docs/ops.md): logical integers [K, N] to the bytes that the native kernels read, and back.

The layout, once: output channels lie in panels of 16. Inside a panel, input channels go by in blocks of
`4 * F`; a block is V vectors of 64 bytes, and byte `4 * n + i` of a vector belongs to output channel n of the
panel and to the input channel `4 * f + i` of the block for each of the F fields f sharing the byte. A field
stores `q + 2^(bits-1)`; padding stores q = 0. 64 bytes are one AVX-512 register and 4 consecutive input
channels are what dot-product instructions take.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from splitq_edge.errors import ArtifactError

MAGIC = b"SPLITQW\0"
SCHEMA = 1
LAYOUT = 1
PANEL = 16  # output channels a panel, "nr" in the header
QUAD = 4  # consecutive input channels that lie side by side
FIELDS = {2: 4, 3: 8, 4: 2, 6: 4, 8: 1}  # bits -> F, quads of a block
VECTORS = {2: 1, 3: 3, 4: 1, 6: 3, 8: 1}  # bits -> V, 64-byte vectors of a block
HEADER = struct.Struct("<8sIIIIQQQIIQ")  # the order of `PackedHeader`, magic first and reserved last


class PackedHeader(NamedTuple):
    """The fields of the 64-byte header that describe the payload."""

    bits: int
    channels_out: int
    channels_in: int
    block_size: int
    payload_bytes: int
    checksum: int


def payload_bytes(channels_in: int, channels_out: int, bits: int) -> int:
    """Size of the packed codes of a [channels_in, channels_out] weight."""
    panels = -(-channels_out // PANEL)
    blocks = -(-channels_in // (QUAD * FIELDS[bits]))
    return panels * blocks * VECTORS[bits] * QUAD * PANEL


def pack(q: np.ndarray, bits: int, block_size: int = 0) -> np.ndarray:
    """Pack the codes of a weight.

    Args:
        q: [K, N] int8, values in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2, 3, 4, 6 or 8.
        block_size: input channels that share a scale in the node that will read the weight, 0 for one scale
            an output channel. It is only noted in the header: scales are a tensor of their own.

    Returns:
        [64 + payload] uint8.

    Raises:
        ValueError: q is not a non-empty matrix, a code does not fit, or the bit width does not exist.
    """
    _check_codes(q, bits)
    channels_in, channels_out = q.shape
    fields, step = FIELDS[bits], QUAD * FIELDS[bits]
    blocks, panels = -(-channels_in // step), -(-channels_out // PANEL)
    offset = 1 << (bits - 1)
    stored = np.full((blocks * step, panels * PANEL), offset, np.uint8)
    stored[:channels_in, :channels_out] = (q.astype(np.int16) + offset).astype(np.uint8)
    # [blocks, F, 4, panels, 16] -> [F, panels, blocks, 16, 4]: one array of bytes a field
    by_field = stored.reshape(blocks, fields, QUAD, panels, PANEL).transpose(1, 3, 0, 4, 2)
    payload = _join_fields(by_field, bits).tobytes()
    described = (bits, PANEL, channels_out, channels_in, len(payload), block_size, zlib.crc32(payload))
    header = HEADER.pack(MAGIC, SCHEMA, LAYOUT, *described, 0)
    return np.frombuffer(header + payload, np.uint8)


def unpack(buffer: np.ndarray | bytes) -> tuple[np.ndarray, int, int]:
    """Read a packed weight.

    Args:
        buffer: [bytes] uint8, or bytes.

    Returns:
        The codes [K, N] int8, the bit width and the block size.

    Raises:
        ArtifactError: the buffer is not a packed weight that this version reads, or it is damaged.
    """
    raw = buffer if isinstance(buffer, bytes) else np.ascontiguousarray(buffer, np.uint8).tobytes()
    header = read_header(raw)
    bits, fields, vectors = header.bits, FIELDS[header.bits], VECTORS[header.bits]
    panels = -(-header.channels_out // PANEL)
    vector_bytes = np.frombuffer(raw, np.uint8, offset=HEADER.size).reshape(panels, -1, vectors, PANEL, QUAD)
    by_field = np.stack(_split_fields(vector_bytes, bits))  # [F, panels, blocks, 16, 4]
    blocks = by_field.shape[2]
    stored = by_field.transpose(2, 0, 4, 1, 3).reshape(blocks * fields * QUAD, panels * PANEL)
    logical = stored[: header.channels_in, : header.channels_out].astype(np.int16) - (1 << (bits - 1))
    return logical.astype(np.int8), bits, header.block_size


def read_header(raw: bytes) -> PackedHeader:
    """Parse and check the header of a packed weight, payload size and checksum included.

    Raises:
        ArtifactError: as `unpack`.
    """
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise ArtifactError(
            f"packed weight: expected {MAGIC!r} and a header of {HEADER.size} bytes, "
            f"got {raw[: len(MAGIC)]!r} in {len(raw)} bytes; export the model again"
        )
    fields = HEADER.unpack_from(raw)
    _, schema, layout, bits, panel, channels_out, channels_in, size, block_size, checksum, reserved = fields
    if schema != SCHEMA:
        raise ArtifactError(
            f"packed weight: expected schema {SCHEMA}, got {schema}; install the splitq-edge that wrote it"
        )
    if layout != LAYOUT or panel != PANEL or bits not in FIELDS or reserved:
        raise ArtifactError(
            f"packed weight: expected layout {LAYOUT}, nr {PANEL}, bits out of {sorted(FIELDS)}, reserved 0, "
            f"got {layout}, {panel}, {bits}, {reserved}; install the splitq-edge that wrote it"
        )
    header = PackedHeader(bits, channels_out, channels_in, block_size, size, checksum)
    _check_payload(header, raw)
    return header


def _check_payload(header: PackedHeader, raw: bytes) -> None:
    expected = payload_bytes(header.channels_in, header.channels_out, header.bits)
    actual = len(raw) - HEADER.size
    if not expected or header.payload_bytes != expected or actual != expected:
        shape = f"K={header.channels_in}, N={header.channels_out}, bits {header.bits}"
        raise ArtifactError(
            f"packed weight: expected {expected} payload bytes for {shape}, got {header.payload_bytes} in "
            f"the header and {actual} in the tensor; export the model again"
        )
    checksum = zlib.crc32(raw[HEADER.size :])
    if checksum != header.checksum:
        raise ArtifactError(
            f"packed weight: expected checksum {header.checksum:#010x}, got {checksum:#010x}; "
            "the file is damaged, copy it again"
        )


def int4_bytes(q: np.ndarray) -> bytes:
    """Codes as the raw data of an ONNX INT4 tensor: two a byte, the first in the low nibble.

    Args:
        q: any shape, int8, values in [-8, 7].
    """
    nibbles = q.astype(np.int8).reshape(-1).view(np.uint8) & 0x0F
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


def _check_codes(q: np.ndarray, bits: int) -> None:
    if bits not in FIELDS:
        raise ValueError(f"pack: expected bits out of {sorted(FIELDS)}, got {bits}")
    if q.ndim != 2 or q.size == 0:
        raise ValueError(f"pack: expected a non-empty matrix [K, N], got shape {q.shape}")
    limit = 1 << (bits - 1)
    if q.min() < -limit or q.max() > limit - 1:
        got = f"[{q.min()}, {q.max()}]"
        raise ValueError(f"pack: expected {bits}-bit codes in [{-limit}, {limit - 1}], got {got}")


def _join_fields(u: np.ndarray, bits: int) -> np.ndarray:
    """Fields [F, panels, blocks, 16, 4] to vectors [panels, blocks, V, 16, 4], both uint8."""
    if bits == 8:
        vectors = [u[0]]
    elif bits == 4:
        vectors = [u[0] | u[1] << 4]
    elif bits == 2:
        vectors = [u[0] | u[1] << 2 | u[2] << 4 | u[3] << 6]
    else:  # 6 bits a vector, of one field or of two; those of a fourth vector are spread over the high bits of three
        six = u if bits == 6 else [u[2 * v] | u[2 * v + 1] << 3 for v in range(4)]
        vectors = [six[v] | (six[3] >> 2 * v & 3) << 6 for v in range(3)]
    return np.stack(vectors, axis=2)


def _split_fields(vectors: np.ndarray, bits: int) -> list[np.ndarray]:
    """Inverse of `_join_fields`."""
    v = [vectors[:, :, i] for i in range(vectors.shape[2])]
    if bits == 8:
        return v
    if bits == 4:
        return [v[0] & 15, v[0] >> 4]
    if bits == 2:
        return [v[0] >> shift & 3 for shift in (0, 2, 4, 6)]
    six = [*(vector & 63 for vector in v), v[0] >> 6 | v[1] >> 6 << 2 | v[2] >> 6 << 4]
    return six if bits == 6 else [vector >> shift & 7 for vector in six for shift in (0, 3)]
