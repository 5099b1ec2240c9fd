"""The container: bit-exact round trips, the smallest pair of codecs, and blobs that lie."""

import copy
import json
import random
import struct
import time
import tracemalloc
import zlib

import pytest
import torch

from sparsehooks import ArtifactError, Codec, Layout, from_codes, row_scales, to_codes
from sparsehooks.artifact import container
from sparsehooks.artifact.container import decode, encode, is_blob
from sparsehooks.builtin.codecs.bitmap import Bitmap
from sparsehooks.builtin.codecs.int8 import Int8
from sparsehooks.builtin.codecs.raw import Raw
from sparsehooks.builtin.codecs.two_of_four import TwoOfFour

CODECS: dict[str, Codec] = {"2:4": TwoOfFour(), "bitmap": Bitmap(), "int8": Int8(), "raw": Raw()}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {8: torch.uint64, 4: torch.uint32, 2: torch.uint16}


def read_header(blob):
    return container.read_header(blob, name="w")


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def pruned(shape, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < sparsity, 0.0, weight).to(dtype)


def two_of_four(shape, dtype=torch.float32, seed=0, missing=0.0):
    """2:4 sparsity; a share of the survivors is zero as well."""
    weight = pruned(shape, 0, seed=seed)
    groups = weight.view(-1, 4)
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, 1).indices, 1.0).view(shape)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= missing
    return torch.where(mask.bool() & keep, weight, 0.0).to(dtype)


def on_int8_grid(weight):
    scales = row_scales(weight)
    return from_codes(to_codes(weight, scales), scales, weight.dtype)


@pytest.fixture
def always(monkeypatch):
    """Encode also what saves nothing worth it."""
    monkeypatch.setattr(container, "MIN_SAVED_SHARE", -1000)
    monkeypatch.setattr(container, "MIN_SAVED_BYTES", -(1 << 20))


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 3), (64, 64), (3, 5, 7), (4, 3, 2, 8), (700, 801)])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
def test_round_trip(always, dtype, shape, sparsity):
    tensor = pruned(shape, sparsity, dtype)
    blob = encode(tensor, CODECS)
    assert blob.dtype == torch.uint8
    assert blob.dim() == 1
    assert is_blob(blob)
    assert same_bits(decode(blob, CODECS, name="w", shape=shape), tensor)
    assert read_header(blob).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [0, 0.01])
def test_round_trip_of_2_4(dtype, missing):
    tensor = two_of_four((96, 256), dtype, missing=missing)
    blob = encode(tensor, CODECS)
    assert read_header(blob).positions == "2:4"
    assert read_header(blob).count == tensor.numel() // 2
    assert same_bits(decode(blob, CODECS, name="w"), tensor)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("weight", "positions"),
    [(pruned((300, 400), 0), None), (pruned((300, 400), 0.8), "bitmap"), (two_of_four((300, 400)), "2:4")],
)
def test_round_trip_of_int8(dtype, weight, positions):
    tensor = on_int8_grid(weight.to(dtype))
    blob = encode(tensor, CODECS)
    assert (read_header(blob).positions, read_header(blob).values) == (positions, "int8")
    assert same_bits(decode(blob, CODECS, name="w"), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda values: values, lambda values: values.repeat_interleave(8)])
def test_every_16_bit_pattern_comes_back(always, dtype, make):
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    spread = torch.zeros((1 << 16, 8), dtype=dtype)
    spread[:, 0] = patterns
    blob = encode(spread, CODECS)
    assert read_header(blob).positions == "bitmap"
    decoded = decode(blob, CODECS, name="w")
    expected = torch.where(bits(spread).int() == 0x8000, torch.zeros((), dtype=dtype), spread)
    assert torch.equal(bits(decoded), bits(expected))
    dense = make(patterns).view(256, -1)
    kept = decode(encode(dense, {"raw": Raw()}), CODECS, name="w")
    assert same_bits(kept, dense)


def test_special_fp32_values_come_back():
    special = torch.tensor(
        [0x7FC00001, 0xFF800123, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x7F7FFFFF], dtype=torch.int64
    )
    tensor = torch.zeros(100, 1000)
    tensor[::7, ::97] = special.to(torch.uint32).view(torch.float32)[:, None][torch.arange(15) % 7]
    assert same_bits(decode(encode(tensor, CODECS), CODECS, name="w"), tensor)


