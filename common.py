"""What every script shares: flags, device, datasets, Frechet distance, whole-or-nothing files, the record of a run.

Nothing here knows of any experiment. torch is imported inside the functions that need it, so that `--help` and a
mistyped flag answer at once instead of after the seconds that torch takes to load.
"""

import argparse
import concurrent.futures
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

START = time.time()

# ------------------------------------------------------------------------------------------------- errors, for people


class Failure(Exception):
    """What went wrong, with which file or value, and what to do, in one line; the script ends with exit code 1."""

    code = 1


class Misuse(Failure):
    """The command asks for something that makes no sense; exit code 2, as argparse does for an unknown flag."""

    code = 2


class Stopped(Failure):
    """Ctrl-C, at a moment that can be resumed from; exit code 130, as shells have it."""

    code = 130


def before_torch(settings):
    """Let `--help` and mistyped flags answer, and Ctrl-C end quietly, before the seconds that torch takes to load."""
    settings()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main):
    """Call `main()` as a script: what goes wrong ends in one line on stderr and an exit code, never in a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
        return
    except Failure as problem:  # of a DataLoader's worker: the last line of its traceback
        line, code = f"error: {str(problem).strip().splitlines()[-1].removeprefix('common.Failure: ')}", problem.code
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        line, code = f"error: {where}{problem.strerror or problem}", 1
    except KeyboardInterrupt:
        line, code = "interrupted; nothing is half written; run it again, with --resume where it has that", 130
    except (MemoryError, RuntimeError) as problem:  # torch.OutOfMemoryError, and the CPU's allocator
        if isinstance(problem, RuntimeError) and not re.search("out of memory|can't allocate memory", str(problem)):
            raise
        line, code = "error: not enough memory; lower --batch-size, --width or --limit, or use --device cpu", 1
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it is full or closed; Python would say so once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


@contextlib.contextmanager
def ctrl_c():
    """Yields an object whose `.pressed` the first Ctrl-C sets, so that a loop can end between two steps; the second
    interrupts at once."""
    state = types.SimpleNamespace(pressed=False)

    def handler(*_):
        state.pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------------------------------------------------- flags and device


def parser(doc, script, dataset, datasets, meaning, limit="use only the first N training images; None: all"):
    """An argparse parser with the flags every script has; `--help` shows `doc` and every default.

    `meaning`, `limit`: what the script's help says of --dataset and --limit.
    """

    both = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=type("Formatter", both, {}))
    add = p.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of the datasets and downloaded weights")
    add("--out", type=Path, default=Path("runs") / script, help="folder for what this run writes")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of every random number")
    add("--dataset", choices=datasets, default=dataset, help=meaning)
    add("--limit", type=whole(1), metavar="N", help=limit)
    return p


def whole(least, most=math.inf):
    """An argparse type: a whole number from `least` to `most`."""

    def number(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is {f'less than {least}' if value < least else f'above {most}'}")
        return value

    return number


def positive(text):
    """An argparse type: a positive finite number, also as a fraction such as 8/255."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def pick_device(name):
    """The torch.device for `--device`: auto is CUDA where there is one, else Apple's GPU, else the CPU."""
    import torch

    torch.set_flush_denormal(True)  # averages decay into denormals, with which a CPU computes many times slower
    torch.backends.cudnn.deterministic = True  # same seed, same machine: same result
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in have.items() if there)
    if not have[name]:
        raise Misuse(f"--device {name}: this machine, or this build of torch, has none; use --device cpu")
    return torch.device(name)


def has_bf16(device):
    """Whether `device` multiplies bfloat16 in hardware; where it is emulated, float32 is faster."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# ------------------------------------------------------------------------------------------ files: whole or not at all


def make_folder(folder):
    """Create `folder` and prove that it can be written, so that a run of an hour doesn't find out at its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", lambda file: None)
        (folder / ".writable").unlink()
    except OSError as problem:
        raise Failure(f"cannot write to {folder} ({problem.strerror}); choose another folder with --out") from None


