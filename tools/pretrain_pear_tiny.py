#!/usr/bin/env python3
"""Make the weights of pear_tiny: distil DeiT-tiny (Apache-2.0) on procedural images and a few photographs.

The teacher sees an image at 96 pixels (6 x 6 patches of 16), the student the same image at 48 pixels
(6 x 6 patches of 8); the student regresses the teacher's normalised class and patch tokens. It starts
from every second block of the teacher. No labels, and no image of any evaluation or demo set:

    fractals, dead leaves, 1/f noise, gratings, blobs, glyphs   generated here
    china.jpg, flower.jpg                                       scikit-learn   CC BY 2.0
    camera.png, retina.jpg                                      scikit-image   CC0
    grace_hopper.jpg                                            matplotlib     public domain

    python tools/pretrain_pear_tiny.py --teacher deit_tiny_patch16_224.safetensors --out pear_tiny.safetensors

Without --teacher, timm downloads the teacher's weights. An hour on 2 cores; needs the `demo` extra.
"""

import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

import router.models.pear_tiny  # noqa: F401  (registers the student with timm)
from router import open_image

SIDE = 96
Picture = NDArray[np.uint8]
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


# ---- images -----------------------------------------------------------------------------------


def photographs() -> list[Image.Image]:
    """The permissively licensed photographs that the docstring names, from installed packages."""
    import matplotlib
    import skimage
    import sklearn

    sk, ski = Path(sklearn.__file__).parent, Path(skimage.__file__).parent
    paths = [
        *(sk / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")),
        *(ski / "data" / name for name in ("camera.png", "retina.jpg")),
        Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    ]
    return [open_image(path, reading=0) for path in paths]


def fonts() -> list[str]:
    """Text fonts that matplotlib ships (DejaVu, STIX: free licences)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(str(path) for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name)


class Painter:
    """Draws one random SIDE x SIDE picture a call, from its own random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.photos = photographs()
        self.fonts = fonts()
        rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
        self.rows, self.columns = rows, columns
        frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
        frequency[0, 0] = 1
        self.frequency = frequency

    def colours(self, n: int) -> NDArray[np.float64]:
        """n RGB colours in 0..255, sometimes nearly grey, sometimes of one hue."""
        rng = self.rng
        base = rng.uniform(0, 255, 3)
        colours = base + rng.normal(0, rng.choice([25, 70, 140]), (n, 3))
        if rng.random() < 0.3:
            colours = colours.mean(1, keepdims=True) + rng.normal(0, 6, (n, 3))
        return np.clip(colours, 0, 255)

    def palette(self, field: NDArray[np.float32]) -> Picture:
        """Colours a scalar field by a random smooth palette of 2 to 5 colours."""
        colours = self.colours(int(self.rng.integers(2, 6)))
        low, high = float(field.min()), float(field.max())
        t = (field - low) / (high - low + 1e-6)
        stops = np.linspace(0, 1, len(colours))
        return np.stack([np.interp(t, stops, colours[:, c]) for c in range(3)], -1).astype(np.uint8)

    def noise_field(self) -> NDArray[np.float32]:
        """1/f^a noise, sometimes stretched along one axis or folded into ridges."""
        rng = self.rng
        spectrum = rng.normal(size=self.frequency.shape) + 1j * rng.normal(size=self.frequency.shape)
        stretch = 1.0
        if rng.random() < 0.4:
            angle, ratio = rng.uniform(0, np.pi), rng.uniform(2, 12)
            fy, fx = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
            along = np.cos(angle) * fx + np.sin(angle) * fy
            across = (-np.sin(angle) * fx + np.cos(angle) * fy) * ratio
            stretch = np.maximum(np.hypot(along, across), 1 / SIDE) / self.frequency
        field = np.fft.irfft2(spectrum / (self.frequency * stretch) ** rng.uniform(0.4, 2.4), s=(SIDE, SIDE))
        field /= field.std() + 1e-6
        kind = rng.random()
        if kind < 0.2:
            field = np.abs(field)
        elif kind < 0.35:
            field = np.sin(field * rng.uniform(1, 6))
        elif kind < 0.5:
            field = np.tanh((field - rng.normal()) * rng.uniform(2, 20))
        return field.astype(np.float32)

    def noise(self) -> Picture:
        return self.palette(self.noise_field())

    def grating(self) -> Picture:
        """Stripes, checks, rings or spectrogram-like bands, warped by noise."""
        rng = self.rng
        warp = self.noise_field() * rng.choice([0, 0.01, 0.05])
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(2, 24) * 2 * np.pi
        x = self.columns * np.cos(angle) + self.rows * np.sin(angle) + warp
        y = -self.columns * np.sin(angle) + self.rows * np.cos(angle) + warp
        kind = rng.integers(4)
        if kind == 0:
            field = np.sin(x * frequency)
        elif kind == 1:
            field = np.sin(x * frequency) * np.sin(y * frequency * rng.uniform(0.4, 2))
        elif kind == 2:
            centre = rng.uniform(-0.2, 1.2, 2)
            field = np.sin(np.hypot(self.rows - centre[0], self.columns - centre[1]) * frequency)
        else:
            bands = np.interp(self.rows + warp, np.linspace(0, 1, 12), rng.normal(size=12))
            field = bands * np.interp(self.columns, np.linspace(0, 1, 6), rng.uniform(0, 1, 6))
            field = field + 0.3 * self.noise_field() * rng.random()
        if rng.random() < 0.4:
            field = np.sign(field - rng.uniform(-0.5, 0.5))
        return self.palette(field.astype(np.float32))

    def blobs(self) -> Picture:
        """Smooth lit bodies on a dark or bright ground, as in scans and macro photographs."""
        rng = self.rng
        field = np.zeros((SIDE, SIDE), np.float32)
        for _ in range(rng.integers(1, 9)):
            centre, radii, angle = rng.uniform(0, 1, 2), rng.uniform(0.03, 0.45, 2), rng.uniform(0, np.pi)
            dy, dx = self.rows - centre[0], self.columns - centre[1]
            u, v = np.cos(angle) * dx + np.sin(angle) * dy, -np.sin(angle) * dx + np.cos(angle) * dy
            distance = (u / radii[0]) ** 2 + (v / radii[1]) ** 2
            field += rng.normal(0, 1) / (1 + np.exp(np.clip((distance - 1) * rng.uniform(2, 20), -30, 30)))
        field += self.noise_field() * rng.choice([0, 0.05, 0.2])
        return self.palette(field)

    def fractal(self) -> Picture:
        """An iterated function system's points, as in FractalDB."""
        rng = self.rng
        n = int(rng.integers(2, 7))
        maps = rng.uniform(-1, 1, (n, 2, 3))
        for one in maps:  # contractions only
            one[:, :2] *= min(1.0, 0.9 / np.linalg.norm(one[:, :2], 2))
        weight = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
        points = rng.uniform(-1, 1, (1500, 2))
        kept = []
        for step in range(14):
            chosen = maps[rng.choice(n, len(points), p=weight / weight.sum())]
            points = np.einsum("nij,nj->ni", chosen[:, :, :2], points) + chosen[:, :, 2]
            if step > 3:
                kept.append(points)
        cloud = np.concatenate(kept)
        low, high = cloud.min(0), cloud.max(0)
        cells = ((cloud - low) / (high - low + 1e-6) * (SIDE - 1)).astype(int)
        field = np.zeros((SIDE, SIDE), np.float32)
        np.add.at(field, (cells[:, 0], cells[:, 1]), 1)
        return self.palette(np.log1p(field))

    def photo(self) -> Picture:
        """A random crop of a photograph: any scale, turned, mirrored, its colours changed."""
        rng = self.rng
        image = self.photos[rng.integers(len(self.photos))]
        side = int(min(image.size) * math.exp(rng.uniform(math.log(0.08), 0)))
        aspect = math.exp(rng.uniform(-0.4, 0.4))
        width, height = min(int(side * aspect) + 4, image.width), min(int(side / aspect) + 4, image.height)
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        crop = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        if rng.random() < 0.3:
            turned = crop.rotate(rng.uniform(-180, 180), Image.Resampling.BILINEAR, expand=False)
            crop = turned.crop((14, 14, 82, 82)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.5:
            bands = np.asarray(crop.convert("HSV")).copy()
            bands[..., 0] += rng.integers(256, dtype=np.uint8)
            crop = Image.fromarray(bands, "HSV").convert("RGB")
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            crop = enhance(crop).enhance(rng.uniform(0.5, 1.6))
        return np.asarray(crop)

    def fill(self) -> Picture:
        """The filling of a shape or of a ground."""
        kind = self.rng.random()
        if kind < 0.3:
            return np.broadcast_to(self.colours(1).astype(np.uint8), (SIDE, SIDE, 3)).copy()
        if kind < 0.55:
            return self.noise()
        return self.photo() if kind < 0.85 else self.grating()

    def shape(self) -> Image.Image:
        """A mask: an ellipse, a polygon, a stroke or a ring. Small ones are more likely."""
        rng = self.rng
        mask = Image.new("L", (SIDE, SIDE))
        draw = ImageDraw.Draw(mask)
        radius = SIDE * min(0.6, 0.05 / rng.random() ** 0.7)
        x, y = rng.uniform(0, SIDE, 2)
        kind = rng.integers(4)
        if kind == 0:
            rx, ry = radius * rng.uniform(0.4, 1, 2)
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
        elif kind == 1:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
            reach = radius * rng.uniform(0.5, 1, len(angles))
            corners = zip(x + reach * np.cos(angles), y + reach * np.sin(angles), strict=True)
            draw.polygon(list(corners), fill=255)
        elif kind == 2:
            steps = rng.normal(0, radius, (rng.integers(2, 6), 2)).cumsum(0) + np.array([x, y])
            draw.line([(float(a), float(b)) for a, b in steps], fill=255, width=int(rng.integers(1, 10)))
        else:
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, rng.uniform(0, 180), rng.uniform(200, 500), fill=255, width=int(rng.integers(2, 9)))
        return mask

    def leaves(self) -> Picture:
        """Dead leaves: shapes that hide each other."""
        canvas = Image.fromarray(self.fill())
        for _ in range(int(self.rng.choice([1, 2, 4, 8, 16]))):
            canvas.paste(Image.fromarray(self.fill()), (0, 0), self.shape())
        return np.asarray(canvas)

    def glyphs(self) -> Picture:
        """One large character, or several small ones anywhere."""
        rng = self.rng
        canvas = Image.fromarray(self.fill())
        count = int(rng.choice([1, 1, 1, 2, 3, 5, 8]))
        for _ in range(count):
            size = int(rng.uniform(40, 96) if count == 1 else rng.uniform(14, 40))
            font = ImageFont.truetype(self.fonts[rng.integers(len(self.fonts))], size)
            text = chr(int(rng.choice([rng.integers(33, 127), rng.integers(0x391, 0x44F)])))
            mask = Image.new("L", (SIDE, SIDE))
            spread = 0.12 if count == 1 else 0.42
            x, y = (0.5 + rng.uniform(-spread, spread, 2)) * SIDE
            ImageDraw.Draw(mask).text((x, y), text, fill=255, font=font, anchor="mm")
            turn = rng.normal(0, 12) if rng.random() < 0.8 else rng.uniform(-180, 180)
            mask = mask.rotate(turn, Image.Resampling.BILINEAR, center=(x, y))
            ink = self.fill() if rng.random() < 0.4 else np.uint8(self.colours(1)) + np.zeros((SIDE, SIDE, 3), "u1")
            canvas.paste(Image.fromarray(ink), (0, 0), mask)
        return np.asarray(canvas)

    def __call__(self) -> Picture:
        rng = self.rng
        kinds = [self.photo, self.leaves, self.glyphs, self.noise, self.grating, self.blobs, self.fractal]
        picture = kinds[rng.choice(7, p=[0.34, 0.24, 0.14, 0.07, 0.07, 0.07, 0.07])]()
        if rng.random() < 0.1:  # a blend of two
            other, share = self.photo(), rng.uniform(0.2, 0.8)
            picture = (picture * share + other * (1 - share)).astype(np.uint8)
        image = Image.fromarray(picture)
        if rng.random() < 0.2:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2)))
        if rng.random() < 0.2:
            image = image.convert("L").convert("RGB")
        picture = np.asarray(image)
        if rng.random() < 0.15:
            noisy = picture + rng.normal(0, rng.uniform(3, 30), picture.shape)
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
        return picture


