"""What the scripts share: errors, flags, the device, files, records, FID and the data sets."""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path

import numpy as np
import PIL
import scipy
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.linalg import sqrtm
from torch import nn
from torch.backends import cudnn
from torch.nn import functional as F
from torchvision.datasets import MNIST
from torchvision.models import inception_v3
from torchvision.transforms import Compose, RandomAffine, Resize, ToTensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

START = time.time()
PACKAGES = (torch, torchvision, np, scipy, PIL)
TIMEOUT = 20  # seconds that a server may stay silent


class Failure(Exception):
    """What went wrong, with which file or value, and what to do; `code` is the exit code."""

    def __init__(self, message, code=1):
        super().__init__(" ".join(message.split())[:1000])
        self.code = code


def run(main, interrupted="interrupted"):
    """Run `main()` as a script: an error ends it with one line on stderr and an exit code."""
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every letter
    code = 1
    try:
        return main()
    except Failure as problem:
        line = problem
        code = problem.code
    except OSError as problem:
        line = problem
    except KeyboardInterrupt:
        line = interrupted
        code = 130
    except (MemoryError, RuntimeError) as problem:
        # what Python, the CPU's and CUDA's allocators, and C++ say
        if not re.search(
            "MemoryError|(out of|allocate|enough) memory|ALLOC_FAILED|bad_alloc",
            repr(problem),
        ):
            raise
        line = "not enough memory; use smaller batches, or --device cpu"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


class HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows every flag's default, except for switches and None."""

    def _get_help_string(self, action):
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def number(kind, least, most=1_000_000_000):
    """An argparse type: an int or a float (`kind`) from `least` to `most`."""

    def number(text):
        value = kind(text)
        if least <= value <= most:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")

    return number


positive_int = number(int, 1)


def parser(script, description, out, datasets, dataset_help, limit_help):
    """An argparse parser with the flags of every script; the first data set is the default."""
    p = argparse.ArgumentParser(
        script, description=description, formatter_class=HelpFormatter
    )
    p.set_defaults(script=script)
    add = p.add_argument
    add("--data", default="data", help="folder of data sets and weights")
    add("--out", type=Path, default=out, help="folder that this run writes to")
    add("--dataset", choices=datasets, default=datasets[0], help=dataset_help)
    add("--limit", type=positive_int, metavar="N", help=limit_help)
    add("--seed", type=number(int, 0, 2**32), default=0, help="random seed")
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where networks run",
    )
    add("--force", action="store_true", help="overwrite what --out holds")
    return p


def pick_device(name):
    """The torch.device for `--device`; "auto" is a GPU if there is one, else the CPU.

    For the whole process, it also sets how memory is reused, and precision.
    """
    if platform.libc_ver()[0] == "glibc":
        # reusing freed memory makes training up to 10 % faster than returning it to the system
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: keep up to 1 GB
        mallopt(-4, 0)  # M_MMAP_MAX: a large tensor's would be returned at once
    torch.set_flush_denormal(True)  # weight averages decay into denormals, which are slow
    cudnn.deterministic = True
    cudnn.allow_tf32 = False  # float32 means float32
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cpu":
        return torch.device(name)
    rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun: one GPU per process
    if rank >= torch.get_device_module(name).device_count():
        raise Failure(
            f"there is no --device {name} for process {rank}; use --device cpu", 2
        )
    if name == "cuda":
        torch.cuda.set_device(rank)
    return torch.device(name, rank)


