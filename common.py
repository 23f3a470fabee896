"""What every script shares: errors, flags, device; files and records; FID; data."""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL
import scipy
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

START = time.time()


class Failure(Exception):
    """What went wrong, with which file or value, and what to do; `code`: the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def advise(path, advice):
    """Turn any exception within, of whatever library, into a `Failure` that says what to do."""
    try:
        yield
    except Failure:
        raise
    except Exception as problem:
        reason = " ".join(str(getattr(problem, "strerror", None) or problem).split())
        raise Failure(f"{path}: {reason[:99] or type(problem).__name__}; {advice}") from None


def run(main):
    """Call `main()` as a script: a failure ends in one line on stderr and an exit code."""
    try:
        main()
        sys.stdout.flush()
        return
    except (Failure, OSError) as problem:
        # from a DataLoader's worker comes a traceback, whose last line is the message
        line, code = f"error\n{problem}".strip().splitlines()[-1], getattr(problem, "code", 1)
    except KeyboardInterrupt:
        line, code = "interrupted; a training goes on with --resume", 130
    except (MemoryError, RuntimeError) as problem:
        if not re.search("out of memory|can't allocate memory|^$", str(problem)):
            raise
        line, code = "not enough memory; lower --batch-size, or use --device cpu", 1
    line = line.removeprefix("common.Failure: ")[:270]
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a closed stdout would complain once more
    sys.exit(code)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, where it has a fixed one."""

    def _get_help_string(self, action):
        varies = action.default in (None, argparse.SUPPRESS) or action.default is False
        return action.help if varies else f"{action.help} (default: %(default)s)"


def parser(doc, out, dataset, datasets, dataset_help, limit_help, trains=False):
    """An argparse parser with the flags of every script; `trains`: --resume and --force, too."""
    p = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    add = p.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of datasets and weights")
    add("--out", type=Path, default=out, help="folder for what this run writes")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="of all work")
    add("--seed", type=count(0), default=0, help="of every random number")
    add("--dataset", choices=datasets, default=dataset, help=dataset_help)
    add("--limit", type=count(1), metavar="N", help=limit_help)
    if trains:
        add = p.add_mutually_exclusive_group().add_argument
        add("--resume", action="store_true", help="go on from the checkpoint in --out")
        add("--force", action="store_true", help="overwrite a training of other settings")
    return p


def count(least):
    """An argparse type: a whole number from `least` up."""

    def number(text):
        if text.isdecimal() and least <= int(text) < 2**43:  # seeds are multiplied, in 63 bits
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} up")

    return number


def positive(text):
    """An argparse type: a positive finite number, also as a fraction such as 8/255."""
    top, _, bottom = text.partition("/")
    value = float(top) / (float(bottom or 1) or math.nan)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def pick_device(name):
    """The torch.device for `--device`; auto: CUDA, else Apple's GPU, else the CPU."""
    torch.set_flush_denormal(True)  # averages decay into denormals, which slow a CPU down
    torch.backends.cudnn.deterministic = True  # same seed, same machine: same result
    torch.backends.cudnn.allow_tf32 = False  # measured in float32 means float32
    rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun: a GPU for each process
    gpus = torch.cuda.device_count()
    present = {"cuda": gpus > 0, "mps": torch.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in present if present[kind])
    if not present[name] or (name == "cuda" and rank >= gpus):
        raise Failure(f"--device {name}: process {rank} finds none here; use --device cpu", 2)
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def has_bf16(device):
    """Whether `device` multiplies bfloat16 in hardware; where emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def progress(*args, **kwargs):
    """A tqdm bar within 100 columns; where stderr is no terminal, a line every half minute."""
    form = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
    how = {"bar_format": form, "mininterval": 0.1}
    if not sys.stderr.isatty():
        # maxinterval: or tqdm's own watch would print a line every ten seconds
        how = {"bar_format": form[:-9] + "\n", "mininterval": 30, "maxinterval": 60, "delay": 30}
    return tqdm(*args, **how, ncols=100, leave=False, **kwargs)


def make_folder(folder):
    """Create `folder` and prove that it can be written, before any work is done."""
    with advise(folder, "it can't be written; choose another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_file(path, write):
    """Have `write(file)` fill a file of another name, renamed to `path` when complete, or gone."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    with advise(path, "it could not be written"), contextlib.ExitStack() as stack:
        stack.callback(draft.unlink, missing_ok=True)
        with open(draft, "wb") as file:
            write(file)
        os.replace(draft, path)


