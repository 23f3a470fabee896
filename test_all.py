"""Every test: `pytest test_all.py`. No network, no GPU, no file but what the tests make."""

import ast
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
import torchvision
import tqdm.std
from PIL import Image, ImageOps
from torch import nn

import acwgan
import asl_model
import common
import pgd_attack
import transfer

# --- common


HERE = Path(common.__file__).parent


NOWHERE = "http://127.0.0.1:9/"  # refuses every connection at once


def script(*command, cwd=None, **kwargs):
    """Run a script as a user does; returns the finished process with its text."""
    command = [sys.executable, HERE / command[0], *map(str, command[1:])]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=280, **kwargs)


def fails(process, code, *words):
    """Assert that a script ended with `code` and one short line that holds all `words`."""
    assert process.returncode == code, process.stderr
    *usage, last = process.stderr.strip().splitlines()
    assert not usage or usage[0].startswith("usage:"), process.stderr
    assert len(last) <= 300
    for word in words:
        assert word in last, last


@contextlib.contextmanager
def refused(*words, code=1):
    """Assert that a `Failure` with `code` is raised, one short line that holds all `words`."""
    with pytest.raises(common.Failure) as caught:
        yield
    text = str(caught.value)
    assert (caught.value.code, text.isprintable(), len(text) <= 300) == (code, True, True), text
    assert all(str(word) in text for word in words), text


def stop_once_there_is(path, stop, *command):
    """Run a script until it has written `path`, then send it the signal `stop`."""
    command = [sys.executable, HERE / command[0], *map(str, command[1:])]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(stop)
    stderr = process.communicate(timeout=60)[1]
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in stderr.splitlines()[-1]


def photo_like(n, size, seed=0):
    """Images that differ in colour and brightness, as photos do, unlike mere noise."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 1, 1, generator=rng) * torch.rand(n, 3, size, size, generator=rng)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """What a test would download is nowhere; a server of its own is asked without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [NOWHERE])
    monkeypatch.setattr(common, "COCO_URL", NOWHERE)
    monkeypatch.setattr(common, "INCEPTION_URL", NOWHERE)


@pytest.mark.parametrize("text", ["8/0", "0/8", "eight", "", "-1", "nan", "1/2/3", "inf"])
def test_numbers_on_the_command_line_may_be_fractions(text):
    assert (common.positive("8/4"), common.positive("0.031"), common.whole(2)("2")) == (2, 0.031, 2)
    for number in (common.positive, common.whole(2)):
        with pytest.raises(ValueError):  # noqa: PT011
            number(text)


def test_a_process_has_a_gpu_of_its_own_in_float32_or_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    for gpus, rank, device in ((1, 0, "cuda:0"), (2, 1, "cuda:1"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
        assert common.pick_device("auto") == torch.device(device)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.deterministic
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with refused("--device cuda", "process 1", "--device cpu", code=2):
        common.pick_device("cuda")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_now_and_then_a_line_elsewhere(monkeypatch, terminal):
    stream, clock = io.StringIO(), iter(range(10**6))
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))  # each look at it: a second later
    list(common.progress(range(100), "training", miniters=1))
    shown = re.findall(r"\rtraining +\d+%\|.*?\d+/100, [^\r]* left *(\n?)", stream.getvalue())
    assert (len(shown) > 30) if terminal else (2 <= len(shown) <= 10)
    assert set(shown) == ({""} if terminal else {"\n"})


def test_nothing_is_used_that_windows_lacks():
    scripts = [path for path in HERE.glob("*.py") if path.name != "test_all.py"]
    for path in [*scripts, Path(__file__)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):  # what a body holds doesn't run when the file is imported
            if isinstance(node, ast.FunctionDef):
                node.body = [x for x in node.body if isinstance(x, ast.Import)]
        words = r"import (resource|fcntl|pwd|termios)\b|signal\.SIGKILL|os\.(fork|uname)"
        assert not re.search(words, ast.unparse(tree)), path


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, problem):
    path = tmp_path / "file"
    common.write_file(path, lambda file: file.write(b"old"))

    def fail(_):
        assert path.read_bytes() == b"old"  # until the new one is complete
        raise problem

    with pytest.raises((common.Failure, KeyboardInterrupt)):
        common.write_file(path, fail)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((common.Failure, KeyboardInterrupt)):
        common.save_checkpoint(path, {"a": torch.zeros(9)})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_many_processes_make_a_folder_at_once_and_none_in_a_files_place(tmp_path):
    folders = [tmp_path / str(i // 8) / "new" for i in range(320)]
    with multiprocessing.Pool(8) as pool:
        pool.map(common.make_folder, folders, chunksize=1)
    assert all(os.listdir(folder) == [] for folder in folders)
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", "can't be written", "--out"):
        common.make_folder(tmp_path / "file" / "new")


def test_hostile_checkpoints_are_refused_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    good = {"kind": "acwgan", "settings": {"seed": 0}, "losses": [0.5]}
    common.save_checkpoint(tmp_path / "good", good)
    assert common.load_checkpoint(tmp_path / "good", "acwgan", "") == good
    assert common.load_checkpoint(tmp_path / "good", None, "") == good
    torch.save({"kind": "transfer", "networks": Hostile()}, tmp_path / "torch")
    torch.save(torch.zeros(3, 3), tmp_path / "tensor")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "half").write_bytes((tmp_path / "good").read_bytes()[:300])
    for name in ("torch", "tensor", "pickle", "half", "absent", "good"):
        with refused(tmp_path / name, "; train it anew"):
            common.load_checkpoint(tmp_path / name, "transfer", "train it anew")
    assert not (tmp_path / "owned").exists()


def test_a_training_of_other_settings_is_neither_resumed_nor_overwritten(tmp_path):
    path, mine = tmp_path / "checkpoint.pt", {"dataset": "glyphs", "epochs": 3, "limit": None}

    def start(settings, kind="acwgan", resume=False, force=False):
        args = types.SimpleNamespace(resume=resume, force=force)
        return common.starting_point(path, kind, settings, args)

    assert start(mine, resume=True) is None
    common.save_checkpoint(path, {"kind": "acwgan", "settings": mine, "steps": 7})
    assert start(mine) is None
    assert start(mine, resume=True)["steps"] == 7
    for name, value in {"epochs": 4, "limit": 640, "dataset": "mnist", "width": 8}.items():
        for resume in (False, True):
            with refused(path, f"{name} {mine.get(name)}, not {value}", "--force", code=2):
                start(mine | {name: value}, resume=resume)
        assert start(mine | {name: value}, force=True) is None
    with refused("not a checkpoint of asl_model", "--force"):
        start(mine, "asl_model")


def test_records_read_back_and_hold_what_made_them(tmp_path, monkeypatch, capsys):
    rows = [{"step": i, "seconds": 0.1 * i, "critic": -1e-9 * i} for i in range(3)]
    common.write_history(tmp_path / "history.csv", rows)
    again = csv.DictReader((tmp_path / "history.csv").read_text().splitlines())
    assert [{name: float(x) for name, x in row.items()} for row in again] == rows
    rate = common.wilson(np.int64(5), torch.tensor(10))
    common.print_table(["attack", "rate"], [["none", common.wilson(0, 0)], ["pgd", rate]])
    end = ["none                       -", "pgd     50.0% [23.7%, 76.3%]"]
    assert capsys.readouterr().out.splitlines()[1:] == end
    monkeypatch.setattr(common, "START", time.time() - 5)
    monkeypatch.setattr(sys, "argv", ["acwgan.py", "--seed", "1"])
    args = types.SimpleNamespace(out=tmp_path, seed=1)
    record = common.write_results(args, {"real": rate}, dataset="glyphs")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == record | {"settings": {"out": str(tmp_path), "seed": 1}}
    assert written["command"] == "python acwgan.py --seed 1"
    assert (written["dataset"], written["real"]) == ("glyphs", rate)
    assert 5 <= written["seconds"] < 10


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a file named short is said to be a byte longer than it is."""

    def send_header(self, name, value):
        longer = name == "Content-Length" and self.path == "/short"
        super().send_header(name, int(value) + 1 if longer else value)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder whose files are at `common.COCO_URL`."""
    (tmp_path / "server").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr(common, "COCO_URL", f"http://127.0.0.1:{httpd.server_port}/")
        yield tmp_path / "server"
        httpd.shutdown()


def test_a_download_is_whole_and_of_its_hash_or_leaves_nothing(server, tmp_path):
    path, digest = tmp_path / "new" / "file", hashlib.sha256(b"content").hexdigest()
    for name in ("file", "short"):
        (server / name).write_bytes(b"content")
    for name, sha256, words in (
        ("file", "00", digest[:8]),
        ("short", "", "7 of 8"),
        ("no", "", "404"),
    ):
        with refused(words, f"put that file at {path}"):
            common.download(common.COCO_URL + name, path, sha256)
        assert list(tmp_path.glob("new/*")) == []
    assert common.download(f"{common.COCO_URL}file", path, digest[:8]) == path
    assert path.read_bytes() == b"content"
    assert os.listdir(path.parent) == ["file"]
    assert common.download(NOWHERE, path) == path  # it is there: no need to ask for it


def test_two_downloads_of_one_file_at_once_leave_it_whole(server, tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(3_000_000)
    (server / "file").write_bytes(data)
    (tmp_path / "new").mkdir()
    both = threading.Barrier(2)  # neither draft is complete before the other is
    monkeypatch.setattr(os, "fsync", lambda _: both.wait(20))
    job = f"{common.COCO_URL}file", tmp_path / "new" / "file"
    with common.concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(common.download, *zip(job, job, strict=True)))
    assert (tmp_path / "new" / "file").read_bytes() == data
    assert os.listdir(tmp_path / "new") == ["file"]


@pytest.mark.parametrize("zeros", [0, 5])
def test_frechet_distance_equals_the_closed_form_for_commuting_covariances(zeros):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    v1, v2, mu = rng.uniform(0.1, 9, 30), rng.uniform(0.1, 9, 30), rng.normal(size=30)
    v1[:zeros] = 0
    closed = np.square(mu).sum() + np.square(np.sqrt(v1) - np.sqrt(v2)).sum()
    ours = common.frechet_distance(mu, basis * v1 @ basis.T, 0 * mu, basis * v2 @ basis.T)
    assert ours == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(6, 7, 12), (20, 15, 5), (4, 30, 9), (40, 60, 256)])
def test_the_two_frechet_distances_agree_and_the_gradient_with_finite_differences(n, m, d):
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, d, generator=rng, dtype=torch.float64) for k in (n, m))
    distance = common.frechet_distance_torch(x, 2 * y).item()
    truth = common.frechet_distance(*moments(x.numpy()), *moments(2 * y.numpy()))
    assert distance == pytest.approx(truth, rel=1e-6)
    if d < 99:
        x, y = x.requires_grad_(), y.requires_grad_()
        assert torch.autograd.gradcheck(common.frechet_distance_torch, (x, y), atol=1e-6)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def tiny_mnist(tmp_path):
    """A folder with 40 + 20 made-up digits in MNIST's format."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        digits = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte", digits)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path / "data"


def test_mnist_is_read_byte_for_byte_and_damaged_files_are_named(tiny_mnist):
    images, labels = common.load_mnist(tiny_mnist, train=False)
    raw = np.random.default_rng(20).integers(0, 256, (20, 1, 28, 28))
    assert torch.equal(images, torch.from_numpy(raw).float() / 255)
    assert torch.equal(labels, torch.arange(20) % 10)
    path = tiny_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    write_idx(path, np.zeros((20, 14, 14)))
    small = path.read_bytes()
    write_idx(path, np.zeros((10, 28, 28)))  # and twenty labels
    for wrong in (good[:-1], good[:9], b"", b"<html>", good + b"x", small, path.read_bytes()):
        path.write_bytes(wrong)
        with refused(path, "delete", "--dataset glyphs"):
            common.load_mnist(tiny_mnist, train=False)


def test_without_mnist_and_network_one_line_says_so_and_auto_draws_glyphs(tmp_path, capsys):
    with refused(f"no MNIST in {tmp_path}", "train-images-idx3-ubyte", "--dataset glyphs"):
        common.load_digits("mnist", tmp_path)
    name, images, labels = common.load_digits("auto", tmp_path, train=False, limit=123)
    assert "WARNING: no MNIST" in capsys.readouterr().err
    assert name == "glyphs"
    assert torch.equal(images, common.glyphs(200, seed=1)[0][:123])
    assert not torch.equal(images, common.glyphs(123, seed=0)[0])
    assert torch.equal(labels, torch.arange(123) % 10)
    assert images.shape == (123, 1, 28, 28)
    assert 0 == images.min() < 0.9 < images.max() <= 1
    assert images[:, :, :1].mean() < 0.02  # no digit is cut off by the border


@pytest.fixture
def tiny_coco(tmp_path):
    """Three photos of one colour each, and COCO's 80 category ids, with its gaps, in no order."""
    gaps = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    pairs = ((9, 90), (9, 1), (9, 1), (42, 60))
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in (42, 9, 7)],
        "annotations": [{"image_id": i, "category_id": c} for i, c in pairs],
        "categories": [{"id": i, "name": f"name {i}"} for i in range(90, 0, -1) if i not in gaps],
    }
    folder = tmp_path / "data" / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    for i, colour in ((7, "red"), (9, "lime"), (42, "blue")):
        Image.new("RGB", (50, 40), colour).save(folder / "val2017" / f"{i:012}.jpg", quality=100)
    return tmp_path / "data"


def colours(photos):
    return photos[:].argmax(1).flatten(1).mode(1).values.tolist()


def test_hostile_annotations_are_refused_in_one_line(tiny_coco):
    path = tiny_coco / "coco" / "annotations" / "instances_val2017.json"
    good = path.read_text()
    texts = ["", "[]", "{", "{}", "\xff\xfe", "[" * 100_000, good.replace("[", "{}, [", 1)]
    names = ("../../x.jpg", "/etc/x", "a\\b.jpg", "..", "a\x1b[2J", ["x.jpg"], f"{9:012}.jpg")
    changes = [("images", "file_name", name) for name in names]
    changes += [("images", "id", 9), ("images", "id", {}), ("annotations", "image_id", 10)]
    for part, key, value in [*changes, ("annotations", "category_id", 12)]:
        content = json.loads(good)
        content[part][0][key] = value
        texts.append(json.dumps(content))
    for text in texts:
        path.write_text(text, encoding="latin-1")
        with refused(f"{path} is damaged", "delete it"):
            common.load_coco(tiny_coco, 32)


def test_absent_coco_is_downloaded_only_as_far_as_asked_for(server, tiny_coco):
    path = tiny_coco / "coco" / "annotations" / "instances_val2017.json"
    photos = sorted((tiny_coco / "coco" / "val2017").iterdir())
    (server / "annotations").mkdir()
    with zipfile.ZipFile(server / "annotations" / "annotations_trainval2017.zip", "w") as file:
        file.write(path, "annotations/instances_val2017.json")
    path.unlink()
    photos[0].parent.rename(server / "val2017")
    assert colours(common.load_coco(tiny_coco, 32, limit=2)[0]) == [0, 1]
    assert [photo.exists() for photo in photos] == [True, True, False]
    (server / "val2017" / photos[2].name).unlink()
    with refused("404", f"put that file at {photos[2]}"):
        common.load_coco(tiny_coco, 32)


# --- common: errors, Inception, scenes, photos