def has_bf16(device):
    """Whether `device` multiplies bfloat16 in hardware; if emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def progress(*args, **kwargs):
    """A tqdm bar; if stderr is no terminal, a line every half minute."""
    if not sys.stderr.isatty():
        kwargs.update(
            bar_format="{desc} {percentage:.0f}% {n_fmt}/{total_fmt}, {remaining} left\n",
            mininterval=30,
            maxinterval=60,
            delay=30,
        )
    return tqdm(*args, leave=False, ncols=100, **kwargs)


def flags_of(args, names):
    """{name: value} of the flags `names`."""
    return {name: getattr(args, name) for name in names}


@contextmanager
def hold(args, *must_match):
    """Create --out and keep other runs out of it.

    Raises Failure if one is running, or, without --force, if results.json is that of another script
    or was made with other values of the flags `must_match`.
    """
    folder = args.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the operating system releases a database's lock, however this process ends
        lock = sqlite3.connect(folder / ".lock", timeout=0)
        lock.execute("BEGIN EXCLUSIVE")
    except (OSError, sqlite3.Error):
        raise Failure(
            f"--out {folder} is in use by another run, read-only, or not a folder; choose another"
        ) from None
    with closing(lock):
        require_same_record(args, flags_of(args, ("script", *must_match)))
        for draft in folder.glob(".*.part"):  # of a run that was killed
            draft.unlink()
        yield


@contextmanager
def whole_file(path):
    """Open a binary file that takes the name `path` only once it has been written completely."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            yield file
        draft.replace(path)
    except (OSError, RuntimeError) as problem:  # torch.save raises the latter
        raise Failure(f"{path} was not written ({problem}); is the disk full?") from None
    finally:
        draft.unlink(missing_ok=True)


def save_png(path, image):
    """Write a PIL image to `path` as a PNG, atomically."""
    with whole_file(path) as file:
        image.save(file, "png")


def is_finite(content):
    """Whether every tensor in these nested dictionaries is finite."""
    if isinstance(content, dict):
        return all(map(is_finite, content.values()))
    return not isinstance(content, torch.Tensor) or content.isfinite().all()


def save(path, content, rates="its learning rate"):
    """Write `content` to `path` as torch.save does, but atomically; Failure if it holds NaN."""
    if not is_finite(content):
        raise Failure(f"{path} was not written: the training diverged; lower {rates}")
    with whole_file(path) as file:
        torch.save(content, file)


def load_checkpoint(path, advice, kind=None, settings=None):
    """The dictionary of tensors (on the CPU) and plain values that torch.save wrote to `path`.

    Nothing else is loaded, so that no file can run code. Raises Failure, whose text ends in
    `advice`, if the file is absent, damaged or unsafe, has another "kind", or holds NaN; and if any
    of its "settings" differs from these.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds
        raise Failure(
            f"{path} is absent, damaged, or holds more than a state dict; {advice}"
        ) from None
    if not isinstance(content, dict) or kind not in (None, content.get("kind")):
        raise Failure(f"{path} is not a checkpoint of {kind or 'a network'}; {advice}")
    if not is_finite(content):
        raise Failure(f"{path} holds a NaN or infinite weight; {advice}")
    if settings:
        require_same(path, content["settings"], settings)
    return content


def require_same(path, old, new):
    """Raise Failure if `path` was made with `old` settings that differ from the `new` ones."""
    for name, value in new.items():
        before = old.get(name)
        if before != value:
            raise Failure(
                f"{path} was made with {name} {before}, not {value}; "
                "choose another --out, or start anew with --force",
                2,
            )


def require_same_record(args, facts):
    """Raise Failure if results.json has other settings or `facts`, unless --force is given."""
    path = args.out / "results.json"
    if args.force or not path.exists():
        return
    try:
        record = json.loads(path.read_bytes())
        old = {**record, **record["settings"]}
    except (ValueError, KeyError, TypeError):
        old = {"script": "unknown, as the file is damaged"}
    require_same(path, old, json.loads(json.dumps(facts, default=str)))


def wilson(hits):
    """The rate of True in hits (N,) with its 95 % Wilson interval: {"rate", "low", "high", "n"};
    None if N is 0."""
    if len(hits) == 0:
        return None
    test = scipy.stats.binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(method="wilson")
    return {"rate": test.statistic, "low": low, "high": high, "n": test.n}


def cell(value):
    """A table's text for a number, a text, a `wilson` rate or None."""
    if isinstance(value, dict):
        return "{rate:.1%} [{low:.1%}, {high:.1%}]".format(**value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def print_table(head, rows):
    """Print a table whose first column is aligned to the left, the others to the right."""
    cells = np.array([[cell(value) for value in row] for row in [head, *rows]])
    widths = np.strings.str_len(cells).max(0)
    cells[:, 0] = np.strings.ljust(cells[:, 0], widths[0])
    for row in np.strings.rjust(cells, widths):
        print("  ".join(row))


def write_results(args, device, numbers, **facts):
    """Write `results.json`: the command, settings, versions, facts and numbers; returns it all."""
    git = subprocess.getoutput(
        f'git -C "{Path(__file__).parent}" describe --always --dirty 2>{os.devnull}'
    )
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": vars(args),
        **{package.__name__: package.__version__ for package in PACKAGES},
        "device": device,
        "bfloat16": has_bf16(device),
        "seconds": round(time.time() - START),
        "git": git,
        **facts,
        **numbers,
    }
    with whole_file(args.out / "results.json") as file:
        file.write(json.dumps(record, indent=2, default=str).encode())
    return record