def test_negative_zeros_are_zeros_where_zeros_are_dropped():
    weight = pruned((100, 200), 0)
    mask = pruned((100, 200), 0.7) != 0
    decoded = decode(encode(weight * mask, CODECS), CODECS, name="w")
    assert (weight * mask).signbit().sum() > 0.8 * (weight.signbit().sum())
    assert same_bits(decoded, torch.where(mask, weight, 0.0))
    padded = two_of_four((100, 200), missing=0.02)
    padded[padded == 0] = -0.0
    decoded = decode(encode(padded, CODECS), CODECS, name="w")
    assert same_bits(decoded, padded + 0.0)


def test_inputs_are_taken_as_they_come():
    tensor = pruned((120, 240), 0.9)
    parameter = torch.nn.Parameter(tensor.clone())
    assert same_bits(decode(encode(parameter, CODECS), CODECS, name="w"), tensor)
    assert same_bits(decode(encode(tensor.t(), CODECS), CODECS, name="w"), tensor.t().contiguous())
    misaligned = torch.cat([torch.zeros(1, dtype=torch.uint8), encode(tensor, CODECS)])[1:]
    decoded = decode(misaligned, CODECS, name="w")
    assert same_bits(decoded, tensor)
    misaligned.zero_()
    assert same_bits(decoded, tensor)


def test_what_is_not_encoded():
    assert encode(torch.zeros(10_000), CODECS) is None
    assert encode(torch.tensor(0.0), CODECS) is None
    assert encode(torch.zeros(100, 0), CODECS) is None
    assert encode(torch.zeros(100, 100, dtype=torch.int64), CODECS) is None
    assert encode(pruned((100, 100), 0), CODECS) is None
    assert encode(pruned((40, 30), 0.9), CODECS) is None  # less than 4 KiB to save
    assert encode(pruned((1000, 100), 0.08), CODECS) is None  # less than 10 %
    assert encode(pruned((1000, 100), 0.2), CODECS) is not None
    assert not is_blob(torch.zeros(100, dtype=torch.uint8))
    assert not is_blob(torch.zeros(0, dtype=torch.uint8))
    assert not is_blob(encode(pruned((100, 100), 0.9), CODECS).view(1, -1))


# ------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda dtype, sparsity=sparsity: pruned((60, 80), sparsity, dtype)
            for sparsity in (0, 0.03, 0.5, 0.8, 0.99, 1)
        ),
        lambda dtype: two_of_four((60, 80), dtype),
        lambda dtype: two_of_four((60, 80), dtype, missing=0.2),
        lambda dtype: two_of_four((60, 80), dtype, missing=0.5),
        lambda dtype: on_int8_grid(pruned((60, 80), 0.5, torch.float32)).to(dtype),
        lambda dtype: on_int8_grid(two_of_four((60, 80), torch.float32)).to(dtype),
        lambda dtype: pruned((4800, 1), 0.5, dtype),
    ],
)
def test_the_choice_is_the_smallest_pair(always, dtype, make):
    tensor = make(dtype)
    header = read_header(encode(tensor, CODECS))
    chosen = sum(section.length for section in header.sections)
    sizes = []
    for positions in ({}, {"bitmap": Bitmap()}, {"2:4": TwoOfFour()}):
        for values in ({"raw": Raw()}, {"int8": Int8()}):
            blob = encode(tensor, positions | values)
            if blob is not None:
                sizes.append(sum(section.length for section in read_header(blob).sections))
    assert chosen == min(sizes)


def test_between_equals_the_simpler_is_taken(always):
    class Twice(Raw):
        sections = ("values", "nothing")

        def encode(self, data, layout):
            return super().encode(data, layout) | {"nothing": b""}

    for codecs in ({"a": Twice(), "b": Raw()}, {"b": Raw(), "a": Twice()}):
        assert read_header(encode(pruned((8, 8), 0), codecs)).values == "b"


def test_codecs_hear_the_truth_about_the_layout(always):
    tensor = two_of_four((6, 8), missing=0.3)
    heard = []

    class Listening(Raw):
        def decode(self, sections, layout):
            heard.append(layout)
            return super().decode(sections, layout)

    blob = encode(tensor, {"2:4": TwoOfFour(), "raw": Raw()})
    assert read_header(blob).positions == "2:4"
    decode(blob, {"2:4": TwoOfFour(), "raw": Listening()}, name="w")
    (layout,) = heard
    assert (layout.dtype, layout.rows, layout.columns, layout.count) == ("F32", 6, 8, 24)
    assert layout.row_counts.tolist() == [4] * 6
    assert isinstance(layout, Layout)


# ------------------------------------------------------------------------------------------------- hostile blobs