def test_an_error_ends_in_one_line_and_an_exit_code(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the tests still need their stdout
    photos = common.Photos([tmp_path / "absent.jpg"], 8)
    worker = torch.utils.data.DataLoader(photos, num_workers=1)  # fails with a traceback
    for problems, code, words in (
        ([common.Failure("no such label", 2)], 2, "error: no such label"),
        ([OSError(28, "No space left on device")], 1, "No space left"),
        ([KeyboardInterrupt()], 130, "--resume"),
        ([RuntimeError("CUDA out of memory. Tried to")], 1, "--device cpu"),
        (worker, 1, f"error: {tmp_path / 'absent.jpg'}: No such file"),
    ):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            common.run(lambda problems=problems: (_ for _ in ()).throw(next(iter(problems))))
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    for problem, reason in (
        (ValueError("a\n b" + "c" * 500), "a b" + "c" * 96),
        (KeyError(), "KeyError"),
    ):
        with refused(f"file: {reason}; delete it"), common.advise("file", "delete it"):
            raise problem


def test_flags_are_checked_and_help_shows_their_defaults(capsys):
    p = common.parser("Doc", Path("runs/x"), "mnist", ("mnist", "auto"), "digits", trains=True)
    args = p.parse_args(["--limit", "3", "--resume"])
    assert (args.limit, args.seed, args.resume, args.force) == (3, 0, True, False)
    defaults = re.findall(r"\(default:\s+(\D+?)\)", p.format_help())
    assert defaults == ["data", "runs/x", "auto", "mnist"]
    for line in ("--limit 0", "--limit 1.5", "--seed -1", "--device gpu", "--resume --force"):
        with pytest.raises(SystemExit, match="2"):
            p.parse_args(line.split())
        assert line.split()[0] in capsys.readouterr().err.splitlines()[-1]
    assert common.positive("8/255") == pytest.approx(8 / 255)
    for text in ("8/0", "0/8", "eight", "", "-1", "nan", "1/2/3", "inf"):
        with pytest.raises(ValueError):  # noqa: PT011
            common.positive(text)


def test_the_frechet_gradient_is_right_in_float32_and_finite_for_identical_samples():
    x, y = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0)).relu()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        z = x.to(dtype).requires_grad_()
        gradients += torch.autograd.grad(common.frechet_distance_torch(z, y.to(dtype)), z)
    assert torch.allclose(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-6)
    distance = common.frechet_distance_torch(x.requires_grad_(), x.detach())
    assert abs(distance.item()) < 1e-5
    assert torch.autograd.grad(distance, x)[0].isfinite().all()


def test_what_has_no_frechet_distance_is_refused():
    zeros, eye = torch.zeros(5, 4), np.eye(3)
    for x in (zeros[:1], zeros[:, :3], zeros * torch.nan, zeros[:, 0]):
        with pytest.raises(ValueError, match="finite"):
            common.frechet_distance_torch(x, zeros)
    for mu, sigma in ((np.zeros(2), eye), (np.zeros(3), eye * np.nan)):
        with pytest.raises(ValueError, match="finite"):
            common.frechet_distance(mu, sigma, np.zeros(3), eye)


def test_what_inception_does_not_take_is_refused(inception_file, tmp_path, monkeypatch):
    one = torch.ones(1, 1, 8, 8)
    for images in (torch.ones(2, 2, 8, 8), one * 1.1, one * torch.nan, one[:0], one.byte()):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            common.inception_features(images, inception_file)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other")
    with refused(tmp_path / "other", f"put there {common.INCEPTION} from"):
        common.inception_features(one, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    with refused(f"put that file at {Path('data') / common.INCEPTION}"):
        common.inception_features(one)


def test_a_photo_is_squashed_to_the_square_or_cropped_from_its_middle(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(30, 0).repeat(30, 1)).save(tmp_path / "blocks.png")
    small = common.Photos([tmp_path / "blocks.png"], 96)[0]
    truth = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    assert torch.allclose(small[:, 24::48, 16::32], truth, atol=0.01)
    photo = Image.new("RGB", (160, 80), "blue")
    photo.paste((255, 0, 0), (45, 5, 115, 75))  # the middle square, a sixteenth off its edges
    photo.save(tmp_path / "middle.png")
    crop = functools.partial(ImageOps.fit, bleed=1 / 16)
    red, _, blue = common.Photos([tmp_path / "middle.png"], 70, crop)[0]
    assert (red.min(), blue.max()) == (1, 0)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the published file's format."""
    torch.manual_seed(0)
    how = {"weights": None, "num_classes": 1008, "aux_logits": False, "init_weights": False}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(torchvision.models.inception_v3(**how).state_dict(), path)
    return path


def test_inception_pools_as_tensorflows_does_and_sees_minus_1_to_1_at_299(inception_file):
    network, seen = common.inception_network(inception_file), {}
    blocks = {name: x for name, x in network.named_children() if hasattr(x, "branch_pool")}
    assert len(blocks) == 9
    for name, block in blocks.items():
        block.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    grey = torch.rand(2, 1, 40, 30, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(grey, (299, 299), mode="bilinear", align_corners=False)
    truth = network(resized.expand(-1, 3, -1, -1) * 2 - 1).numpy()
    for name, block in blocks.items():
        x, y = seen[name]
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if name == "Mixed_7c":
            pooled = F.max_pool2d(x, 3, 1, 1)
        branch = block.branch_pool.bn(block.branch_pool.conv(pooled)).relu()
        ours, atol = y[:, -branch.shape[1] :], 1e-4 * branch.max()
        assert torch.allclose(ours, branch, rtol=1e-3, atol=atol), name
    features = common.inception_features(grey, inception_file)
    assert np.allclose(features, truth, rtol=1e-4, atol=1e-4 * truth.max())


def test_scenes_are_the_same_for_a_seed_and_their_splits_disjoint(tiny_mnist):
    load = functools.partial(common.load_scenes, source="mnist", data_dir=tiny_mnist)
    images, labels = load(130, seed=3)
    assert 0 <= images.min() < 0.3 < 0.7 < images.max() <= 1
    assert set(labels.sum(1).int().tolist()) == {1, 2, 3, 4, 5}
    assert all(map(torch.equal, load(70, seed=3), (images[:70], labels[:70])))
    assert not torch.equal(load(130, seed=4)[0], images)
    splits = ("train", "validation", "test")
    parts = [common.scene_digits("mnist", tiny_mnist, split)[1] for split in splits]
    assert [len(part) for part in parts] == [37, 3, 20]
    assert torch.equal(torch.cat(parts[:2]), common.load_mnist(tiny_mnist)[0])
    assert torch.equal(parts[2], common.load_mnist(tiny_mnist, train=False)[0])


def test_a_scenes_labels_are_the_digits_drawn_in_it():
    for digit in range(10):
        only = torch.zeros(10, 1, 28, 28)  # the other digits leave no mark
        only[digit, 0, 13:15, 13:15] = 1
        images, labels = common.compose_scenes(only, torch.arange(10), 100, seed=1)
        marked = (images - images[:, :, :1, :1]).abs().amax((1, 2, 3)) > 0.1
        assert torch.equal(marked, labels[:, digit] == 1)
        assert 5 < marked.sum() < 60


def test_coco_is_in_ascending_order_of_categories_and_photos(tiny_coco):
    images, labels, names = common.load_coco(tiny_coco, 32)
    assert names[:3] == ["name 1", "name 2", "name 3"]
    assert names[54] == "name 60"  # the log's "donut", of category id 60, is output 54
    assert [row.nonzero()[:, 0].tolist() for row in labels] == [[], [0, 79], [54]]
    assert colours(images) == [0, 1, 2]
    (batch,) = torch.utils.data.DataLoader(images, 3, num_workers=1)
    assert torch.equal(batch, images[:])
    assert [len(x) for x in common.load_coco(tiny_coco, 32, limit=2)] == [2, 2, 80]


def test_photos_are_read_upright_and_on_white(tmp_path):
    red, half = Image.new("RGB", (8, 4), "red"), Image.new("RGBA", (8, 4), (255, 0, 0, 128))
    cmyk, grey = red.convert("CMYK"), half.convert("LA")
    photos = (cmyk, "tif", (255, 0, 0)), (half, "png", (255, 127, 127)), (grey, "png", [165] * 3)
    for image, kind, colour in photos:
        image.save(tmp_path / f"photo.{kind}")
        photo = np.asarray(common.open_photo(tmp_path / f"photo.{kind}"))
        assert np.abs(photo.astype(int) - np.full((4, 8, 3), colour)).max() <= 3
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    red.paste((0, 0, 255), (0, 0, 4, 4))
    red.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    turned = common.Photos([tmp_path / "turned.jpg"], 8)[0].argmax(0)
    assert turned.unique_consecutive(dim=0).tolist() == [[2] * 8, [0] * 8]


def test_files_that_are_no_photo_are_named(tmp_path, monkeypatch):
    Image.effect_noise((200, 200), 50).save(tmp_path / "bomb.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "bomb.png").read_bytes()[:9999])
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    for name in ("truncated.png", "text.jpg", "absent.jpg", "bomb.png"):
        if name == "bomb.png":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with refused(tmp_path / name, "no photo that can be read"):
            common.open_photo(tmp_path / name)


# --- common: what an audit found


def test_help_shows_that_the_seed_is_0():
    p = common.parser("Doc", Path("runs/x"), "mnist", ("mnist",), "digits")
    assert "random number (default: 0)" in " ".join(p.format_help().split())


def test_auto_does_not_give_one_process_the_gpu_and_the_next_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with refused("process 1", "--device cpu", code=2):
        common.pick_device("auto")


def test_one_half_of_mnist_is_enough_for_itself_and_the_other_is_said_to_be_absent(tiny_mnist):
    for path in (tiny_mnist / "MNIST" / "raw").glob("t10k*"):
        path.unlink()
    with refused("no MNIST in"):
        common.load_mnist(tiny_mnist, train=False)
    assert len(common.load_mnist(tiny_mnist)[0]) == 40


def test_labels_beyond_9_are_not_mnists(tiny_mnist):
    path = tiny_mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(path, np.full(40, 11))
    with refused(path.name, "not MNIST"):
        common.load_mnist(tiny_mnist)


def test_another_hash_is_named_where_no_length_was_announced(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"abc")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        with refused("3", "ba7816bf"):
            url = f"http://127.0.0.1:{httpd.server_port}/file"
            common.download(url, tmp_path / "file", "00")
        httpd.shutdown()


def test_a_line_of_progress_ends_in_a_newline_however_long_its_losses(monkeypatch):
    stream, clock = io.StringIO(), iter(range(10**6))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))
    with common.progress(range(100), "training", miniters=1) as bar:
        for _ in bar:
            losses = dict.fromkeys(("critic", "generator", "penalty", "accuracy"), 0.1234)
            bar.set_postfix(losses, refresh=False)
    lines = re.findall(r"\rtraining [^\r\n]*(\n?)", stream.getvalue())
    assert set(lines) == {"\n"}


def test_however_much_differs_the_refusal_is_short(tmp_path):
    args = types.SimpleNamespace(resume=False, force=False)
    old, new = (dict.fromkeys("abc", letter * 64) for letter in "xy")
    common.save_checkpoint(tmp_path / "c", {"kind": "k", "settings": old})
    with refused(tmp_path / "c", "--force", code=2):
        common.starting_point(tmp_path / "c", "k", new, args)


def test_a_checkpoint_whose_settings_are_none_is_refused(tmp_path):
    args = types.SimpleNamespace(resume=True, force=False)
    common.save_checkpoint(tmp_path / "c", {"kind": "k", "settings": 5})
    with pytest.raises(common.Failure):
        common.starting_point(tmp_path / "c", "k", {"a": 1}, args)


@pytest.mark.parametrize("problem", [OSError(), common.Failure("x" * 9999)])
def test_any_error_ends_in_one_short_line(monkeypatch, capsys, problem):
    monkeypatch.setattr(common.os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit):
        common.run(lambda: (_ for _ in ()).throw(problem))
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 300


def test_class_names_are_text_that_a_terminal_can_show(tmp_path):
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    for name in ("\u001b[2J", 5):
        content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
        content["categories"] = [{"id": 1, "name": name}]
        (folder / "instances_val2017.json").write_text(json.dumps(content))
        with refused("is damaged"):
            common.load_coco(tmp_path, 32)


def test_git_is_found_in_a_folder_with_an_apostrophe(tmp_path, monkeypatch):
    shutil.copytree(Path(common.__file__).parent / ".git", tmp_path / "it's" / ".git")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "it's" / "common.py"))
    args = types.SimpleNamespace(out=tmp_path)
    assert common.write_results(args, {})["git"]


# --- week 1


SMALL = ["--dataset", "glyphs", "--limit", "640", "--samples", "200", "--width", "8"]


SMALL += ["--epochs", "3"]


