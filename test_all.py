"""Every test: `pytest test_all.py`. No network, no GPU, no file but what the tests make.

TEST_SEED=3 pytest test_all.py    shifts every seed of the tests: their promises hold for any.
"""

import argparse
import contextlib
import copy
import csv
import functools
import importlib.metadata
import io
import json
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageColor
from torch import nn
from torch.nn import functional as F
from torchvision.models import inception_v3
from torchvision.models.resnet import BasicBlock

import acwgan
import asl_model
import common
import pgd_attack
import transfer

# what a cluster, a hook or a shell sets for its own runs must not change the tests
for name in [*os.environ]:
    if re.match("(LOCAL_)?RANK|WORLD_|GIT_|MKL_|(DNNL|ONEDNN)_DEF|PYTHONSAFE", name):
        del os.environ[name]
os.environ["PYTHON_COLORS"] = "0"  # or argparse colours its help

HERE = Path(common.__file__).parent
SEED = int(os.environ.get("TEST_SEED", 0))
CPU = torch.device("cpu")
NOWHERE = "http://127.0.0.1:9/"  # refuses every connection at once


def quoted(path):
    """A path that may hold spaces, in a string of flags."""
    return shlex.quote(str(path))


@contextlib.contextmanager
def refused(*words, code=1):
    """Assert that a `Failure` with `code` is raised, one short line that holds all `words`."""
    with pytest.raises(common.Failure) as caught:
        yield
    text = str(caught.value)
    assert caught.value.code == code, text
    for word in words:
        assert " ".join(str(word).split()) in text, text


def held(folder):
    """Keep a folder as a run does that writes to it."""
    return common.hold(argparse.Namespace(out=folder, force=True, script=""))


def wilson(hits, n):
    """The rate of `hits` of `n` with its interval."""
    return common.wilson(torch.arange(int(n)) < int(hits))


def random_stream(seed=0):
    """A torch.Generator of its own for a test."""
    return torch.Generator().manual_seed(1000 * SEED + seed)


def coco_flags(data, limit=None):
    """The flags of a script that name COCO's photos."""
    return argparse.Namespace(dataset="coco", data=data, limit=limit, seed=0)


def photo_like(n, size, seed=0):
    """Images (n, 3, size, size) that differ in colour and brightness, as photos do."""
    stream = random_stream(seed)
    colours = torch.rand(n, 3, 1, 1, generator=stream)
    return colours * torch.rand(n, 3, size, size, generator=stream)


def difference(x, truth):
    """The relative distance of two tensors."""
    return ((x - truth).norm() / truth.norm()).item()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder of made-up files in the real formats.

    MNIST: 40 + 20 random digits. COCO: 16 + 4 photos of one colour, listed backwards, every
    fourth without a label, with the ids of COCO's 80 classes, which have gaps.
    """
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in {"train": 40, "t10k": 20}.items():
        digits = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        header = struct.pack(">IIII", 0x0803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        labels = struct.pack(">II", 0x0801, n) + bytes(i % 10 for i in range(n))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    ids = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}, reverse=True)
    categories = [{"id": i, "name": f"name {i}"} for i in ids]
    colours = ["red", "lime", "blue", "black"]
    classes = [[60], [2, 90, 90], [80], []]
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split, n in {"train2017": 16, "val2017": 4}.items():
        photos = folder / "coco" / split
        photos.mkdir()
        content = {"categories": categories, "images": [], "annotations": []}
        for i in reversed(range(n)):
            content["images"].append({"id": i, "file_name": f"{i}.png"})
            Image.new("RGB", (50, 40 + i), colours[i % 4]).save(photos / f"{i}.png")
            for category in classes[i % 4]:
                content["annotations"].append({"image_id": i, "category_id": category})
        path = folder / "coco" / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """What a test would download is nowhere, and no proxy is asked for it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [NOWHERE])
    monkeypatch.setattr(common, "COCO_URL", NOWHERE)
    monkeypatch.setattr(common, "INCEPTION_URL", NOWHERE)


# --- common


