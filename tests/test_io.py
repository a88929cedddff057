"""Real pictures in and out: every good kind gives the same view, every bad kind one clear error, and files are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from helpers.foreign import COUNT, CSS, KINDS, PLOTTING, PROGRAMS, draw_all
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb as named
from PIL import Image, ImageDraw, PngImagePlugin

from vlmedit import io as pictures
from vlmedit.errors import InputError
from vlmedit.io import (
    MAX_PIXELS,
    border_color,
    check_space,
    gather,
    load_picture,
    read_manifest,
    save_json,
    save_picture,
    strip,
    write_atomic,
)
from vlmedit.world.edits import check_edit
from vlmedit.world.language import parse_instruction
from vlmedit.world.scene import BACKGROUNDS, COLORS


def drawing(width: int = 96, height: int = 96, background="white") -> Image.Image:
    """An asymmetric drawing, so that every flip and rotation shows."""
    image = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((0.1 * width, 0.1 * height, 0.4 * width, 0.4 * height), fill="red")
    draw.rectangle((0.6 * width, 0.5 * height, 0.9 * width, 0.8 * height), fill="royalblue")
    return image


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def off(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of two pictures."""
    return int(np.abs(array(a) - array(b)).max())


def on_glass(image: Image.Image) -> Image.Image:
    """The drawing with its white made transparent, and black beneath."""
    pixels = np.dstack((array(image), np.where((array(image) == 255).all(-1), 0, 255)))
    pixels[pixels[..., 3] == 0, :3] = 0
    return Image.fromarray(pixels.astype(np.uint8))


GRAY = drawing().convert("L")
GOOD = {
    "rgb.png": (drawing(), drawing(), 0, {}),
    "lossless.webp": (drawing(), drawing(), 0, {"lossless": True}),
    "lossy.webp": (drawing(), drawing(), 40, {"quality": 95}),  # its chroma is always halved
    "rgb.jpg": (drawing(), drawing(), 12, {"quality": 97, "subsampling": 0}),
    "progressive.JPEG": (drawing(), drawing(), 12, {"quality": 97, "subsampling": 0, "progressive": True}),
    "opaque.png": (drawing().convert("RGBA"), drawing(), 0, {}),
    "glass.png": (on_glass(drawing()), drawing(), 0, {}),
    "glass.webp": (on_glass(drawing()), drawing(), 0, {"lossless": True}),
    "palette.png": (drawing().quantize(8), drawing().quantize(8).convert("RGB"), 0, {}),
    "palette-hole.png": (drawing(background="lime").quantize(4), drawing(), 0, {"hole": (0, 255, 0)}),
    "gray.png": (GRAY, GRAY, 0, {}),
    "gray-alpha.png": (Image.merge("LA", (GRAY, GRAY.point(lambda v: 255 * (v < 255)))), GRAY, 0, {}),
    "gray.jpg": (GRAY, GRAY, 12, {"quality": 97}),
    "bilevel.png": (drawing().convert("1"), drawing().convert("1"), 0, {}),
    "sixteen.png": (Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257), GRAY, 0, {}),
    "cmyk.jpg": (drawing().convert("CMYK"), drawing(), 16, {"quality": 97, "subsampling": 0}),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_good_kind_gives_the_view_of_the_same_drawing(tmp_path, name):
    source, expected, tolerance, options = GOOD[name]
    options = dict(options)
    if hole := options.pop("hole", None):
        colors = np.array(source.getpalette()).reshape(-1, 3)
        options["transparency"] = int(np.abs(colors - hole).sum(1).argmin())
    source.save(tmp_path / name, **options)
    got = load_picture(tmp_path / name)
    assert got.view.mode == "RGB" and got.view.size == (32, 32) and got.size == (96, 96)
    assert off(got.view, pictures.to_view(expected.convert("RGB"), 32)) <= tolerance
    assert max(abs(a - 255) for a in got.background) <= 1


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    """A ramp over the whole 16-bit range stays a ramp; clipping would make all but its first columns white."""
    ramp = np.tile(np.linspace(0, 65535, 64).round().astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    got = array(load_picture(tmp_path / "ramp.png").view)[16, :, 0]
    assert np.abs(got - (np.arange(32) + 0.5) * 255 / 32).max() < 4


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_undone(tmp_path, orientation, ending):
    """A drawing stored turned, with the tag that turns it back, gives the upright view and size."""
    upright = drawing(96, 64)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the inverse of each tag, as a Pillow transposition
    stored = upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"turned.{ending}", exif=exif, quality=97)
    got = load_picture(tmp_path / f"turned.{ending}")
    assert got.size == (96, 64)
    assert off(got.view, pictures.to_view(upright, 32)) <= (0 if ending == "png" else 45)  # chroma is halved in the lossy two