def reader_of(run, folder):
    """Copy the digit reader that a small run has trained into another's folder: seconds saved."""
    folder.mkdir(exist_ok=True)
    shutil.copy(run[0] / "reader.pt", folder)
    return folder


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def trained(out, *flags):
    """A run of week 1 that is measured on a tenth of the test digits: seconds saved."""

    def fewer(n, seed=0, draw=common.glyphs):
        return draw(n // 10 if seed == 1 else n, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "glyphs", fewer)
        return acwgan.main([*flags, "--device", "cpu", "--out", str(out)])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """An uninterrupted small run: its folder and what `main` returned."""
    out = tmp_path_factory.mktemp("run")
    return out, trained(out, *SMALL)


@pytest.mark.parametrize("share", [1, 0.5, 0.3])
def test_the_penalty_is_the_mean_over_its_share_of_the_batch(share):
    def critic(x):  # |x|^2 / 2 has the gradient x
        return x.flatten(1).square().sum(1) / 2, torch.zeros(len(x), 10)

    images = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    loss, parts = acwgan.critic_loss(critic, images, torch.arange(8), images, 3.0, share)
    norms = images[: {1: 8, 0.5: 4, 0.3: 3}[share]].flatten(1).norm(dim=1)
    assert parts["penalty"].item() == pytest.approx((norms - 1).square().mean().item(), rel=1e-5)
    expected = 3 * parts["penalty"] + parts["auxiliary"] - parts["wasserstein"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_penalty_agrees_with_finite_differences():
    torch.manual_seed(0)
    critic, step = acwgan.Critic(width=4).double(), 1e-6
    real, fake = torch.rand(2, 3, 1, 28, 28, dtype=torch.float64)

    def penalty():
        return acwgan.gradient_penalty(critic, real, fake, torch.Generator().manual_seed(0))

    u = torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    nudges = step * torch.eye(784, dtype=torch.float64).view(784, 1, 28, 28)
    with torch.no_grad():
        x = u * real + (1 - u) * fake
        slopes = [(critic(row + nudges)[0] - critic(row - nudges)[0]) / (2 * step) for row in x]
    expected = (torch.stack(slopes).norm(dim=1) - 1).square().mean().item()
    assert penalty().item() == pytest.approx(expected, rel=1e-4)

    weight, index, values = critic.layers[1].weight, (1, 2, 0, 1), []
    (gradient,) = torch.autograd.grad(penalty(), weight)
    for sign in (1, -2):  # up, then down
        with torch.no_grad():
            weight[index] += sign * step
        values.append(penalty().item())
    slope = (values[0] - values[1]) / (2 * step)
    assert gradient[index].item() == pytest.approx(slope, rel=1e-3)


def test_our_leaky_relu_is_torchs_to_the_second_derivative():
    torch.manual_seed(0)
    w = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for activation in (acwgan.leaky_relu, lambda t: F.leaky_relu(t, 0.2)):
        y = activation(activation(x @ w) @ w)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append((y, g, *torch.autograd.grad(g.square().sum(), (w, x))))
    for ours, torchs in zip(*results, strict=True):
        assert torch.allclose(ours, torchs)


@pytest.mark.parametrize("size", [28, 64])
def test_the_networks_have_the_shapes_and_ranges_they_promise(size):
    torch.manual_seed(0)
    generator, critic = acwgan.Generator(20, 4, size).eval(), acwgan.Critic(4, size)
    latent, labels = torch.randn(6, 20), torch.arange(6)
    images = generator(latent, labels)
    assert images.shape == (6, 1, size, size)
    assert 0 <= images.min() < images.max() <= 1
    scores, logits = critic(images)
    assert scores.shape == (6,)
    assert logits.shape == (6, 10)
    # no example depends on its neighbours
    assert torch.allclose(critic(images[2:3])[0], scores[2:3], atol=1e-6)
    overwritten = latent.clone()
    overwritten[:, :10] = 7
    assert torch.equal(generator(overwritten, labels), images)
    assert not torch.allclose(generator(latent, labels.flip(0)), images)


def test_the_auxiliary_loss_trains_the_critic_on_real_images_only():
    torch.manual_seed(0)
    critic, (real, fake), labels = acwgan.Critic(4), torch.rand(2, 8, 1, 28, 28), torch.arange(8)
    parts = acwgan.critic_loss(critic, real, labels, fake)[1]
    (real_scores, real_logits), (scores, logits) = critic(real), critic(fake)
    auxiliary, wasserstein = parts["auxiliary"].item(), parts["wasserstein"].item()
    assert auxiliary == pytest.approx(F.cross_entropy(real_logits, labels).item(), rel=1e-5)
    assert wasserstein == pytest.approx((real_scores.mean() - scores.mean()).item(), abs=1e-5)
    loss = acwgan.generator_loss(critic, fake, labels).item()
    expected = F.cross_entropy(logits, labels) - scores.mean()
    assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_a_run_writes_what_it_promises(small_run):
    out, numbers = small_run
    samples = np.load(out / "samples.npz")
    assert samples["images"].shape == (200, 28, 28)
    assert samples["images"].dtype == np.uint8
    assert samples["labels"].dtype == np.int64
    assert np.bincount(samples["labels"]).tolist() == [20] * 10
    with Image.open(out / "AC-WGAN_GP.png") as image:
        assert image.size[1] > 600
    record = json.loads((out / "results.json").read_text())
    assert record == json.loads(json.dumps(numbers, default=str))
    assert (record["dataset"], record["dataset_size"]) == ("glyphs", 640)
    assert {"command", "settings", "versions", "git", "seconds", "device"} <= set(record)
    names = "AC-WGAN_GP.png checkpoint.pt history.csv reader.pt results.json samples.npz"
    assert sorted(os.listdir(out)) == names.split()


@torch.no_grad()
def test_the_numbers_are_of_the_images_they_are_said_to_be_of(small_run):
    out, numbers = small_run
    reader, generator = acwgan.DigitReader().eval(), acwgan.Generator(74, 8).eval()
    reader.load_state_dict(torch.load(out / "reader.pt", weights_only=True)["network"])
    generator.load_state_dict(checkpoint_of(out)["average"])
    images, labels = (x[-(640 // 6) :] for x in common.glyphs(640))  # what the reader didn't learn
    latent = torch.randn(106, 74, generator=torch.Generator().manual_seed(0))
    natural = (generator(latent, labels) * 255).round() / 255
    samples = torch.from_numpy(np.load(out / "samples.npz")["images"])[:, None] / 255
    sets = {"": natural, "_floor": images, "_equal_classes": samples}
    (m, c), *others = (
        (x.mean(0), np.cov(x.T))
        for x in (
            reader.features(x).double().numpy() for x in (common.glyphs(1000, 1)[0], *sets.values())
        )
    )
    for name, (mean, covariance) in zip(sets, others, strict=True):
        cross = np.sqrt(np.linalg.eigvals(covariance @ c).real.clip(0)).sum()
        expected = np.square(mean - m).sum() + np.trace(covariance + c) - 2 * cross
        assert numbers[f"reader_frechet_distance{name}"] == pytest.approx(expected, rel=1e-3)
    ratio = numbers["reader_frechet_distance"] / numbers["reader_frechet_distance_floor"]
    assert numbers["reader_frechet_distance_over_floor"] == pytest.approx(ratio)
    read = (reader(samples).argmax(1) == torch.arange(200) % 10).float().mean().item()
    assert numbers["asked_class_read"]["rate"] == pytest.approx(read)
    assert numbers["asked_class_read"]["n"] == 200


def test_the_reader_learns_no_image_that_it_is_measured_on(tmp_path, monkeypatch):
    learnt = []
    monkeypatch.setattr(acwgan, "train_classifier", lambda *_, images, **__: learnt.append(images))
    images, labels = common.glyphs(640)
    before = torch.get_rng_state()
    acwgan.digit_reader(tmp_path, "glyphs", images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(learnt[0], images[: 640 - 640 // 6])
    assert acwgan.learnt(60_000) == 50_000


def test_a_kept_classifier_is_trained_anew_where_it_was_made_otherwise(tmp_path):
    path, fits = tmp_path / "kept.pt", []

    def kept(settings):
        return acwgan.kept_classifier(path, settings, nn.Linear(2, 2), fits.append)

    first = kept({"seed": 1, "epochs": 3})
    assert torch.equal(kept({"seed": 1, "epochs": 3}).weight, first.weight)
    assert len(fits) == 1
    assert not torch.equal(kept({"seed": 1, "epochs": 4}).weight, first.weight)
    assert len(fits) == 2
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(common.Failure, match="delete it, and a new one is trained"):
        kept({"seed": 1, "epochs": 4})


def test_both_step_sizes_fall_linearly_to_zero_at_the_end(small_run):
    checkpoint = checkpoint_of(small_run[0])
    for name, rate in (("generator_adam", 4e-3), ("critic_adam", 2e-3)):
        group = checkpoint[name]["param_groups"][0]
        assert group["lr"] == pytest.approx(rate / 60)
        assert group["betas"] == (0.0, 0.99)


def test_the_averaged_generator_is_the_average_of_all_steps(tmp_path, monkeypatch):
    args = acwgan.settings([*SMALL, "--average", "0.8", "--out", str(tmp_path)])
    monkeypatch.setattr(acwgan, "SAVE_EVERY", -1)  # a checkpoint each step
    training, weights = acwgan.Training(args, torch.device("cpu")), []

    def keep(training, *_):
        weights.append(training.generator.project.weight.detach().clone())

    monkeypatch.setattr(acwgan.Training, "save", keep)
    mean = training.generator.project.weight.detach().clone()
    acwgan.train(training, args, {}, *common.glyphs(640))
    for step, weight in enumerate(weights, 1):
        decay = min(0.8, step / (step + 8))
        mean = decay * mean + (1 - decay) * weight
    assert len(weights) == 60
    assert torch.allclose(training.average.project.weight, mean, atol=1e-5)
    buffers = zip(training.average.buffers(), training.generator.buffers(), strict=True)
    assert all(torch.equal(*both) for both in buffers)


def test_the_logs_own_settings_train_at_64_pixels_without_averaging(tmp_path, monkeypatch):
    monkeypatch.setattr(acwgan, "train_classifier", lambda *_, **__: None)  # seconds saved
    flags = "--dataset glyphs --limit 64 --epochs 1 --samples 20 --width 4 --image-size 64"
    flags += " --critic-steps 5 --decay none --average 0 --penalty-share 1 --precision fp32"
    trained(tmp_path, *flags.split())
    assert np.load(tmp_path / "samples.npz")["images"].shape == (20, 28, 28)
    checkpoint = checkpoint_of(tmp_path)
    for name, steps, rate in (("critic", 10, 2e-3), ("generator", 2, 4e-3)):
        adam = checkpoint[f"{name}_adam"]
        assert adam["state"][0]["step"] == steps
        assert adam["param_groups"][0]["lr"] == rate
    assert checkpoint["steps"] == 2
    for name, value in checkpoint["generator"].items():
        assert torch.equal(checkpoint["average"][name], value)
    acwgan.main(["--sample", "3", "--out", str(tmp_path)])
    assert np.load(tmp_path / "drawn.npz")["images"].shape == (3, 28, 28)


def test_a_run_that_was_killed_resumes_to_the_same_bits(small_run, tmp_path):
    out, flags = reader_of(small_run, tmp_path), ["--device", "cpu", "--out", tmp_path]
    kill = signal.SIGKILL
    stop_once_there_is(out / "checkpoint.pt", kill, "acwgan.py", *SMALL, *flags)
    position = checkpoint_of(out)["steps"]
    assert 0 < position < 60, "the run was over before it was stopped: the test shows nothing"
    resumed = script("acwgan.py", "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole, again = checkpoint_of(small_run[0]), checkpoint_of(out)
    for part in ("generator", "critic", "average"):
        assert all(torch.equal(again[part][k], v) for k, v in whole[part].items()), part
    first, second = (np.load(x / "samples.npz")["images"] for x in (small_run[0], out))
    assert np.array_equal(first, second)


def test_a_run_resumed_within_an_epoch_has_its_order_noise_and_history(
    small_run, tmp_path, monkeypatch
):
    steps = []

    def stop_in_step_54(*batch, loss=acwgan.generator_loss):
        steps.append(batch)
        if len(steps) == 54:
            raise KeyboardInterrupt
        return loss(*batch)

    with monkeypatch.context() as patch:
        patch.setattr(acwgan, "SAVE_EVERY", -1)  # a checkpoint each step
        patch.setattr(acwgan, "generator_loss", stop_in_step_54)
        with pytest.raises(KeyboardInterrupt):
            trained(reader_of(small_run, tmp_path), *SMALL)
    first = checkpoint_of(tmp_path)
    assert first["steps"] == 53
    record = trained(tmp_path, "--resume")
    whole, again = checkpoint_of(small_run[0]), checkpoint_of(tmp_path)
    assert all(torch.equal(again["generator"][k], v) for k, v in whole["generator"].items())
    seconds = again["seconds"]
    assert record["training_seconds"] == seconds > first["seconds"] > 0
    assert record["steps_per_second"] == pytest.approx(60 / seconds)
    lines, expected = (
        [line.split(",") for line in (x / "history.csv").read_text().splitlines()]
        for x in (tmp_path, small_run[0])
    )
    assert ",".join(lines[0]) == "step,seconds,wasserstein,penalty,auxiliary,generator"
    assert [line[0] for line in lines[1:]] == ["1", "51"]
    assert 0 < float(lines[1][1]) < float(lines[2][1]) < seconds
    assert [line[2:] for line in lines] == [line[2:] for line in expected]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_random_state_of_the_device_is_saved_and_restored(monkeypatch, kind):
    states, device = ["at the checkpoint"], torch.device(kind)
    gpu = types.SimpleNamespace(get_rng_state=lambda: states[-1], set_rng_state=states.append)
    monkeypatch.setitem(acwgan.RANDOM, kind, gpu)
    saved, numbers = acwgan.random_state(device), torch.rand(3)
    states.append("later")
    acwgan.set_random_state(saved, device)
    assert torch.equal(torch.rand(3), numbers)
    assert states[-1] == "at the checkpoint"
    acwgan.set_random_state({"cpu": saved["cpu"]}, device)  # of a run on the CPU
    acwgan.set_random_state(saved, torch.device("cpu"))
    assert len(states) == 3


def test_fifteen_seconds_of_training_read_five_times_better_than_chance(small_run, tmp_path):
    flags = [*SMALL, "--width", "16", "--epochs", "20"]
    numbers = trained(reader_of(small_run, tmp_path), *flags)
    assert numbers["reader_right_on_test_images"]["rate"] > 0.98
    assert numbers["asked_class_read"]["rate"] > 0.5


def test_digits_are_drawn_from_the_checkpoint_and_nothing_else_is_touched(small_run, tmp_path):
    path, generator = tmp_path / "checkpoint.pt", acwgan.Generator(74, 8).eval()
    shutil.copy(small_run[0] / "checkpoint.pt", path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    generator.load_state_dict(checkpoint_of(tmp_path)["average"])
    latent = torch.randn(12, 74, generator=torch.Generator().manual_seed(0))
    for digit, labels in (([], [*range(10), 0, 1]), (["--digit", "7"], [7] * 12)):
        acwgan.main(["--sample", "12", *digit, "--out", str(tmp_path)])
        drawn = np.load(tmp_path / "drawn.npz")
        assert drawn["labels"].tolist() == labels
        assert drawn["labels"].dtype == np.int64
        with torch.no_grad():
            expected = generator(latent, torch.tensor(labels))[:, 0] * 255
        assert np.array_equal(drawn["images"], expected.round().byte().numpy())
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "drawn.npz", "drawn.png"]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset mnist --data none", ["train-images-idx3-ubyte", "none/MNIST/raw", "glyphs"]),
        ("--dataset glyphs --limit 32 --width 10000000", ["memory", "--batch-size"]),
        ("--dataset glyphs --out file/below", ["file/below", "--out"]),
    ],
)
def test_what_cannot_be_done_ends_in_one_line_that_says_what_to_do(tmp_path, flags, words):
    (tmp_path / "file").write_text("")
    no_network = {**os.environ, "http_proxy": "127.0.0.1:9", "https_proxy": "127.0.0.1:9"}
    flags = [*flags.split(), "--device", "cpu"]
    fails(script("acwgan.py", *flags, env=no_network, cwd=tmp_path), 1, *words)


def test_resuming_checks_what_it_resumes(small_run, tmp_path):
    flags = ["--out", str(tmp_path), "--resume"]
    fails(script("acwgan.py", *flags), 2, "there is no", "checkpoint.pt")
    data, foreign = (small_run[0] / "checkpoint.pt").read_bytes(), io.BytesIO()
    torch.save({"generator": {}}, foreign)
    broken = io.BytesIO()
    torch.save(torch.load(io.BytesIO(data), weights_only=True) | {"steps": "many"}, broken)
    for content, more, code, word in (
        (data[: len(data) // 2], [], 1, r"checkpoint\.pt"),
        (b"text", [], 1, r"checkpoint\.pt"),
        (foreign.getvalue(), [], 1, "not a checkpoint of acwgan"),
        (broken.getvalue(), [], 1, "train anew with --force"),
        (data, ["--batch-size", "64"], 2, "made with batch_size 32, not 64"),
        (data, ["--limit", "320"], 2, "made with dataset_size 640, not 320"),
    ):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(common.Failure, match=word) as failure:
            acwgan.main([*flags, *more])
        assert failure.value.code == code


def test_a_training_of_other_settings_is_overwritten_only_by_force(small_run, tmp_path):
    shutil.copy(small_run[0] / "checkpoint.pt", reader_of(small_run, tmp_path))
    flags = [*SMALL, "--epochs", "1"]
    with pytest.raises(common.Failure, match=r"epochs 3, not 1.*--out.*--force") as failure:
        trained(tmp_path, *flags)
    assert failure.value.code == 2
    assert checkpoint_of(tmp_path)["steps"] == 60
    trained(tmp_path, *flags, "--force")
    assert checkpoint_of(tmp_path)["steps"] == 20


def test_twelve_images_are_enough_and_fewer_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(acwgan, "train_classifier", lambda *_, **__: None)  # seconds saved
    flags = [*SMALL, "--epochs", "1", "--limit"]
    numbers = trained(tmp_path, *flags, "12", "--batch-size", "4")
    assert np.isfinite(numbers["reader_frechet_distance_over_floor"])
    for batch, least in ((4, 12), (32, 32)):
        with pytest.raises(common.Failure, match=f"11 images.*{batch} needs {least}") as failure:
            trained(tmp_path, *flags, "11", "--batch-size", str(batch))
        assert failure.value.code == 2


@pytest.mark.parametrize("flags", ["--digit 3", "--average 1", "--sample 0", "--resume --force"])
def test_flags_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        acwgan.settings(flags.split())
    assert flags.split()[0] in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(small_run, tmp_path):
    flags = [*SMALL, "--generator-lr", "1e30", "--critic-lr", "1e30"]
    with pytest.raises(common.Failure, match=r"not a number.*--critic-lr"):
        trained(reader_of(small_run, tmp_path), *flags)
    assert os.listdir(tmp_path) == ["reader.pt"]


def test_a_full_disk_ends_the_run_in_one_line_that_names_the_file(small_run, tmp_path):
    resource = pytest.importorskip("resource")  # Windows has none

    def no_room():  # files may not grow beyond 100 kB: as on a full disk, the write fails half-way
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    flags = [*SMALL, "--device", "cpu", "--out", reader_of(small_run, tmp_path)]
    fails(script("acwgan.py", *flags, preexec_fn=no_room), 1, f"{tmp_path / 'checkpoint.pt'}")
    assert os.listdir(tmp_path) == ["reader.pt"]


# --- week 2


TRANSFER = ["--limit", "16", "--samples", "100", "--steps", "6", "--batch-size", "16"]


TRANSFER += ["--device", "cpu"]


@pytest.fixture(scope="module")
def transferred(small_run, tmp_path_factory):
    """A small run of every variant on the small run's generator: its folder, flags, numbers."""
    out = tmp_path_factory.mktemp("transfer")
    flags = [*TRANSFER, "--generator", str(small_run[0] / "checkpoint.pt")]
    return out, flags, transfer.main([*flags, "--out", str(out)])


def with_classifiers_of(out, folder):
    """Copy the classifiers that a small run has trained into another's folder: seconds saved."""
    for path in out.glob("*.pt"):
        if not path.name.startswith("generator"):
            shutil.copy(path, folder)
    return str(folder)


def test_every_variant_writes_what_it_promises(transferred, capsys):
    out, _, numbers = transferred
    assert list(numbers["rows"]) == [*transfer.VARIANTS, "pgd"]
    for variant in transfer.VARIANTS:
        samples = np.load(out / f"samples-{variant}.npz")
        assert samples["images"].shape == (100, 28, 28)
        assert samples["images"].dtype == np.uint8
        assert all(samples[name].dtype == np.int64 for name in ("labels", "target", "predicted"))
        wanted = 7 if "scratch" in variant else (samples["labels"] + 1) % 10
        assert np.array_equal(samples["target"], np.full(100, wanted))
        row, counts = numbers["rows"][variant], samples["labels"] != samples["target"]
        fooled = (samples["predicted"] == samples["target"])[counts]
        assert row["target_fooled"]["rate"] == pytest.approx(fooled.mean())
        rates = [row[name]["rate"] for name in ("target_fooled", "judge_reads_y")]
        assert row["both"]["rate"] <= min(rates)
        history = out / f"history-{variant}.csv"
        assert variant == "original" or history.read_text().startswith("step,seconds,")
    assert numbers["rows"]["original"]["l2"] == 0 < numbers["rows"]["euclidean"]["l2"]
    accuracy = numbers["accuracy"]
    assert accuracy["judge_under_pgd"]["rate"] < accuracy["judge"]["rate"] - 0.1
    assert numbers["dataset"] == json.loads((out / "results.json").read_text())["dataset"]
    assert not list(out.glob("*.part"))
    for name in transfer.FIGURES:
        with Image.open(out / name) as image:
            assert 600 < image.size[0] <= 900


def test_the_samples_are_those_of_the_kept_generator_and_classifier(transferred, small_run):
    out, _, numbers = transferred
    original, _, _ = transfer.load_generator(small_run[0] / "checkpoint.pt", "auto")
    for variant in ("original", "as-logged", "ours"):
        samples = np.load(out / f"samples-{variant}.npz")
        generator = transfer.new_generator(transfer.VARIANTS[variant].start, original)
        state = torch.load(out / f"generator-{variant}.pt", weights_only=True)["generator"]
        generator.load_state_dict(state)
        drawn = acwgan.generate(generator.eval(), torch.from_numpy(samples["labels"]), 0)
        assert np.array_equal((drawn[:, 0] * 255).round().byte().numpy(), samples["images"])
        target = transfer.model_a()
        target.load_state_dict(torch.load(out / "model_a.pt", weights_only=True)["network"])
        predicted = transfer.classify(target.eval(), drawn).numpy()
        assert np.array_equal(predicted, samples["predicted"])
    images, labels = common.glyphs(16)
    reader = acwgan.digit_reader(out, "glyphs", images, labels)
    ours = acwgan.reader_distance(reader, drawn, common.glyphs(100, 1)[0])
    assert numbers["rows"]["ours"]["frechet"] == pytest.approx(ours, rel=1e-6)  # week 1's distance


def test_a_transfer_that_was_killed_resumes_to_the_same_table(transferred, tmp_path):
    out, flags, numbers = transferred
    folder = with_classifiers_of(out, tmp_path)
    last = tmp_path / "generator-scratch-live.pt"
    stop_once_there_is(last, signal.SIGKILL, "transfer.py", *flags, "--out", folder)
    assert not (tmp_path / "generator-ours.pt").exists(), "stopped too late: this shows nothing"
    written = last.stat().st_mtime_ns
    again = transfer.main(["--resume", "--out", folder])
    assert last.stat().st_mtime_ns == written
    for name, row in numbers["rows"].items():
        same = {key: value for key, value in row.items() if key != "digits_per_second"}
        assert same.items() <= again["rows"][name].items(), name


def test_digits_of_the_wanted_class_do_not_count_as_attacked(transferred, tmp_path):
    out, flags, _ = transferred
    folder = with_classifiers_of(out, tmp_path)
    numbers = transfer.main([*flags, "--out", folder, "--target", "8", "--variant", "as-logged"])
    assert list(numbers["rows"]) == ["original", "as-logged", "pgd"]
    assert numbers["rows"]["as-logged"]["target_fooled"]["n"] == 90
    assert set(np.load(tmp_path / "samples-as-logged.npz")["target"]) == {8}


class Says(nn.Module):
    """A classifier that answers the same classes to any images."""

    def __init__(self, classes):
        super().__init__()
        self.logits = F.one_hot(torch.tensor(classes), 10).float()

    def forward(self, images):
        return self.logits


def test_every_column_measures_what_its_name_says():
    images, reader = common.glyphs(16)[0], acwgan.DigitReader().eval().requires_grad_(False)
    asked, wanted = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 4])
    answers = {"target": [1, 2, 2, 4, 4], "other_target": [1, 1, 2, 3, 4], "judge": [0, 2, 2, 3, 4]}
    answers = {role: Says(classes) for role, classes in answers.items()}
    roles = dict.fromkeys(transfer.Networks._fields) | answers | {"reader": reader}
    moved = images[:5].clone()
    moved[:, :, 0, 0] += 0.5
    networks = transfer.Networks(**roles)
    predicted, row = transfer.measure(moved, images[:5], asked, wanted, networks, images)
    assert predicted.tolist() == [1, 2, 2, 4, 4]
    hits = {
        "target_fooled": 3,
        "judge_reads_y": 3,
        "both": 2,
        "other_fooled": 1,
        "other_misread": 1,
    }
    for name, n in hits.items():
        assert row[name] == common.wilson(n, 4), name  # the fifth image is asked for what is wanted
    assert row["l2"] == row["linf"] == 0.5


@pytest.fixture
def networks(small_run):
    """Untrained networks beside the small run's generator and critic."""
    torch.manual_seed(0)
    original, critic, _ = transfer.load_generator(small_run[0] / "checkpoint.pt", "auto")
    made = {role: transfer.AUXILIARY() for role in ("auxiliary", "robust_auxiliary", "judge")}
    made["batch_norm_auxiliary"] = transfer.AUXILIARY(batch_norm=True)
    made |= {role: transfer.model_a() for role in ("target", "random_target", "other_target")}
    made = {role: network.eval().requires_grad_(False) for role, network in made.items()}
    return transfer.Networks(original, critic, reader=None, **made)


def term(name, networks, images):
    """A term of the loss for these images of classes 0, 1, ... and fixed latent numbers."""
    latent, labels = torch.ones(len(images), networks.original.latent), torch.arange(len(images))
    banks = {"frechet": transfer.FeatureBank(networks.auxiliary, common.glyphs(40)[0])}
    return transfer.loss_term(name, networks, banks, images, latent, labels, labels)


def small_training(networks, name, steps=2, **changes):
    args = transfer.settings(["--steps", str(steps), "--batch-size", "4"])
    return transfer.train(name, args, networks._replace(**changes), *common.glyphs(20))


class Flat(nn.Module):
    def features(self, images):
        return images.flatten(1)


def test_a_feature_bank_keeps_seven_batches_and_its_gradient_is_that_of_all():
    torch.manual_seed(0)
    real, batches = torch.rand(30, 1, 2, 3), torch.rand(10, 5, 1, 2, 3)
    bank, variance = transfer.FeatureBank(Flat(), real), real.flatten(1).var(0).sum()
    for i, batch in enumerate(batches):
        kept = batches[max(0, i - 7) : i + 1].reshape(-1, 6)  # brute force: the batches so far
        distance = common.frechet_distance_torch(kept, real.flatten(1)) / variance
        assert torch.allclose(bank.distance(batch.clone().requires_grad_()), distance, rtol=1e-4)
    bank, x = transfer.FeatureBank(Flat(), real), batches[0].clone().requires_grad_()
    gradients = [torch.autograd.grad(bank.distance(x), x)[0] for _ in range(3)]
    same = common.frechet_distance_torch(torch.cat([x, x, x]).flatten(1), real.flatten(1))
    (expected,) = torch.autograd.grad(same / variance, x)  # all three batches move
    assert torch.allclose(gradients[2], expected, rtol=1e-4, atol=1e-7)


def test_the_terms_of_the_losses_are_what_their_names_say(networks):
    weights = transfer.VARIANTS["ours"].weights
    assert weights["robust hinge"] > 0
    assert "auxiliary" not in weights
    images = common.glyphs(8)[0].requires_grad_()
    logits = networks.robust_auxiliary(images)
    expected = transfer.hinge(logits, torch.arange(8), 3.0).mean()
    assert term("robust hinge", networks, images) == expected
    assert not term("logged fid", networks, images).requires_grad  # the log's has no gradient
    (gradient,) = torch.autograd.grad(term("frechet", networks, images), images)
    assert gradient.abs().sum() > 0
    latent, labels = torch.ones(8, networks.original.latent), torch.arange(8)
    original = networks.original(latent, labels)
    assert term("euclidean", networks, original) == 0
    assert "noisy euclidean" in transfer.VARIANTS["euclidean"].weights
    noise = [term("noisy euclidean", networks, original).item() for _ in range(20)]
    assert np.mean(noise) == pytest.approx(784 * 0.1**2, rel=0.02)  # the variance of each pixel


def test_each_row_of_the_ladder_changes_one_thing():
    rows = transfer.VARIANTS
    live = rows["scratch-live"]._replace(critic_trains=False, change=rows["scratch"].change)
    assert live == rows["scratch"]
    for name in ("adversarial", "fid", "euclidean"):
        same = {"change": rows[name].change, "weights": rows[name].weights}
        assert rows["as-logged"]._replace(**same) == rows[name]
    assert rows["as-logged"].weights.keys() == {"logged fid", "auxiliary"}  # gamma was 0


def test_only_scratch_lives_critic_trains_and_adam_has_the_rate_of_the_row(networks, monkeypatch):
    seen = []

    def record(term, networks, *rest):
        seen.append(networks.critic.heads.weight.detach().clone())
        return loss_term(term, networks, *rest)

    loss_term = transfer.loss_term
    monkeypatch.setattr(transfer, "loss_term", record)
    for name, moves in (("scratch", False), ("scratch-live", True)):
        seen.clear()
        small_training(networks, name)
        assert torch.equal(seen[0], seen[-1]) != moves
        assert torch.equal(seen[0], networks.critic.heads.weight) != moves
        torch.manual_seed(0)
        before = transfer.new_generator("untrained", networks.original)
        after, _ = small_training(networks, name, steps=1)
        step = after.project.weight - before.project.weight
        assert step.abs().max().item() == pytest.approx(2e-3, rel=1e-3)  # Adam's first is its rate


def test_the_generators_loss_sees_the_critic_after_its_step(networks, monkeypatch):
    def compare(term, networks, banks, images, *rest):
        scores = networks.critic(images)[0]
        torch.clear_autocast_cache()
        assert torch.equal(scores, networks.critic(images)[0])
        return scores.mean()

    monkeypatch.setattr(common, "has_bf16", lambda device: True)
    monkeypatch.setattr(transfer, "loss_term", compare)
    monkeypatch.setattr(transfer, "CRITIC_RATE", 0.1)
    small_training(networks, "scratch-live")


def test_no_variant_changes_the_networks_it_is_trained_against(networks):
    frozen = [network for network in networks if network]
    before = [p.clone() for network in frozen for p in network.state_dict().values()]
    for name in transfer.VARIANTS:
        small_training(networks, name)
    after = [p for network in frozen for p in network.state_dict().values()]
    assert all(map(torch.equal, before, after))


def test_generators_start_as_their_rows_say(networks):
    latent, labels = torch.randn(4, networks.original.latent), torch.arange(4)
    drawn = networks.original(latent, labels)
    refiner = transfer.new_generator("refiner", networks.original)
    assert torch.allclose(refiner(latent, labels), drawn, atol=1e-6)
    for start, alone in (("original", True), ("pretrained", False), ("untrained", False)):
        generator = transfer.new_generator(start, networks.original).eval()
        others = generator(latent[:3], labels[:3]), generator(latent, labels)[:3]
        assert torch.allclose(*others, atol=1e-5) == alone  # the batch's statistics, or its own
        same = torch.equal(generator.project.weight, networks.original.project.weight)
        assert same == (start != "untrained")


def test_the_hinge_stops_pushing_once_the_label_leads_by_its_margin():
    logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 5.0]], requires_grad=True)
    value = transfer.hinge(logits, torch.tensor([0, 1]), 1.0)
    assert value.tolist() == [0.0, 4.0]
    value.sum().backward()
    assert logits.grad.tolist() == [[0, 0, 0], [0, -1, 1]]


def test_the_attacks_stay_within_eps_and_move_a_linear_classifier_by_the_closed_form():
    class Linear(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1) @ w, 0 * x.flatten(1).sum(1)], 1)

    w = torch.randn(784, generator=torch.Generator().manual_seed(0)) / 100  # or softmax saturates
    images, labels = torch.full((3, 1, 28, 28), 0.5), torch.zeros(3, dtype=torch.long)
    step = 0.3 * w.sign().view(1, 28, 28)
    assert torch.allclose(transfer.pgd(Linear(), images, labels, -1), images + step)
    assert torch.allclose(transfer.pgd(Linear(), images, labels, 1), images - step)
    once = transfer.fast_gradient(Linear(), images, labels)
    assert (once - images).abs().max() <= 0.3 + 1e-6
    assert ((once - images).flatten(1) @ w < 0).all()


def test_classifiers_are_trained_as_planned_and_anew_when_the_plan_changes(tmp_path, monkeypatch):
    trained, data = [], ("glyphs", *common.glyphs(20))
    record = lambda network, **how: trained.append(how)  # noqa: E731
    monkeypatch.setattr(acwgan, "train_classifier", record)
    for name in transfer.CLASSIFIERS:
        transfer.classifier(name, tmp_path, *data)
        robust = name in ("judge", "robust_auxiliary")
        assert trained[-1].get("attack") == (transfer.fast_gradient if robust else None)
    transfer.classifier("judge", tmp_path, *data)
    assert len(trained) == len(transfer.CLASSIFIERS)
    make, seed, how = transfer.CLASSIFIERS["judge"]
    plain = {key: value for key, value in how.items() if key != "attack"}
    for changed in ((make, 8, how), (make, seed, plain), (make, seed, how | {"epochs": 1})):
        for plan in ((make, seed, how), changed):
            monkeypatch.setitem(transfer.CLASSIFIERS, "judge", plan)
            n = len(trained)
            transfer.classifier("judge", tmp_path, *data)
        assert len(trained) == n + 1


def test_a_generator_that_does_not_fit_is_refused_with_its_remedy(small_run, tmp_path, capsys):
    checkpoint, path = small_run[0] / "checkpoint.pt", tmp_path / "changed.pt"
    content = torch.load(checkpoint, weights_only=True)
    large = content | {"settings": content["settings"] | {"image_size": 64}}
    fails(script("transfer.py", "--generator", tmp_path / "none.pt"), 2, "none.pt", "acwgan.py")
    for change, dataset, code, word in (
        (content, "mnist", 2, "glyphs"),
        (large, "auto", 2, "64 pixels"),
        (content | {"average": {}}, "auto", 1, "changed.pt does not fit"),
        (content | {"kind": "other"}, "auto", 1, "changed.pt is not"),
    ):
        torch.save(change, path)
        with pytest.raises(common.Failure, match=f"{word}.*python acwgan.py --out") as failure:
            transfer.load_generator(path, dataset)
        assert failure.value.code == code
        assert len(str(failure.value)) <= 300
    torch.save(content | {"steps": 7}, path)
    transfer.load_generator(path, "auto")
    assert "unfinished, step 7 of 60" in capsys.readouterr().out


def test_resuming_otherwise_than_it_was_made_is_refused(transferred, small_run, tmp_path):
    out, flags, _ = transferred
    for path in out.glob("*.pt"):
        shutil.copy(path, tmp_path)
    resume = ["--resume", "--out", str(tmp_path)]
    for more in (["--steps", "2"], ["--seed", "1"], ["--target", "3"]):
        with pytest.raises(common.Failure, match="was made with") as failure:
            transfer.main([*resume, *more])
        assert failure.value.code == 2
    with pytest.raises(common.Failure, match="was made with"):  # nor is it overwritten silently
        transfer.main([*flags, "--out", str(tmp_path), "--steps", "2"])
    content = torch.load(small_run[0] / "checkpoint.pt", weights_only=True)
    content["critic"]["heads.bias"] += 1
    torch.save(content, tmp_path / "other")
    with pytest.raises(common.Failure, match="week_1"):
        transfer.main([*resume, "--generator", str(tmp_path / "other")])
    ours = tmp_path / "generator-ours.pt"
    torch.save(torch.load(ours, weights_only=True) | {"generator": {}}, ours)
    with pytest.raises(common.Failure, match=r"generator-ours.pt.*trained anew"):
        transfer.main([*resume, "--variant", "ours"])
    fails(script("transfer.py", "--resume", "--out", tmp_path / "empty"), 2, "empty")


def test_a_transfer_whose_loss_is_no_number_ends_in_one_line(networks, monkeypatch):
    endless = transfer.VARIANTS["fid"]._replace(weights={"adversarial": 1e39})
    monkeypatch.setitem(transfer.VARIANTS, "fid", endless)
    with pytest.raises(common.Failure, match="not a number"):
        small_training(networks, "fid")


# --- weeks 3 to 5: the classifier


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A folder with 40 + 20 made-up digits in MNIST's format, for the whole module."""
    folder = tmp_path_factory.mktemp("digits")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        digits = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", digits)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return folder


@pytest.fixture(scope="module")
def few_photos(tmp_path_factory):
    """COCO's folders with twelve photos of three colours to train on, and three to measure on."""
    folder, colours = tmp_path_factory.mktemp("photos") / "coco", ("red", "lime", "blue")
    categories = [{"id": i, "name": f"name {i}"} for i in range(80, 0, -1)]
    (folder / "annotations").mkdir(parents=True)
    for split, n in (("train2017", 12), ("val2017", 3)):
        (folder / split).mkdir()
        content = {"categories": categories, "images": [], "annotations": []}
        for i in range(n):
            image = Image.new("RGB", (50, 40 + i), colours[i % 3])
            image.save(folder / split / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png"})
            content["annotations"].append({"image_id": i, "category_id": (60, 2, 80)[i % 3]})
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder.parent


@pytest.mark.parametrize(
    ("arch", "entries", "millions"),
    [("tresnet_m", 374, 29.50), ("tresnet_l", 535, 53.75), ("tresnet_xl", 649, 75.99)],
)
def test_the_networks_have_the_published_files_entries(arch, entries, millions):
    with torch.device("meta"):
        network = asl_model.tresnet(arch, 80)
    state = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    assert len(state) == entries
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    w = {"tresnet_m": 64, "tresnet_l": 76, "tresnet_xl": 83}[arch]
    some = {
        "body.conv1.0.weight": (w, 48, 3, 3),
        "body.conv1.1.running_var": (w,),
        "body.layer1.0.se.fc1.weight": (64, w, 1, 1),
        "body.layer2.0.conv1.0.0.weight": (2 * w, w, 3, 3),
        "body.layer2.0.conv1.0.1.bias": (2 * w,),
        "body.layer2.0.downsample.1.0.weight": (2 * w, w, 1, 1),
        "body.layer3.1.conv1.0.weight": (4 * w, 16 * w, 1, 1),
        "body.layer3.1.se.fc2.bias": (4 * w,),
        "body.layer4.0.conv2.0.0.weight": (8 * w, 8 * w, 3, 3),
        "body.layer4.0.conv3.1.running_mean": (32 * w,),
        "head.fc.weight": (80, 32 * w),
    }
    assert some.items() <= state.items()
    assert not any(
        "num_batches" in name or "layer4.0.se" in name or "filt" in name for name in state
    )


def published_state(arch, classes):
    """A random state dict with moments of real activations, gammas of either sign, some zero."""
    torch.manual_seed(0)
    network = asl_model.tresnet(arch, classes)
    gammas = [
        module.weight for module in network.modules() if isinstance(module, asl_model.NormAct)
    ]
    with torch.no_grad():
        for gamma in gammas:
            gamma.uniform_(0.3, 1)
        for name, x in network.named_parameters():
            if name.endswith("bias"):
                x.normal_(0, 0.2)
        network.head.fc.weight.normal_(0, 0.1)
        for i in range(10):
            network(photo_like(8, 64, i))
        for gamma in gammas:
            gamma.mul_(torch.randn(gamma.shape).sign())[0] = 0
    return network.state_dict()


def inplace_abn_logits(state, images):
    """TResNet's logits (N, L) in float64, written from the papers and the entries' names alone."""
    state = {name: x.double() for name, x in state.items()}

    def conv_abn(x, name, slope):
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        gamma, beta, mean, var = (
            state[f"{name}.1.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / torch.sqrt(var + 1e-5) * (gamma.abs() + 1e-5) + beta
        return torch.where(x < 0, slope * x, x)

    def conv(x, name, slope):
        if f"{name}.0.weight" in state:
            return conv_abn(x, name, slope)
        x = F.pad(conv_abn(x, f"{name}.0", slope), (1, 1, 1, 1), mode="reflect")
        kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
        return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])

    n, c, h, w = images.shape
    x = torch.empty(n, 16 * c, h // 4, w // 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            x[:, (4 * i + j) * c : (4 * i + j + 1) * c] = images[:, :, i::4, j::4]
    x = conv_abn(x, "body.conv1", 1e-2)
    blocks = sorted(
        {
            tuple(map(int, re.findall(r"layer(\d+)\.(\d+)", name)[0]))
            for name in state
            if "layer" in name
        }
    )
    for stage, i in blocks:
        name = f"body.layer{stage}.{i}"
        y = conv(x, f"{name}.conv1", 1e-3)
        y = conv(y, f"{name}.conv2", 1.0 if stage < 3 else 1e-3)
        if f"{name}.se.fc1.weight" in state:
            scale = y.mean((2, 3))
            for fc, act in (("fc1", torch.relu), ("fc2", torch.sigmoid)):
                scale = act(
                    scale @ state[f"{name}.se.{fc}.weight"][:, :, 0, 0].T
                    + state[f"{name}.se.{fc}.bias"]
                )
            y = y * scale[:, :, None, None]
        if stage > 2:
            y = conv(y, f"{name}.conv3", 1.0)
        if f"{name}.downsample.1.0.weight" in state:
            x = conv_abn(
                F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
                f"{name}.downsample.1",
                1.0,
            )
        elif f"{name}.downsample.0.0.weight" in state:
            x = conv_abn(x, f"{name}.downsample.0", 1.0)
        x = torch.relu(x + y)
    return x.mean((2, 3)) @ state["head.fc.weight"].T + state["head.fc.bias"]


@pytest.mark.parametrize(("arch", "size"), [("tresnet_s", 64), ("tresnet_m", 72)])
def test_a_file_in_the_published_format_gives_inplace_abns_logits(tmp_path, arch, size):
    state = published_state(arch, 5)
    assert min(x.min() for name, x in state.items() if name.endswith("1.weight")) < -0.9
    names = {"3": "d", "0": "a", "4": "e", "1": "b", "2": "c"}
    torch.save({"model": state, "num_classes": 5, "idx_to_class": names}, tmp_path / "file.pth")
    images = photo_like(3, size)
    truth = inplace_abn_logits(state, images)
    assert (truth - truth.mean(0)).norm() > 0.003 * truth.norm(), (
        "all images look alike: the test shows nothing"
    )
    for folded in (True, False):
        network, class_names = asl_model.load_asl(tmp_path / "file.pth", folded=folded)
        assert class_names == list("abcde")
        assert network.arch == arch
        assert not network.training
        with torch.no_grad():
            error = (network(images) - truth).norm() / truth.norm()
        assert error < 1e-5, folded
    torch.save(
        {"state_dict": state | {"body.conv1.1.num_batches_tracked": torch.tensor(7)}},
        tmp_path / "file.pth",
    )
    assert asl_model.load_asl(tmp_path / "file.pth")[1] == list("01234")


def test_folding_changes_no_logit_and_no_input_gradient(monkeypatch):
    network = asl_model.tresnet("tresnet_s", 4).double()
    network.load_state_dict(published_state("tresnet_s", 4))
    network.eval()
    # float64 is asked for on the CPU only: Apple's GPU has none
    moved, double = [], torch.Tensor.double
    monkeypatch.setattr(asl_model.TResNet, "cpu", lambda self: moved.append(1) or self)
    monkeypatch.setattr(torch.Tensor, "double", lambda x: double(x) if moved else 1 / 0)
    images, folded = photo_like(2, 64).to(torch.float64), asl_model.fold(network)
    results = []
    for model in (network, folded):
        x = images.clone().requires_grad_()
        logits = model(x)
        results.append((logits, *torch.autograd.grad(logits[:, 1].sum(), x)))
    for ours, truth in zip(*results, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-12 * truth.abs().max().item())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert not any(isinstance(module, asl_model.NormAct) for module in folded.modules())


def asl_formula(logits, targets, gamma_neg, gamma_pos, clip):
    """Equation 7 of Ben-Baruch et al. 2020, as it is printed."""
    p = 1 / (1 + torch.exp(-logits))
    q = torch.clamp(p - clip, min=0)
    positive = -targets * (1 - p) ** gamma_pos * torch.log(p)
    return (positive - (1 - targets) * q**gamma_neg * torch.log(1 - q)).sum()


@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"),
    [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0.0), (1.5, 0.5, 0.2), (0, 0, 0)],
)
def test_asl_and_its_gradient_are_the_formulas(gamma_neg, gamma_pos, clip):
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 8, generator=rng, dtype=torch.float64)
    targets = (torch.rand(50, 8, generator=rng) < 0.3).double()
    exact, ours, single = (
        logits.clone().to(t).requires_grad_() for t in (torch.float64,) * 2 + (torch.float32,)
    )
    truth = asl_formula(exact, targets, gamma_neg, gamma_pos, clip)
    truth.backward()
    loss = asl_model.AsymmetricLoss(gamma_neg, gamma_pos, clip)
    for x, t, tolerance in ((ours, targets, 1e-9), (single, targets.float(), 1e-4)):
        value = loss(x, t)
        value.backward()
        assert value.item() == pytest.approx(truth.item(), rel=tolerance)
        assert torch.allclose(
            x.grad.double(),
            exact.grad,
            rtol=tolerance,
            atol=tolerance * exact.grad.abs().max().item(),
        )
    if clip == gamma_neg == gamma_pos == 0:
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        assert truth.item() == pytest.approx(bce.item())


@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"), [(4, 1, 0.05), (0.5, 0.5, 0.05), (0, 0, 0), (2, 2, 0)]
)
def test_asl_is_finite_and_pulls_the_right_way_at_any_logit(gamma_neg, gamma_pos, clip):
    logits = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 200.0, 1e4]] * 2, requires_grad=True)
    targets = torch.tensor([[1.0] * 6, [0.0] * 6])
    value = asl_model.AsymmetricLoss(gamma_neg, gamma_pos, clip)(logits, targets)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, :3] <= -0.9).all(), (
        "a positive that is far off is pulled up, whatever its distance"
    )
    assert (logits.grad[1] >= 0).all()
    if not clip:
        assert (logits.grad[1, 3:] >= 0.9).all()