def write_whole(path, write):
    """Have `write(file)` fill a file of a temporary name, then rename it: a reader finds the old file or the new one.

    Raises OSError naming `path` if it can't be written, and leaves nothing behind.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as problem:
        raise OSError(problem.errno, f"cannot write it ({problem.strerror})", str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


def save_checkpoint(path, content):
    """Write a dictionary of tensors, numbers and strings that `load_checkpoint` reads."""
    import torch

    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error of its own kind
    torch.save(content, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def load_weights(path, advice):
    """The dictionary that `torch.save` wrote to `path`, on the CPU.

    Only tensors and plain values are ever unpickled (`weights_only=True`): a hostile file is refused, not run.
    Raises Failure, ending in `advice`, if the file is absent, damaged or hostile.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on foreign files; ours is the one line below
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as problem:
        raise Failure(f"cannot read {path} ({problem.strerror}); {advice}") from None
    except Exception:  # torch has no one exception for what can be wrong with a file; whichever it is, the advice holds
        raise Failure(f"{path} is damaged, or no checkpoint; {advice}") from None


def load_checkpoint(path, kind, advice):
    """What a script saved to `path` with `kind` under "kind"; raises Failure as `load_weights`, or for another kind."""
    content = load_weights(path, advice)
    if content.get("kind") != kind:
        raise Failure(f"{path} is not a checkpoint of {kind}; {advice}")
    return content


def load_run(path, kind, shape, take):
    """Have `take(content)` take over the checkpoint that a run of `kind` left at `path`, to go on with it.

    Raises Misuse if there is none, or one whose "shape", the settings that made it what it is, is not `shape`; Failure
    if it is damaged, or `take` fails.
    """
    anew = "leave out --resume to train from the start"
    if not path.exists():
        raise Misuse(f"there is nothing to resume: no {path}; {anew}")
    there = load_checkpoint(path, kind, anew)
    other = there["shape"] if isinstance(there.get("shape"), dict) else {}
    if differ := [f"{k} {other.get(k)} there and {v} here" for k, v in shape.items() if v != other.get(k)]:
        raise Misuse(f"--resume contradicts {path}: {', '.join(differ)}")
    try:
        take(there)
    except Exception as problem:  # whatever in it is of another shape or type than a run of this version saves
        raise Failure(f"{path} does not fit this version ({problem!r:.99}); {anew}") from None


# ----------------------------------------------------------------------------------------------- the record of a run


def wilson(hits, n, z=1.959964):
    """A rate with its 95 % interval, as `{"rate", "low", "high", "n"}` (Wilson 1927)."""
    p, q = hits / n, z * z / n
    centre, half = (p + q / 2) / (1 + q), (p * (1 - p) * q + q * q / 4) ** 0.5 / (1 + q)
    return {"rate": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def percent(rate):
    """A `wilson` record as text."""
    return f"{rate['rate']:.2%} [{rate['low']:.2%}, {rate['high']:.2%}] of {rate['n']:,}"


def cell(x):
    """A number, a `wilson` record or None as a cell of a table."""
    if isinstance(x, dict):
        return f"{x['rate']:.1%} [{x['low']:.1%}, {x['high']:.1%}]"
    return "-" if x is None else x if isinstance(x, str) else f"{x:.2f}" if isinstance(x, float) else f"{x:,}"


def print_table(head, lines):
    """Print the columns, each as wide as its widest cell, the first one to the left."""
    lines = [[cell(x) for x in line] for line in [head, *lines]]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        print(first.ljust(wide[0]), *(x.rjust(w) for x, w in zip(others, wide[1:], strict=True)), sep="  ")


def write_results(args, numbers, **facts):
    """Write `results.json`: how the numbers came about (command, settings, machine, versions), and the numbers."""
    import PIL
    import scipy
    import torch
    import torchvision

    try:
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        revision = ""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "settings": {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(args).items()},
        **facts,
        "cpu_threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np, scipy, PIL)},
        "python": platform.python_version(),
        "git": revision or None,
        "seconds": round(time.time() - START, 1),
        **numbers,
    }
    write_whole(args.out / "results.json", lambda file: file.write(json.dumps(record, indent=2).encode() + b"\n"))
    return record