def test_a_run_ends_in_one_short_line_or_in_a_bugs_traceback(capsys, monkeypatch):
    problems = {
        common.Failure("no label\n 'cat'" + 999 * ".", 2): (2, "error: no label 'cat'"),
        OSError(28, "No space left on device"): (1, "No space left"),
        KeyboardInterrupt(): (130, "continue with --resume"),
        MemoryError(): (1, "smaller batches"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"): (1, "smaller batches"),
    }
    for problem, (code, words) in problems.items():
        with pytest.raises(SystemExit, match=f"^{code}$"):
            common.run(Mock(side_effect=problem), "continue with --resume")
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert len(line) < 1050
    with pytest.raises(RuntimeError, match="illegal memory access"):
        common.run(Mock(side_effect=RuntimeError("an illegal memory access")))
    stdout = io.TextIOWrapper(io.BytesIO(), "cp1252")  # which has no letter Ł
    monkeypatch.setattr(sys, "stdout", stdout)
    common.run(functools.partial(print, "runs/Łódź", flush=True))
    assert stdout.buffer.getvalue().strip() == "runs/?ód?".encode("cp1252")


def test_each_process_has_a_gpu_of_its_own_or_is_refused(monkeypatch):
    found = Mock(return_value=torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
    monkeypatch.setattr(torch.cuda, "device_count", Mock(return_value=2))
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with refused("--device cuda", "process 2", "--device cpu", code=2):
        common.pick_device("cuda")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_a_line_now_and_then(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", Mock(return_value=terminal))
    monkeypatch.setattr("tqdm.std.time", Mock(side_effect=range(10**6)))  # 1 s a look
    bar = common.progress(range(100), "training", miniters=1, disable=False)
    list(bar)
    text = capsys.readouterr().err
    shown = re.findall(r"\rtraining:? +\d+%[^\r]* \d+/100", text)
    assert len(shown) > 30 if terminal else 2 <= len(shown) <= 10
    assert text.count("\n") == (0 if terminal else len(shown))


def test_a_second_run_in_a_folder_in_use_is_refused(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with held(folder), refused(folder, "another run"), held(folder):
            pass
    (tmp_path / "file").touch()
    with refused("file", "not a folder"), held(tmp_path / "file"):
        pass


def test_what_a_killed_run_had_half_written_is_deleted(tmp_path):
    for name in (".checkpoint.pt.123.part", "kept.part"):
        (tmp_path / name).touch()
    with held(tmp_path):
        assert list(tmp_path.glob("*.part")) == [tmp_path / "kept.part"]


def test_a_folder_with_another_scripts_results_is_refused(tmp_path):
    path = tmp_path / "results.json"
    args = argparse.Namespace(out=tmp_path, force=False, script="x.py", samples=9)
    args.n = Path("a")
    path.write_text('{"settings": {"script": "x.py", "samples": 9, "n": "a"}}')
    with common.hold(args, "samples", "n"):
        pass
    for other in ("y.py", None):
        args.script = other
        with refused(path, "script x.py", "--out", "--force", code=2), common.hold(args):
            pass
    args.script = "x.py"
    args.samples = 8
    with common.hold(args):
        pass
    with refused("samples 9, not 8", code=2), common.hold(args, "samples"):
        pass
    path.write_text("{")
    with refused(path, "--force", code=2), common.hold(args):
        pass
    args.force = True
    with common.hold(args, "samples"):
        pass


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    with common.whole_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    for problem in (RuntimeError("unexpected pos"), OSError(28, "full")):
        with refused(path, problem, "disk"), common.whole_file(path) as file:
            file.write(b"ne")
            raise problem
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with refused(path, "absent", "; train it again"):
        common.load_checkpoint(path, "train it again")
    content = {"kind": "acwgan", "settings": {"seed": 0}, "losses": [0.5]}
    torch.save(content, path)
    assert common.load_checkpoint(path, "", "acwgan") == content
    with refused(path, "a checkpoint of transfer; train it again"):
        common.load_checkpoint(path, "train it again", "transfer")
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=0.1)}, path)
    with refused(path, "more than a state dict; train it again"):
        common.load_checkpoint(path, "train it again")


def test_a_table_is_aligned_and_shows_rates_with_intervals(capsys):
    """Wilson's."""
    rows = [["pgd", wilson(5, 10)], ["none", wilson(0, 0)]]
    common.print_table(["l2", wilson(np.int64(0), torch.tensor(10))], rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "l2      0.0% [0.0%, 27.8%]"  # z^2 / (n + z^2), where z is 1.96
    assert lines[1] == "pgd   50.0% [23.7%, 76.3%]"
    assert lines[2] == "none                     -"


def test_a_record_has_a_command_to_paste_and_the_revision(tmp_path, monkeypatch):
    command = ["asl_model.py", "--train", "--out", "runs/it's"]
    monkeypatch.setattr(sys, "argv", command)
    folder = tmp_path / "it's"  # no shell may stumble over the name
    monkeypatch.setattr(common, "__file__", str(folder / "common.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    args = argparse.Namespace(out=tmp_path, seed=1)
    common.write_results(args, CPU, {"rate": 0.5}, dataset="glyphs")
    record = json.loads((tmp_path / "results.json").read_text())
    assert shlex.split(record["command"]) == ["python", *command]
    assert record["settings"]["seed"] == 1
    assert (record["device"], record["bfloat16"]) == ("cpu", common.has_bf16(CPU))
    assert (record["dataset"], record["rate"], record["git"]) == ("glyphs", 0.5, "")
    if subprocess.getstatusoutput("git --version")[0] == 0:
        subprocess.run(["git", "init", "-q", folder], check=True)
        git = f"git -C {shlex.quote(str(folder))} -c user.name=x -c user.email=x"
        subprocess.getoutput(f"{git} commit --no-gpg-sign --allow-empty -m x")
        revision = common.write_results(args, CPU, {})["git"]
        assert len(revision) >= 4
        assert subprocess.getoutput(f"{git} rev-parse HEAD").startswith(revision)


def test_a_download_is_the_whole_file_or_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    for name in ("x-00000000.pth", "x-ed7002b400.pth"):
        (tmp_path / name).write_text("content")
        url = (tmp_path / name).as_uri()
        with refused(url, f"put that file at {folder / name}"):
            common.download(url, folder)
    answer = io.BytesIO(b"content")
    answer.headers = {"Content-Length": "8"}
    with monkeypatch.context() as patch, refused("incomplete"):
        urlopen = Mock(return_value=answer)
        patch.setattr("urllib.request.urlopen", urlopen)
        common.download(f"{NOWHERE}x", folder)
    assert urlopen.call_args.kwargs == {"timeout": 20}
    assert not folder.exists()
    name = "x-ed7002b4.pth"  # how the SHA-256 of "content" begins
    (tmp_path / name).write_text("content")
    path = common.download((tmp_path / name).as_uri(), folder)
    assert common.download(NOWHERE + name, folder) == path  # which is there
    assert path.read_text() == "content"


@pytest.mark.parametrize("zeros", [0, 5, 29])
def test_frechet_distance_is_its_closed_form(zeros):
    """Which it has for covariances that commute; that of few samples has zero eigenvalues."""
    rng = np.random.default_rng(SEED)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    v1, v2 = rng.uniform(0.1, 9, (2, 30))
    mu = rng.normal(size=30)
    v1[:zeros] = 0
    closed = np.square(mu).sum() + np.square(np.sqrt(v1) - np.sqrt(v2)).sum()
    sigma1 = basis * v1 @ basis.T
    sigma2 = basis * v2 @ basis.T
    ours = common.frechet_distance(mu, sigma1, 0 * mu, sigma2)
    assert ours == pytest.approx(closed, rel=1e-9)
    for wrong in (mu[1:], mu * np.nan):
        with pytest.raises(ValueError):  # noqa: PT011
            common.frechet_distance(wrong, sigma1, wrong, sigma2)


@pytest.mark.parametrize(("n", "m", "d"), [(6, 7, 12), (20, 15, 5), (4, 9, 7), (2, 2, 3)])
def test_frechet_distance_torch_is_the_same_and_differentiable(n, m, d):
    stream = random_stream()
    x = torch.randn(n, d, generator=stream, dtype=torch.float64)
    y = 2 * torch.randn(m, d, generator=stream, dtype=torch.float64)
    truth = common.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    x.requires_grad_()
    assert common.frechet_distance_torch(x, y).item() == pytest.approx(truth, rel=1e-6)
    assert torch.autograd.gradcheck(common.frechet_distance_torch, (x, y), atol=1e-6)
    distance = common.frechet_distance_torch(x, x.detach())  # 0 and flat
    assert abs(distance.item()) < 1e-9
    assert torch.autograd.grad(distance, x)[0].abs().max() < 1e-9
    # a feature that does not vary has no derivative; 0 is the one without a random sign
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 0]], requires_grad=True)
    y = torch.cat([torch.eye(2), -torch.eye(2)])
    gradient = torch.autograd.grad(common.frechet_distance_torch(x, y), x)[0]
    assert gradient[:, 1].abs().max() < 1e-6 < gradient[0, 0].abs()
    for wrong in (x[:1], x * torch.nan):
        with pytest.raises(ValueError, match="finite"):
            common.frechet_distance_torch(wrong, y)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The path of random weights that leave something of the images, and their network."""
    torch.manual_seed(SEED)
    network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights"
    torch.save(network.state_dict(), path)
    network.fc = nn.Identity()
    return path, network.eval()


def test_inception_is_tensorflows_with_its_weights(inception, tmp_path, monkeypatch):
    """Its features are those of torchvision's network whose pools are patched one by one."""
    path, network = inception
    average = F.avg_pool2d
    blocks = iter(range(9))  # those with a pool

    def pool(x, **sizes):
        if next(blocks) == 8:
            return F.max_pool2d(x, **sizes)
        return average(x, count_include_pad=False, **sizes)

    grey = torch.rand(2, 1, 40, 30, generator=random_stream())
    resized = F.interpolate(grey, (299, 299), mode="bilinear", align_corners=False)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "avg_pool2d", pool)
        truth = network(resized.expand(-1, 3, -1, -1) * 2 - 1)
    ours = common.inception_features(grey, path)
    assert difference(torch.from_numpy(ours), truth) < 1e-4
    for wrong in (grey + 1, grey - 1, grey * torch.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            common.inception_features(wrong, path)
    weights = torch.load(path)
    weights["Mixed_7c.branch_pool.bn.running_var"][3] = torch.nan
    path = tmp_path / "weights"
    for state in (weights, {"fc.weight": torch.zeros(2)}):
        torch.save(state, path)
        with refused(path, NOWHERE):
            common.inception_features(grey, path)


def test_mnist_is_read_byte_for_byte_or_replaced(data, tmp_path, capsys):
    images, labels = common.load_mnist(data, train=False)
    assert torch.equal(labels, torch.arange(20) % 10)
    raw = np.random.default_rng(20).integers(0, 256, (20, 1, 28, 28), np.uint8)
    assert torch.equal(images, torch.from_numpy(raw).float() / 255)
    folder = shutil.copytree(data / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    path = folder / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([10]))
    with refused("a label is above 9", "delete"):
        common.load_mnist(tmp_path, train=False)
    path.write_bytes(struct.pack(">II", 0x0801, 19) + content[8:-1])
    with refused("shape", "delete"):  # 19 labels for 20 digits
        common.load_mnist(tmp_path, train=False)
    path.write_bytes(content)
    os.truncate(folder / "t10k-images-idx3-ubyte", 999)
    with refused(folder, "delete", "--dataset glyphs"):
        common.load_digits("mnist", tmp_path, train=False)
    name, images, _ = common.load_digits("auto", tmp_path, train=False, limit=30)
    assert name == "glyphs"
    assert torch.equal(images, common.glyphs(50, seed=1)[0][:30])
    assert "WARNING" in capsys.readouterr().err


def test_glyphs_are_whole_digits_that_differ():
    state = torch.get_rng_state()
    images, labels = common.glyphs(123, SEED)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(labels, torch.arange(123) % 10)
    assert 0.9 < images.max() <= 1
    assert images[:, :, :1].mean() < 0.02  # the border cuts no digit off
    assert len(images.unique(dim=0)) == 123


def test_a_photo_is_squashed_and_shown_on_white_or_refused(tmp_path):
    image = Image.new("RGB", (160, 80), "blue")
    image.paste("red", (40, 0, 120, 80))
    path = tmp_path / "x.tif"
    for mode in ("CMYK", "P", "RGBA"):
        image.convert(mode).save(path)
        red = common.Photos([path], 80)[0][0].mean(0).round()
        assert red.tolist() == [0] * 20 + [1] * 40 + [0] * 20
    image.putalpha(128)
    image.save(path)
    crop = torchvision.transforms.CenterCrop(1)
    assert common.Photos([path], None, crop)[0].getpixel((0, 0)) == (255, 127, 127)
    Image.new("I;16", (8, 8)).save(path)
    for wrong in (path, tmp_path / "absent.jpg"):
        with refused(wrong, "photo"):
            common.Photos([wrong], 8)[0]


def test_a_photo_is_turned_though_its_exif_is_bad(tmp_path):
    """Its resolution is a signed rational, which Pillow reads but cannot write."""
    entries = (0x0112, 3, 1, 6, 0x011A, 10, 1, 38, 0, -72, 1)
    exif = b"Exif\0\0II" + struct.pack("<HIHHHIIHHIIIii", 42, 8, 2, *entries)
    noise = Image.effect_noise((16, 16), 99).convert("RGB")
    noise.save(tmp_path / "stored.jpg")
    noise.save(tmp_path / "tagged.jpg", exif=exif)
    paths = [tmp_path / "stored.jpg", tmp_path / "tagged.jpg"]
    stored, tagged = common.Photos(paths, 16)[:]
    assert torch.equal(tagged, stored.rot90(-1, (1, 2)))


def test_classes_of_coco_may_be_named_by_numbers(data, tmp_path):
    name = "coco/annotations/instances_val2017.json"
    content = json.loads((data / name).read_text())
    for i, category in enumerate(content["categories"]):
        category["name"] = i
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(json.dumps(content))
    shutil.copytree(data / "coco" / "val2017", tmp_path / "coco" / "val2017")
    args = coco_flags(tmp_path)
    names = asl_model.load_data(args, 32, "val2017")[2]
    assert sorted(names, key=int) == [str(i) for i in range(80)]


def test_coco_is_downloaded_and_in_order(data, tmp_path, monkeypatch):
    server = shutil.copytree(data / "coco", tmp_path / "server")
    monkeypatch.setattr(common, "COCO_URL", server.as_uri() + "/")
    name = "annotations/instances_train2017.json"
    text = (server / name).read_text().replace('"3.png"', '"../../3.png"')
    packed = server / "annotations" / "annotations_trainval2017.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, text)
    images, labels, names = common.load_coco(tmp_path, 32, limit=5, split="train2017")
    colours = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert images[:][..., 0, 0].tolist() == colours
    present = (labels == 1).nonzero().tolist()
    assert present == [[0, 54], [1, 1], [1, 79], [2, 70], [4, 54]]
    assert names[54] == "name 60"  # which is COCO's donut
    photos = tmp_path / "coco" / "train2017"
    assert sorted(os.listdir(photos)) == [f"{i}.png" for i in range(5)]
    (server / "train2017" / "12.png").unlink()
    with refused(f"put that file at {photos / '12.png'}"):
        common.load_coco(tmp_path, 32, split="train2017")
    path = tmp_path / "coco" / name
    path.write_text(text.replace("name 60", "name 61"))
    _, labels, names = common.load_coco(tmp_path, 32, 3, "train2017")
    assert (len(names), names[54]) == (79, "name 61"), "equal names are one class"
    assert (labels == 1).nonzero().tolist() == [[0, 54], [1, 1], [1, 78], [2, 69]]
    for old, new in {'"image_id": 1': '"image_id": 9', "[": 10**5 * "["}.items():
        path.write_text(text.replace(old, new))
        with refused(path, "delete it"):
            common.load_coco(tmp_path, 32, split="train2017")


# --- week 1

DIGITS = "--dataset glyphs --limit 160 --batch-size 16 --epochs 2 --width 4 --samples 100"
DIGITS += f" --device cpu --seed {SEED + 1}"
OTHER_SETTINGS = (
    "limit 99, epochs 1, batch-size 8, critic-steps 2, critic-lr 1.0, latent 20"
)
OTHER_SETTINGS += (
    ", generator-lr 1.0, beta2 0.5, image-size 64, width 2, average 0.5, samples 50"
)
LOAD_DIGITS = functools.cache(common.load_digits)  # each data set is drawn once


@contextlib.contextmanager
def quick_week_1(save_every=7):
    """100 test digits; the evaluation classifier is untrained, but tells images apart."""

    def load_few(name, data, train=True, limit=None, device=CPU):
        return LOAD_DIGITS(name, data, train, limit if train else 100, device)

    def train_classifier(network, *_):
        nn.init.zeros_(network.features[-2].bias)  # it drowns the images
        nn.init.zeros_(network.head.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_digits", load_few)
        patch.setattr(acwgan, "train_classifier", train_classifier)
        patch.setattr(acwgan, "LOG_EVERY", 4)
        patch.setattr(acwgan, "SAVE_EVERY", save_every)
        yield patch


def week_1(out, flags):
    return acwgan.main([*shlex.split(flags), "--out", str(out)])


def contents(folder):
    """What the files in a folder hold, without dot files, by their names."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """The folder of an uninterrupted training of 20 steps; `gan_copy` may be changed."""
    out = tmp_path_factory.mktemp("gan")
    with quick_week_1():
        week_1(out, DIGITS)
    return out


@pytest.fixture
def gan_copy(gan, tmp_path):
    return Path(shutil.copytree(gan, tmp_path / "gan"))


def test_gan_losses_match_a_critic_of_known_gradient():
    """The gradient of |x|^2 / 2 is x; ten pixels serve as logits. 3 of 8 images are penalised."""

    def critic(x):
        return x.flatten(1).square().sum(1) / 2, x.flatten(1)[:, :10]

    real = torch.rand(8, 1, 4, 4, generator=random_stream(1))
    fake = torch.rand(8, 1, 4, 4, generator=random_stream(2))
    labels = torch.arange(8)
    torch.manual_seed(SEED)
    loss, parts = acwgan.critic_loss(critic, real, labels, fake, 3.0, 0.3)
    torch.manual_seed(SEED)
    u = torch.rand(3, 1, 1, 1)
    norms = (u * real[:3] + (1 - u) * fake[:3]).flatten(1).norm(dim=1)
    penalty = (norms - 1).square().mean()
    wasserstein = (real.square() - fake.square()).sum() / 16
    auxiliary = F.cross_entropy(real.flatten(1)[:, :10], labels)
    truth = {"wasserstein": wasserstein, "penalty": penalty, "auxiliary": auxiliary}
    torch.testing.assert_close(parts, truth)
    torch.testing.assert_close(loss, 3 * penalty + auxiliary - wasserstein)
    torch.manual_seed(SEED)
    loss, parts = acwgan.critic_loss(critic, real, labels, fake)
    lambda_ten = 10 * parts["penalty"] + auxiliary - wasserstein  # the paper's
    torch.testing.assert_close(loss, lambda_ten)
    loss = acwgan.generator_loss(critic, fake, labels)
    auxiliary = F.cross_entropy(fake.flatten(1)[:, :10], labels)
    torch.testing.assert_close(loss, auxiliary - fake.square().sum() / 16)


def test_penalty_gradient_agrees_with_finite_differences():
    """A step of 1e-8 in float64 crosses no kink of a leaky ReLU, but for one draw in 1,000."""
    torch.manual_seed(SEED)
    critic = acwgan.Critic(1, 28).double()
    real = torch.rand(3, 1, 28, 28).double()
    fake = torch.rand(3, 1, 28, 28).double()

    def penalty(weight):
        def changed(images):
            return torch.func.functional_call(critic, {"layers.1.weight": weight}, images)

        torch.manual_seed(SEED)
        return acwgan.gradient_penalty(changed, real, fake)

    torch.testing.assert_close(acwgan.leaky_relu(-real), F.leaky_relu(-real, 0.2))
    weight = critic.layers[1].weight
    assert torch.autograd.gradcheck(penalty, weight, eps=1e-8, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_week_1s_numbers_are_recomputed_from_its_files(gan):
    """The classifier learnt from 134 of 160 images. Rounding may move a pixel by a grey level."""
    record = json.loads((gan / "results.json").read_text())
    assert (record["dataset"], record["dataset_size"]) == ("glyphs", 160)
    images, labels = common.glyphs(160)
    test_images, test_labels = common.glyphs(100, 1)
    generator = acwgan.Generator(74, 4, 28).eval()
    generator.load_state_dict(torch.load(gan / "checkpoint.pt")["average"])
    classifier = acwgan.evaluation_network().eval()
    classifier.load_state_dict(torch.load(gan / "evaluation_classifier.pt")["network"])
    stored = np.load(gan / "samples.npz")
    assert (stored["images"].dtype, stored["labels"].dtype) == (np.uint8, np.int64)
    samples = torch.from_numpy(stored["images"]).unsqueeze(1) / 255
    requested = torch.arange(100) % 10
    assert np.array_equal(stored["labels"], requested)
    stream = torch.Generator().manual_seed(SEED + 1)
    latent = torch.randn(100, 74, generator=stream)
    drawn = generator(latent, requested)
    assert (drawn - samples).abs().max() < 1.1 / 255
    latent[:, :10] = 7  # the label overwrites these numbers
    assert torch.equal(generator(latent, requested), drawn)
    hits = classifier(samples).argmax(1) == requested
    correct = classifier(test_images).argmax(1) == test_labels
    assert record["class_accuracy"] == wilson(hits.sum(), 100)
    assert record["evaluation_accuracy"] == wilson(correct.sum(), 100)
    stream.manual_seed(SEED + 1)
    latent = torch.randn(26, 74, generator=stream)
    matched = (generator(latent, labels[134:]) * 255).round() / 255
    test_features = classifier.features(test_images).double()
    for name, x in {"distance": matched, "distance_real": images[134:]}.items():
        features = classifier.features(x).double()
        truth = common.frechet_distance_torch(features, test_features)
        assert record[f"frechet_{name}"] == pytest.approx(truth.item(), rel=0.01)
    ratio = record["frechet_distance"] / record["frechet_distance_real"]
    assert record["frechet_ratio"] == ratio
    page = np.array(Image.open(gan / "AC-WGAN_GP.png").convert("L"))
    assert np.array_equal(page[518:602:3, 88:172:3], (test_images[1, 0] * 255).round())


def test_each_epoch_sees_all_images_and_each_step_is_averaged(tmp_path):
    """Two critic steps see the same images. The average's decay rises to 0.6."""
    weights = []
    critic_step = Mock(wraps=acwgan.critic_step)
    update_average = acwgan.update_average

    def record_weights(average, generator, decay):
        weights.append(generator.project.weight.detach().clone())
        update_average(average, generator, decay)

    with quick_week_1() as patch:
        patch.setattr(acwgan, "critic_step", critic_step)
        patch.setattr(acwgan, "update_average", record_weights)
        week_1(tmp_path, f"{DIGITS} --average 0.6 --critic-steps 2")
    seen = [call.args[2].sum((1, 2, 3)) for call in critic_step.call_args_list]
    epochs = torch.cat(seen[::2]).view(2, 160)
    truth = common.glyphs(160)[0].sum((1, 2, 3))
    assert torch.allclose(epochs.sort().values, truth.sort().values)
    assert not torch.allclose(epochs[0], epochs[1])
    torch.manual_seed(SEED + 1)
    mean = acwgan.Generator(74, 4, 28).project.weight.detach()
    for step, weight in enumerate(weights, 1):
        mean = torch.lerp(weight, mean, min(0.6, step / (step + 8)))
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert torch.allclose(checkpoint["average"]["project.weight"], mean, atol=1e-5)
    name = "draw.0.running_mean"
    assert torch.equal(checkpoint["average"][name], checkpoint["generator"][name])
    for name, rate in {"generator_adam": 4e-3, "critic_adam": 2e-3}.items():
        group = checkpoint[name]["param_groups"][0]
        assert group["lr"] == pytest.approx(rate / 20)
        assert group["betas"] == (0.0, 0.99)
    names, *rows = csv.reader((tmp_path / "history.csv").read_text().splitlines())
    assert names == ["step", "wasserstein", "penalty", "auxiliary", "generator"]
    assert [row[0] for row in rows] == ["1", "5", "9", "13", "17"]


def test_week_1_trains_at_64_pixels_on_twelve_images(tmp_path):
    with quick_week_1():
        record = week_1(tmp_path, f"{DIGITS} --limit 12 --batch-size 4 --image-size 64")
    assert np.load(tmp_path / "samples.npz")["images"].shape == (100, 28, 28)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(record, default=str))


@pytest.mark.parametrize(("save_every", "flags"), [(3, DIGITS), (5, "--resume")])
def test_a_training_resumes_to_the_same_bits(gan, tmp_path, save_every, flags):
    """By the same command, or --resume; within the first epoch or at its end."""
    path = tmp_path / "checkpoint.pt"
    savetxt = np.savetxt
    with quick_week_1(save_every) as patch:
        patch.setattr(np, "savetxt", Mock(side_effect=[None, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            week_1(tmp_path, DIGITS)
        patch.setattr(np, "savetxt", savetxt)
        content = torch.load(path)
        content["curve"] = [{"epochs": 0.2, "class_accuracy": 0.1}]
        torch.save(content, path)
        week_1(tmp_path, flags)
    resumed = torch.load(path)
    whole = torch.load(gan / "checkpoint.pt")
    for name in whole.keys() - {"kind", "settings", "history"}:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)
    assert resumed["history"][1:] == whole["history"][1:]
    assert contents(tmp_path)["samples.npz"] == contents(gan)["samples.npz"]


def test_a_finished_training_is_reported_again_with_its_fid(gan, gan_copy):
    """Nothing is trained, and all files are written before the table is shown."""
    draw = Mock(wraps=acwgan.generate)
    x = torch.randn(100, 5, generator=random_stream()).double()
    inception = Mock(side_effect=[x.numpy(), x.numpy() ** 2])
    with quick_week_1() as patch:
        patch.setattr(acwgan, "critic_step", Mock(side_effect=AssertionError))
        patch.setattr(acwgan, "generate", draw)
        patch.setattr(common, "download", Mock())
        patch.setattr(common, "inception_features", inception)
        patch.setattr(common, "print_table", Mock(side_effect=BrokenPipeError))
        with pytest.raises(BrokenPipeError):
            week_1(gan_copy, f"{DIGITS} --inception")
    assert contents(gan_copy)["samples.npz"] == contents(gan)["samples.npz"]
    assert torch.equal(inception.call_args.args[0], common.glyphs(100, 1)[0])
    assert torch.equal(draw.call_args_list[1].args[1], common.glyphs(160)[1][134:])
    fid = json.loads((gan_copy / "results.json").read_text())["fid"]
    assert fid == pytest.approx(common.frechet_distance_torch(x, x**2).item())


def test_a_training_of_other_settings_is_refused(gan_copy):
    with quick_week_1():
        for setting in [*OTHER_SETTINGS.split(", "), f"seed {SEED + 2}"]:
            value = setting.split()[1]
            with refused(f"not {value};", "--out", "--force", code=2):
                week_1(gan_copy, f"--resume --{setting}")
        with refused("not 0.5;", "--out", "--force", code=2):
            week_1(gan_copy, f"{DIGITS} --average 0.5")
        (gan_copy / "checkpoint.pt").unlink()
        with refused("results.json", "not 0.5;", code=2):
            week_1(gan_copy, f"{DIGITS} --average 0.5")


def test_a_classifier_that_diverges_is_not_saved(tmp_path):
    images = torch.rand(12, 1, 28, 28, generator=random_stream())
    settings = {"seed": SEED, "epochs": 1, "lr": 1e20}
    path = tmp_path / "classifier.pt"
    with refused(path, "diverged", "its learning rate"):
        network = acwgan.evaluation_network()
        labels = torch.arange(12) % 10
        acwgan.cached_classifier(path, network, images, labels, settings)
    assert not path.exists()


def test_what_stops_a_training_is_said_in_one_line(gan_copy):
    with held(gan_copy), refused(gan_copy, "another run"):
        week_1(gan_copy, DIGITS)
    with quick_week_1(save_every=1):
        with refused("11 images", code=2):
            week_1(gan_copy / "few", f"{DIGITS} --limit 11 --batch-size 4")
        with refused("20 images", "--batch-size", code=2):
            week_1(gan_copy / "few", f"{DIGITS} --limit 20 --batch-size 32")
        with refused("diverged", "--critic-lr", "--generator-lr"):
            week_1(gan_copy, f"{DIGITS} --force --critic-lr 1e9 --generator-lr 1e9")
    for name in ("checkpoint.pt", "results.json"):
        assert not (gan_copy / name).exists(), "the old training is not to be resumed"


@pytest.mark.parametrize("network", ["generator", "critic", "average", "network"])
def test_a_file_that_holds_nan_is_refused(gan_copy, network):
    name = "evaluation_classifier" if network == "network" else "checkpoint"
    path = gan_copy / f"{name}.pt"
    content = torch.load(path)
    for weight in content[network].values():
        weight.fill_(torch.nan if weight.is_floating_point() else 0)
    torch.save(content, path)
    with quick_week_1(), refused(path, "NaN"):
        week_1(gan_copy, DIGITS)


def test_sample_draws_without_data_and_touches_no_other_file(gan_copy, monkeypatch):
    monkeypatch.setattr(common, "load_digits", Mock(side_effect=AssertionError))
    before = contents(gan_copy)
    week_1(gan_copy, "--sample 100")
    after = contents(gan_copy)
    assert after.pop("drawn.npz") == before["samples.npz"]
    assert after.pop("drawn.png")[1:4] == b"PNG"
    assert after == before
    week_1(gan_copy, f"--sample 100 --seed {SEED + 2}")
    assert contents(gan_copy)["drawn.npz"] != before["samples.npz"]
    week_1(gan_copy, "--sample 20 --digit 0")
    assert np.load(gan_copy / "drawn.npz")["labels"].tolist() == [0] * 20
    with refused(gan_copy / "checkpoint.pt", "epochs 2, not 99", code=2):
        week_1(gan_copy, "--sample 20 --epochs 99")
    with pytest.raises(SystemExit, match="2"):
        week_1(gan_copy, "--sample 20 --resume")


def test_evaluation_classifier_learns_no_held_out_digit(tmp_path, monkeypatch):
    train = Mock()
    monkeypatch.setattr(acwgan, "train_classifier", train)
    images, labels = common.glyphs(60)
    acwgan.evaluation_classifier(tmp_path, "glyphs", images, labels)
    assert torch.equal(train.call_args.args[1], images[:50])
    acwgan.evaluation_classifier(tmp_path, "glyphs", images, labels)
    acwgan.evaluation_classifier(tmp_path, "mnist", images, labels)
    acwgan.evaluation_classifier(tmp_path, "mnist", images[:54], labels[:54])
    assert train.call_count == 3


def test_train_classifier_learns_what_a_linear_layer_can():
    """Class k lights pixel k; the attack swaps the classes k and 9 - k."""
    labels = torch.arange(40) % 10
    images = F.one_hot(labels, 784).view(40, 1, 28, 28).float()
    settings = {"seed": SEED, "epochs": 1, "lr": 1e-2, "smoothing": 0.05}

    def swap(_, inputs, y):
        return images[9 - y]

    torch.manual_seed(SEED)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    acwgan.train_classifier(network, images, labels, settings)
    assert torch.equal(network(images).argmax(1), labels)
    acwgan.train_classifier(network, images, labels, settings, swap)
    assert torch.equal(network(images).argmax(1), 9 - labels)


# --- week 2


def write_week_1(path, **changes):
    """Write a checkpoint of week 1, as acwgan.py does, with untrained networks."""
    torch.manual_seed(SEED)
    content = {
        "kind": "acwgan",
        "settings": {"dataset": "glyphs", "image_size": 28, "latent": 20, "width": 8},
        "average": acwgan.Generator(20, 8, 28).state_dict(),
        "critic": acwgan.Critic(8, 28).state_dict(),
        "steps": 1,
        "total_steps": 1,
    }
    torch.save({**content, **changes}, path)
    return path


def invert(network, images, classes):
    """Stands in for PGD and for Carlini & Wagner's search, which have tests of their own."""
    return 1 - images


def run_transfer(out, *flags, search=invert):
    """`transfer.main` with little of everything, and no training of classifiers."""
    flags = ["--limit", 20, "--samples", 40, "--steps", 2, "--seed", SEED, *flags]
    flags += ["--device", "cpu", "--generator", out / "week_1.pt", "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acwgan, "train_classifier", Mock())
        patch.setattr(transfer, "pgd", invert)
        patch.setattr(transfer, "carlini_wagner", search)
        patch.setattr(transfer, "BATCH_SIZE", 4)
        patch.setattr(transfer, "CW_DIGITS", 20)
        return transfer.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """The record of a small run of every row."""
    out = tmp_path_factory.mktemp("transfer")
    write_week_1(out / "week_1.pt")
    return run_transfer(out)


@pytest.fixture
def copied(transferred, tmp_path):
    """The folder of the same run, this test's own."""
    return shutil.copytree(transferred["settings"]["out"], tmp_path / "copy")


@pytest.fixture
def networks(tmp_path):
    """Untrained classifiers beside week 1's generator and critic."""
    path = write_week_1(tmp_path / "week_1.pt")
    original, critic, _ = transfer.load_week_1(path, "auto")
    parts = [original, critic, transfer.model_a()]
    for make, arguments, _, _ in transfer.CLASSIFIERS.values():
        parts.append(make(*arguments))
    return transfer.Networks(*[part.eval().requires_grad_(False) for part in parts])


def test_samples_are_those_of_the_rows_generator_and_counted(transferred, networks):
    rows = transferred["rows"]
    assert list(rows) == [*transfer.VARIANTS, "carlini-wagner"]
    labels = np.arange(40) % 10
    out = transferred["settings"]["out"]
    start = np.load(out / "samples-original.npz")["images"].reshape(40, 784) / 255
    least = np.linalg.norm(1 - 2 * start[:20], axis=1).mean()  # a search that inverts
    for name, variant in transfer.VARIANTS.items():
        samples = np.load(out / f"samples-{name}.npz")
        generator = transfer.new_generator(variant, networks.original)
        checkpoint = torch.load(out / f"generator-{name}.pt")
        generator.load_state_dict(checkpoint["generator"])
        drawn = acwgan.generate(generator.eval(), torch.arange(40) % 10, SEED)
        assert np.array_equal((drawn[:, 0] * 255).round().numpy(), samples["images"])
        wanted = np.full(40, 7) if "scratch" in name else (labels + 1) % 10
        assert np.array_equal(samples["labels"], labels)
        assert np.array_equal(samples["target"], wanted)
        counts = labels != wanted
        l2 = np.linalg.norm(samples["images"].reshape(40, 784) / 255 - start, axis=1)
        assert rows[name]["l2"] == pytest.approx(l2[counts].mean(), rel=1e-4)
        ratio = l2[:20].mean() / least
        assert rows[name]["l2_over_cw"] == pytest.approx(ratio, rel=1e-4)
        fooled = (samples["predicted"] == wanted)[counts]
        assert rows[name]["target_fooled"] == wilson(fooled.sum(), len(fooled))


def test_every_column_measures_what_its_name_says():
    images = torch.zeros(5, 1, 28, 28)
    moved = images.clone()
    moved[:, :, 0, 0] = 0.5
    networks = Mock()
    answers = {0.5: [7, 2, 7, 7, 7], 0.0: [7, 1, 2, 6, 7]}  # by the first pixel
    networks.target = lambda x: torch.eye(10)[answers[x[0, 0, 0, 0].item()]]
    networks.critic = lambda x: (x[:, 0, 0, 0] + torch.arange(5), None)
    networks.judge.return_value = torch.eye(10)[[0, 2, 2, 3, 4]]
    networks.pgd_judge.return_value = torch.eye(10)[[0, 1, 1, 1, 4]]
    labels = torch.tensor([0, 1, 2, 6, 7])  # the last is the wanted class already
    variant = transfer.Variant("untrained", {}, wanted=7)
    row, classes = transfer.measure(moved, images, labels, variant, networks)
    assert classes["predicted"].tolist() == [7, 2, 7, 7, 7]
    hits = {"fooled_before": 1, "target_fooled": 3, "judge_reads_y": 2, "both": 2}
    hits.update(pgd_judge_reads_y=2, both_by_pgd_judge=1)
    for name, n in hits.items():
        assert row[name] == wilson(n, 4), name
    assert row["l2"] == row["linf"] == 0.5
    assert row["critic"] == 2.5, "of the digits themselves"


def test_the_report_fits_a_terminal_and_names_fit_the_figure(transferred, capsys):
    transfer.print_report("glyphs", {}, transferred["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "glyphs" in lines[1]
    page = np.array(Image.open(transferred["settings"]["out"] / "closest.png"))
    assert len(page) == 62 + 124 * 5
    assert (page[62:, 188:192] == 255).all(), "a name runs into the digits"
    assert (page[62:, :188] < 128).any(), "there are no names"
    for name in transfer.PAGES:
        page = np.array(Image.open(transferred["settings"]["out"] / f"{name}.png"))
        assert (page[:62, 1050:] == 255).all(), "a caption is too long"


def test_a_figure_says_of_each_digit_whether_the_attack_succeeds(tmp_path):
    """Only the first digit's target is fooled; of two digits a judge is mistaken."""
    digits = torch.arange(10)
    target = digits.clone()
    target[0] = 1
    pgd_judge = digits.clone()
    pgd_judge[[2, 5]] = 8
    classes = {"target": (digits + 1) % 10, "predicted": target}
    classes.update(judge=digits, pgd_judge=pgd_judge)
    drawn = {"original": torch.zeros(10, 1, 28, 28)}
    transfer.write_figures(tmp_path, drawn, {"original": classes})
    page = np.array(Image.open(tmp_path / "closest.png"))
    greener = page[..., 1].astype(int) > page[..., 0].astype(int) + 60
    for y in range(10):
        cell = greener[:, 195 + 86 * y : 275 + 86 * y]
        assert cell[148:162].any() == (y == 0)
        assert cell[164:180].any() == (y not in (2, 5))


def test_force_trains_a_finished_row_again_and_no_other(transferred, copied, monkeypatch):
    spy = Mock(side_effect=transfer.train)
    monkeypatch.setattr(transfer, "train", spy)
    again = run_transfer(copied, "--variant", "fid", "--force")
    assert [call.args[0] for call in spy.call_args_list] == ["original", "fid"]
    assert list(again["rows"]) == list(transferred["rows"])


def test_rows_of_other_settings_are_refused_or_left_out(copied, monkeypatch):
    with held(copied), refused(copied, "another run"):
        run_transfer(copied)
    with refused("was made with seed", "--force", code=2):
        run_transfer(copied, "--seed", SEED + 1, "--variant", "ours")
    with monkeypatch.context() as patch, refused("was made with version", code=2):
        patch.setattr(transfer, "VERSION", 0)
        run_transfer(copied)
    record = run_transfer(copied, "--steps", 3, "--variant", "as-logged", "--force")
    assert list(record["rows"]) == ["original", "as-logged", "carlini-wagner"]


def test_rows_stay_and_are_compared_where_the_search_succeeds(
    transferred, copied, monkeypatch
):
    """Fault 1: `--variant ours` threw away the other rows.

    Of 20 digits the search leaves 5 as they were; they say nothing of the least change.
    """
    found = torch.arange(20) >= 5

    def search(network, images, wanted):
        return torch.where(found[:, None, None, None], 1 - images, images)

    monkeypatch.setattr(transfer, "train", None)
    rows = run_transfer(copied, "--variant", "ours", search=search)["rows"]
    assert list(rows) == list(transferred["rows"])
    start = np.load(copied / "samples-original.npz")["images"].reshape(40, 784)
    least = np.linalg.norm(255 - 2.0 * start[5:20], axis=1).mean()
    fid = np.load(copied / "samples-fid.npz")["images"].reshape(40, 784)
    change = np.linalg.norm((1.0 * fid - start)[5:20], axis=1).mean()
    assert rows["fid"]["l2_over_cw"] == pytest.approx(change / least, rel=1e-4)
    for name in transfer.VARIANTS:
        before = transferred["rows"][name]
        assert rows[name] == {**before, "l2_over_cw": rows[name]["l2_over_cw"]}


def test_a_figure_without_rows_is_not_drawn(tmp_path):
    transfer.write_figures(tmp_path, {"original": torch.zeros(10, 1, 28, 28)}, {})
    assert not (tmp_path / "synthetic-adversarial-framework.png").exists()
    assert (tmp_path / "closest.png").exists()


def test_week_1_is_known_by_its_weights_and_must_fit(tmp_path):
    """Fault 22: the same training, run again, differs in its times only."""
    path = tmp_path / "checkpoint.pt"
    with refused(path, "python acwgan.py --out"):
        transfer.load_week_1(path, "auto")
    facts = transfer.load_week_1(write_week_1(path, seconds=1.0), "glyphs")[2]
    assert transfer.load_week_1(write_week_1(path, seconds=2.0), "auto")[2] == facts
    with refused("python acwgan.py --dataset mnist --out FOLDER", code=2):
        transfer.load_week_1(path, "mnist")
    for part in ("average", "critic"):
        weights = torch.load(path)[part]
        first = next(iter(weights.values()))
        first += 1
        changed = transfer.load_week_1(write_week_1(path, **{part: weights}), "auto")[2]
        assert changed != facts
        first *= torch.nan
        with refused(path, "NaN"):
            transfer.load_week_1(write_week_1(path, **{part: weights}), "auto")
    write_week_1(path, settings={"dataset": "glyphs", "image_size": 64})
    with refused("28 x 28", "python acwgan.py --dataset auto", code=2):
        transfer.load_week_1(path, "auto")


def test_a_feature_banks_gradient_is_as_if_all_batches_had_one():
    """It keeps seven of them."""
    stream = random_stream()
    real = torch.rand(30, 1, 2, 3, generator=stream)
    variance = real.flatten(1).var(0).sum()
    batches = torch.rand(10, 8, 1, 2, 3, generator=stream)
    bank = transfer.FeatureBank(Mock(features=nn.Flatten()), real)
    for i, batch in enumerate(batches):
        recent = batches[max(0, i - 7) : i + 1].reshape(-1, 6)
        distance = common.frechet_distance_torch(recent, real.flatten(1)) / variance
        expected = distance * min(i + 1, 8)  # batches, of which one has a gradient
        assert torch.allclose(bank.distance(batch), expected, rtol=1e-3, atol=1e-5)
    x = batches[0].requires_grad_()
    bank = transfer.FeatureBank(Mock(features=nn.Flatten()), real)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(bank.distance(x), x)
    same = common.frechet_distance_torch(x.flatten(1).repeat(3, 1), real.flatten(1))
    (expected,) = torch.autograd.grad(same / variance, x)
    assert difference(gradient, expected) < 1e-3


def test_the_terms_of_the_losses_are_their_formulas(networks):
    logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 5.0]])
    assert transfer.margin(logits, torch.tensor([0, 1])).tolist() == [2.0, -3.0]
    latent = torch.randn(8, networks.original.latent, generator=random_stream())
    labels = torch.arange(8)
    wanted = labels + 1
    original = networks.original(latent, labels)
    images = original + 0.5
    target = transfer.margin(networks.target(images), wanted)
    robust = transfer.margin(networks.robust_auxiliary(images), labels)
    terms = {
        "critic": -networks.critic(images)[0].mean(),
        "auxiliary": F.cross_entropy(networks.auxiliary(images), labels),
        "adversarial": F.cross_entropy(networks.target(images), wanted),
        "adversarial hinge": (1.5 - target).clamp(min=0).mean(),
        "robust hinge": (2.0 - robust).clamp(min=0).mean(),
        "euclidean": torch.tensor(784 * 0.5**2),
        "noisy euclidean": torch.tensor(784 * (0.5**2 + 0.1**2)),
    }
    for name, expected in terms.items():
        term = transfer.loss_term(name, networks, None, images, original, labels, wanted)
        assert term.item() == pytest.approx(expected.item(), rel=0.02), name


def short_training(networks, name, steps=1):
    args = transfer.parse_args(["--steps", str(steps), "--seed", str(SEED)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BATCH_SIZE", 4)
        return transfer.train(name, args, networks, *common.glyphs(20))


def test_a_training_moves_its_generator_and_scratch_lives_critic(networks, monkeypatch):
    """By the learning rate, as Adam's first step is, for its own terms; and no other network."""
    frozen = copy.deepcopy(networks)
    critics = []
    targets = []
    values = {}
    term_of = transfer.loss_term

    def record(term, networks, *rest):
        critics.append(networks.critic.heads.weight.detach().clone())
        targets.append(networks.target)
        value = term_of(term, networks, *rest)
        values.setdefault(term, value)  # of the first step
        return value

    monkeypatch.setattr(transfer, "loss_term", record)
    expected = {
        "scratch": {"critic", "auxiliary", "adversarial"},
        "as-logged": {"auxiliary"},
        "adversarial": {"auxiliary", "adversarial"},
        "fid": {"auxiliary", "adversarial", "frechet"},
        "scratch-live": {"critic", "auxiliary", "adversarial"},
    }
    for name, terms in expected.items():
        values.clear()
        variant = transfer.VARIANTS[name]
        torch.manual_seed(SEED)
        before = transfer.new_generator(variant, networks.original).project.weight
        after = short_training(networks, name).project.weight
        assert (after - before).abs().max().item() == pytest.approx(variant.lr, rel=0.01)
        step = (critics[-1] - networks.critic.heads.weight).abs().max().item()
        rate = 1e-3 if name == "scratch-live" else 0
        assert step == pytest.approx(rate, rel=0.01)
        assert targets[-1] is getattr(networks, variant.target)
        assert values.keys() == terms
    values.clear()
    short_training(networks, "euclidean")
    assert values.keys() == {"auxiliary", "adversarial", "noisy euclidean"}
    values.clear()
    short_training(networks, "ours")
    assert values.keys() == {"adversarial hinge", "robust hinge", "euclidean"}
    assert values["euclidean"] == 0  # it starts as week 1's generator
    for network, same in zip(networks, frozen, strict=True):
        for key, weight in network.state_dict().items():
            assert torch.equal(weight, same.state_dict()[key])
    infinite = Mock(return_value=torch.full((4, 10), torch.nan))
    with refused("adversarial", "not finite"):
        short_training(networks._replace(target=infinite), "adversarial")


def test_adam_scales_up_what_sgd_leaves_small(networks):
    """Adam's first step is the learning rate times the gradient's sign; SGD's, times itself."""
    torch.manual_seed(SEED)
    variant = transfer.VARIANTS["as-logged"]
    before = transfer.new_generator(variant, networks.original).project.weight
    adam = short_training(networks, "as-logged").project.weight - before
    sgd = short_training(networks, "as-logged-sgd").project.weight - before
    moved = sgd.abs() > 1e-7
    assert moved.any()
    assert torch.equal(sgd[moved].sign(), adam[moved].sign())
    assert sgd.abs().max() < 0.1 * adam.abs().max()


def test_ours_warms_up_falls_and_weighs_the_change_ever_more(networks, monkeypatch):
    change = torch.zeros((), requires_grad=True)  # its gradient is its weight
    terms = {"adversarial hinge": 0, "robust hinge": 0, "euclidean": change}
    schedule = []

    def term_of(term, *rest):
        return terms[term]

    class Adam(torch.optim.Adam):
        def step(self):
            schedule.extend([self.param_groups[0]["lr"], change.grad.item()])
            change.grad = None

    monkeypatch.setattr(transfer, "Adam", Adam)
    monkeypatch.setattr(transfer, "WARM_UP", 6)
    monkeypatch.setattr(transfer, "loss_term", term_of)
    short_training(networks, "ours", steps=2)
    expected = []
    for i in range(16):
        expected.append(2.5e-3 * min(1, (i + 1) / 6) * (1 - i / 16))
        expected.append(0.24 * min(1, i / (0.7 * 16)))
    assert schedule == pytest.approx(expected)


@pytest.mark.parametrize("name", ["original", "as-logged", "scratch", "ours"])
def test_generators_start_as_their_rows_say(networks, name):
    latent = torch.randn(4, networks.original.latent, generator=random_stream())
    labels = torch.arange(4)
    generator = transfer.new_generator(transfer.VARIANTS[name], networks.original).eval()
    drawn = generator(latent, labels)
    original = networks.original(latent, labels)
    first = name in ("original", "ours")
    assert torch.allclose(drawn, original, atol=1e-6) == first
    # as the log's, the others normalise by the batch
    alone = generator(latent[:3], labels[:3])
    assert torch.allclose(alone, drawn[:3], atol=1e-6) == first
    if name == "ours":
        nn.init.constant_(generator.decoder[-1][-1].bias, 0.1)
        assert not torch.allclose(generator(latent, labels), drawn, atol=1e-2)
        bias = generator.decoder[-1][-1].bias
        nn.init.constant_(bias, 9)
        black = torch.zeros(4, 1, 28, 28)
        generator.original.forward = Mock(return_value=black)
        changed = generator(latent, labels)
        assert torch.allclose(changed, black + 0.9)
        # a clamp's gradient is zero here: training once stopped for good
        (gradient,) = torch.autograd.grad(changed.mean(), bias)
        assert gradient.sum().item() == pytest.approx(0.01, rel=1e-3)
    else:
        same = torch.equal(generator.project.weight, networks.original.project.weight)
        assert same == (name != "scratch")


def linear():
    """A linear network of two classes, and by how much each pixel favours the first."""
    torch.manual_seed(SEED)
    layer = nn.Linear(784, 2).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), layer), layer.weight[0] - layer.weight[1]


def test_pgd_moves_a_linear_classifier_by_the_closed_form():
    network, direction = linear()
    images = torch.full((3, 1, 28, 28), 0.5)
    labels = torch.zeros(3, dtype=torch.long)
    step = 0.3 * direction.sign().view(1, 28, 28)
    assert torch.allclose(transfer.pgd(network, images, labels), images - step)
    for options in (transfer.FGSM, transfer.PGD):  # from a random start
        change = transfer.pgd(network, images, labels, **options) - images
        assert change.abs().max() <= 0.3 + 1e-6
        assert (change.flatten(1) @ direction < 0).all()


def test_carlini_wagner_finds_the_smallest_change():
    """To a lead of 0.1 of a linear classifier. Adam's first steps are 7 * lr long: short ones."""
    network, direction = linear()
    images = torch.rand(4, 1, 28, 28, generator=random_stream()) / 2 + 0.25
    logits = network(images)
    moved = transfer.carlini_wagner(network, images, logits.argmin(1), steps=200, lr=0.01)
    closed_form = ((logits[:, 0] - logits[:, 1]).abs() + 0.1) / direction.norm()
    ratio = (moved - images).flatten(1).norm(dim=1) / closed_form
    assert torch.equal(network(moved).argmax(1), logits.argmin(1))
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


def test_classifiers_are_trained_once_by_their_recipes(networks, tmp_path, monkeypatch):
    """Fault 25: a judge that is wrong under PGD judges nothing."""
    train = Mock()
    monkeypatch.setattr(acwgan, "train_classifier", train)
    images, labels = common.glyphs(20)
    args = (tmp_path, "glyphs", images, labels, networks.original, networks.critic)
    transfer.load_networks(*args)
    transfer.load_networks(*args)
    attacks = [call.args[-1] for call in train.call_args_list]
    assert attacks[:2] == [None, None]
    assert [attack.keywords["steps"] for attack in attacks[2:]] == [1, 1, 3]

    def right(images):
        return F.one_hot(labels, 10) * images.amax((1, 2, 3))[:, None]

    monkeypatch.setattr(transfer, "pgd", Mock(return_value=0 * images))
    rates = transfer.measure_classifiers(networks._replace(judge=right), images, labels)
    assert rates["judge"]["rate"] == 1
    assert rates["judge_under_pgd"]["rate"] == 0.1  # without an image, it answers 0
    assert transfer.pgd.call_args_list[0].args[0] is right
    assert len(rates) == len(transfer.CLASSIFIERS) + 2


# --- weeks 3 to 5: the classifier


def logits_and_gradient(network, images):
    """The logits (N, L), and the gradient of the first label's logit in the images."""
    images = images.clone().requires_grad_()
    logits = network(images * 1)  # no leaf, so that a network may work in place
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), images)[0]


@functools.cache
def published_state():
    """A random state dict with the moments of real activations and gammas of either sign."""
    torch.manual_seed(SEED)
    network = asl_model.tresnet("tresnet_s", 10)
    gammas = [x for name, x in network.named_parameters() if name.endswith(".1.weight")]
    with torch.no_grad():
        for name, x in network.named_parameters():
            if name.endswith("bias"):
                x.normal_(0, 0.2)
        for gamma in gammas:
            gamma.uniform_(0.3, 1)
        network.head.fc.weight.normal_(0, 0.1)
        for i in range(8):
            network(photo_like(8, 40, i))
        for gamma in gammas:
            gamma.mul_(torch.randn(gamma.shape).sign())[0] = 0
    return network.state_dict()


def reference_conv(state, x, name, slope=1.0):
    """A convolution with InPlace-ABN; where it is strided, also the blur, as a convolution."""
    blurred = f"{name}.0.0.weight" in state
    name += ".0" * blurred
    weight = state[f"{name}.0.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean = state[f"{name}.1.running_mean"]
    var = state[f"{name}.1.running_var"]
    gamma = state[f"{name}.1.weight"].abs() + 1e-5
    x = F.batch_norm(x, mean, var, gamma, state[f"{name}.1.bias"])
    x = torch.where(x < 0, slope * x, x)
    if not blurred:
        return x
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).to(x) / 16
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])


