"""Every test: `pytest test_all.py`. No network, no GPU, no file but what the tests make.

TEST_SEED=3 pytest test_all.py    shifts every seed of the tests: their promises hold for any.
"""

import argparse
import contextlib
import copy
import csv
import functools
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
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageColor
from torch import nn
from torch.nn import functional as F
from torchvision.models import inception_v3

import acwgan
import asl_model
import common
import pgd_attack
import transfer

HERE = Path(common.__file__).parent
SEED = int(os.environ.get("TEST_SEED", 0))
CPU = torch.device("cpu")
NOWHERE = "http://127.0.0.1:9/"  # refuses every connection at once


@contextlib.contextmanager
def refused(*words, code=1):
    """Assert that a `Failure` with `code` is raised, one short line that holds all `words`."""
    with pytest.raises(common.Failure) as caught:
        yield
    text = str(caught.value)
    assert caught.value.code == code, text
    for word in words:
        assert str(word) in text, text


def random_stream(seed=0):
    """A torch.Generator of its own for a test."""
    return torch.Generator().manual_seed(1000 * SEED + seed)


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
        MemoryError(): (1, "--batch-size"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"): (1, "--batch-size"),
    }
    for problem, (code, words) in problems.items():
        with pytest.raises(SystemExit, match=f"^{code}$"):
            common.run(Mock(side_effect=problem), "continue with --resume")
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert len(line) < 450
    with pytest.raises(RuntimeError, match="illegal memory access"):
        common.run(Mock(side_effect=RuntimeError("an illegal memory access")))
    stdout = io.TextIOWrapper(io.BytesIO(), "cp1252")  # which has no letter Ł
    monkeypatch.setattr(sys, "stdout", stdout)
    common.run(lambda: print("runs/Łódź", flush=True))
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
    bar = common.progress(range(100), "training", miniters=1)
    for _ in bar:
        bar.set_postfix(critic=0.12, generator=0.34, refresh=False)
    text = capsys.readouterr().err
    shown = re.findall(r"\rtraining:? +\d+%[^\r]* \d+/100[^\r]*generator=0.34", text)
    assert len(shown) > 30 if terminal else 2 <= len(shown) <= 10
    assert text.count("\n") == (0 if terminal else len(shown))


def test_a_second_run_in_one_folder_is_refused_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with common.hold(folder), refused(folder, "another run"), common.hold(folder):
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
    with refused(path, "argparse.Namespace", "state dict alone; train it again"):
        common.load_checkpoint(path, "train it again")