# ----------------------------------------------------------------------------------------------------------- downloads


# no network, a wrong hash, a full disk; a proxy's own page
NO_DOWNLOAD = (OSError, RuntimeError, http.client.HTTPException)


def download(url, path, bar=None, sha256=""):
    """Fetch `url` into the file `path`, whole or not at all; what an earlier call left in `path`.part is gone on from.

    `bar`: tqdm's `disable`; `sha256`: how the content's hash, in hexadecimal, begins. Raises Failure in one line that
    says which file to put where.
    """
    from tqdm import tqdm

    draft = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = draft.stat().st_size if draft.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
        opener = urllib.request.build_opener()  # urlopen's own goes on with the proxies of its first call
        with opener.open(request, timeout=20) as answer, open(draft, "ab") as file:
            if answer.status != 206:  # all of it comes, whatever was asked for
                there = file.truncate(0)
            total = there + answer.length if answer.length else None
            with tqdm(desc=path.name, total=total, initial=there, unit="B", unit_scale=True, disable=bar) as shown:
                while data := answer.read(1 << 20):
                    file.write(data)
                    shown.update(len(data))
            if answer.length:  # what read() left to come, without a word
                raise OSError("the connection broke off; the next run goes on from there")
            file.flush()
            os.fsync(file.fileno())
        with open(draft, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(sha256):
            draft.unlink()
            raise OSError(f"what came is another file: its SHA-256 is {digest}, not {sha256}...")
        os.replace(draft, path)
    except NO_DOWNLOAD as problem:
        if getattr(problem, "code", 0) == 416 and draft.exists():  # the part is no part of what is there now
            draft.unlink()
            return download(url, path, bar, sha256)
        raise Failure(f"could not download {url} ({problem}); put that file at {path}") from None


# ---------------------------------------------------------------------------------------------------- Frechet distance


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 sqrt(S1 S2)): squared Frechet distance of two Gaussians (Dowson & Landau 1982).

    Means (D,) and covariances (D, D), taken to float64; returns a float. FID is this on Inception features (Heusel et
    al. 2017, arXiv 1706.08500). Raises ValueError for shapes that don't match and for numbers that aren't finite.
    """
    import scipy.linalg

    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    d = mu1.shape[-1] if mu1.ndim == 1 else -1
    if not (mu2.shape == (d,) and sigma1.shape == sigma2.shape == (d, d)):
        shapes = ", ".join(str(x.shape) for x in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"means must be (D,) and covariances (D, D) with one D; got {shapes}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite: were there fewer than two samples, or NaN features?")
    try:
        pivots = [np.diag(scipy.linalg.cholesky(s, lower=True)) for s in (sigma1, sigma2)]
        singular = any(p.min() < 1e-6 * p.max() for p in pivots)
    except np.linalg.LinAlgError:
        singular = True
    if singular:  # rounding turns zero eigenvalues of S1 S2 negative or complex, and sqrtm slow and inexact
        cross = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    else:
        cross = np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def _root(sigma):
    """F (D, rank) with F F^T = sigma, from the eigenvalues that rounding leaves above zero."""
    values, vectors = np.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * np.finfo(float).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance_torch(x, y):
    """The same distance from features, differentiable: x (N, D) and y (M, D), N and M at least 2; returns a scalar.

    With A, B the centred features over sqrt(n - 1), S1 = A^T A and S2 = B^T B, and tr sqrt(S1 S2) is the nuclear norm
    of A B^T (N, M). So few samples need neither a (D, D) root nor one of zero; and where samples outnumber dimensions,
    QR shrinks A to its triangle first. The nuclear norm's gradient is the polar factor U V^T (Watson 1992); it is
    used as it stands, because autograd's way through an SVD divides by differences of singular values.
    Computes in float64 where the device has it. Raises ValueError as `frechet_distance` does.
    """
    import torch

    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D) with one D; got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs at least two samples; got {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("a feature is not finite")
    dtype, exact = x.dtype, torch.float32 if x.device.type == "mps" else torch.float64
    x, y = x.to(exact), y.to(exact)
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    with torch.no_grad():
        (qa, ra), (qb, rb) = (torch.linalg.qr(z) if len(z) > z.shape[1] else (None, z) for z in (a, b))
        u, s, vh = torch.linalg.svd(ra @ rb.T, full_matrices=False)
        # a null direction has no polar factor
        keep = s > s.max() * max(len(ra), len(rb)) * torch.finfo(exact).eps
        polar = u[:, keep] @ vh[keep]
        grad_a, grad_b = polar @ rb, polar.T @ ra
        grad_a, grad_b = (g if q is None else q @ g for q, g in ((qa, grad_a), (qb, grad_b)))
    cross = (a * grad_a).sum() + (b * grad_b).sum() - s.sum()  # = s.sum(), with the gradients of the nuclear norm
    return ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross).to(dtype)


INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # TensorFlow's Inception of that day; the end is its SHA-256's start
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"


def inception_weights(data_dir):
    """The path of `INCEPTION` in `data_dir`, where it is downloaded if absent, as `download` does."""
    path = Path(data_dir) / INCEPTION
    if not path.exists():
        download(INCEPTION_URL, path, sha256=INCEPTION[-12:-4])
    return path


def inception_network(weights, device="cpu"):
    """The Inception v3 that FID is defined on: images (N, 3, 299, 299) in [-1, 1] -> its 2,048 pooled features.

    TensorFlow's network of 2015-12-05 as patches of torchvision's: 1,008 outputs, average pooling that doesn't count
    the padding, and max pooling in the last block. `weights`: path of that network's published state dict.
    """
    import torch
    import torch.nn.functional as F
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    advice = f"put there {INCEPTION} from {INCEPTION_URL}"
    state = load_weights(weights, advice)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise Failure(f"{weights} does not hold the weights of FID's Inception network; {advice}") from None

    def uncount_padding(_, pooled):  # torchvision has divided every 3x3 sum by 9, also where padding was part of it
        inside = F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, 1, 1)
        return pooled[0] / inside

    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        getattr(network, name).branch_pool.register_forward_pre_hook(uncount_padding)
    last, seen = network.Mixed_7c, []
    last.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    last.branch_pool.register_forward_pre_hook(lambda _, pooled: F.max_pool2d(seen.pop(), 3, 1, 1))
    network.fc = torch.nn.Identity()
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def inception_features(images, weights=None, device="cpu", batch=50):
    """FID's features (N, 2048), a float32 array, of images (N, 1 or 3, H, W) in [0, 1]; one channel stands for three.

    `weights`: path of `INCEPTION`; None: data/, where it is downloaded once. Raises ValueError for other images, and
    Failure for weights that are absent or another network's.
    """
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (N, 1 or 3, H, W); got {tuple(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (images.is_floating_point() and 0 <= low <= high <= 1):
        raise ValueError(f"images must be floats in [0, 1]; got {images.dtype} from {low} to {high}")
    network, features = inception_network(weights or inception_weights("data"), device), []
    with torch.inference_mode(), tqdm(total=len(images), desc="Inception", unit="image", disable=None) as bar:
        for part in images.split(batch):
            part = part.to(device, torch.float32).expand(-1, 3, -1, -1)
            part = F.interpolate(part, (299, 299), mode="bilinear", align_corners=False)
            features.append(network(2 * part - 1).cpu())
            bar.update(len(part))
    return torch.cat(features).numpy()


# ------------------------------------------------------------------------------------------------------------ datasets


def read_idx(path):
    """The array in an IDX file of unsigned bytes (LeCun's MNIST page); gzipped, if only `path`.gz is there."""
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    try:
        data = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise Failure(f"cannot read {path} ({problem}); delete it, and it is downloaded again") from None
    dims = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dims
    if data[:3] != b"\0\0\x08" or not 1 <= dims <= 3 or len(data) < start:
        raise Failure(f"{path} is not an IDX file of bytes; delete it, and it is downloaded again")
    shape = tuple(np.frombuffer(data, ">u4", dims, offset=4).tolist())
    if len(data) - start != math.prod(shape):
        raise Failure(
            f"{path} is truncated or damaged: {len(data) - start:,} bytes of data where its header says {shape}; "
            "delete it, and it is downloaded again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def mnist_files(data_dir, train):
    """The paths of a split's images and labels."""
    split = "train" if train else "t10k"
    return [Path(data_dir) / "MNIST" / "raw" / f"{split}-{part}-ubyte" for part in ("images-idx3", "labels-idx1")]


def fetch_mnist(data_dir):
    """Have torchvision download MNIST (hashes checked) into `data_dir`, unless its four files are there already."""
    files = mnist_files(data_dir, True) + mnist_files(data_dir, False)
    missing = [f.name for f in files if not f.exists() and not f.with_name(f.name + ".gz").exists()]
    if not missing:
        return
    raw, before = files[0].parent, socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(20)  # torchvision would wait for ever for a connection that brings no byte
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw) as draft, contextlib.redirect_stdout(sys.stderr):
            from torchvision.datasets import MNIST

            MNIST(draft, download=True)
            for f in files:
                os.replace(Path(draft) / "MNIST" / "raw" / f.name, f)
    except NO_DOWNLOAD as problem:
        raise Failure(
            f"MNIST could not be downloaded ({' '.join(str(problem).split())}); put {', '.join(missing)} into {raw}, "
            "or use --dataset glyphs, which needs no file"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def load_mnist(data_dir, train=True):
    """MNIST's digits from `data_dir`/MNIST/raw, downloaded if absent.

    Returns images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64, N = 60,000 or, if not `train`, 10,000.
    Raises Failure, naming the files and the folder, if they are absent and can't be downloaded, or are damaged.
    """
    import torch

    fetch_mnist(data_dir)
    images, labels = map(read_idx, paths := mnist_files(data_dir, train))
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not len(labels) or labels.max() > 9:
        raise Failure(
            f"{paths[0]} and {paths[1].name} are not MNIST: images {images.shape}, labels {labels.shape}; "
            "delete them, and they are downloaded again"
        )
    return torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def glyphs(n, seed=0):
    """`n` digits in Pillow's built-in font, each with its own stroke width, rotation, shear, scale and place.

    Returns images (n, 1, 28, 28) float32 in [0, 1], white on black, and labels (n,) int64, the classes in turn; the
    same for the same `seed`, whatever `n`.
    """
    import torch
    import torch.nn.functional as F
    from PIL import Image, ImageDraw, ImageFont

    canvas, strokes = 56, 4
    prototypes = np.zeros((10, strokes, canvas, canvas), np.float32)
    for digit in range(10):
        for stroke in range(strokes):
            image = Image.new("L", (canvas, canvas))
            ImageDraw.Draw(image).text(
                (canvas / 2, canvas / 2), str(digit), 255, ImageFont.load_default(40), "mm", stroke_width=stroke
            )
            prototypes[digit, stroke] = np.asarray(image) / np.float32(255)
    labels = torch.arange(n) % 10
    draws = torch.rand(n, 7, generator=torch.Generator().manual_seed(seed))  # a row an image: the first n are any n's
    width = (draws[:, 6] * strokes).long()
    angle, shear, x, y, scale_x, scale_y = (draws[:, :6] * 2 - 1).unbind(1)
    angle, shear = 0.3 * angle, 0.3 * shear  # radians: 17 degrees to either side
    a, b = torch.cos(angle) / (0.8 + 0.15 * scale_x), -torch.sin(angle) / (0.8 + 0.15 * scale_y)
    affine = torch.stack([torch.stack([a, b + shear, 0.15 * x], 1), torch.stack([-b, a, 0.15 * y], 1)], 1)
    images = torch.empty(n, 1, 28, 28)
    for part in torch.arange(n).split(2000):
        drawn = torch.from_numpy(prototypes)[labels[part], width[part]].unsqueeze(1)
        grid = F.affine_grid(affine[part], (len(part), 1, canvas, canvas), align_corners=False)
        images[part] = F.avg_pool2d(F.grid_sample(drawn, grid, align_corners=False), 2)
    return images.clamp_(0, 1), labels


def load_digits(name, data_dir, train=True, limit=None):
    """The digits that `--dataset` names: `mnist`, `glyphs`, or `auto`: MNIST where it is or can be had, else glyphs.

    Returns (name of the set used, images, labels) as `load_mnist` and `glyphs` do; glyphs are as many as MNIST's.
    """
    if name == "auto":
        try:
            fetch_mnist(data_dir)
            name = "mnist"
        except Failure as problem:
            name = "glyphs"
            line = "*" * 100
            print(f"{line}\nWARNING: {problem}\nGoing on with GLYPHS, drawn digits: no number of this run is a result "
                  f"on MNIST.\n{line}", file=sys.stderr)  # fmt: skip
    if name == "glyphs":
        images, labels = glyphs(limit or 60_000, 0) if train else glyphs(10_000, 1)
    else:
        images, labels = load_mnist(data_dir, train)
    return name, images[:limit], labels[:limit]


# ---------------------------------------------------------------------------------------------- multi-label: scenes

MOST_DIGITS = 5  # in a scene


def scene_digits(source, data_dir, split):
    """The digits that scenes are made of; `source` as `load_digits`'s name, `split` one of train, validation, test.

    Returns what `load_digits` does. The splits share no digit: validation is the last twelfth of the training digits.
    """
    name, images, labels = load_digits(source, data_dir, split != "test")
    cut = len(images) - len(images) // 12
    part = {"train": slice(cut), "validation": slice(cut, None), "test": slice(None)}[split]
    return name, images[part], labels[part]


def compose_scenes(images, labels, n, image_size=64, seed=0):
    """`n` scenes of one to five of the given digits, (M, 1, H, W) in [0, 1] with labels (M,) int64 from 0 to 9.

    Each digit has its own colour, size and place, on a darker ground; places are cells of a 3x3 grid, moved a little,
    so that digits touch but seldom hide one another. Returns (n, 3, image_size, image_size) float32 in [0, 1] and
    labels (n, 10) float32, 1 for the digits present; the same for the same `seed` and digits, whatever `n`.
    """
    import torch

    side = images.shape[-1]
    draws = torch.rand(n, 13 + 7 * MOST_DIGITS, generator=torch.Generator().manual_seed(seed))  # a row a scene
    ground, cells, slots = 0.4 * draws[:, 1:4], draws[:, 4:13].argsort(1), draws[:, 13:].view(n, MOST_DIGITS, 7)
    shown = torch.arange(MOST_DIGITS) < 1 + (draws[:, :1] * MOST_DIGITS).long()
    digit = (slots[..., 0] * len(images)).long()
    scale = image_size * (20 + 10 * slots[..., 1]) / (64 * side)  # 20 to 30 of 64 pixels
    cell = torch.stack([cells // 3, cells % 3], 2)[:, :MOST_DIGITS] - 1
    centre = image_size * (0.5 + 0.29 * cell + 0.06 * (2 * slots[..., 2:4] - 1))
    scenes = ground[..., None, None].repeat(1, 1, image_size, image_size)
    for slot in range(MOST_DIGITS):
        for rows in shown[:, slot].nonzero()[:, 0].split(64):  # 64 fit a CPU's cache
            # bilinear resampling, separable because nothing turns: hat functions times the digit times hat functions
            at = torch.arange(image_size) + 0.5 - centre[rows, slot, :, None]
            at = at / scale[rows, slot, None, None] + side / 2 - 0.5
            down, across = (1 - (at[..., None] - torch.arange(side)).abs()).clamp_(0).unbind(1)
            ink = down @ images[digit[rows, slot], 0] @ across.mT
            colour = 0.6 + 0.4 * slots[rows, slot, 4:, None, None]
            scenes[rows] = torch.lerp(scenes[rows], colour, ink[:, None])
    return scenes, torch.zeros(n, 10).scatter_reduce(1, labels[digit], shown.float(), "amax")


def load_scenes(n, image_size=64, seed=0, source="auto", data_dir="data", split="train"):
    """`n` scenes, images (n, 3, image_size, image_size) and labels (n, 10), as `compose_scenes` makes them.

    `source`: mnist, glyphs or auto; `split`: train, validation or test, which share no digit.
    """
    return compose_scenes(*scene_digits(source, data_dir, split)[1:], n, image_size, seed)


# ---------------------------------------------------------------------------------------------- multi-label: photos


def open_photo(path):
    """The photo in an image file as a Pillow RGB image: upright as its EXIF says, transparency laid on white.

    Raises Failure naming the file if it is absent, damaged or truncated, or holds no 8- or 16-bit image.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("floating point")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise Failure(f"there is no {path}") from None
    except Exception as problem:  # Pillow has no one exception for what can be wrong with a file
        raise Failure(f"{path} is no photo that can be read ({' '.join(str(problem).split()):.120})") from None


def load_photo(path, image_size, crop=False):
    """One photo, (3, image_size, image_size) float32 in [0, 1], squashed to the square, or, with `crop`, the middle 7/8
    of it cut out as ImageNet's networks are shown theirs; raises as `open_photo` does."""
    import torch
    from PIL import Image, ImageOps

    image, size = open_photo(path), (image_size, image_size)
    image = ImageOps.fit(image, size, Image.BILINEAR, 1 / 16) if crop else image.resize(size, Image.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Photos:
    """Photos read when they are asked for: `photos[i]` is (3, S, S), `photos[a:b]` and `photos[[i, j]]` (N, 3, S, S).

    A torch Dataset in all but name (importing torch takes seconds): a DataLoader takes it, with workers.
    """

    def __init__(self, paths, image_size, crop=False):
        self.paths, self.shape, self.crop = list(paths), (len(paths), 3, image_size, image_size), crop

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        import torch

        if isinstance(index, slice):
            index = range(len(self))[index]
        elif not hasattr(index, "__len__") or getattr(index, "ndim", 1) == 0:
            return load_photo(self.paths[index], self.shape[-1], self.crop)
        photos = [load_photo(self.paths[i], self.shape[-1], self.crop) for i in index]
        return torch.stack(photos) if photos else torch.empty(0, *self.shape[1:])


COCO_URL = "http://images.cocodataset.org/"


def load_coco(data_dir, image_size, limit=None, split="val2017"):
    """COCO's photos, labels and class names from `data_dir`/coco; what is absent is downloaded.

    Reads annotations/instances_<split>.json and <split>/*.jpg. Returns `Photos` of N photos in ascending id order (the
    first `limit`), labels (N, 80) float32, 1 for the classes present, and the 80 names, in ascending category id order.
    A photo without annotation has no label. Raises Failure naming the file that is absent, damaged or hostile.
    """
    folder = Path(data_dir) / "coco"
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.exists():
        fetch_annotations(path)
    urls, labels, class_names = read_instances(path, f"{COCO_URL}{split}/")
    urls, labels = dict(list(urls.items())[:limit]), labels[:limit]
    photos = {folder / split / name: url for name, url in urls.items()}
    fetch_photos({photo: url for photo, url in photos.items() if not photo.exists()})
    return Photos(photos, image_size), labels, class_names


def read_instances(path, base_url):
    """COCO's instances file: {file name: url} in ascending id order, labels (N, L) float32, class names."""
    import torch

    def check(good, what):
        if not good:
            raise Failure(f"{path} is damaged, or not COCO's: {what}; delete it, and it is downloaded again")

    try:
        content = json.loads(path.read_bytes())
        categories = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        images = {i["id"]: i for i in sorted(content["images"], key=lambda i: i["id"])}
        names = [(i["file_name"], i.get("coco_url")) for i in images.values()]
        present = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
        check(len(categories) == len(set(categories.values())) == len(content["categories"]), "a category comes twice")
        check(len(images) == len(content["images"]), "two photos have one id")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        check(False, f"{type(problem).__name__}: {' '.join(str(problem).split()):.120}")
    check(images and categories, "no photo, or no category")
    urls = {}
    for name, url in names:
        # a name such as ../../x would read, or have downloaded, a file outside its folder
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:") and name.strip(". ")
        check(plain, f"{name!r:.99} is not the name of a file in its folder")
        check(name not in urls, f"{name} comes twice")
        urls[name] = url if isinstance(url, str) and url.startswith(COCO_URL) else base_url + name
    check(all(isinstance(name, str) and name.isprintable() for name in categories.values()), "a class name is no text")
    row, column = ({key: place for place, key in enumerate(keys)} for keys in (images, categories))
    labels = torch.zeros(len(images), len(categories))
    for image, category in present:
        check(image in row, f"an annotation is of photo {image!r:.99}, which is not listed")
        check(category in column, f"an annotation is of category {category!r:.99}, which is not listed")
        labels[row[image], column[category]] = 1
    return urls, labels, list(categories.values())


def fetch_annotations(path):
    """Download COCO 2017's annotations (241 MB), and keep the one file of them that `path` names."""
    packed = path.with_name("annotations_trainval2017.zip")
    try:
        download(f"{COCO_URL}annotations/{packed.name}", packed)
        with zipfile.ZipFile(packed) as file, file.open(f"annotations/{path.name}") as source:
            write_whole(path, lambda target: shutil.copyfileobj(source, target))
    except Failure as problem:
        raise Failure(f"there is no {path}, and {problem}, or put {path.name} there yourself") from None
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as problem:
        packed.unlink()
        raise Failure(f"{packed} is damaged ({problem}); it is downloaded again by the next run") from None
    packed.unlink()


def fetch_photos(urls):
    """Download {path: url}, eight at a time."""
    from tqdm import tqdm

    if not urls:
        return
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(download, url, path, True) for path, url in urls.items()]
        try:
            for job in tqdm(concurrent.futures.as_completed(jobs), "photos", len(jobs), unit="photo", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def load_imagenet(data_dir, image_size, class_names, limit=None):
    """ImageNet's photos in `data_dir`/imagenet as `Photos`, cropped, and their classes, (N,) int64.

    The class, a place in `class_names`, is in the file's name (n01440764_tench.JPEG), or, where there is a folder for
    each class (n01440764/x.JPEG), the folder's place among them; -1 where neither says it. Raises Failure if there are
    no photos.
    """
    import torch

    folder = Path(data_dir) / "imagenet"
    kinds = {".jpeg", ".jpg", ".png"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)[:limit]
    if not paths:
        raise Failure(f"there is no photo in {folder}; put some there, named as n01440764_tench.JPEG is")
    folders = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"n\d{8}", path.name))
    places = {name: i for i, name in enumerate(folders)} if len(folders) == len(class_names) else {}
    # not the two cranes and the two maillots
    places |= {name: i for i, name in enumerate(class_names) if class_names.count(name) == 1}

    def place(path):
        name = path.stem.partition("_")[2].replace("_", " ")
        return places.get(path.parent.name, places.get(name, -1))

    return Photos(paths, image_size, True), torch.tensor([place(path) for path in paths])