def reference_logits(state, images):
    """TResNet's logits (N, L) in float64, written from the papers and the entries' names alone."""
    state = {name: x.double() for name, x in state.items()}

    def project(x, name):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    pixels = [images[:, :, i::4, j::4] for i in range(4) for j in range(4)]
    x = reference_conv(state, torch.cat(pixels, 1).double(), "body.conv1", 1e-2)
    for name in dict.fromkeys(re.findall(r"body\.layer\d\.\d+", " ".join(state))):
        bottleneck = f"{name}.conv3.0.weight" in state
        y = reference_conv(state, x, f"{name}.conv1", 1e-3)
        y = reference_conv(state, y, f"{name}.conv2", 1e-3 if bottleneck else 1.0)
        if f"{name}.se.fc1.weight" in state:
            scale = project(y.mean((2, 3), keepdim=True), f"{name}.se.fc1").relu()
            y = y * project(scale, f"{name}.se.fc2").sigmoid()
        if bottleneck:
            y = reference_conv(state, y, f"{name}.conv3")
        if f"{name}.downsample.1.0.weight" in state:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
            x = reference_conv(state, x, f"{name}.downsample.1")
        elif f"{name}.downsample.0.0.weight" in state:
            x = reference_conv(state, x, f"{name}.downsample.0")
        x = torch.relu(x + y)
    return F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])