def test_a_table_is_aligned_and_shows_rates_with_wilsons_interval(capsys):
    rows = [["pgd", common.wilson(5, 10)], ["none", common.wilson(0, 0)]]
    common.print_table(["l2", common.wilson(np.int64(0), torch.tensor(10))], rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "l2    0.0% [0.0%, 27.8%]  "  # z^2 / (n + z^2), where z is 1.96
    assert lines[1] == "pgd   50.0% [23.7%, 76.3%]"
    assert lines[2].rstrip() == "none  -"


def test_a_record_has_a_command_to_paste_and_the_revision(tmp_path, monkeypatch):
    command = ["asl_model.py", "--train", "--out", "runs/it's"]
    monkeypatch.setattr(sys, "argv", command)
    folder = tmp_path / "it's"  # no shell may stumble over the name
    monkeypatch.setattr(common, "__file__", str(folder / "common.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args = argparse.Namespace(out=tmp_path, seed=1)
    common.write_results(args, {"rate": 0.5}, dataset="glyphs")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["command"].startswith("torchrun --nproc-per-node 4 asl_model.py")
    assert shlex.split(record["command"])[3:] == command
    assert record["settings"]["seed"] == 1
    assert (record["dataset"], record["rate"], record["git"]) == ("glyphs", 0.5, None)
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q", folder], check=True)
        git = f"git -C {shlex.quote(str(folder))} -c user.name=x -c user.email=x"
        subprocess.getoutput(f"{git} commit --no-gpg-sign --allow-empty -m x")
        revision = common.write_results(args, {})["git"]
        assert subprocess.getoutput(f"{git} rev-parse HEAD").startswith(revision)


def test_a_download_is_the_whole_file_or_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x"
    url = (tmp_path / "file").as_uri()
    (tmp_path / "file").write_text("content")
    with refused(url, f"put that file at {path}"):
        common.download(url, path, "00")
    answer = io.BytesIO(b"content")
    answer.headers = {"Content-Length": "8"}
    with monkeypatch.context() as patch, refused("whole file"):
        urlopen = Mock(return_value=answer)
        patch.setattr("urllib.request.urlopen", urlopen)
        common.download(url, path)
    assert urlopen.call_args.kwargs == {"timeout": 20}
    assert not path.parent.exists()
    common.download(url, path, "ed7002b4")  # how the SHA-256 of "content" begins
    common.download(NOWHERE, path)  # which is there
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


def random_inception(path):
    """Inception with random weights that leave something of the images, saved to `path`."""
    torch.manual_seed(SEED)
    network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return network.eval()


def test_inception_is_tensorflows_with_its_weights(tmp_path, monkeypatch):
    """Its features are those of torchvision's network whose pools are patched one by one."""
    path = tmp_path / "weights"
    network = random_inception(path)
    weights = network.state_dict()
    network.fc = nn.Identity()
    average = functools.partial(F.avg_pool2d, count_include_pad=False)
    pools = iter([average] * 8 + [F.max_pool2d])  # of the nine blocks with a pool
    grey = torch.rand(2, 1, 40, 30, generator=random_stream())
    resized = F.interpolate(grey, (299, 299), mode="bilinear", align_corners=False)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "avg_pool2d", lambda *args, **sizes: next(pools)(*args, **sizes))
        truth = network(resized.expand(-1, 3, -1, -1) * 2 - 1)
    ours = common.inception_features(grey, path)
    assert difference(torch.from_numpy(ours), truth) < 1e-4
    for wrong in (grey + 1, grey - 1, grey * torch.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            common.inception_features(wrong, path)
    weights["Mixed_7c.branch_pool.bn.running_var"][3] = torch.nan
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
    for old, new in {'"image_id": 1': '"image_id": 9', "[": 10**5 * "["}.items():
        path.write_text(text.replace(old, new))
        with refused(path, "delete it"):
            common.load_coco(tmp_path, 32, split="train2017")


# --- week 1

DIGITS = ["--dataset", "glyphs", "--limit", "160", "--batch-size", "16", "--epochs", "2"]
DIGITS += ["--width", "4", "--samples", "100", "--device", "cpu", "--seed", str(SEED + 1)]
WEEK_1_FILES = [
    "AC-WGAN_GP.png",
    "checkpoint.pt",
    "curves.png",
    "evaluation_classifier.pt",
]
WEEK_1_FILES += ["history.csv", "results.json", "samples.npz"]


class Week1(NamedTuple):
    out: Path
    record: dict
    checkpoint: dict
    samples: np.ndarray  # uint8
    images: torch.Tensor  # the same in [0, 1]
    generator: nn.Module
    classifier: nn.Module


@contextlib.contextmanager
def quick_week_1(save_every=7, test_digits=100):
    """Few test digits and an untrained evaluation classifier: seconds saved."""
    draw = common.glyphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common, "glyphs", lambda n, seed=0: draw(test_digits if seed else n, seed)
        )
        patch.setattr(acwgan, "train_classifier", Mock())
        patch.setattr(acwgan, "CURVE_IMAGES", 50)
        patch.setattr(acwgan, "LOG_EVERY", 4)
        patch.setattr(acwgan, "SAVE_EVERY", save_every)
        yield patch


def week_1(out, *flags):
    """Run week 1 and read what it wrote."""
    record = acwgan.main([*flags, "--out", str(out)])
    checkpoint = torch.load(out / "checkpoint.pt")
    shape = [checkpoint["settings"][name] for name in ("latent", "width", "image_size")]
    generator = acwgan.Generator(*shape).eval()
    generator.load_state_dict(checkpoint["average"])
    classifier = acwgan.EvaluationClassifier().eval()
    classifier.load_state_dict(torch.load(out / "evaluation_classifier.pt")["network"])
    samples = np.load(out / "samples.npz")["images"]
    images = torch.from_numpy(samples).unsqueeze(1) / 255
    return Week1(out, record, checkpoint, samples, images, generator, classifier)


def contents(folder):
    """What the files in a folder hold, without dot files, by their names."""
    paths = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """An uninterrupted training of 20 steps."""
    with quick_week_1():
        return week_1(tmp_path_factory.mktemp("gan"), *DIGITS)


@pytest.fixture
def gan_copy(gan, tmp_path):
    """A copy of its folder, to be changed."""
    return Path(shutil.copytree(gan.out, tmp_path / "gan"))


@pytest.mark.parametrize(("share", "n"), [(1, 8), (0.5, 4), (0.3, 3)])
def test_gan_losses_match_a_critic_of_known_gradient(share, n):
    """The gradient of |x|^2 / 2 is x; ten of its pixels serve as logits."""

    def critic(x):
        return x.flatten(1).square().sum(1) / 2, x.flatten(1)[:, :10]

    real = torch.rand(8, 1, 4, 4, generator=random_stream(1))
    fake = torch.rand(8, 1, 4, 4, generator=random_stream(2))
    labels = torch.arange(8)
    torch.manual_seed(SEED)
    loss, parts = acwgan.critic_loss(critic, real, labels, fake, 3.0, share)
    torch.manual_seed(SEED)
    u = torch.rand(n, 1, 1, 1)
    norms = (u * real[:n] + (1 - u) * fake[:n]).flatten(1).norm(dim=1)
    wasserstein = (real.square() - fake.square()).sum() / 16
    penalty = (norms - 1).square().mean()
    auxiliary = F.cross_entropy(real.flatten(1)[:, :10], labels)
    truth = {"wasserstein": wasserstein, "penalty": penalty, "auxiliary": auxiliary}
    torch.testing.assert_close(parts, truth)
    torch.testing.assert_close(loss, 3 * penalty + auxiliary - wasserstein)
    loss = acwgan.generator_loss(critic, fake, labels)
    auxiliary = F.cross_entropy(fake.flatten(1)[:, :10], labels)
    torch.testing.assert_close(loss, auxiliary - fake.square().sum() / 16)


def test_penalty_gradient_agrees_with_finite_differences():
    """A step of 1e-8 in float64 crosses no kink of a leaky ReLU, but for one draw in 1,000."""
    torch.manual_seed(SEED)
    critic = acwgan.Critic(1).double()
    real = torch.rand(3, 1, 28, 28).double()
    fake = torch.rand(3, 1, 28, 28).double()

    def penalty(weight):
        def changed(images):
            return torch.func.functional_call(critic, {"layers.1.weight": weight}, images)

        torch.manual_seed(SEED)
        return acwgan.gradient_penalty(changed, real, fake)

    weight = critic.layers[1].weight
    assert torch.autograd.gradcheck(penalty, weight, eps=1e-8, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [28, 64])
def test_label_overwrites_the_first_ten_latent_numbers(size):
    generator = acwgan.Generator(20, 2, size).eval()
    latent = 100 * torch.randn(9, 20, generator=random_stream())
    images = generator(latent, torch.arange(9))
    latent[:, :10] = 7
    assert torch.equal(generator(latent, torch.arange(9)), images)
    assert images.shape == (9, 1, size, size)
    assert images.min() >= 0
    assert images.max() <= 1


def test_week_1_writes_the_files_it_promises(gan):
    assert [*contents(gan.out)] == WEEK_1_FILES


def test_week_1_returns_what_results_json_holds(gan):
    record = json.loads(json.dumps(gan.record, default=str))
    assert json.loads((gan.out / "results.json").read_text()) == record
    assert record["dataset"] == "glyphs"
    assert record["dataset_size"] == 160
    assert record["steps"] == 20
    assert record["steps_per_second"] == pytest.approx(20 / record["training_seconds"])


def test_samples_are_the_averaged_generators_digits(gan):
    """But for one grey level: batches of other sizes may be rounded differently."""
    labels = torch.arange(100) % 10
    latent = torch.randn(100, 74, generator=torch.Generator().manual_seed(SEED + 1))
    images = gan.generator(latent, labels).detach()
    assert (images - gan.images).abs().max() < 1.1 / 255
    assert gan.samples.dtype == np.uint8
    stored = np.load(gan.out / "samples.npz")["labels"]
    assert stored.dtype == np.int64
    assert np.array_equal(stored, labels)


@torch.no_grad()
def test_week_1s_distances_are_recomputed_from_its_files(gan):
    """The classifier learnt from 134 of 160 images; the other 26 are the held-out real ones."""
    images, labels = common.glyphs(160)
    latent = torch.randn(26, 74, generator=torch.Generator().manual_seed(SEED + 1))
    matched = (gan.generator(latent, labels[134:]) * 255).round() / 255
    test_features = gan.classifier.features(common.glyphs(100, 1)[0]).double()
    distances = []
    for x in (matched, images[134:]):
        ours = gan.classifier.features(x).double()
        distances.append(common.frechet_distance_torch(ours, test_features).item())
    assert gan.record["frechet_distance"] == pytest.approx(distances[0], rel=0.01)
    assert gan.record["frechet_distance_real"] == pytest.approx(distances[1], rel=0.01)
    assert gan.record["frechet_ratio"] == pytest.approx(
        distances[0] / distances[1], rel=0.02
    )


def test_week_1s_accuracies_are_recomputed_from_its_files(gan):
    test_images, test_labels = common.glyphs(100, 1)
    correct = gan.classifier(test_images).argmax(1) == test_labels
    hits = gan.classifier(gan.images).argmax(1) == torch.arange(100) % 10
    assert gan.record["evaluation_accuracy"] == common.wilson(correct.sum(), 100)
    assert gan.record["class_accuracy"] == common.wilson(hits.sum(), 100)


def test_week_1s_curve_has_ten_points_of_its_samples(gan):
    curve = gan.record["curve"]
    hits = gan.classifier(gan.images[:50]).argmax(1) == torch.arange(50) % 10
    assert [point["epochs"] for point in curve] == pytest.approx(np.arange(1, 11) / 5)
    assert curve[-1]["class_accuracy"] == pytest.approx(hits.float().mean().item())


def test_history_csv_has_a_row_of_losses_every_few_steps(gan):
    names, *rows = csv.reader((gan.out / "history.csv").read_text().splitlines())
    assert names == [
        "step",
        "seconds",
        "wasserstein",
        "penalty",
        "auxiliary",
        "generator",
    ]
    assert [row[0] for row in rows] == ["1", "5", "9", "13", "17"]
    assert np.isfinite(np.array(rows, float)).all()


def test_both_step_sizes_fall_linearly_to_zero(gan):
    for name, rate in {"generator_adam": 4e-3, "critic_adam": 2e-3}.items():
        group = gan.checkpoint[name]["param_groups"][0]
        assert group["lr"] == pytest.approx(rate / 20)
        assert group["betas"] == (0.0, 0.99)


def test_week_1s_figure_has_a_caption_above_each_half(gan):
    page = np.array(Image.open(gan.out / "AC-WGAN_GP.png").convert("L"))
    assert page.shape == (862, 690)
    for top in (0, 430):
        caption = page[top + 4 : top + 84, 4:-4]
        assert (caption == 255).sum() > 50


def test_the_average_is_one_over_every_step(tmp_path):
    """Its decay rises to 0.3; the first weights are those of the seed."""
    weights = []
    averages = []
    update = acwgan.update_average

    def record(average, generator, decay):
        averages.append(average.project.weight.clone())
        weights.append(generator.project.weight.detach().clone())
        update(average, generator, decay)

    with quick_week_1() as patch:
        patch.setattr(acwgan, "update_average", record)
        run = week_1(tmp_path, *DIGITS, "--average", "0.3")
    torch.manual_seed(SEED + 1)
    mean = acwgan.Generator(74, 4).project.weight.detach()
    assert torch.equal(averages[0], mean)
    for step, weight in enumerate(weights, 1):
        decay = min(0.3, step / (step + 8))
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(run.generator.project.weight, mean, atol=1e-5)
    assert len(weights) == 20
    assert torch.equal(weights[-1], run.checkpoint["generator"]["project.weight"])


def test_each_epoch_sees_all_images_in_an_order_of_its_own(tmp_path):
    """The images that the critic gets are recognised by their sums."""
    seen = []
    step = acwgan.critic_step

    def record(critic, adam, real, labels, fake):
        seen.append(real.sum((1, 2, 3)))
        return step(critic, adam, real, labels, fake)

    with quick_week_1() as patch:
        patch.setattr(acwgan, "critic_step", record)
        week_1(tmp_path, *DIGITS)
    first = torch.cat(seen[:10])
    second = torch.cat(seen[10:])
    truth = common.glyphs(160)[0].sum((1, 2, 3)).sort().values
    assert torch.allclose(first.sort().values, truth)
    assert torch.allclose(second.sort().values, truth)
    assert not torch.allclose(first, second)


def test_the_seed_of_week_1_shapes_its_digits(gan, tmp_path):
    with quick_week_1():
        run = week_1(tmp_path / "a", *DIGITS, "--seed", str(2**32 - 1))
        again = week_1(tmp_path / "b", *DIGITS, "--seed", str(2**32 - 1))
    assert np.array_equal(run.samples, again.samples)
    assert not np.array_equal(run.samples, gan.samples)


def test_the_logs_settings_train_on_twelve_images_at_64_pixels(tmp_path):
    """With the largest seed; without an average, the generator itself draws."""
    flags = ["--dataset", "glyphs", "--limit", "12", "--batch-size", "4", "--epochs", "1"]
    flags += [
        "--critic-steps",
        "5",
        "--image-size",
        "64",
        "--width",
        "2",
        "--average",
        "0",
    ]
    with quick_week_1():
        run = week_1(tmp_path, *flags, "--samples", "20", "--seed", str(2**32))
    content = run.checkpoint
    assert content["critic_adam"]["state"][0]["step"] == 15
    assert content["generator_adam"]["state"][0]["step"] == 3
    torch.testing.assert_close(content["average"], content["generator"], rtol=0, atol=0)
    assert run.samples.shape == (20, 28, 28)
    assert np.isfinite(run.record["frechet_ratio"])


@pytest.mark.parametrize(("save_every", "saves"), [(3, 2), (5, 2), (7, 1)])
def test_an_interrupted_training_resumes_to_the_same_bits(
    gan, tmp_path, save_every, saves
):
    """Interrupted at a save: within the first epoch, at its end, and between curve points."""
    interrupt = Mock(side_effect=[None] * (saves - 1) + [KeyboardInterrupt])
    with quick_week_1(save_every) as patch:
        write_csv = common.write_csv
        patch.setattr(common, "write_csv", interrupt)
        with pytest.raises(KeyboardInterrupt):
            week_1(tmp_path, *DIGITS)
        patch.setattr(common, "write_csv", write_csv)
        assert torch.load(tmp_path / "checkpoint.pt")["steps"] == save_every * saves
        run = week_1(tmp_path, "--resume")
    for name in (
        "generator",
        "critic",
        "average",
        "generator_adam",
        "critic_adam",
        "random",
    ):
        torch.testing.assert_close(
            run.checkpoint[name], gan.checkpoint[name], rtol=0, atol=0
        )
    assert run.checkpoint["curve"] == gan.checkpoint["curve"]
    for mine, whole in zip(
        run.checkpoint["history"], gan.checkpoint["history"], strict=True
    ):
        assert {**mine, "seconds": 0} == {**whole, "seconds": 0}
    assert np.array_equal(run.samples, gan.samples)


@pytest.mark.parametrize("flags", [DIGITS, ["--resume"]])
def test_a_finished_training_is_reported_again_untrained(gan, gan_copy, flags):
    with quick_week_1() as patch:
        patch.setattr(acwgan, "critic_step", Mock(side_effect=AssertionError))
        run = week_1(gan_copy, *flags)
    for name in (
        "steps",
        "training_seconds",
        "curve",
        "class_accuracy",
        "frechet_distance",
    ):
        assert run.record[name] == gan.record[name]
    assert np.array_equal(run.samples, gan.samples)


def test_an_unfinished_training_asks_for_resume_or_force(gan, gan_copy):
    path = gan_copy / "checkpoint.pt"
    torch.save({**gan.checkpoint, "steps": 14}, path)
    with quick_week_1():
        with refused(path, "--resume", "--force", code=2):
            week_1(gan_copy, *DIGITS)
        assert torch.load(path)["steps"] == 14
        run = week_1(gan_copy, *DIGITS, "--force")
    assert np.array_equal(run.samples, gan.samples)


OTHER_SETTINGS = [
    "epochs 1",
    "batch_size 8",
    "critic_steps 2",
    "critic_lr 1.0",
    "beta2 0.5",
]
OTHER_SETTINGS += [
    "generator_lr 1.0",
    "latent 20",
    "image_size 64",
    "width 2",
    "average 0.5",
]
OTHER_SETTINGS += ["limit 100", "seed 99"]


@pytest.mark.parametrize("start", [DIGITS, ["--resume"]])
@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_a_training_of_other_settings_is_refused(gan_copy, start, setting):
    before = contents(gan_copy)
    name, value = setting.split()
    flags = ["--" + name.replace("_", "-"), value]
    words = (gan_copy / "checkpoint.pt", name, f"not {value}", "--out", "--force")
    with quick_week_1(), refused(*words, code=2):
        week_1(gan_copy, *start, *flags)
    assert contents(gan_copy) == before


def test_a_second_run_in_the_same_folder_is_refused(gan_copy):
    with common.hold(gan_copy), refused(gan_copy, "another run"):
        week_1(gan_copy, *DIGITS, "--force")


@pytest.mark.parametrize("flags", [["--resume"], ["--sample", "3"], DIGITS])
@pytest.mark.parametrize("network", ["generator", "average"])
def test_a_checkpoint_that_holds_nan_is_refused(gan_copy, flags, network):
    path = gan_copy / "checkpoint.pt"
    content = torch.load(path)
    content[network]["project.weight"][1, 2] = torch.nan
    torch.save(content, path)
    with quick_week_1(), refused(path, "NaN", "--force"):
        week_1(gan_copy, *flags)


@pytest.mark.parametrize("noticed", ["measured", "saved"])
def test_a_training_that_diverges_says_so(tmp_path, noticed):
    flags = [*DIGITS, "--generator-lr", "1e9", "--critic-lr", "1e9"]
    with quick_week_1(save_every=1) as patch:
        if noticed == "measured":
            patch.setattr(acwgan, "save_checkpoint", Mock())
        else:
            point = {"class_accuracy": {"rate": 0.5}}
            patch.setattr(acwgan, "measure", lambda *_: (None, dict(point)))
        with refused("diverged", "--critic-lr", "--generator-lr"):
            week_1(tmp_path, *flags)


def test_the_distance_is_of_samples_with_the_held_out_classes(gan_copy):
    with quick_week_1() as patch:
        draw = Mock(wraps=acwgan.generate)
        patch.setattr(acwgan, "generate", draw)
        week_1(gan_copy, *DIGITS)
    requested = [call.args[1].tolist() for call in draw.call_args_list]
    assert common.glyphs(160)[1][134:].tolist() in requested


def test_sample_draws_the_digits_of_samples_npz_without_data(gan, gan_copy, monkeypatch):
    monkeypatch.setattr(common, "load_digits", Mock(side_effect=AssertionError))
    before = contents(gan_copy)
    acwgan.main(["--sample", "100", "--out", str(gan_copy)])
    after = contents(gan_copy)
    assert {*after} - {*before} == {"drawn.npz", "drawn.png"}
    assert {name: after[name] for name in before} == before
    drawn = np.load(gan_copy / "drawn.npz")
    assert np.array_equal(drawn["images"], gan.samples)
    assert np.array_equal(drawn["labels"], np.arange(100) % 10)


def test_sample_takes_a_class_and_a_seed(gan, gan_copy):
    acwgan.main(
        ["--sample", "20", "--digit", "0", "--seed", "99", "--out", str(gan_copy)]
    )
    drawn = np.load(gan_copy / "drawn.npz")
    assert drawn["labels"].tolist() == [0] * 20
    assert not np.array_equal(drawn["images"][0], gan.samples[0])


def test_fid_is_of_the_samples_and_the_test_digits(gan_copy, tmp_path):
    """Inception runs, with random weights in the published format, on 10 and on 6 digits.

    Of its 2,048 features, tiny ones, the distance gets the first 50, enlarged: seconds saved.
    """
    torch.manual_seed(SEED)
    network = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    torch.save(network.state_dict(), tmp_path / common.INCEPTION)
    inception = common.inception_features
    inputs = {}
    outputs = {}

    def spy(images, *args):
        features = 1e8 * inception(images, *args)[:, :50]
        inputs[len(images)] = images
        outputs[len(images)] = torch.tensor(features)
        return features

    with quick_week_1(test_digits=6) as patch:
        patch.setattr(common, "inception_features", spy)
        flags = ["--inception", "--samples", "10", "--data", str(tmp_path)]
        run = week_1(gan_copy, *DIGITS, *flags)
    assert torch.equal(inputs[6], common.glyphs(6, 1)[0])
    assert torch.equal(inputs[10], run.images)
    truth = common.frechet_distance_torch(outputs[10], outputs[6]).item()
    assert truth > 1
    assert run.record["fid"] == pytest.approx(truth, rel=0.01)


def test_no_two_bars_of_week_1_show_at_once(tmp_path):
    """The curve is measured within the training's bar."""
    shown = []
    already_shown = []

    def progress(iterable, name="", *args, disable=False, **kwargs):
        if disable:
            return iterable
        return bar(iterable, name)

    def bar(iterable, name):
        already_shown.append([*shown])
        shown.append(name)
        yield from iterable
        shown.remove(name)

    with quick_week_1() as patch:
        patch.setattr(common, "progress", progress)
        week_1(tmp_path, *DIGITS)
    assert len(already_shown) > 3
    assert not any(already_shown)


def test_week_1_writes_everything_before_it_prints(tmp_path):
    with quick_week_1() as patch:
        patch.setattr(common, "print_table", Mock(side_effect=BrokenPipeError))
        with pytest.raises(BrokenPipeError):
            week_1(tmp_path, *DIGITS)
    assert [*contents(tmp_path)] == WEEK_1_FILES


def test_evaluation_classifier_learns_no_held_out_digit(tmp_path, monkeypatch):
    """It is cached, and the run's own random numbers go on as if there were none."""
    train = Mock()
    monkeypatch.setattr(acwgan, "train_classifier", train)
    images, labels = common.glyphs(60)
    state = torch.get_rng_state()
    classifier = acwgan.evaluation_classifier(tmp_path, "glyphs", images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.training_images == 50
    assert torch.equal(train.call_args.args[1], images[:50])
    acwgan.evaluation_classifier(tmp_path, "glyphs", images, labels)
    assert train.call_count == 1
    acwgan.evaluation_classifier(tmp_path, "mnist", images, labels)
    acwgan.evaluation_classifier(tmp_path, "mnist", images[:54], labels[:54])
    assert train.call_count == 3


@pytest.mark.parametrize("damage", ["NaN", "cut"])
def test_a_damaged_classifier_file_is_refused(gan_copy, damage):
    path = gan_copy / "evaluation_classifier.pt"
    content = torch.load(path)
    content["network"]["head.bias"][0] = torch.nan
    torch.save(content, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:99])
    with quick_week_1(), refused(path, "delete it"):
        week_1(gan_copy, *DIGITS)


@pytest.mark.parametrize("attacked", [False, True])
def test_train_classifier_learns_what_a_linear_layer_can(attacked):
    """Class k lights the rows 2k and 2k + 1; the attack swaps the classes k and 9 - k."""
    images = torch.zeros(40, 1, 28, 28)
    labels = torch.arange(40) % 10
    for i, label in enumerate(labels):
        images[i, :, 2 * label : 2 * label + 2] = 1
    torch.manual_seed(SEED)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    settings = {"seed": SEED, "epochs": 1, "lr": 1e-2, "smoothing": 0.05}

    def swap(_, inputs, y):
        return images[9 - y]

    acwgan.train_classifier(network, images, labels, settings, swap if attacked else None)
    truth = 9 - labels if attacked else labels
    assert torch.equal(network(images).argmax(1), truth)


def test_in_batches_is_the_function_of_all_rows():
    x = torch.rand(25, 3, generator=random_stream())
    y = torch.rand(25, 3, generator=random_stream(1))
    assert torch.equal(acwgan.in_batches(torch.add, x, y, size=10), x + y)


TICKS = {
    (0.981, 0.996): (0.98, 1),
    (0, 1): (0, 1),
    (3, 3): (2, 3),
    (-7, 6e4): (-2e4, 6e4),
}


@pytest.mark.parametrize("values", TICKS)
def test_ticks_are_round_and_enclose_the_curve(values):
    ticks = acwgan.round_ticks([values])
    assert ticks[[0, -1]] == pytest.approx(TICKS[values])
    assert 2 <= len(ticks) <= 7
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** np.floor(np.log10(step) + 1e-9)
    assert np.abs(mantissa - np.array([1, 2, 2.5, 5])).min() < 1e-6


def test_plot_draws_every_curve_in_a_colour_of_its_own():
    curves = {"first": ([0, 1, 2], [0.9, 0.95, 0.99]), "second": ([0, 2], [0.91, 0.92])}
    page = acwgan.plot("share", "epochs", curves)
    assert page.size == (430, 330)
    pixels = np.array(page).reshape(-1, 3)
    for colour in ("hsl(0, 80%, 40%)", "hsl(180, 80%, 40%)"):
        assert (pixels == ImageColor.getrgb(colour)).all(1).sum() > 100


MISUSE_OF_WEEK_1 = {
    "--digit 3": (2, "--sample"),
    "--resume --out absent": (2, "absent/checkpoint.pt"),
    "--resume --force": (2, "--force"),
    "--sample 3 --out absent": (2, "absent/checkpoint.pt"),
    "--sample 3 --width 9": (2, "width 4, not 9"),
    "--limit 11 --batch-size 4": (2, "11"),
    "--limit 20 --batch-size 32": (2, "20"),
    "--dataset mnist --data none --force": (1, "none/MNIST/raw"),
    "--out file/below": (1, "file/below"),
    "--decay none": (2, "--decay"),
    "--penalty-share 1": (2, "--penalty-share"),
}


@pytest.mark.parametrize("flags", MISUSE_OF_WEEK_1)
def test_misuse_of_week_1_ends_in_one_line(gan_copy, monkeypatch, capsys, flags):
    code, words = MISUSE_OF_WEEK_1[flags]
    monkeypatch.chdir(gan_copy.parent)
    Path("file").write_text("")
    before = contents(gan_copy)
    start = [] if "--sample" in flags else DIGITS
    monkeypatch.setattr(
        sys, "argv", ["acwgan.py", *start, "--out", "gan", *flags.split()]
    )
    with quick_week_1(), pytest.raises(SystemExit, match=f"^{code}$"):
        common.run(acwgan.main)
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert contents(gan_copy) == before


# --- week 2


class Transferred(NamedTuple):
    """A small run of every row, with classifiers that nobody trained."""

    out: Path
    flags: list
    record: dict


def write_week_1(path, **changes):
    """Write a checkpoint of week 1, as acwgan.py does, with untrained networks."""
    torch.manual_seed(SEED)
    content = {
        "kind": "acwgan",
        "settings": {"dataset": "glyphs", "image_size": 28, "latent": 20, "width": 8},
        "average": acwgan.Generator(20, 8, 28).state_dict(),
        "critic": acwgan.Critic(8, 28).state_dict(),
        "steps": 100,
        "total_steps": 100,
    }
    content.update(changes)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def week_1_file(tmp_path_factory):
    return write_week_1(tmp_path_factory.mktemp("week 1") / "checkpoint.pt")


def run_transfer(*flags):
    """`transfer.main` without the training of classifiers, and with short attacks."""
    short = {
        "pgd": (transfer.pgd, {"targeted": True, "steps": 2}, 30),
        "carlini-wagner": (transfer.carlini_wagner, {"searches": 1, "steps": 3}, 20),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acwgan, "train_classifier", Mock())
        patch.setattr(transfer, "ATTACKS", short)
        return transfer.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def transferred(week_1_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer")
    flags = [
        "--limit",
        20,
        "--samples",
        40,
        "--steps",
        2,
        "--batch-size",
        4,
        "--device",
        "cpu",
    ]
    flags += ["--seed", SEED, "--generator", week_1_file]
    return Transferred(out, flags, run_transfer(*flags, "--out", out))


@pytest.fixture
def copied(transferred, tmp_path):
    """The same run in a folder of this test's own."""
    out = shutil.copytree(transferred.out, tmp_path / "copy")
    return Transferred(out, [*transferred.flags, "--out", out], transferred.record)


@pytest.fixture
def networks(week_1_file):
    """Untrained classifiers beside week 1's generator and critic."""
    original, critic, _ = transfer.load_week_1(week_1_file, "auto")
    torch.manual_seed(SEED)
    parts = [original, critic, transfer.model_a()]
    for make, arguments, _, _ in transfer.CLASSIFIERS.values():
        parts.append(make(*arguments))
    for network in parts:
        network.eval().requires_grad_(False)
    return transfer.Networks(*parts)


def test_samples_are_drawn_by_the_generator_of_their_row(transferred, networks):
    for name, variant in transfer.VARIANTS.items():
        samples = np.load(transferred.out / f"samples-{name}.npz")
        generator = transfer.new_generator(variant, networks.original)
        checkpoint = torch.load(transferred.out / f"generator-{name}.pt")
        generator.load_state_dict(checkpoint["generator"])
        drawn = acwgan.generate(generator.eval(), torch.arange(40) % 10, SEED)
        assert np.array_equal(
            (drawn[:, 0] * 255).round().byte().numpy(), samples["images"]
        )


def test_samples_hold_what_the_record_counts(transferred):
    rows = transferred.record["rows"]
    assert list(rows) == [*transfer.VARIANTS, "pgd", "carlini-wagner"]
    for name in transfer.VARIANTS:
        row = rows[name]
        samples = np.load(transferred.out / f"samples-{name}.npz")
        n = len(samples["labels"])
        assert samples["images"].dtype == np.uint8
        assert samples["predicted"].dtype == np.int64
        wanted = np.full(n, 7) if "scratch" in name else (np.arange(n) + 1) % 10
        assert np.array_equal(samples["target"], wanted)
        counts = samples["labels"] != wanted
        assert row["target_fooled"]["n"] == counts.sum()
        fooled = samples["predicted"][counts] == wanted[counts]
        assert row["target_fooled"]["rate"] == pytest.approx(fooled.mean())


def test_every_column_measures_what_its_name_says():
    images = common.glyphs(5)[0]
    moved = images.clone()
    moved[:, :, 0, 0] += 0.5
    networks = Mock()
    answers = {
        "target": [7, 2, 7, 7, 7],
        "judge": [0, 2, 2, 3, 4],
        "pgd_judge": [0, 1, 1, 1, 4],
    }
    for name, answer in answers.items():
        getattr(networks, name).return_value = F.one_hot(torch.tensor(answer), 10)
    labels = torch.tensor(
        [0, 1, 2, 6, 7]
    )  # of which the last is the wanted class already
    variant = transfer.Variant("untrained", {}, wanted=7)
    row, classes = transfer.measure(moved, images, labels, variant, networks)
    assert classes["target"].tolist() == [7, 7, 7, 7, 7]
    assert classes["predicted"].tolist() == answers["target"]
    hits = {"target_fooled": 3, "judge_reads_y": 2, "both": 2}
    hits.update(pgd_judge_reads_y=2, both_by_pgd_judge=1)
    for name, n in hits.items():
        assert row[name] == common.wilson(n, 4), name
    assert row["l2"] == row["linf"] == 0.5


def test_the_table_has_unique_columns_within_100(transferred, capsys):
    transfer.print_rows("glyphs", transferred.record["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "glyphs" in lines[1]
    head = next(line for line in lines if line.startswith("row "))
    columns = re.split("  +", head)
    assert len(set(columns)) == len(columns) == 10


def test_figures_are_narrow_and_names_clear_of_digits(transferred):
    paths = list(transferred.out.glob("*.png"))
    assert len(paths) == 3
    for path in paths:
        page = np.array(Image.open(path))
        assert 400 < page.shape[1] <= 900
        assert (page[:, 112:120] == 255).all(), "a name runs into the digits"
        assert (page[:, 8:112] < 128).any(), "there are no names"


def test_one_row_after_a_full_run_keeps_all_rows(copied, monkeypatch):
    """Fault 1: `--variant ours` threw away the other rows."""
    monkeypatch.setattr(
        transfer, "train", Mock(side_effect=AssertionError("trained again"))
    )
    again = run_transfer(*copied.flags, "--variant", "ours")
    for name, row in copied.record["rows"].items():
        for key in set(row) - {"digits_per_second"}:
            assert again["rows"][name][key] == row[key], (name, key)


def test_force_trains_a_finished_row_again_and_no_other(copied, monkeypatch):
    spy = Mock(side_effect=transfer.train)
    monkeypatch.setattr(transfer, "train", spy)
    again = run_transfer(*copied.flags, "--variant", "fid", "--force")
    assert {call.args[0] for call in spy.call_args_list} == {"original", "fid"}
    assert list(again["rows"]) == list(copied.record["rows"])


@pytest.mark.parametrize("name", ["steps", "seed", "batch_size"])
def test_rows_of_other_settings_are_refused(copied, name):
    with refused("was made with", name, "--force", code=2):
        run_transfer(
            *copied.flags, f"--{name}".replace("_", "-"), 77, "--variant", "ours"
        )


def test_force_leaves_rows_of_other_settings_out(copied):
    flags = ["--batch-size", 5, "--variant", "as-logged", "--force"]
    record = run_transfer(*copied.flags, *flags)
    assert list(record["rows"]) == ["original", "as-logged", "pgd", "carlini-wagner"]


def test_a_second_transfer_in_the_same_folder_is_refused(copied):
    with common.hold(copied.out), refused(copied.out, "another run"):
        run_transfer(*copied.flags)


def test_files_are_written_before_the_table_is_printed(copied, monkeypatch):
    (copied.out / "results.json").unlink()
    monkeypatch.setattr(
        common, "print_table", Mock(side_effect=ValueError("no such letter"))
    )
    with pytest.raises(ValueError, match="no such letter"):
        run_transfer(*copied.flags)
    assert (copied.out / "results.json").exists()


def test_week_1_is_known_by_its_weights(tmp_path):
    """Fault 22: the same training, run again, differs in its times only."""
    path = write_week_1(tmp_path / "checkpoint.pt", seconds=1.0)
    first = transfer.load_week_1(path, "auto")[2]["weights"]
    write_week_1(path, seconds=2.0, history=[1])
    assert transfer.load_week_1(path, "auto")[2]["weights"] == first
    content = torch.load(path)
    for part in ("average", "critic"):
        changed = copy.deepcopy(content)
        next(iter(changed[part].values())).add_(1)
        torch.save(changed, path)
        assert transfer.load_week_1(path, "auto")[2]["weights"] != first


def test_week_1_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with refused(path, "python acwgan.py --out"):
        transfer.load_week_1(path, "auto")
    with refused("glyphs", "mnist", "python acwgan.py --out", code=2):
        transfer.load_week_1(write_week_1(path), "mnist")
    large = {"average": acwgan.Generator(20, 8, 64).state_dict()}
    for change in (large, {"average": {}}, {"settings": {}}):
        with refused("does not fit", "python acwgan.py --out"):
            transfer.load_week_1(write_week_1(path, **change), "auto")


def test_an_unfinished_week_1_is_said_to_be(tmp_path, capsys):
    path = write_week_1(tmp_path / "checkpoint.pt", steps=7)
    transfer.load_week_1(path, "auto")
    assert "unfinished" in capsys.readouterr().out
    transfer.load_week_1(write_week_1(path), "auto")
    assert capsys.readouterr().out == ""


def test_judges_that_learnt_from_few_digits_are_warned_of(networks, capsys):
    """Fault 25: a judge that is wrong under PGD judges nothing."""
    images, labels = common.glyphs(10)

    def right(images):
        return F.one_hot(labels, 10) + 0 * images.flatten(1)[:, :10]

    weak = networks._replace(judge=lambda images: -right(images), pgd_judge=right)
    rates = transfer.measure_classifiers(weak, images, labels)
    assert rates["judge_under_pgd"]["rate"] == 0
    assert rates["pgd_judge_under_pgd"]["rate"] == 1
    warning = capsys.readouterr().err
    assert "WARNING: judge is weak" in warning
    assert "pgd_judge" not in warning


def test_attacks_show_a_bar_that_counts_images(monkeypatch):
    progress = Mock(side_effect=lambda steps, *args, **kwargs: steps)
    monkeypatch.setattr(common, "progress", progress)
    images = torch.rand(30, 1, 28, 28, generator=random_stream())
    attack = Mock(side_effect=lambda network, images, classes: images + 1)
    attacked = transfer.attack_in_batches("x", attack, {}, None, images, torch.arange(30))
    assert torch.equal(attacked, images + 1)
    assert progress.call_args.kwargs["unit"] == "image"
    assert len(progress.call_args.args[0]) * progress.call_args.kwargs["unit_scale"] == 30


def test_a_feature_bank_keeps_seven_batches():
    stream = random_stream()
    real = torch.rand(30, 1, 2, 3, generator=stream)
    batches = torch.rand(10, 8, 1, 2, 3, generator=stream)
    bank = transfer.FeatureBank(Mock(features=lambda images: images.flatten(1)), real)
    variance = real.flatten(1).var(0).sum()
    for i, batch in enumerate(batches):
        recent = batches[max(0, i - 7) : i + 1].reshape(-1, 6)
        distance = common.frechet_distance_torch(recent, real.flatten(1)) / variance
        assert torch.allclose(bank.distance(batch), distance, rtol=1e-3, atol=1e-5)


def test_a_feature_banks_gradient_is_as_if_all_batches_moved():
    stream = random_stream()
    real = torch.rand(30, 1, 2, 3, generator=stream)
    x = torch.rand(8, 1, 2, 3, generator=stream).requires_grad_()
    bank = transfer.FeatureBank(Mock(features=lambda images: images.flatten(1)), real)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(bank.distance(x), x)
    same = common.frechet_distance_torch(torch.cat([x, x, x]).flatten(1), real.flatten(1))
    (expected,) = torch.autograd.grad(same / real.flatten(1).var(0).sum(), x)
    assert difference(gradient, expected) < 1e-3


def loss_term(name, networks, images):
    """A term of the loss for these images of the classes 0, 1, ..., which are wanted, too."""
    latent = torch.ones(len(images), networks.original.latent)
    labels = torch.arange(len(images))
    bank = transfer.FeatureBank(networks.auxiliary, common.glyphs(40)[0])
    return transfer.loss_term(name, networks, bank, images, latent, labels, labels)


def test_the_terms_of_the_losses_are_their_formulas(networks):
    logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 5.0]])
    assert transfer.margin(logits, torch.tensor([0, 1])).tolist() == [2.0, -3.0]
    images = common.glyphs(8)[0].requires_grad_()
    labels = torch.arange(8)
    missing = 1.5 - transfer.margin(networks.target(images), labels)
    assert loss_term("adversarial hinge", networks, images) == missing.clamp(min=0).mean()
    missing = 2.0 - transfer.margin(networks.robust_auxiliary(images), labels)
    assert loss_term("robust hinge", networks, images) == missing.clamp(min=0).mean()
    (gradient,) = torch.autograd.grad(loss_term("frechet", networks, images), images)
    assert gradient.abs().sum() > 0
    original = networks.original(torch.ones(8, networks.original.latent), labels)
    assert loss_term("euclidean", networks, original) == 0
    moved = loss_term("euclidean", networks, original + 0.5)
    assert moved.item() == pytest.approx(784 * 0.25, rel=1e-3)
    torch.manual_seed(SEED)
    noise = [loss_term("noisy euclidean", networks, original).item() for _ in range(10)]
    # the mean square of 62,720 normal numbers is within 3 % at five standard deviations
    assert np.mean(noise) == pytest.approx(784 * 0.1**2, rel=0.03)


def test_each_row_of_the_ladder_changes_one_thing():
    rows = transfer.VARIANTS
    assert rows["scratch-live"]._replace(critic_trains=False) == rows["scratch"]
    for name in ("adversarial", "fid", "euclidean"):
        assert rows["as-logged"]._replace(weights=rows[name].weights) == rows[name]
    assert rows["as-logged"].weights == {"auxiliary": 1}  # gamma was 0, the FID detached
    assert set(rows["fid"].weights) - set(rows["adversarial"].weights) == {"frechet"}
    assert rows["scratch"].target == "random_target"
    assert set(rows["ours"].weights) == {"adversarial hinge", "robust hinge", "euclidean"}


def short_training(networks, name, steps=2):
    args = transfer.settings(
        ["--steps", str(steps), "--batch-size", "4", "--seed", str(SEED)]
    )
    return transfer.train(name, args, networks, *common.glyphs(20))


@pytest.mark.parametrize("name", ["scratch", "as-logged"])
def test_the_first_step_is_as_long_as_the_learning_rate(networks, name):
    torch.manual_seed(SEED)
    variant = transfer.VARIANTS[name]
    before = transfer.new_generator(variant, networks.original)
    after, history = short_training(networks, name, steps=1)
    step = (after.project.weight - before.project.weight).abs().max().item()
    assert step == pytest.approx(variant.lr, rel=1e-2)  # as Adam's first step is
    assert list(history[0]) == ["step", *variant.weights]


def test_scratch_live_alone_trains_its_critic(networks, monkeypatch):
    critics = []
    loss_term = transfer.loss_term

    def record(term, networks, *rest):
        critics.append(networks.critic.heads.weight.detach().clone())
        return loss_term(term, networks, *rest)

    monkeypatch.setattr(transfer, "loss_term", record)
    for name, rate in (("scratch", 0), ("scratch-live", 1e-3)):
        short_training(networks, name, steps=1)
        step = (critics[-1] - networks.critic.heads.weight).abs().max().item()
        assert step == pytest.approx(rate, rel=1e-2)


def test_training_leaves_the_other_networks_as_they_were(networks):
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    for name in transfer.VARIANTS:
        short_training(networks, name, steps=1)
    for network, state in zip(networks, before, strict=True):
        for key, weight in network.state_dict().items():
            assert torch.equal(weight, state[key])


def test_a_loss_that_is_no_number_ends_the_training(networks):
    with refused("adversarial", "no number"):
        short_training(
            networks._replace(target=lambda x: networks.target(x) / 0), "adversarial"
        )


@pytest.fixture
def schedule(networks, monkeypatch):
    """(learning rate, euclidean weight) in each step of `ours`, of which six warm up."""
    steps = []
    weights = []
    loss_term = transfer.loss_term

    class Adam(torch.optim.Adam):
        def step(self):
            steps.append((self.param_groups[0]["lr"], weights.pop()))
            super().step()

    def record(term, *rest):
        value = loss_term(term, *rest)
        if term == "euclidean":  # the gradient that reaches a term is its weight
            value = value + torch.zeros((), requires_grad=True)
            value.register_hook(lambda gradient: weights.append(gradient.item()))
        return value

    monkeypatch.setattr(transfer, "loss_term", record)
    monkeypatch.setattr(transfer, "WARM_UP", 6)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    short_training(networks, "ours", steps=2)
    return steps


def test_the_learning_rate_of_ours_warms_up_and_falls_to_0(schedule):
    ours = transfer.VARIANTS["ours"]
    n = int(2 * ours.rounds)
    expected = [ours.lr * min(1, (i + 1) / 6) * (1 - i / n) for i in range(n)]
    assert [rate for rate, _ in schedule] == pytest.approx(expected)


def test_the_euclidean_weight_of_ours_rises_to_its_full_value(schedule):
    ours = transfer.VARIANTS["ours"]
    n = int(2 * ours.rounds)
    expected = [ours.weights["euclidean"] * min(1, i / (0.7 * n)) for i in range(n)]
    assert [weight for _, weight in schedule] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["original", "as-logged", "scratch"])
def test_generators_start_as_their_rows_say(networks, name):
    stream = random_stream()
    latent = torch.randn(4, networks.original.latent, generator=stream)
    labels = torch.arange(4)
    generator = transfer.new_generator(transfer.VARIANTS[name], networks.original).eval()
    alone = generator(latent[:3], labels[:3])
    among_others = generator(latent, labels)[:3]
    assert torch.allclose(alone, among_others, atol=1e-6) == (name == "original")
    same = torch.equal(generator.project.weight, networks.original.project.weight)
    assert same == (name != "scratch")


def test_ours_first_draws_the_originals_digits(networks):
    latent = torch.randn(4, networks.original.latent, generator=random_stream())
    labels = torch.arange(4)
    refiner = transfer.new_generator(transfer.VARIANTS["ours"], networks.original)
    drawn = refiner(latent, labels)
    assert torch.allclose(drawn, networks.original(latent, labels), atol=1e-6)
    nn.init.constant_(refiner.decoder[-1][-1].bias, 0.1)
    assert not torch.allclose(refiner(latent, labels), drawn, atol=1e-2)


DIRECTION = torch.randn(784, generator=random_stream(7)) / 100


def linear(images):
    """Two logits: the first is linear in the pixels, the second is 0."""
    pixels = images.flatten(1)
    return torch.stack([pixels @ DIRECTION, 0 * pixels.sum(1)], 1)


def test_pgd_moves_a_linear_classifier_by_the_closed_form():
    images = torch.full((3, 1, 28, 28), 0.5)
    labels = torch.zeros(3, dtype=torch.long)
    step = 0.3 * DIRECTION.sign().view(1, 28, 28)
    assert torch.allclose(
        transfer.pgd(linear, images, labels, targeted=True), images + step
    )
    assert torch.allclose(transfer.pgd(linear, images, labels), images - step)


@pytest.mark.parametrize("options", [transfer.FGSM, transfer.PGD])
def test_adversarial_training_attacks_within_eps(options):
    images = torch.full((3, 1, 28, 28), 0.5)
    torch.manual_seed(SEED)
    moved = transfer.pgd(linear, images, torch.zeros(3, dtype=torch.long), **options)
    assert (moved - images).abs().max() <= 0.3 + 1e-6
    assert (linear(moved) < linear(images))[:, 0].all()


def test_carlini_wagner_finds_the_smallest_change():
    """To a lead of 0.1 of a linear classifier; for any direction, if its steps are small.

    Adam's first steps change each pixel by about learning_rate / 4, or all by 7 times the learning
    rate: 0.35 at 0.05, which overshoots a change of 0.4, but 0.07 at 0.01.
    """
    images = torch.rand(4, 1, 28, 28, generator=random_stream()) / 2 + 0.25
    wanted = 1 - linear(images).argmax(1)
    moved = transfer.carlini_wagner(linear, images, wanted, steps=200, lr=0.01)
    assert torch.equal(linear(moved).argmax(1), wanted)
    closed_form = (linear(images)[:, 0].abs() + 0.1) / DIRECTION.norm()
    ratio = (moved - images).flatten(1).norm(dim=1) / closed_form
    assert ratio.min() > 0.999
    assert ratio.max() < 1.05


def test_judges_differ_from_what_trains_and_from_each_other():
    rows = [
        transfer.CLASSIFIERS[name] for name in ("robust_auxiliary", "judge", "pgd_judge")
    ]
    for column in (1, 2):  # architecture, training
        assert len({str(row[column]) for row in rows}) == 3
    assert [row[3]["steps"] for row in rows] == [1, 1, 3]


def load_networks(out, networks):
    args = (out, "glyphs", *common.glyphs(20), networks.original, networks.critic)
    return transfer.load_networks(*args)


def test_robust_classifiers_alone_are_trained_on_attacks(networks, tmp_path, monkeypatch):
    train = Mock()
    monkeypatch.setattr(acwgan, "train_classifier", train)
    load_networks(tmp_path, networks)
    gray = torch.full((1, 1, 28, 28), 0.5)
    recipes = transfer.CLASSIFIERS.items()
    for call, (name, (_, _, _, attack)) in zip(
        train.call_args_list, recipes, strict=True
    ):
        trained_on = call.args[-1]
        assert (
            (trained_on is not None)
            == (attack is not None)
            == ("ju" in name or "rob" in name)
        )
        if trained_on:
            assert (
                linear(trained_on(linear, gray, torch.tensor([0])))[0, 0]
                < linear(gray)[0, 0]
            )


@pytest.mark.parametrize(
    ("column", "change"), [(2, {"seed": 9, "epochs": 7, "lr": 1}), (3, None)]
)
def test_a_change_of_recipe_trains_a_classifier_again(
    networks, tmp_path, monkeypatch, column, change
):
    train = Mock()
    monkeypatch.setattr(acwgan, "train_classifier", train)
    load_networks(tmp_path, networks)
    load_networks(tmp_path, networks)
    assert train.call_count == len(transfer.CLASSIFIERS)
    recipe = list(transfer.CLASSIFIERS["judge"])
    recipe[column] = change
    monkeypatch.setitem(transfer.CLASSIFIERS, "judge", tuple(recipe))
    load_networks(tmp_path, networks)
    assert train.call_count == len(transfer.CLASSIFIERS) + 1


def test_a_week_1_checkpoint_that_holds_nan_is_refused(tmp_path):
    path = write_week_1(tmp_path / "checkpoint.pt")
    checkpoint = torch.load(path)
    checkpoint["average"]["project.weight"][0] = torch.nan
    torch.save(checkpoint, path)
    with refused(path, "NaN"):
        transfer.load_week_1(Path(path), "auto")


# --- weeks 3 to 5: the classifier


class Gradient(NamedTuple):
    logits: torch.Tensor
    images: torch.Tensor


def logits_and_gradient(network, images):
    """The logits (N, L), and the gradient of the first label's logit in the images."""
    images = images.clone().requires_grad_()
    logits = network(images * 1)  # no leaf, so that a network may work in place
    return Gradient(logits.detach(), torch.autograd.grad(logits[:, 0].sum(), images)[0])


@functools.cache
def published_state(arch="tresnet_s"):
    """A random state dict with the moments of real activations and gammas of either sign."""
    torch.manual_seed(SEED)
    network = asl_model.tresnet(arch, 10)
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


def reference_conv(state, x, name, slope):
    """A convolution with InPlace-ABN; where it is strided, also the blur, as a convolution."""
    blurred = f"{name}.0.0.weight" in state
    if blurred:
        name += ".0"
    gamma = state[f"{name}.1.weight"].abs() + 1e-5
    beta = state[f"{name}.1.bias"]
    mean = state[f"{name}.1.running_mean"]
    var = state[f"{name}.1.running_var"]
    weight = state[f"{name}.0.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    x = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
    x = x * gamma[:, None, None] + beta[:, None, None]
    x = torch.where(x < 0, slope * x, x)
    if not blurred:
        return x
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])