def save_checkpoint(path, content):
    """Write a dictionary of tensors and plain values that `load_checkpoint` reads."""
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(path, kind, advice):
    """The dictionary of tensors and plain values (else it is refused, not run) that `torch.save`
    wrote to `path`, on the CPU. Raises Failure if it is absent, damaged, or of another "kind" than
    `kind`, unless that is None."""
    with warnings.catch_warnings(action="ignore"), advise(path, advice):
        file, content = io.BytesIO(Path(path).read_bytes()), None
        with contextlib.suppress(Exception):  # torch's many kinds, whose texts are no help
            content = dict(torch.load(file, map_location="cpu", weights_only=True))
        if content is None or kind not in (None, content.get("kind")):
            raise ValueError(f"damaged, or no checkpoint of {kind or 'a network'}")
    return content


def wilson(hits, n):
    """A rate with its 95 % Wilson interval, {"rate", "low", "high", "n"}; None if n is 0."""
    if not n:
        return None
    test = scipy.stats.binomtest(int(hits), int(n))
    interval = test.proportion_ci(method="wilson")
    return {"rate": test.statistic, "low": interval.low, "high": interval.high, "n": int(n)}


def cell(x):
    """A `wilson` record, a number, a text or None as text."""
    if isinstance(x, dict):
        return f"{x['rate']:.1%} [{x['low']:.1%}, {x['high']:.1%}]"
    if isinstance(x, float):
        return f"{x:.2f}"
    return "-" if x is None else str(x)


def print_table(head, lines):
    """Print the columns, each as wide as its widest cell, the first one to the left."""
    lines = [[cell(x) for x in line] for line in [head, *lines]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        right = (x.rjust(width) for x, width in zip(others, widths[1:], strict=True))
        print(first.ljust(widths[0]), *right, sep="  ")


def write_results(args, numbers, **facts):
    """Write `results.json`: command, settings, versions, facts and numbers; returns it all."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    record = {
        "command": " ".join(["python", *sys.argv]),
        "settings": vars(args),
        **facts,
        "machine": f"{sys.platform}, {torch.get_num_threads()} threads",
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np, scipy, PIL)},
        "git": git and git.stdout.strip(),
        "seconds": round(time.time() - START, 1),
        **numbers,
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    write_file(args.out / "results.json", lambda file: file.write(text.encode()))
    return record


def download(url, path, sha256=""):
    """`path`, fetched from `url` if absent, whole or not at all; Failure says what to put where.
    `sha256`: how the content's hash, in hexadecimal, begins."""
    if path.exists():
        return path
    with advise(f"could not download {url}", f"put that file at {path}"):
        with urllib.request.urlopen(url, timeout=20) as answer:
            size, blocks = answer.length, iter(lambda: answer.read(1 << 20), b"")
            content = b"".join(progress(blocks, path.name, disable=path.suffix == ".jpg"))
        digest = hashlib.sha256(content).hexdigest()
        if size not in (None, len(content)) or not digest.startswith(sha256):
            raise OSError(f"{len(content)} of {size or '?'} bytes came, SHA-256 {digest[:8]}...")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: file.write(content))
    return path


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), of two Gaussians (Dowson & Landau 1982).

    Means (D,) and covariances (D, D), taken to float64; returns a float. FID is this on Inception
    features (Heusel et al. 2017, arXiv 1706.08500). Raises ValueError for other or infinite ones.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    shapes, d = [x.shape for x in (mu1, mu2, sigma1, sigma2)], mu1.size
    finite = all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2))
    if shapes != [(d,), (d,), (d, d), (d, d)] or not finite:
        raise ValueError(f"means (D,), covariances (D, D)? Got {shapes}, finite: {finite}")
    values, vectors = np.linalg.eigh([sigma1, sigma2])
    if (values[:, 0] < 1e-12 * values[:, -1]).any():
        # rounding turns zero eigenvalues of S1 S2 negative, and sqrtm is slow and inexact: of
        # S = F F^T without them, tr sqrt(S1 S2) is the sum of the singular values of F1^T F2
        rounding = values[:, -1:] * d * np.finfo(float).eps
        factors = vectors * np.sqrt(np.where(values > rounding, values, 0))[:, None]
        cross = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    else:
        cross = np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def frechet_distance_torch(x, y):
    """The same of features x (N, D), y (M, D), N, M > 1: a scalar, differentiable; in float64.

    With A, B the centred features over sqrt(n - 1), S1 = A^T A, S2 = B^T B, and tr sqrt(S1 S2) is
    the nuclear norm of A B^T (N, M): exact with few samples, too; QR makes many few. The norm's
    gradient is the polar factor U V^T (Watson 1992): autograd's way through an SVD divides by
    differences of singular values. Raises ValueError as `frechet_distance` does.
    """
    fit = x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] and min(len(x), len(y)) > 1
    if not (fit and x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"finite (N, D), (M, D)? Got {tuple(x.shape)}, {tuple(y.shape)}")
    dtype, exact = x.dtype, torch.float32 if x.device.type == "mps" else torch.float64
    x, y = x.to(exact), y.to(exact)
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    with torch.no_grad():
        (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b)
        u, s, vh = torch.linalg.svd(ra @ rb.T, full_matrices=False)
        # a null direction has no polar factor
        keep = s > s.max() * max(len(ra), len(rb)) * torch.finfo(exact).eps
        polar = u[:, keep] @ vh[keep]
        grad_a, grad_b = qa @ (polar @ rb), qb @ (polar.T @ ra)
    # the value of s.sum(), with the gradient of the nuclear norm
    cross = (a * grad_a).sum() + (b * grad_b).sum() - s.sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + a.square().sum() + b.square().sum() - 2 * cross).to(dtype)


INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # the name ends in the start of its SHA-256
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"


def inception_features(images, weights=None, device="cpu"):
    """FID's features (N, 2048), float32, of images (N, 1 or 3, H, W) in [0, 1], else ValueError.

    The network is TensorFlow's Inception v3: torchvision's, but with 1,008 outputs, average pooling
    that doesn't count the padding, and max pooling in the last block. `weights`: path of INCEPTION;
    None: in data/, downloaded once. Raises Failure for another network's.
    """
    images = torch.as_tensor(images)
    fit = images.ndim == 4 and images.shape[1] in (1, 3) and images.is_floating_point()
    if not (fit and len(images) and 0 <= images.min() <= images.max() <= 1):
        raise ValueError(f"floats (N, 1 or 3, H, W) in [0, 1]? Got {tuple(images.shape)}")
    weights = weights or download(INCEPTION_URL, Path("data") / INCEPTION, INCEPTION[-12:-4])
    how = {"num_classes": 1008, "aux_logits": False, "init_weights": False}
    network, advice = torchvision.models.inception_v3(**how), f"put {INCEPTION_URL} there"
    with advise(f"{weights} is not FID's Inception", advice):
        network.load_state_dict(load_checkpoint(weights, None, advice))

    def uncount_padding(_, pooled):  # torchvision divides every 3x3 sum by 9, at the border, too
        return pooled[0] / F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, 1, 1)

    def pool_by_maximum(block, images, output):
        pooled = block.branch_pool(F.max_pool2d(images[0], 3, 1, 1))
        return torch.cat([output[:, : -pooled.shape[1]], pooled], 1)

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        branch = getattr(network, f"Mixed_{name}").branch_pool
        branch.register_forward_pre_hook(uncount_padding)
    network.Mixed_7c.register_forward_hook(pool_by_maximum)
    network.fc = torch.nn.Identity()
    network, features = network.eval().to(device), []
    with torch.inference_mode():
        for part in progress(images.split(50), "Inception"):
            part = part.to(device, torch.float32).expand(-1, 3, -1, -1)
            part = F.interpolate(part, (299, 299), mode="bilinear", align_corners=False)
            features.append(network(2 * part - 1).cpu())
    return torch.cat(features).numpy()