def test_networks_have_the_published_files_sizes():
    """ASL's TResNets: arch, entries, millions of weights."""
    text = "tresnet_m 374 29.50, tresnet_l 535 53.75, tresnet_xl 649 75.99"
    for arch, entries, millions in map(str.split, text.split(", ")):
        with torch.device("meta"):
            network = asl_model.tresnet(arch)
        weights = sum(p.numel() for p in network.parameters())
        assert len(network.state_dict()) == int(entries)
        assert f"{weights / 1e6:.2f}" == millions


def test_a_published_file_gives_inplace_abns_logits(tmp_path):
    """Folded or not, and by `predict` in batches, against a rebuilding in float64."""
    names = dict(zip("3094182756", "dajebichfg", strict=True))  # in any order
    content = {"model": published_state(), "num_classes": 10, "idx_to_class": names}
    torch.save(content, tmp_path / "file.pth")
    for size in (64, 72):
        images = photo_like(3, size)
        truth = reference_logits(published_state(), images)
        for folded in (True, False):
            network, names = asl_model.load_asl(tmp_path / "file.pth", folded=folded)
            assert names == list("abcdefghij")
            assert not any(module.training for module in network.modules())
            logits = torch.from_numpy(asl_model.predict(network, images, CPU, 2))
            assert difference(logits, truth) < 1e-4


@pytest.mark.parametrize(
    ("key", "prefix"),
    [("model", ""), ("state_dict", "module."), ("average", ""), (None, "module.")],
)
def test_every_wrapping_of_a_state_dict_is_loaded(tmp_path, key, prefix):
    """Also under DataParallel. Our own files, of batch norm, may have gammas below 0."""
    state = {prefix + name: x for name, x in published_state().items()}
    state[f"{prefix}body.conv1.1.num_batches_tracked"] = torch.tensor(7)
    gamma = state[f"{prefix}body.conv1.1.weight"]
    own = {"norm": "batch norm", "image_size": 32}
    torch.save({key: state, **own} if key else state, tmp_path / "file.pth")
    network, names = asl_model.load_asl(tmp_path / "file.pth", folded=False)
    expected = gamma if key else gamma.abs() + 1e-5
    assert torch.equal(network.body.conv1[1].weight, expected)
    assert torch.equal(network.head.fc.weight, state[f"{prefix}head.fc.weight"])
    assert (names, network.image_size) == (list("0123456789"), 32 if key else 64)


def test_eighty_unnamed_outputs_are_cocos_and_said_so(tmp_path, capsys):
    torch.save(asl_model.tresnet("tresnet_s").state_dict(), tmp_path / "file.pth")
    names = asl_model.load_asl(tmp_path / "file.pth")[1]
    assert len(set(names)) == 80
    assert (names[0], names[54], names[60]) == ("person", "donut", "dining table")
    assert "COCO's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.zeros(3)}, "is not a TResNet"),
        ({"a": 5}, "a is not a tensor"),
        ({"a": torch.tensor([0, np.nan])}, "NaN or infinite"),
        ({"model": published_state(), "idx_to_class": {0: "a"}}, "is not a tresnet_s"),
        ({"model": published_state(), "image_size": 66}, "its image_size is 66"),
    ],
)
def test_other_files_are_refused_with_what_differs(tmp_path, content, words):
    torch.save(content, tmp_path / "file.pth")
    with refused("file.pth", "--weights", words):
        asl_model.load_asl(tmp_path / "file.pth")


def test_resnets_are_torchvisions_behind_a_normalisation(tmp_path):
    """Weights in half precision are taken; images stay in [0, 1]."""
    torch.manual_seed(SEED)
    theirs = torchvision.models.resnet18(num_classes=5).half()
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    network, names = asl_model.load_asl(tmp_path / "file.pth")
    images = photo_like(2, 64)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    truth = theirs.float().eval()((images - mean) / std)
    assert difference(network(images), truth) < 1e-4
    assert names == list("01234")


# --- the gradient of inplace_abn v1.0.12


@pytest.mark.parametrize("first", [0, 3, None])
def test_the_wrong_gradient_is_an_independent_rebuildings(monkeypatch, first):
    """At the first places or at all, folded or not; the network itself stays as it is."""
    network = asl_model.tresnet("tresnet_s", 10).double().train()
    network.load_state_dict(published_state())
    images = photo_like(1, 40).double()
    folded = asl_model.fold(network)
    right = logits_and_gradient(folded, images)[1]
    calls = []

    def straight(relu, x):
        """A leaky ReLU that hands its gradient on as it comes."""
        calls.append(x)
        y = F.leaky_relu(x, relu.negative_slope)
        return y if first is not None and len(calls) > first else x + (y - x).detach()

    with monkeypatch.context() as patch:
        patch.setattr(nn.LeakyReLU, "forward", straight)
        truth = logits_and_gradient(folded, images)[1]
    for model in (network, folded):
        wrong = asl_model.inplace_abn_1_0_12(model, first)
        logits, gradient = logits_and_gradient(wrong, images)
        assert wrong.skipped == (10 if first is None else first)
        assert difference(gradient, truth) < 1e-9
        assert (difference(gradient, right) > 0.1) == (first != 0)
    assert torch.equal(logits, folded(images)), "to the bit, or predictions could differ"
    assert network.training


class Activated(nn.Module):
    """A convolution, a norm, an activation and a second use of what the norm's output became."""

    def __init__(self, norm, activation):
        super().__init__()
        torch.manual_seed(SEED)
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = norm
        self.activation = activation

    def forward(self, images):
        y = self.norm(self.conv(images))
        z = self.activation(y)
        return (z * torch.linspace(-1, 2, 3)[:, None, None] + y).mean((2, 3)).sin()


BN = nn.BatchNorm2d(3)


@pytest.mark.parametrize(
    ("norm", "activation", "skipped"),
    [
        (BN, F.relu_, 1),
        (BN, nn.ReLU(inplace=True), 1),
        (BN, lambda x: torch.relu(input=x), 1),
        (nn.Sequential(BN, nn.Dropout()), F.elu, 1),
        (nn.Identity(), nn.LeakyReLU(0.1), 1),
        (torchvision.ops.FrozenBatchNorm2d(3), F.relu, 1),
        (nn.Identity(), F.relu, 0),
        (BN, lambda x: x.add_(1).relu(), 0),
    ],
)
def test_what_inplace_abn_could_have_replaced_is_skipped(norm, activation, skipped):
    """In place or not. The gradient is that of a straight-through step; the logits stay."""

    def straight(x):
        before = x.detach().clone()
        value = activation(x.detach())  # in place, it is what the second use sees
        return x + (value - before) - (x.detach() - before)

    images = photo_like(2, 16)
    right = Activated(norm, activation).eval()
    wrong = asl_model.inplace_abn_1_0_12(right)
    logits, gradient = logits_and_gradient(wrong, images)
    truth = Activated(norm, straight).eval() if skipped else right
    assert torch.equal(logits, right(images))
    with torch.inference_mode():
        assert torch.equal(logits, wrong(images))
    assert torch.allclose(gradient, logits_and_gradient(truth, images)[1], atol=1e-6)
    assert wrong.skipped == skipped


def test_whole_networks_have_the_places_on_record():
    """LOG.md: 36 in TResNet-M, 9 in ResNet-18, 33 in ResNet-50; not the ReLUs of sums."""
    for arch, places in {"tresnet_m": 36, "resnet18": 9, "resnet50": 33}.items():
        with torch.device("meta"):  # weights of 0 do, and are there at once
            network = asl_model.new_network(arch, 10)
        for x in network.to_empty(device="cpu").state_dict().values():
            x.zero_()
        wrong = asl_model.inplace_abn_1_0_12(network)
        wrong(photo_like(1, 32))
        assert wrong.skipped == places


def test_what_cannot_be_imitated_is_refused():
    images = photo_like(1, 8)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    network.lock = threading.Lock()
    with refused("cannot be copied", "lock", code=2):
        asl_model.inplace_abn_1_0_12(network)
    random = asl_model.inplace_abn_1_0_12(nn.Flatten())
    random.network.register_forward_hook(Mock(side_effect=torch.eye(2)))
    with refused("its logits change"):
        random(images)


# --- loss, measures, data


@pytest.mark.parametrize(
    "powers", [(4, 1, 0.05), (4, 0, 0.05), (1.5, 0.5, 0.2), (0, 0, 0)]
)
def test_asl_and_its_gradient_are_the_papers(powers):
    """Equation 7 of Ben-Baruch et al. 2020 (gamma-, gamma+, margin), in both precisions."""
    gamma_neg, gamma_pos, clip = powers
    logits = 4 * torch.randn(50, 8, generator=random_stream(), dtype=torch.float64)
    logits.requires_grad_()
    targets = (torch.rand(50, 8, generator=random_stream(1)) < 0.3).double()
    p = 1 / (1 + torch.exp(-logits))
    q = torch.clamp(p - clip, min=0)
    positive = targets * (1 - p) ** gamma_pos * torch.log(p)
    truth = -(positive + (1 - targets) * q**gamma_neg * torch.log(1 - q)).sum()
    exact = torch.autograd.grad(truth, logits)[0]
    for dtype, tolerance in {torch.float64: 1e-9, torch.float32: 1e-3}.items():
        ours = logits.detach().to(dtype).requires_grad_()
        value = asl_model.AsymmetricLoss(*powers)(ours, targets.to(dtype))
        assert value.item() == pytest.approx(truth.item(), rel=tolerance)
        assert difference(torch.autograd.grad(value, ours)[0], exact) < tolerance


def test_asl_pulls_a_positive_however_far_off_it_is():
    far = torch.tensor([[-1e4, -200.0, 200.0, 1e4]] * 2, requires_grad=True)
    value = asl_model.AsymmetricLoss()(far, torch.tensor([[1.0], [0.0]]).expand(2, 4))
    gradient = torch.autograd.grad(value, far)[0]
    assert torch.cat([gradient.flatten(), value[None]]).isfinite().all()
    assert (gradient[0, :2] <= -0.9).all()


def test_average_precision_is_the_brute_force_one():
    """Also where scores tie or overflow a sigmoid; a class that no image shows is left out."""
    rng = np.random.default_rng(SEED)
    labels = (rng.random((40, 7)) < 0.2).astype(np.float32)
    labels[0] = 1
    labels[:, 3] = 0
    logits = (4 * labels + 3 * rng.normal(size=(40, 7))).round() + 200
    expected = []
    for i in (0, 1, 2, 4, 5, 6):
        shown = labels[:, i] > 0
        precisions = [shown[logits[:, i] >= x].mean() for x in logits[shown, i]]
        expected.append(np.mean(precisions))
    assert np.allclose(asl_model.average_precision(logits, labels), expected)


def test_rates_count_labels_above_the_threshold():
    logits = np.array([[2.0, -2.0, 0.0], [0.1, 3.0, -1.0]])
    labels = np.array([[1, 0, 1], [0, 1, 0]])
    numbers = asl_model.measure(logits, labels, 0.5)
    assert numbers["OP"] == numbers["OR"] == wilson(2, 3), "0.5 is not above 0.5"
    assert asl_model.measure(logits, labels, 0.8)["OP"] == wilson(2, 2)


def test_scenes_have_labels_seeds_and_disjoint_splits(data):
    images, labels = asl_model.load_scenes(130, 64, SEED, "mnist", data)
    assert images.shape == (130, 3, 64, 64)
    assert images.dtype == labels.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert 1 <= labels.sum(1).min() < labels.sum(1).max() <= 5
    again = asl_model.load_scenes(70, 64, SEED, "mnist", data)
    assert torch.equal(again[0], images[:70])
    assert torch.equal(again[1], labels[:70])
    assert not torch.equal(
        asl_model.load_scenes(1, 64, SEED + 1, "mnist", data)[0], images[:1]
    )
    splits = ("train", "validation", "test")
    parts = [asl_model.scene_digits("mnist", data, split)[1] for split in splits]
    assert [len(part) for part in parts] == [37, 3, 20]
    assert torch.equal(torch.cat(parts[:2]), common.load_mnist(data)[0])


def test_a_scene_shows_the_digits_of_its_labels(monkeypatch):
    only = torch.zeros(10, 1, 28, 28)  # no other digit leaves a mark
    only[7, 0, 13:15, 13:15] = 1
    found = Mock(return_value=("mnist", only, torch.arange(10)))
    monkeypatch.setattr(asl_model, "scene_digits", found)
    images, labels = asl_model.load_scenes(100, 64, SEED)
    marked = (images - images[:, :, :1, :1]).abs().amax((1, 2, 3)) > 0.1
    assert torch.equal(marked, labels[:, 7] == 1)


def test_every_20th_photo_is_held_out_whatever_the_limit(data):
    """Whatever the seed; the labels are in the order that is asked for."""
    args = coco_flags(data)
    args.image_size = 32
    whole, labels, names, _ = asl_model.load_data(args, 32, "train2017")
    for seed, limit in ((0, None), (3, 9)):
        args.seed = seed
        args.limit = limit
        train, held_out = asl_model.training_data(args, names)
        assert held_out[0].paths == whole.paths[:1]
        n = len(train[0])
        assert n == (6 if limit else 11)
        assert train[0].paths == whole.paths[1 : n + 1]
        assert torch.equal(train[1], labels[1 : n + 1])
    args.limit = None
    reverse = asl_model.load_data(args, 32, "train2017", names[::-1])
    assert torch.equal(reverse[1], labels.flip(1))
    with refused("has other labels than", code=2):
        asl_model.load_data(args, 32, "val2017", [*names[1:], "yeti"])