def reference_dense(state, x, name):
    return F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])


def reference_logits(state, images):
    """TResNet's logits (N, L) in float64, written from the papers and the entries' names alone."""
    state = {name: x.double() for name, x in state.items()}
    pixels = [images[:, :, i::4, j::4] for i in range(4) for j in range(4)]
    x = reference_conv(state, torch.cat(pixels, 1).double(), "body.conv1", 1e-2)
    for name in dict.fromkeys(re.findall(r"body\.layer\d\.\d+", " ".join(state))):
        bottleneck = f"{name}.conv3.0.weight" in state
        y = reference_conv(state, x, f"{name}.conv1", 1e-3)
        y = reference_conv(state, y, f"{name}.conv2", 1e-3 if bottleneck else 1.0)
        if f"{name}.se.fc1.weight" in state:
            scale = reference_dense(state, y.mean((2, 3)), f"{name}.se.fc1").relu()
            scale = reference_dense(state, scale, f"{name}.se.fc2").sigmoid()
            y = y * scale[:, :, None, None]
        if bottleneck:
            y = reference_conv(state, y, f"{name}.conv3", 1.0)
        if f"{name}.downsample.1.0.weight" in state:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
            x = reference_conv(state, x, f"{name}.downsample.1", 1.0)
        elif f"{name}.downsample.0.0.weight" in state:
            x = reference_conv(state, x, f"{name}.downsample.0", 1.0)
        x = torch.relu(x + y)
    return reference_dense(state, x.mean((2, 3)), "head.fc")