def test_first_picture_of_a_camera_file(tmp_path):
    """A JPEG that carries a second picture (MPO) is not an animation."""
    drawing().save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (96, 96))], quality=97, subsampling=0)
    with Image.open(tmp_path / "camera.jpg") as stored:
        assert stored.n_frames == 2
    assert off(load_picture(tmp_path / "camera.jpg").view, pictures.to_view(drawing(), 32)) <= 12


def test_padding_has_the_color_of_the_border_and_is_taken_off_again(tmp_path):
    drawing(120, 60, "tan").save(tmp_path / "wide.png")
    got = load_picture(tmp_path / "wide.png")
    assert got.background == (210, 180, 140) and got.box == (0, 30, 120, 90)
    view = array(got.view)
    assert (view[:7] == got.background).all() and (view[-7:] == got.background).all()
    back = got.restore(got.view)
    assert back.size == (120, 60)
    assert np.abs(array(back) - array(drawing(120, 60, "tan"))).mean() < 6


def test_border_color_ignores_what_touches_the_border():
    image = Image.new("RGB", (100, 100), "black")
    ImageDraw.Draw(image).rectangle((0, 30, 40, 60), fill="white")
    assert border_color(image) == (0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300))
def test_any_size_goes_in_and_comes_out_the_same(tmp_path_factory, width, height):
    if max(width, height) > 4 * min(width, height):
        return
    path = tmp_path_factory.mktemp("any") / "any.png"
    drawing(width, height).save(path)
    got = load_picture(path, side=48)
    assert got.view.size == (48, 48) and got.restore(got.view).size == (width, height)


def test_scaled_drawings_look_as_if_drawn_small():
    """Crisp renders of 200 pixels, scaled down, are what the renderer draws at 32 pixels, to 38 dB."""
    import random

    import torch

    from vlmedit.world.oracle import psnr
    from vlmedit.world.render import render
    from vlmedit.world.scene import Look, sample_scene

    rng = random.Random(0)
    scenes = [replace(sample_scene(rng), look=Look()) for _ in range(16)]
    large = render([replace(s, look=Look(softness=32 / 200)) for s in scenes], 200)
    views = np.stack([array(pictures.to_view(pictures.to_image(x), 32)) for x in large])
    small = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert psnr(small, render(scenes, 32)).mean() > 38


def test_pictures_and_tensors_are_inverse():
    """All 256 levels come back; -1, 0 and 1 are black, middle and white; what lies outside is clamped; rows, columns and
    channels keep their places; neither a graph nor half precision is in the way."""
    import torch

    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)[..., None] ^ np.array([0, 85, 170], np.uint8)
    tensor = pictures.to_tensor(Image.fromarray(levels))
    assert tensor.shape == (3, 8, 32) and tensor.dtype == torch.float32 and tensor.min() == -1 and tensor.max() == 1
    assert (array(pictures.to_image(tensor)) == levels).all()
    assert tensor[1, 3, 5] == levels[3, 5, 1] / 127.5 - 1
    odd = torch.tensor([-7.0, -1.0, 0.0, 1.0, 1.01]).repeat(3, 2, 1).requires_grad_()
    assert array(pictures.to_image(odd))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert array(pictures.to_image(odd.bfloat16()))[1, :, 2].tolist() == [0, 0, 128, 255, 255]