def test_augmentation_is_cutout_then_randaugment(monkeypatch):
    """One seed an image, the same in any batch; the global random stream stays where it was."""
    images = torch.full((40, 3, 64, 64), 64 / 255)
    seeds = [1000 * SEED + i for i in range(40)]
    state = torch.get_rng_state()
    augmented = asl_model.augment(images, seeds)
    assert torch.equal(asl_model.augment(images[7:9], seeds[7:9]), augmented[7:9])
    assert torch.equal(torch.get_rng_state(), state)

    def halve(image):
        return image.point([x // 2 for x in range(256)] * 3)

    monkeypatch.setattr(asl_model, "RandAugment", Mock(return_value=halve))
    cut = (asl_model.augment(images, seeds) * 255).round()
    assert (augmented * 255 - 2 * cut).abs().max() > 3, "RandAugment's doing"
    assert cut.max() <= 127, "Cutout comes first, so that its colours are halved, too"
    squares = (cut != 32).any(1)
    heights = squares.any(2).sum(1)
    widths = squares.any(1).sum(1)
    assert heights.max() == widths.max() == 32
    assert torch.equal(squares.sum((1, 2)), heights * widths)
    assert len({x.numpy().tobytes() for x in cut}) == 40


# --- training


SMALL = "--train --arch tresnet_s --image-size 32 --batch-size 4 --epochs 3"
TRAINED = f"{SMALL} --threshold 0.01 --seed {2**32}"


def classifier(data, out, flags):
    """What `asl_model.main` returns for these flags, in one text, on the made-up photos."""
    return asl_model.main(
        [*shlex.split(flags), f"--data={data}", f"--out={out}", "--device=cpu"]
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The record of a small training. It reads train2017, half a minute's work, once."""
    read = Mock(wraps=common.load_coco)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_coco", read)
        record = classifier(data, tmp_path_factory.mktemp("trained"), TRAINED)
    assert [call.args[3] for call in read.call_args_list].count("train2017") == 1
    return record


@pytest.fixture
def saved(monkeypatch):
    """Copies of all that torch.save is given; a training saves after every step."""
    copies = []
    save = torch.save

    def copy_and_save(content, file):
        copies.append(copy.deepcopy(content))
        save(content, file)

    monkeypatch.setattr(torch, "save", copy_and_save)
    monkeypatch.setattr(asl_model, "SAVE_EVERY", 1)
    return copies


@pytest.mark.parametrize("flags", ["--resume", TRAINED])
def test_a_stopped_training_resumes_to_the_same_bits(
    trained, data, tmp_path, monkeypatch, flags
):
    """By the same command, or --resume alone. A finished one is never repeated."""
    assert (trained["dataset_size"], trained["val2017"]["n"]) == (11, 3)
    predict = asl_model.predict
    stop = Mock(wraps=predict, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(asl_model, "EVALUATIONS", 10)
    monkeypatch.setattr(asl_model, "predict", stop)
    with pytest.raises(KeyboardInterrupt):
        classifier(data, tmp_path, TRAINED)
    assert not list(tmp_path.glob("*.pth")), "no network that looks like a finished one"
    assert torch.load(tmp_path / "checkpoint.pt")["settings"]["device"] == "cpu"
    monkeypatch.setattr(asl_model, "predict", predict)
    assert classifier(data, tmp_path, flags)["val2017"] == trained["val2017"]
    whole = torch.load(trained["settings"]["out"] / "checkpoint.pt")
    resumed = torch.load(tmp_path / "checkpoint.pt")
    assert whole["network"]["body.conv1.1.running_mean"].any(), "norms learn statistics"
    for part in ("network", "average", "model"):
        for name, x in whole[part].items():
            assert torch.equal(resumed[part][name], x), name
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    assert [entry["step"] for entry in history] == list(range(1, 7))
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    assert classifier(data, tmp_path, "--resume")["val2017"] == trained["val2017"]
    flags = "--lr 0.1, --limit 9, --seed 1, --batch-size 2, --epochs 9, --threshold 0.5"
    for flag in flags.split(", "):
        with refused(flag.split()[1], "--force", code=2):
            classifier(data, tmp_path, f"--resume {flag}")
    # a forced training that stops at once leaves none to resume
    monkeypatch.setattr(torch.optim.Adam, "step", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        classifier(data, tmp_path, f"{TRAINED} --force --lr 0.1")
    with pytest.raises(SystemExit, match="2"):
        classifier(data, tmp_path, "--resume")


def test_a_training_is_not_taken_for_one_of_other_photos(
    trained, data, tmp_path, monkeypatch
):
    """Of other classes, whose names its network would get, or of more photos. Those that measure
    it need its classes, too, which is said before the training."""
    folder = shutil.copytree(data / "coco", tmp_path / "coco") / "annotations"
    out = shutil.copytree(trained["settings"]["out"], tmp_path / "out")
    before = contents(out)
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    train, val = sorted(folder.iterdir())
    text = train.read_text()
    val.write_text(val.read_text().replace("name 60", "donut"))
    with refused("has other labels than", code=2):
        classifier(tmp_path, tmp_path / "new", TRAINED)
    train.write_text(text.replace("name 60", "donut"))
    with refused("class 54 name 60, not donut", "--force", code=2):
        classifier(tmp_path, out, TRAINED)
    content = json.loads(text)
    content["annotations"].append({"image_id": 3, "category_id": 60})
    train.write_text(json.dumps(content))
    shutil.copy(data / "coco" / "annotations" / val.name, val)
    with refused("training images 11, not 12", "--force", code=2):
        classifier(tmp_path, out, TRAINED)
    assert contents(out) == before


def test_a_training_from_weights_has_their_architecture(data, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(asl_model.new_network("tresnet_s", 7).state_dict(), path)
    flags = f"--train --dataset coco --data {quoted(data)} --weights {quoted(path)}"
    assert asl_model.parse_args(shlex.split(flags)).arch == "tresnet_s"
    torch.save({"a": torch.zeros(2)}, path)
    assert asl_model.parse_args(shlex.split(flags)).arch == "tresnet_m"


def test_training_is_one_cycle_and_averages_weights(data, tmp_path, monkeypatch, saved):
    """Of ten networks it keeps the best; the loss is ASL with gamma- 4, gamma+ 0 on photos."""
    scores = [0.3, 0.5, 0.9, 0.2, 0.9, 0.4, 0.4, 0.4, 0.4, 0.4, 0]
    row = asl_model.ARCHITECTURES["tresnet_s"]._replace(blocks=(1, 1, 1, 1), features=256)
    monkeypatch.setitem(asl_model.ARCHITECTURES, "tresnet_s", row)
    judge = Mock(side_effect=[np.array([score]) for score in scores])
    monkeypatch.setattr(asl_model, "EVALUATIONS", 10)
    monkeypatch.setattr(asl_model, "average_precision", judge)
    asl = Mock(wraps=asl_model.AsymmetricLoss)
    monkeypatch.setattr(asl_model, "AsymmetricLoss", asl)
    classifier(data, tmp_path, f"{SMALL} --epochs 10 --lr 0.01")
    asl.assert_called_once_with(4, 0)
    steps = saved[:20]
    rates = [state["adam"]["param_groups"][0]["lr"] for state in steps]
    shares = np.arange(1, 21) / 21
    cycle = np.minimum(shares / 0.2, (1 - shares) / 0.8)
    assert rates == pytest.approx(0.01 * np.sin(np.pi / 2 * cycle) ** 2)
    for i in range(1, 20):
        decay = min(0.99, 1 - 8 / (i + 9))
        for name, x in steps[i]["average"].items():
            new = steps[i]["network"][name]
            expected = steps[i - 1]["average"][name] * decay + new * (1 - decay)
            assert torch.allclose(x, expected, atol=1e-5), name
    for name, x in saved[-1]["model"].items():
        assert torch.equal(x, steps[9]["average"][name]), "the last of equals"
    assert "network" not in saved[-1]


def test_each_photo_comes_once_an_epoch_in_another_view():
    args = argparse.Namespace(dataset="coco", batch_size=2, epochs=3, seed=SEED)
    args.arch = "tresnet_m"
    labels = torch.arange(8.0)
    views = set()
    orders = set()
    batches = list(asl_model.training_batches(args, photo_like(8, 64), labels, 0))
    for epoch in range(3):
        images, order = zip(*batches[4 * epoch : 4 * epoch + 4], strict=True)
        order = torch.cat(order)
        orders.add(tuple(order.tolist()))
        views.add(torch.cat(images)[order == 3].numpy().tobytes())
        assert torch.equal(order.sort().values, labels)
    assert len(views) == len(orders) == 3


def test_resnets_see_photos_as_they_are_or_mirrored():
    args = argparse.Namespace(dataset="coco", batch_size=2, epochs=8, seed=SEED)
    args.arch = "resnet18"
    images = photo_like(4, 32)
    mirrored = []
    for batch, rows in asl_model.training_batches(args, images, torch.arange(4), 0):
        for seen, photo in zip(batch, images[rows], strict=True):
            mirrored.append(torch.equal(seen, photo.flip(2)))
            assert mirrored[-1] or torch.equal(seen, photo)
    assert len(mirrored) == 32
    assert 0 < sum(mirrored) < 32


def test_a_photo_is_mirrored_in_a_random_half_of_the_epochs():
    """The lowest bit of the seeds was once used: the same in most epochs, or the opposite."""
    args = argparse.Namespace(dataset="coco", batch_size=500, epochs=4, seed=SEED)
    args.arch = "resnet18"
    images = torch.arange(2.0).expand(1000, 3, 1, 2).clone()
    mirrored = torch.zeros(4, 1000)
    for i, (batch, rows) in enumerate(
        asl_model.training_batches(args, images, torch.arange(1000), 0)
    ):
        mirrored[i // 2, rows] = batch[:, 0, 0, 0]
    assert (mirrored.mean(1) - 0.5).abs().max() < 0.1
    for epoch in range(1, 4):
        for earlier in range(epoch):
            same = (mirrored[epoch] == mirrored[earlier]).float().mean()
            assert abs(same - 0.5) < 0.1


@pytest.mark.parametrize("arch", ["resnet18", "tresnet_s"])
def test_training_goes_on_from_weights_of_its_kind(tmp_path, arch):
    """The last layer too, if the labels are the same; else it starts anew."""
    state = asl_model.new_network(arch, 2).state_dict()
    content = {"model": state, "norm": "batch norm", "idx_to_class": {0: "cat", 1: "dog"}}
    torch.save(content, tmp_path / "file.pth")
    args = argparse.Namespace(arch=arch, weights=tmp_path / "file.pth")
    network, head_epochs = asl_model.starting_network(args, ["cat", "dog"])
    assert head_epochs == 0
    for name, x in network.state_dict().items():
        assert torch.equal(x, state[name]), name
    assert all(p.requires_grad for p in network.parameters())
    network, head_epochs = asl_model.starting_network(args, ["a", "b", "c"])
    assert head_epochs == 1
    assert network(photo_like(2, 32)).shape == (2, 3)
    assert torch.equal(next(network.parameters()), next(iter(state.values())))


def test_resnets_start_from_imagenets_published_weights(tmp_path, monkeypatch):
    """Downloaded with the hash in their name."""
    download = Mock(side_effect=common.Failure("not downloaded"))
    monkeypatch.setattr(common, "download", download)
    args = argparse.Namespace(arch="resnet18", weights=None, data=tmp_path)
    with refused("not downloaded"):
        asl_model.starting_network(args, ["cat"])
    url, folder = download.call_args.args
    assert url.endswith("/resnet18-f37072fd.pth")
    assert folder == tmp_path


def test_a_new_last_layer_first_learns_alone(data, tmp_path, monkeypatch, saved):
    """For one epoch; then all weights learn, but not the statistics of batch norm."""

    def small_resnet(arch, num_classes):
        return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes)

    monkeypatch.setattr(torchvision.models, "get_model", small_resnet)
    start = asl_model.new_network("resnet18", 1000).state_dict()
    torch.save(start, tmp_path / "imagenet.pth")
    flags = f"--arch resnet18 --weights {quoted(tmp_path / 'imagenet.pth')}"
    small = "--train --dataset coco --image-size 32 --batch-size 4 --epochs 2"
    classifier(data, tmp_path / "out", f"{small} {flags}")
    states = saved[1:5]
    assert [state["steps"] for state in states] == [1, 2, 3, 4]
    for state in states:
        for name, x in state["network"].items():
            is_trained = "fc." in name or state["steps"] > 2
            if "running" in name or not is_trained:
                assert torch.equal(x, start[name]), name
            elif x.is_floating_point() and "fc." not in name:
                assert not torch.equal(x, start[name]), name
    rates = [state["adam"]["param_groups"][0]["lr"] for state in states]
    rises = np.array([2 / 3, 1 / 3]) / 0.8  # of both steps, behind the peak
    cycle = 1e-4 * np.sin(np.pi / 2 * rises) ** 2
    assert rates == pytest.approx([1e-3, 5e-4, *cycle])


def test_a_training_that_cannot_work_says_what_to_change(data, tmp_path):
    with refused("diverged", "--lr"):
        classifier(data, tmp_path, f"{SMALL} --lr 1e8")
    assert not (tmp_path / "tresnet_s-coco.pth").exists()
    with refused("--batch-size", "11 training images", code=2):
        classifier(data, tmp_path / "few", f"{SMALL} --batch-size 99")


def test_photos_are_learnt_by_heart_and_their_labels_told(data, tmp_path, monkeypatch):
    """Photos of one colour, as they are; the record of the training stays."""

    def as_they_are(images, seeds):
        return images

    monkeypatch.setattr(asl_model, "augment", as_they_are)
    classifier(data, tmp_path, f"{SMALL} --batch-size 6 --epochs 40")
    before = (tmp_path / "results.json").read_text()
    weights = f"--weights {quoted(tmp_path / 'tresnet_s-coco.pth')}"
    read = Mock(wraps=asl_model.read_batches)
    monkeypatch.setattr(asl_model, "read_batches", read)
    flags = f"--evaluate {weights} --split train2017 --batch-size 5"
    seen = classifier(data, tmp_path, flags)
    assert (seen["train2017"]["mAP"], seen["train2017"]["n"]) == (1, 12)
    assert [len(rows) for rows in read.call_args.args[1]] == [5, 5, 2]
    photo = data / "coco" / "train2017" / "0.png"
    flags = f"--image {quoted(photo)} {weights} --threshold 0.3"
    told = classifier(data, tmp_path, flags)["labels"]
    assert next(iter(told)) == "name 60"
    assert min(told.values()) > 0.3
    assert (tmp_path / "results.json").read_text() == before


def test_a_finished_network_without_checkpoint_is_not_replaced(data, tmp_path):
    path = tmp_path / "tresnet_s-coco.pth"
    path.touch()
    with refused(path, "--out", "--force", code=2):
        classifier(data, tmp_path, SMALL)


def test_the_scenes_classifier_is_cached_by_its_digits(data, tmp_path, monkeypatch):
    """Offline, glyphs have a folder of their own."""
    monkeypatch.chdir(tmp_path)
    sizes = {"train": 64, "validation": 8, "test": 8}
    monkeypatch.setattr(asl_model, "SCENES", sizes)
    row = asl_model.ARCHITECTURES["tresnet_s"]._replace(epochs=1, image_size=32)
    monkeypatch.setitem(asl_model.ARCHITECTURES, "tresnet_s", row)
    path = asl_model.default_weights("scenes", data, CPU)
    assert path == Path("runs/scenes_classifier/mnist/tresnet_s-scenes.pth")
    network, names = asl_model.load_asl(path)
    assert network.image_size == 32
    assert names == list("0123456789")
    with monkeypatch.context() as patch:
        patch.setattr(asl_model, "train", None)
        assert asl_model.default_weights("scenes", data, CPU) == path
    path.unlink()
    moved = shutil.copytree(data, tmp_path / "moved")
    asl_model.scene_digits.cache_clear()
    asl_model.default_weights("scenes", moved, CPU)
    assert path.exists(), "a training that was stopped is continued"
    record = json.loads((path.parent / "results.json").read_text())
    assert record["settings"]["data"] == str(moved)
    own = Path("runs/asl_model/tresnet_s-scenes.pth")
    own.parent.mkdir()
    shutil.copy(path, own)
    assert asl_model.default_weights("scenes", data, CPU) == own, "one's own comes first"
    own.unlink()
    digits = Mock(return_value=("glyphs", *common.glyphs(48)))
    monkeypatch.setattr(common, "load_digits", digits)
    uncached = asl_model.scene_digits.__wrapped__  # no other test may see these digits
    monkeypatch.setattr(asl_model, "scene_digits", uncached)
    path = asl_model.default_weights("scenes", "elsewhere", CPU)
    assert path.parent.name == "glyphs"


def test_coco_weights_are_own_ones_then_published_then_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asl_model, "ZOO", NOWHERE)
    with refused("--train --dataset coco --arch resnet18", "35 minutes"):
        asl_model.default_weights("coco", tmp_path, CPU)
    published = tmp_path / "MS_COCO_TRresNet_M_224_81.8.pth"
    published.touch()
    assert asl_model.default_weights("coco", tmp_path, CPU) == published
    out = Path("runs/asl_model")
    out.mkdir(parents=True)
    for age, arch in enumerate(["resnet18", "tresnet_m", "resnet50"]):
        (out / f"{arch}-coco.pth").touch()
        os.utime(out / f"{arch}-coco.pth", (10**9, 10**9 - age))
    newest = out / "resnet18-coco.pth"
    assert asl_model.default_weights("coco", tmp_path, CPU) == newest


# --- weeks 3 to 5: the attacks


def square_loss(logits, targets):
    """One value per image; the logits of `nn.Flatten` are the pixels."""
    return (logits - 0.5).square().sum(1)


def descend(images, targets, weight, reached, momentum):
    """PGD image by image, as Madry et al. 2018 write it, for |weight @ x - 0.5|^2."""
    moved_images = []
    for x, target in zip(images.flatten(1), targets, strict=True):
        moved = x
        direction = 0
        for _ in range(15):
            logits = weight @ moved
            if reached(logits, target):
                break
            gradient = 2 * (logits - 0.5) @ weight
            direction = momentum * direction + gradient / gradient.abs().sum()
            moved = (moved - 0.1 * direction.sign()).clamp(x - 0.4, x + 0.4).clamp(0, 1)
        moved_images.append(moved)
    return torch.stack(moved_images)


@pytest.mark.parametrize("momentum", [0, 0.75])
@pytest.mark.parametrize("stop", ["never", "top class", "callable"])
def test_pgd_is_the_papers_loop_for_each_image(momentum, stop):
    stream = random_stream()
    images = torch.rand(9, 1, 2, 2, generator=stream, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=stream, dtype=torch.float64)
    targets = torch.arange(9) % 3

    def model(x):
        return x.flatten(1) @ weight.T

    def low_logit(logits, target):
        return logits[..., 0] < 0.5 * target

    def reached(logits, target):
        if stop == "callable":
            return low_logit(logits, target)
        return stop == "top class" and logits.argmax() == target

    early_stop = {"never": False, "top class": True, "callable": low_logit}[stop]
    options = {"early_stop": early_stop, "momentum": momentum}
    found = pgd_attack.pgd(model, images, targets, square_loss, 0.4, 0.1, 15, **options)
    truth = descend(images, targets, weight, reached, momentum)
    assert torch.allclose(found.flatten(1), truth, atol=1e-9)


def test_the_goal_is_the_top_class_or_all_wanted_labels():
    wanted = torch.tensor([[1.0, 0, 1]] * 2)
    logits = torch.tensor([[2.0, -1, 0.5], [-1, -2, 3]])
    assert pgd_attack.goal_reached(logits, wanted).tolist() == [True, False]
    assert pgd_attack.goal_reached(logits, torch.tensor([0, 1])).tolist() == [True, False]


@pytest.mark.parametrize("clip", [(0, 1), (-0.5, 2)])
def test_pgd_stays_within_eps_and_clip_from_any_start(clip):
    torch.manual_seed(SEED)
    images = clip[0] + (clip[1] - clip[0]) * torch.rand(200, 1, 2, 2)
    inputs = (nn.Flatten(), images, torch.zeros(200), square_loss)
    results = []
    for steps in (0, 0, 5):
        moved = pgd_attack.pgd(*inputs, 0.1, 0.07, steps, random_start=True, clip=clip)
        results.append(moved)
        change = (moved.double() - images.double()).abs().max()
        assert 0.09 < change <= float(np.float32(0.1)), "not even by rounding"
        assert clip[0] <= moved.min() <= moved.max() <= clip[1]
    assert not torch.equal(results[0], results[1])


def test_what_pgd_cannot_attack_is_refused_with_what_to_do():
    images = torch.rand(2, 1, 2, 2)
    targets = torch.zeros(2)
    flatten = nn.Flatten()
    for wrong in (255 * images, images - 1, images / 0):
        with pytest.raises(ValueError, match=r"give them in \[0, 1\], and normalise"):
            pgd_attack.pgd(flatten, wrong, targets, square_loss)
    for size in ("eps", "alpha", "steps"):
        with pytest.raises(ValueError, match="negative"):
            pgd_attack.pgd(flatten, images, targets, square_loss, **{size: -1})
    with pytest.raises(ValueError, match="2 images with 3 targets"):
        pgd_attack.pgd(flatten, images, torch.zeros(3), square_loss)

    def infinite_once(x, once=iter([torch.inf])):  # noqa: B008
        return x.flatten(1) + next(once, 0)

    def detached(x, weight=torch.ones(2, 4, requires_grad=True)):  # noqa: B008
        return F.linear(x.detach().flatten(1), weight)

    with refused("not finite"):
        pgd_attack.pgd(infinite_once, images, targets, square_loss)
    for network in (torch.detach, detached):
        with refused("no gradient", "detach"):
            pgd_attack.pgd(network, images, targets, square_loss)
    # but no images, and images that rounding moved out of [0, 1], are attacked
    none = torch.rand(0, 1, 2, 2)
    assert pgd_attack.pgd(flatten, none, targets[:0], square_loss).shape == none.shape
    above = torch.full_like(images, 1 + 1e-7)
    assert pgd_attack.pgd(flatten, above, targets, square_loss).max() < 1


def small_network(classes=3):
    """A network with everything that has a mode, in training mode, its norm used to photos."""
    torch.manual_seed(SEED)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
    network[-1].weight.data.mul_(5)
    for i in range(20):
        network(photo_like(16, 12, i))
    return network


def attack_photos(model, loss=F.cross_entropy):
    """Three steps of PGD for four photos."""
    targets = torch.tensor([0, 1, 2, 0])
    return pgd_attack.pgd(model, photo_like(4, 12), targets, loss, steps=3)


def test_pgd_leaves_the_model_as_it_was():
    network = small_network()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    state = copy.deepcopy(network.state_dict())
    moved = attack_photos(network)
    with pytest.raises(ZeroDivisionError):
        attack_photos(network, Mock(side_effect=ZeroDivisionError))
    assert not moved.requires_grad
    assert not torch.equal(moved, photo_like(4, 12))
    assert [module.training for module in network] == [True, False, *[True] * 5]
    assert [p.requires_grad for p in network.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
    assert torch.equal(attack_photos(network.eval()), moved), "dropout was on"


def test_pgd_works_in_other_modes_and_on_in_place_models():
    network = small_network().eval()
    truth = attack_photos(network)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attack_photos(network), truth)

    def centred(x):
        return network(x - 0.5)

    def centred_in_place(x):
        return network(x.sub_(0.5))

    assert torch.equal(attack_photos(centred_in_place), attack_photos(centred))


def random_tresnet(arch):
    """A TResNet whose norms do something."""
    torch.manual_seed(SEED)
    network = asl_model.tresnet(arch, 10).eval()
    for module in network.modules():
        if isinstance(module, asl_model.NormAct):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.2)
    return network


def test_gradient_error_is_near_0_for_right_networks():
    tresnet = random_tresnet("tresnet_s")
    networks = [small_network(), tresnet, asl_model.fold(tresnet), torch.square]
    digits = acwgan.evaluation_network()
    assert pgd_attack.gradient_error(digits, photo_like(1, 28)[:, :1]) < 0.01
    for name in ("resnet18", "squeezenet1_1", "mobilenet_v3_small"):
        networks.append(torchvision.models.get_model(name))
    for network in networks:  # the rounding is below 1e-5, a kink that is met costs more
        assert pgd_attack.gradient_error(network, photo_like(1, 32)) < 0.01


def test_gradient_error_tells_wrong_and_random_networks():
    """Near 1 and NaN; NaN also where rounding drowns the slopes, as in a float32 output."""
    tresnet = random_tresnet("tresnet_s")

    def detached(x):
        return x * x.detach()

    def straight_through(x):
        rounded = (8 * x).round() / 8
        return x + (rounded - x).detach()

    def flat(x):
        return 1000 + 1e-9 * x

    wrong = asl_model.inplace_abn_1_0_12(tresnet)
    folded = asl_model.inplace_abn_1_0_12(asl_model.fold(tresnet))
    for model in (wrong, folded, detached, straight_through):
        assert pgd_attack.gradient_error(model, photo_like(1, 32)) > 0.3

    def square_root(x):
        return torch.where(x > 2, (0 * x).sqrt(), x)

    assert pgd_attack.gradient_error(square_root, photo_like(1, 8)) == np.inf
    for model in (F.dropout, flat, torch.Tensor.float):
        assert np.isnan(pgd_attack.gradient_error(model, photo_like(1, 8)))


def test_gradient_error_leaves_a_half_network_as_it_was():
    """One that cannot be copied, so that its own weights are converted, and restored."""
    network = small_network().half()
    network.lock = threading.Lock()
    state = copy.deepcopy(network.state_dict())
    assert pgd_attack.gradient_error(network, photo_like(1, 12)) < 1e-3
    assert network.training
    for name, x in network.state_dict().items():
        assert x.dtype == state[name].dtype
        assert torch.equal(x, state[name])


def test_gradient_error_leaves_a_network_that_caches_as_it_was():
    class Positions(nn.Module):
        codes = None

        def forward(self, x):
            if self.codes is None:
                self.codes = torch.linspace(0, 1, x.shape[-1]).to(x)
            return F.linear((x * self.codes).flatten(1), torch.ones(3, 432).to(x))

    network = Positions()
    assert pgd_attack.gradient_error(network, photo_like(1, 12)) < 1e-3
    assert network.codes is None


def test_the_losses_are_their_formulas():
    stream = random_stream()
    logits = 3 * torch.randn(6, 5, dtype=torch.float64, generator=stream)
    wanted = (torch.rand(6, 5, generator=stream) > 0.5).double()
    x = logits.numpy()
    w = wanted.numpy()
    p = 1 / (1 + np.exp(-x))
    softmax = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    sign = 2 * w - 1
    past = sign * (x - np.log(0.8 / 0.2))
    formulas = {
        "softmax-ce": -sign[:, 2] * np.log(softmax[:, 2]),
        "bce": -(w * np.log(p) + (1 - w) * np.log(1 - p)).mean(1),
        "softmax-bce": -(w * np.log(softmax) + (1 - w) * np.log(1 - softmax)).mean(1),
        "margin": np.maximum(0, [[0.2, 0.2, 1, 0.2, 0.2]] - past).sum(1),
    }
    assert set(formulas) == set(pgd_attack.LOSSES)
    for name, values in formulas.items():
        ours = pgd_attack.LOSSES[name](logits, wanted, 2, 0.8).numpy()
        assert np.allclose(ours, values), name


def test_softmax_bce_has_torchs_gradient_also_where_p_is_0_or_1():
    stream = random_stream()
    logits = 3 * torch.randn(6, 5, generator=stream)
    wanted = (torch.rand(6, 5, generator=stream) > 0.5).float()
    huge = torch.tensor([[900.0, 0, -900, 3, 1]]) * wanted
    for values in (logits, huge):
        ours = values.clone().requires_grad_()
        theirs = values.clone().requires_grad_()
        pgd_attack.softmax_bce(ours, wanted).sum().backward()
        loss = F.binary_cross_entropy(theirs.softmax(1), wanted, reduction="none")
        loss.mean(1).sum().backward()
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def labels_task(target=2, direction="flip", bf16=False):
    return pgd_attack.Task(list("012345"), target, direction, 0.5, bf16)


def test_restarts_go_on_with_what_is_left_at_half_the_step(monkeypatch):
    """The first try fails for images 1 and 2, the second for image 2, judged in float32."""
    images = torch.full((3, 3, 2, 2), 0.5)
    calls = []

    def attempt(network, images, wanted, loss, **settings):
        calls.append({**settings, "bf16": torch.is_autocast_enabled("cpu")})
        number = len(calls)
        succeed = {1: [True, False, False], 2: [True, False], 3: [False]}[number]
        assert len(succeed) == len(images) == len(wanted)
        levels = torch.where(torch.tensor(succeed), 1.0, 0.1 * number)
        return levels[:, None, None, None].expand(-1, 3, 2, 2)

    def network(x):
        logits = -torch.ones(len(x), 6)
        logits[:, 2] = x[:, 0, 0, 0] - 0.9
        assert not torch.is_autocast_enabled("cpu")
        return logits

    monkeypatch.setattr(pgd_attack, "pgd", attempt)
    row = pgd_attack.Row("x", "margin", 0.03, alpha=0.1, steps=8, restarts=2)
    logits = network(images)
    task = labels_task(bf16=True)
    result = pgd_attack.attack_labels(network, images, logits, row, task)
    levels = result[:, 0, 0, 0].tolist()
    assert levels == pytest.approx([1, 1, 0.3])
    starts = [call["start"][-1, 0, 0, 0].item() for call in calls]
    assert starts == pytest.approx([0.5, 0.1, 0.2]), (
        "each goes on from the last one's end"
    )
    assert [call["alpha"] for call in calls] == [0.1, 0.05, 0.025]
    assert [call["momentum"] for call in calls] == [0, 0.75, 0.75]
    assert {(call["eps"], call["steps"]) for call in calls} == {(0.03, 8)}
    assert [call["bf16"] for call in calls] == [True, False, False], (
        "what is done in bfloat16 but not in float32 would never move again"
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_softmax_ce_raises_a_target_that_is_nearly_certain(bf16):
    """In bfloat16, its probability is 1, so that its gradient would be 0."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 6))
    with torch.no_grad():
        network[1].weight.copy_(20 * torch.eye(6))
        network[1].bias.fill_(-10)
    images = torch.full((1, 1, 1, 6), 0.4)
    images[..., 2] = 0.8
    row = pgd_attack.Row("x", "softmax-ce", 0.1, alpha=0.02, steps=10)
    task = labels_task(direction="on", bf16=bf16)
    result = pgd_attack.attack_labels(network, images, network(images), row, task)
    expected = torch.full_like(images, 0.3)
    expected[..., 2] = 0.9
    assert torch.allclose(result, expected, atol=1e-6)


def test_noise_is_uniform_within_eps():
    torch.manual_seed(SEED)
    images = torch.full((8, 3, 16, 16), 0.5)
    row = pgd_attack.Row("noise", None, 0.3)
    noise = pgd_attack.attack_labels(None, images, None, row, labels_task()) - images
    assert 0.29 < noise.abs().max() <= 0.3
    assert noise.abs().mean().item() == pytest.approx(0.15, rel=0.1)


@pytest.mark.parametrize("direction", ["on", "off", "flip"])
def test_labels_are_wanted_and_counted_as_numpy_does(direction):
    before, after, truth = np.random.default_rng(SEED).random((3, 50, 6)) < 0.4
    after[:20] = before[:20]
    after[:10, 3] = ~after[:10, 3]
    on = before[:, 3]
    wanted = before.copy()
    wanted[:, 3] = {"on": True, "off": False, "flip": ~on}[direction]
    attacked = wanted[:, 3] != on
    task = labels_task(3, direction)
    logits = torch.from_numpy(before).float() - 0.5
    logits_after = torch.from_numpy(after).float() - 0.5
    truth = torch.from_numpy(truth)
    assert pgd_attack.wanted_labels(logits, task).tolist() == wanted.tolist()
    numbers = pgd_attack.count_labels(logits, logits_after, truth, task)
    others = [0, 1, 2, 4, 5]
    correct = (before & truth.numpy().astype(bool))[:, others]
    old = before[:, others]
    new = after[:, others]
    lost = (old & ~new).sum(1)
    won = (new & ~old).sum(1)
    switched = (on != after[:, 3]) & attacked
    exact = switched & (lost + won == 0)
    n = attacked.sum()
    assert numbers["target_switched"] == wilson(switched.sum(), n)
    assert numbers["exact"] == wilson(exact.sum(), n)
    assert numbers["others_lost"]["rate"] == pytest.approx(lost.sum() / old.sum())
    assert numbers["others_new"] == won.sum()
    wronged = (correct & ~new).sum()
    assert numbers["correct_lost"]["rate"] == pytest.approx(wronged / correct.sum())
    assert numbers["labels_ratio"]["rate"] == pytest.approx(after.sum() / before.sum())
    assert numbers["target_ratio"]["rate"] == pytest.approx(after[:, 3].sum() / on.sum())
    for when, labels in {"actual": truth, "before": before, "after": after}.items():
        assert numbers[f"target_{when}"] == labels[:, 3].sum()
        assert numbers[f"labels_{when}"] == labels.sum()


def test_no_image_to_change_is_no_rate():
    """And a logit on the threshold is absent."""
    logits = torch.tensor([[0.0, 1, -1, 0, 0, 0]])
    after = torch.tensor([[0.0, 1, 1, 0, 0, 0]])
    numbers = pgd_attack.count_labels(logits, after, None, labels_task(2, "on"))
    assert numbers["labels_before"] == 1
    assert numbers["exact"]["rate"] == 1
    numbers = pgd_attack.count_labels(logits, logits, None, labels_task(1, "on"))
    assert [numbers["exact"], numbers["others_lost"]] == [None, None]


def test_rates_over_photos_resample_photos():
    """Labels that are lost photo by photo: the interval is that of 20 photos, not 2,000 labels."""
    hits = torch.tensor([100] * 10 + [0] * 10)
    totals = torch.full((20,), 100)
    rate = pgd_attack.rate_over_photos(hits, totals)
    assert (rate["rate"], rate["n"]) == (0.5, 2000)
    deviation = 1.96 * (0.25 / 20) ** 0.5
    assert rate["low"] == pytest.approx(0.5 - deviation, abs=0.06)
    assert rate["high"] == pytest.approx(0.5 + deviation, abs=0.06)
    assert pgd_attack.rate_over_photos(0 * hits, 0 * hits) is None
    rate = pgd_attack.rate_over_photos(0 * hits, totals)
    assert (rate["rate"], rate["low"]) == (0, 0)
    assert rate["high"] == wilson(0, 20)["high"], "no interval of width 0"
    rate = pgd_attack.rate_over_photos(totals, totals)
    assert (rate["rate"], rate["high"]) == (1, 1)
    assert rate["low"] == wilson(20, 20)["low"], "no interval of width 0"
    # a sample without the one photo that has labels is left out
    one = torch.tensor([0, 0, 1, 0, 0])
    rate = pgd_attack.rate_over_photos(3 * one, 4 * one)
    assert rate == {"rate": 0.75, "low": 0.75, "high": 0.75, "n": 4}


def test_the_rows_of_weeks_3_and_5_are_those_on_record():
    record = {"WEEK_3": {(None, "right", 80 / 255)}, "WEEK_5": {(None, "right", 0.3)}}
    for gradient in (pgd_attack.INPLACE_ABN, "right"):
        for loss in ("softmax-ce", "bce"):
            record["WEEK_3"].add((loss, gradient, 0.6))
            record["WEEK_5"].add((loss, gradient, 0.3))
        record["WEEK_5"].add(("softmax-bce", gradient, 0.3))
    record["WEEK_3"].add((pgd_attack.ROTATED, pgd_attack.INPLACE_ABN, 0.6))
    record["WEEK_5"].add((pgd_attack.ROTATED, pgd_attack.INPLACE_ABN, 0.3))
    for week, settings in record.items():
        rows = getattr(pgd_attack, week)
        assert {(row.loss, row.gradient, row.eps) for row in rows} == settings
        assert len({row.name for row in rows}) == len(rows) == len(settings)
        for row in rows:
            assert (row.alpha, row.early_stop) == (2 / 255, False)
            assert row.steps == (40 if row.loss else 0)
            is_wrong = row.gradient != "right"
            assert row.name.endswith(("-inplace-abn", "rotated")) == is_wrong


SCENES_ATTACK = {"dataset": "scenes", "target": "8", "eps": 0.1, "direction": "flip"}
PHOTOS_ATTACK = {"target": "person", "eps": 8 / 255, "direction": "flip", "restarts": 4}
WEEK_5_ATTACK = {"target": "dining table", "eps": 8 / 255, "direction": "on"}
DIGITS_ATTACK = {"model": "digits", "dataset": "auto", "target": "3", "eps": 0.3}
IMAGENET_ATTACK = {"dataset": "imagenet", "target": "night snake", "eps": 8 / 255}
IMAGENET_ATTACK.update(alpha=2 / 255, steps=40)


@pytest.mark.parametrize(
    ("flags", "folder", "expected"),
    [
        ("", "attack-asl-scenes-8", SCENES_ATTACK),
        ("--sweep --target 3", "sweep-asl-scenes-3", {**SCENES_ATTACK, "target": "3"}),
        ("--dataset coco", "attack-asl-coco-person", PHOTOS_ATTACK),
        ("--dataset coco --augment", "attack-asl-coco-augmented-person", PHOTOS_ATTACK),
        ("--week 3 --dataset coco", "week3-asl-coco-person", {"direction": "on"}),
        ("--week 5 --model a/b.py:f", "week5-b-coco-dining_table", WEEK_5_ATTACK),
        (
            "--dataset coco --split train2017 --augment --eps 4/255 --alpha 0.01",
            "attack-asl-train2017-augmented-person",
            {"eps": 4 / 255, "alpha": 0.01, "steps": 40},
        ),
        ("--week 4", "week4-digits-auto-3", DIGITS_ATTACK),
        ("--model resnet18", "attack-resnet18-imagenet-night_snake", IMAGENET_ATTACK),
    ],
)
def test_the_defaults_of_an_attack_are_these(flags, folder, expected):
    args = pgd_attack.parse_args(shlex.split(flags))
    assert args.out == Path("runs/pgd_attack", folder)
    for name, value in {"loss": "margin", "gradient": "right", **expected}.items():
        assert getattr(args, name) == value, name


def test_kept_new_and_lost_labels_are_told_apart():
    before = torch.tensor([1.0, 1, -1, -1])
    after = torch.tensor([1.0, -1, 1, -1])
    task = pgd_attack.Task(list("abcd"), 2, "on", 0.5)
    lines = pgd_attack.captions(before, after, task)
    labels = [(text.partition(" ")[0], colour) for text, colour in lines]
    assert labels == [("a", "black"), ("-b", "firebrick"), ("+c", "green")]
    top = task._replace(mean=torch.zeros(1))
    for logits, line in {after: ("a", "black"), -after: ("b", "firebrick")}.items():
        assert pgd_attack.captions(before, logits, top) == [line]
    after[2] = 2
    assert pgd_attack.captions(before, after, top) == [("c", "green")]


class Attackable(NamedTuple):
    """A random network that says some labels of scenes, in a file, and flags that attack it."""

    path: Path
    flags: list


@pytest.fixture(scope="module")
def attackable(tmp_path_factory, data):
    network = random_tresnet("tresnet_s")
    with torch.no_grad():
        logits = network(asl_model.load_scenes(50, 32, SEED, "mnist", data)[0])
        network.head.fc.weight.div_(logits.std(0)[:, None])
        network.head.fc.bias.sub_(logits.mean(0)).div_(logits.std(0))
    path = tmp_path_factory.mktemp("network") / "some.pth"
    content = {"model": network.state_dict(), "arch": "tresnet_s", "norm": "batch norm"}
    content.update(image_size=32, idx_to_class=dict(enumerate("0123456789")))
    torch.save(content, path)
    flags = f"--device cpu --dataset scenes --limit 6 --target 3 --data {quoted(data)}"
    return Attackable(path, [*shlex.split(flags), "--weights", str(path)])


def short_rows(args, rows_of=pgd_attack.rows_of):
    """The attacks that the flags ask for, in four long steps each: seconds saved."""
    return [row._replace(alpha=0.1, steps=4) for row in rows_of(args)]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(pgd_attack, "rows_of", short_rows)


def attack(attackable, out, flags):
    """What `pgd_attack.main` returns for these flags, in one text, on the random network."""
    return pgd_attack.main([*attackable.flags, *shlex.split(flags), "--out", str(out)])


class Attack(NamedTuple):
    """A finished week 5: its folder, its record, what it printed, and its arrays."""

    folder: Path
    record: dict
    printed: str
    arrays: dict


@pytest.fixture(scope="module")
def week5(attackable, tmp_path_factory):
    out = tmp_path_factory.mktemp("week5")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pgd_attack, "rows_of", short_rows)
        record = attack(attackable, out, "--week 5 --save 4")
    with np.load(out / "adversarial.npz") as file:
        arrays = dict(file)
    return Attack(out, record, printed.getvalue(), arrays)


def test_week_5_writes_its_files_and_prints_the_logs_six_counts(week5):
    names = {path.name for path in week5.folder.iterdir()}
    assert names == {".lock", "results.json", "adversarial.npz", "pgd-attack-on-some.png"}
    rows = json.loads((week5.folder / "results.json").read_text())["rows"]
    assert list(rows) == [*(row.name for row in pgd_attack.WEEK_5), "margin"]
    assert week5.record["dataset_size"] == 6
    for row in pgd_attack.WEEK_5:
        numbers = rows[row.name]
        assert (numbers["alpha"], numbers["steps"]) == (0.1, 4)
        for setting in ("loss", "gradient", "eps", "early_stop", "restarts"):
            assert numbers[setting] == getattr(row, setting)
    for key in pgd_attack.COUNTS:
        assert re.search(f"^{key} +\\d+ +\\d+$", week5.printed, re.M)
    for line in week5.printed.splitlines():
        assert len(line) <= 100 or str(week5.folder.parent) in line, line


def test_the_arrays_are_what_the_network_saw_and_said(week5, attackable, data):
    network, _ = asl_model.load_asl(attackable.path)
    images, labels = asl_model.load_scenes(6, 32, 0, "mnist", data, "test")
    clean = (images[:4] * 255).round().byte()
    arrays = week5.arrays
    assert np.array_equal(arrays["clean"], clean)
    assert np.array_equal(arrays["truth"], labels[:4])
    assert arrays["names"].tolist() == list("0123456789")
    logits = network(images)
    assert difference(torch.from_numpy(arrays["before"]), logits[:4]) < 1e-4
    ap = asl_model.average_precision(logits.numpy(), labels.numpy())
    assert week5.record["mAP"] == pytest.approx(ap.mean(), abs=1e-6)
    for name, numbers in week5.record["rows"].items():
        adversarial = torch.from_numpy(arrays[f"adversarial-{name}"])
        after = torch.from_numpy(arrays[f"after-{name}"])
        change = (adversarial.int() - clean.int()).abs().max() / 255
        assert change <= numbers["eps"] + 1 / 255
        assert difference(network(adversarial / 255), after) < 0.1


def test_the_control_is_the_logged_attacks_change_upside_down(week5):
    clean = week5.arrays["clean"].astype(int)
    change = week5.arrays["adversarial-softmax-bce-inplace-abn"] - clean
    rotated = (clean + change[:, :, ::-1, ::-1]).clip(0, 255)
    assert np.abs(week5.arrays["adversarial-rotated"] - rotated).max() <= 2
    assert np.abs(change).max() > 25


def test_both_gradients_are_checked_and_attack_differently(week5):
    assert week5.record["gradient_error"] < 1e-3
    assert week5.record["wrong_gradient_error"] > 0.3
    assert "skips the derivatives of 10 activations" in week5.printed
    assert "the gradient is right" in week5.printed
    assert "WARNING: the gradient is WRONG, as intended" in week5.printed
    for name in ("softmax-bce", "bce", "softmax-ce"):
        right = week5.arrays[f"adversarial-{name}"]
        wrong = week5.arrays[f"adversarial-{name}-inplace-abn"]
        assert not np.array_equal(right, wrong)


def test_other_settings_or_a_damaged_record_are_not_overwritten(
    week5, attackable, tmp_path, monkeypatch
):
    before = contents(week5.folder)
    with monkeypatch.context() as patch:
        patch.setattr(pgd_attack, "multi_label_subject", None)  # refused before it loads
        with refused("results.json", "week 5, not None", "--out", "--force", code=2):
            attack(attackable, week5.folder, "")
        for other in ("--save 3", "--batch-size 3", "--data elsewhere"):
            with refused(other.split()[1], "--out", "--force", code=2):
                attack(attackable, week5.folder, f"--week 5 --save 4 {other}")
    assert contents(week5.folder) == before
    path = tmp_path / "results.json"
    path.write_text("{")
    with refused("results.json", "damaged", "--force", code=2):
        attack(attackable, tmp_path, "--steps 1")
    attack(attackable, tmp_path, "--steps 1 --force")
    assert json.loads(path.read_text())["settings"]["steps"] == 1


def test_another_networks_results_are_not_overwritten(attackable, tmp_path, capsys):
    """The file has the same name, as after a new training. The wrong gradient is a flag, too."""
    path = shutil.copy(attackable.path, tmp_path)
    flags = f"--weights {quoted(path)} --gradient {pgd_attack.INPLACE_ABN} --steps 1 --limit 2"
    record = attack(attackable, tmp_path / "out", flags)
    assert record["rows"]["margin"]["gradient"] == pgd_attack.INPLACE_ABN
    assert "WARNING: the gradient is WRONG" in capsys.readouterr().out
    again = attack(attackable, tmp_path / "out", flags)
    assert again["weights_sha256"] == record["weights_sha256"]
    content = torch.load(path)
    content["model"]["head.fc.bias"] += 1
    torch.save(content, path)
    with refused("weights_sha256", "--out", "--force", code=2):
        attack(attackable, tmp_path / "out", flags)


def test_the_time_left_is_looked_at_in_every_step(attackable, tmp_path, monkeypatch):
    """A batch of a large network may take minutes."""
    bar = Mock()
    monkeypatch.setattr(common, "progress", Mock(return_value=bar))
    attack(attackable, tmp_path, "--loss bce --steps 5 --batch-size 6")
    updates = [call.args for call in bar.update.call_args_list]
    assert updates[-1] == (6,)
    assert updates.count((0,)) > 5


def test_the_sweep_runs_every_eps_and_control(attackable, tmp_path):
    flags = "--sweep --limit 3 --steps 2 --alpha 0.01 --gradient inplace-abn-1.0.12"
    rows = attack(attackable, tmp_path, flags)["rows"]
    for n in (0.25, 0.5, 1, 2, 4, 8, 16):
        numbers = rows[f"attack-{n}"]
        assert numbers["eps"] == rows[f"noise-{n}"]["eps"] == pytest.approx(n / 255)
        assert numbers["alpha"] == pytest.approx(min(0.01, n / 255 / 4))
        assert (numbers["steps"], rows[f"twice-the-steps-{n}"]["steps"]) == (2, 4)
        noise = rows[f"noise-{n}"]
        assert (noise["loss"], noise["gradient"]) == (None, "right")
        assert numbers["gradient"] == pgd_attack.INPLACE_ABN


def test_the_dose_skips_ever_more_derivatives(attackable, tmp_path, short):
    record = attack(attackable, tmp_path, "--dose --limit 2")
    cosines = record["cosines"]
    assert record["skipped"] == 10  # fewer than 16, which would be all of them again
    assert " ".join(cosines) == "first-0 first-1 first-2 first-4 first-8 all"
    assert list(record["rows"]) == [*cosines, "noise"]
    assert cosines["first-0"] == pytest.approx(1)
    assert cosines["all"] < 0.99
    assert (tmp_path / "dose.png").exists()


def test_networks_that_work_in_place_are_imitated_and_compared():
    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    torch.manual_seed(SEED)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    network = InPlace(*layers, nn.Linear(6 * 36, 6)).eval()
    imitation = asl_model.inplace_abn_1_0_12(network)
    images = photo_like(4, 8)
    before = images.clone()
    logits = pgd_attack.logits_of(network, images)
    gradients = []
    for model in (network, imitation):
        gradient = pgd_attack.week_5_gradient(model, images, logits, labels_task())
        gradients.append(gradient)
    assert torch.equal(images, before)
    assert 0 < F.cosine_similarity(*gradients).mean() < 0.99
    assert imitation(images.requires_grad_()).requires_grad


def test_the_doses_figure_shows_zero_and_negative_values():
    """No ratio to nothing, and room for negative cosines."""
    numbers = {}
    for name, after in {"first-0": 6, "all": 3, "noise": 2}.items():
        counts = {"labels_before": 4, "target_before": 2}
        numbers[name] = {**counts, "labels_after": after, "target_after": after}
    curves = pgd_attack.dose_curves(numbers, [1, -1], "cat")
    assert list(curves.values()) == [[1, -1], [1.5, 0.75], [0.5, 0.5], [3, 1.5]]
    page = pgd_attack.plot_dose("title", [0, 9], curves)
    assert page.getpixel((580, 410)) == ImageColor.getrgb("royalblue")
    for count in numbers.values():
        count["target_before"] = 0
    curves = pgd_attack.dose_curves(numbers, [1, -1], "cat")
    assert list(curves.values()) == [[1, -1], [1.5, 0.75], [0.5, 0.5]]


@pytest.mark.parametrize("direction", ["on", "off"])
def test_the_figure_shows_an_image_that_the_attack_is_to_change(direction):
    """Of a black one, which lacks the target, and a white one, which has it."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    logits = torch.tensor([[-1.0], [1.0]])
    outcome = pgd_attack.Outcome(logits, torch.zeros(2), torch.zeros(2), pixels)
    outcomes = {"clean": outcome, "margin": outcome}
    task = pgd_attack.Task(["cat"], 0, direction, 0.5)
    rows = [pgd_attack.Row("margin", "margin", 0.1)]
    page = pgd_attack.figure("title", outcomes, rows, task)
    assert page.getpixel((200, 200)) == (3 * (0,) if direction == "on" else 3 * (255,))


def test_a_gradient_that_cannot_be_checked_is_null_in_the_record(capsys):
    """JSON has no NaN."""

    def needs_float32(x):
        assert x.dtype == torch.float32
        return x.flatten(1)

    numbers = pgd_attack.check_gradients(needs_float32, [], photo_like(1, 8))
    assert numbers == {"gradient_error": None}
    assert "WARNING: not checked" in capsys.readouterr().out


def test_four_processes_share_three_batches(monkeypatch):
    """One after the other, in this process; the last has no batch. What others attack is zero."""
    monkeypatch.setattr(pgd_attack.dist, "all_reduce", Mock())
    args = pgd_attack.parse_args(["--batch-size", "2", "--save", "5"])
    network = small_network(6).eval()
    subject = pgd_attack.Subject(network, labels_task(), photo_like(6, 12), None, "")
    rows = [pgd_attack.Row("noise", None, 0.3)]
    networks = {"clean": network, "noise": network}
    whole = pgd_attack.run_attacks(args, CPU, 0, 1, subject, networks, rows)
    pgd_attack.dist.all_reduce.assert_not_called()
    parts = []
    for rank in range(4):
        part = pgd_attack.run_attacks(args, CPU, rank, 4, subject, networks, rows)
        parts.append(part)
    for name, outcome in whole.items():
        for i, tensor in enumerate(outcome):
            assert torch.equal(sum(part[name][i] for part in parts), tensor)
    assert pgd_attack.dist.all_reduce.call_count == 4 * 2 * 4


def test_two_of_torchruns_processes_give_the_table_of_one(
    attackable, tmp_path, monkeypatch
):
    """Of three batches. Each has one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # a machine's own name may be unreachable
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    records = []
    for start in ("", torchrun):
        out = tmp_path / f"run {len(records)}"
        script = f"{start} pgd_attack.py --batch-size 2 --steps 2"
        command = [sys.executable, *script.split(), *attackable.flags, "--out", out]
        process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        records.append(json.loads((out / "results.json").read_text()))
    one, two = records
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["command"].startswith("torchrun --nproc-per-node 2 ")
    assert two["rows"] == one["rows"]
    for line in ("labels_actual", "attacked network", "gradient_error"):
        assert process.stdout.count(line) == 1
    assert re.search(r"^labels_actual +\d+$", process.stdout, re.M)


OWN = """
import torch
from torch import nn
from threading import Lock
from neighbour import NAMES

class Locked(nn.Module):
    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.lock = Lock()
        self.before = before
        self.after = after
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 80))
    def forward(self, x):
        return self.after(self.layers(self.before(x.sub_(0.5))))

class Grid(nn.Module):
    def forward(self, x):
        cells = nn.functional.adaptive_avg_pool2d(x, (8, 10)).mean(1)
        return 20 * (cells.flatten(1) - 0.5)

def scripted():
    return torch.jit.trace(Locked().layers, torch.rand(1, 3, 16, 16)), NAMES, 16

def saved():
    torch.jit.save(scripted()[0], "saved.pt")
    return torch.jit.load("saved.pt"), NAMES, 16

load = lambda: (Locked(), NAMES, 16)
grid = lambda: (Grid(), NAMES, 40)
large = lambda: (Grid(), NAMES, 512)
plain = lambda: (Locked().layers, NAMES, 16)
half = lambda: (Locked().half(), NAMES, 16)
small = lambda: (Locked(before=lambda x: x if len(x) < 4 else 1 / 0), NAMES, 16)
frozen = lambda: (Locked(after=torch.no_grad()(lambda x: x * 2)), NAMES, 16)
detached = lambda: (Locked(before=torch.detach), NAMES, 16)
probabilities = lambda: (Locked(after=torch.sigmoid), NAMES, 16)
endless = lambda: (Locked(after=lambda x: x / 0), NAMES, 16)
opaque = lambda: (Locked(after=lambda x: torch.special.zeta(x + 9, x)), NAMES, 16)
broken = lambda: 1 / 0
leaves = lambda: exit(3)
pair = lambda: load()[:2]
too_few = lambda: (Locked(), NAMES[1:], 16)
no_size = lambda: (Locked(), NAMES, 16.0)
cats = lambda: (Locked(), ["cat", "hat", *NAMES[2:]], 16)
"""


@pytest.fixture
def own(data, tmp_path):
    """Flags that attack a network of one's own, and the folder of its file."""
    names = common.load_coco(data, 16)[2][::-1]  # the last one comes first
    (tmp_path / "neighbour.py").write_text(f"NAMES = {names}")
    (tmp_path / "mine.py").write_text(OWN)
    flags = ["--device", "cpu", "--data", str(data), "--out", str(tmp_path / "out")]
    return [*flags, "--force", "--target", names[0], "--model"], tmp_path / "mine.py"


def own_arrays(own, function, *more):
    """adversarial.npz of an attack on the user's own FUNCTION, and its record."""
    flags, path = own
    record = pgd_attack.main([*flags, f"{path}:{function}", *more])
    return np.load(path.parent / "out" / "adversarial.npz"), record


@pytest.mark.parametrize("function", ["load", "half", "scripted", "saved"])
def test_a_network_of_ones_own_is_attacked_on_its_photos(own, function, monkeypatch):
    monkeypatch.chdir(own[1].parent)
    arrays, record = own_arrays(own, function)
    assert record["rows"]["margin"]["target_actual"] == 1, "the labels' order is its own"
    assert [Path(file).name for file in arrays["files"]] == ["0.png", "1.png", "2.png"]


PEAKS = """
import resource, sys, pgd_attack
for n in (40, 200):
    pgd_attack.main([*sys.argv[1:], f"--limit={n}"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_an_attack_holds_few_photos_in_memory_at_once(own, tmp_path, monkeypatch):
    """160 more photos of 3 MB each may add at most half of their size."""
    pytest.importorskip("resource")
    flags, path = own
    coco = tmp_path / "many" / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").mkdir()
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": f"name {i}"} for i in range(80)]
    for i in range(200):
        content["images"].append({"id": i, "file_name": f"{i}.png"})
        content["annotations"].append({"image_id": i, "category_id": 0})
        Image.new("RGB", (50, 40), (i, 0, 0)).save(coco / "val2017" / f"{i}.png")
    annotations = coco / "annotations" / "instances_val2017.json"
    annotations.write_text(json.dumps(content))
    (tmp_path / "neighbour.py").write_text("NAMES = [f'name {i}' for i in range(80)]")
    command = [sys.executable, "-c", PEAKS, *flags, f"{path}:large"]
    command += ["--data", str(coco.parent), "--target", "name 5", "--steps", "1"]
    command += ["--restarts", "0", "--batch-size", "4", "--save", "1"]
    # else, each of glibc's threads may keep what it once took
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    output = subprocess.check_output(command, cwd=HERE, text=True)
    few, many = [int(line) for line in output.split("\n") if line.isdigit()]
    unit = 1 if sys.platform == "darwin" else 1024
    assert (many - few) * unit < 160 * 3e6 / 2


@pytest.mark.parametrize(
    ("function", "words", "code"),
    [
        ("other", "'other'", 1),
        ("broken", "division by zero", 1),
        ("leaves", "SystemExit(3)", 1),
        ("endless", "not finite", 1),
        ("frozen", "no gradient", 1),
        ("detached", "no gradient", 1),
        ("opaque", "not implemented", 1),
        ("probabilities", "logits, not probabilities", 1),
        ("too_few", "(3, 80), for 79 class names", 1),
        ("pair", "must return (network, class names, image size)", 1),
        ("no_size", "must return (network, class names, image size)", 1),
        ("cats", "cat", 2),
    ],
)
def test_a_network_that_cannot_be_attacked_is_told_why(own, function, words, code):
    flags, path = own
    with refused(words, code=code):
        pgd_attack.main([*flags, f"{path}:{function}", "--target", "name 50"])


def test_the_png_of_a_photo_does_what_was_asked(own, tmp_path, capsys, monkeypatch):
    """By a network whose labels are the cells of a grid that are brighter than grey."""
    flags, path = own
    clean = torch.full((3, 40, 40), 77 / 255)
    clean[:, :, 20:] = 179 / 255
    torchvision.utils.save_image(clean, tmp_path / "photo.png")
    flags += [f"{path}:grid", "--image", str(tmp_path / "photo.png")]
    pgd_attack.main([*flags, "--eps", "0.3"])
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    pixels = np.array(Image.open(out / "photo-adversarial.png"))
    cells = pixels.reshape(8, 5, 10, 4, 3).mean((1, 3, 4))
    brighter = np.zeros((8, 10), bool)
    brighter[:, 5:] = True
    brighter[0, 0] = True  # the target
    assert ((cells > 127.5) == brighter).all()
    assert "+name 90 " in re.findall("^margin: (.*)", printed, re.M)[0]
    assert "misses the goal" not in printed
    pgd_attack.main([*flags, "--eps", "1e-6", "--steps", "1"])
    assert "the 8-bit image misses the goal" in capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    assert not record["8_bit_image_reaches_goal"]
    assert record["labels_of_8_bit_image"]["clean"][0].startswith("name 85 ")
    monkeypatch.setattr(pgd_attack, "rows_of", short_rows)
    record = pgd_attack.main([*flags, "--week", "3"])
    shown = re.findall("^([\\w-]+): ", capsys.readouterr().out, re.M)
    assert shown[-8:] == ["clean", *(row.name for row in pgd_attack.WEEK_3), "margin"]
    arrays = np.load(out / "adversarial.npz")
    for name, numbers in record["rows"].items():
        change = arrays[f"adversarial-{name}"] / 255 - arrays["clean"] / 255
        rms = np.square(change).mean() ** 0.5
        assert numbers["rms_change"] == pytest.approx(rms, abs=1 / 255)


def test_the_threshold_says_what_is_present_before_and_after(own, tmp_path):
    """At 0.8, cells above 0.5 + ln(4) / 20 are present."""
    flags, path = own
    clean = torch.full((3, 40, 40), 140 / 255)
    clean[:, :, 20:] = 179 / 255
    torchvision.utils.save_image(clean, tmp_path / "photo.png")
    flags += [f"{path}:grid", "--image", str(tmp_path / "photo.png")]
    row = pgd_attack.main([*flags, "--threshold", "0.8"])["rows"]["margin"]
    assert (row["labels_before"], row["labels_after"]) == (40, 41)
    pixels = np.array(Image.open(tmp_path / "out" / "photo-adversarial.png"))
    cells = pixels.reshape(8, 5, 10, 4, 3).mean((1, 3, 4)) / 255
    present = np.zeros((8, 10), bool)
    present[:, 5:] = True
    present[0, 0] = True  # the target
    assert ((cells > 0.5 + np.log(4) / 20) == present).all()


@pytest.mark.parametrize(
    ("function", "words"), [("load", "right"), ("scripted", "traced")]
)
def test_only_the_wrong_gradient_needs_a_copy(own, function, words):
    with refused(words, code=2):
        own_arrays(own, function, "--gradient", pgd_attack.INPLACE_ABN)


def test_a_network_that_fails_during_the_attack_is_named(own):
    with refused("mine.py:small", "ZeroDivisionError", "--batch-size"):
        own_arrays(own, "small", "--split", "train2017")


def test_an_unknown_label_names_the_nearest():
    names = ["person", "bicycle", "dining table"]
    with refused("'dinning table' is not one of the 3 names", "dining table", code=2):
        pgd_attack.label_index("dinning table", names)
    with refused("'' is not one", "person, bicycle, dining table", code=2):
        pgd_attack.label_index("", names)


@pytest.mark.parametrize(
    ("flags", "array"), [(["--week", "3"], "adversarial-noise"), (["--augment"], "clean")]
)
def test_noise_and_augmentation_follow_the_seed(own, short, flags, array):
    """On photos, which no seed changes."""
    found = []
    for seed in ("0", "0", "1"):
        found.append(own_arrays(own, "plain", *flags, "--seed", seed)[0][array])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


# --- week 4


def test_week_4_attacks_digits_from_the_command_to_the_table(
    data, tmp_path, monkeypatch, short, capsys
):
    network = acwgan.evaluation_network().eval()
    classify = Mock(return_value=network)
    monkeypatch.setattr(acwgan, "evaluation_classifier", classify)
    flags = f"--week 4 --dataset mnist --limit 5 --target 8 --device cpu --data {quoted(data)}"
    record = pgd_attack.main([*shlex.split(flags), "--out", str(tmp_path)])
    names = [row.name for row in pgd_attack.WEEK_4]
    assert list(record["rows"]) == [*names, "corrected-inplace-abn", "corrected"]
    assert record["rows"]["corrected"]["eps"] == 0.3
    assert record["skipped"] == 4
    arrays = np.load(tmp_path / "adversarial.npz")
    assert arrays["files"].tolist() == list("01234"), "no more files than images"
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 100 or str(tmp_path) in line, line


def test_week_4s_attacks_clip_normalised_values_as_logged():
    channels = [0.4, 0.5, 0.6]
    mean = torch.tensor(channels, dtype=torch.float64)[:, None, None]
    std = mean / 2
    images = photo_like(5, 12).double()
    network = small_network().double().eval()
    with torch.no_grad():
        logits = network(images)
    task = pgd_attack.Task(list("abc"), 1, "on", 0.5, mean=channels)
    task = task._replace(std=[0.2, 0.25, 0.3])
    start = (images - mean) / std
    raw = logits.clone()
    raw[:, 1] = 1
    one_hot = torch.zeros(5, 3, dtype=torch.float64)
    one_hot[:, 1] = 1
    for row, wanted in zip(pgd_attack.WEEK_4, (None, one_hot, raw), strict=True):
        assert (row.eps, row.alpha, row.gradient) == (0.3, 2 / 255, "right")
        moved = start.clamp(0, 1)
        for _ in range(0 if wanted is None else 5):
            moved.requires_grad_()
            p = network(moved * std + mean).softmax(1)
            loss = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() - 0.1 * gradient.sign()
            moved = moved.clamp(start - 0.3, start + 0.3).clamp(0, 1)
        row = row._replace(alpha=0.1, steps=5 if row.loss else row.steps)
        ours = pgd_attack.attack_top_class(network, images, logits, row, task)
        assert difference(ours, moved * std + mean) < 0.02, row.name


def test_the_corrected_attack_stops_at_a_lead_of_one_half():
    """A linear network: the target's lead grows by the same amount in each step."""

    def network(x):
        level = x.mean((1, 2, 3))
        return torch.stack([0 * level, 10 * (level - 0.5)], 1)

    images = torch.full((1, 1, 2, 2), 0.4)
    task = pgd_attack.Task(["a", "b"], 1, "on", 0.5, mean=[0.0])
    row = pgd_attack.Row("corrected", "softmax-ce", 0.5, alpha=0.01, early_stop=True)
    result = pgd_attack.attack_labels(network, images, network(images), row, task)
    assert 0.55 < result.mean().item() < 0.57


def test_week_4_counts_the_images_that_are_not_the_target():
    task = pgd_attack.Task(["a", "b"], 1, "on", 0.5, mean=[0.0])
    before = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    after = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 2]])
    numbers = pgd_attack.count_labels(before, after, None, task)
    assert numbers["target_switched"] == wilson(2, 3)
    mean_sigmoid = after[:, 1].sigmoid().mean()
    assert numbers["mean_sigmoid"] == pytest.approx(mean_sigmoid.item())


