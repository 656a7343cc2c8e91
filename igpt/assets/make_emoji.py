"""Rebuilds emoji.npz, the built-in picture set, bit for bit, and its palette: `python igpt/assets/make_emoji.py [DIR]`.

Needs the Debian packages fonts-noto-color-emoji (the font) and unicode-data (emoji-test.txt). MADE_WITH and
SHA256 name the versions and inputs that made the committed file, and the file. Licences: NOTICES.md.

Pictures: every fully-qualified emoji of emoji-test.txt without a skin tone, drawn by Pillow at the font's only size on
white; the 128x128 bitmap is averaged over blocks of 4x4 (box filter) to 32x32. Of emoji with one and the same
picture the first is kept. Labels: Unicode's groups and subgroups.

Split, the hold-out by emoji: pictures closer than LOOK_ALIKE grey levels (RMS) to one another, directly or through
others, form a family, which stays together. In each subgroup the families, in the order of the SHA-256 of their first
member's code points, are dealt: the first tenth (rounded) to test, the next tenth to valid, the rest to train.
"""

import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
MADE_WITH = {
    "fonts-noto-color-emoji": "2.042-0+deb12u1",
    "unicode-data": "15.0.0-1",
    "pillow": "13.0.0",
    "zlib": "1.2.13",
}
SHA256 = {
    "NotoColorEmoji.ttf": "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec",
    "emoji-test.txt": "8445f23ac8388e096be19d0262e14fceff856ff52093f2356dc89485f1a853db",
    "emoji.npz": "32defa99d8081d76900487d6a958d7a39d76d5c0fb22bf59a339f362874c5ba1",
    "emoji_palette.npy": "58ea0ab2fb9511dbaff634724f8f512870e277f15cd5818cd4fd4deee9b3d3ed",
}
FONT_SIZE, BITMAP, SIZE = 109, 128, 32
LOOK_ALIKE = 16.0
SPLITS = ("train", "valid", "test")


def emoji_rows(text: str) -> list[tuple[str, str, str, str]]:
    """(code points, group, subgroup, name) of each fully-qualified emoji without a skin tone, in Unicode's order."""
    rows, group, subgroup = [], "", ""
    entry = re.compile(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.*)")
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif (found := entry.match(line)) and not re.search("1F3F[B-F]", found[1]):
            rows.append((found[1], group, subgroup, found[2]))
    return rows


def render(codepoints: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """uint8 (32, 32, 3): the glyph on white, box-filtered. The bitmap lies 4 pixels in from the glyph's left edge."""
    canvas = Image.new("RGB", (BITMAP, BITMAP), "white")
    glyph = "".join(chr(int(c, 16)) for c in codepoints.split())
    ImageDraw.Draw(canvas).text((-4, 0), glyph, font=font, embedded_color=True)
    return np.asarray(canvas.reduce(BITMAP // SIZE))


def families(images: np.ndarray) -> np.ndarray:
    """The first member of each picture's family: connected components of "closer than LOOK_ALIKE"."""
    flat = images.reshape(len(images), -1).astype(np.int64)
    squares = (flat**2).sum(1)
    # Integers below 2^53 are exact in fp64: the answer doesn't depend on the order in which BLAS sums.
    products = (flat.astype(np.float64) @ flat.T.astype(np.float64)).astype(np.int64)
    near = squares[:, None] + squares - 2 * products < LOOK_ALIKE**2 * flat.shape[1]
    first = np.arange(len(images))
    while True:
        lower = np.where(near, first, len(images)).min(1)
        if (lower == first).all():
            return first
        first = lower


def deal(first: np.ndarray, subgroup: np.ndarray, codepoints: list[str]) -> np.ndarray:
    """uint8 index into SPLITS of each picture, by the rule in this file's docstring."""
    split = np.zeros(len(first), np.uint8)
    heads = np.unique(first)
    for s in np.unique(subgroup):
        dealt = sorted(heads[subgroup[heads] == s], key=lambda i: hashlib.sha256(codepoints[i].encode()).digest())
        tenth = (len(dealt) + 5) // 10
        split[np.isin(first, dealt[:tenth])] = SPLITS.index("test")
        split[np.isin(first, dealt[tenth : 2 * tenth])] = SPLITS.index("valid")
    return split


def build() -> dict[str, np.ndarray]:
    """The arrays of emoji.npz."""
    font = ImageFont.truetype(str(FONT), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    rows = emoji_rows(EMOJI_TEST.read_text(encoding="utf-8"))
    seen: dict[bytes, int] = {}
    pictures = [render(row[0], font) for row in rows]
    for i, picture in enumerate(pictures):
        seen.setdefault(picture.tobytes(), i)
    images = np.stack([pictures[i] for i in seen.values()])
    codepoints, group_of, subgroup_of, names = zip(*(rows[i] for i in seen.values()))
    groups, subgroups = list(dict.fromkeys(group_of)), list(dict.fromkeys(subgroup_of))
    subgroup = np.array([subgroups.index(s) for s in subgroup_of], np.uint8)
    return {
        "images": images,
        "group": np.array([groups.index(g) for g in group_of], np.uint8),
        "subgroup": subgroup,
        "split": deal(families(images), subgroup, codepoints),
        "groups": np.array(groups),
        "subgroups": np.array(subgroups),
        "splits": np.array(SPLITS),
        "names": np.array(names),
        "codepoints": np.array(codepoints),
    }


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed npz that depends on the arrays alone (numpy's own holds the time of day)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(entry, member.getvalue(), compresslevel=9)
    return out.getvalue()


if __name__ == "__main__":
    from igpt import Palette

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    arrays = build()
    (folder / "emoji.npz").write_bytes(npz_bytes(arrays))
    Palette.fit(arrays["images"][arrays["split"] == SPLITS.index("train")], k=512, seed=0).save(
        folder / "emoji_palette.npy"
    )
    for name in ("emoji.npz", "emoji_palette.npy"):
        print(name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