def load_mnist(data_dir, train=True):
    """MNIST's 60,000 training or 10,000 test digits, downloaded to `data_dir`/MNIST/raw if absent.

    Returns images (N, 1, 28, 28) float32 in [0, 1], labels (N,) int64; or raises Failure.
    """
    part = Path(data_dir, "MNIST", "raw", "train" if train else "t10k")
    files = f"{part}-images-idx3-ubyte, {part.name}-labels-idx1-ubyte"
    advice = "delete them, or put MNIST's four files there, or use --dataset glyphs"
    socket.setdefaulttimeout(20)  # torchvision would wait for ever
    with advise(files, advice), contextlib.redirect_stdout(io.StringIO()):
        digits = torchvision.datasets.MNIST(data_dir, train, download=True)
        images, labels = digits.data, digits.targets
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
            raise ValueError(f"not MNIST: {tuple(images.shape)}, {len(labels)} labels")
    return images.unsqueeze(1).float() / 255, labels


def glyphs(n, seed=0):
    """`n` digits in Pillow's built-in font, each with a stroke, rotation, shear, scale and place.

    Returns what `load_mnist` does, the classes in turn; the same for a `seed`, whatever `n`.
    """
    canvas, strokes, font = 56, 4, ImageFont.load_default(40)
    prototypes = torch.zeros(10, strokes, 1, canvas, canvas)
    for digit, stroke in np.ndindex(10, strokes):
        image = Image.new("L", (canvas, canvas))
        ink, middle = ImageDraw.Draw(image), (canvas / 2, canvas / 2)
        ink.text(middle, str(digit), 255, font, "mm", stroke_width=stroke)
        prototypes[digit, stroke] = torch.from_numpy(np.array(image)) / 255
    labels, images = torch.arange(n) % 10, torch.empty(n, 1, 28, 28)
    draws = torch.rand(n, 7, generator=torch.Generator().manual_seed(seed))  # a row for each image
    angle, shear, x, y, scale_x, scale_y = (draws[:, :6] * 2 - 1).unbind(1)
    cos, sin = (0.3 * angle).cos(), (0.3 * angle).sin()  # radians: 17 degrees to either side
    a, b = cos / (0.8 + 0.15 * scale_x), -sin / (0.8 + 0.15 * scale_y)
    affine = torch.stack([a, b + 0.3 * shear, 0.15 * x, -b, a, 0.15 * y], 1).view(n, 2, 3)
    for part in torch.arange(n).split(2000):
        drawn = prototypes[labels[part], (draws[part, 6] * strokes).long()]
        grid = F.affine_grid(affine[part], drawn.shape, align_corners=False)
        images[part] = F.avg_pool2d(F.grid_sample(drawn, grid, align_corners=False), 2)
    return images.clamp_(0, 1), labels


def load_digits(name, data_dir, train=True, limit=None):
    """(Set used, images, labels) of mnist, glyphs, or auto: MNIST where it can be had."""
    if name == "auto":
        try:
            return load_digits("mnist", data_dir, train, limit)
        except Failure as problem:
            line = "*" * 100
            text = f"WARNING: {problem}\nGLYPHS are drawn instead: no number is a result on MNIST."
            print(line, text, line, sep="\n", file=sys.stderr)
    if name == "mnist":
        return name, *(x[:limit] for x in load_mnist(data_dir, train))
    return "glyphs", *(glyphs(limit or 60_000, 0) if train else glyphs(limit or 10_000, 1))


MOST_DIGITS = 5  # in a scene


@functools.cache
def scene_digits(source, data_dir, split):
    """`load_digits` of a split, train, validation (the last twelfth of training) or test."""
    name, images, labels = load_digits(source, data_dir, split != "test")
    cut = len(images) - len(images) // 12
    part = {"train": slice(cut), "validation": slice(cut, None), "test": slice(None)}[split]
    return name, images[part], labels[part]