def test_mean_average_precision_is_the_brute_force_ones():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.random((40, 7)), (rng.random((40, 7)) < 0.2).astype(np.float32)
    labels[:, 3] = 0
    expected = []
    for c in range(7):
        ranked = sorted(zip(probabilities[:, c], labels[:, c], strict=True), reverse=True)
        precisions, hits = [], 0
        for rank, (_, label) in enumerate(ranked, 1):
            if label:
                hits += 1
                precisions.append(hits / rank)
        expected.append(sum(precisions) / len(precisions) if precisions else 0)
    assert np.allclose(asl_model.average_precision(probabilities, labels), expected)
    numbers = asl_model.measure(probabilities, labels, 0.5)
    assert numbers["mAP"] == pytest.approx(sum(expected) / 7)
    assert numbers["mAP_present"] == pytest.approx(sum(expected) / 6)


class OwnBackward(torch.autograd.Function):
    """A leaky ReLU that hands its gradient on as it comes."""

    @staticmethod
    def forward(ctx, x, slope):
        return torch.where(x < 0, slope * x, x)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class OwnLeakyReLU(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return OwnBackward.apply(x, self.slope)


def rebuilt(network):
    """(A copy whose leaky ReLU modules are `OwnLeakyReLU`, their number)."""
    network, places = copy.deepcopy(network), 0
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, OwnLeakyReLU(child.negative_slope))
                places += 1
    return network, places