def published_file(name, folder):
    """A file of random weights in the format and under the name of torchvision's own."""
    torch.manual_seed(SEED)
    network = torchvision.models.get_model(name, weights=None)
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = folder / url.rpartition("/")[2]
    torch.save(network.state_dict(), path)
    return path


def test_week_4_attacks_photos_from_the_command_to_the_table(
    tmp_path, monkeypatch, short, capsys
):
    """In eval mode, though torchvision's networks come in train mode."""
    photo = tmp_path / "imagenet" / "n01440764_tench.JPEG"
    photo.parent.mkdir()
    Image.new("RGB", (300, 250), "red").save(photo)
    path = published_file("squeezenet1_1", tmp_path)
    spy = Mock(wraps=pgd_attack.attack_top_class)
    monkeypatch.setattr(pgd_attack, "attack_top_class", spy)
    monkeypatch.setattr(pgd_attack, "gradient_error", Mock(return_value=0.5))
    flags = f"--week 4 --model squeezenet1_1 --weights {quoted(path)} --device cpu"
    flags += f" --data {quoted(tmp_path)} --out {quoted(tmp_path / 'out')}"
    record = pgd_attack.main(shlex.split(flags))
    assert record["dataset_size"] == record["accuracy"]["n"] == 1
    for module in spy.call_args.args[0].modules():
        assert not module.training
    printed = capsys.readouterr().out
    assert f"{path} is used instead of torchvision's" in printed
    assert "accuracy on these images: " in printed
    assert "WARNING: there is none to skip" in printed
    assert "WARNING: the gradient is WRONG\n" in printed
    assert re.search("^corrected +0.03137 +0.1 +4 ", printed, re.M)
    arrays = np.load(tmp_path / "out" / "adversarial.npz")
    assert arrays["clean"].shape == (1, 3, 224, 224)
    assert arrays["names"][60] == "night snake"
    assert arrays["truth"] == [0], "a tench is ImageNet's first class"