def paint(seed: int, count: int) -> Picture:
    """Pictures, uint8 [count, SIDE, SIDE, 3], which depend only on the seed."""
    painter = Painter(seed)
    return np.stack([painter() for _ in range(count)])


# ---- models -----------------------------------------------------------------------------------


def student_from_teacher(teacher: nn.Module) -> nn.Module:
    """pear_tiny with every second block of the teacher, the stronger half of each MLP, and a patch of 8."""
    student = timm.create_model("pear_tiny")
    source, target = teacher.state_dict(), student.state_dict()
    hidden = target["blocks.0.mlp.fc1.weight"].shape[0]
    for name in target:
        if not name.startswith("blocks."):
            continue
        _, block, part = name.split(".", 2)
        prefix = f"blocks.{2 * int(block) + 1}."
        value = source[prefix + part]
        if part.startswith("mlp."):
            strength = source[prefix + "mlp.fc1.weight"].norm(dim=1) * source[prefix + "mlp.fc2.weight"].norm(dim=0)
            chosen = strength.topk(hidden).indices.sort().values
            if part.startswith("mlp.fc1"):
                value = value[chosen]
            elif part == "mlp.fc2.weight":
                value = value[:, chosen]
        target[name] = value
    for name in ("cls_token", "norm.weight", "norm.bias", "pos_embed", "patch_embed.proj.bias"):
        target[name] = source[name]
    weight = source["patch_embed.proj.weight"]
    target["patch_embed.proj.weight"] = 4 * F.interpolate(weight, size=(8, 8), mode="area")
    student.load_state_dict(target)
    return student


