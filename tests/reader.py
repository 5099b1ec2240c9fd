"""A reader of the files that docs/format.md specifies, in its terms: made to be read, slow, not for `python -O`."""

import json
import struct
import zlib
from io import BytesIO as Part
from itertools import accumulate, combinations, pairwise
from math import ceil, comb, inf, prod

DTYPES = "F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ I8 U8 BOOL BF16 F16 I16 U16 F32 I32 U32 F64 I64 U64"
KIND = dict(zip(DTYPES.split(), "BBBBBBBHHHHIIIQQQ", strict=True))  # unsigned integers of their width, as in struct


def take(part, layout):
    return struct.unpack("<" + layout, part.read(struct.calcsize("<" + layout)))


def planes(part, count, width):
    bitmaps = take(part, f"{ceil(count / 8)}s" * width)
    return [sum((bitmap[i // 8] >> i % 8 & 1) << bit for bit, bitmap in enumerate(bitmaps)) for i in range(count)]


def ones(part, count):
    return [i for i, bit in enumerate(planes(part, count, 1)) if bit]


def entropy(part, count):
    method, data, inflate = part.read(1)[0], part.read(), zlib.decompressobj(wbits=-15)
    if method == 2:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=2**23).stream_reader(data).read(count + 1)
    return inflate.decompress(data, count + 1) if ("as it is", "deflate")[method] == "deflate" else data


def positions_of(codec, part, count, size, columns=1):
    if codec == "gap-bytes":
        gaps = take(part, f"{count}B")
        large = iter(take(part, f"{gaps.count(255)}I"))
        return [i + gap for i, gap in enumerate(accumulate(next(large) if gap == 255 else gap for gap in gaps))]
    if codec == "gaps":
        k = part.read(1)[0]
        unary = ones(part, 8 * (len(part.getvalue()) - part.tell() - k * ceil(count / 8)))  # but the planes
        low = accumulate(planes(part, count, k))  # while `one` is at the sum of the high parts, plus the ones before
        return [i + (one - i << k) + rest for i, one, rest in zip(range(count), unary, low, strict=True)]
    if codec == "n:m":
        n, m = part.read(2)
        base, each = comb(m, n), {6: 5, 70: 2}.get(comb(m, n), 1)  # the page's K and G
        words, sets = planes(part, ceil(size / m / each), (base**each - 1).bit_length()), [*combinations(range(m), n)]
        return [g * m + i for g in range(size // m) for i in sets[words[g // each] // base ** (g % each) % base]]
    if codec == "submatrix":
        row, column = ones(part, max(1, size // columns)), ones(part, min(size, columns))
        within = positions_of((None, "bitmap", "gaps")[part.read(1)[0]], part, count, len(row) * len(column))
        return [row[p // len(column)] * columns + column[p % len(column)] for p in within]
    return {"bitmap": ones, None: lambda _, size: range(size)}[codec](part, size)


def f32(bits):
    return struct.unpack("<f", bits.to_bytes(4, "little"))[0]


def rounded(products, dtype):
    kind, limit = ("e", 65520) if dtype == "F16" else ("f", 2**128 - 2**103)
    products = [f32(rounded([x], "F32")[0]) if dtype == "F16" and x else x for x in products]
    bits = [int.from_bytes(struct.pack(f"<{kind}", x if abs(x) < limit else x * inf), "little") for x in products]
    bits = [b + 0x7FFF + (b >> 16) % 2 >> 16 if dtype == "BF16" else b for b in bits]
    return [0 if b == (0x8000 if dtype in ("BF16", "F16") else 0x80000000) else b for b in bits]


def grid(part, count, dtype, positions, codec, rows, columns):
    w, kind, form, tile_rows, tile_columns = take(part, "3Bx2I")
    across = ceil(columns / tile_columns)
    tiles = ceil(rows / tile_rows) * across
    if form == 1:
        first, *factors = take(part, f"H{tiles}B")
        runs = [(i - first) // 256 + 1 for i in range(tiles)]
        steps = [f32(int.from_bytes(part.read(3), "little") << 7) for _ in range(runs[-1] + 1)]
        scales = [factor * steps[max(run, 0)] for factor, run in zip(factors, runs, strict=True)]
    else:
        scales = [f32(int.from_bytes(part.read(form), "little") << (7 if form == 3 else 0)) for _ in range(tiles)]
    table = take(part, f"{2**w}f") if kind == 2 else range(1 - 2 ** (w - 1), 2**w) if kind == 0 else range(2**w)
    zeros = planes(part, tiles, w) if kind == 1 else [0] * tiles
    codes = planes(part, count, w) if codec == "grid" else entropy(part, count)
    of = [p // columns // tile_rows * across + p % columns // tile_columns for p in positions]
    return rounded([(table[c] - zeros[t]) * scales[t] for c, t in zip(codes, of, strict=True)], dtype)


def values_of(codec, part, count, dtype, positions, size, columns):
    if codec == "raw" or (codec == "entropy" and KIND[dtype] == "B"):
        return take(part, f"{count}{KIND[dtype]}") if codec == "raw" else entropy(part, count)
    if codec in ("codebook", "codebook-entropy"):
        table = take(part, f"{part.read(1)[0] + 1}{KIND[dtype]}")  # the different values
        places = planes(part, count, (len(table) - 1).bit_length()) if codec == "codebook" else entropy(part, count)
        return [table[place] for place in places]
    if codec in ("grid", "grid-entropy"):
        return grid(part, count, dtype, positions, codec, size // columns or 1, min(size, columns))
    layout = {"int": "B3x", "int-entropy": "B3x", "exponent": "B3x2I", "exponent-entropy": "BxHI"}[codec]
    below, shift = {"F32": (8, 16), "BF16": (8, 0), "F16": (11, 0)}[dtype]
    if codec in ("int", "int-entropy"):
        w, *scales = take(part, layout + f"{max(1, size // columns)}f")  # one row if the chunk is a piece of one
        codes = entropy(part, count) if codec != "int" else part.read() if w == 8 else planes(part, count, w)
        products = [(c + 1 - 2 ** (w - 1)) * scales[p // columns] for c, p in zip(codes, positions, strict=True)]
        return rounded(products, dtype)
    first, number, length, *halves = take(part, layout + f"{count if shift else 0}H")  # b, X, Y or t, T, E
    if codec == "exponent":
        each, meaning = {3: 5, 4: 4, 6: 3, 16: 2}[first], part.read(first)
        digits, places = part.read(ceil(count / each)), Part(part.read(length))
        exceptions = dict(zip(positions_of("gap-bytes", places, number, count), part.read(number), strict=True))
        symbols = [exceptions.get(i, meaning[digits[i // each] // first ** (i % each) % first]) for i in range(count)]
        rests = [low | high << 8 for low, high in zip(part.read(count), planes(part, count, below - 8), strict=True)]
    else:
        below, table = below - first, take(part, f"{number}H")
        symbols, rests = [table[i] for i in entropy(Part(part.read(length)), count)], planes(part, count, below)
    rotated = [symbol << below | rest for symbol, rest in zip(symbols, rests, strict=True)]
    return [(x >> 1 | x % 2 << 15) << shift | half for x, half in zip(rotated, halves or [0] * count, strict=True)]


def decode(part):
    crc, version, dimensions, names, chunk = take(part, "8xIBBHI")
    assert version == 1, f"version {version} instead of 1"
    shape, (dtype, *codecs) = take(part, f"{dimensions}Q"), part.read(names).decode("ascii").split("\n")
    total, columns, codecs, tensor = prod(shape), prod(shape[1:]), {255: None} | dict(enumerate(codecs)), b""
    assert all((dtype in KIND, 2 <= dimensions <= 8, 0 < total <= 2**44, 0 < chunk <= 2**20)), "an unusual header"
    table = [take(part, "4I2B") for _ in range(ceil(total / chunk))]
    assert (any(part.read(-part.tell() % 8)), zlib.crc32(part.getvalue()[12 : part.tell()])) == (False, crc), "header"
    for index, (count, *lengths, crc, by, of) in enumerate(table):
        start, size = part.tell(), min(chunk, total - index * chunk)
        where, what = (Part(data) for data in take(part, "".join(f"{length}s{-length % 8}x" for length in lengths)))
        assert (count <= size, zlib.crc32(part.getvalue()[start : part.tell()])) == (True, crc), "chunk"
        positions = positions_of(codecs[by], where, count, size, columns)
        values = dict(zip(positions, values_of(codecs[of], what, count, dtype, positions, size, columns), strict=True))
        assert all((*(a < b for a, b in pairwise([-1, *positions, size])), not where.read(), not what.read())), "length"
        tensor += struct.pack(f"<{size}{KIND[dtype]}", *(values.get(i, 0) for i in range(size)))
    assert not part.read(), "bytes after the last chunk"
    return dtype, shape, tensor


def read_file(path):
    file, tensors = Part(path.read_bytes()), {}
    header, data = json.loads(file.read(*take(file, "Q"))), file.read()
    sums = json.loads(header.pop("__metadata__", {}).get("sparsehooks.crc32", "null"))
    for name, entry in header.items():
        try:
            stored = data[slice(*entry["data_offsets"])]
            assert not sums or sums.get(name) == zlib.crc32(stored), "the checksum is wrong"
            is_blob = entry["dtype"] == "U8" and len(entry["shape"]) == 1 and stored.startswith(b"\x89SPHK1\r\n")
            tensors[name] = decode(Part(stored)) if is_blob else (entry["dtype"], tuple(entry["shape"]), stored)
        except Exception as error:
            raise ValueError(f"{name}: {error!r}") from error
    return tensors
