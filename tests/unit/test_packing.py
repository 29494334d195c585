"""Packed weights against the layout of docs/ops.md, written out as plain loops."""

import struct
import zlib

import numpy as np
import onnxruntime
import pytest
from builders import no_split, random_site, site_engines, site_model

from splitq_edge.errors import ArtifactError
from splitq_edge.runtime_ops import register
from splitq_edge.runtime_ops.packing import int4_bytes, pack, payload_bytes, unpack

BITS = (2, 3, 4, 6, 8)
FIELDS = {2: 4, 3: 8, 4: 2, 6: 4, 8: 1}
HEADER_BYTES = 64


def random_codes(bits: int, shape: tuple[int, int]) -> np.ndarray:
    limit = 1 << (bits - 1)
    return np.random.default_rng(bits).integers(-limit, limit, shape).astype(np.int8)


def bits_of_byte(bits: int, vector: int, u: list[int]) -> int:
    """The table of docs/ops.md, one row a bit width."""
    if bits in (8, 4, 2):
        return sum(code << field * bits for field, code in enumerate(u))
    if bits == 6:
        return u[vector] | (u[3] >> 2 * vector & 3) << 6
    low = u[2 * vector] | u[2 * vector + 1] << 3
    if vector == 0:
        return low | (u[6] & 0b011) << 6
    if vector == 1:
        return low | (u[6] >> 2) << 6 | (u[7] & 1) << 7
    return low | (u[7] >> 1) << 6


def packed_by_loops(q: np.ndarray, bits: int) -> bytes:
    channels_in, channels_out = q.shape
    step = 4 * FIELDS[bits]
    out = bytearray()
    for n0 in range(0, channels_out, 16):
        for k0 in range(0, channels_in, step):
            for vector in range(3 if bits in (3, 6) else 1):
                for byte in range(64):
                    n, i = n0 + byte // 4, byte % 4
                    inputs = [k0 + 4 * f + i for f in range(FIELDS[bits])]
                    codes = [int(q[k, n]) if k < channels_in and n < channels_out else 0 for k in inputs]
                    out.append(bits_of_byte(bits, vector, [c + (1 << (bits - 1)) for c in codes]))
    return bytes(out)


def with_field(buffer: np.ndarray, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(buffer.tobytes())
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 16), (32, 17), (33, 15), (70, 40)])
def test_payload_follows_the_documented_layout(bits, shape):
    q = random_codes(bits, shape)
    payload = pack(q, bits)[HEADER_BYTES:].tobytes()
    assert payload == packed_by_loops(q, bits)
    assert len(payload) == payload_bytes(*shape, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (33, 17), (128, 64)])
def test_unpack_returns_what_was_packed(bits, shape):
    q = random_codes(bits, shape)
    codes, got_bits, block_size = unpack(pack(q, bits, 32))
    np.testing.assert_array_equal(codes, q)
    assert codes.dtype == np.int8
    assert (got_bits, block_size) == (bits, 32)


@pytest.mark.parametrize("bits", BITS)
def test_no_bit_is_wasted(bits):
    assert payload_bytes(64, 32, bits) * 8 == 64 * 32 * bits


def test_header_has_the_documented_fields():
    buffer = pack(random_codes(4, (24, 20)), 4, 16).tobytes()
    payload = buffer[HEADER_BYTES:]
    fields = struct.unpack("<8sIIIIQQQIIQ", buffer[:HEADER_BYTES])
    assert fields == (b"SPLITQW\0", 1, 1, 4, 16, 20, 24, len(payload), 16, zlib.crc32(payload), 0)


def test_any_memory_order_packs_alike():
    q = random_codes(4, (40, 24))
    np.testing.assert_array_equal(pack(np.asfortranarray(q), 4), pack(q, 4))


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "B", 0, "magic|SPLITQW"),
        (8, "<I", 2, "schema 1, got 2"),
        (12, "<I", 7, "layout 1.*got 7"),
        (16, "<I", 5, "bits out of"),
        (20, "<I", 32, "nr 16"),
        (24, "<Q", 1 << 60, "payload bytes"),
        (32, "<Q", 0, "payload bytes"),
        (40, "<Q", 1, "payload bytes"),
        (52, "<I", 0, "checksum"),
        (56, "<Q", 1, "reserved 0"),
        (70, "B", 255, "checksum"),
    ],
)
def test_damaged_buffers_are_refused_in_one_line(offset, form, value, message):
    damaged = with_field(pack(random_codes(4, (24, 20)), 4), offset, form, value)
    with pytest.raises(ArtifactError, match=message) as error:
        unpack(damaged)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 10, 63, 64, 500])
def test_cut_buffers_are_refused(size):
    buffer = pack(random_codes(3, (64, 32)), 3)
    with pytest.raises(ArtifactError):
        unpack(buffer[:size])


def test_extended_buffers_are_refused():
    buffer = pack(random_codes(3, (64, 32)), 3)
    with pytest.raises(ArtifactError, match="payload bytes"):
        unpack(np.append(buffer, np.uint8(0)))


@pytest.mark.parametrize(
    ("q", "bits", "message"),
    [
        (np.zeros((4, 4), np.int8), 5, "bits out of"),
        (np.full((4, 4), 4, np.int8), 3, r"\[-4, 3\], got \[4, 4\]"),
        (np.zeros((4,), np.int8), 4, "matrix"),
        (np.zeros((0, 4), np.int8), 4, "non-empty"),
    ],
)
def test_codes_that_cannot_be_packed_are_refused(q, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(q, bits)


def test_int4_bytes_put_the_first_code_in_the_low_nibble():
    assert int4_bytes(np.array([1, -1, 7, -8], np.int8)) == bytes([0xF1, 0x87])


def test_an_odd_number_of_int4_codes_ends_with_a_zero_nibble():
    assert int4_bytes(np.array([[3, -2, 5]], np.int8)) == bytes([0xE3, 0x05])


@pytest.mark.skipif("native" not in site_engines(), reason="no native library")
@pytest.mark.parametrize("bits", BITS)
def test_any_payload_runs_natively(bits):
    # Loading reads no checksum, so the kernels must be safe on every byte there can be.
    site, _ = random_site(no_split(bits=bits), widths=(72, 0, 0), outputs=(33,))
    model = site_model(site, packed=True)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("weight_main"))
    noise = np.random.default_rng(bits).integers(0, 256, len(weight.raw_data) - HEADER_BYTES, dtype=np.uint8)
    weight.raw_data = weight.raw_data[:HEADER_BYTES] + noise.tobytes()
    options = onnxruntime.SessionOptions()
    register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for rows in (1, 40):
        y = session.run(None, {"x": np.ones((1, rows, 72), np.float32)})[0]
        assert y.shape == (1, rows, 33)
        assert np.isfinite(y).all()