def test_networks_have_the_published_files_sizes():
    """Entries and millions of weights of ASL's TResNets."""
    sizes = {
        "tresnet_m": (374, 29.50),
        "tresnet_l": (535, 53.75),
        "tresnet_xl": (649, 75.99),
    }
    for arch, size in sizes.items():
        with torch.device("meta"):
            network = asl_model.tresnet(arch)
        millions = round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
        assert (len(network.state_dict()), millions) == size


@pytest.mark.parametrize("size", [64, 72])
def test_a_published_file_gives_inplace_abns_logits(tmp_path, size):
    """Folded or not, and by `predict` in batches, against a rebuilding in float64."""
    path = tmp_path / "file.pth"
    images = photo_like(3, size)
    names = {str(i): "abcdefghij"[i] for i in (3, 0, 9, 4, 1, 8, 2, 7, 5, 6)}
    content = {"model": published_state(), "num_classes": 10, "idx_to_class": names}
    torch.save(content, path)
    truth = reference_logits(published_state(), images)
    for folded in (True, False):
        network, class_names = asl_model.load_asl(path, folded=folded)
        assert class_names == list("abcdefghij")
        assert (network.arch, network.training) == ("tresnet_s", False)
        assert any(isinstance(x, asl_model.NormAct) for x in network.modules()) != folded
        assert difference(network(images).detach(), truth) < 1e-4
        logits = torch.from_numpy(asl_model.predict(network, images, CPU, 2))
        assert difference(logits, truth) < 1e-4


def test_gammas_of_own_files_are_taken_as_they_are(tmp_path):
    state = published_state()
    torch.save({"model": state}, tmp_path / "published.pth")
    torch.save(
        {"model": state, "norm": "batch norm", "image_size": 32}, tmp_path / "own.pth"
    )
    gamma = "body.conv1.1.weight"
    theirs = asl_model.load_asl(tmp_path / "published.pth", folded=False)[0].state_dict()
    own = asl_model.load_asl(tmp_path / "own.pth", folded=False)[0]
    assert torch.equal(theirs[gamma], state[gamma].abs() + 1e-5)
    assert torch.equal(own.state_dict()[gamma], state[gamma])
    assert own.image_size == 32


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_every_wrapping_of_a_state_dict_is_loaded(tmp_path, key, prefix):
    """Among them what ASL's own training saves, under DataParallel or not."""
    state = {prefix + name: x for name, x in published_state().items()}
    state[f"{prefix}body.conv1.1.num_batches_tracked"] = torch.tensor(7)
    torch.save(
        {key: state, "optimizer": {"step": 1}} if key else state, tmp_path / "file.pth"
    )
    network, names = asl_model.load_asl(tmp_path / "file.pth", folded=False)
    assert names == list("0123456789")
    assert torch.equal(network.head.fc.weight, state[f"{prefix}head.fc.weight"])


def test_eighty_unnamed_outputs_are_cocos_and_said_so(tmp_path, capsys):
    torch.save(asl_model.tresnet("tresnet_s").state_dict(), tmp_path / "file.pth")
    names = asl_model.load_asl(tmp_path / "file.pth")[1]
    assert len(set(names)) == 80
    assert [names[i] for i in (0, 54, 60)] == ["person", "donut", "dining table"]
    assert "COCO's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arch", "words"),
    [
        ({"model": {"a": torch.zeros(3)}}, None, "is no TResNet"),
        ({"model": {"a": 5}}, None, "a is no finite tensor"),
        ({"head.fc.bias": torch.tensor([np.nan])}, None, "head.fc.bias is no finite"),
        ({"head.fc.bias": torch.tensor([np.inf])}, None, "head.fc.bias is no finite"),
        ({"new": torch.ones(3)}, None, "is no tresnet_s"),
        ({}, "tresnet_m", "is no tresnet_m"),
        ({}, "resnet18", "is no resnet18"),
        ({"idx_to_class": {0: "a"}}, None, "10 names"),
        ({"idx_to_class": ["a"] * 10}, None, "10 names"),
        ({"idx_to_class": dict.fromkeys(range(10), "a")}, None, "10 names"),
        ({"image_size": 66}, None, "image_size 66"),
        ({"image_size": 1_000_000}, None, "image_size 1000000"),
    ],
)
def test_other_files_are_refused_with_what_differs(tmp_path, change, arch, words):
    content = {"model": dict(published_state())}
    for name, x in change.items():
        is_weight = isinstance(x, torch.Tensor)
        (content["model"] if is_weight else content)[name] = x
    torch.save(content, tmp_path / "file.pth")
    with refused("file.pth", "--weights", words):
        asl_model.load_asl(tmp_path / "file.pth", arch)


def test_resnets_are_torchvisions_behind_a_normalisation(tmp_path):
    """Weights in half precision are taken; images stay in [0, 1]."""
    torch.manual_seed(SEED)
    theirs = torchvision.models.resnet18(num_classes=5).half().float().eval()
    state = {
        name: x.half() if x.is_floating_point() else x
        for name, x in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "file.pth")
    network, names = asl_model.load_asl(tmp_path / "file.pth")
    images = photo_like(2, 64)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert difference(network(images), theirs((images - mean) / std).detach()) < 1e-4
    assert (network.arch, names) == ("resnet18", list("01234"))


def test_blur_pool_needs_no_reflection():
    """Its backward pass is not deterministic on CUDA; the logits above watch the values."""
    blurred = asl_model.BlurPool()(torch.ones(1, 1, 5, 5, requires_grad=True))
    nodes = [blurred.grad_fn]
    for node in nodes:
        assert "Reflect" not in node.name()
        nodes += [parent for parent, _ in node.next_functions if parent]


# --- the gradient of inplace_abn v1.0.12


def test_the_wrong_gradient_is_an_independent_rebuildings(monkeypatch):
    """Folded or not; the network itself stays as it is."""
    network = asl_model.tresnet("tresnet_s", 10).double().train()
    network.load_state_dict(published_state())
    before = copy.deepcopy(network.state_dict())
    images = photo_like(1, 40).double()
    folded = asl_model.fold(network)
    right = logits_and_gradient(folded, images)

    def straight(relu, x):
        """A leaky ReLU that hands its gradient on as it comes."""
        return x + (F.leaky_relu(x, relu.negative_slope) - x).detach()

    with monkeypatch.context() as patch:
        patch.setattr(nn.LeakyReLU, "forward", straight)
        truth = logits_and_gradient(folded, images)
    for model in (network, folded):
        wrong = asl_model.inplace_abn_1_0_12(model)
        assert wrong.places == 0
        ours = logits_and_gradient(wrong, images)
        assert wrong.places == 10
        assert difference(ours.logits, right.logits) < 1e-9
        assert difference(ours.images, truth.images) < 1e-9
        assert difference(ours.images, right.images) > 0.1
    assert torch.equal(ours.logits, folded(images)), (
        "to the bit, or predictions could differ"
    )
    assert network.training
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_the_first_places_alone_can_be_skipped():
    """Of a chain of norms and ReLUs on one pixel, whose gradient is a product of matrices."""
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    network = nn.Sequential(*layers, *copy.deepcopy(layers), nn.Flatten()).eval()
    x = torch.randn(9, 6, 1, 1, generator=random_stream())
    scale = (1 + 1e-5) ** -0.5
    first = network[2](network[1](network[0](x))).gt(0).flatten(1).float()
    for k, places in {0: 0, 1: 1, 2: 2, 9: 2, None: 2}.items():
        wrong = asl_model.inplace_abn_1_0_12(network, k)
        ours = logits_and_gradient(wrong, x)
        slope = torch.ones(9, 1) if places == 2 else ours.logits[:, :1].gt(0).float()
        slope = slope * network[3].weight[0, :, 0, 0] * scale
        if places == 0:
            slope = slope * first
        slope = slope @ network[0].weight[:, :, 0, 0] * scale
        assert torch.allclose(ours.images.flatten(1), slope, atol=1e-5)
        assert wrong.places == places