def test_week_4_takes_cocos_photos_or_one(data, tmp_path):
    path = published_file("squeezenet1_1", tmp_path)
    photo = data / "coco" / "val2017" / "0.png"
    for source, n in {
        "--dataset coco --limit 3": 3,
        f"--image {quoted(photo)}": 1,
    }.items():
        flags = f"--week 4 --model squeezenet1_1 --weights {quoted(path)} {source}"
        flags += f" --data {quoted(data)}"
        args = pgd_attack.parse_args(shlex.split(flags))
        subject = pgd_attack.single_label_subject(args, CPU)
        assert subject.images[:].shape == (n, 3, 224, 224)
        assert subject.images.paths[0] == photo
        assert subject.truth is None


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_torchvisions_classifiers_are_torchvisions_own(name, tmp_path):
    """The network of images in [0, 1] is the one that torchvision builds for these weights."""
    path = published_file(name, tmp_path)
    network, weights = pgd_attack.torchvision_network(name, None, tmp_path)
    network.eval()
    pixels = np.random.default_rng(SEED).integers(0, 255, (60, 90, 3), np.uint8)
    photo = Image.fromarray(pixels)
    seen = weights.transforms(mean=[0.0] * 3, std=[1.0] * 3)(photo)[None]
    hub = torch.hub.get_dir()
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(path, tmp_path / "checkpoints")
    torch.hub.set_dir(str(tmp_path))
    theirs = torchvision.models.get_model(name, weights=weights).eval()
    torch.hub.set_dir(hub)
    expected = weights.transforms()(photo)[None]
    with torch.no_grad():
        assert difference(network(seen), theirs(expected)) < 1e-4


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    path = published_file("squeezenet1_1", tmp_path)
    with refused(path, "torchvision's resnet18", "--weights"):
        pgd_attack.torchvision_network("resnet18", path, tmp_path)
    state = torch.load(path)
    state["classifier.1.bias"][0] = torch.nan
    torch.save({"state_dict": state}, path)
    with refused(path, "finite"):
        pgd_attack.torchvision_network("squeezenet1_1", path, tmp_path)
    with refused("nearest", "resnet18", code=2):
        pgd_attack.torchvision_network("resnet19", None, tmp_path)


