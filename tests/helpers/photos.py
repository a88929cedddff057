"""Pictures made of noise and shapes, in place of photographs."""

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, size=(96, 64)) -> Image.Image:
    """A picture of its own: smooth noise with a few shapes."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(rough)
    for _ in range(3):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        draw.ellipse((int(x), int(y), int(x) + 18, int(y) + 18), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return rough