class Activated(nn.Module):
    """A convolution, a norm, an activation and a second use of what the norm's output became."""

    def __init__(self, norm, activation, in_place=False):
        super().__init__()
        torch.manual_seed(SEED)
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = norm
        self.dropout = nn.Dropout()
        self.activation = activation
        self.in_place = in_place

    def forward(self, images):
        y = self.dropout(self.norm(self.conv(images)))
        z = self.activation(y)
        if self.in_place:
            z += 0.5
            z = y  # the activation stood as a statement
        return (z * torch.linspace(-1, 2, 3)[:, None, None] + y).mean((2, 3)).sin()


ACTIVATIONS = {
    "F.relu_": (F.relu_, True),
    "x.relu_": (torch.Tensor.relu_, True),
    "relu module": (nn.ReLU(inplace=True), True),
    "leaky relu module": (nn.LeakyReLU(0.1, inplace=True), True),
    "F.leaky_relu_": (F.leaky_relu_, True),
    "F.elu_": (F.elu_, True),
    "by keyword": (lambda x: torch.relu(input=x), False),
    "x.relu": (torch.Tensor.relu, False),
    "F.elu": (F.elu, False),
    "leaky relu": (F.leaky_relu, False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_or_not_logits_stay_and_derivatives_go(name):
    """The gradient is that of a network whose activation is a straight-through step."""
    activation, in_place = ACTIVATIONS[name]
    network = Activated(nn.BatchNorm2d(3), activation, in_place).eval()
    images = photo_like(2, 16)

    def straight(x):
        value = activation(x.detach().clone())
        if in_place:
            x.data = value
        return x + (value - x).detach()

    wrong = asl_model.inplace_abn_1_0_12(network)
    ours = logits_and_gradient(wrong, images)
    truth = logits_and_gradient(
        Activated(nn.BatchNorm2d(3), straight, in_place).eval(), images
    )
    assert torch.equal(ours.logits, network(images))
    assert wrong.places == 1
    assert torch.allclose(ours.images, truth.images, atol=1e-6)
    assert np.array_equal(asl_model.predict(wrong, images, CPU), ours.logits)


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """As torchvision's detectors have them; other packages' bear the same name."""


def functional_norm(x):
    return torch.batch_norm(
        x, None, None, torch.zeros(3), torch.ones(3), False, 0.1, 1e-5, False
    )


@pytest.mark.parametrize(
    ("norm", "activation", "places"),
    [
        (functional_norm, F.relu, 1),
        (FrozenBatchNorm2d(3), F.relu, 1),
        (nn.Identity(), F.relu, 0),
        (nn.BatchNorm2d(3), nn.ReLU6(), 0),
        (nn.BatchNorm2d(3), nn.PReLU(), 0),
        (nn.Identity(), nn.LeakyReLU(0.1), 1),
        (nn.Identity(), nn.ELU(), 1),
    ],
)
def test_what_inplace_abn_could_have_replaced_is_counted(norm, activation, places):
    network = Activated(norm, activation).eval()
    wrong = asl_model.inplace_abn_1_0_12(network)
    ours = logits_and_gradient(wrong, photo_like(2, 16))
    right = logits_and_gradient(network, photo_like(2, 16))
    assert torch.equal(ours.logits, right.logits)
    assert wrong.places == places
    assert torch.equal(ours.images, right.images) == (places == 0)


def test_whole_networks_have_the_places_on_record():
    """LOG.md: 36 in TResNet-M, 9 in ResNet-18, 33 in ResNet-50; not the ReLUs of sums."""
    for arch, places in {"tresnet_m": 36, "resnet18": 9, "resnet50": 33}.items():
        wrong = asl_model.inplace_abn_1_0_12(asl_model.new_network(arch, 10))
        wrong(photo_like(1, 32))
        assert wrong.places == places


class Forgetful(nn.Module):
    """A network that answers something else each time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return images.mean((2, 3)) + self.calls


def test_logits_that_change_are_refused_on_the_first_batch():
    with refused("cannot be imitated"):
        asl_model.inplace_abn_1_0_12(Forgetful())(photo_like(1, 8))


def test_hidden_or_uncopyable_networks_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    with refused("scripted or traced", code=2):
        asl_model.inplace_abn_1_0_12(torch.jit.trace(network, photo_like(1, 8)))
    network.lock = threading.Lock()
    with refused("cannot be copied", "lock", code=2):
        asl_model.inplace_abn_1_0_12(network)


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
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        ours = logits.detach().to(dtype).requires_grad_()
        value = asl_model.AsymmetricLoss(*powers)(ours, targets.to(dtype))
        assert value.item() == pytest.approx(truth.item(), rel=tolerance)
        assert difference(torch.autograd.grad(value, ours)[0], exact) < tolerance


def test_asl_is_finite_at_any_logit_and_pulls():
    far = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 200.0, 1e4]] * 2, requires_grad=True)
    value = asl_model.AsymmetricLoss()(far, torch.tensor([[1.0], [0.0]]).expand(2, 6))
    gradient = torch.autograd.grad(value, far)[0]
    assert torch.stack([value, *gradient.flatten()]).isfinite().all()
    assert (gradient[0, :3] <= -0.9).all(), (
        "a positive is pulled up, however far off it is"
    )
    assert (gradient[1] >= 0).all()
    assert asl_model.AsymmetricLoss().gamma_pos == 1


def test_average_precision_is_the_brute_force_one():
    """Also where scores tie; a class that no image shows is left out."""
    rng = np.random.default_rng(SEED)
    labels = (rng.random((40, 7)) < 0.2).astype(np.float32)
    labels[0] = 1
    labels[:, 3] = 0
    logits = (4 * labels + 3 * rng.normal(size=(40, 7))).round()
    expected = []
    for scores, present in zip(logits.T, labels.T > 0, strict=True):
        if present.any():
            expected.append(
                np.mean([present[scores >= x].mean() for x in scores[present]])
            )
    assert np.allclose(asl_model.average_precision(logits, labels), expected)
    order = rng.permutation(40)
    assert np.allclose(
        asl_model.average_precision(logits[order], labels[order]), expected
    )


def test_a_constant_classifier_scores_the_labels_share():
    labels = np.eye(20)[:, :1]
    assert asl_model.average_precision(np.zeros((20, 1)), labels) == pytest.approx([0.05])
    certain = np.where(
        labels > 0, 200.0, 100.0
    )  # whose probabilities are all 1 in float32
    assert asl_model.average_precision(certain, labels) == pytest.approx([1.0])


def test_rates_count_labels_above_the_threshold():
    logits = np.array([[2.0, -2.0, 0.0], [0.1, 3.0, -1.0]])
    labels = np.array([[1, 0, 1], [0, 1, 0]])
    numbers = asl_model.measure(logits, labels, 0.5)
    assert numbers["OP"] == common.wilson(2, 3), "a logit on the threshold is absent"
    assert numbers["OR"] == common.wilson(2, 3)
    assert numbers["exact"] == common.wilson(0, 2)
    assert numbers["classes_present"] == 3
    assert asl_model.measure(logits, labels, 0.8)["OP"] == common.wilson(2, 2)


def test_scenes_have_labels_seeds_and_disjoint_splits(data):
    images, labels = asl_model.load_scenes(130, 64, SEED, "mnist", data)
    again = asl_model.load_scenes(70, 64, SEED, "mnist", data)
    assert images.shape == (130, 3, 64, 64)
    assert images.dtype == labels.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert 1 <= labels.sum(1).min() < labels.sum(1).max() <= 5
    assert torch.equal(again[0], images[:70])
    assert torch.equal(again[1], labels[:70])
    assert not torch.equal(
        asl_model.load_scenes(130, 64, SEED + 1, "mnist", data)[0], images
    )
    splits = ("train", "validation", "test")
    parts = [asl_model.scene_digits("mnist", data, split)[1] for split in splits]
    assert [len(part) for part in parts] == [37, 3, 20]
    assert torch.equal(torch.cat(parts[:2]), common.load_mnist(data)[0])
    assert torch.equal(parts[2], common.load_mnist(data, train=False)[0])


@pytest.mark.parametrize("digit", [0, 7])
def test_a_scene_shows_the_digits_of_its_labels(monkeypatch, digit):
    only = torch.zeros(10, 1, 28, 28)  # no other digit leaves a mark
    only[digit, 0, 13:15, 13:15] = 1
    found = Mock(return_value=("mnist", only, torch.arange(10)))
    monkeypatch.setattr(asl_model, "scene_digits", found)
    images, labels = asl_model.load_scenes(100, 64, SEED)
    marked = (images - images[:, :, :1, :1]).abs().amax((1, 2, 3)) > 0.1
    assert torch.equal(marked, labels[:, digit] == 1)


def test_every_20th_photo_is_held_out_whatever_the_limit(data):
    """Whatever the seed; the labels are in the order that is asked for."""
    whole, labels, names, _ = asl_model.load_data("coco", data, 32, "train2017")
    parts = [
        asl_model.load_data("coco", data, 32, split, seed=3)
        for split in ("train", "held-out")
    ]
    paths = [set(part[0].paths) for part in parts]
    assert len(whole) == 12
    assert [len(x) for x in paths] == [11, 1]
    assert paths[0] | paths[1] == set(whole.paths)
    reverse = asl_model.load_data("coco", data, 32, "train2017", names[::-1])
    assert torch.equal(reverse[1], labels.flip(1))
    few = asl_model.load_data("coco", data, 32, "held-out", limit=5)
    assert set(few[0].paths) == paths[1]
    with refused("has the label", code=2):
        asl_model.load_data("coco", data, 32, "val2017", [*names[1:], "yeti"])


def test_photos_are_read_in_the_order_asked_for(data):
    photos = asl_model.load_data("coco", data, 32, "train2017")[0]
    rows = [[3, 1], [0], [11, 3, 2], [5], [6], [7]]
    for images in (photos, photos[:]):
        for batch, expected in zip(
            asl_model.read_batches(images, rows), rows, strict=True
        ):
            assert torch.equal(batch, torch.stack([photos[row] for row in expected]))


def test_augmentation_is_cutout_then_randaugment(monkeypatch):
    """One seed an image, the same in any batch; the global random stream stays where it was."""
    images = torch.full((40, 3, 64, 64), 64 / 255)
    seeds = [1000 * SEED + i for i in range(40)]
    state = torch.get_rng_state()
    augmented = asl_model.augment(images, seeds)
    assert torch.equal(asl_model.augment(images[7:9], seeds[7:9]), augmented[7:9])
    assert torch.equal(torch.get_rng_state(), state)
    halve = Mock(return_value=lambda image: image.point(lambda x: x // 2))
    monkeypatch.setattr(asl_model, "RandAugment", halve)
    cut = (asl_model.augment(images, seeds) * 255).round()
    assert (augmented * 255 - 2 * cut).abs().amax((1, 2, 3)).gt(3).any(), (
        "RandAugment's doing"
    )
    assert cut.max() <= 127, "Cutout comes first, so that its colours are halved, too"
    squares = (cut != 32).any(1)
    heights = squares.any(2).sum(1)
    widths = squares.any(1).sum(1)
    assert heights.max() == widths.max() == 32
    assert torch.equal(squares.sum((1, 2)), heights * widths)
    assert len({x.numpy().tobytes() for x in cut}) == 40


# --- training


PHOTOS = (
    "--arch",
    "tresnet_s",
    "--image-size",
    "32",
    "--batch-size",
    "4",
    "--epochs",
    "3",
)
TRAIN = ("--train", *PHOTOS, "--threshold", "0.01", "--seed", str(2**32))


def classifier(data, out, *flags):
    """What `asl_model.main` returns for a training on the made-up photos."""
    flags = [*map(str, flags), "--data", str(data), "--out", str(out), "--device", "cpu"]
    return asl_model.main(flags)


class Trained(NamedTuple):
    out: Path
    record: dict


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return Trained(out, classifier(data, out, *TRAIN))


def test_a_training_reports_who_chose_and_who_judges(trained):
    """The held-out photo chooses, val2017 judges; 11 photos were trained on, 2 steps an epoch."""
    record = trained.record
    assert (record["dataset_size"], record["steps"], record["arch"]) == (
        11,
        6,
        "tresnet_s",
    )
    assert [record[split]["n"] for split in ("held-out", "val2017")] == [1, 3]
    rows = list(csv.DictReader((trained.out / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    best = max(float(row["mAP"]) for row in rows)
    assert record["held-out"]["mAP"] == pytest.approx(best)
    network = asl_model.load_asl(record["weights"])[0]
    assert (network.arch, network.image_size) == ("tresnet_s", 32)


def test_an_evaluation_honours_its_batch_size(trained, data, tmp_path, monkeypatch):
    read = Mock(wraps=asl_model.read_batches)
    monkeypatch.setattr(asl_model, "read_batches", read)
    weights = ("--weights", trained.record["weights"])
    record = classifier(data, tmp_path, "--evaluate", *weights, "--batch-size", 2)
    assert [len(rows) for rows in read.call_args.args[1]] == [2, 1]
    assert record["val2017"]["mAP"] == trained.record["val2017"]["mAP"]


def test_a_finished_training_is_reported_not_repeated(trained, data, monkeypatch):
    monkeypatch.setattr(asl_model.AsymmetricLoss, "forward", None)
    for again in (TRAIN, ("--resume",)):
        record = classifier(data, trained.out, *again)
        assert record["val2017"] == trained.record["val2017"]
        assert record["held-out"] == trained.record["held-out"]
    record = classifier(data, trained.out, "--resume", "--threshold", "0.9")
    assert record["val2017"]["mAP"] == trained.record["val2017"]["mAP"]


@pytest.mark.parametrize(
    "flag", ["lr=0.1", "limit=9", "seed=1", "batch-size=2", "epochs=9"]
)
def test_a_contradicting_flag_is_refused(trained, data, flag):
    name, value = flag.split("=")
    with refused(f"{name.replace('-', '_')} ", f", not {value}", "--force", code=2):
        classifier(data, trained.out, "--resume", f"--{flag}")


def test_a_stopped_training_resumes_to_the_same_bits(
    trained, data, tmp_path, monkeypatch
):
    """--out is enough; the report's threshold is kept."""
    predict = asl_model.predict
    stop = Mock(side_effect=[predict, predict, KeyboardInterrupt])
    monkeypatch.setattr(asl_model, "predict", lambda *args: stop()(*args))
    with pytest.raises(KeyboardInterrupt):
        classifier(data, tmp_path, *TRAIN)
    assert not list(tmp_path.glob("*.pth")), "no network that looks like a finished one"
    monkeypatch.setattr(asl_model, "predict", predict)
    with refused("unfinished", "--resume", code=2):
        classifier(data, tmp_path, *TRAIN)
    record = classifier(data, tmp_path, "--resume")
    assert record["val2017"] == trained.record["val2017"]
    whole = torch.load(trained.out / "checkpoint.pt")
    resumed = torch.load(tmp_path / "checkpoint.pt")
    for part in ("network", "average", "model"):
        for name, x in whole[part].items():
            assert torch.equal(resumed[part][name], x), name
    assert resumed["history"] == whole["history"]


def test_training_is_one_cycle_and_averages_weights(data, tmp_path, monkeypatch):
    """Of ten networks it keeps the best; the loss is ASL with gamma- 4, gamma+ 0 on photos."""
    scores = [0.3, 0.5, 0.9, 0.2, 0.9, 0.4, 0.4, 0.4, 0.4, 0.4]
    row = asl_model.ARCHITECTURES["tresnet_s"]._replace(
        blocks=(1, 1, 1, 1), width=8, features=256
    )
    monkeypatch.setitem(asl_model.ARCHITECTURES, "tresnet_s", row)
    states = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda x, f: save(x, f) or states.append(copy.deepcopy(x))
    )
    monkeypatch.setattr(
        asl_model, "average_precision", Mock(side_effect=map(np.array, scores))
    )
    monkeypatch.setattr(asl_model, "SAVE_EVERY", 1)
    asl = Mock(wraps=asl_model.AsymmetricLoss)
    monkeypatch.setattr(asl_model, "AsymmetricLoss", asl)
    settings = asl_model.Settings("coco", "tresnet_s", 32, 10, 4, 0.01, data=str(data))
    asl_model.train(settings, tmp_path, CPU)
    asl.assert_called_once_with(4, 0)
    steps = states[:20]
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
    for name, x in states[-1]["model"].items():
        assert torch.equal(x, steps[9]["average"][name]), "the last of equals"


def test_batches_are_shuffled_anew_and_resume(data):
    """Each photo once in an epoch, in another view each time."""
    settings = asl_model.Settings("coco", "tresnet_s", 64, 3, 2, 0.01, seed=SEED)
    images = photo_like(8, 64)
    labels = torch.arange(8.0)[:, None]
    batches = list(asl_model.training_batches(settings, images, labels, 0))
    rest = list(asl_model.training_batches(settings, images, labels, 5))
    for ours, truth in zip(rest, batches[5:], strict=True):
        assert torch.equal(ours[0], truth[0])
        assert torch.equal(ours[1], truth[1])
    views = set()
    for epoch in range(3):
        part = batches[4 * epoch : 4 * epoch + 4]
        order = torch.cat([targets for _, targets in part]).flatten()
        assert torch.equal(order.sort().values, torch.arange(8.0))
        seen = torch.cat([batch for batch, _ in part])[order == 3]
        views.add(seen.numpy().tobytes())
    assert len(views) == 3


@pytest.mark.parametrize("arch", ["resnet18", "tresnet_s"])
def test_training_goes_on_from_weights_of_its_kind(data, tmp_path, arch, capsys):
    """The last layer too, if the labels are the same; at another size; else it starts anew."""
    names = asl_model.load_data("coco", data, 32, "train2017")[2]
    state = asl_model.new_network(arch, 80).state_dict()
    content = {
        "model": state,
        "norm": "batch norm",
        "idx_to_class": dict(enumerate(names)),
    }
    torch.save(content, tmp_path / "file.pth")
    settings = asl_model.Settings(arch=arch, weights=str(tmp_path / "file.pth"))
    network = asl_model.starting_network(settings, names)
    for name, x in network.state_dict().items():
        assert torch.equal(x, state[name]), name
    assert all(p.requires_grad for p in network.parameters())
    assert "starts anew" not in capsys.readouterr().out
    network = asl_model.starting_network(settings, ["cat", "dog"])
    assert "starts anew" in capsys.readouterr().out
    assert network(photo_like(2, 32)).shape == (2, 2)
    assert torch.equal(next(network.parameters()), next(iter(state.values())))


def test_resnets_start_from_imagenets_published_weights(tmp_path, monkeypatch):
    """Downloaded with the hash in their name, unless --weights names a file."""
    download = Mock(side_effect=common.Failure("not downloaded"))
    monkeypatch.setattr(common, "download", download)
    settings = asl_model.Settings(arch="resnet18", data=str(tmp_path))
    with refused("not downloaded"):
        asl_model.starting_network(settings, ["cat"])
    url, path, sha256 = download.call_args.args
    assert url.endswith("/resnet18-f37072fd.pth")
    assert (path, sha256) == (tmp_path / "resnet18-f37072fd.pth", "f37072fd")


def test_a_diverging_training_says_what_to_change(data, tmp_path):
    with refused("diverged", "--lr"):
        classifier(data, tmp_path, "--train", *PHOTOS, "--lr", "1e30")
    assert not (tmp_path / "tresnet_s-coco.pth").exists()


def test_too_few_images_are_refused(data, tmp_path):
    with refused("--batch-size 99", "11 training images", code=2):
        classifier(data, tmp_path, "--train", *PHOTOS, "--batch-size", 99)


def test_photos_are_learnt_by_heart_and_their_labels_told(data, tmp_path, monkeypatch):
    """Photos of one colour, as they are: without augmentation, any optimiser that works does it."""
    monkeypatch.setattr(asl_model, "augment", lambda images, seeds: images)
    flags = ("--arch", "tresnet_s", "--image-size", 32, "--batch-size", 6, "--epochs", 40)
    record = classifier(data, tmp_path / "train", "--train", *flags)
    weights = ("--weights", tmp_path / "train" / "tresnet_s-coco.pth")
    assert record["val2017"]["mAP"] == 1
    seen = classifier(data, tmp_path, *weights, "--evaluate", "--split", "train2017")
    assert seen["train2017"]["mAP"] == 1
    assert seen["train2017"]["n"] == 12
    photo = data / "coco" / "train2017" / "0.png"
    labels = classifier(data, tmp_path, *weights, "--image", photo, "--threshold", "0.3")[
        "labels"
    ]
    assert next(iter(labels)) == "name 60"
    assert min(labels.values()) > 0.3


def test_the_scenes_classifier_is_cached_by_its_digits(data, tmp_path, monkeypatch):
    """A stopped training is continued; offline, glyphs have a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asl_model, "SCENES", {"train": 64, "validation": 8, "test": 8})
    small = asl_model.Settings(epochs=1, image_size=32)
    monkeypatch.setattr(asl_model, "Settings", lambda **kwargs: small._replace(**kwargs))
    train = Mock(wraps=asl_model.train)
    monkeypatch.setattr(asl_model, "train", train)
    for _ in range(2):
        network, names, path = asl_model.scenes_classifier(data, CPU)
    assert train.call_count == 1
    assert path == Path("runs/scenes_classifier/mnist/tresnet_s-scenes.pth")
    assert (names, network.image_size) == (list("0123456789"), 32)
    path.unlink()
    assert asl_model.scenes_classifier(data, CPU)[2].exists()
    assert asl_model.scenes_classifier(data, CPU, 9)[2].parent.name == "mnist-seed9"
    monkeypatch.setattr(
        common, "load_digits", lambda *args: ("glyphs", *common.glyphs(48))
    )
    asl_model.scene_digits.cache_clear()
    assert asl_model.scenes_classifier("elsewhere", CPU)[2].parent.name == "glyphs"
    asl_model.scene_digits.cache_clear()


# --- weights and flags


def test_coco_weights_are_own_ones_then_published_then_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asl_model, "ZOO", NOWHERE)
    with refused("--train --dataset coco --arch resnet18", "half an hour"):
        asl_model.coco_weights(tmp_path)
    published = tmp_path / "MS_COCO_TRresNet_M_224_81.8.pth"
    published.touch()
    assert asl_model.coco_weights(tmp_path) == published
    out = Path("runs/asl_model")
    out.mkdir(parents=True)
    for age, arch in enumerate(["resnet18", "tresnet_m", "resnet50"]):
        (out / f"{arch}-coco.pth").touch()
        os.utime(out / f"{arch}-coco.pth", (10**9, 10**9 - age))
    assert asl_model.coco_weights(tmp_path) == out / "resnet18-coco.pth"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("", "required"),
        ("--image photo.jpg", "no file photo.jpg"),
        ("--evaluate --weights file.pth", "no file file.pth"),
        ("--evaluate --train", "required"),
        ("--resume", "must exist"),
        ("--evaluate --arch resnet18", "--weights"),
        ("--train --image-size 66", "multiple of 4"),
        ("--evaluate --dataset scenes --split val2017", "--split"),
        ("--evaluate --threshold 1", "--threshold"),
        ("--train --seed 4294967297", "--seed"),
    ],
)
def test_misuse_is_refused_before_any_work(tmp_path, monkeypatch, capsys, flags, word):
    """Above all before any download."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "download", None)
    with pytest.raises(SystemExit) as caught:
        asl_model.main(flags.split())
    assert caught.value.code == 2
    assert word in capsys.readouterr().err


# --- weeks 3 to 5: the attacks


def descend(images, targets, weight, centre, reached, momentum):
    """PGD image by image, as Madry et al. 2018 write it, for |logits - centre|^2."""
    moved_images = []
    for x, target in zip(images.flatten(1), targets, strict=True):
        moved = x
        direction = 0
        for _ in range(15):
            logits = weight @ moved
            if reached and reached(logits, target):
                break
            gradient = 2 * (logits - centre) @ weight
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
    centre = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    targets = torch.arange(9) % 3

    def model(x):
        return x.flatten(1) @ weight.T

    def loss(logits, targets):
        return (logits - centre).square().sum(1)

    def low_logit(logits, target):
        return logits[..., 0] < 0.5 * target

    early_stop = {"never": False, "top class": True, "callable": low_logit}[stop]
    reached = {"never": None, "callable": low_logit}.get(
        stop, lambda x, y: x.argmax() == y
    )
    found = pgd_attack.pgd(
        model,
        images,
        targets,
        loss,
        0.4,
        0.1,
        15,
        early_stop=early_stop,
        momentum=momentum,
    )
    truth = descend(images, targets, weight, centre, reached, momentum)
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
    targets = torch.zeros(200)

    def loss(logits, targets):
        return (logits - 0.5).square().sum(1)

    starts = []
    for steps in (0, 0, 5):
        moved = pgd_attack.pgd(
            nn.Flatten(), images, targets, loss, 0.1, 0.07, steps, True, clip=clip
        )
        starts.append(moved)
        change = (moved.double() - images.double()).abs().max()
        assert 0.09 < change <= float(np.float32(0.1)), "not even by rounding"
        assert clip[0] <= moved.min() <= moved.max() <= clip[1]
    assert not torch.equal(starts[0], starts[1])


def test_pgd_attacks_no_images_and_forgives_rounding():
    def loss(logits, targets):
        return logits.sum(1)

    none = torch.rand(0, 1, 2, 2)
    assert pgd_attack.pgd(nn.Flatten(), none, torch.zeros(0), loss).shape == none.shape
    images = torch.full((1, 1, 2, 2), 1 + 1e-7)
    assert pgd_attack.pgd(nn.Flatten(), images, torch.zeros(1), loss).max() < 1


def test_what_pgd_cannot_attack_is_refused_with_what_to_do():
    def loss(logits, targets):
        return logits.sum(1)

    images = torch.rand(2, 1, 2, 2)
    targets = torch.zeros(2)
    for wrong in (255 * images, images - 1):
        with pytest.raises(
            ValueError, match=r"give them in \[0, 1\], and normalise inside"
        ):
            pgd_attack.pgd(nn.Flatten(), wrong, targets, loss)
    for size in ("eps", "alpha", "steps"):
        with pytest.raises(ValueError, match="negative"):
            pgd_attack.pgd(nn.Flatten(), images, targets, loss, **{size: -1})
    with pytest.raises(ValueError, match="2 images with 3 targets"):
        pgd_attack.pgd(nn.Flatten(), images, torch.zeros(3), loss)
    once = iter([torch.inf])
    for model in (lambda x: x.flatten(1) / 0, lambda x: x.flatten(1) + next(once, 0)):
        with refused("not finite"):
            pgd_attack.pgd(model, images, targets, loss)
    with refused("no gradient"):
        pgd_attack.pgd(lambda x: x.detach().flatten(1), images, targets, loss)


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


def test_pgd_leaves_the_model_and_its_inputs_as_they_were():
    network = small_network()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    images = photo_like(4, 12)
    targets = torch.tensor([0, 1, 2, 0])
    state = copy.deepcopy(network.state_dict())
    original = images.clone()
    moved = pgd_attack.pgd(network, images, targets, F.cross_entropy, steps=3)
    with pytest.raises(ZeroDivisionError):
        pgd_attack.pgd(network, images, targets, lambda x, y: 1 / 0)
    assert not moved.requires_grad
    assert torch.equal(images, original)
    assert not torch.equal(moved, original)
    assert [module.training for module in network] == [True, False, *[True] * 5]
    assert [p.requires_grad for p in network.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())
    network.eval()
    again = pgd_attack.pgd(network, images, targets, F.cross_entropy, steps=3)
    assert torch.equal(again, moved), "dropout was on"


def test_pgd_works_without_gradients_and_in_inference_mode():
    network = small_network().eval()
    images = photo_like(4, 12)
    targets = torch.tensor([0, 1, 2, 0])
    truth = pgd_attack.pgd(network, images, targets, F.cross_entropy, steps=3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            moved = pgd_attack.pgd(network, images, targets, F.cross_entropy, steps=3)
        assert torch.equal(moved, truth)


def test_a_network_that_normalises_in_place_is_attacked():
    network = small_network().eval()

    def in_place(x):
        return network(x.sub_(0.5))

    images = photo_like(4, 12)
    targets = torch.tensor([0, 1, 2, 0])
    moved = pgd_attack.pgd(in_place, images, targets, F.cross_entropy, steps=3)
    truth = pgd_attack.pgd(
        lambda x: network(x - 0.5), images, targets, F.cross_entropy, steps=3
    )
    assert torch.equal(moved, truth)


def random_tresnet(arch):
    """A TResNet whose norms do something."""
    torch.manual_seed(SEED)
    network = asl_model.tresnet(arch, 10).eval()
    for module in network.modules():
        if isinstance(module, asl_model.NormAct):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.2)
    return network


def test_the_gradient_error_of_right_networks_is_near_0():
    images = photo_like(1, 64)
    networks = [
        small_network(),
        random_tresnet("tresnet_s"),
        torchvision.models.resnet18(),
    ]
    networks += [asl_model.fold(networks[1]), lambda x: x.flatten(1).square()]
    networks += [
        torchvision.models.squeezenet1_1(),
        torchvision.models.mobilenet_v3_small(),
    ]
    for network in networks:
        assert pgd_attack.gradient_error(network, images) < 1e-3


@pytest.mark.parametrize("folded", [False, True])
def test_the_gradient_error_of_inplace_abn_1_0_12_is_near_1(folded):
    network = random_tresnet("tresnet_s")
    if folded:
        network = asl_model.fold(network)
    wrong = asl_model.inplace_abn_1_0_12(network)
    assert pgd_attack.gradient_error(wrong, photo_like(1, 64)) > 0.3


def test_the_gradient_error_finds_detached_and_rounding_networks():
    def detached(x):
        return (x * x.detach()).flatten(1)

    def straight_through(x):
        rounded = (8 * x).round() / 8
        return (x + (rounded - x).detach()).flatten(1)

    for model in (detached, straight_through):
        assert pgd_attack.gradient_error(model, photo_like(1, 8)) > 0.3
    error = pgd_attack.gradient_error(lambda x: F.dropout(x.flatten(1)), photo_like(1, 8))
    assert np.isnan(error)


def test_the_gradient_check_leaves_a_half_network_as_it_was():
    network = small_network().half()
    state = copy.deepcopy(network.state_dict())
    assert pgd_attack.gradient_error(network, photo_like(1, 12)) < 1e-3
    assert network.training
    for name, x in network.state_dict().items():
        assert x.dtype == state[name].dtype
        assert torch.equal(x, state[name])


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


def labels_task(target=2, direction="flip", threshold=0.5, bf16=False):
    return pgd_attack.Task(list("012345"), target, direction, threshold, bf16)


def test_restarts_try_what_is_left_at_half_the_step(monkeypatch):
    """The first try fails for images 1 and 2, the second for image 2, judged in float32."""
    images = torch.full((3, 3, 2, 2), 0.5)
    calls = []

    def attempt(network, images, wanted, loss, **settings):
        calls.append((len(images), settings))
        number = len(calls)
        succeed = {1: [True, False, False], 2: [True, False], 3: [False]}[number]
        levels = torch.where(torch.tensor(succeed), 1.0, 0.1 * number)
        return levels[:, None, None, None].expand(-1, 3, 2, 2)

    def network(x):
        logits = -torch.ones(len(x), 6)
        logits[:, 2] = x[:, 0, 0, 0] - 0.9
        assert not torch.is_autocast_enabled("cpu")
        return logits

    monkeypatch.setattr(pgd_attack, "pgd", attempt)
    row = pgd_attack.Row("x", "margin", 0.03, alpha=0.1, steps=8, restarts=2)
    result = pgd_attack.attack_labels(
        network, images, network(images), row, labels_task(bf16=True)
    )
    assert result[:, 0, 0, 0].tolist() == pytest.approx([1, 1, 0.1]), (
        "a failed restart is dropped"
    )
    assert [n for n, _ in calls] == [3, 2, 1]
    assert [s["alpha"] for _, s in calls] == [0.1, 0.05, 0.025]
    assert [s["random_start"] for _, s in calls] == [False, True, True]
    assert [s["momentum"] for _, s in calls] == [0, 0.75, 0.75]
    assert {s["eps"] for _, s in calls} == {0.03}
    assert {s["steps"] for _, s in calls} == {8}


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
    logits_before = torch.tensor(np.where(before, 1.0, -1))
    logits_after = torch.tensor(np.where(after, 1.0, -1))
    assert pgd_attack.wanted_labels(logits_before, task).tolist() == wanted.tolist()
    numbers = pgd_attack.count_labels(
        logits_before, logits_after, torch.tensor(truth), task
    )
    others = [0, 1, 2, 4, 5]
    old = before[attacked][:, others]
    new = after[attacked][:, others]
    lost = (old & ~new).sum(1)
    won = (new & ~old).sum(1)
    switched = (on != after[:, 3])[attacked]
    n = attacked.sum()
    assert numbers["target_switched"] == common.wilson(switched.sum(), n)
    assert numbers["exact"] == common.wilson((switched & (lost + won == 0)).sum(), n)
    assert numbers["others_lost"]["rate"] == pytest.approx(lost.sum() / old.sum())
    assert numbers["others_new"] == won.sum()
    assert numbers["labels_ratio"]["rate"] == pytest.approx(after.sum() / before.sum())
    assert numbers["target_ratio"]["rate"] == pytest.approx(after[:, 3].sum() / on.sum())
    for when, labels in {"actual": truth, "before": before, "after": after}.items():
        assert numbers[f"target_{when}"] == labels[:, 3].sum()
        assert numbers[f"labels_{when}"] == labels.sum()


def test_no_image_to_change_is_no_rate():
    logits = torch.ones(5, 6)
    numbers = pgd_attack.count_labels(logits, logits, None, labels_task(3, "on"))
    assert (
        numbers["exact"] is numbers["target_switched"] is numbers["others_lost"] is None
    )


def test_a_logit_on_the_threshold_is_absent_before_and_after():
    logits = torch.tensor([[0.0, 1, -1, 0, 0, 0]])
    after = torch.tensor([[0.0, 1, 1, 0, 0, 0]])
    numbers = pgd_attack.count_labels(logits, after, None, labels_task(2, "on"))
    assert numbers["labels_before"] == 1
    assert numbers["exact"]["rate"] == 1


def test_rates_over_photos_resample_photos():
    """Labels that are lost photo by photo: the interval is that of 20 photos, not 2,000 labels."""
    hits = torch.tensor([100] * 10 + [0] * 10)
    rate = pgd_attack.rate_over_photos(hits, torch.full((20,), 100))
    assert rate["rate"] == 0.5
    assert rate["n"] == 2000
    deviation = 1.96 * (0.25 / 20) ** 0.5
    assert rate["low"] == pytest.approx(0.5 - deviation, abs=0.06)
    assert rate["high"] == pytest.approx(0.5 + deviation, abs=0.06)
    assert pgd_attack.rate_over_photos(0 * hits, 0 * hits) is None


def test_the_rows_of_weeks_3_and_5_are_those_on_record():
    both = (pgd_attack.INPLACE_ABN, "right")
    record = {"WEEK_3": {(None, "right", 80 / 255)}, "WEEK_5": {(None, "right", 0.3)}}
    for gradient in both:
        record["WEEK_3"] |= {(loss, gradient, 0.6) for loss in ("softmax-ce", "bce")}
        record["WEEK_5"] |= {
            (x, gradient, 0.3) for x in ("softmax-ce", "bce", "softmax-bce")
        }
    for week, rows in record.items():
        ours = getattr(pgd_attack, week)
        assert {(row.loss, row.gradient, row.eps) for row in ours} == rows
        assert {(row.alpha, row.steps, row.restarts) for row in ours} == {
            (2 / 255, 40, None)
        }
        assert len({row.name for row in ours}) == len(ours)
        for row in ours:
            assert row.name.endswith("-inplace-abn") == (row.gradient == both[0])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"dataset": "scenes", "target": "8", "eps": 0.1, "direction": "flip"}),
        ("--dataset coco", {"target": "person", "eps": 8 / 255, "direction": "flip"}),
        (
            "--dataset coco --week 5",
            {"target": "dining table", "eps": 8 / 255, "direction": "on"},
        ),
        ("--dataset coco --week 3", {"target": "person", "direction": "on"}),
        ("--week 4", {"model": "digits", "dataset": "auto", "target": "3", "eps": 0.3}),
        (
            "--model resnet18",
            {"dataset": "imagenet", "target": "night snake", "eps": 8 / 255},
        ),
        (
            "--eps 8/255 --alpha 0.01",
            {"eps": 8 / 255, "alpha": 0.01, "steps": 40, "restarts": 2},
        ),
    ],
)
def test_the_defaults_of_an_attack_are_these(flags, expected):
    args = vars(pgd_attack.settings(flags.split()))
    assert {name: args[name] for name in expected} == expected
    assert args["loss"] == "margin"
    assert args["gradient"] == "right"
    assert args["threshold"] == 0.5