def forged(blob, change=None, *, repair=True, **fields):
    """The blob with header fields replaced and the checksum of the header right again."""
    data = blob.numpy().tobytes()
    (length,) = struct.unpack("<I", data[8:12])
    header = json.loads(data[16 : 16 + length]) | fields
    if change is not None:
        change(header)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(16 + len(text)) % 64)
    crc = zlib.crc32(text) if repair else 0
    whole = data[:8] + struct.pack("<II", len(text), crc) + text + data[16 + length :]
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


@pytest.fixture(scope="module")
def blob():
    return encode(pruned((64, 64), 0.8), CODECS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2 .* upgrade sparsehooks"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"values": "rice"}, "'rice'; install the plugin"),
        ({"positions": "os.system"}, "'os.system'; install the plugin"),
        ({"positions": "raw"}, "positions codec 'raw'"),
        ({"values": "bitmap"}, "values codec 'bitmap'"),
        ({"positions": None}, "sections"),
        ({"positions": ["bitmap"]}, "fields"),
        ({"values": {}}, "fields"),
        ({"extra": 1}, "fields"),
        ({"dtype": "I8"}, "dtype"),
        ({"dtype": "F16"}, "bytes"),
        ({"shape": [64, 65]}, "bitmap"),
        ({"shape": [4096]}, "shape"),
        ({"shape": [64, 64, 0]}, "shape"),
        ({"shape": [64, -64]}, "shape"),
        ({"shape": [64, 64.0]}, "shape"),
        ({"shape": [1] * 7 + [64, 64]}, "shape"),
        ({"shape": [1 << 40, 1 << 40]}, "impossible"),
        ({"shape": [1 << 20, 1 << 19]}, "limit"),
        ({"count": 819.0}, "impossible"),
        ({"count": -1}, "impossible"),
        ({"count": 1 << 60}, "impossible"),
        ({"count": 5}, "positions"),
        ({"sections": []}, "bytes"),
        ({"sections": [["positions.bits", 0, 512]]}, "malformed"),
        ({"sections": [["positions.bits", 0, 1 << 62, 0]]}, "impossible"),
        ({"sections": 3}, "fields"),
    ],
)
def test_headers_that_lie(blob, fields, message):
    with pytest.raises(ArtifactError, match=f"tensor 'w': .*{message}"):
        decode(forged(blob, **fields), CODECS, name="w")


def test_section_tables_that_lie(blob):
    def swap(header):
        header["sections"].reverse()

    def overlap(header):
        header["sections"][1][1] = 0

    def rename(header):
        header["sections"][1][0] = "values.codes"

    def twice(header):
        header["sections"][1] = header["sections"][0]

    for change in (swap, overlap, rename, twice):
        with pytest.raises(ArtifactError, match="section"):
            decode(forged(blob, change), CODECS, name="w")


@pytest.mark.parametrize(
    "text",
    [
        b'{"count":1,"count":1}',
        b"[" * 40_000,
        b'{"version":' + b"9" * 60_000 + b"}",
        b'{"version":NaN}',
        b"\xff\xfe",
        b"null",
        b"",
    ],
)
def test_header_text_that_is_no_header(text):
    text += b" " * (-(16 + len(text)) % 64)
    data = b"\x89SPHK1\r\n" + struct.pack("<II", len(text), zlib.crc32(text)) + text
    with pytest.raises(ArtifactError):
        decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), CODECS, name="w")


def test_only_the_canonical_header_is_read(blob):
    data = blob.numpy().tobytes()
    (length,) = struct.unpack("<I", data[8:12])
    text = data[16 : 16 + length]
    for other in (
        text.replace(b'"count":', b'"count": ')[:length],
        text[:-1] + b"\n",
        text.replace(b"F32", b"\\u0046"),
    ):
        same = other[:length].ljust(length)
        broken = data[:12] + struct.pack("<I", zlib.crc32(same)) + same + data[16 + length :]
        with pytest.raises(ArtifactError):
            decode(torch.frombuffer(bytearray(broken), dtype=torch.uint8), CODECS, name="w")


def test_any_damage_is_found(blob):
    small = encode(pruned((64, 40), 0.9), CODECS)
    for position in range(len(small)):
        damaged = small.clone()
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            decode(damaged, CODECS, name="w")
    for length in (0, 7, 8, 15, 16, 100, len(blob) - 64, len(blob) - 1):
        with pytest.raises(ArtifactError):
            decode(blob[:length], CODECS, name="w")
    with pytest.raises(ArtifactError, match="bytes instead of"):
        decode(torch.cat([blob, torch.zeros(64, dtype=torch.uint8)]), CODECS, name="w")
    with pytest.raises(ArtifactError, match="checksum"):
        decode(forged(blob, repair=False), CODECS, name="w")
    with pytest.raises(ArtifactError, match="not an encoded tensor"):
        decode(blob.float(), CODECS, name="w")