def download(url, folder):
    """The path of `url`'s file in `folder`, fetched unless it is there. The names of PyTorch's
    files (x-0123abcd.pth) contain the first digits of their SHA-256, which are checked."""
    path = Path(folder, Path(url).name)
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            blocks = iter(lambda: response.read(2**20), b"")
            size = int(response.headers.get("Content-Length", 0))
            content = b"".join(progress(blocks, path.name, size >> 20, delay=5))
        expected = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
        digest = hashlib.sha256(content).hexdigest()
        if len(content) < size or (expected and not digest.startswith(expected[1])):
            raise OSError("the file is incomplete or not the expected one")
    except Exception as problem:  # urllib raises many kinds
        raise Failure(f"{url}: {problem}; put that file at {path} yourself") from None
    with whole_file(path) as file:
        file.write(content)
    return path


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians (Dowson & Landau 1982).

    Means (D,) and covariances (D, D), computed in float64; FID is this distance in Inception's
    features (Heusel et al. 2017, arXiv 1706.08500). ValueError for other shapes or NaN.
    """
    means = np.asarray_chkfinite([mu1, mu2], float)
    sigmas = np.asarray_chkfinite([sigma1, sigma2], float)
    if means.shape != sigmas.shape[:2]:
        raise ValueError("a mean must be (D,), and its covariance (D, D)")
    values, vectors = np.linalg.eigh(sigmas)
    rounding = values[:, -1:] * len(mu1) * sys.float_info.epsilon
    if (values > rounding).all():
        cross = np.trace(sqrtm(sigmas[0] @ sigmas[1])).real
    else:
        # sqrtm is slow and inexact where a covariance is singular, as it is with fewer samples
        # than D; with S = F F^T, the trace is the nuclear norm of F1^T F2
        values[values < rounding] = 0
        factors = vectors * values[:, None] ** 0.5
        cross = np.linalg.norm(factors[0].T @ factors[1], "nuc")
    shift = means[0] - means[1]
    return float(shift @ shift + values.sum() - 2 * cross)


def frechet_distance_torch(x, y):
    """The same distance between features x (N, D) and y (M, D): a scalar, differentiable in x.

    With centred features A, B over sqrt(n - 1), tr sqrt(S1 S2) is the nuclear norm of A B^T (N, M):
    exact also when N < D. Unlike the gradient of singular vectors, that of singular values divides
    by no differences between them. In float64, on the CPU. ValueError for NaN, or N or M below 2.
    """
    features = x.cpu().double()
    others = y.detach().cpu().double()
    mean = features.mean(0)
    other_mean = others.mean(0)
    a = (features - mean) / (len(x) - 1) ** 0.5
    b = (others - other_mean) / (len(y) - 1) ** 0.5
    shift = mean - other_mean
    traces = a.square().sum() + b.square().sum()
    separate = shift.square().sum() + traces
    if not separate.isfinite():  # NaN, or 0 / 0 where N or M is below 2
        raise ValueError("features must be finite, (N, D) and (M, D), N and M above 1")
    # QR shrinks A B^T to (N, D) at most
    s = torch.linalg.svdvals(a @ torch.linalg.qr(b, mode="r").R.T)
    rounding = s[0] * len(s) * sys.float_info.epsilon
    cross = s[s > rounding].sum()  # a singular value of 0 has no gradient
    return (separate - 2 * cross).to(x.dtype).to(x)


INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


def inception_weights(data_dir):
    """The path of INCEPTION_URL's file in `data_dir`, downloaded if absent."""
    return download(INCEPTION_URL, data_dir)