def test_the_default_folder_names_run_network_data_and_target():
    folders = {
        "": "attack-asl-scenes-8",
        "--week 5 --model fastestdet.py:load": "week5-fastestdet-coco-dining_table",
        "--dataset coco --split train2017 --augment": "attack-asl-train2017-augmented-person",
        "--sweep --target 3": "sweep-asl-scenes-3",
        "--model resnet18 --week 4": "week4-resnet18-imagenet-night_snake",
    }
    for flags, folder in folders.items():
        assert pgd_attack.settings(flags.split()).out == Path("runs/pgd_attack", folder)


def test_kept_new_and_lost_labels_are_told_apart():
    before = torch.tensor([1.0, 1, -1, -1])
    after = torch.tensor([1.0, -1, 1, -1])
    task = pgd_attack.Task(list("abcd"), 2, "on", 0.5)
    lines = pgd_attack.captions(before, after, task)
    labels = [(text.partition(" ")[0], colour) for text, colour in lines]
    assert labels == [("a", "black"), ("-b", "firebrick"), ("+c", "green")]
    top = task._replace(mean=torch.zeros(1))
    assert pgd_attack.captions(before, after, top) == [("a", "black")]
    assert pgd_attack.captions(before, -after, top) == [("b", "firebrick")]
    assert pgd_attack.captions(before, after + torch.tensor([0, 0, 1, 0]), top) == [
        ("c", "green")
    ]


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
    content |= {"image_size": 32, "idx_to_class": dict(enumerate("0123456789"))}
    torch.save(content, path)
    flags = [
        "--device",
        "cpu",
        "--data",
        str(data),
        "--weights",
        str(path),
        "--target",
        "3",
    ]
    return Attackable(path, [*flags, "--dataset", "scenes", "--limit", "6"])