def test_imagenets_classes_are_in_the_files_or_folders_names(tmp_path):
    folder = tmp_path / "imagenet"
    names = ["n01440764_tench.JPEG", "n01530575_water_ouzel.png"]
    names += ["n02012849_crane.jpg", "x.jpg"]
    for name in (*names, "n01440764/y.JPEG", "._n01440764_tench.JPEG", ".hidden/z.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 32), "red").save(folder / name)
    classes = ["tench", "water ouzel", "crane", "crane"]
    paths, found = pgd_attack.load_imagenet(tmp_path, classes)
    assert [path.name for path in paths] == ["y.JPEG", *names]
    assert found.tolist() == [-1, 0, 1, -1, -1]
    _, found = pgd_attack.load_imagenet(tmp_path, ["the class of the one folder"])
    assert found.tolist() == [0, -1, -1, -1, -1]
    paths, _ = pgd_attack.load_imagenet(tmp_path, classes, 3)
    assert [path.name for path in paths] == ["y.JPEG", names[1], "x.jpg"], "spread"
    with refused("no photo"):
        pgd_attack.load_imagenet(tmp_path / "none", ["tench"])


# --- the whole

MISUSE = {
    acwgan: "--critic-lr nan, --limit 1.5, --seed -1, --dataset cifar, --digit 10, "
    "--colour, --out nowhere --resume, --out nowhere --sample 8",
    transfer: "--target 3, --variant best, --steps 0",
    asl_model: "--train --evaluate, --train --arch resnet, --evaluate --lr 1, "
    "--evaluate --epochs 3",
    pgd_attack: "--eps 8/0, --eps nan, --eps 1e999, --augment, --week 3 --sweep, "
    "--loss l2, --model digits --weights x.pth, --week 5 --loss bce, "
    "--sweep --restarts 3, --model asl --week 4, --image absent.jpg, "
    f"--week 4 --image {os.devnull}, --week 4 --threshold 0.9",
}


@pytest.mark.parametrize("script", MISUSE)
def test_misuse_is_named_and_help_is_complete(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for flags in MISUSE[script].split(", "):
        with pytest.raises(SystemExit, match="2"):
            script.parse_args(shlex.split(flags))
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.findall(r"--[\w-]+", flags)[-1] in line
    assert os.listdir(tmp_path) == []
    with pytest.raises(SystemExit, match="0"):
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "(default: data)" in text
    assert "None" not in text
    for flag in ("data", "out", "dataset", "limit", "seed", "device"):
        assert f"\n  --{flag} " in text
    assert not re.search(r"^  --\S+( [A-Z]+)?\n  --", text, re.MULTILINE)


@pytest.mark.parametrize("script", MISUSE)
def test_a_script_takes_the_readmes_commands_and_handles_errors(script, monkeypatch):
    """But no command that reads a file, which is not there."""
    monkeypatch.setattr(common, "run", Mock())
    run = runpy.run_path(script.__file__, run_name="__main__")
    assert common.run.call_args.args[0] == run["main"]
    text = (HERE / "README.md").read_text(encoding="utf8")
    commands = re.findall(rf"python {script.__name__}\.py([^\n`#&|]*)", text)
    assert commands
    for flags in commands:
        if not re.search(r"--resume|--sample\b|--image", flags):
            script.parse_args(shlex.split(flags))


# --- peers: `pip install --no-deps timm==1.0.31 torchattacks==3.5.1 pytorch-fid==0.3.0`


def import_peer(module, package, version):
    """Another project's module; the test is skipped without it, or with another version."""
    peer = pytest.importorskip(module)
    if importlib.metadata.version(package) != version:
        pytest.skip(f"needs {package}=={version}")
    return peer


def test_peer_pytorch_fid_gives_the_same_features_and_distance(inception, monkeypatch):
    """From random weights in the published format, which its own network reads, too."""
    peer = import_peer("pytorch_fid.inception", "pytorch-fid", "0.3.0")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    path, _ = inception
    weights = Mock(return_value=torch.load(path))
    monkeypatch.setattr(peer, "load_state_dict_from_url", weights)
    images = photo_like(3, 40)
    with torch.inference_mode():
        theirs = peer.InceptionV3().eval()(images)[0].flatten(1)
    ours = torch.from_numpy(common.inception_features(images, path))
    assert difference(ours, theirs) < 1e-4
    x = np.random.default_rng(SEED).normal(size=(90, 12))
    moments = [x.mean(0), np.cov(x.T), x[:70].mean(0) + 1, np.cov((x * x)[:70].T)]
    theirs = fid_score.calculate_frechet_distance(*moments)
    assert common.frechet_distance(*moments) == pytest.approx(theirs, rel=1e-6)


def test_peer_torchattacks_pgd_gives_the_same_images():
    """In float64: in float32, rounding may turn the sign of a gradient near 0."""
    torchattacks = import_peer("torchattacks", "torchattacks", "3.5.1")
    torch.manual_seed(SEED)
    first = nn.Conv2d(3, 8, 3, 2)
    second = nn.Conv2d(8, 8, 3, 2)
    layers = (first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(1), nn.Linear(72, 10))
    model = nn.Sequential(*layers).double().eval()
    images = photo_like(6, 16).double()
    targets = torch.arange(6)
    sizes = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 20}
    theirs = torchattacks.PGD(model, **sizes, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    ours = pgd_attack.pgd(model, images, targets, F.cross_entropy, **sizes)
    assert torch.allclose(ours, theirs(images, targets), rtol=0, atol=1e-9)
    assert (ours - images).abs().max() > 0.03


def test_peer_timm_gives_the_same_logits(tmp_path):
    timm = import_peer("timm", "timm", "1.0.31")
    torch.manual_seed(SEED)
    network = asl_model.tresnet("tresnet_l", 10)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(".1.weight"):  # InPlace-ABN's gammas, of either sign
                weight.uniform_(-1, 1)
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
        network(photo_like(8, 64))  # in train mode: it measures moments
    content = {"model": network.state_dict()}
    torch.save(content, tmp_path / "file.pth")
    theirs = timm.create_model("tresnet_l", num_classes=10).eval()
    theirs.load_state_dict(timm.models.tresnet.checkpoint_filter_fn(content, theirs))
    ours, _ = asl_model.load_asl(tmp_path / "file.pth")
    images = photo_like(3, 96, 1)
    with torch.inference_mode():
        assert difference(ours(images), theirs(images)) < 1e-4


def peer_mla_u(logits, wanted, target):
    """MLA-U of Mahmood & Elhamifar (CVPR 2024): the target's cross-entropy alone."""
    return F.binary_cross_entropy_with_logits(logits[:, target], wanted[:, target])


def peer_mla_c(logits, wanted, target):
    """MLA-C of the same paper: and the other labels' cross-entropy, so that they are kept."""
    others = F.binary_cross_entropy_with_logits(logits, wanted)
    return peer_mla_u(logits, wanted, target) + others


def peer_bce(logits, wanted, target):
    """What users pass to a library's PGD: the labels' mean cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, wanted)


def peer_hinge(logits, wanted, target):
    """Carlini & Wagner's hinge for every label (Song et al. 2018): each is pushed equally far."""
    return (1 - (2 * wanted - 1) * logits).relu().sum()


def peer_gmla(network, images, wanted, target, eps, gradients, near=4):
    """GMLA of Mahmood & Elhamifar: along the target's gradient, less its projection on those of
    the `near` labels that are nearest to the threshold. A step takes 1 + near gradients."""
    moved = images
    sign = 2 * wanted[:, target] - 1
    for _ in range(gradients // (1 + near)):
        x = moved.detach().requires_grad_()
        logits = network(x)
        distance = logits.detach().abs()
        distance[:, target] = torch.inf
        columns = distance.topk(near, largest=False).indices.T
        values = [sign * logits[:, target]]
        values += [logits.gather(1, column[:, None])[:, 0] for column in columns]
        flat = []
        for value in values:
            (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
            flat.append(gradient.flatten(1))
        basis = torch.linalg.qr(torch.stack(flat[1:], 2)).Q
        parallel = basis @ (basis.mT @ flat[0][:, :, None])
        direction = (flat[0] - parallel[:, :, 0]).view_as(images)
        moved = moved + 2 / 255 * direction.sign()
        moved = moved.clamp(images - eps, images + eps).clamp(0, 1)
    return moved.detach()


@pytest.fixture
def peer_network(attackable, data):
    """A network, its images and its target: a random one, or those that PEER names.

    PEER="weights data photos target": of COCO's val2017, for the table in the README.
    """
    if "PEER" in os.environ:
        path, folder, n, name = os.environ["PEER"].split(maxsplit=3)
        network, names = asl_model.load_asl(path)
        args = coco_flags(folder, int(n))
        photos = asl_model.load_data(args, network.image_size, "val2017", names)[0]
        images = photos[:]
        return network, images, names.index(name)
    network, _ = asl_model.load_asl(attackable.path)
    return network, asl_model.load_scenes(2, 32, 0, "mnist", data, "test")[0], 3


class GradientCounter(nn.Module):
    """A network that counts the images whose gradients an attack asks it for."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.gradients = 0

    def forward(self, images):
        if torch.is_grad_enabled():
            self.gradients += len(images)
        return self.network(images)


def peer_results(network, images, logits, target, eps):
    """{attack: (its images, the gradients it took)}, of at most 40 gradients per image and try."""
    alpha = min(2 / 255, eps / 4)
    task = pgd_attack.Task([""] * 99, target, "flip", 0.5)
    wanted = pgd_attack.wanted_labels(logits, task)
    counter = GradientCounter(network)
    results = {}
    for loss in (peer_bce, peer_mla_u, peer_mla_c, peer_hinge):

        def cost(logits, wanted, loss=loss):
            return loss(logits, wanted, target)

        counter.gradients = 0
        moved = pgd_attack.pgd(counter, images, wanted, cost, eps, alpha, 40)
        results[loss.__name__] = (moved, counter.gradients)
    moved = peer_gmla(network, images, wanted, target, eps, 40)
    results["peer_gmla"] = (moved, 40 * len(images))
    row = pgd_attack.Row("margin", "margin", eps, alpha=alpha, early_stop=True)
    for name, restarts in {"margin": 0, "margin, restarts": 4}.items():
        row = row._replace(restarts=restarts)
        counter.gradients = 0
        moved = pgd_attack.attack_labels(counter, images, logits, row, task)
        results[name] = (moved, counter.gradients)
    return results


def test_peer_attacks_on_many_labels_beside_margin(peer_network):
    """For the table: target switched, exact, other labels changed, gradients; means per image."""
    network, images, target = peer_network
    lines = {}
    for grey_levels in (1, 2, 4, 8) if "PEER" in os.environ else (8,):
        eps = grey_levels / 255
        sums = {}
        for batch in images.split(32):
            logits = pgd_attack.logits_of(network, batch)
            results = peer_results(network, batch, logits, target, eps)
            for name, (moved, gradients) in results.items():
                assert (moved - batch).abs().max() < eps + 1e-6
                changed = (pgd_attack.logits_of(network, moved) > 0) != (logits > 0)
                others = changed.sum(1) - changed[:, target].int()
                exact = changed[:, target] & (others == 0)
                numbers = (changed[:, target].sum(), exact.sum(), others.sum(), gradients)
                sums.setdefault(name, torch.zeros(4))
                sums[name] += torch.tensor(numbers)
        for name, total in sums.items():
            lines[eps, name] = (total / len(images)).tolist()
    head = [
        "attack",
        "eps, in 255ths",
        "switched",
        "exact",
        "others changed",
        "gradients",
    ]
    rows = [[name, f"{255 * eps:.0f}", *line] for (eps, name), line in lines.items()]
    common.print_table(head, rows)
    for eps, name in lines:  # margin's restarts only replace failures
        assert lines[eps, "margin, restarts"][1] >= lines[eps, "margin"][1], name
        assert lines[eps, name][3] <= 40 or name == "margin, restarts"
