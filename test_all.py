"""Every test: `pytest test_all.py`. No network, no GPU, no file but what the tests make."""

import contextlib
import copy
import functools
import http.server
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageOps
from torch import nn

import acwgan
import asl_model
import common
import pgd_attack
import transfer

HERE = Path(common.__file__).parent
NOWHERE = "http://127.0.0.1:9/"  # refuses every connection at once


@contextlib.contextmanager
def refused(*words, code=1):
    """Assert that a `Failure` with `code` is raised, one short line that holds all `words`."""
    with pytest.raises(common.Failure) as caught:
        yield
    text = str(caught.value)
    assert (caught.value.code, text.isprintable(), len(text) <= 300) == (code, True, True), text
    assert all(str(word) in text for word in words), text


def stop_once_there_is(path, stop, *command):
    """Run a script until it has written `path`, in its --out, then send it the signal `stop`."""
    command = [sys.executable, HERE / command[0], *command[1:], "--out", path.parent]
    how = {"text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or a job after "&" ignores it
    process = subprocess.Popen(command, **how)
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(stop)
    stderr = process.communicate(timeout=60)[1]
    if stop == signal.SIGINT:
        assert (process.returncode, "Traceback" in stderr) == (130, False), stderr
        assert "--resume" in stderr.splitlines()[-1]


def photo_like(n, size, seed=0):
    """Images that differ in colour and brightness, as photos do, unlike mere noise."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 1, 1, generator=rng) * torch.rand(n, 3, size, size, generator=rng)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A data folder: 40 + 20 made-up digits as MNIST's, 16 + 4 photos of one colour as COCO's, in
    no order, every fourth without a label, and the ids of COCO's 80 classes, which have gaps."""
    data = tmp_path_factory.mktemp("data")
    raw, coco = data / "MNIST" / "raw", data / "coco"
    for folder in (raw, coco / "annotations", coco / "train2017", coco / "val2017"):
        folder.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        digits = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        for name, array in (("images-idx3", digits), ("labels-idx1", np.arange(n) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(content)
    ids = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}, reverse=True)
    categories = [{"id": i, "name": f"name {i}"} for i in ids]
    kinds = ("red", [60]), ("lime", [2, 90, 90]), ("blue", [80]), ("black", [])
    for split, n in (("train2017", 16), ("val2017", 4)):
        images = [{"id": i, "file_name": f"{i}.png"} for i in reversed(range(n))]
        content = {"categories": categories, "images": images, "annotations": []}
        for i in range(n):
            colour, present = kinds[i % 4]
            Image.new("RGB", (50, 40 + i), colour).save(coco / split / f"{i}.png")
            content["annotations"] += [{"image_id": i, "category_id": x} for x in present]
        (coco / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return data


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """What a test would download is nowhere; a server of its own is asked without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [NOWHERE])
    monkeypatch.setattr(common, "COCO_URL", NOWHERE)
    monkeypatch.setattr(common, "INCEPTION_URL", NOWHERE)


# --- common


def test_any_error_ends_in_one_short_line_and_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(os, "dup2", Mock())  # the tests still need their stdout
    for problem, code, word in (
        (common.Failure("no such label", 2), 2, "error: no such label"),
        (common.Failure("a DataLoader's\n traceback\ncommon.Failure: a.jpg"), 1, "error: a.jpg"),
        (OSError(28, "No space left on device" * 99), 1, "No space left"),
        (OSError(), 1, "error"),
        (KeyboardInterrupt(), 130, "--resume"),
        (RuntimeError("CUDA out of memory. Tried to"), 1, "--device cpu"),
    ):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            common.run(Mock(side_effect=problem))
        (line,) = capsys.readouterr().err.splitlines()
        assert word in line[:300] == line
    with pytest.raises(RuntimeError, match="shapes"):  # a fault of ours has its traceback
        common.run(Mock(side_effect=RuntimeError("shapes differ")))
    with refused("file: ", "a bcc", "; delete it"), common.advise("file", "delete it"):
        raise ValueError("a\n b" + "c" * 500)
    monkeypatch.setattr(common, "run", Mock())
    for name in ("acwgan", "transfer", "asl_model", "pgd_attack"):
        script = runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        common.run.assert_called_with(script["main"])


def test_flags_are_read_and_help_shows_their_defaults():
    p = common.parser("Doc", Path("runs/x"), "mnist", ("mnist", "auto"), "digits", "N", True)
    p.add_argument("--eps", type=common.positive)
    args = p.parse_args(["--limit", "3", "--resume", "--eps", "8/255"])
    assert (args.limit, args.seed, args.resume, args.force) == (3, 0, True, False)
    assert (args.eps, common.positive("0.031")) == (8 / 255, 0.031)
    defaults = re.findall(r"\(default:\s+(\S+?)\)", p.format_help())
    assert defaults == ["data", "runs/x", "auto", "0", "mnist"]


def test_a_process_has_a_device_of_its_own_in_float32_or_is_refused(monkeypatch):
    def pick(name, gpus, rank):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        return str(common.pick_device(name))

    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
    assert [pick("auto", 0, 0), pick("auto", 1, 0)] == ["cpu", "cuda:0"]
    assert pick("cuda", 2, 1) == "cuda:1"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    for name, gpus in (("cuda", 1), ("auto", 1), ("mps", 0)):  # auto: not one on the CPU
        with refused("--device", "process 1", "--device cpu", code=2):
            pick(name, gpus, 1)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_or_now_and_then_a_line(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("tqdm.std.time", Mock(side_effect=range(10**6)))  # a look lasts a second
    bar = common.progress(range(100), "training", miniters=1)
    for _ in bar:
        bar.set_postfix(dict.fromkeys(("critic", "generator", "penalty"), 0.12), refresh=False)
    text = capsys.readouterr().err
    shown = re.findall(r"\rtraining +\d+%\|[^\r]*\d+/100, [^\r]* left[^\r\n]*", text)
    assert (len(shown) > 30) if terminal else (2 <= len(shown) <= 10)
    assert text.count("\n") == (0 if terminal else len(shown))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    with multiprocessing.Pool(8) as pool:  # many processes make one folder at once
        pool.map(common.make_folder, [path.parent] * 160, chunksize=1)

    def two_at_once(file):
        file.write(b"old")
        common.write_file(path, lambda other: other.write(b"another process's"))

    common.write_file(path, two_at_once)
    problems = [OSError(28, "No space left on device"), KeyboardInterrupt()]
    monkeypatch.setattr(os, "replace", Mock(side_effect=problems))
    with refused(path, "No space left"):
        common.save_checkpoint(path, {"a": torch.zeros(9)})
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, {"a": torch.zeros(9)})
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_hostile_checkpoints_are_refused_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    good = {"kind": "acwgan", "settings": {"seed": 0}, "losses": [0.5]}
    common.save_checkpoint(tmp_path / "good", good)
    for kind in ("acwgan", None):
        assert common.load_checkpoint(tmp_path / "good", kind, "") == good
    torch.save({"kind": "transfer", "networks": Hostile()}, tmp_path / "hostile")
    torch.save(torch.zeros(3, 3), tmp_path / "tensor")
    (tmp_path / "half").write_bytes((tmp_path / "good").read_bytes()[:300])
    (tmp_path / "text").write_text("<html>")
    for name in ("hostile", "tensor", "half", "text", "absent", "good"):
        with refused(tmp_path / name, "; train it anew"):
            common.load_checkpoint(tmp_path / name, "transfer", "train it anew")
        with refused(tmp_path / name, "--weights"):
            asl_model.load_asl(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 40), (40, 40)])
def test_wilsons_bounds_are_the_rates_at_which_the_hits_are_just_not_significant(hits, n):
    rate = common.wilson(np.int64(hits), torch.tensor(n))
    assert (rate["rate"], rate["n"], rate["low"] < rate["high"]) == (hits / n, n, True)
    for p, sign in ((rate["low"], 1), (rate["high"], -1)):
        deviation = sign * 1.959964 * (p * (1 - p) / n) ** 0.5
        assert hits / n - p == pytest.approx(deviation, abs=1e-6)


def test_records_read_back_and_hold_what_made_them(tmp_path, monkeypatch, capsys):
    rows = [{"step": i, "seconds": 0.1 * i, "critic": -1e-9 * i} for i in range(3)]
    acwgan.write_history(tmp_path / "history.csv", rows)
    again = np.genfromtxt(tmp_path / "history.csv", delimiter=",", names=True)
    assert [dict(zip(again.dtype.names, row, strict=True)) for row in again.tolist()] == rows
    rate = common.wilson(5, 10)
    common.print_table(["attack", "rate"], [["none", common.wilson(0, 0)], ["pgd", rate]])
    end = ["none                       -", "pgd     50.0% [23.7%, 76.3%]"]
    assert capsys.readouterr().out.splitlines()[1:] == end
    (tmp_path / "it's").symlink_to(HERE)  # no shell may stumble over the name
    monkeypatch.setattr(common, "__file__", str(tmp_path / "it's" / "common.py"))
    monkeypatch.setattr(common, "START", time.time() - 5)
    monkeypatch.setattr(sys, "argv", ["acwgan.py", "--seed", "1"])
    args = acwgan.settings(["--seed", "1", "--out", str(tmp_path)])
    record = common.write_results(args, {"real": rate}, dataset="glyphs")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(record, default=str))
    assert (written["command"], written["settings"]["seed"]) == ("python acwgan.py --seed 1", 1)
    assert (written["dataset"], written["real"]) == ("glyphs", rate)
    assert 5 <= written["seconds"] < 10
    assert written["git"]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a file named short is announced a byte longer, of "open" no length."""

    def send_header(self, name, value):
        announced = {"/short": 8, "/open": None}.get(self.path, value)
        value = announced if name == "Content-Length" else value
        if value is not None:
            super().send_header(name, value)


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
    path, digest = tmp_path / "new" / "file", "ed7002b4"  # how the SHA-256 of "content" begins
    for name in ("file", "short", "open"):
        (server / name).write_text("content")
    for name, sha256 in (("file", "00"), ("open", "00"), ("short", digest), ("absent", "")):
        with refused(common.COCO_URL + name, f"put that file at {path}"):
            common.download(common.COCO_URL + name, path, sha256)
        assert list(tmp_path.glob("new/*")) == []
    assert common.download(f"{common.COCO_URL}open", path, digest) == path
    assert common.download(NOWHERE, path) == path  # it is there: no need to ask for it
    assert path.read_text() == "content"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("zeros", [0, 5])
def test_frechet_distance_equals_the_closed_form_for_commuting_covariances(zeros):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    v1, v2, mu = rng.uniform(0.1, 9, 30), rng.uniform(0.1, 9, 30), rng.normal(size=30)
    v1[:zeros] = 0
    closed = np.square(mu).sum() + np.square(np.sqrt(v1) - np.sqrt(v2)).sum()
    ours = common.frechet_distance(mu, basis * v1 @ basis.T, 0 * mu, basis * v2 @ basis.T)
    assert ours == pytest.approx(closed, rel=1e-9)
    for wrong in (mu[1:], mu * np.nan):
        with pytest.raises(ValueError, match="finite"):
            common.frechet_distance(wrong, basis, mu, basis)


@pytest.mark.parametrize("sizes", [(6, 7, 12, 12), (20, 15, 5, 5), (4, 30, 9, 9), (20, 15, 6, 2)])
def test_the_two_frechet_distances_agree_and_the_gradient_with_finite_differences(sizes):
    distance, (n, m, d, rank) = common.frechet_distance_torch, sizes
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, d, generator=rng, dtype=torch.float64) for k in (n, m))
    x[:, rank:] = 1  # at such a kink, central differences give the gradient along the others
    truth = common.frechet_distance(*moments(x.numpy()), *moments(2 * y.numpy()))
    assert distance(x, 2 * y).item() == pytest.approx(truth, rel=1e-6)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(distance, (x, y), atol=1e-6)
    exact, single = (torch.autograd.grad(d, x)[0] for d in (distance(x, y), distance(x.float(), y)))
    assert torch.allclose(single, exact, rtol=1e-4, atol=1e-6)
    itself = distance(x, x.detach())
    assert abs(itself.item()) < 1e-9
    assert torch.autograd.grad(itself, x)[0].abs().max() < 1e-9
    for wrong in (x[:1], x[:, 1:], x * torch.nan, x[:, 0]):
        with pytest.raises(ValueError, match="finite"):
            distance(wrong, x)