@pytest.fixture
def short_weeks(monkeypatch):
    """Weeks 3, 4 and 5 with four steps a row: seconds saved."""
    for week in ("WEEK_3", "WEEK_4", "WEEK_5"):
        rows = [row._replace(steps=4) for row in getattr(pgd_attack, week)]
        monkeypatch.setattr(pgd_attack, week, tuple(rows))


class Attack(NamedTuple):
    """A finished week 5: its folder, its record, what it printed, and its arrays."""

    folder: Path
    record: dict
    printed: str
    arrays: dict


@pytest.fixture
def week5(attackable, tmp_path, short_weeks, capsys):
    out = tmp_path / "week5"
    record = pgd_attack.main(
        [*attackable.flags, "--week", "5", "--out", str(out), "--save", "4"]
    )
    with np.load(out / "adversarial.npz") as file:
        arrays = dict(file)
    return Attack(out, record, capsys.readouterr().out, arrays)


def test_week_5_writes_its_files_and_record(week5):
    names = {path.name for path in week5.folder.iterdir()}
    assert names == {".lock", "results.json", "adversarial.npz", "pgd-attack-on-some.png"}
    assert json.loads((week5.folder / "results.json").read_text())["rows"].keys() == {
        *(row.name for row in pgd_attack.WEEK_5),
        "margin",
    }
    assert week5.record["dataset_size"] == 6
    assert week5.record["seconds"] > 0
    for row in (*pgd_attack.WEEK_5,):
        numbers = week5.record["rows"][row.name]
        for setting in ("loss", "gradient", "eps", "alpha", "steps", "restarts"):
            assert numbers[setting] == getattr(row, setting)


def test_week_5_prints_the_logs_six_counts_within_100_columns(week5):
    for what in ("target", "labels"):
        for when in ("actual", "before", "after"):
            assert re.search(f"^{what} {when} +\\d+ +\\d+$", week5.printed, re.M)
    for line in week5.printed.splitlines():
        assert len(line) <= 100 or str(week5.folder.parent) in line, line


def test_the_arrays_are_what_the_network_saw_and_said(week5, attackable, data):
    network, _ = asl_model.load_asl(attackable.path)
    images, labels = asl_model.load_scenes(6, 32, 0, "mnist", data, "test")
    clean = (images[:4] * 255).round().byte()
    assert np.array_equal(week5.arrays["clean"], clean)
    assert np.array_equal(week5.arrays["truth"], labels[:4])
    assert week5.arrays["names"].tolist() == list("0123456789")
    assert (
        difference(torch.from_numpy(week5.arrays["before"]), network(images[:4])) < 1e-4
    )
    for name, numbers in week5.record["rows"].items():
        adversarial = torch.from_numpy(week5.arrays[f"adversarial-{name}"])
        after = torch.from_numpy(week5.arrays[f"after-{name}"])
        change = (adversarial.int() - clean.int()).abs().max() / 255
        assert change <= numbers["eps"] + 1 / 255
        assert difference(network(adversarial / 255), after) < 0.1


def test_the_records_map_is_that_of_the_clean_logits(week5, attackable, data):
    network, _ = asl_model.load_asl(attackable.path)
    images, labels = asl_model.load_scenes(6, 32, 0, "mnist", data, "test")
    ap = asl_model.average_precision(network(images).numpy(), labels.numpy())
    assert week5.record["mAP"] == pytest.approx(ap.mean(), abs=1e-6)


def test_both_gradients_are_checked_and_printed(week5):
    assert (
        week5.record["gradient_error"] < 1e-3 < 0.3 < week5.record["wrong_gradient_error"]
    )
    assert "skips the derivatives of 10 activations" in week5.printed
    assert "the gradient is right" in week5.printed
    assert "WARNING: the gradient is WRONG" in week5.printed


def test_the_wrong_gradient_attacks_otherwise(week5):
    for name in ("softmax-bce", "bce", "softmax-ce"):
        right = week5.arrays[f"adversarial-{name}"]
        wrong = week5.arrays[f"adversarial-{name}-inplace-abn"]
        assert not np.array_equal(right, wrong)


def test_an_attack_of_other_settings_is_not_overwritten(week5, attackable):
    flags = [*attackable.flags, "--out", str(week5.folder)]
    before = (week5.folder / "results.json").read_bytes()
    with refused("results.json", "week 5, not None", "--out", "--force", code=2):
        pgd_attack.main(flags)
    assert (week5.folder / "results.json").read_bytes() == before
    pgd_attack.main([*flags, "--force", "--steps", "1", "--restarts", "0"])
    assert (week5.folder / "results.json").read_bytes() != before


def test_a_damaged_record_is_refused(attackable, tmp_path):
    (tmp_path / "results.json").write_text("{")
    with refused("results.json is damaged", "--force", code=2):
        pgd_attack.main([*attackable.flags, "--out", str(tmp_path)])


def test_the_network_is_attacked_in_eval_mode(attackable, tmp_path, monkeypatch):
    modes = set()
    attack = pgd_attack.attack_labels

    def record(network, *rest):
        modes.update(module.training for module in network.modules())
        return attack(network, *rest)

    monkeypatch.setattr(pgd_attack, "attack_labels", record)
    pgd_attack.main([*attackable.flags, "--steps", "1", "--out", str(tmp_path)])
    assert modes == {False}


def test_the_sweep_runs_every_eps_and_control(attackable, tmp_path):
    flags = [
        *attackable.flags,
        "--sweep",
        "--limit",
        "3",
        "--steps",
        "2",
        "--out",
        str(tmp_path),
    ]
    rows = pgd_attack.main([*flags, "--alpha", "0.01"])["rows"]
    assert (tmp_path / "sweep.png").exists()
    for n in (0.25, 0.5, 1, 2, 4, 8, 16):
        attack = rows[f"attack-{n}"]
        assert attack["eps"] == rows[f"noise-{n}"]["eps"] == pytest.approx(n / 255)
        assert attack["alpha"] == pytest.approx(min(0.01, n / 255 / 4))
        assert (attack["steps"], rows[f"twice-the-steps-{n}"]["steps"]) == (2, 4)
        assert rows[f"noise-{n}"]["loss"] is None


def test_the_dose_skips_ever_more_derivatives(attackable, tmp_path):
    flags = [*attackable.flags, "--dose", "--limit", "2", "--out", str(tmp_path)]
    record = pgd_attack.main(flags)
    cosines = record["cosines"]
    assert record["rows"].keys() == {
        *(f"first-{n}" for n in (0, 1, 2, 4, 8, 16)),
        "all",
        "noise",
    }
    assert cosines["first-0"] == pytest.approx(1)
    assert cosines["all"] == pytest.approx(cosines["first-16"], abs=1e-6)
    assert cosines["all"] < 0.99
    assert record["places"] == 10
    assert (tmp_path / "dose.png").exists()


def run_torchrun(flags):
    """Run pgd_attack.py in two processes of one thread each; returns what it printed."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*run, "--nproc-per-node", "2", str(HERE / "pgd_attack.py"), *flags]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=one_thread
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("batch_size", ["2", "6"])
def test_two_of_torchruns_processes_give_the_table_of_one(
    attackable, tmp_path, batch_size
):
    """Of three batches, or of one: more processes than batches."""
    flags = [*attackable.flags, "--batch-size", batch_size, "--steps", "2"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have
    record = pgd_attack.main([*flags, "--out", str(tmp_path / "one")])
    torch.set_num_threads(threads)
    printed = run_torchrun([*flags, "--out", str(tmp_path / "many")])
    again = json.loads((tmp_path / "many" / "results.json").read_text())
    assert again["processes"] == 2
    assert again["rows"] == json.loads(json.dumps(record["rows"], default=str))
    assert printed.count("labels actual") == printed.count("attacked network") == 1
    assert again["command"].startswith("torchrun")


def test_the_png_of_a_photo_does_what_was_asked(attackable, data, tmp_path, capsys):
    scenes, _ = asl_model.load_scenes(1, 32, 0, "mnist", data, "test")
    clean = (scenes[0] * 255).round() / 255
    torchvision.utils.save_image(clean, tmp_path / "photo.png")
    flags = ["--device", "cpu", "--data", str(data), "--weights", str(attackable.path)]
    flags += [
        "--target",
        "3",
        "--image",
        str(tmp_path / "photo.png"),
        "--out",
        str(tmp_path),
    ]
    pgd_attack.main([*flags, "--eps", "0.3"])
    printed = capsys.readouterr().out
    pixels = np.array(Image.open(tmp_path / "photo-adversarial.png"))
    adversarial = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    network, _ = asl_model.load_asl(attackable.path)
    before, after = network(torch.stack([clean, adversarial])) > 0
    assert (before != after).nonzero().flatten().tolist() == [3]
    (line,) = re.findall("^margin: (.*)", printed, re.M)
    assert re.search("[+-]3 ", line)
    assert "do not do" not in printed
    pgd_attack.main([*flags, "--eps", "1e-6", "--force"])
    assert "these 8-bit pixels do not do what was asked" in capsys.readouterr().out


def test_a_missing_photo_is_named_before_any_download(capsys):
    with pytest.raises(SystemExit, match="2"):
        pgd_attack.main(["--image", "missing.jpg"])
    assert "missing.jpg" in capsys.readouterr().err


OWN = """
import torch
from torch import nn
from threading import Lock
from neighbour import NAMES