def logits_and_gradient(network, images):
    images = images.clone().requires_grad_()
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), images)[0]


def difference(x, truth):
    return ((x - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("arch", "places"), [("tresnet_s", 10), ("tresnet_m", 36)])
def test_the_pinned_packages_gradient_is_an_independent_rebuildings(arch, places):
    network = asl_model.tresnet(arch, 4).eval()
    network.load_state_dict(asl_model.inplace_abn_gammas(published_state(arch, 4)))
    images, folded = photo_like(2, 64), asl_model.fold(network)
    before = copy.deepcopy(network.state_dict())
    truth, count = rebuilt(folded)
    assert count == places
    logits, gradient = logits_and_gradient(truth, images)
    right_logits, right_gradient = logits_and_gradient(folded, images)
    for model in (network.train(), folded):
        pinned = asl_model.inplace_abn_1_0_12(model)
        assert not pinned.training
        ours = logits_and_gradient(pinned, images)
        assert difference(ours[0], logits) < 1e-5
        assert difference(ours[1], gradient) < 1e-5
        assert difference(ours[1], right_gradient) > 0.1
    assert torch.equal(ours[0], right_logits)
    assert network.training
    assert all(torch.equal(x, before[k]) for k, x in network.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(pinned(images), folded(images))


def test_the_pinned_gradient_of_two_layers_is_the_closed_form():
    a, b, images = torch.randn(6, 5), torch.randn(3, 6), torch.randn(4, 5)
    first, second = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)
    first.weight.data, second.weight.data = a, b
    for middle in ([nn.LeakyReLU(0.1)], [nn.LeakyReLU(0.1, inplace=True)]):
        network = asl_model.inplace_abn_1_0_12(nn.Sequential(first, *middle, second))
        logits, gradient = logits_and_gradient(network, images)
        assert torch.equal(logits, F.leaky_relu(images @ a.T, 0.1) @ b.T)
        assert torch.allclose(gradient, (b @ a)[0].expand(4, 5), atol=1e-6)
    network = asl_model.inplace_abn_1_0_12(nn.Sequential(first, nn.ReLU(), second))
    right = logits_and_gradient(nn.Sequential(first, nn.ReLU(), second), images)
    assert torch.equal(logits_and_gradient(network, images)[1], right[1])
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        norm = nn.Sequential(nn.BatchNorm1d(6), relu).eval()
        network = asl_model.inplace_abn_1_0_12(nn.Sequential(first, *norm, second))
        scale = (1 + 1e-5) ** -0.5
        gradient = logits_and_gradient(network, images)[1]
        assert torch.allclose(gradient, scale * (b @ a)[0].expand(4, 5), atol=1e-6)


class SplitBlock(torchvision.models.resnet.BasicBlock):
    """torchvision's block, in which the inner ReLU is its own: `OwnLeakyReLU` of slope 0."""

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(
            self.bn2(self.conv2(OwnBackward.apply(self.bn1(self.conv1(x)), 0))) + shortcut
        )


def test_of_torchvisions_resnets_only_the_inner_relus_skip_their_derivative():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.weight.data, module.running_var):
                x.uniform_(0.5, 1.5)
            for x in (module.bias.data, module.running_mean):
                x.normal_(0, 0.3)
    truth, count = copy.deepcopy(network), 1
    truth.relu = OwnLeakyReLU(0)
    for module in truth.modules():
        if isinstance(module, torchvision.models.resnet.BasicBlock):
            module.__class__ = SplitBlock
            count += 1
    assert count == 1 + 8
    images = photo_like(2, 64)
    logits, gradient = logits_and_gradient(asl_model.inplace_abn_1_0_12(network), images)
    right_logits, right_gradient = logits_and_gradient(network, images)
    assert torch.equal(logits, right_logits)
    assert difference(gradient, logits_and_gradient(truth, images)[1]) < 1e-5
    assert difference(gradient, right_gradient) > 0.1


