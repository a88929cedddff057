"""Pictures that look alike, of which `vlmedit data prepare` takes one.

A difference hash of 256 bits and coarse colors: small changes of size, quality or brightness leave both as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

ALIKE_BITS, ALIKE_COLOR, BANDS = 10, 12, 16  # of 256 bits, of 255; bands of a hash that are looked up


@dataclass(frozen=True)
class Looks:
    """What makes two pictures look alike: brightness rising or falling along each row of a 17 x 16 thumbnail, and 4 x 4
    colors."""

    bits: int
    colors: bytes

    @staticmethod
    def read(line: dict) -> Looks:
        """Of a journal's line."""
        return Looks(int(line["looks"][0], 16), bytes.fromhex(line["looks"][1]))

    def written(self) -> list[str]:
        """As a journal's line has them."""
        return [f"{self.bits:064x}", self.colors.hex()]

    @staticmethod
    def of(image: Image.Image) -> Looks:
        gray = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
        rising = np.packbits(gray[:, 1:] > gray[:, :-1] + 2)  # more than rounding
        return Looks(int.from_bytes(rising.tobytes(), "big"), image.resize((4, 4), Image.Resampling.BOX).tobytes())

    def like(self, other: Looks) -> bool:
        off = np.abs(np.frombuffer(self.colors, np.uint8).astype(int) - np.frombuffer(other.colors, np.uint8)).max()
        return (self.bits ^ other.bits).bit_count() <= ALIKE_BITS and off <= ALIKE_COLOR


class Gallery:
    """Looks of the pictures so far. Two that differ in fewer than BANDS bits share at least one of BANDS bands: only
    those are compared."""

    def __init__(self):
        self.bands: dict[tuple[int, int], list[Looks]] = {}

    def _keys(self, looks: Looks) -> list[tuple[int, int]]:
        return [(i, looks.bits >> (16 * i) & 0xFFFF) for i in range(BANDS)]

    def has(self, looks: Looks) -> bool:
        return any(looks.like(other) for key in self._keys(looks) for other in self.bands.get(key, ()))

    def add(self, looks: Looks) -> None:
        for key in self._keys(looks):
            self.bands.setdefault(key, []).append(looks)


def gallery_of(lines: Iterable[dict]) -> Gallery:
    """What a run has seen so far."""
    gallery = Gallery()
    for line in lines:
        if line["looks"] and line["reason"] != "seen before":
            gallery.add(Looks.read(line))
    return gallery


def merged(own: list[dict], others: list[dict], order: dict) -> list[dict]:
    """The lines of all journals in the data set's order, of pictures that look alike only the first. One journal alone
    stays as it is."""
    if not others:
        return own
    gallery, out, last = Gallery(), {}, (len(order), False)
    for line in sorted(own + others, key=lambda line: order.get(line["name"], last)[0]):
        if line["looks"] and line["reason"] != "seen before":
            looks = Looks.read(line)
            if order.get(line["name"], last)[1] and gallery.has(looks):
                line = {**line, "reason": "seen before", "drafts": []}
            else:
                gallery.add(looks)
        out.setdefault(line["name"], line)
    return list(out.values())