def test_the_model_decides_about_the_shape(blob):
    with pytest.raises(ArtifactError, match=r"tensor 'layer.weight': .* \[64, 64\], but the model has \[32, 128\]"):
        decode(blob, CODECS, name="layer.weight", shape=(32, 128))
    with pytest.raises(ArtifactError, match="16384 bytes, more than the limit of 16383"):
        decode(blob, CODECS, name="w", max_bytes=16383)
    assert decode(blob, CODECS, name="w", shape=[64, 64], max_bytes=0).shape == (64, 64)


def test_a_small_blob_cannot_claim_much_memory(blob):
    huge = [forged(blob, shape=[1 << 22, 1 << 21], count=count) for count in (0, 819, 1 << 43)]
    huge += [forged(encode(on_int8_grid(pruned((64, 64), 0)), CODECS), shape=[1 << 43, 1], count=1 << 43)]
    tracemalloc.start()
    for forgery in huge:
        with pytest.raises(ArtifactError):
            decode(forgery, CODECS, name="w", shape=read_header(forgery).shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


JUNK = [
    *(0, 1, -1, 3, 4, 40, 1 << 20, 1 << 33, 1 << 44, 1 << 62, 0.5, True, None, [], {}, [[]]),
    *("raw", "int8", "bitmap", "2:4", "F16", "F64", "BF16", [40, 24], [12, 80], [960, 1], [1, 960], [2, 2, 240]),
]


def mutated(rng, data, start):
    """A mutant of a blob in which every checksum is right, so that what is behind the checksums is reached."""
    (length,) = struct.unpack("<I", data[8:12])
    header = json.loads(data[16 : 16 + length])
    body = bytearray(data[start:])
    for _ in range(rng.randrange(3)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    for _ in range(rng.randrange(3)):
        key = rng.choice(list(header))
        value = copy.deepcopy(rng.choice(JUNK))
        if isinstance(header[key], list) and header[key] and rng.random() < 0.7:
            place = rng.randrange(len(header[key]))
            if isinstance(header[key][place], list) and header[key][place] and rng.random() < 0.8:
                header[key][place][rng.randrange(len(header[key][place]))] = value
            else:
                header[key][place] = value
        elif isinstance(header[key], int) and rng.random() < 0.5:
            header[key] += rng.randrange(-2, 3)
        else:
            header[key] = value
    if isinstance(header.get("sections"), list):
        for section in header["sections"]:
            try:
                section[3] = zlib.crc32(body[section[1] : section[1] + section[2]])
            except (TypeError, LookupError, OverflowError):
                continue
    if rng.random() < 0.1:
        header.pop(rng.choice(list(header)))
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(16 + len(text)) % 64)
    return data[:8] + struct.pack("<II", len(text), zlib.crc32(text)) + text + bytes(body)


def test_twenty_thousand_mutants(always):
    rng = random.Random(20_250_101)
    dense = pruned((24, 40), 0.6)
    seeds = [
        encode(tensor, CODECS)
        for tensor in (
            dense,
            dense.half(),
            two_of_four((24, 40)),
            two_of_four((12, 20), missing=0.2),
            on_int8_grid(dense),
            on_int8_grid(two_of_four((24, 40), torch.bfloat16)),
            on_int8_grid(pruned((24, 40), 0)),
            pruned((24, 40), 0),
        )
    ]
    raw = [seed.numpy().tobytes() for seed in seeds]
    starts = [16 + struct.unpack("<I", data[8:12])[0] for data in raw]
    read, slowest = 0, 0.0
    for index in range(20_000):
        if index == 18_000:  # tracing takes three times as long
            tracemalloc.start()
        which = index % len(raw)
        mutant = torch.frombuffer(bytearray(mutated(rng, raw[which], starts[which])), dtype=torch.uint8)
        begin = time.thread_time()
        try:
            tensor = decode(mutant, CODECS, name="w", max_bytes=1 << 28)
        except ArtifactError:
            pass
        else:
            read += 1
            assert tensor.numel() * tensor.element_size() <= 256 * len(mutant)
        slowest = max(slowest, time.thread_time() - begin)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read > 1000
    assert slowest < 0.05
    assert peak < 4 << 20