def test_tensors_of_large_pictures_are_scaled_down():
    """To the longer side asked for, never up, and any mode becomes RGB."""
    assert pictures.to_tensor(drawing(120, 60), side=40).shape == (3, 20, 40)
    assert pictures.to_tensor(drawing(120, 60), side=400).shape == (3, 60, 120)
    assert pictures.to_tensor(drawing(120, 60).convert("L")).shape == (3, 60, 120)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def cut(path, share: float = 0.6) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def bad_missing(path):
    pass


def bad_folder(path):
    path.mkdir()


def bad_empty(path):
    path.write_bytes(b"")


def bad_text(path):
    path.write_text("I am not a picture")


def bad_other_format(path):
    drawing().save(path, "BMP")


def bad_gif(path):
    drawing().save(path, "GIF")


def bad_truncated_png(path):
    noisy().save(path, "PNG")
    cut(path)


def bad_truncated_jpeg(path):
    noisy().save(path, "JPEG")
    cut(path)


def bad_truncated_webp(path):
    noisy().save(path, "WEBP", lossless=True)
    cut(path)


def bad_header_alone(path):
    noisy().save(path, "PNG")
    cut(path, 0.001)


def bad_checksum(path):
    noisy().save(path, "PNG")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))


def bad_bomb(path):
    path.write_bytes(png_header(100_000, 100_000))