def test_inception_is_tensorflows_and_takes_images_in_0_to_1_only(tmp_path, monkeypatch):
    torch.manual_seed(0)
    how = {"weights": None, "num_classes": 1008, "aux_logits": False, "init_weights": False}
    network, file = torchvision.models.inception_v3(**how).eval(), tmp_path / common.INCEPTION
    torch.save(network.state_dict(), file)
    average = functools.partial(F.avg_pool2d, count_include_pad=False)
    pools = iter([average] * 8 + [F.max_pool2d])  # of the nine blocks that torchvision averages in
    network.fc, grey = nn.Identity(), torch.rand(2, 1, 40, 30)
    resized = F.interpolate(grey, (299, 299), mode="bilinear", align_corners=False)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "avg_pool2d", lambda *x, **how: next(pools)(*x, **how))
        truth = network(resized.expand(-1, 3, -1, -1) * 2 - 1).numpy()
    features = common.inception_features(grey, file)
    assert features.shape == (2, 2048)
    assert np.allclose(features, truth, rtol=1e-4, atol=1e-4 * truth.max())
    for images in (grey.expand(2, 2, 40, 30), grey * 2, grey * torch.nan, grey[:0], grey.byte()):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            common.inception_features(images, file)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other")
    with refused(tmp_path / "other", "Inception", NOWHERE):
        common.inception_features(grey, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    with refused(f"put that file at {Path('data') / common.INCEPTION}"):
        common.inception_features(grey)


def test_mnist_is_read_byte_for_byte_and_damaged_files_are_named(few, tmp_path):
    folder = shutil.copytree(few / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    images, labels = common.load_mnist(tmp_path, train=False)
    raw = np.random.default_rng(20).integers(0, 256, (20, 1, 28, 28))
    assert torch.equal(images, torch.from_numpy(raw).float() / 255)
    assert torch.equal(labels, torch.arange(20) % 10)
    pixels, digits = (folder / f"t10k-{x}-ubyte" for x in ("images-idx3", "labels-idx1"))
    good, known = pixels.read_bytes(), digits.read_bytes()
    ten = good[:7] + bytes([10]) + good[8 : 16 + 10 * 28 * 28]
    small = good[:8] + bytes([0, 0, 0, 14] * 2) + good[16 : 16 + 20 * 14 * 14]
    wrong = [(x, known) for x in (good[:-1], good[:9], b"", b"<html>", good + b"x", ten, small)]
    for x, y in (*wrong, (good, known[:-1] + bytes([11]))):
        pixels.write_bytes(x)
        digits.write_bytes(y)
        with refused(pixels, digits.name, "delete", "--dataset glyphs"):
            common.load_mnist(tmp_path, train=False)
    (folder / "train-images-idx3-ubyte").unlink()
    with refused(folder, "train-images-idx3-ubyte", "--dataset glyphs"):
        common.load_mnist(tmp_path)


def test_where_mnist_cannot_be_had_auto_says_so_and_draws_glyphs(tmp_path, capsys):
    name, images, labels = common.load_digits("auto", tmp_path, train=False, limit=123)
    assert (name, images.shape) == ("glyphs", (123, 1, 28, 28))
    assert re.search(r"WARNING.*t10k-images-idx3-ubyte", capsys.readouterr().err)
    assert torch.equal(images, common.glyphs(200, seed=1)[0][:123])
    assert not torch.equal(images, common.glyphs(123, seed=0)[0])
    assert torch.equal(labels, torch.arange(123) % 10)
    assert 0 == images.min() < 0.9 < images.max() <= 1
    assert images[:, :, :1].mean() < 0.02  # no digit is cut off by the border


def test_scenes_have_their_labels_digits_a_seed_and_disjoint_splits(few, monkeypatch):
    load = functools.partial(common.load_scenes, source="mnist", data_dir=few)
    images, labels = load(130, seed=3)
    assert 0 <= images.min() < 0.3 < 0.7 < images.max() <= 1
    assert set(labels.sum(1).int().tolist()) == {1, 2, 3, 4, 5}
    assert all(map(torch.equal, load(70, seed=3), (images[:70], labels[:70])))
    assert not torch.equal(load(130, seed=4)[0], images)
    parts = [common.scene_digits("mnist", few, x)[1] for x in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [37, 3, 20]
    assert torch.equal(torch.cat(parts[:2]), common.load_mnist(few)[0])
    assert torch.equal(parts[2], common.load_mnist(few, train=False)[0])
    for digit in range(10):
        only = torch.zeros(10, 1, 28, 28)  # no other digit leaves a mark
        only[digit, 0, 13:15, 13:15] = 1
        monkeypatch.setattr(common, "scene_digits", Mock(return_value=("", only, torch.arange(10))))
        images, labels = common.load_scenes(100, seed=1)
        marked = (images - images[:, :, :1, :1]).abs().amax((1, 2, 3)) > 0.1
        assert torch.equal(marked, labels[:, digit] == 1)
        assert 5 < marked.sum() < 60


def test_photos_are_upright_on_white_and_square_or_refused(tmp_path, monkeypatch):
    red, half = Image.new("RGB", (8, 4), "red"), Image.new("RGBA", (8, 4), (255, 0, 0, 128))
    cmyk, grey = red.convert("CMYK"), half.convert("LA")
    photos = (cmyk, "tif", (255, 0, 0)), (half, "png", (255, 127, 127)), (grey, "png", [165] * 3)
    for image, kind, colour in photos:
        image.save(tmp_path / f"photo.{kind}")
        photo = 255 * common.Photos([tmp_path / f"photo.{kind}"], 4)[0]
        assert (photo - torch.tensor(colour)[:, None, None]).abs().max() <= 3
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    red.paste((0, 0, 255), (0, 0, 4, 4))
    red.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    turned = common.Photos([tmp_path / "turned.jpg"], 8)[0].argmax(0)
    assert turned.unique_consecutive(dim=0).tolist() == [[2] * 8, [0] * 8]
    image = Image.new("RGB", (160, 80), "blue")
    image.paste((255, 0, 0), (45, 5, 115, 75))  # the middle square, a sixteenth off its edges
    image.save(tmp_path / "middle.png")
    squashed = common.Photos([tmp_path / "middle.png"], 80)[0].argmax(0)
    assert squashed[[2, 40, 40, 77], [40, 18, 40, 40]].tolist() == [2, 2, 0, 2]
    crop = functools.partial(ImageOps.fit, bleed=1 / 16)
    red, _, blue = common.Photos([tmp_path / "middle.png"], 70, crop)[0]
    assert (red.min(), blue.max()) == (1, 0)
    (tmp_path / "truncated.png").write_bytes((tmp_path / "middle.png").read_bytes()[:-30])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    for name in ("truncated.png", "absent.jpg", "middle.png"):  # the last is a bomb
        with refused(tmp_path / name, "photo"):
            common.Photos([tmp_path / name], 8)[0]


def test_coco_is_in_ascending_order_downloaded_as_asked_for_and_not_hostile(server, few, tmp_path):
    path, split = tmp_path / "coco" / "annotations" / "instances_train2017.json", "train2017"
    good, photos = (few / path.relative_to(tmp_path)).read_text(), path.parents[1] / split
    shutil.copytree(few / "coco" / split, server / split)
    (server / "annotations").mkdir()
    with zipfile.ZipFile(server / "annotations" / "annotations_trainval2017.zip", "w") as file:
        file.writestr(f"annotations/{path.name}", good)
    load = functools.partial(common.load_coco, tmp_path, 32, split=split)
    images, labels, names = load(limit=2)
    assert (len(labels), len(images)) == (2, 2)
    assert sorted(os.listdir(photos)) == ["0.png", "1.png"]
    images, labels, _ = load()  # in the order of the numbers, not of the names
    assert images[:][..., 0, 0].tolist() == 4 * [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert [(row == 1).nonzero()[:, 0].tolist() for row in labels] == 4 * [[54], [1, 79], [70], []]
    assert names[:3] + names[54:55] == ["name 1", "name 2", "name 3", "name 60"]  # 60: "donut"
    (batch,) = torch.utils.data.DataLoader(images, 16, num_workers=1)
    assert torch.equal(batch, images[:])
    for place in (server / split, photos):
        (place / "12.png").unlink()
    with refused("404", f"put that file at {photos / '12.png'}"):
        load()
    for old, *hostile in (
        ("12.png", "../../x.png", "/etc/x", "a\\\\b.png", "..", "9.png"),
        ('"id": 12, "f', '"id": 9, "f', '"id": {}, "f', '"id": 99, "f'),
        ('"category_id": 60', '"category_id": 12'),
        (good, "", "[]", "{", "{}", "\xff\xfe", "[" * 100_000, good.replace("[", "{}, [", 1)),
    ):
        for new in hostile:
            path.write_text(good.replace(old, new), encoding="latin-1")
            with refused(path, "delete it"):
                load()


# --- week 1

SMALL = ["--dataset", "glyphs", "--limit", "640", "--samples", "200", "--width", "8"]
SMALL += ["--epochs", "3", "--device", "cpu"]


def copy_classifiers(run, folder):
    """Copy the classifiers that a small run has trained into another's folder: seconds saved."""
    skip = shutil.ignore_patterns("generator*", "checkpoint*", "*.csv", "*.json", "*.npz", "*.png")
    return shutil.copytree(run[0], folder, ignore=skip, dirs_exist_ok=True)


def trained(out, *flags):
    """A run of week 1 that is measured on a tenth of the test digits: seconds saved."""
    draw = common.glyphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "glyphs", lambda n, seed=0: draw(n // 10 if seed else n, seed))
        return acwgan.main([*flags, "--device", "cpu", "--out", str(out)])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """An uninterrupted small run: its folder and what `main` returned."""
    out = tmp_path_factory.mktemp("run")
    return out, trained(out, *SMALL)


@pytest.mark.parametrize(("share", "n"), [(1, 8), (0.5, 4), (0.3, 3)])
def test_the_losses_are_right_for_a_critic_whose_gradient_is_known(share, n):
    def critic(x):  # |x|^2 / 2 has the gradient x; ten pixels are the logits
        return x.flatten(1).square().sum(1) / 2, x.flatten(1)[:, :10]

    (real, fake), labels = torch.rand(2, 8, 1, 4, 4), torch.arange(8)
    torch.manual_seed(1)
    loss, parts = acwgan.critic_loss(critic, real, labels, fake, 3.0, share)
    u = torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(1))  # one for each example
    norms = (u * real[:n] + (1 - u) * fake[:n]).flatten(1).norm(dim=1)
    wasserstein, penalty = (real.square() - fake.square()).sum() / 16, (norms - 1).square().mean()
    auxiliary, asked = (F.cross_entropy(x.flatten(1)[:, :10], labels) for x in (real, fake))
    same = torch.testing.assert_close
    same(parts, {"wasserstein": wasserstein, "penalty": penalty, "auxiliary": auxiliary})
    same(loss, 3 * penalty + auxiliary - wasserstein)
    same(acwgan.generator_loss(critic, fake, labels), asked - fake.square().sum() / 16)


def test_the_penaltys_gradient_in_a_weight_agrees_with_finite_differences():
    torch.manual_seed(0)
    critic, (real, fake) = acwgan.Critic(1).double(), torch.rand(2, 3, 1, 28, 28).double()

    def penalty(weight):
        torch.manual_seed(0)
        weights = {"layers.1.weight": weight}
        changed = functools.partial(torch.func.functional_call, critic, weights)
        return acwgan.gradient_penalty(changed, real, fake)

    assert torch.autograd.gradcheck(penalty, critic.layers[1].weight)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(acwgan.leaky_relu(x), F.leaky_relu(x, 0.2))
    assert torch.autograd.gradcheck(acwgan.leaky_relu, x)
    assert torch.allclose(critic(real[2:])[0], critic(real)[0][2:])  # no example sees another


@torch.no_grad()
def test_a_run_writes_what_it_promises_and_measures_what_its_numbers_say(small_run):
    out, numbers = small_run
    names = "AC-WGAN_GP.png checkpoint.pt curves.png history.csv reader.pt results.json samples.npz"
    assert sorted(os.listdir(out)) == names.split()
    assert [row["epochs"] for row in numbers["curve"]] == pytest.approx(np.arange(1, 11) * 0.3)
    end = numbers["curve"][-1]["read"]
    assert 0 < end == pytest.approx(numbers["asked_class_read"]["rate"], abs=0.1)
    assert Image.open(out / "AC-WGAN_GP.png").height > 600
    assert (numbers["dataset"], numbers["dataset_size"]) == ("glyphs", 640)
    assert {"versions", "device"} <= set(numbers)
    for name, rate in (("generator_adam", 4e-3), ("critic_adam", 2e-3)):
        group = torch.load(out / "checkpoint.pt")[name]["param_groups"][0]
        assert (group["lr"], group["betas"]) == (pytest.approx(rate / 60), (0.0, 0.99))
    reader, generator = acwgan.DigitReader().eval(), acwgan.Generator(74, 8).eval()
    reader.load_state_dict(torch.load(out / "reader.pt")["network"])
    generator.load_state_dict(torch.load(out / "checkpoint.pt")["average"])

    def draw(labels):
        latent = torch.randn(len(labels), 74, generator=torch.Generator().manual_seed(0))
        latent[:, :10] = 7  # the label overwrites these
        return (generator(latent, labels) * 255).round()

    written, asked = np.load(out / "samples.npz"), torch.arange(200) % 10
    assert (written["images"].dtype, written["labels"].dtype) == (np.uint8, np.int64)
    assert np.array_equal(written["labels"], asked)
    assert np.array_equal(written["images"], draw(asked)[:, 0])
    wild = generator(1000 * torch.randn(9, 74), torch.arange(9))
    assert 0 <= wild.min() < wild.max() <= 1
    test_images, test_labels = common.glyphs(1000, 1)
    images, labels = (x[-(640 // 6) :] for x in common.glyphs(640))  # what the reader didn't learn
    sets = {"": draw(labels) / 255, "_floor": images}
    truth = moments(reader.features(test_images).double().numpy())
    for name, x in sets.items():
        distance = common.frechet_distance(*moments(reader.features(x).double().numpy()), *truth)
        assert numbers[f"reader_frechet_distance{name}"] == pytest.approx(distance, rel=1e-3)
    ratio = numbers["reader_frechet_distance"] / numbers["reader_frechet_distance_floor"]
    assert numbers["reader_frechet_distance_over_floor"] == pytest.approx(ratio)
    right = reader(test_images).argmax(1) == test_labels
    hits = reader(draw(asked) / 255).argmax(1) == asked
    assert numbers["reader_right_on_test_images"] == common.wilson(right.sum(), 1000)
    assert numbers["asked_class_read"] == common.wilson(hits.sum(), 200)


def test_the_reader_learns_no_image_it_is_measured_on_and_is_kept(tmp_path, monkeypatch):
    learnt, (images, labels) = [], common.glyphs(60)

    def fit(network, images, **_):
        learnt.append(images)
        nn.init.constant_(network.head.bias, len(learnt))

    def reader(n=60, dataset="glyphs"):
        return acwgan.digit_reader(tmp_path, dataset, images[:n], labels[:n]).head.bias[0].item()

    monkeypatch.setattr(acwgan, "train_classifier", fit)
    before = torch.get_rng_state()
    assert [reader(), reader(), reader(54), reader(54), reader(54, "mnist")] == [1, 1, 2, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(learnt[0], images[:50])
    (tmp_path / "reader.pt").write_bytes((tmp_path / "reader.pt").read_bytes()[:99])
    with refused(tmp_path / "reader.pt", "delete it"):
        reader()


def test_every_step_is_averaged_and_the_seed_is_of_networks_noise_and_order(tmp_path, monkeypatch):
    steps = Mock()

    def train(seed, order):
        flags = ["--limit", "96", "--epochs", "1", "--average", "0.3", "--seed", str(seed)]
        args = acwgan.settings([*SMALL, *flags, "--out", str(tmp_path)])
        training = acwgan.Training(args, torch.device("cpu"))
        args.seed, weight = order, training.generator.project.weight
        weights = [weight.detach().clone()]
        steps.side_effect = lambda *_: weights.append(weight.detach().clone())
        acwgan.train(training, args, {}, *common.glyphs(96), lambda _: {})
        return weights, training

    monkeypatch.setattr(acwgan, "SAVE_EVERY", -1)  # a checkpoint each step
    monkeypatch.setattr(acwgan.Training, "save", steps)
    ends = [train(*seeds)[0][-1] for seeds in ((0, 0), (1, 0), (0, 1))]
    (mean, *weights), training = train(0, 0)
    assert [torch.equal(end, weights[-1]) for end in ends] == [True, False, False]
    for step, weight in enumerate(weights, 1):
        decay = min(0.3, step / (step + 8))
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(training.average.project.weight, mean, atol=1e-5)
    buffers = zip(training.average.buffers(), training.generator.buffers(), strict=True)
    assert all(torch.equal(*both) for both in buffers)


def test_the_logs_own_settings_train_on_twelve_images_and_draw(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(acwgan, "train_classifier", Mock())  # seconds saved
    shutil.copy(small_run[0] / "checkpoint.pt", tmp_path)  # --force overwrites it
    flags = "--dataset glyphs --limit 12 --epochs 1 --samples 20 --width 4 --image-size 64 --seed 1"
    flags += " --batch-size 4 --critic-steps 5 --decay none --average 0 --penalty-share 1"
    numbers = trained(tmp_path, *flags.split(), "--force")
    assert np.isfinite(numbers["reader_frechet_distance_over_floor"])
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    for name, steps, rate in (("critic", 15, 2e-3), ("generator", 3, 4e-3)):
        adam = checkpoint[f"{name}_adam"]
        assert (adam["state"][0]["step"], adam["param_groups"][0]["lr"]) == (steps, rate)
    torch.testing.assert_close(checkpoint["average"], checkpoint["generator"], rtol=0, atol=0)
    samples = np.load(tmp_path / "samples.npz")["images"]
    assert samples.shape == (20, 28, 28)
    again = trained(tmp_path, *flags.split())  # the same once more: from nothing
    assert again["training_seconds"] != numbers["training_seconds"]
    assert np.array_equal(np.load(tmp_path / "samples.npz")["images"], samples)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    draw = ["--sample", "20", "--out", str(tmp_path)]
    for flags, same in ([], True), (["--seed", "2"], False), (["--digit", "7"], False):
        acwgan.main([*draw, *flags])  # without --seed, of the training's
        drawn = np.load(tmp_path / "drawn.npz")
        assert np.array_equal(drawn["images"], samples) == same
    assert (drawn["labels"].tolist(), drawn["labels"].dtype) == ([7] * 20, np.int64)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert {path.name for path in {*tmp_path.iterdir()} - {*before}} == {"drawn.npz", "drawn.png"}


@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL", "within an epoch"])
def test_a_run_that_was_stopped_resumes_to_the_same_bits(small_run, tmp_path, monkeypatch, stop):
    out = copy_classifiers(small_run, tmp_path)
    if stop == "within an epoch":
        save = Mock(side_effect=[*range(52), KeyboardInterrupt])
        with monkeypatch.context() as patch:
            patch.setattr(acwgan, "SAVE_EVERY", -1)  # a checkpoint each step
            patch.setattr(acwgan, "write_history", save)
            with pytest.raises(KeyboardInterrupt):
                trained(out, *SMALL)
    else:
        stop_once_there_is(out / "checkpoint.pt", getattr(signal, stop), "acwgan.py", *SMALL)
    first = torch.load(out / "checkpoint.pt")
    assert 0 < first["steps"] < 60, "the run was over before it was stopped: this shows nothing"
    record = trained(out, "--resume")
    whole, again = torch.load(small_run[0] / "checkpoint.pt"), torch.load(out / "checkpoint.pt")
    for part in ("generator", "critic", "average"):
        torch.testing.assert_close(again[part], whole[part], rtol=0, atol=0)
    samples = [np.load(folder / "samples.npz")["images"] for folder in (out, small_run[0])]
    assert np.array_equal(*samples)
    _, seconds = ([row.pop("seconds") for row in x["history"]] for x in (whole, again))
    assert seconds[0] == first["history"][0]["seconds"]  # this step was not done again
    assert 0 < seconds[0] < seconds[1] < again["seconds"] == record["training_seconds"]
    assert record["steps_per_second"] == pytest.approx(60 / again["seconds"])
    assert again["history"] == whole["history"]
    assert [row["step"] for row in again["history"]] == [1, 51]
    head, *rows = (out / "history.csv").read_text().splitlines()
    assert (head.split(",")[:3], len(rows)) == (["step", "seconds", "wasserstein"], 2)


def test_fifteen_seconds_of_training_read_five_times_better_than_chance(small_run, tmp_path):
    out = copy_classifiers(small_run, tmp_path)
    numbers = trained(out, *SMALL, "--width", "16", "--epochs", "20")
    assert numbers["reader_right_on_test_images"]["rate"] > 0.98
    assert numbers["asked_class_read"]["rate"] > 0.5


@pytest.mark.parametrize(
    "case",
    [
        ("--digit 3", 2, "--sample"),
        ("--resume --out absent", 2, "absent/checkpoint.pt train --out"),
        ("--resume --out foreign", 1, "foreign/checkpoint.pt --force"),
        ("--resume --out damaged", 1, "damaged/checkpoint.pt --force"),
        ("--resume --batch-size 64", 2, "run/checkpoint.pt batch_size 32 64 --out --force"),
        ("--resume --limit 320", 2, "run/checkpoint.pt dataset_size 640 320 --force"),
        ("--epochs 1", 2, "run/checkpoint.pt epochs 3 1 --out --force"),
        ("--limit 11 --batch-size 4", 2, "11 4 12"),
        ("--limit 11", 2, "11 32"),
        ("--dataset mnist --data none", 1, "train-images-idx3-ubyte none/MNIST/raw glyphs"),
        ("--out file/below", 1, "file/below --out"),
        ("--width 10000000000 --force", 1, "memory --batch-size"),
        ("--generator-lr 1e30 --critic-lr 1e30 --force", 1, "weight --critic-lr"),
    ],
)
def test_what_cannot_be_done_changes_nothing(small_run, tmp_path, monkeypatch, capsys, case):
    monkeypatch.setattr(os, "dup2", Mock())
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    good = torch.load(small_run[0] / "checkpoint.pt")
    changes = {"run": {}, "foreign": {"kind": "asl_model"}, "damaged": {"steps": "many"}}
    for name, change in changes.items():
        torch.save(good | change, copy_classifiers(small_run, Path(name)) / "checkpoint.pt")
    flags, code, words = case
    flags = [*SMALL, "--out", "run", *flags.split()]
    with pytest.raises(SystemExit, match=f"^{code}$"):
        common.run(functools.partial(acwgan.main, flags))
    *_, line = capsys.readouterr().err.splitlines()
    assert len(line) <= 300
    assert all(word in line for word in words.split()), line
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "reader.pt"]
    assert torch.load("run/checkpoint.pt")["steps"] == 60


# --- week 2


def short_transfer(*flags):
    """`transfer.main`, with a short search in Carlini & Wagner's row."""
    short = functools.partial(transfer.carlini_wagner, searches=2, steps=15, rate=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transfer.ATTACKS, "carlini-wagner", (short, 200))
        return transfer.main([*map(str, flags)])


@pytest.fixture(scope="module")
def transferred(small_run, tmp_path_factory):
    """A small run of every variant on the small run's generator: its folder, flags, numbers."""
    out = tmp_path_factory.mktemp("transfer")
    flags = ["--limit", "16", "--samples", "100", "--steps", "6", "--batch-size", "16"]
    flags += ["--device", "cpu", "--generator", str(small_run[0] / "checkpoint.pt")]
    return out, flags, short_transfer(*flags, "--out", out)


def test_every_variant_writes_what_it_promises_drawn_by_the_generator_it_keeps(transferred):
    out, flags, numbers = transferred
    rows, accuracy = numbers["rows"], numbers["accuracy"]
    assert list(rows) == [*transfer.VARIANTS, "pgd", "carlini-wagner"]
    target = transfer.model_a().eval()
    target.load_state_dict(torch.load(out / "target.pt")["network"])
    original = transfer.load_generator(Path(flags[-1]), "auto")[0]
    roles = dict.fromkeys(transfer.Networks._fields) | {"original": original, "target": target}
    for variant in transfer.VARIANTS:
        samples = np.load(out / f"samples-{variant}.npz")
        generator = transfer.new_generator(variant, transfer.Networks(**roles))
        generator.load_state_dict(torch.load(out / f"generator-{variant}.pt")["generator"])
        drawn = acwgan.generate(generator.eval(), torch.from_numpy(samples["labels"]), 0)
        assert np.array_equal((drawn[:, 0] * 255).round().byte().numpy(), samples["images"])
        answers = transfer.classify(target, drawn).numpy()  # scratch's target is a random one
        assert np.array_equal(answers, samples["predicted"]) != ("scratch" in variant)
        assert samples["images"].dtype == np.uint8
        assert all(samples[name].dtype == np.int64 for name in ("labels", "target", "predicted"))
        wanted = 7 if "scratch" in variant else (samples["labels"] + 1) % 10
        assert np.array_equal(samples["target"], np.full(100, wanted))
        row, counts = rows[variant], samples["labels"] != samples["target"]
        fooled = (samples["predicted"] == samples["target"])[counts]
        assert row["target_fooled"]["rate"] == pytest.approx(fooled.mean())
        assert row["target_fooled"]["n"] == counts.sum()
        for both, read in (("both", "judge_reads_y"), ("both_by_pgd_judge", "pgd_judge_reads_y")):
            assert row[both]["rate"] <= min(row["target_fooled"]["rate"], row[read]["rate"])
        history = out / f"history-{variant}.csv"
        assert variant == "original" or history.read_text().startswith("step,seconds,")
    assert rows["original"]["l2"] == 0 < rows["euclidean"]["l2"]
    floor = rows["carlini-wagner"]["l2"]  # over 100 digits, as the other rows
    assert rows["euclidean"]["l2_over_cw"] == pytest.approx(rows["euclidean"]["l2"] / floor)
    for judge in ("judge", "pgd_judge"):
        assert accuracy[f"{judge}_under_pgd"]["rate"] < accuracy[judge]["rate"] - 0.1
    assert numbers["dataset"] == json.loads((out / "results.json").read_text())["dataset"]
    for name in (*transfer.FIGURES, "closest.png", "scatter.png"):
        assert 400 < Image.open(out / name).width <= 900


def test_a_transfer_that_was_killed_resumes_to_the_same_table(transferred, tmp_path, capsys):
    _, flags, numbers = transferred
    folder = copy_classifiers(transferred, tmp_path)
    last, ours = (tmp_path / f"generator-{name}.pt" for name in ("scratch-live", "ours-gradient"))
    stop_once_there_is(last, signal.SIGKILL, "transfer.py", *flags)
    assert not ours.exists(), "stopped too late: this shows nothing"
    written = last.stat().st_mtime_ns
    again = short_transfer("--resume", "--out", folder)
    assert last.stat().st_mtime_ns == written
    for name, row in numbers["rows"].items():
        same = {key: value for key, value in row.items() if key != "digits_per_second"}
        assert same.items() <= again["rows"][name].items(), name
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_every_column_measures_what_its_name_says():
    images, asked, wanted = common.glyphs(5)[0], torch.arange(5), torch.tensor([1, 2, 3, 4, 4])
    answers = {"target": [1, 2, 2, 4, 4], "judge": [0, 2, 2, 3, 4], "pgd_judge": [0, 2, 1, 1, 4]}
    logits = {role: F.one_hot(torch.tensor(answer), 10) for role, answer in answers.items()}
    answers = {role: Mock(return_value=x) for role, x in logits.items()}
    roles = dict.fromkeys(transfer.Networks._fields) | answers
    moved, networks = images.clone(), transfer.Networks(**roles)
    moved[:, :, 0, 0] += 0.5
    predicted, row = transfer.measure(moved, images, asked, wanted, networks)
    assert predicted.tolist() == [1, 2, 2, 4, 4]
    hits = {"target_fooled": 3, "judge_reads_y": 3, "both": 2}
    hits |= {"pgd_judge_reads_y": 1, "both_by_pgd_judge": 1}
    for name, n in hits.items():
        assert row[name] == common.wilson(n, 4), name  # the fifth image is asked for what is wanted
    assert row["l2"] == row["linf"] == 0.5


@pytest.fixture
def networks(small_run):
    """Untrained networks beside the small run's generator and critic."""
    torch.manual_seed(0)
    original, critic, _ = transfer.load_generator(small_run[0] / "checkpoint.pt", "auto")
    made = {role: make() for role, (make, *_) in transfer.CLASSIFIERS.items()}
    made["random_target"] = transfer.model_a()
    made = {role: network.eval().requires_grad_(False) for role, network in made.items()}
    return transfer.Networks(original, critic, **made)


def term(name, networks, images):
    """A term of the loss for these images of classes 0, 1, ... and fixed latent numbers."""
    latent, labels = torch.ones(len(images), networks.original.latent), torch.arange(len(images))
    bank = transfer.FeatureBank(networks.auxiliary, common.glyphs(40)[0])
    return transfer.loss_term(name, networks, bank, images, latent, labels, labels)


def small_training(networks, name, steps=2):
    args = transfer.settings(["--steps", str(steps), "--batch-size", "4"])
    return transfer.train(name, args, networks, *common.glyphs(20))


def test_a_feature_bank_keeps_seven_batches_and_its_gradient_is_that_of_all():
    torch.manual_seed(0)
    real, batches = torch.rand(30, 1, 2, 3), torch.rand(10, 5, 1, 2, 3)
    flat = Mock(features=lambda images: images.flatten(1))
    bank, variance = transfer.FeatureBank(flat, real), real.flatten(1).var(0).sum()
    for i, batch in enumerate(batches):
        kept = batches[max(0, i - 7) : i + 1].reshape(-1, 6)  # brute force: the batches so far
        distance = common.frechet_distance_torch(kept, real.flatten(1)) / variance
        assert torch.allclose(bank.distance(batch.clone().requires_grad_()), distance, rtol=1e-4)
    bank, x = transfer.FeatureBank(flat, real), batches[0].clone().requires_grad_()
    gradients = [torch.autograd.grad(bank.distance(x), x)[0] for _ in range(3)]
    same = common.frechet_distance_torch(torch.cat([x, x, x]).flatten(1), real.flatten(1))
    (expected,) = torch.autograd.grad(same / variance, x)  # all three batches move
    assert torch.allclose(gradients[2], expected, rtol=1e-4, atol=1e-7)


def test_the_terms_of_the_losses_are_what_their_names_say_and_must_be_numbers(networks):
    logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 5.0]])
    assert transfer.lead(logits, torch.tensor([0, 1])).tolist() == [2.0, -3.0]
    images, labels = common.glyphs(8)[0].requires_grad_(), torch.arange(8)
    held = {"robust hinge": networks.robust_auxiliary, "adversarial hinge": networks.target}
    for (name, network), margin in zip(held.items(), (2.0, 1.5), strict=True):
        missing = margin - transfer.lead(network(images), labels)
        assert term(name, networks, images) == missing.clamp(min=0).mean()
    (gradient,) = torch.autograd.grad(term("frechet", networks, images), images)
    assert gradient.abs().sum() > 0
    original = networks.original(torch.ones(8, networks.original.latent), labels)
    assert term("euclidean", networks, original) == 0
    noise = [term("noisy euclidean", networks, original).item() for _ in range(20)]
    assert np.mean(noise) == pytest.approx(784 * 0.1**2, rel=0.02)  # the variance of each pixel
    with refused("no number"):
        small_training(networks._replace(target=lambda x: networks.target(x) / 0), "fid")


def test_each_row_of_the_ladder_changes_one_thing():
    rows = transfer.VARIANTS
    live = rows["scratch-live"]._replace(critic_trains=False)
    assert live == rows["scratch"]
    for name in ("adversarial", "fid", "euclidean"):
        assert rows["as-logged"]._replace(weights=rows[name].weights) == rows[name]
    assert rows["as-logged"].weights == {"auxiliary": 1}  # gamma was 0, the FID detached
    assert "noisy euclidean" in rows["euclidean"].weights
    for name in ("ours-no-gradient", "ours-gradient"):
        terms = {"adversarial hinge", "robust hinge", "euclidean"}
        assert {term for term, weight in rows[name].weights.items() if weight > 0} == terms


def test_a_row_trains_its_generator_at_its_rate_and_scratch_live_a_critic(networks, monkeypatch):
    critics, loss_term = [], transfer.loss_term
    frozen = [network for network in networks if network]
    state = [p.clone() for network in frozen for p in network.state_dict().values()]

    def record(term, networks, bank, images, *rest):
        critics.append(networks.critic.heads.weight.detach().clone())
        scores = networks.critic(images)[0]
        torch.clear_autocast_cache()  # of bfloat16 weights from before the critic's step
        assert torch.equal(scores, networks.critic(images)[0])
        return loss_term(term, networks, bank, images, *rest)

    monkeypatch.setattr(transfer, "loss_term", record)
    monkeypatch.setattr(common, "has_bf16", lambda device: True)
    for name, rate in (("scratch", 0), ("scratch-live", 1e-3)):
        torch.manual_seed(0)
        before = transfer.new_generator(name, networks)
        after, _ = small_training(networks, name, steps=1)
        critic_step = critics[-1] - networks.critic.heads.weight
        step = after.project.weight - before.project.weight
        assert critic_step.abs().max().item() == pytest.approx(rate, rel=1e-2)
        assert step.abs().max().item() == pytest.approx(2e-3, rel=1e-3)  # Adam's first is its rate
    for name in transfer.VARIANTS:
        small_training(networks, name)
    after = [p for network in frozen for p in network.state_dict().values()]
    assert all(map(torch.equal, state, after)), "networks it is trained against have changed"


def test_generators_start_as_their_rows_say_and_only_ours_gradient_sees_the_target(
    networks, monkeypatch
):
    monkeypatch.setattr(common, "has_bf16", lambda device: False)  # else equal to 0.02 only
    latent, labels = torch.randn(4, networks.original.latent), torch.arange(4)
    drawn = networks.original(latent, labels)
    for name, alone in (("original", True), ("as-logged", False), ("scratch", False)):
        generator = transfer.new_generator(name, networks).eval()
        others = generator(latent[:3], labels[:3]), generator(latent, labels)[:3]
        assert torch.allclose(*others, atol=1e-5) == alone  # the batch's statistics, or its own
        same = torch.equal(generator.project.weight, networks.original.project.weight)
        assert same == (name != "scratch")
    for name, sees in (("ours-gradient", True), ("ours-no-gradient", False)):
        refiner = transfer.new_generator(name, networks)
        assert torch.allclose(refiner(latent, labels), drawn, atol=1e-6)
        nn.init.normal_(refiner.decoder[-1].weight)
        nn.init.zeros_(refiner.facts.weight[:, 20:])  # it sees no logits, only the gradient
        assert (refiner.target is not None) == sees
        before = refiner(latent, labels)
        if sees:
            refiner.target = transfer.model_a().eval().requires_grad_(False)
            assert not torch.equal(refiner(latent, labels), before)


DIRECTION = torch.randn(784, generator=torch.Generator().manual_seed(0)) / 100


def linear(images):
    """Two logits: the first is linear in the pixels, the second is 0."""
    pixels = images.flatten(1)
    return torch.stack([pixels @ DIRECTION, 0 * pixels.sum(1)], 1)


def test_pgd_stays_within_eps_and_moves_a_linear_classifier_by_the_closed_form():
    images, labels = torch.full((3, 1, 28, 28), 0.5), torch.zeros(3, dtype=torch.long)
    step = 0.3 * DIRECTION.sign().view(1, 28, 28)
    assert torch.allclose(transfer.pgd(linear, images, labels, -1), images + step)
    assert torch.allclose(transfer.pgd(linear, images, labels), images - step)
    for how in (transfer.ONE_STEP, transfer.THREE_STEPS):
        moved = transfer.pgd(linear, images, labels, **how)
        assert (moved - images).abs().max() <= 0.3 + 1e-6
        assert (linear(moved) < linear(images))[:, 0].all()


def test_carlini_and_wagner_find_the_smallest_change_of_a_linear_classifier():
    torch.manual_seed(0)
    images = torch.rand(8, 1, 28, 28) / 2 + 0.25  # far from black and white
    wanted = 1 - linear(images).argmax(1)
    moved = transfer.carlini_wagner(linear, images, wanted)
    assert torch.equal(linear(moved).argmax(1), wanted)
    closed_form = (linear(images)[:, 0].abs() + 0.1) / DIRECTION.norm()  # to a lead of 0.1
    found = (moved - images).flatten(1).norm(dim=1)
    assert torch.allclose(found, closed_form, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("far", [2.0, 0.9])
def test_spare_change_is_handed_back_until_the_wanted_class_just_leads(far):
    wanted, direction = torch.tensor([0]), DIRECTION.view(1, 1, 28, 28)
    images = torch.full((1, 1, 28, 28), 0.5) - 8 * direction  # the second class leads
    change = direction * (0.2 - linear(images)[0, 0]) / DIRECTION.square().sum()
    start = transfer.lead(linear(images), wanted)
    nearest = transfer.smallest(linear, images, images + far * change, wanted, start)
    assert transfer.lead(linear(nearest), wanted).item() == pytest.approx(0.5, rel=1e-3)
    ahead = transfer.smallest(linear, images, images, wanted, start, start.item())
    assert torch.equal(ahead, images), "nothing to hand back is no change, and no NaN"


def test_judges_differ_and_a_change_of_plan_trains_a_classifier_anew(tmp_path, monkeypatch):
    train, data = Mock(), ("glyphs", *common.glyphs(20))
    monkeypatch.setattr(acwgan, "train_classifier", train)
    gray, zero, rows = torch.full((1, 1, 28, 28), 0.5), torch.tensor([0]), transfer.CLASSIFIERS
    held, judge, other = rows["robust_auxiliary"], rows["judge"], rows["pgd_judge"]
    for part in (0, 1, 2):  # judges differ from what is held, and from one another
        assert len({str(row[part]) for row in (held, judge, other)}) == 3
    assert judge[3]["steps"] == 1 < other[3]["steps"]
    for name in rows:
        transfer.classifier(name, tmp_path, *data)
        attack = train.call_args.kwargs["attack"]
        assert bool(attack) == (name in ("judge", "pgd_judge", "robust_auxiliary"))
        assert not attack or linear(attack(linear, gray, zero))[0, 0] < linear(gray)[0, 0]
    make, seed, how, attack = judge
    fewer = how | {"epochs": 1}
    for plan in (judge, (make, 8, how, attack), (make, seed, how, {}), (make, seed, fewer, attack)):
        monkeypatch.setitem(rows, "judge", plan)
        transfer.classifier("judge", tmp_path, *data)
    assert train.call_count == len(rows) + 3  # the first is kept


def test_a_generator_that_does_not_fit_is_refused_with_its_remedy(small_run, tmp_path, capsys):
    content, path = torch.load(small_run[0] / "checkpoint.pt"), tmp_path / "changed.pt"
    large = content | {"settings": content["settings"] | {"image_size": 64}}
    with refused(path, "python acwgan.py --out"):
        transfer.load_generator(path, "auto")
    for change, dataset, code, word in (
        (content, "mnist", 2, "glyphs"),
        (large, "auto", 2, "64 pixels"),
        (content | {"average": {}}, "auto", 1, "changed.pt does not fit"),
        (content | {"kind": "other"}, "auto", 1, "changed.pt"),
    ):
        torch.save(change, path)
        with refused(word, "python acwgan.py --out", code=code):
            transfer.load_generator(path, dataset)
    torch.save(content | {"curve": content["curve"][:7]}, path)
    transfer.load_generator(path, "auto")
    assert "unfinished, 7 of 10" in capsys.readouterr().out


def test_a_finished_transfer_is_made_otherwise_with_force_only(transferred, tmp_path):
    out, flags, _ = transferred
    folder, content = shutil.copytree(out, tmp_path / "copy"), torch.load(flags[-1])
    content["critic"]["heads.bias"] += 1
    torch.save(content, tmp_path / "other")
    resume, ours = ["--resume", "--out", str(folder)], folder / "generator-ours-gradient.pt"
    for more, word in (
        ([*resume, "--steps", "2"], "steps"),
        ([*resume, "--seed", "1"], "seed"),
        ([*resume, "--batch-size", "4"], "batch_size"),
        ([*flags, *resume[1:], "--steps", "2"], "steps"),
        ([*resume, "--generator", str(tmp_path / "other")], "week_1"),
    ):
        with refused("was made with", word, code=2):
            transfer.main(more)
    torch.save(torch.load(ours) | {"generator": {}}, ours)
    with refused("generator-ours-gradient.pt", "trained anew"):
        transfer.main([*resume, "--variant", "ours-gradient"])
    forced = [*flags, *resume[1:], "--seed", "1", "--variant", "as-logged", "--force"]
    assert list(short_transfer(*forced)["rows"]) == [
        "original",
        "as-logged",
        "pgd",
        "carlini-wagner",
    ]


# --- weeks 3 to 5: the classifier

CPU = torch.device("cpu")


def test_the_networks_have_as_many_entries_and_weights_as_the_published_files():
    sizes = {"tresnet_m": (374, 29.50), "tresnet_l": (535, 53.75), "tresnet_xl": (649, 75.99)}
    for arch, size in sizes.items():
        with torch.device("meta"):
            network = asl_model.tresnet(arch)
        millions = round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
        assert (len(network.state_dict()), millions) == size


@functools.cache
def published_state(arch):
    """A random state dict, moments of real activations, gammas of either sign; to be shared."""
    torch.manual_seed(0)
    network = asl_model.tresnet(arch, 10)
    gammas = [x for name, x in network.named_parameters() if name.endswith(".1.weight")]
    with torch.no_grad():
        for name, x in network.named_parameters():
            if name.endswith("bias"):
                x.normal_(0, 0.2)
        for gamma in gammas:
            gamma.uniform_(0.3, 1)
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
        parts = "weight", "bias", "running_mean", "running_var"
        gamma, beta, mean, var = (state[f"{name}.1.{part}"][:, None, None] for part in parts)
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        x = (x - mean) / torch.sqrt(var + 1e-5) * (gamma.abs() + 1e-5) + beta
        return torch.where(x < 0, slope * x, x)

    def conv(x, name, slope):
        if f"{name}.0.weight" in state:
            return conv_abn(x, name, slope)
        x = F.pad(conv_abn(x, f"{name}.0", slope), (1, 1, 1, 1), mode="reflect")
        kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
        return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])

    def dense(x, name):
        return F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    pixels = [images[:, :, i::4, j::4] for i in range(4) for j in range(4)]
    x = conv_abn(torch.cat(pixels, 1).double(), "body.conv1", 1e-2)
    for name in dict.fromkeys(re.findall(r"body\.layer\d\.\d+", " ".join(state))):
        bottleneck = f"{name}.conv3.0.weight" in state
        y = conv(x, f"{name}.conv1", 1e-3)
        y = conv(y, f"{name}.conv2", 1e-3 if bottleneck else 1.0)
        if f"{name}.se.fc1.weight" in state:
            scale = dense(dense(y.mean((2, 3)), f"{name}.se.fc1").relu(), f"{name}.se.fc2")
            y = y * scale.sigmoid()[:, :, None, None]
        if bottleneck:
            y = conv(y, f"{name}.conv3", 1.0)
        if f"{name}.downsample.1.0.weight" in state:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
            x = conv_abn(x, f"{name}.downsample.1", 1.0)
        elif f"{name}.downsample.0.0.weight" in state:
            x = conv_abn(x, f"{name}.downsample.0", 1.0)
        x = torch.relu(x + y)
    return dense(x.mean((2, 3)), "head.fc")


def logits_and_gradient(network, images):
    images = images.clone().requires_grad_()
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), images)[0]


def difference(x, truth):
    return ((x - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("arch", "size"), [("tresnet_s", 64), ("tresnet_m", 72)])
def test_a_file_in_the_published_format_gives_inplace_abns_logits(tmp_path, arch, size):
    state, path, images = published_state(arch), tmp_path / "file.pth", photo_like(3, size)
    names = {str(i): "abcdefghij"[i] for i in (3, 0, 9, 4, 1, 8, 2, 7, 5, 6)}
    torch.save({"model": state, "num_classes": 10, "idx_to_class": names}, path)
    truth = inplace_abn_logits(state, images)
    assert difference(truth.mean(0), truth) > 0.003, "all images look alike: this shows nothing"
    for folded in (True, False):
        network, class_names = asl_model.load_asl(path, folded=folded)
        assert class_names == list("abcdefghij")
        assert (network.arch, network.training) == (arch, False)
        assert difference(logits_and_gradient(network, images)[0], truth) < 1e-5
        probabilities = asl_model.predict(network, images, CPU, 2)
        assert np.allclose(probabilities, truth.sigmoid(), atol=1e-5)
    gamma = "body.conv1.1.weight"
    assert state[gamma].min() < 0 == state[gamma][0]
    assert torch.equal(network.state_dict()[gamma], state[gamma].abs() + 1e-5)
    torch.save({"state_dict": state | {"x.num_batches_tracked": torch.tensor(7)}}, path)
    assert asl_model.load_asl(path)[1] == list("0123456789")
    torch.save({"model": state, "norm": "batch norm", "settings": {"image_size": 32}}, path)
    own = asl_model.load_asl(path, folded=False)[0]  # trained here: gammas are taken as they are
    assert all(torch.equal(own.state_dict()[name], x) for name, x in state.items())
    assert own.image_size == 32


@pytest.mark.parametrize(("arch", "places"), [("tresnet_s", 10), ("tresnet_m", 36)])
def test_the_pinned_gradient_folded_or_not_is_an_independent_rebuildings(arch, places, monkeypatch):
    network, images = asl_model.tresnet(arch, 10).double().eval(), photo_like(2, 64)
    network.load_state_dict(published_state(arch))
    images, before = images.to(torch.float64), copy.deepcopy(network.state_dict())
    moved, double = [], torch.Tensor.double  # float64 on the CPU only: Apple's GPU has none
    monkeypatch.setattr(asl_model.TResNet, "cpu", lambda self: moved.append(1) or self)
    monkeypatch.setattr(torch.Tensor, "double", lambda x: double(x) if moved else 1 / 0)
    folded, right = asl_model.fold(network), logits_and_gradient(network, images)
    assert not any(p.requires_grad for p in folded.parameters())
    for ours, truth in zip(logits_and_gradient(folded, images), right, strict=True):
        assert difference(ours, truth) < 1e-9
    assert sum(isinstance(module, nn.LeakyReLU) for module in folded.modules()) == places

    def straight(relu, x):
        """A leaky ReLU that hands its gradient on as it comes."""
        return x + (F.leaky_relu(x, relu.negative_slope) - x).detach()

    with monkeypatch.context() as patch:
        patch.setattr(nn.LeakyReLU, "forward", straight)
        truth = logits_and_gradient(folded, images)[1]
    for model in (network.train(), folded):
        pinned = asl_model.inplace_abn_1_0_12(model)
        logits, gradient = logits_and_gradient(pinned, images)
        assert difference(logits, right[0]) < 1e-9
        assert difference(gradient, truth) < 1e-9
        assert difference(gradient, right[1]) > 0.1
    assert torch.equal(logits, folded(images)), "to the bit, or predictions could differ"
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(x, before[k]) for k, x in network.state_dict().items())


def test_of_a_residual_block_only_the_relu_of_a_norm_skips_its_derivative():
    block = torchvision.models.resnet.BasicBlock(6, 6).eval()
    images, scale = torch.randn(20, 6, 1, 1), (1 + 1e-5) ** -0.5  # on one pixel, a matrix each
    first, second = (conv.weight[:, :, 1, 1] * scale for conv in (block.conv1, block.conv2))
    outputs, gradient = logits_and_gradient(asl_model.inplace_abn_1_0_12(block), images)
    assert torch.equal(outputs, block(images))
    past_sum = (outputs[:, :1, 0, 0] > 0).float()
    slope = second[0] @ first + torch.eye(6)[0]
    assert torch.allclose(gradient[..., 0, 0], past_sum * slope, atol=1e-6)


@pytest.mark.parametrize("how", [(), (4, 0, 0.05), (2, 2, 0.0), (1.5, 0.5, 0.2), (0, 0, 0)])
def test_asl_and_its_gradient_are_the_formulas_and_finite_at_any_logit(how):
    gamma_neg, gamma_pos, clip = how or (4, 1, 0.05)
    rng, asl = torch.Generator().manual_seed(0), asl_model.AsymmetricLoss(*how)
    logits = 4 * torch.randn(50, 8, generator=rng, dtype=torch.float64).requires_grad_()
    targets = (torch.rand(50, 8, generator=rng) < 0.3).double()
    p = 1 / (1 + torch.exp(-logits))
    q = torch.clamp(p - clip, min=0)  # equation 7 of Ben-Baruch et al. 2020, as it is printed
    positive = targets * (1 - p) ** gamma_pos * torch.log(p)
    truth = -(positive + (1 - targets) * q**gamma_neg * torch.log(1 - q)).sum()
    (exact,) = torch.autograd.grad(truth, logits)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        ours = logits.detach().to(dtype).requires_grad_()
        value = asl(ours, targets.to(dtype))
        assert value.item() == pytest.approx(truth.item(), rel=tolerance)
        assert difference(torch.autograd.grad(value, ours)[0], exact) < tolerance
    far = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 200.0, 1e4]] * 2, requires_grad=True)
    value = asl(far, torch.tensor([[1.0], [0.0]]).expand(2, 6))
    (gradient,) = torch.autograd.grad(value, far)
    assert torch.stack([value, *gradient.flatten()]).isfinite().all()
    assert (gradient[0, :3] <= -0.9).all(), "a positive is pulled up, however far off it is"
    assert (gradient[1] >= 0).all()
    assert clip or (gradient[1, 3:] >= 0.9).all()