def test_the_augmented_view_of_a_photo_is_the_same_for_a_seed(monkeypatch):
    photos = photo_like(3, 64)
    state = torch.get_rng_state()
    views = [asl_model.augmented(photos, seed) for seed in (0, 0, 1)]
    first, again, other = (torch.stack([view[i] for i in range(3)]) for view in views)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(views[0]) == 3
    assert torch.equal(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert (first.shape, first.dtype) == (photos.shape, torch.float32)
    assert 0 <= first.min() <= first.max() <= 1
    # without RandAugment: one rectangle, at most half as wide and high, of one colour
    monkeypatch.setattr(asl_model, "RandAugment", lambda: lambda image: image)
    grey = torch.full((40, 3, 64, 64), 0.5)
    sizes, blocks = [], asl_model.augmented(grey, 0)
    for i in range(40):
        block = blocks[i]
        rows, columns = (block != block[:, :1, :1]).any(0).nonzero(as_tuple=True)
        if len(rows) and (block[:, 0, 0] * 255).round().eq(128).all():
            box = block[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == box[:, :1, :1]).all()
            sizes.append(box.shape[1:])
    assert max(h for h, _ in sizes) == max(w for _, w in sizes) == 32
    assert len(set(sizes)) > 10


def asl_flags(data, out, *flags):
    flags = [*flags, "--data", data, "--out", out, "--device", "cpu"]
    return list(map(str, flags))


SCENES = ("--dataset", "scenes", "--digits", "mnist")


PHOTOS = ("--dataset", "coco", "--arch", "tresnet_s", "--image-size", 64, "--batch-size", 6)


def test_a_resumed_training_finds_the_batches_that_were_left(few_photos, few_digits, tmp_path):
    photos, labels = photo_like(8, 64), torch.arange(8.0)[:, None]
    digits = common.scene_digits("mnist", few_digits, "train")[1:]
    cases = [((photos, labels), PHOTOS), (digits, SCENES), (digits, (*SCENES, "--limit", 8))]
    for data, flags in cases:
        flags = asl_flags(few_digits, tmp_path, "--train", *flags, "--epochs", 3)
        args = asl_model.settings([*flags, "--batch-size", "2"])
        how = args, data
        batches, rest = (
            list(asl_model.training_batches(*how, steps, 12, torch.device("cpu")))
            for steps in (0, 5)
        )
        assert (len(batches), len(rest)) == (12, 7)
        for ours, truth in zip(rest, batches[5:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
        repeats = torch.equal(batches[0][0], batches[4][0])
        assert repeats == ("--limit" in flags)
        if args.augment:
            batches = [x for images, y in batches for x, i in zip(images, y, strict=True) if i == 3]
            assert len({x.numpy().tobytes() for x in batches}) == 3, "a new view in each epoch"


def test_training_follows_one_cycle_averages_its_weights_and_keeps_the_best(
    few_digits, tmp_path, monkeypatch
):
    rates, average, judged, scores = [], {}, [], iter([0.3, 0.5, 0.9, 0.2] + 6 * [0.4])
    adam_step, fold = torch.optim.Adam.step, asl_model.fold

    def step(adam):
        before = [x.clone() for x in adam.param_groups[0]["params"]]
        adam_step(adam)
        rates.append(adam.param_groups[0]["lr"])
        decay = min(0.99, 1 - 8 / (len(rates) + 8))
        for i, x in enumerate(adam.param_groups[0]["params"]):
            average[i] = average.get(i, before[i]) * decay + x.detach() * (1 - decay)

    def spied_fold(network):
        judged.append({k: x.clone() for k, x in network.state_dict().items()})
        return fold(network)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(asl_model, "fold", spied_fold)
    monkeypatch.setattr(asl_model, "average_precision", lambda p, y: np.full(10, next(scores)))
    flags = (*SCENES, "--train", "--epochs", 10, "--limit", 8, "--batch-size", 4, "--lr", 0.01)
    args = asl_model.settings(asl_flags(few_digits, tmp_path, *flags))
    facts = asl_model.train(args, torch.device("cpu"))
    shares = [(i + 1) / 21 for i in range(20)]
    cycle = [min(share / 0.2, (1 - share) / 0.8) for share in shares]
    assert rates == pytest.approx([0.01 * math.sin(math.pi * rise / 2) ** 2 for rise in cycle])
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    names = [k for k, x in checkpoint["network"].items() if "running" not in k]
    for i, name in enumerate(names):
        assert torch.allclose(checkpoint["average"][name], average[i], atol=1e-6), name
        assert not torch.equal(checkpoint["average"][name], checkpoint["network"][name])
    content = torch.load(asl_model.weights_path(args), weights_only=True)
    assert content["mAP"] == facts["best_mAP"] == 0.9
    assert all(torch.equal(x, judged[2][k]) for k, x in content["model"].items())
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert list(rows[0]) == ["step", "seconds", "loss", "mAP"]
    assert [int(row["step"]) for row in rows] == list(range(2, 21, 2))
    seconds = [float(row["seconds"]) for row in rows]
    assert 0 < seconds[-1] <= facts["training_seconds"] + 0.1
    assert seconds == sorted(seconds)
    assert min(float(row["loss"]) for row in rows) > 0


LONGER = (*SCENES, "--train", "--epochs", 20, "--limit", 32, "--batch-size", 8)


def test_training_that_was_killed_resumes_to_the_same_bits(few_digits, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record = asl_model.main(asl_flags(few_digits, whole, *LONGER))
    path = killed / "checkpoint.pt"
    flags = asl_flags(few_digits, killed, *LONGER)
    stop_once_there_is(path, signal.SIGKILL, "asl_model.py", *flags)
    position = torch.load(path, weights_only=True)
    assert 0 < position["steps"] < 80, "the run was over before it was stopped"
    assert not list(killed.glob("*.pth")), "an unfinished network looks like a finished one"
    out = ["--out", str(killed), "--resume"]
    for flag, words in (("--lr=0.1", "lr 0.005, not 0.1"), ("--limit=31", "limit 32, not 31")):
        with refused(words, code=2):
            asl_model.main([*out, flag])
    with refused("epochs 20, not 21", "--force", code=2):
        asl_model.main([*flags, "--epochs", "21"])
    common.save_checkpoint(path, position | {"seconds": 1000.0})
    again = asl_model.main(out)
    assert 1000 < again["training_seconds"] < 1100
    first, second = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (whole, killed))
    for part in ("network", "average", "best"):
        assert all(torch.equal(second[part][name], x) for name, x in first[part].items()), part
    assert [row["loss"] for row in first["history"]] == [row["loss"] for row in second["history"]]
    assert again["test"] == record["test"]
    weights = killed / "tresnet_s-scenes-mnist.pth"
    content = torch.load(weights, weights_only=True)
    assert set(content) >= {"model", "num_classes", "idx_to_class", "settings", "mAP"}
    assert content["settings"] == first["settings"]
    flags = asl_flags(few_digits, tmp_path / "x", *SCENES, "--evaluate", "--limit", 32)
    assert asl_model.main([*flags, "--weights", str(weights)])["test"] == record["test"]


def test_photos_are_learnt_by_heart_and_their_labels_told(few_photos, tmp_path, capsys):
    flags = asl_flags(few_photos, tmp_path, *PHOTOS)
    record = asl_model.main([*flags, "--train", "--epochs", "20", "--no-augment"])
    assert [record[split]["n"] for split in ("val2017", "train2017")] == [3, 12]
    assert record["train2017"]["mAP_present"] == record["val2017"]["mAP_present"] == 1
    assert record["train2017"]["mAP"] == pytest.approx(3 / 80)
    assert "val2017" in record["best_mAP_on"]
    with refused("split train2017, not val2017", code=2):
        asl_model.main(["--out", str(tmp_path), "--resume", "--split", "val2017"])
    with refused("augment False, not True", code=2):
        asl_model.main([*flags, "--train", "--epochs", "20"])
    weights = ["--weights", str(tmp_path / "tresnet_s-coco.pth")]
    photo = few_photos / "coco" / "train2017" / "0.png"
    labels = asl_model.main([*flags[:2], *flags[4:], *weights, "--image", str(photo)])["labels"]
    assert list(labels)[:1] == ["name 60"]
    again = asl_model.main([*flags, *weights, "--evaluate", "--split", "train2017"])
    assert again["train2017"] == record["train2017"]
    photo.write_bytes(photo.read_bytes()[:60])
    evaluate = script("asl_model.py", "--evaluate", "--split", "train2017", *flags, *weights)
    photo.unlink()
    Image.new("RGB", (50, 40), "red").save(photo)
    fails(evaluate, 1, f"{photo}: ")


def test_the_scenes_classifier_is_trained_once_in_a_folder_of_its_own(
    few_digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asl_model, "EPOCH", 64)
    monkeypatch.setattr(asl_model, "SAVE_EVERY", 0)
    other = Path("runs/asl_model/checkpoint.pt")
    other.parent.mkdir(parents=True)
    other.write_bytes(b"an unfinished training")
    measured, predict = [], asl_model.predict

    def interrupted(*args):
        measured.append(args)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(asl_model, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asl_model.scenes_classifier(few_digits)
    for _ in range(2):
        network, names, mean_ap, path = asl_model.scenes_classifier(few_digits)
        assert (names, network.arch) == (list("0123456789"), "tresnet_s")
        assert len(measured) == 3 + 8, "the training was resumed, and not repeated"
    assert path.parent == Path("runs/scenes_classifier")
    assert mean_ap == torch.load(path, weights_only=True)["mAP"]
    assert other.read_bytes() == b"an unfinished training"
    assert str(path) in capsys.readouterr().out
    flags = asl_flags(few_digits, path.parent, *SCENES, "--train", "--epochs", 1, "--limit", 64)
    asl_model.main([*flags, "--image-size", "32", "--force"])
    with refused(str(path), "epochs 1", "limit 64", code=2):
        asl_model.scenes_classifier(few_digits)


def test_our_own_files_keep_their_gammas_and_their_image_size(tmp_path):
    state = published_state("tresnet_s", 3)
    content = {"model": state, "idx_to_class": dict(enumerate("abc")), "norm": "batch norm"}
    torch.save(content | {"settings": {"image_size": 32}}, tmp_path / "own.pth")
    network = asl_model.load_asl(tmp_path / "own.pth", folded=False)[0]
    assert all(torch.equal(network.state_dict()[name], x) for name, x in state.items())
    assert network.image_size == 32


def test_the_order_of_a_networks_labels_is_its_own(few_photos):
    how = "coco", few_photos, 32, "val2017"
    _, labels, names, _ = asl_model.load_data(*how)
    assert labels.nonzero()[:, 1].tolist() == [59, 1, 79]
    _, labels, order, _ = asl_model.load_data(*how, names[::-1])
    assert order == names[::-1]
    assert labels.nonzero()[:, 1].tolist() == [20, 78, 0]
    with refused("coco", "cat, name 80", code=2):
        asl_model.load_data(*how, [*names[:-1], "cat"])


def test_files_that_are_not_published_weights_are_named_with_what_differs(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    state = published_state("tresnet_s", 2)
    good = {"model": state, "num_classes": 2, "idx_to_class": {0: "a", 1: "b"}}
    path = tmp_path / "file.pth"
    bias = "head.fc.bias"
    absent = {name: x for name, x in state.items() if name != bias}
    cases = [
        ({"model": Hostile()}, "checkpoint"),
        ({"model": 5}, "is no TResNet"),
        ({"model": {"a": 5}}, "head.fc.weight"),
        (good | {"model": absent}, bias),
        (good | {"model": state | {"extra": torch.zeros(3)}}, "extra"),
        (good | {"model": state | {bias: torch.tensor([1.0, torch.nan])}}, "finite"),
        (good | {"model": state | {bias: torch.tensor([1, 2])}}, "finite"),
    ]
    bad_names = {0: "a"}, {0: "a", 1: "a"}, {0: "a", 1: 5}, ["a", "b"], {0: "a", "x": "b"}
    cases += [(good | {"idx_to_class": names}, "file.pth") for names in bad_names]
    for content, word in cases:
        torch.save(content, path)
        with refused("file.pth", word, "--weights"):
            asl_model.load_asl(path)
    assert not (tmp_path / "owned").exists()
    torch.save(good, path)
    with refused("is no tresnet_m", "body.layer1.2.conv1"):
        asl_model.load_asl(path, "tresnet_m")
    path.write_bytes(path.read_bytes()[:100_000])
    for damaged in (path, tmp_path / "none.pth"):
        with refused(damaged.name):
            asl_model.load_asl(damaged)


def test_an_unknown_label_is_answered_with_the_nearest():
    names = ["person", "dining table", "donut", "teddy bear"]
    assert asl_model.label_index("donut", names) == 2
    cases = ("dounut", "nearest: donut"), ("Dinning Table", "nearest: dining table"), ("", "person")
    for name, words in cases:
        with refused(f"{name!r} is none of the 4 labels", words, code=2):
            asl_model.label_index(name, names)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "required"),
        (["--train", "--evaluate"], "not allowed"),
        (["--train", "--image-size", "66"], "multiple of 4"),
        (["--evaluate", "--threshold", "1"], "--threshold"),
        (["--resume", "--out", "nowhere"], "nowhere/checkpoint.pt"),
        (["--train", "--weights", "x.pth"], "--weights"),
        (["--train", "--dataset", "scenes", "--split", "val2017"], "--split"),
        (["--evaluate", "--dataset", "scenes", "--arch", "tresnet_m"], "tresnet_m"),
    ],
)
def test_misuse_of_the_classifier_ends_at_once_with_exit_code_2(flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        asl_model.settings(flags)
    assert end.value.code == 2
    assert word in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_training_and_is_not_saved(few_digits, tmp_path):
    flags = asl_flags(few_digits, tmp_path, *LONGER, "--lr", "1e30")
    with refused("step 8", "--lr"):
        asl_model.main(flags)
    assert not list(tmp_path.glob("*.p*"))


@pytest.mark.parametrize("arch", ["tresnet_m", "tresnet_l", "tresnet_xl"])
def test_peer_timm_gives_the_same_logits(tmp_path, arch):
    timm = pytest.importorskip("timm")
    state = published_state(arch, 80)
    torch.save({"model": state}, tmp_path / "file.pth")
    theirs = timm.create_model(arch, num_classes=80).eval()
    theirs.load_state_dict(timm.models.tresnet.checkpoint_filter_fn({"model": state}, theirs))
    images, ours = photo_like(3, 224), asl_model.load_asl(tmp_path / "file.pth")[0]
    with torch.inference_mode():
        error = difference(ours(images), theirs(images))
    print(f"{arch}: logits differ by {error:.1e} of their size")
    assert error < 1e-5


# --- weeks 3 to 5: the attacks


class Linear(nn.Module):
    """Images (N, 1, 2, 2) -> logits (N, L), linear in the pixels."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


def label_loss(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def logit_sum(logits, targets):
    return logits.sum(1)


def test_pgd_of_a_linear_model_is_its_closed_form():
    torch.manual_seed(0)
    weight, images, targets = torch.randn(3, 4), torch.rand(5, 1, 2, 2), torch.ones(5)
    step = weight[1].sign().view(1, 2, 2)
    how = Linear(weight), images, targets
    moved = pgd_attack.pgd(*how, lambda x, y: -x[:, 1], 0.3, 0.02, 40)
    assert torch.allclose(moved, (images + 0.3 * step).clamp(0, 1), atol=1e-6)
    moved = pgd_attack.pgd(*how, lambda x, y: -x[:, 1].mean(), 0.3, 0.02, 3)
    assert torch.allclose(moved, (images + 0.06 * step).clamp(0, 1), atol=1e-6)
    assert torch.equal(pgd_attack.pgd(*how, logit_sum, 0), images)
    none = pgd_attack.pgd(Linear(weight), images[:0], targets[:0], logit_sum)
    assert none.shape == (0, 1, 2, 2)


def test_pgd_with_momentum_is_the_papers_loop():
    images, centre = torch.rand(3, 1, 2, 2), torch.tensor([0.3, 0.5, 0.52, 0.8])
    how = Linear(torch.eye(4)), images, torch.zeros(3), lambda x, y: (x - centre).square().sum(1)
    found = pgd_attack.pgd(*how, 0.2, 0.05, 9, momentum=0.75)
    for i, x in enumerate(images.flatten(1).numpy()):
        moved, g = x.copy(), 0
        for _ in range(9):
            gradient = 2 * (moved - centre.numpy())
            g = 0.75 * g + gradient / np.abs(gradient).sum()
            moved = np.clip(np.clip(moved - 0.05 * np.sign(g), x - 0.2, x + 0.2), 0, 1)
        assert np.allclose(found[i].flatten().numpy(), moved, atol=1e-6)


@pytest.mark.parametrize("clip", [(0, 1), (-0.5, 2)])
def test_pgd_stays_within_eps_and_clip_from_any_start(clip):
    torch.manual_seed(0)
    images = clip[0] + (clip[1] - clip[0]) * torch.rand(20, 1, 2, 2)
    how = Linear(torch.randn(2, 4)), images, torch.zeros(20), logit_sum
    moved = pgd_attack.pgd(*how, 0.1, 0.07, 5, True, clip=clip)
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert clip[0] <= moved.min()
    assert moved.max() <= clip[1]
    starts = [pgd_attack.pgd(*how, 0.1, 0.07, 0, True, clip=clip) for _ in range(2)]
    assert not torch.equal(*starts)


@pytest.mark.parametrize("images", [255 * torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)])
def test_images_outside_the_range_are_refused_with_what_to_do(images):
    with pytest.raises(ValueError, match=r"give them in \[0, 1\], and normalise inside"):
        pgd_attack.pgd(lambda x: x.flatten(1), images, torch.zeros(2), logit_sum)


def small_network(classes=3):
    """A network with everything that has a mode, in training mode, its norm used to photos."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)]
    network = nn.Sequential(*layers)
    network[-1].weight.data.mul_(5)
    for i in range(20):
        network(photo_like(16, 12, i))
    return network


def test_pgd_leaves_the_model_and_its_inputs_as_they_were():
    network, images = small_network(), photo_like(4, 12)
    network[1].eval()
    network[0].weight.requires_grad_(False)
    state, copy = {k: x.clone() for k, x in network.state_dict().items()}, images.clone()
    with torch.no_grad():  # which the attack needs to overrule
        moved = pgd_attack.pgd(network, images, torch.tensor([0, 1, 2, 0]), label_loss, steps=3)
    assert not moved.requires_grad
    assert torch.equal(images, copy)
    assert not torch.equal(moved, copy)
    assert [module.training for module in network] == [True, False, *[True] * 5]
    assert [p.requires_grad for p in network.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
    with pytest.raises(ZeroDivisionError):
        pgd_attack.pgd(network, images, torch.zeros(4), lambda x, y: 1 / 0)
    assert network.training


@pytest.mark.parametrize(("early_stop", "momentum"), [(False, 0), (True, 0), (True, 0.75)])
def test_no_image_is_attacked_otherwise_for_those_beside_it(early_stop, momentum):
    network, images = small_network().double(), photo_like(6, 12).double()
    targets, how = torch.arange(6) % 3, (label_loss, 0.05, 0.01, 20, False, early_stop)

    def attack(rows):
        return pgd_attack.pgd(network, images[rows], targets[rows], *how, momentum=momentum)

    together = attack(slice(None))
    assert all(torch.allclose(attack([i])[0], together[i], atol=1e-9) for i in range(6))


def test_early_stop_loses_no_success_and_leaves_what_is_reached_alone():
    network, images = small_network().eval(), photo_like(40, 12)
    targets = torch.arange(40) % 3
    how = (network, images, targets, label_loss, 0.05, 0.005, 30)
    every, stopped = pgd_attack.pgd(*how), pgd_attack.pgd(*how, early_stop=True)
    hit, stopped_hit = (network(x).argmax(1) == targets for x in (every, stopped))
    assert hit.sum() > 30
    assert (stopped_hit >= hit).all()
    already = network(images).argmax(1) == targets
    assert already.any()
    assert torch.equal(stopped[already], images[already])
    sizes = [(x - images).abs().amax((1, 2, 3)).mean() for x in (stopped, every)]
    assert sizes[0] < sizes[1]
    logits, wanted = torch.tensor([[2.0, -1, 0.5], [-1, -2, -3]]), torch.tensor([[1.0, 0, 1]] * 2)
    assert pgd_attack.goal_reached(logits, wanted).tolist() == [True, False]
    half = pgd_attack.pgd(*how[:4], early_stop=lambda x, y: y < 2)
    assert torch.equal((half == images).flatten(1).all(1), targets < 2)


def test_a_model_that_answers_nan_ends_the_attack_in_one_line():
    images = torch.rand(2, 1, 2, 2)
    with pytest.raises(common.Failure, match="not finite"):
        pgd_attack.pgd(lambda x: x.flatten(1) / 0, images, torch.zeros(2), logit_sum)
    for sizes in ({"eps": -1}, {"steps": -1}, {"alpha": -0.1}):
        with pytest.raises(ValueError, match="negative"):
            pgd_attack.pgd(Linear(torch.eye(4)), images, torch.zeros(2), logit_sum, **sizes)
    with pytest.raises(ValueError, match="2 images with 3 targets"):
        pgd_attack.pgd(Linear(torch.eye(4)), images, torch.zeros(3), logit_sum)


def test_the_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, wanted = 3 * torch.randn(6, 5, dtype=torch.float64), (torch.rand(6, 5) > 0.5).double()
    p, soft = 1 / (1 + np.exp(-logits.numpy())), scipy.special.softmax(logits.numpy(), 1)
    w, at = wanted.numpy(), np.log(0.8 / 0.2)
    sign = 2 * w - 1
    past = sign * (logits.numpy() - at)
    formulas = {
        "softmax-ce": -sign[:, 2] * np.log(soft[:, 2]),
        "bce": -(w * np.log(p) + (1 - w) * np.log(1 - p)).mean(1),
        "softmax-bce": -(w * np.log(soft) + (1 - w) * np.log(1 - soft)).mean(1),
        "margin": np.maximum(0, [[0.2, 0.2, 1, 0.2, 0.2]] - past).sum(1),
    }
    assert set(formulas) == set(pgd_attack.LOSS)
    for name, values in formulas.items():
        assert np.allclose(pgd_attack.LOSS[name](logits, wanted, 2, 0.8).numpy(), values), name
    huge = torch.tensor([[900.0, 0, -900, 3, 1]], dtype=torch.float64) * wanted  # a softmax of 0, 1
    for values in (logits, huge):
        ours, torchs = values.clone().requires_grad_(), values.float().requires_grad_()
        pgd_attack.softmax_bce(ours, wanted).sum().backward()
        theirs = F.binary_cross_entropy(torchs.softmax(1), wanted.float(), reduction="none")
        theirs.mean(1).sum().backward()
        assert torch.allclose(ours.grad.float(), torchs.grad, rtol=1e-4)
    copied = logits.index_fill(1, torch.tensor([2]), 1)  # week 4's, which torch's own refuses
    expected = (np.log1p(-soft) * (copied.numpy() - 1) - copied.numpy() * np.log(soft)).mean(1)
    assert np.allclose(pgd_attack.softmax_bce(logits, copied).numpy(), expected)


def test_the_margin_pushes_no_label_that_is_where_it_should_be():
    logits = torch.tensor([[5.0, -5, 0.1, 0.7]], requires_grad=True)
    pgd_attack.margin(logits, torch.tensor([[1.0, 0, 1, 1]]), 3, 0.5).sum().backward()
    assert logits.grad.tolist() == [[0, 0, -1, -1]]


def labels_goal(target, direction, n=4, **how):
    return pgd_attack.Labels([str(i) for i in range(n)], target, direction, 0.5, **how)


def test_each_direction_asks_for_what_it_says():
    logits = torch.tensor([[1.0, -1, 2], [1, 1, -2]])
    for direction, asked, wanted in (
        ("on", [True, False], [1, 1]),
        ("off", [False, True], [0, 0]),
        ("flip", [True, True], [1, 0]),
    ):
        goal = labels_goal(1, direction, 3)
        assert goal.asked(logits).tolist() == asked
        assert goal.wanted(logits)[:, 1].tolist() == wanted
        assert torch.equal(goal.wanted(logits)[:, [0, 2]], (logits > 0).float()[:, [0, 2]])


def test_restarts_attack_only_what_is_left_and_lose_nothing(monkeypatch):
    network, images = small_network(4).eval(), photo_like(30, 12)
    goal, once = labels_goal(2, "flip"), pgd_attack.Row("x", "margin", 0.03, "right", 0.1, 8, 0)
    calls = []

    def spy(*args, **how):
        calls.append((args[5], how["momentum"], args[7]))
        return pgd(*args, **how)

    pgd = pgd_attack.pgd
    monkeypatch.setattr(pgd_attack, "pgd", spy)
    with torch.no_grad():
        logits = network(images)
    wanted = goal.wanted(logits)
    first = goal.attack(network, images, logits, once)
    again = goal.attack(network, images, logits, once._replace(restarts=8))
    assert calls[1:4] == [(0.1, 0, False), (0.05, 0.75, True), (0.025, 0.75, True)]
    done, won = (goal.right(network(x), wanted) for x in (first, again))
    assert 0 < done.sum() < 30
    assert torch.equal(first[done], again[done])
    assert won.sum() > done.sum()
    assert torch.equal(first[~won], again[~won])


def test_success_is_judged_in_float32_whatever_the_gradients_are_in(monkeypatch):
    network, images = small_network(4).eval(), photo_like(4, 12)
    goal, seen = labels_goal(2, "on", bf16=True), []

    def pgd(network, images, *args, **how):
        seen.append(torch.is_autocast_enabled("cpu"))
        return images

    def spy(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return network(x)

    monkeypatch.setattr(pgd_attack, "pgd", pgd)
    row = pgd_attack.Row("x", "margin", 0.03, restarts=1)
    goal.attack(spy, images, -torch.ones(4, 4), row)
    assert seen == [True, False, True, False]


def test_what_is_counted_is_what_a_loop_counts():
    rng = np.random.default_rng(0)
    before, after, truth = (rng.random((50, 6)) < 0.4 for _ in range(3))
    after[:20] = before[:20]
    after[:10, 3] = ~after[:10, 3]
    found = {k: torch.tensor(np.where(x, 1.0, -1)) for k, x in (("before", before), ("x", after))}
    row = labels_goal(3, "on", 6).count(found, "x", torch.tensor(truth))
    asked = switched = exact = lost_images = off = on = positives = 0
    for b, a in zip(before, after, strict=True):
        if b[3]:
            continue  # nothing is asked of it
        others = [j for j in range(6) if j != 3]
        lost = sum(b[j] and not a[j] for j in others)
        won = sum(a[j] and not b[j] for j in others)
        off, on, positives = off + lost, on + won, positives + sum(b[j] for j in others)
        asked, switched, lost_images = asked + 1, switched + a[3], lost_images + (lost > 0)
        exact += a[3] and lost + won == 0
    assert row["target_switched"] == common.wilson(switched, asked)
    assert row["exact"] == common.wilson(exact, asked)
    assert row["other_label_lost"] == common.wilson(lost_images, asked)
    assert row["others_lost"] == off / positives
    assert row["others_changed_per_image"] == (off + on) / asked
    times = {"actual": truth, "before": before, "after": after}
    assert row["target_counts"] == {time: x[:, 3].sum() for time, x in times.items()}
    assert row["label_counts"] == {time: x.sum() for time, x in times.items()}
    none = {"before": torch.ones(5, 6), "x": torch.ones(5, 6)}
    assert labels_goal(3, "on", 6).count(none, "x", None)["exact"] is None


def test_the_rows_of_weeks_3_and_5_are_those_on_record():
    pinned, right = pgd_attack.PINNED, "right"
    week3 = {(row.loss, row.gradient, row.eps) for row in pgd_attack.WEEK_3}
    assert {(loss, g, 0.6) for loss in ("softmax-ce", "bce") for g in (pinned, right)} <= week3
    week5 = {(row.loss, row.gradient, row.eps) for row in pgd_attack.WEEK_5}
    losses = "softmax-ce", "bce", "softmax-bce"
    assert {(loss, g, 0.3) for loss in losses for g in (pinned, right)} <= week5
    assert {(None, right, 0.3), (None, right, 0)} <= week5
    rows = (*pgd_attack.WEEK_3, *pgd_attack.WEEK_5)
    assert {(row.alpha, row.steps, row.restarts) for row in rows} == {(2 / 255, 40, None)}


@pytest.fixture(scope="module")
def attackable(tmp_path_factory):
    """The flags that attack a few scenes of glyphs with a random network that gives some labels."""
    path = tmp_path_factory.mktemp("weights") / "some.pth"
    state = published_state("tresnet_s", 10)
    network = asl_model.tresnet("tresnet_s", 10).eval()
    network.load_state_dict(asl_model.inplace_abn_gammas(state))
    with torch.no_grad():
        state["head.fc.bias"] -= network(common.load_scenes(50, source="glyphs")[0]).mean(0)
    names = dict(enumerate("0123456789"))
    torch.save({"model": state, "num_classes": 10, "idx_to_class": names}, path)
    flags = ["--device", "cpu", "--dataset", "scenes", "--digits", "glyphs", "--weights", str(path)]
    return [*flags, "--limit", "6", "--steps", "4", "--target", "3"]


@pytest.mark.parametrize(("week", "rows"), [(None, 1), (3, 6), (5, 9)])
def test_an_attack_writes_what_it_promises(attackable, tmp_path, capsys, week, rows):
    flags = [*attackable, "--out", str(tmp_path), "--save", "5"]
    record = pgd_attack.main([*flags, *(["--week", str(week)] if week else [])])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == record["rows"]
    results = record["rows"]["scenes"]
    assert len(results) == rows
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if str(tmp_path.parent) not in line]
    assert max(map(len, tables)) <= 100
    for line in ("3 actual", "3 predicted before", "labels predicted after", "mAP"):
        assert line in out
    assert all(row["linf"] <= 0.6 + 1e-6 for row in results.values())
    if week == 5:
        assert results["softmax-bce"]["l2"] != results["softmax-bce pinned"]["l2"]
        unchanged = results["no attack"]
        assert unchanged["linf"] == 0
        assert unchanged["label_counts"]["after"] == unchanged["label_counts"]["before"]
    with Image.open(tmp_path / "pgd-attack-on-asl.png") as image:
        assert image.width <= 900
        assert image.height > 4 * 300
    names = {"results.json", "adversarial.npz", "pgd-attack-on-asl.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with np.load(tmp_path / "adversarial.npz") as file:
        shapes = {name: (file[name].dtype.name, file[name].shape) for name in file.files}
        change = np.abs(file["adversarial"].astype(int) - file["clean"])
    pixels, logits = ("uint8", (5, 3, 64, 64)), ("float32", (5, 10))
    assert shapes == {"clean": pixels, "adversarial": pixels, "before": logits, "after": logits}
    assert 0 < change.max() <= 0.1 * 255 + 1  # of the last attack, ours


def test_the_gradient_is_all_that_its_flag_changes(attackable, tmp_path):
    right, pinned = (
        pgd_attack.main([*attackable, "--gradient", g, "--out", str(tmp_path)])["rows"]["scenes"]
        for g in ("right", pgd_attack.PINNED)
    )
    assert right["margin"]["l2"] != pinned["margin"]["l2"]
    assert right["margin"]["label_counts"]["before"] == pinned["margin"]["label_counts"]["before"]


def sweep_results(attack, steps, restarts, noise):
    kinds = dict(zip(pgd_attack.SWEEP_KINDS, (attack, steps, restarts, noise), strict=True))
    return {
        f"{kind} {eps * 255:g}/255": {"target_switched": common.wilson(100 * rate, 100)}
        for kind, rates in kinds.items()
        for eps, rate in zip(pgd_attack.SWEEP, rates, strict=True)
    }


@pytest.mark.parametrize("broken", [None, "growth", "limit", "steps", "restarts", "noise"])
def test_each_verdict_of_the_sweep_is_the_right_way_round(capsys, broken):
    attack, zeros = [0, 0, 0.1, 0.2, 0.5, 0.9, 1, 1], [0] * 8
    lines = {"attack": attack, "steps": attack, "restarts": attack, "noise": zeros}
    if broken == "growth":
        lines["attack"] = [0, 0.15, 0.1, 0.2, 0.5, 0.9, 1, 1]
    if broken == "limit":
        lines = {name: [*line[:6], *(0.95 * x for x in line[6:])] for name, line in lines.items()}
    if broken in ("steps", "restarts"):
        lines[broken] = [0, 0, 0.2, 0.2, 0.5, 0.9, 1, 1]
    if broken == "noise":
        lines["noise"] = [0, 0, 0, 0, 0, 0, 0, 0.1]
    verdicts = pgd_attack.print_sweep(sweep_results(*lines.values()), "8")
    assert [name for name, holds in verdicts.items() if not holds] == ([broken] if broken else [])
    assert len(re.findall("^FAILS: ", capsys.readouterr().out, re.M)) == (broken is not None)


def test_the_sweep_runs_every_eps_and_control(attackable, tmp_path):
    flags = [*attackable, "--out", str(tmp_path), "--sweep", "--limit", "3"]
    record = pgd_attack.main([*flags, "--loss", "softmax-ce"])
    rows = record["rows"]["scenes"]
    assert len(record["controls"]) == 5
    rates = [rows[f"attack {eps}/255"]["target_switched"]["rate"] for eps in (0, 0.25, 16)]
    assert rates[0] == 0
    assert rates[2] > 0
    assert rows["noise 16/255"]["linf"] == pytest.approx(16 / 255, abs=1e-3)


def test_two_processes_of_torchruns_give_the_table_of_one(attackable, tmp_path):
    flags = [*attackable, "--restarts", "1", "--eps", "0.05", "--batch-size", "2"]
    one = pgd_attack.main([*flags, "--out", str(tmp_path / "one")])
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*run, "--master-port", "29517", HERE / "pgd_attack.py", *flags]
    command += ["--out", tmp_path / "two"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    for row in (one["rows"]["scenes"]["margin"], two["rows"]["scenes"]["margin"]):
        del row["seconds_per_image"]
        row["l2"] = round(row["l2"], 2)
    assert one["rows"]["scenes"]["margin"]["target_switched"]["rate"] > 0
    assert json.loads(json.dumps(one["rows"])) == two["rows"]
    assert process.stdout.count("labels predicted after") == 1


OWN = """
import torch
from torch import nn

def load():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 80))
    network[-1].weight.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(9)
    return network, NAMES, 16

def broken():
    return 1 / 0

def pair():
    return nn.Identity(), NAMES
"""


def test_a_network_of_ones_own_is_attacked_on_its_photos(tiny_coco, tmp_path, capsys):
    names = common.load_coco(tiny_coco, 16)[2][::-1]
    own = OWN.replace("80", str(len(names))).replace("NAMES", repr(names))
    (tmp_path / "mine.py").write_text(own)
    flags = ["--data", str(tiny_coco), "--out", str(tmp_path / "o"), "--device", "cpu"]
    flags += ["--steps", "4", "--target", names[0]]
    model = ["--model", f"{tmp_path / 'mine.py'}:load"]
    record = pgd_attack.main([*flags, *model, "--week", "5"])
    assert len(record["rows"]["coco"]) == 9
    assert (tmp_path / "o" / "pgd-attack-on-mine.png").exists()
    photo = next((tiny_coco / "coco" / "val2017").iterdir())
    pgd_attack.main([*flags, *model, "--image", str(photo), "--eps", "0.5", "--steps", "40"])
    out = capsys.readouterr().out
    assert re.search("^before: .*\nafter: ", out, re.M)
    with Image.open(tmp_path / "o" / f"{photo.stem}-adversarial.png") as image:
        assert image.size == (16, 16)
    for spec, word in (
        ("none.py:load", "none.py"),
        ("mine.py:other", "other"),
        ("mine.py:broken", "division by zero"),
        ("mine.py:pair", "must return (network, class names, image size)"),
    ):
        with pytest.raises(common.Failure, match=re.escape(word)) as failure:
            pgd_attack.main([*flags, "--model", str(tmp_path / spec)])
        assert len(str(failure.value)) <= 300
    (tmp_path / "mine.py").write_text(OWN.replace("80", "2").replace("NAMES", "['cat', 'hat']"))
    with pytest.raises(common.Failure, match=r"one of them lacks cat, hat"):
        pgd_attack.main([*flags, *model])


def test_week_4_of_digits_needs_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acwgan, "digit_reader", lambda *_: acwgan.DigitReader().eval())
    flags = ["--week", "4", "--digits", "glyphs", "--limit", "5", "--steps", "3"]
    record = pgd_attack.main([*flags, "--device", "cpu", "--out", str(tmp_path), "--target", "8"])
    assert list(record["rows"]) == ["scenes", "glyphs"]
    names = ["cut alone", "single photo's", "batch's", "right pinned", "right"]
    assert [list(rows) for rows in record["rows"].values()] == [names, names]
    tables = [x for x in capsys.readouterr().out.splitlines() if str(tmp_path) not in x]
    assert max(map(len, tables)) <= 100
    assert (tmp_path / "pgd-attack-on-digits.png").exists()


def test_week_4s_attacks_are_cut_in_normalised_space_as_they_were_logged():
    mean = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    std, images = mean / 2, photo_like(5, 12)
    network = small_network().eval()
    with torch.no_grad():
        logits = network(images)
    goal = pgd_attack.TopClass(["a", "b", "c"], 1, mean, std)
    cut, one_hot, raw = (goal.attack(network, images, logits, row) for row in pgd_attack.WEEK_4)
    assert torch.allclose(cut, images.clamp(mean, mean + std), atol=1e-6)
    for moved in (one_hot, raw):
        assert ((moved - mean) / std).min() >= -1e-5
        assert ((moved - mean) / std).max() <= 1 + 1e-5
        assert ((moved - cut).abs() <= 0.3 * std + 1e-6).all()
    assert not torch.allclose(one_hot, cut)
    assert not torch.allclose(raw, one_hot)
    # the batch's recipe wants the raw logits back, so it serves what is predicted already
    with torch.no_grad():
        reached = [(network(x).argmax(1) == 1).sum() for x in (one_hot, raw)]
    assert reached[0] >= reached[1]


def test_week_4_counts_the_images_that_are_not_the_target_already():
    goal = pgd_attack.TopClass(["a", "b"], 1, None, None)
    before = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    after = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 2]])
    row = goal.count({"before": before, "x": after}, "x", torch.tensor([0, -1, 0, 1]))
    assert row["target_reached"] == common.wilson(2, 3)
    assert row["right_before"] == common.wilson(1, 3)
    assert row["right_after"] == common.wilson(1, 3)
    assert row["mean_sigmoid"] == pytest.approx(after[:, 1].sigmoid().mean().item())


def test_torchvisions_classifiers_load_by_name_and_from_a_file(tmp_path, capsys):
    from torchvision import models

    args = pgd_attack.settings(["--model", "resnet18", "--data", str(tmp_path)])
    state = models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18-f37072fd.pth")
    network, names, size, mean, std = pgd_attack.torchvision_network(args)
    assert (names[60], size) == ("night snake", 224)
    assert mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    half = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    torch.save(half, tmp_path / "own.pth")
    args = pgd_attack.settings(["--model", "resnet18", "--weights", str(tmp_path / "own.pth")])
    images = photo_like(2, 64)
    with torch.no_grad():
        ours, theirs = network(images), pgd_attack.torchvision_network(args)[0](images)
    assert torch.allclose(ours, theirs, atol=0.05)
    assert "is not the file that torchvision publishes" in capsys.readouterr().out
    torch.save({"fc.weight": state["fc.weight"]}, tmp_path / "own.pth")
    with pytest.raises(common.Failure, match="must be a state dict of torchvision's resnet18"):
        pgd_attack.torchvision_network(args)
    with pytest.raises(common.Failure, match="nearest: resnet18"):
        pgd_attack.torchvision_network(pgd_attack.settings(["--model", "resnet19"]))


def test_imagenets_classes_are_in_the_files_or_the_folders_names(tmp_path):
    (tmp_path / "imagenet" / "n01440764").mkdir(parents=True)
    names = "n01440764_tench.JPEG", "n01530575_water_ouzel.png", "n02012849_crane.jpg", "x.jpg"
    for name in names:
        Image.new("RGB", (64, 32), "red").save(tmp_path / "imagenet" / name)
    Image.new("RGB", (64, 32), "red").save(tmp_path / "imagenet" / "n01440764" / "y.JPEG")
    classes = ["tench", "water ouzel", "crane", "crane"]
    photos, found = pgd_attack.load_imagenet(tmp_path, 28, classes)
    assert photos[:].shape == (5, 3, 28, 28)
    assert photos.paths[0].name == "y.JPEG"
    assert found.tolist() == [-1, 0, 1, -1, -1]
    for name in names:
        (tmp_path / "imagenet" / name).unlink()
    assert pgd_attack.load_imagenet(tmp_path, 28, ["one class"])[1].tolist() == [0]
    with pytest.raises(common.Failure, match="no photo"):
        pgd_attack.load_imagenet(tmp_path / "none", 28, ["tench"])


def test_attacks_that_make_no_sense_are_refused_in_one_line(attackable, tiny_coco, tmp_path):
    folders = ["--out", str(tmp_path), "--data", str(tiny_coco)]
    with pytest.raises(common.Failure, match="'13' is none of the 10 labels"):
        pgd_attack.main([*attackable, *folders, "--target", "13"])
    with pytest.raises(common.Failure, match="network's labels are not coco's"):
        pgd_attack.main([*attackable, *folders, "--dataset", "coco"])
    flags = ["--image", str(tmp_path / "none.jpg"), *attackable[6:8], *folders]
    with pytest.raises(common.Failure, match=r"none\.jpg"):
        pgd_attack.main([*flags, "--target", "3", "--device", "cpu"])
    content = torch.load(attackable[7], weights_only=True)
    content["model"]["head.fc.weight"].fill_(1e38)
    content["model"]["body.conv1.1.weight"].fill_(1e30)
    torch.save(content, tmp_path / "big.pth")
    with pytest.raises(common.Failure, match="not finite"):
        pgd_attack.main([*attackable, *folders, "--weights", str(tmp_path / "big.pth")])


def test_peer_torchattacks_makes_the_same_images():
    peer = pytest.importorskip("torchattacks")
    network, images, targets = small_network().eval(), photo_like(6, 12), torch.arange(6) % 3
    attack = peer.PGD(nn.Sequential(network).eval(), 0.05, 0.01, 20, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    ours = pgd_attack.pgd(network, images, targets, label_loss, 0.05, 0.01, 20)
    assert torch.allclose(attack(images, targets), ours, atol=1e-6)


# --- the whole


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        (acwgan, ["--epochs", "0"], "whole number from 1 up"),
        (acwgan, ["--epochs", "many"], "whole number"),
        (acwgan, ["--critic-lr", "-1"], "positive"),
        (acwgan, ["--average", "1"], "--average"),
        (acwgan, ["--dataset", "cifar"], "cifar"),
        (acwgan, ["--penalty-share", "2"], "--penalty-share"),
        (acwgan, ["--colour"], "--colour"),
        (acwgan, ["--resume", "--force"], "not allowed"),
        (transfer, ["--target", "10"], "invalid choice: 10"),
        (transfer, ["--variant", "best"], "scratch-live"),
        (asl_model, [], "required"),
        (asl_model, ["--train", "--evaluate"], "--train"),
        (asl_model, ["--train", "--image-size", "65"], "multiple of 4"),
        (asl_model, ["--evaluate", "--threshold", "1"], "--threshold"),
        (asl_model, ["--train", "--arch", "resnet"], "tresnet_xl"),
        (pgd_attack, ["--eps", "8/0"], "positive"),
        (pgd_attack, ["--eps", "-1"], "positive"),
        (pgd_attack, ["--threshold", "1"], "--threshold"),
        (pgd_attack, ["--week", "3", "--sweep"], "--week"),
        (pgd_attack, ["--week", "5", "--model", "resnet18"], "several labels"),
        (pgd_attack, ["--week", "4", "--model", "asl"], "week 4"),
        (pgd_attack, ["--dataset", "imagenet"], "imagenet"),
        (pgd_attack, ["--model", "digits", "--dataset", "coco"], "coco"),
        (pgd_attack, ["--image", "x.jpg", "--dataset", "scenes"], "--image"),
        (pgd_attack, ["--image", "x.jpg", "--sweep"], "--image"),
        (pgd_attack, ["--augment"], "--augment"),
        (pgd_attack, ["--loss", "l2"], "softmax-ce"),
    ],
)
def test_misuse_ends_at_once_with_exit_code_2(script, flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        script.settings(flags)
    assert end.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("module", [acwgan, transfer, asl_model, pgd_attack])
def test_help_shows_defaults_and_none_that_is_no_value(module, capsys):
    with pytest.raises(SystemExit):
        module.settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "random number (default: 0)" in text
    assert "None" not in text


def test_every_command_of_the_readme_is_one_the_scripts_take(monkeypatch):
    commands = re.findall(r"python (\w+)\.py([^\n`#&|]*)", (HERE / "README.md").read_text())
    assert commands
    for name, flags in commands:
        flags = shlex.split(flags)
        if not {"--resume", "--sample"} & set(flags):  # which read a checkpoint
            __import__(name).settings(flags)