class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = Lock()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 80))
    def forward(self, x):
        return self.layers(x.sub_(0.5))

class Detached(Locked):
    def forward(self, x):
        return super().forward(x.detach())

class Casting(Locked):
    def forward(self, x):
        return super().forward(x.float())

class Frozen(Locked):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

class Probabilities(Locked):
    def forward(self, x):
        return super().forward(x).sigmoid()

class Endless(Locked):
    def forward(self, x):
        return super().forward(x) / 0

def scripted():
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 80))
    return torch.jit.trace(layers, torch.rand(1, 3, 16, 16)), NAMES, 16

load = lambda: (Locked(), NAMES, 16)
plain = lambda: (Locked().layers, NAMES, 16)
half = lambda: (Locked().half(), NAMES, 16)
frozen = lambda: (Frozen(), NAMES, 16)
detached = lambda: (Detached(), NAMES, 16)
casting = lambda: (Casting(), NAMES, 16)
probabilities = lambda: (Probabilities(), NAMES, 16)
endless = lambda: (Endless(), NAMES, 16)
broken = lambda: 1 / 0
leaves = lambda: exit(3)
pair = lambda: load()[:2]
function = lambda: ((lambda x: x), NAMES, 16)
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


@pytest.mark.parametrize("function", ["load", "half", "casting", "scripted"])
def test_a_network_of_ones_own_is_attacked_on_its_photos(own, function):
    flags, path = own
    record = pgd_attack.main([*flags, f"{path}:{function}"])
    assert record["rows"]["margin"]["target_actual"] == 1, (
        "the labels' order is the network's"
    )
    assert (path.parent / "out" / "pgd-attack-on-mine.png").exists()
    files = np.load(path.parent / "out" / "adversarial.npz")["files"]
    assert [Path(file).name for file in files] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("function", "words", "code"),
    [
        ("other", "'other'", 1),
        ("broken", "division by zero", 1),
        ("leaves", "SystemExit(3)", 1),
        ("endless", "not finite", 1),
        ("frozen", "no gradient", 1),
        ("detached", "no gradient", 1),
        ("probabilities", "logits, not probabilities", 1),
        ("too_few", "(3, 80), for 79 class names", 1),
        ("pair", "must return (network, class names, image size)", 1),
        ("function", "must return (network, class names, image size)", 1),
        ("no_size", "must return (network, class names, image size)", 1),
        ("cats", "cat", 2),
    ],
)
def test_a_network_that_cannot_be_attacked_is_told_why(own, function, words, code):
    flags, path = own
    with refused(words, code=code):
        pgd_attack.main([*flags, f"{path}:{function}", "--target", "name 50"])


@pytest.mark.parametrize("function", ["load", "scripted"])
def test_only_the_wrong_gradient_needs_a_copy(own, function):
    flags, path = own
    with refused({"load": "right", "scripted": "traced"}[function], code=2):
        pgd_attack.main(
            [*flags, f"{path}:{function}", "--gradient", pgd_attack.INPLACE_ABN]
        )


def test_an_unknown_label_names_the_nearest():
    names = ["person", "bicycle", "dining table"]
    with refused("'dinning table' is none of the 3 names", "dining table", code=2):
        pgd_attack.label_index("dinning table", names)
    with refused("'' is none", "person, bicycle, dining table", code=2):
        pgd_attack.label_index("", names)


def test_the_noise_follows_the_seed(own, short_weeks):
    """On photos, which no seed changes."""
    flags, path = own
    noise = []
    for seed in ("0", "0", "1"):
        pgd_attack.main([*flags, f"{path}:plain", "--week", "5", "--seed", seed])
        arrays = np.load(path.parent / "out" / "adversarial.npz")
        noise.append(arrays["adversarial-noise"])
    assert np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[0], noise[2])


def test_augmentation_follows_the_seed(own, monkeypatch):
    flags, path = own
    clean = []
    for seed in ("0", "0", "1"):
        pgd_attack.main(
            [*flags, f"{path}:load", "--augment", "--steps", "1", "--seed", seed]
        )
        clean.append(np.load(path.parent / "out" / "adversarial.npz")["clean"])
    assert np.array_equal(clean[0], clean[1])
    assert not np.array_equal(clean[0], clean[2])


# --- week 4


def test_week_4_attacks_digits_from_the_command_to_the_table(
    data, tmp_path, monkeypatch, short_weeks, capsys
):
    network = acwgan.EvaluationClassifier().eval()
    monkeypatch.setattr(acwgan, "evaluation_classifier", lambda *_: network)
    flags = ["--week", "4", "--dataset", "mnist", "--limit", "5", "--target", "8"]
    flags += ["--device", "cpu", "--data", str(data), "--out", str(tmp_path)]
    record = pgd_attack.main(flags)
    names = [
        "clipping-alone",
        "single-photo",
        "batch",
        "corrected-inplace-abn",
        "corrected",
    ]
    assert list(record["rows"]) == names
    assert record["rows"]["corrected"]["eps"] == 0.3
    assert record["places"] == 4
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 100 or str(tmp_path) in line, line


def test_week_4s_attacks_clip_normalised_values_as_logged():
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)[:, None, None]
    std = mean / 2
    images = photo_like(5, 12).double()
    network = small_network().double().eval()
    with torch.no_grad():
        logits = network(images)
    task = pgd_attack.Task(list("abc"), 1, "on", 0.5, mean=mean, std=std)
    start = (images - mean) / std
    raw = logits.clone()
    raw[:, 1] = 1
    one_hot = torch.zeros(5, 3, dtype=torch.float64)
    one_hot[:, 1] = 1
    for row, wanted in zip(pgd_attack.WEEK_4, (None, one_hot, raw), strict=True):
        assert (row.eps, row.alpha, row.steps, row.gradient) == (
            0.3,
            2 / 255,
            40,
            "right",
        )
        moved = start.clamp(0, 1)
        for _ in range(0 if wanted is None else 5):
            moved.requires_grad_()
            p = network(moved * std + mean).softmax(1)
            loss = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() - 0.1 * gradient.sign()
            moved = moved.clamp(start - 0.3, start + 0.3).clamp(0, 1)
        row = row._replace(alpha=0.1, steps=5)
        ours = pgd_attack.attack_top_class(network, images, logits, row, task)
        assert difference(ours, moved * std + mean) < 0.02, row.name


def test_the_corrected_attack_stops_at_a_lead_of_one_half():
    """A linear network: the target's lead grows by the same amount in each step."""

    def network(x):
        level = x.mean((1, 2, 3))
        return torch.stack([0 * level, 10 * (level - 0.5)], 1)

    images = torch.full((1, 1, 2, 2), 0.4)
    task = pgd_attack.Task(["a", "b"], 1, "on", 0.5)
    row = pgd_attack.Row("corrected", "cross-entropy", 0.5, alpha=0.01)
    result = pgd_attack.attack_top_class(network, images, network(images), row, task)
    assert 0.55 < result.mean().item() < 0.57


def test_week_4_counts_the_images_that_are_not_the_target():
    task = pgd_attack.Task(["a", "b"], 1, "on", 0.5, mean=torch.zeros(1))
    before = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    after = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 2]])
    numbers = pgd_attack.count_top_class(before, after, torch.tensor([0, -1, 0, 1]), task)
    assert numbers["target_reached"] == common.wilson(2, 3)
    assert numbers["accuracy"] == common.wilson(1, 3)
    assert numbers["mean_sigmoid"] == pytest.approx(after[:, 1].sigmoid().mean().item())


def published_file(name, folder):
    """A file of random weights in the format and under the name of torchvision's own."""
    torch.manual_seed(SEED)
    network = torchvision.models.get_model(name, weights=None)
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = folder / url.rpartition("/")[2]
    torch.save(network.state_dict(), path)
    return path


def test_week_4_attacks_photos_from_the_command_to_the_table(
    tmp_path, short_weeks, capsys
):
    (tmp_path / "imagenet").mkdir()
    Image.new("RGB", (300, 250), "red").save(
        tmp_path / "imagenet" / "n01440764_tench.JPEG"
    )
    published_file("squeezenet1_1", tmp_path)
    flags = ["--week", "4", "--model", "squeezenet1_1", "--device", "cpu"]
    record = pgd_attack.main(
        [*flags, "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    assert record["dataset_size"] == 1
    assert record["rows"]["corrected"]["eps"] == pytest.approx(8 / 255)
    assert record["rows"]["corrected"]["accuracy"]["n"] == 1
    printed = capsys.readouterr().out
    assert "WARNING: this network has none to skip" in printed
    assert re.search("^corrected +0.03137 +0.007843 +40 ", printed, re.M)
    arrays = np.load(tmp_path / "out" / "adversarial.npz")
    assert arrays["clean"].shape == (1, 3, 224, 224)
    assert arrays["names"][60] == "night snake"
    assert arrays["truth"] == [0], "a tench is ImageNet's first class"


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 224), ("densenet121", 224), ("googlenet", 224)]
)
def test_torchvisions_classifiers_are_torchvisions_own(name, size, tmp_path):
    """The network of images in [0, 1] is the one that torchvision builds for these weights."""
    path = published_file(name, tmp_path)
    network, weights = pgd_attack.torchvision_network(name, None, tmp_path)
    network.eval()
    assert weights.meta["categories"][60] == "night snake"
    photo = Image.fromarray(
        np.random.default_rng(SEED).integers(0, 255, (60, 90, 3), np.uint8)
    )
    seen = weights.transforms(mean=[0.0] * 3, std=[1.0] * 3)(photo)[None]
    assert seen.shape == (1, 3, size, size)
    hub = torch.hub.get_dir()
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(path, tmp_path / "checkpoints")
    torch.hub.set_dir(str(tmp_path))
    theirs = torchvision.models.get_model(name, weights=weights).eval()
    torch.hub.set_dir(hub)
    with torch.no_grad():
        assert difference(network(seen), theirs(weights.transforms()(photo)[None])) < 1e-4


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
    names = [
        "n01440764_tench.JPEG",
        "n01530575_water_ouzel.png",
        "n02012849_crane.jpg",
        "x.jpg",
    ]
    for name in (*names, "n01440764/y.JPEG", "._n01440764_tench.JPEG", ".hidden/z.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 32), "red").save(folder / name)
    classes = ["tench", "water ouzel", "crane", "crane"]
    paths, found = pgd_attack.load_imagenet(tmp_path, classes)
    assert [path.name for path in paths] == ["y.JPEG", *names]
    assert found.tolist() == [-1, 0, 1, -1, -1]
    assert pgd_attack.load_imagenet(tmp_path, ["one class"])[1].tolist() == [
        0,
        -1,
        -1,
        -1,
        -1,
    ]
    with refused("no photo"):
        pgd_attack.load_imagenet(tmp_path / "none", ["tench"])


def test_a_few_of_imagenets_photos_are_spread_over_the_classes(tmp_path):
    for name in ("n01_a", "n02_b", "n03_c"):
        for i in range(4):
            path = tmp_path / "imagenet" / name / f"{name}_{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    paths, _ = pgd_attack.load_imagenet(tmp_path, ["a", "b"], 3)
    assert [path.parent.name for path in paths] == ["n01_a", "n02_b", "n03_c"]


# --- the whole

MISUSE = {
    acwgan: "--critic-lr nan, --limit 1.5, --seed -1, --dataset cifar, --digit 10, "
    "--colour, --out nowhere --resume, --out nowhere --sample 8",
    transfer: "--target 3, --variant best, --steps 0",
    asl_model: "--train --evaluate, --train --arch resnet",
    pgd_attack: "--eps 8/0, --eps nan, --eps 1e999, --augment, --week 3 --sweep, "
    "--loss l2, --model digits --weights x.pth, --week 5 --loss bce, "
    "--sweep --restarts 3, --model asl --week 4, --image absent.jpg",
}


@pytest.mark.parametrize("script", MISUSE)
def test_misuse_is_named_and_help_is_complete(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in MISUSE[script].split(", "):
        with pytest.raises(SystemExit, match="2"):
            script.settings(flags.split())
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.findall(r"--[\w-]+", flags)[-1] in line
    assert os.listdir(tmp_path) == []
    with pytest.raises(SystemExit, match="0"):
        script.settings(["--help"])
    text = capsys.readouterr().out
    assert "(default: data)" in text
    assert "None" not in text
    assert not re.search(r"^  --\S+( [A-Z]+)?\n  --", text, re.MULTILINE)


@pytest.mark.parametrize("script", MISUSE)
def test_a_script_ends_in_commons_handler_and_takes_the_readmes_commands(
    script, monkeypatch
):
    """But no command that reads a file, which is not there."""
    monkeypatch.setattr(common, "run", Mock())
    run = runpy.run_path(script.__file__, run_name="__main__")
    assert common.run.call_args.args[0] == run["main"]
    text = (HERE / "README.md").read_text(encoding="utf8")
    commands = re.findall(rf"python {script.__name__}\.py([^\n`#&|]*)", text)
    assert commands
    for flags in commands:
        if not re.search(r"--resume|--sample\b|--image", flags):
            script.settings(shlex.split(flags))


# --- peers: `pip install --no-deps timm==1.0.31 torchattacks==3.5.1 pytorch-fid==0.3.0`


def test_peer_pytorch_fid_gives_the_same_features_and_distance(tmp_path, monkeypatch):
    """From random weights in the published format, which its own network reads, too."""
    peer = pytest.importorskip("pytorch_fid.inception")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    network = random_inception(tmp_path / "weights")
    weights = Mock(return_value=network.state_dict())
    monkeypatch.setattr(peer, "load_state_dict_from_url", weights)
    images = photo_like(3, 40)
    with torch.inference_mode():
        theirs = peer.InceptionV3().eval()(images)[0].flatten(1)
    ours = torch.from_numpy(common.inception_features(images, tmp_path / "weights"))
    assert difference(ours, theirs) < 1e-4
    x = np.random.default_rng(SEED).normal(size=(90, 12))
    moments = [x.mean(0), np.cov(x.T), x[:70].mean(0) + 1, np.cov((x * x)[:70].T)]
    theirs = fid_score.calculate_frechet_distance(*moments)
    assert common.frechet_distance(*moments) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("eps", [8 / 255, 0.3])
def test_peer_torchattacks_pgd_gives_the_same_images(eps):
    """In float64: in float32, rounding may turn the sign of a gradient near 0."""
    torchattacks = pytest.importorskip("torchattacks")
    torch.manual_seed(SEED)
    first = nn.Conv2d(3, 8, 3, 2)
    second = nn.Conv2d(8, 8, 3, 2)
    layers = (first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(1), nn.Linear(72, 10))
    model = nn.Sequential(*layers).double().eval()
    images = photo_like(6, 16).double()
    targets = torch.arange(6)
    theirs = torchattacks.PGD(model, eps=eps, alpha=2 / 255, steps=20, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    ours = pgd_attack.pgd(model, images, targets, F.cross_entropy, eps, 2 / 255, 20)
    assert torch.allclose(ours, theirs(images, targets), rtol=0, atol=1e-9)
    assert (ours - images).abs().max() > 0.03


def test_peer_timm_gives_the_same_logits(tmp_path):
    timm = pytest.importorskip("timm")
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
    images = photo_like(3, 224, 1)
    with torch.inference_mode():
        assert difference(ours(images), theirs(images)) < 1e-4