def test_mean_average_precision_and_the_rates_are_the_brute_force_ones():
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 7)) < 0.2).astype(np.float32)
    labels[:, 3] = 0
    probabilities = 0.3 + 0.4 * labels + 0.15 * rng.normal(size=(40, 7))
    expected = []
    for p, positive in zip(probabilities.T, labels.T > 0, strict=True):
        if positive.any():
            expected.append(np.mean([positive[p >= x].mean() for x in p[positive]]))
    assert np.allclose(asl_model.average_precision(probabilities, labels), expected)
    numbers = asl_model.measure(probabilities, labels, 0.5)
    assert (numbers["mAP"], numbers["classes_present"]) == (pytest.approx(sum(expected) / 6), 6)
    predicted, present = ({*zip(*x.nonzero(), strict=True)} for x in (probabilities > 0.5, labels))
    assert numbers["OP"] == common.wilson(len(predicted & present), len(predicted))
    assert numbers["OR"] == common.wilson(len(predicted & present), len(present))
    assert numbers["exact"] == common.wilson(40 - len({i for i, _ in predicted ^ present}), 40)


def test_photos_are_shown_through_cutout_and_then_randaugment_the_same_for_a_seed(monkeypatch):
    photos, state = torch.full((40, 3, 64, 64), 0.5), torch.get_rng_state()

    def view(seed):
        augmented = asl_model.Augmented(photos, seed)
        return torch.stack([augmented[i] for i in range(len(augmented))])

    first = view(0)
    assert torch.equal(first, view(0))
    assert not (first == view(1)).flatten(1).all(1).any()
    assert torch.equal(torch.get_rng_state(), state)
    halve = functools.partial(Image.Image.point, lut=lambda x: x // 2)
    monkeypatch.setattr(asl_model, "RandAugment", lambda: halve)
    cut = (view(0) * 255).round()
    assert (first * 255 - 2 * cut).abs().amax((1, 2, 3)).gt(3).sum() > 20  # RandAugment's doing
    assert 50 < cut.max() <= 127, "colours of Cutout, which came first, are halved, too"
    heights, widths = ((cut != 64).any(1).any(axis).sum(1) for axis in (2, 1))
    assert heights.max() == widths.max() == 32
    assert torch.equal((cut != 64).any(1).sum((1, 2)), heights * widths), "no rectangle"


def flags_of(data, out, *flags):
    return list(map(str, [*flags, "--data", data, "--out", out, "--device", "cpu"]))


SCENES = ("--dataset", "scenes", "--digits", "mnist", "--image-size", 32, "--train")
PHOTOS = ("--dataset", "coco", "--arch", "tresnet_s", "--image-size", 32, "--batch-size", 6)


@pytest.mark.parametrize("flags", [(*PHOTOS, "--train"), (*SCENES, "--limit", 8)])
def test_a_resumed_training_finds_the_batches_that_were_left(few, tmp_path, flags):
    args = asl_model.settings(flags_of(few, tmp_path, *flags, "--epochs", 3, "--batch-size", 2))
    data, photos = common.scene_digits("mnist", few, "train")[1:], args.dataset == "coco"
    data = (photo_like(8, 64), torch.arange(8.0)[:, None]) if photos else data
    batches, rest = (list(asl_model.training_batches(args, data, i, 12, CPU)) for i in (0, 5))
    assert (len(batches), len(rest)) == (12, 7)
    for ours, truth in zip(rest, batches[5:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert torch.equal(batches[0][0], batches[4][0]) != photos
    if photos:
        orders = [torch.cat([y for _, y in batches[i : i + 4]]).flatten() for i in (0, 4, 8)]
        assert all(torch.equal(order.sort().values, torch.arange(8.0)) for order in orders)
        views = [x for images, y in batches for x, i in zip(images, y, strict=True) if i == 3]
        assert len({x.numpy().tobytes() for x in views}) == 3, "a new view in each epoch"


def test_training_is_one_cycle_averages_weights_and_keeps_the_best(few, tmp_path, monkeypatch):
    scores, saved = [0.3, 0.5, 0.9, 0.2] + 6 * [0.4], []
    asl, mean_ap = Mock(wraps=asl_model.AsymmetricLoss), Mock(side_effect=map(np.array, scores))
    monkeypatch.setattr(common, "save_checkpoint", lambda _, x: saved.append(copy.deepcopy(x)))
    monkeypatch.setattr(asl_model, "SAVE_EVERY", 0)
    monkeypatch.setattr(asl_model, "AsymmetricLoss", asl)
    monkeypatch.setattr(asl_model, "average_precision", mean_ap)
    flags = (*SCENES, "--limit", 8, "--batch-size", 4, "--epochs", 10, "--lr", 0.01)
    facts = asl_model.train(asl_model.settings(flags_of(few, tmp_path, *flags)), CPU)
    asl.assert_called_once_with(4, 1)
    *steps, result = saved
    rates = [content["adam"]["param_groups"][0]["lr"] for content in steps]
    shares = np.arange(1, 21) / 21
    cycle = np.minimum(shares / 0.2, (1 - shares) / 0.8)
    assert rates == pytest.approx(0.01 * np.sin(np.pi / 2 * cycle) ** 2)
    for i in range(1, 20):
        decay, old, new = min(0.99, 1 - 8 / (i + 9)), steps[i - 1]["average"], steps[i]
        for name, x in new["average"].items():
            expected = old[name] * decay + new["network"][name] * (1 - decay)
            assert torch.allclose(x, expected, atol=1e-6), name
    assert result["mAP"] == facts["best_mAP"] == 0.9
    assert all(torch.equal(x, steps[5]["average"][name]) for name, x in result["model"].items())
    history = np.genfromtxt(tmp_path / "history.csv", delimiter=",", names=True)
    assert history["step"].tolist() == list(range(2, 21, 2))
    assert history["mAP"].tolist() == pytest.approx(scores)
    assert 0 < history["seconds"][-1] <= facts["training_seconds"] + 0.1


def test_photos_are_learnt_by_heart_and_their_labels_told(few, tmp_path, monkeypatch):
    flags, asl = flags_of(few, tmp_path, *PHOTOS), Mock(wraps=asl_model.AsymmetricLoss)
    monkeypatch.setattr(asl_model, "AsymmetricLoss", asl)
    monkeypatch.setattr(asl_model, "Augmented", lambda photos, _: photos)  # as they will be seen
    record = asl_model.main([*flags, "--train", "--epochs", "20"])
    asl.assert_called_once_with(4, 0)
    assert [record[split]["n"] for split in ("val2017", "train2017")] == [3, 12]
    assert record["train2017"]["mAP"] == record["val2017"]["mAP"] == 1
    assert record["train2017"]["classes_present"] == 4
    assert "val2017" in record["best_mAP_on"]
    with refused("split train2017, not val2017", code=2):
        asl_model.main(["--out", str(tmp_path), "--resume", "--split", "val2017"])
    with refused("epochs 20, not 9", "--force", code=2):
        asl_model.main([*flags, "--train", "--epochs", "9"])
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    with refused("no finite loss or weight at step", "--lr"):
        asl_model.main([*flags, "--train", "--force", "--lr", "1e30"])
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole
    flags += ["--weights", str(tmp_path / "tresnet_s-coco.pth")]
    labels = asl_model.main([*flags, "--image", str(few / "coco/train2017/0.png")])["labels"]
    assert list(labels)[:1] == ["name 60"]
    evaluated = asl_model.main([*flags, "--evaluate", "--split", "train2017"])
    assert evaluated["train2017"] == record["train2017"]


def test_a_stopped_scenes_classifier_resumes_to_the_same_bits(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asl_model, "EPOCH", 64)
    monkeypatch.setattr(asl_model, "SAVE_EVERY", 0)
    monkeypatch.setitem(asl_model.ARCHITECTURES, "tresnet_s", ((1, 1, 1, 1), 0.25, 32, None))
    first, third = Path("runs/scenes_classifier"), [DEFAULT, DEFAULT, KeyboardInterrupt]
    measured = Mock(wraps=asl_model.predict, side_effect=third + 18 * [DEFAULT])
    monkeypatch.setattr(asl_model, "predict", measured)
    with pytest.raises(KeyboardInterrupt):
        asl_model.scenes_classifier(few)
    assert os.listdir(first) == ["checkpoint.pt"], "no network that looks like a finished one"
    others = "lr=0.1 limit=31 seed=1 batch-size=4 image-size=64 epochs=21 digits=glyphs"
    for flag in (*others.split(), "dataset=coco", "arch=tresnet_m"):
        name, value = flag.replace("-", "_").split("=")
        with refused(f"{name} ", f", not {value}", "--force", code=2):
            asl_model.main(["--resume", "--out", str(first), f"--{flag}"])
    position = torch.load(first / "checkpoint.pt")
    common.save_checkpoint(first / "checkpoint.pt", position | {"seconds": 1000.0})
    for _ in range(2):
        network, names, path = asl_model.scenes_classifier(few)
        assert (names, network.arch) == (list("0123456789"), "tresnet_s")
        assert measured.call_count == 3 + 8, "the training was resumed, and not repeated"
    content = torch.load(path)
    assert path.parent == first
    asl_model.scenes_classifier(few, "whole")
    again, whole = (torch.load(x / "checkpoint.pt") for x in (first, Path("whole")))
    for part in ("network", "average", "best"):
        assert all(torch.equal(again[part][name], x) for name, x in whole[part].items()), part
    assert [row["loss"] for row in again["history"]] == [row["loss"] for row in whole["history"]]
    assert 1000 < again["seconds"] < 1100
    common.save_checkpoint(path, content | {"settings": content["settings"] | {"epochs": 1}})
    with refused(path, "epochs 1", code=2):
        asl_model.scenes_classifier(few)


def test_files_that_are_not_published_weights_are_named_with_what_differs(tmp_path):
    state, path, bias = published_state("tresnet_s"), tmp_path / "file.pth", "head.fc.bias"
    absent, names = {k: x for k, x in state.items() if k != bias}, dict(enumerate("abcdefghij"))
    models = [({"a": 5}, "head.fc.weight"), (absent, bias), (state | {"new": torch.ones(3)}, "new")]
    models += [(state | {bias: x}, "finite") for x in (torch.arange(10), torch.zeros(10) / 0)]
    cases = [({"model": model}, word) for model, word in models]
    for wrong in ({0: "a"}, names | {9: "a"}, names | {9: 5}, ["a"] * 10, names | {"x": "b"}):
        cases.append(({"model": state, "idx_to_class": wrong}, "file.pth"))
    for content, word in cases:
        torch.save(content, path)
        with refused("file.pth", word, "--weights"):
            asl_model.load_asl(path)
    torch.save({"model": state}, path)
    with refused("is no tresnet_m", "body.layer1.2.conv1"):
        asl_model.load_asl(path, "tresnet_m")


def test_peer_timm_gives_the_same_logits(tmp_path):
    timm, content = pytest.importorskip("timm"), {"model": published_state("tresnet_l")}
    torch.save(content, tmp_path / "file.pth")
    theirs = timm.create_model("tresnet_l", num_classes=10).eval()
    theirs.load_state_dict(timm.models.tresnet.checkpoint_filter_fn(content, theirs))
    images, ours = photo_like(3, 224), asl_model.load_asl(tmp_path / "file.pth")[0]
    with torch.inference_mode():
        assert difference(ours(images), theirs(images)) < 1e-5


# --- weeks 3 to 5: the attacks


@pytest.mark.parametrize("momentum", [0, 0.75])
@pytest.mark.parametrize("early_stop", [False, True, lambda logits, y: logits[..., 0] < 0.5 * y])
def test_pgd_is_the_papers_loop_for_each_image(momentum, early_stop):
    rng, targets = torch.Generator().manual_seed(0), torch.arange(9) % 3
    images, weight = torch.rand(9, 1, 2, 2, generator=rng), torch.randn(3, 4, generator=rng)
    centre, truth = torch.tensor([0.3, 0.5, 0.9]), []
    model, loss = lambda x: x.flatten(1) @ weight.T, lambda x, y: (x - centre).square().sum(1)
    how = model, images, targets, loss
    found = pgd_attack.pgd(*how, 0.4, 0.1, 15, early_stop=early_stop, momentum=momentum)
    reached = early_stop if callable(early_stop) else lambda logits, y: logits.argmax() == y
    for x, target in zip(images.flatten(1), targets, strict=True):
        moved, g = x, 0
        for _ in range(15):
            logits = weight @ moved
            if early_stop and reached(logits, target):
                break
            gradient = 2 * (logits - centre) @ weight
            g = momentum * g + gradient / gradient.abs().sum()
            moved = (moved - 0.1 * g.sign()).clamp(x - 0.4, x + 0.4).clamp(0, 1)
        truth.append(moved)
    assert torch.allclose(found.flatten(1), torch.stack(truth), atol=1e-6)
    wanted = torch.tensor([[1.0, 0, 1]] * 2)
    logits = torch.tensor([[2.0, -1, 0.5], [-1, -2, 3]])
    assert pgd_attack.goal_reached(logits, wanted).tolist() == [True, False]


@pytest.mark.parametrize("clip", [(0, 1), (-0.5, 2)])
def test_pgd_stays_within_eps_and_clip_from_any_start(clip):
    torch.manual_seed(0)
    images = clip[0] + (clip[1] - clip[0]) * torch.rand(20, 1, 2, 2)
    how = nn.Flatten(), images, torch.zeros(20), lambda x, y: (x - 0.5).square().sum(1)
    starts = [pgd_attack.pgd(*how, 0.1, 0.07, 0, True, clip=clip) for _ in range(2)]
    for moved in (*starts, pgd_attack.pgd(*how, 0.1, 0.07, 5, True, clip=clip)):
        assert 0.09 < (moved - images).abs().max() <= 0.1 + 1e-6
        assert clip[0] <= moved.min() <= moved.max() <= clip[1]
    assert not torch.equal(*starts)
    assert pgd_attack.pgd(how[0], images[:0], how[2][:0], how[3]).shape == (0, 1, 2, 2)


def test_what_pgd_cannot_attack_is_refused_with_what_to_do():
    ok = {"model": nn.Flatten(), "images": torch.rand(2, 1, 2, 2), "targets": torch.zeros(2)}
    ok["loss"], outside = lambda x, y: x.sum(1), r"give them in \[0, 1\], and normalise inside"
    wrong = [({"images": 255 * ok["images"]}, outside), ({"images": ok["images"] - 1}, outside)]
    wrong += [({size: -1}, "negative") for size in ("eps", "alpha", "steps")]
    wrong += [({"targets": torch.zeros(3)}, "2 images with 3 targets")]
    for how, words in wrong:
        with pytest.raises(ValueError, match=words):
            pgd_attack.pgd(**ok | how)
    once = iter([torch.inf])
    for model in (lambda x: x.flatten(1) / 0, lambda x: x.flatten(1) + next(once, 0)):
        with refused("not finite"):
            pgd_attack.pgd(**ok | {"model": model})


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
    state, copied = copy.deepcopy(network.state_dict()), images.clone()
    how = network, images, torch.tensor([0, 1, 2, 0])
    with torch.no_grad():  # which the attack needs to overrule
        moved = pgd_attack.pgd(*how, F.cross_entropy, steps=3)
    with pytest.raises(ZeroDivisionError):
        pgd_attack.pgd(*how, lambda x, y: 1 / 0)
    assert not moved.requires_grad
    assert torch.equal(images, copied)
    assert not torch.equal(moved, copied)
    assert [module.training for module in network] == [True, False, *[True] * 5]
    assert [p.requires_grad for p in network.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
    network.eval()
    assert torch.equal(pgd_attack.pgd(*how, F.cross_entropy, steps=3), moved), "no dropout"


def test_the_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, wanted = 3 * torch.randn(6, 5, dtype=torch.float64), (torch.rand(6, 5) > 0.5).double()
    x, w = logits.numpy(), wanted.numpy()
    p, soft, sign = 1 / (1 + np.exp(-x)), np.exp(x) / np.exp(x).sum(1, keepdims=True), 2 * w - 1
    past = sign * (x - np.log(0.8 / 0.2))
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


def test_restarts_attack_what_is_left_judge_in_float32_and_lose_nothing(monkeypatch):
    network, images, pgd = small_network(4).eval(), photo_like(30, 12), Mock(wraps=pgd_attack.pgd)
    row = pgd_attack.Row("x", "margin", 0.03, "right", 0.1, 8, 0)
    goal, modes = pgd_attack.Labels(list("0123"), 2, "flip", 0.5, True), set()
    monkeypatch.setattr(pgd_attack, "pgd", pgd)
    with torch.no_grad():
        logits = network(images)
    bf16 = functools.partial(torch.is_autocast_enabled, "cpu")
    network.register_forward_hook(lambda _, x, __: modes.add((x[0].requires_grad, bf16())))
    rows = row, row._replace(restarts=8)
    first, again = (goal.attack(network, images, logits, row) for row in rows)
    assert modes == {(True, True), (False, False)}, "bfloat16 wherever a gradient is, only there"
    calls = [(len(x.args[1]), *x.args[4:8], x.kwargs["momentum"]) for x in pgd.call_args_list]
    done, won = (goal.achieved(logits, network(x)) for x in (first, again))
    left = int((~done).sum())
    assert 0 < left < 30
    assert calls[:3] == [(30, 0.03, 0.1, 8, False, 0)] * 2 + [(left, 0.03, 0.05, 8, True, 0.75)]
    assert calls[3][2:] == (0.025, 8, True, 0.75)
    assert torch.equal(first[done], again[done])
    assert won.sum() > done.sum()
    assert torch.equal(first[~won], again[~won])


@pytest.mark.parametrize("direction", ["on", "off", "flip"])
def test_what_is_asked_and_counted_is_what_numpy_counts(direction):
    before, after, truth = np.random.default_rng(0).random((3, 50, 6)) < 0.4
    after[:20] = before[:20]
    after[:10, 3] = ~after[:10, 3]
    found = {k: torch.tensor(np.where(x, 1.0, -1)) for k, x in (("before", before), ("x", after))}
    goal, on = pgd_attack.Labels(list("012345"), 3, direction, 0.5), before[:, 3]
    wanted = before.copy()
    asked = {"on": ~on, "off": on, "flip": np.full(50, True)}[direction]
    wanted[:, 3] = {"on": True, "off": False, "flip": ~on}[direction]
    assert goal.asked(found["before"]).tolist() == asked.tolist()
    assert goal.wanted(found["before"]).tolist() == wanted.tolist()
    n, switched, others = asked.sum(), (on != after[:, 3])[asked], [0, 1, 2, 4, 5]
    old, new = before[asked][:, others], after[asked][:, others]
    lost, won = (old > new).sum(1), (new > old).sum(1)
    row = goal.count(found, "x", torch.tensor(truth))
    assert row["target_switched"] == common.wilson(switched.sum(), n)
    assert row["exact"] == common.wilson((switched & (lost + won == 0)).sum(), n)
    assert row["others_lost"] == common.wilson(lost.sum(), old.sum())
    assert row["others_new"] == won.sum()
    times = {"actual": truth, "before": before, "after": after}
    for when, x in times.items():
        assert (row[f"target_{when}"], row[f"labels_{when}"]) == (x[:, 3].sum(), x.sum())
    none = dict.fromkeys(("before", "x"), torch.full((5, 6), 1.0 if direction == "on" else -1.0))
    assert (goal.count(none, "x", None)["exact"] is None) == (direction != "flip")


def test_the_rows_of_weeks_3_and_5_are_those_on_record():
    both = pgd_attack.PINNED, "right"
    week3 = {(x, g, 0.6) for x in ("softmax-ce", "bce") for g in both}
    week5 = {(x, g, 0.3) for x in ("softmax-ce", "bce", "softmax-bce") for g in both}
    week3 |= {(None, "right", 80 / 255)}
    week5 |= {(None, "right", 0.3)}
    for rows, record in ((pgd_attack.WEEK_3, week3), (pgd_attack.WEEK_5, week5)):
        assert {(row.loss, row.gradient, row.eps) for row in rows} == record
        assert {(row.alpha, row.steps, row.restarts) for row in rows} == {(2 / 255, 40, None)}
        for row in (row for row in rows if row.loss):
            assert row.name == row.loss + (" pinned" if row.gradient == both[0] else "")


def test_the_figure_shows_each_attacks_own_labels_of_images_asked_first(monkeypatch):
    drawn, columns, logits = {}, ["clean", "a", "b"], -torch.ones(3, 5, 4)
    text = Mock()
    monkeypatch.setattr(pgd_attack.ImageDraw.ImageDraw, "text", text)
    logits[0, 0], logits[0, 1:, 3], logits[1, :, 1:3], logits[2, :, 2] = 1, 1, 1, 1
    found = dict(zip(("before", "a", "b"), logits, strict=True))
    found |= {(name, "pixels"): torch.zeros(5, 3, 8, 8, dtype=torch.uint8) for name in columns}
    pgd_attack.figure("title", found, columns, pgd_attack.Labels(list("0123"), 1, "on", 0.5))
    for (x, _), words, *_ in (call.args for call in text.call_args_list):
        drawn.setdefault(x, []).append(words.partition(" ")[0])
    labels = [["title", "clean", *"33"], ["a", *"1212"], ["b", *"22"]]
    assert [drawn[x] for x in sorted(drawn)] == labels


@pytest.fixture(scope="module")
def attackable(tmp_path_factory, few):
    """The flags that attack a few scenes with a random network that gives some labels."""
    network, path = asl_model.tresnet("tresnet_s", 10), tmp_path_factory.mktemp("w") / "some.pth"
    network.eval().load_state_dict(published_state("tresnet_s"))
    with torch.no_grad():
        logits = network(common.load_scenes(50, 32, 0, "mnist", few)[0])
        network.head.fc.weight.div_(logits.std(0)[:, None])
        network.head.fc.bias.sub_(logits.mean(0)).div_(logits.std(0))
    content = {"model": network.state_dict(), "norm": "batch norm", "settings": {"image_size": 32}}
    torch.save(content, path)
    flags = ["--device", "cpu", "--data", str(few), "--weights", str(path), "--target", "3"]
    return [*flags, "--dataset", "scenes", "--digits", "mnist", "--limit", "6", "--steps", "4"]


@pytest.mark.parametrize("week", [None, 3, 5])
def test_an_attack_writes_what_it_promises(attackable, few, tmp_path, capsys, monkeypatch, week):
    monkeypatch.setattr(common, "has_bf16", lambda device: True)  # of attacks, not of results
    flags = [*attackable, "--out", str(tmp_path), "--save", "6"]
    record = pgd_attack.main([*flags, *(["--week", str(week)] if week else [])])
    assert record["dataset"] == ["scenes of mnist's test digits"]
    results, out = record["rows"]["scenes"], capsys.readouterr().out
    assert [*results][:-1] == [row.name for row in getattr(pgd_attack, f"WEEK_{week}", ())]
    assert max(len(line) for line in out.splitlines() if str(tmp_path.parent) not in line) <= 100
    for line in ("target: 3", "target actual", "target before", "labels after", "mAP"):
        assert line in out
    names = {"results.json", "adversarial.npz", "pgd-attack-on-asl.png"}
    names |= {"bars.png"} if week else set()
    assert {path.name for path in tmp_path.iterdir()} == names
    width, height = Image.open(tmp_path / "pgd-attack-on-asl.png").size
    assert width <= 900
    assert height > 2 * 300
    file = {name: torch.from_numpy(x) for name, x in np.load(tmp_path / "adversarial.npz").items()}
    network = asl_model.load_asl(attackable[5])[0]
    scenes = common.load_scenes(6, 32, 0, "mnist", few, "test")[0]
    assert torch.equal(file["clean"], (scenes * 255).round().byte())
    assert difference(file["before"], network(scenes)) < 1e-4
    ours = results["margin"]  # the last attack is what is saved
    change = (file["adversarial"].float() - file["clean"]) / 255
    assert change.abs().max().item() == pytest.approx(ours["linf"], abs=1 / 255)
    assert (file["after"] > 0).sum() == ours["labels_after"]
    assert difference(network(file["adversarial"] / 255), file["after"]) < 0.05
    if week == 5:
        counts = [results[name]["labels_after"] for name in ("softmax-bce", "softmax-bce pinned")]
        assert counts[0] != counts[1]
        assert results["noise"]["linf"] == pytest.approx(0.3, abs=0.01)
    if week is None:
        pgd_attack.main([*flags, "--gradient", pgd_attack.PINNED])
        pinned = np.load(tmp_path / "adversarial.npz")["adversarial"]
        assert not np.array_equal(pinned, file["adversarial"])


def test_each_verdict_of_the_sweep_is_the_right_way_round(capsys):
    attack, attacks = [0, 0, 0.1, 0.2, 0.5, 0.9, 1, 1], ("attack", "steps x 2", "3 restarts")
    sizes = (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    for broken, kinds, rates in (
        ([], (), ()),
        (["growth"], ["attack"], [0, 0.15, *attack[2:]]),
        (["limit"], attacks, [*attack[:6], 0.95, 0.95]),
        (["steps"], ["steps x 2"], [0, 0, 0.2, *attack[3:]]),
        (["restarts"], ["3 restarts"], [0, 0, 0.2, *attack[3:]]),
        (["noise"], ["noise"], [*[0] * 7, 0.1]),
    ):
        lines = dict.fromkeys(attacks, attack) | {"noise": [0] * 8} | dict.fromkeys(kinds, rates)
        results = {}
        for i, eps in enumerate(sizes):
            for kind in pgd_attack.SWEEP_KINDS:
                rate = common.wilson(100 * lines[kind][i], 100)
                results[f"{kind} {eps}/255"] = {"target_switched": rate}
        verdicts, curves = pgd_attack.report_sweep(results)
        for kind, line in lines.items():
            assert np.allclose(curves[kind], [sizes, line])
        assert [name for name, holds in verdicts.items() if not holds] == broken
        assert len(re.findall("^FAILS: ", capsys.readouterr().out, re.M)) == len(broken)


def test_the_sweep_runs_every_eps_and_control(attackable, tmp_path):
    flags = [*attackable, "--out", str(tmp_path), "--sweep", "--limit", "3", "--alpha", "0.01"]
    record = pgd_attack.main([*flags, "--loss", "softmax-ce"])
    rows = record["rows"]["scenes"]
    assert len(record["controls"]) == 5
    assert list(rows)[-1] == "attack 16/255", "adversarial.npz holds the last one"
    assert rows["attack 0/255"]["target_switched"]["rate"] == 0
    assert rows["noise 16/255"]["linf"] == pytest.approx(16 / 255, abs=1e-3)
    ours = pgd_attack.Row("x", "margin", 0.1, "right", 0.01, 9, 2)
    made = {row.name: row[1:] for row in pgd_attack.sweep_rows(ours)}
    assert list(made) == list(rows)
    for n, alpha in ((1, 1 / 255 / 4), (16, 0.01)):
        attack = ("margin", n / 255, "right", alpha)
        assert made[f"attack {n}/255"] == (*attack, 9, 0)
        assert made[f"steps x 2 {n}/255"] == (*attack, 18, 0)
        assert made[f"3 restarts {n}/255"] == (*attack, 9, 3)
        assert made[f"noise {n}/255"][:2] == (None, n / 255)


def test_two_processes_of_torchruns_give_the_table_of_one(attackable, tmp_path):
    one, two, flags = tmp_path / "1", tmp_path / "2", [*attackable, "--batch-size", "2"]
    flags += ["--week", "5"]
    record = pgd_attack.main([*flags, "--out", str(one)])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run, HERE / "pgd_attack.py", *flags, "--out", two]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    again = json.loads((two / "results.json").read_text())
    assert again["processes"] == 2
    for name, row in json.loads(json.dumps(record["rows"]["scenes"])).items():
        theirs = again["rows"]["scenes"][name] | {"seconds_per_image": row["seconds_per_image"]}
        assert theirs == row, name
    files = [np.load(folder / "adversarial.npz")["clean"] for folder in (one, two)]
    assert np.array_equal(*files)
    assert process.stdout.count("labels after") == 1


def test_the_png_of_a_photo_does_what_was_asked(attackable, few, tmp_path, capsys):
    photo, scenes = tmp_path / "photo.png", common.load_scenes(1, 32, 0, "mnist", few, "test")[0]
    clean = (scenes[0] * 255).round() / 255
    torchvision.utils.save_image(clean, photo)
    flags = [*attackable[:8], "--image", str(photo), "--out", str(tmp_path)]
    pgd_attack.main([*flags, "--eps", "0.1"])
    out = capsys.readouterr().out
    pixels = np.array(Image.open(tmp_path / "photo-adversarial.png"))
    adversarial = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert 0 < (adversarial - clean).abs().max() <= 26.01 / 255
    logits = asl_model.load_asl(attackable[5])[0](torch.stack([clean, adversarial]))
    assert ((logits[0] > 0) != (logits[1] > 0)).nonzero().flatten().tolist() == [3]
    for line, row in zip(re.findall("^(?:before|after)[:,] +(.*)", out, re.M), logits, strict=True):
        labels = [f"{i} {row[i].sigmoid():.2f}" for i in range(10) if row[i] > 0]
        assert re.findall(r"\d \d\.\d\d", line) == labels
    assert "do not do" not in out
    pgd_attack.main([*flags, "--eps", "1e-6"])
    assert "8-bit pixels do not do what was asked" in capsys.readouterr().out


OWN = """
import torch
from torch import nn

def load(names=NAMES, size=16):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 80))
    return network, names, size

broken = lambda: 1 / 0
pair = lambda: load()[:2]
function = lambda: (lambda x: x, *load()[1:])
too_few = lambda: load(NAMES[1:])
no_size = lambda: load(size=16.0)
endless = lambda: (nn.Sequential(load()[0], nn.Threshold(1e9, torch.inf)), *load()[1:])
cats = lambda: load(["cat", "hat", *NAMES[2:]])
"""


def test_a_network_of_ones_own_is_attacked_on_its_photos(few, tmp_path):
    names = common.load_coco(few, 16)[2][::-1]  # the last one comes first
    (tmp_path / "mine.py").write_text(OWN.replace("NAMES", repr(names)))
    flags = flags_of(few, tmp_path / "o", "--steps", 4, "--target", names[0], "--week", 5)
    rows = pgd_attack.main([*flags, "--model", f"{tmp_path / 'mine.py'}:load"])["rows"]["coco"]
    assert len(rows) == 8
    assert rows["margin"]["target_actual"] == 1, "the labels' order is the network's"
    assert (tmp_path / "o" / "pgd-attack-on-mine.png").exists()
    cases = [("none.py:load", "none.py", 1), ("mine.py:other", "other", 1)]
    cases += [("mine.py:broken", "division by zero", 1), ("mine.py:endless", "not finite", 1)]
    cases += [("mine.py:cats", "one of them lacks cat", 2)]
    for wrong in ("pair", "function", "too_few", "no_size"):
        cases.append((f"mine.py:{wrong}", "must return (network, class names, image size)", 1))
    for spec, words, code in cases:
        with refused(words, code=code):
            pgd_attack.main([*flags, "--model", str(tmp_path / spec)])
    for target, near in (("Nam 4", "name 4"), ("", "name 90, name 89, name 88")):
        with refused(f"{target!r} is none of the 80 names", near, code=2):
            pgd_attack.main([*flags, "--model", f"{tmp_path}/mine.py:load", "--target", target])


def test_week_4_attacks_digits(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acwgan, "digit_reader", lambda *_: acwgan.DigitReader().eval())
    still = nn.Threshold(1e9, 0)  # of gradient 0, so that its attack is seen to stand still
    monkeypatch.setattr(asl_model, "inplace_abn_1_0_12", lambda x: nn.Sequential(x, still))
    flags = flags_of(few, tmp_path, "--week", 4, "--dataset", "mnist", "--limit", 5, "--steps", 3)
    record = pgd_attack.main([*flags, "--target", "8"])
    rows = record["rows"]["mnist"]
    assert list(rows) == ["cut alone", "single photo's", "batch's", "right pinned", "right"]
    assert rows["right pinned"]["linf"] == 0 < rows["right"]["linf"]
    out = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in out if str(tmp_path) not in line) <= 100
    assert (tmp_path / "pgd-attack-on-digits.png").exists()


def test_week_4s_attacks_are_cut_in_normalised_space_as_they_were_logged():
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)[:, None, None]
    std, images, network = mean / 2, photo_like(5, 12).double(), small_network().double().eval()
    with torch.no_grad():
        logits = network(images)
    goal, start = pgd_attack.TopClass(["a", "b", "c"], 1, mean, std), (images - mean) / std
    one_hot, raw = torch.eye(3).double()[[1] * 5], logits.index_fill(1, torch.tensor([1]), 1)
    for row, wanted in zip(pgd_attack.WEEK_4, (None, one_hot, raw), strict=True):
        assert (row.alpha, row.steps, row.gradient) == (2 / 255, 40, "right")
        moved = start.clamp(0, 1)
        for _ in range(0 if wanted is None else 5):
            moved.requires_grad_()
            p = network(moved * std + mean).softmax(1)
            loss = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() - 0.1 * gradient.sign()
            moved = moved.clamp(start - 0.3, start + 0.3).clamp(0, 1)
        ours = goal.attack(network, images, logits, row._replace(alpha=0.1, steps=5))
        assert torch.allclose(ours, moved * std + mean)


def test_week_4_counts_the_images_that_are_not_the_target_already():
    goal = pgd_attack.TopClass(["a", "b"], 1, None, None)
    before = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    after = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 2]])
    row = goal.count({"before": before, "x": after}, "x", torch.tensor([0, -1, 0, 1]))
    assert row["target_reached"] == row["top_class_changed"] == common.wilson(2, 3)
    assert row["right_before"] == row["right_after"] == common.wilson(1, 3)
    assert row["mean_sigmoid"] == pytest.approx(after[:, 1].sigmoid().mean().item())