def load_scenes(n, image_size=64, seed=0, source="auto", data_dir="data", split="train"):
    """`n` scenes of one to five digits of `source`, mnist, glyphs or auto, and of `split`.

    Each digit has its own colour, size and place, a cell of a 3x3 grid, moved a little, so that
    digits seldom hide one another. Returns (n, 3, image_size, image_size) float32 in [0, 1] and
    labels (n, 10) float32, 1 for digits present; the same for a `seed` and digits, whatever `n`.
    """
    _, images, labels = scene_digits(source, data_dir, split)
    side, rng = images.shape[-1], torch.Generator().manual_seed(seed)
    draws = torch.rand(n, 13 + 7 * MOST_DIGITS, generator=rng)  # a row for each scene
    ground, cells = 0.4 * draws[:, 1:4], draws[:, 4:13].argsort(1)
    slots = draws[:, 13:].view(n, MOST_DIGITS, 7)
    shown = torch.arange(MOST_DIGITS) < 1 + (draws[:, :1] * MOST_DIGITS).long()
    digit = (slots[..., 0] * len(images)).long()
    scale = image_size * (20 + 10 * slots[..., 1]) / (64 * side)  # 20 to 30 of 64 pixels
    place = torch.stack([cells // 3, cells % 3], 2)[:, :MOST_DIGITS] - 1
    centre = image_size * (0.5 + 0.29 * place + 0.06 * (2 * slots[..., 2:4] - 1))
    scenes = ground[..., None, None].repeat(1, 1, image_size, image_size)
    for slot in range(MOST_DIGITS):
        for rows in shown[:, slot].nonzero()[:, 0].split(64):  # 64 fit a CPU's cache
            # bilinear resampling is separable, as nothing turns: hat functions * digit * hats
            at = torch.arange(image_size) + 0.5 - centre[rows, slot, :, None]
            at = at / scale[rows, slot, None, None] + side / 2 - 0.5
            down, across = (1 - (at[..., None] - torch.arange(side)).abs()).clamp_(0).unbind(1)
            ink = down @ images[digit[rows, slot], 0] @ across.mT
            colour = 0.6 + 0.4 * slots[rows, slot, 4:, None, None]
            scenes[rows] = torch.lerp(scenes[rows], colour, ink[:, None])
    return scenes, torch.zeros(n, 10).scatter_reduce(1, labels[digit], shown.float(), "amax")


class Photos(torch.utils.data.Dataset):
    """Photos, read when asked for: each (3, S, S) float32 in [0, 1], a slice (N, 3, S, S), squashed
    by `resize(image, size, filter)`, upright as its EXIF says, transparency laid on white."""

    def __init__(self, paths, image_size, resize=Image.Image.resize):
        self.paths, self.image_size, self.resize = list(paths), image_size, resize

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return torch.stack([self[j] for j in range(len(self))[i]])
        path, size = self.paths[i], (self.image_size, self.image_size)
        with warnings.catch_warnings(action="ignore"), advise(path, "no photo that can be read"):
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = self.resize(image.convert("RGB"), size, Image.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


COCO_URL = "http://images.cocodataset.org/"


def load_coco(data_dir, image_size, limit=None, split="val2017"):
    """COCO's photos, labels and class names from `data_dir`/coco; what is absent is downloaded.

    Returns `Photos` in ascending id order (the first `limit`), labels (N, 80) float32, 1 for the
    classes present, and the names in ascending category id order; or raises Failure.
    """
    folder = Path(data_dir) / "coco"
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.exists():  # all annotations come in one file of 241 MB
        packed = path.with_name("annotations_trainval2017.zip")
        download(f"{COCO_URL}annotations/{packed.name}", packed)
        with advise(packed, f"delete it, or put {path.name} beside it"):
            text = zipfile.ZipFile(packed).read(f"annotations/{path.name}")
            write_file(path, lambda file: file.write(text))
    with advise(f"{path} is damaged, or not COCO's", "delete it, and it is downloaded again"):
        content = json.loads(path.read_bytes())
        images = {image["id"]: image["file_name"] for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        plain = {name for name in images.values() if re.fullmatch(r"[\w-]+\.\w+", name)}
        if not images or len(plain) < len(content["images"]):
            raise ValueError("no photo, one twice, or one such as ../../x, to be overwritten")
        row, column = ({key: i for i, key in enumerate(sorted(x))} for x in (images, categories))
        labels = torch.zeros(len(row), len(column))
        for annotation in content["annotations"]:
            labels[row[annotation["image_id"]], column[annotation["category_id"]]] = 1
    photos = [folder / split / images[key] for key in row][:limit]
    urls = [f"{COCO_URL}{split}/{photo.name}" for photo in photos]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(progress(pool.map(download, urls, photos), "photos", len(photos)))
    return Photos(photos, image_size), labels[:limit], [categories[key] for key in column]