def inception_features(images, weights=None, device="cpu"):
    """FID's features (N, 2048), float32, of images (N, 1 or 3, H, W) in [0, 1], else ValueError.

    The network is TensorFlow's Inception v3: torchvision's with 1,008 outputs, average pooling that
    does not count the padding, and max pooling in the last block. `weights` is the path of
    INCEPTION_URL's file, downloaded to data/ if None. Raises Failure for another network's weights,
    or NaN.
    """
    images = torch.as_tensor(images)
    fit = images.ndim == 4 and images.shape[1] in (1, 3) and len(images)
    if not (fit and 0 <= images.min() <= images.max() <= 1):
        raise ValueError("images must be (N, 1 or 3, H, W), and in [0, 1]")
    weights = weights or inception_weights("data")
    state = load_checkpoint(weights, f"put {INCEPTION_URL} there")
    network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    try:
        network.load_state_dict(state)
    except RuntimeError as problem:
        raise Failure(f"{weights} is not {INCEPTION_URL}: {problem}") from None
    network.fc = nn.Identity()
    network.eval().to(device)
    network = torch.fx.symbolic_trace(network)
    pools = network.graph.find_nodes(op="call_function", target=F.avg_pool2d)
    for pool in pools[:-1]:
        pool.update_kwarg("count_include_pad", False)
    pools[-1].target = F.max_pool2d
    network.recompile()
    features = []
    with torch.inference_mode():
        for part in progress(images.split(50), "Inception"):
            part = part.to(device, torch.float32).expand(-1, 3, -1, -1)
            part = F.interpolate(part, 299, mode="bilinear")
            features.append(network(2 * part - 1).cpu())
    return torch.cat(features).numpy()


def load_mnist(data_dir, train=True):
    """MNIST's 60,000 training or 10,000 test digits, downloaded to `data_dir`/MNIST/raw if absent.

    Returns images (N, 1, 28, 28) float32 in [0, 1], labels (N,) int64; raises Failure.
    """
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
    try:
        digits = MNIST(data_dir, train, download=True)
        images = digits.data.view(len(digits.targets), 1, 28, 28)
        if digits.targets.max() > 9:
            raise ValueError("a label is above 9")
    except Exception as problem:  # torchvision raises many kinds
        raise Failure(
            f"{data_dir}/MNIST/raw could not be downloaded, or is damaged ({problem}); "
            "delete it, put MNIST's four .gz files there, or use --dataset glyphs"
        ) from None
    return images / 255, digits.targets


def glyphs(n, seed=0):
    """`n` digits in Pillow's built-in font, of random stroke, rotation, shear, scale and position.

    Returns what `load_mnist` does, the classes in turn; digit i depends on `seed`, not on `n`.
    """
    font = ImageFont.load_default(40)
    move = RandomAffine(17, (0.07, 0.07), (0.8, 1.2), 17, Image.BILINEAR)
    images = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for i in progress(range(n), "drawing digits"):
            canvas = Image.new("L", (56, 56))
            stroke = int(torch.randint(4, ()))
            ImageDraw.Draw(canvas).text(
                (28, 28), str(i % 10), 255, font, anchor="mm", stroke_width=stroke
            )
            images.append(pil_to_tensor(move(canvas).reduce(2)))
    return torch.stack(images) / 255, torch.arange(n) % 10