def bad_oversized(path):
    path.write_bytes(png_header(10_000, MAX_PIXELS // 10_000 + 1))


def bad_text_bomb(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 2**22, zip=True)
    drawing().save(path, "PNG", pnginfo=info)


def bad_animated_png(path):
    drawing().save(path, "PNG", save_all=True, append_images=[noisy().resize((96, 96))])


def bad_animated_webp(path):
    drawing().save(path, "WEBP", save_all=True, append_images=[noisy().resize((96, 96))])


def bad_tiny(path):
    Image.new("RGB", (7, 20)).save(path, "PNG")


def bad_ribbon(path):
    Image.new("RGB", (500, 50)).save(path, "PNG")


BAD = {
    bad_missing: "no such file",
    bad_folder: "not a file",
    bad_empty: "empty",
    bad_text: "not a PNG, JPEG or WebP",
    bad_other_format: "not a PNG, JPEG or WebP",
    bad_gif: "not a PNG, JPEG or WebP",
    bad_truncated_png: "damaged or truncated",
    bad_truncated_jpeg: "damaged or truncated",
    bad_truncated_webp: "damaged or truncated|not a PNG",
    bad_header_alone: "damaged or truncated|not a PNG",
    bad_checksum: "damaged or truncated",
    bad_bomb: "scale it down",
    bad_oversized: "scale it down",
    bad_text_bomb: "damaged or truncated",
    bad_animated_png: "animated, 2 frames; save the frame",
    bad_animated_webp: "animated, 2 frames; save the frame",
    bad_tiny: "7 x 20 is too small",
    bad_ribbon: "500 x 50 is longer",
}


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_every_bad_kind_is_one_clear_error(tmp_path, make):
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises(InputError, match=BAD[make]) as caught:
        load_picture(path)
    assert str(path) in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything is permitted to root")
def test_unreadable_file(tmp_path):
    drawing().save(tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    with pytest.raises(InputError, match="not permitted"):
        load_picture(tmp_path / "locked.png")


def test_manifest_reports_every_line_at_once(tmp_path):
    lines = [
        json.dumps({"image": "a.png", "instruction": "do nothing"}),
        "{not json",
        "",
        json.dumps(["a.png", "do nothing"]),
        json.dumps({"image": "a.png"}),
        json.dumps({"image": 3, "instruction": None}),
        json.dumps({"image": "sub/b.png", "instruction": "do nothing", "note": "ignored"}),
    ]
    (tmp_path / "list.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    requests, problems = read_manifest(tmp_path / "list.jsonl")
    assert [r.image for r in requests] == [tmp_path / "a.png", tmp_path / "sub/b.png"]
    assert [p.split(":")[0] for p in problems] == [f"list.jsonl, line {n}" for n in (2, 4, 5, 6)]
    assert "'instruction' is missing" in problems[2] and "'image' is 3" in problems[3] and "'instruction' is None" in problems[3]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\xfa"])
def test_empty_or_unreadable_manifest(tmp_path, content):
    (tmp_path / "list.jsonl").write_bytes(content)
    requests, problems = read_manifest(tmp_path / "list.jsonl")
    assert not requests and len(problems) == 1 and "list.jsonl" in problems[0]


def test_folder_gathers_its_pictures_by_name(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    requests, problems = gather(tmp_path, "do nothing")
    assert [r.image.name for r in requests] == ["a.jpeg", "b.PNG", "c.webp"] and not problems
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no picture" in gather(empty, "do nothing")[1][0]


def failing(number: int):
    def write(file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    return write


def test_writing_is_whole_or_absent(tmp_path):
    """A write that fails half way leaves the old file as it was and nothing else; a full disk is an InputError."""
    path = tmp_path / "new" / "result.json"
    save_json({"a": 1}, path)
    with pytest.raises(InputError, match="disk is full"):
        write_atomic(path, failing(errno.ENOSPC))
    with pytest.raises(OSError):
        write_atomic(path, failing(errno.EIO))
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("name, tolerance", [("a.png", 0), ("a.webp", 0), ("a.jpg", 16)])
def test_saved_pictures_come_back(tmp_path, name, tolerance):
    save_picture(drawing(), tmp_path / name)
    assert off(Image.open(tmp_path / name), drawing()) <= tolerance


def test_unknown_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'\.tiff'"):
        save_picture(drawing(), tmp_path / "a.tiff")
    assert not list(tmp_path.iterdir())


def test_space_is_checked_before_anything_is_made(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=5 * 2**20))
    check_space(tmp_path / "not/yet/there", 3 * 2**20)
    with pytest.raises(InputError, match="5 MB free, about 9 MB needed"):
        check_space(tmp_path / "not/yet/there", 8 * 2**20)


def test_strip_shows_every_picture_and_needs_a_label_for_each():
    shown = strip([drawing(), Image.new("RGB", (32, 32), "lime")], ["reference", "P 0.5\nP 0.6"], "make the circle " * 9, tile=64)
    assert (array(shown) == (0, 255, 0)).all(-1).sum() == 64 * 64
    with pytest.raises(ValueError, match="2 pictures and 1 labels"):
        strip([drawing(), drawing()], ["one"])


# The foreign drawings


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return draw_all(tmp_path_factory.mktemp("foreign"))


def test_foreign_drawings_are_balanced_and_possible(foreign):
    assert len(foreign) == COUNT >= 60
    for program in PROGRAMS:
        assert sum(f.program == program for f in foreign) == COUNT // 3
    counts = [sum(f.edit.type == kind for f in foreign) for kind in KINDS]
    assert max(counts) - min(counts) <= 1
    for f in foreign:
        check_edit(f.scene, f.edit)
        assert parse_instruction(f.instruction) == f.edit
        load_picture(f.path)
    sizes = {load_picture(f.path).size for f in foreign}
    assert len(sizes) > 50 and any(w != h for w, h in sizes)


def test_foreign_drawings_repeat(foreign, tmp_path):
    again = draw_all(tmp_path)
    assert [a.path.read_bytes() for a in again] == [f.path.read_bytes() for f in foreign]


@pytest.mark.parametrize("names", [CSS, PLOTTING])
def test_foreign_colors_are_the_worlds_nearest(names):
    for group in (COLORS, BACKGROUNDS):
        for word, target in group.items():
            for name in names[word]:
                distance = {w: np.linalg.norm(np.subtract(named(name), c)) for w, c in group.items()}
                assert min(distance, key=distance.get) == word
                assert np.abs(np.subtract(named(name), target)).max() <= 0.2


def test_oracle_reads_foreign_drawings(foreign):
    """The drawings show what their scenes say: an independent reading agrees on at least 70 of 72."""
    import torch

    from vlmedit.world.oracle import parse

    views = np.stack([array(load_picture(f.path).view) for f in foreign])
    readings = parse(torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1)
    key = lambda s: (sorted((t.shape, t.color, t.texture) for t in s.things), s.background, s.style)
    assert sum(key(f.scene) == key(r.scene) for f, r in zip(foreign, readings)) >= 70