def normalised(pictures: Tensor) -> Tensor:
    """Normalises uint8 [n, h, w, 3] to float [n, 3, h, w], as ImageNet models expect."""
    return (pictures.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def smooth(images: Tensor) -> Tensor:
    """Halves height and width by averaging."""
    return F.avg_pool2d(images, 2)


def write_weights(student: nn.Module, out: Path) -> None:
    """Writes the weights in half precision. Others may read them: save_file would write them for the owner alone."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(save({name: tensor.half().contiguous() for name, tensor in student.state_dict().items()}))


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--teacher", "teacher_file", type=click.Path(exists=True), help="DeiT-tiny weights, safetensors.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--pictures", default=100_000, show_default=True)
@click.option("--steps", default=9_000, show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile (needs a C++ compiler).")
def main(
    teacher_file: str | None, out: Path, pictures: int, steps: int, batch: int, lr: float, seed: int, compiled: bool
) -> None:
    torch.manual_seed(seed)
    began = time.time()
    chunk = 500
    with ProcessPoolExecutor() as workers:
        jobs = [workers.submit(paint, seed * 1_000_003 + i, chunk) for i in range(pictures // chunk)]
        pool = torch.from_numpy(np.concatenate([job.result() for job in jobs]))
    click.echo(f"{len(pool)} pictures after {time.time() - began:.0f} s")

    options: dict[str, Any] = {} if teacher_file is None else {"pretrained_cfg_overlay": {"file": teacher_file}}
    teacher: Any = timm.create_model("deit_tiny_patch16_224", pretrained=True, img_size=SIDE, **options).eval()
    small = torch.empty(len(pool), SIDE // 2, SIDE // 2, 3, dtype=torch.uint8)
    targets = torch.empty(len(pool), 37, 192, dtype=torch.float16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(pool), 250):
            part = pool[i : i + 250]
            targets[i : i + 250] = teacher.forward_features(normalised(part)).half()
            small[i : i + 250] = smooth(part.permute(0, 3, 1, 2).float()).round().byte().permute(0, 2, 3, 1)
    del pool
    sample = targets[:: max(1, len(targets) // 20_000)].float()
    centre, width = sample.mean(0), sample.std(0)
    centre = torch.cat([centre[:1], centre[1:].mean(0, keepdim=True).expand(36, -1)])
    width = torch.cat([width[:1], width[1:].mean(0, keepdim=True).expand(36, -1)])
    click.echo(f"teacher done after {time.time() - began:.0f} s")

    student: Any = student_from_teacher(teacher).train()
    for block in student.blocks:
        block.attn.fused_attn = False  # on CPU its backward is the slower one at 37 tokens
    decay = [p for p in student.parameters() if p.ndim >= 2]
    rest = [p for p in student.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}], lr=lr
    )
    warm_up = min(300, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    features = torch.compile(student.forward_features) if compiled else student.forward_features
    weight = torch.full((37, 1), 0.5 / 36)
    weight[0] = 0.5
    order = torch.empty(0, dtype=torch.long)
    mirror = torch.cat([torch.tensor([0]), 1 + torch.arange(36).view(6, 6).flip(1).reshape(-1)])
    running = 0.0
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(small))
        chosen, order = order[:batch], order[batch:]
        images, goal = normalised(small[chosen]), (targets[chosen].float() - centre) / width
        if step % 2:
            images, goal = images.flip(3), goal[:, mirror]
        with torch.autocast("cpu", torch.bfloat16):
            got = features(images)
        loss = F.smooth_l1_loss((got.float() - centre) / width, goal, reduction="none").mean(2, keepdim=True) * weight
        loss = loss.sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running += (loss.item() - running) / min(step, 100)
        if step % 100 == 0:
            click.echo(f"step {step} loss {running:.4f} after {time.time() - began:.0f} s")
        if step % 1000 == 0 or step == steps:
            write_weights(student, out)
    assert all(v.isfinite().all() for v in load_file(out).values())


if __name__ == "__main__":
    main()