def test_torchvisions_classifiers_load_by_name_and_from_a_file(tmp_path, capsys):
    def load(model, *flags):
        flags = flags_of(tmp_path, tmp_path, "--model", model, *flags)
        return asl_model.torchvision_network(pgd_attack.settings(flags))

    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18-f37072fd.pth")
    network, names, mean, std = load("resnet18")
    assert (names[60], network.image_size) == ("night snake", 224)
    assert mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    own = tmp_path / "own.pth"
    torch.save({name: x.half() if x.ndim else x for name, x in state.items()}, own)
    with torch.no_grad():
        logits = [x(photo_like(2, 64)) for x in (network, load("resnet18", "--weights", own)[0])]
    assert torch.allclose(*logits, atol=0.05)
    assert "is not the file that torchvision publishes" in capsys.readouterr().out
    with refused("own.pth", "torchvision's resnet34"):
        load("resnet34", "--weights", own)
    with refused("nearest: resnet18", code=2):
        load("resnet19")


def test_imagenets_classes_are_in_the_files_or_the_folders_names(tmp_path):
    folder, classes = tmp_path / "imagenet", ["tench", "water ouzel", "crane", "crane"]
    (folder / "n01440764").mkdir(parents=True)
    names = "n01440764_tench.JPEG", "n01530575_water_ouzel.png", "n02012849_crane.jpg", "x.jpg"
    for name in (*names, "n01440764/y.JPEG"):
        Image.new("RGB", (64, 32), "red").save(folder / name)
    photos, found = asl_model.load_imagenet(tmp_path, classes)
    assert (len(photos), photos[0].name) == (5, "y.JPEG")
    assert found.tolist() == [-1, 0, 1, -1, -1]
    for name in names:
        (folder / name).unlink()
    assert asl_model.load_imagenet(tmp_path, ["one class"])[1].tolist() == [0]
    with refused("no photo"):
        asl_model.load_imagenet(tmp_path / "none", ["tench"])