def load_digits(name, data_dir, train=True, limit=None, device="cpu"):
    """(Data set used, images, labels) of mnist, glyphs, or auto: MNIST if available."""
    used = "glyphs"
    if name != "glyphs":
        try:
            images, labels = load_mnist(data_dir, train)
            used = "mnist"
        except Failure as problem:
            if name == "mnist":
                raise
            print(
                "WARNING WARNING WARNING WARNING WARNING WARNING WARNING WARNING",
                problem,
                "GLYPHS are drawn instead: these are not results on MNIST.",
                sep="\n",
                file=sys.stderr,
            )
    if used == "glyphs":
        size = 60_000 if train else 10_000
        images, labels = glyphs(limit or size, seed=0 if train else 1)
    return used, images[:limit].to(device), labels[:limit].to(device)


class Photos:
    """Photos, read lazily: item i is (3, S, S), a slice (N, 3, S, S), float32 in [0, 1].

    Each is rotated as its EXIF says, put on white if transparent, and converted by `transform`;
    None squashes it to `image_size` pixels. Raises Failure for unreadable ones.
    """

    def __init__(self, paths, image_size, transform=None):
        self.paths = paths
        self.transform = transform or Compose(
            [Resize((image_size, image_size)), ToTensor()]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return torch.stack([self[j] for j in range(len(self))[i]])
        try:
            with Image.open(self.paths[i]) as image:
                if image.mode[0] in "IF":
                    raise ValueError("its pixels have more than 8 bits; convert it")
                image.getexif()  # or exif_transpose may fail to write a tag back
                image.info.pop("exif", None)
                image = ImageOps.exif_transpose(image).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return self.transform(image.convert("RGB"))
        except Exception as problem:  # Pillow raises many kinds
            raise Failure(f"{self.paths[i]} is not a readable photo: {problem}") from None


COCO_URL = "http://images.cocodataset.org/"


def load_coco(data_dir, image_size, limit=None, split="val2017"):
    """COCO's photos, labels and class names from `data_dir`/coco; what is absent is downloaded.

    Returns `Photos` in ascending id order (the first `limit`), labels (N, L) float32, 1 for the
    classes present, and the L names in ascending category id order; raises Failure.
    """
    folder = Path(data_dir, "coco")
    name = f"annotations/instances_{split}.json"
    path = folder / name
    try:
        if path.exists():
            text = path.read_bytes()
        else:  # all annotations come in one file of 241 MB
            path = download(
                f"{COCO_URL}annotations/annotations_trainval2017.zip", path.parent
            )
            text = zipfile.ZipFile(path).read(name)
        content = json.loads(text)
        files = dict(sorted((row["id"], row["file_name"]) for row in content["images"]))
        names = dict(
            sorted((row["id"], str(row["name"])) for row in content["categories"])
        )
        classes = list(dict.fromkeys(names.values()))  # equal names are one class
        labels = torch.zeros(len(files), len(classes))
        row_of = dict(zip(files, labels, strict=True))
        for annotation in content["annotations"]:
            column = classes.index(names[annotation["category_id"]])
            row_of[annotation["image_id"]][column] = 1
        # folders in a file name are dropped, so that no photo lands elsewhere
        urls = [f"{COCO_URL}{split}/{Path(file).name}" for file in files.values()]
        if not 0 < len(set(urls)) == len(content["images"]):
            raise ValueError("it has no photo, or one twice")
    except Failure:
        raise
    except Exception as problem:  # a damaged file can raise almost anything
        raise Failure(
            f"{path} is not in COCO's format ({problem!r}); fix it, or delete it for a new copy"
        ) from None
    urls = urls[:limit]
    with ThreadPoolExecutor(8) as pool:
        downloads = pool.map(download, urls, repeat(folder / split))
        paths = list(progress(downloads, "photos", len(urls)))
    return Photos(paths, image_size), labels[:limit], classes