def test_points_lines_and_bars_are_drawn_in_proportion():
    page = acwgan.plot("y", "x", {"a": ([0, 4], [0, 2]), "b": ([3], [1])})
    first, second = page.getpixel((400, 50)), page.getpixel((50 + 350 * 3 // 4, 165))
    assert first == page.getpixel((225, 165)) != second
    assert max(map(min, (first, second))) < 100 < min(map(max, (first, second)))
    alone = acwgan.plot("y", "x", {"a": ([0, 4], [0, 2])}, joined=False)
    assert (alone.getpixel((400, 50)), min(alone.getpixel((225, 165)))) == (first, 211)
    rows = {"a": {"target_switched": {"rate": 0.5}, "others_lost": {"rate": 0.25}}}
    for y, colour, length in ((20, "seagreen", 251), (36, "firebrick", 126)):
        line = np.array(pgd_attack.bars(rows))[y]
        assert (line == ImageColor.getrgb(colour)).all(1)[: 173 + length].sum() == length


# --- the whole


MISUSE = """
acwgan: --epochs 0, --epochs many, --critic-lr -1, --average 1, --penalty-share 2, --dataset cifar
acwgan: --colour, --resume --force, --limit 0, --limit 1.5, --seed -1, --seed 9999999999999
transfer: --target 3, --variant best, --resume --out nowhere
asl_model: --train --evaluate, --train --image-size 66, --evaluate --threshold 1
asl_model: --train --arch resnet, --train --weights x.pth, --resume --out nowhere
asl_model: --train --dataset scenes --split val2017, --evaluate --dataset scenes --arch tresnet_m
pgd_attack: --eps 8/0, --eps 0/8, --eps -1, --eps nan, --eps 1/2/3, --eps inf, --threshold 1
pgd_attack: --augment, --loss l2, --dataset imagenet, --model digits --weights x.pth
pgd_attack: --model resnet18 --dataset coco --augment
pgd_attack: --week 3 --sweep, --week 5 --model resnet18, --week 4 --model asl
pgd_attack: --model digits --dataset coco, --week 5 --loss bce, --sweep --image x.jpg
"""


def test_misuse_ends_with_exit_code_2_and_names_the_flag_or_its_value_and_help_no_none(capsys):
    for line in MISUSE.strip().splitlines():
        name, _, cases = line.partition(": ")
        for flags in cases.split(", "):
            with pytest.raises(SystemExit, match="2"):
                sys.modules[name].settings(flags.split())
            last = capsys.readouterr().err.splitlines()[-1]
            assert any(word in last for word in re.split(" (?=--)", flags)[-1].split()), last
        with pytest.raises(SystemExit, match="0"):
            sys.modules[name].settings(["--help"])
        assert "None" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        asl_model.settings([])


def test_every_command_of_the_readme_is_one_the_scripts_take():
    commands = re.findall(r"python (\w+)\.py([^\n`#&|]*)", (HERE / "README.md").read_text())
    assert commands
    for name, flags in commands:
        if not re.search(r"--resume|--sample\b", flags):  # which read a checkpoint
            sys.modules[name].settings(flags.split())
