"""Every test: `pytest test_all.py`. No network, no file but what the tests make; minutes on two CPU cores."""

import collections
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import acwgan
import asl_model
import common
import pgd_attack
import transfer

HERE = Path(__file__).parent
SMALL = ["--dataset", "glyphs", "--limit", "640", "--samples", "200", "--width", "8", "--epochs", "3"]


def script(*command, cwd=None, **kwargs):
    """Run a script as a user does; returns the finished process with its text."""
    command = [sys.executable, HERE / command[0], *map(str, command[1:])]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=280, **kwargs)


def fails(process, code, *words):
    """Assert that a script ended with `code` and one line on stderr (after argparse's usage) that holds all `words`."""
    assert process.returncode == code, process.stderr
    *usage, last = process.stderr.strip().splitlines()
    assert not usage or usage[0].startswith("usage:"), process.stderr
    for word in words:
        assert word in last, last


def stop_once_there_is(path, stop, *command):
    """Run a script until it has written `path`, then send it the signal `stop`."""
    command = [sys.executable, HERE / command[0], *map(str, command[1:])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(stop)
    stderr = process.communicate(timeout=60)[1]
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in stderr.splitlines()[-1]


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def made_up_mnist(folder):
    (folder / "MNIST" / "raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for train, n in ((True, 40), (False, 20)):
        images, labels = common.mnist_files(folder, train)
        write_idx(images, rng.integers(0, 256, (n, 28, 28)))
        write_idx(labels, np.arange(n) % 10)
    return folder


@pytest.fixture
def tiny_mnist(tmp_path):
    """A folder with 40 + 20 made-up digits in MNIST's format."""
    return made_up_mnist(tmp_path / "data")


def reader_of(run, folder):
    """Copy the digit reader that a small run has trained into another's folder: seconds saved."""
    folder.mkdir(exist_ok=True)
    shutil.copy(run[0] / "reader-glyphs-640.pt", folder)
    return folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """An uninterrupted small run: its folder and what `main` returned."""
    out = tmp_path_factory.mktemp("run")
    return out, acwgan.main([*SMALL, "--out", str(out)])


# ---------------------------------------------------------------------------------------------------- common: datasets


def test_idx_files_are_read_byte_for_byte_plain_and_gzipped(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    write_idx(tmp_path / "plain", array)
    (tmp_path / "packed.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    assert np.array_equal(common.read_idx(tmp_path / "plain"), array)
    assert np.array_equal(common.read_idx(tmp_path / "packed"), array)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:9], "IDX"),
        (lambda data: b"", "IDX"),
        (lambda data: b"<html>not found</html>", "IDX"),
        (lambda data: data + b"x", "damaged"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, word):
    write_idx(tmp_path / "digits", np.zeros((2, 3, 3)))
    (tmp_path / "digits").write_bytes(damage((tmp_path / "digits").read_bytes()))
    with pytest.raises(common.Failure, match=f"digits.*{word}"):
        common.read_idx(tmp_path / "digits")


def test_mnist_is_float_images_in_0_1_and_integer_labels(tiny_mnist):
    images, labels = common.load_mnist(tiny_mnist, train=False)
    assert images.shape == (20, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    raw = common.read_idx(common.mnist_files(tiny_mnist, False)[0])
    assert torch.equal((images[:, 0] * 255).round().byte(), torch.from_numpy(raw.copy()))


def test_files_that_are_idx_but_not_mnist_are_refused(tiny_mnist):
    write_idx(common.mnist_files(tiny_mnist, True)[1], np.full(40, 11))
    with pytest.raises(common.Failure, match="not MNIST"):
        common.load_mnist(tiny_mnist)


def test_glyphs_are_the_same_for_a_seed_and_as_many_of_each_class():
    images, labels = common.glyphs(500, seed=3)
    assert torch.equal(images, common.glyphs(500, seed=3)[0])
    assert not torch.equal(images, common.glyphs(500, seed=4)[0])
    assert labels.bincount().tolist() == [50] * 10
    assert images.shape == (500, 1, 28, 28)
    assert 0 == images.min() < 0.9 < images.max() <= 1
    assert images[:, :, :1].mean() < 0.02  # no digit is cut off by the border
    assert torch.equal(common.glyphs(123, seed=3)[0], images[:123])


# ------------------------------------------------------------------------------------------- common: files and records


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write_whole(path, lambda file: file.write(b"old"))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space.*file"):
        common.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_hostile_checkpoints_are_refused_and_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"kind": "acwgan", "networks": Hostile()}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("torch.pt", "pickle.pt"):
        with pytest.raises(common.Failure, match="damaged"):
            common.load_checkpoint(tmp_path / name, "acwgan", "")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7), (9930, 10_000)])
def test_wilson_intervals_equal_scipys(hits, n):
    ours = common.wilson(hits, n)
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_numbers_on_the_command_line_may_be_fractions():
    assert common.positive("8/255") == pytest.approx(8 / 255)
    for text in ("8/0", "eight", "", "-1", "nan", "1/2/3", "inf"):
        with pytest.raises(common.argparse.ArgumentTypeError):
            common.positive(text)


# --------------------------------------------------------------------------------------------- common: Frechet distance


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def exact_distance(x, y):
    """The distance from (N, D) features by another route: tr sqrt(S1 S2) as the nuclear norm of the cross-Gram."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * nuclear


@pytest.mark.parametrize("zeros", [0, 5])
def test_frechet_distance_equals_the_closed_form_for_commuting_covariances(zeros):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    v1, v2, mu = rng.uniform(0.1, 9, 30), rng.uniform(0.1, 9, 30), rng.normal(size=30)
    v1[:zeros] = 0
    closed = np.square(mu).sum() + np.square(np.sqrt(v1) - np.sqrt(v2)).sum()
    ours = common.frechet_distance(mu, basis * v1 @ basis.T, 0 * mu, basis * v2 @ basis.T)
    assert ours == pytest.approx(closed, rel=1e-9)


def test_both_frechet_distances_are_exact_with_fewer_samples_than_dimensions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 256)), 1.5 * rng.normal(size=(60, 256)) + 0.1
    truth = exact_distance(x, y)
    assert common.frechet_distance(*moments(x), *moments(y)) == pytest.approx(truth, rel=1e-6)
    assert common.frechet_distance_torch(*map(torch.from_numpy, (x, y))).item() == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(8, 9), (40, 50), (8, 50)])
def test_both_frechet_distances_agree_whichever_is_more_samples_or_dimensions(n, m):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(n, 16)), rng.normal(size=(m, 16)) * 2
    x[:, 3] = y[:, 5] = 0  # dead features, as ReLUs have
    torchs = common.frechet_distance_torch(*map(torch.from_numpy, (x, y))).item()
    assert torchs == pytest.approx(common.frechet_distance(*moments(x), *moments(y)), rel=1e-6)
    assert torchs == pytest.approx(exact_distance(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(6, 7, 12), (20, 15, 5), (4, 30, 9)])
def test_the_frechet_gradient_agrees_with_finite_differences(n, m, d):
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, d, generator=rng, dtype=torch.float64, requires_grad=True) for k in (n, m))
    assert torch.autograd.gradcheck(common.frechet_distance_torch, (x, y), atol=1e-6)


def test_the_frechet_gradient_is_finite_in_float32_and_for_identical_samples():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).relu().requires_grad_()
    y = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)).relu()
    for other in (y, x.detach()):
        distance = common.frechet_distance_torch(x, other)
        (gradient,) = torch.autograd.grad(distance, x)
        assert distance.dtype == torch.float32
        assert gradient.isfinite().all()
    assert abs(distance.item()) < 1e-5
    x32, x64 = (x.detach().to(t).requires_grad_() for t in (torch.float32, torch.float64))
    g32, g64 = (torch.autograd.grad(common.frechet_distance_torch(z, y.to(z)), z)[0] for z in (x32, x64))
    assert torch.allclose(g32.double(), g64, rtol=1e-4, atol=1e-6)


def test_descending_the_frechet_distance_moves_samples_onto_the_reference():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=rng).requires_grad_()
    y = 3 * torch.randn(64, 8, generator=rng) + 2
    before = common.frechet_distance_torch(x, y).item()
    adam = torch.optim.Adam([x], 0.1)
    for _ in range(200):
        adam.zero_grad()
        common.frechet_distance_torch(x, y).backward()
        adam.step()
    assert common.frechet_distance_torch(x, y).item() < before / 1000


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4)),
        (torch.zeros(5, 4), torch.zeros(5, 3)),
        (torch.full((5, 4), torch.nan), torch.zeros(5, 4)),
        (torch.zeros(5), torch.zeros(5)),
    ],
)
def test_features_without_a_frechet_distance_are_refused(x, y):
    with pytest.raises(ValueError, match=r"samples|features|finite"):
        common.frechet_distance_torch(x, y)


def test_moments_without_a_frechet_distance_are_refused():
    eye = np.eye(3)
    for mu, sigma, word in ((np.zeros(2), eye, "got"), (np.zeros(3), eye * np.nan, "finite"), (0, 0, "got")):
        with pytest.raises(ValueError, match=word):
            common.frechet_distance(mu, sigma, np.zeros(3), eye)


# -------------------------------------------------------------------------------------------------- common: Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the published file's format."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict(), path)
    return path


def test_inception_pools_as_tensorflows_does(inception_file):
    network, seen = common.inception_network(inception_file), {}
    blocks = {name: block for name, block in network.named_children() if hasattr(block, "branch_pool")}
    assert len(blocks) == 9
    for name, block in blocks.items():
        block.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        network(torch.rand(1, 3, 299, 299))
        for name, block in blocks.items():
            x, y = seen[name]
            averaged = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            pooled = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else averaged
            branch = block.branch_pool.bn(block.branch_pool.conv(pooled)).relu()
            assert torch.allclose(y[:, -branch.shape[1] :], branch, rtol=1e-3, atol=1e-4 * branch.max()), name


def test_inception_sees_images_resized_to_299_and_scaled_to_minus_1_to_1(inception_file):
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    seen = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    with torch.no_grad():
        features = common.inception_network(inception_file)(seen).numpy()
    assert np.allclose(
        common.inception_features(images, inception_file), features, rtol=1e-4, atol=1e-4 * features.max()
    )


def test_inception_fid_is_reported_with_its_features_and_kept_statistics(inception_file, tmp_path):
    images = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    same = acwgan.inception_fid(inception_file, images, images, "glyphs", tmp_path)
    assert abs(same["fid"]) < 1e-6 * common.inception_features(images, inception_file).var(0).sum()
    assert "NOT the published file" in same["features"]
    (kept,) = tmp_path.glob("inception-*-glyphs-test-12.npz")
    written = kept.stat().st_mtime_ns
    assert acwgan.inception_fid(inception_file, images / 2, images, "glyphs", tmp_path)["fid"] > same["fid"]
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(b"PK")
    with pytest.raises(common.Failure, match="damaged"):
        acwgan.inception_fid(inception_file, images, images, "glyphs", tmp_path)


def test_inception_features_of_grey_images_are_those_of_three_equal_channels(inception_file):
    grey = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    features = common.inception_features(grey, inception_file)
    assert features.shape == (3, 2048)
    assert np.isfinite(features).all()
    assert np.allclose(
        features, common.inception_features(grey.expand(-1, 3, -1, -1), inception_file, batch=2), rtol=1e-4
    )


def test_images_that_inception_does_not_take_are_refused(inception_file):
    for images in (
        torch.zeros(2, 2, 8, 8),
        torch.full((1, 1, 8, 8), 1.1),
        torch.full((1, 1, 8, 8), torch.nan),
        torch.zeros(0, 1, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="images must be"):
            common.inception_features(images, inception_file)


def test_a_weight_file_that_is_not_inceptions_is_named(tmp_path):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not found")
    for name, word in (("other.pth", "does not hold"), ("text.pth", "damaged"), ("none.pth", "cannot read")):
        with pytest.raises(common.Failure, match=f"{name}.*{word}|{word}.*{name}"):
            common.inception_features(torch.zeros(1, 1, 8, 8), tmp_path / name)


# ---------------------------------------------------------------------------------------------------- week 1: networks


class LinearCritic(nn.Module):
    """score(x) = w . x, whose gradient is w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x.flatten(1) @ self.w, None


def test_the_gradient_penalty_of_a_linear_critic_is_its_closed_form():
    w = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    critic = LinearCritic(w)
    penalty = acwgan.gradient_penalty(critic, torch.rand(5, 1, 3, 4).double(), torch.rand(5, 1, 3, 4).double())
    assert penalty.item() == pytest.approx((w.norm() - 1).square().item())
    (gradient,) = torch.autograd.grad(penalty, critic.w)
    assert torch.allclose(gradient, 2 * (w.norm() - 1) * w / w.norm())


def test_the_gradient_penalty_agrees_with_finite_differences():
    torch.manual_seed(0)
    critic = acwgan.Critic(width=4).double()
    real, fake = torch.rand(2, 3, 1, 28, 28, dtype=torch.float64)

    def seeded():
        return torch.Generator().manual_seed(0)

    u = torch.rand(3, 1, 1, 1, generator=seeded())
    x = (u * real + (1 - u) * fake).flatten(1)
    step, slopes = 1e-6, torch.zeros_like(x)
    with torch.no_grad():
        for pixel in range(784):
            nudge = torch.zeros(784, dtype=torch.float64)
            nudge[pixel] = step
            up, down = (critic((x + s * nudge).view(3, 1, 28, 28))[0] for s in (1, -1))
            slopes[:, pixel] = (up - down) / (2 * step)
    penalty = acwgan.gradient_penalty(critic, real, fake, seeded())
    assert penalty.item() == pytest.approx((slopes.norm(dim=1) - 1).square().mean().item(), rel=1e-4)

    weight = critic.layers[1].weight
    (gradient,) = torch.autograd.grad(penalty, weight)
    index = (1, 2, 0, 1)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * step
        values.append(acwgan.gradient_penalty(critic, real, fake, seeded()).item())
        with torch.no_grad():
            weight[index] -= sign * step
    assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)


def test_the_penalty_interpolates_with_one_factor_per_example():
    critic = LinearCritic(torch.ones(784))
    acwgan.gradient_penalty(critic, torch.ones(64, 1, 28, 28), torch.zeros(64, 1, 28, 28))
    factors = critic.seen[0].flatten(1)
    assert torch.equal(factors.min(1).values, factors.max(1).values)
    assert scipy.stats.kstest(factors[:, 0].detach().numpy(), "uniform").pvalue > 1e-3


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
    assert torch.allclose(critic(images[2:3])[0], scores[2:3], atol=1e-6)  # no example depends on its neighbours
    overwritten = latent.clone()
    overwritten[:, :10] = 7
    assert torch.equal(generator(overwritten, labels), images)
    assert not torch.allclose(generator(latent, labels.flip(0)), images)


def test_the_auxiliary_loss_trains_the_critic_on_real_images_only():
    torch.manual_seed(0)
    critic, (real, fake) = acwgan.Critic(4), torch.rand(2, 8, 1, 28, 28)
    labels = torch.arange(8)
    loss, parts = acwgan.critic_loss(critic, real, labels, fake)
    whole = 10 * parts["penalty"] + parts["auxiliary"] - parts["wasserstein"]
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    assert parts["auxiliary"].item() == pytest.approx(F.cross_entropy(critic(real)[1], labels).item(), rel=1e-5)
    expected = critic(real)[0].mean() - critic(fake)[0].mean()
    assert parts["wasserstein"].item() == pytest.approx(expected.item(), abs=1e-5)
    scores, logits = critic(fake)
    loss = acwgan.generator_loss(critic, fake, labels).item()
    assert loss == pytest.approx((F.cross_entropy(logits, labels) - scores.mean()).item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------- week 1: the whole run


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
    assert record == json.loads(json.dumps(numbers))
    assert record["dataset"] == "glyphs"
    assert record["dataset_size"] == 640
    assert {"command", "settings", "versions", "git", "seconds", "device"} <= set(record)
    assert record["asked_class_read"]["n"] == 200
    assert not list(out.glob("*.part"))


def test_the_logs_own_settings_train_at_64_pixels_without_averaging(tmp_path):
    flags = "--dataset glyphs --limit 64 --epochs 1 --samples 20 --width 4 --image-size 64 --critic-steps 5"
    flags += " --batch-size 32 --decay none --average 0 --penalty-share 1 --precision fp32 --latent 100"
    acwgan.main([*flags.split(), "--out", str(tmp_path)])
    assert np.load(tmp_path / "samples.npz")["images"].shape == (20, 28, 28)
    there = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert there["steps"] == 2
    assert next(iter(there["critic_adam"]["state"].values()))["step"] == 10
    assert all(torch.equal(there["average"][name], tensor) for name, tensor in there["generator"].items())


def test_the_benchmark_times_every_variant_and_writes_nothing_but_its_record(tmp_path):
    record = acwgan.main([*SMALL, "--batch-size", "4", "--benchmark", "--out", str(tmp_path)])
    assert len(record["seconds_per_step"]) == 8
    assert 0 < record["share_of_peak"] < 1
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(small_run, tmp_path):
    samples = np.load(small_run[0] / "samples.npz")["images"]
    acwgan.main([*SMALL, "--out", str(reader_of(small_run, tmp_path / "same"))])
    acwgan.main([*SMALL, "--out", str(reader_of(small_run, tmp_path / "other")), "--seed", "1"])
    assert np.array_equal(np.load(tmp_path / "same" / "samples.npz")["images"], samples)
    assert not np.array_equal(np.load(tmp_path / "other" / "samples.npz")["images"], samples)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_resumes_to_the_same_bits(small_run, tmp_path, stop):
    stop_once_there_is(tmp_path / "checkpoint.pt", stop, "acwgan.py", *SMALL, "--out", reader_of(small_run, tmp_path))
    position = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["steps"]
    assert 0 < position < 60, "the run was over before it was stopped: the test shows nothing"
    resumed = script("acwgan.py", *SMALL, "--out", tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole, again = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (small_run[0], tmp_path))
    for part in ("generator", "critic", "average"):
        assert all(torch.equal(again[part][name], tensor) for name, tensor in whole[part].items()), part
    both = [np.load(d / "samples.npz")["images"] for d in (small_run[0], tmp_path)]
    assert np.array_equal(*both)


def test_a_run_resumed_within_an_epoch_finds_its_order_and_its_noise_again(tmp_path):
    args = acwgan.settings([*SMALL, "--out", str(tmp_path)])
    images, labels = common.glyphs(640)

    def training():
        return acwgan.Training(args, torch.device("cpu"), "glyphs", 640)

    whole, broken, resumed = training(), training(), training()
    acwgan.train(whole, images, labels, None)

    def stop_in_the_middle(*batch, step=broken.step):
        if broken.steps == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*batch)

    broken.step = stop_in_the_middle
    torch.manual_seed(args.seed)
    training()
    with pytest.raises(common.Stopped, match="step 31 of 60"):
        acwgan.train(broken, images, labels, None)
    torch.randn(5)
    resumed.load(tmp_path / "checkpoint.pt")
    acwgan.train(resumed, images, labels, None)
    for mine, its in zip(resumed.generator.parameters(), whole.generator.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_fifteen_seconds_of_training_read_five_times_better_than_chance(tmp_path):
    arguments = ["--dataset", "glyphs", "--limit", "9600", "--samples", "1000", "--width", "16", "--epochs", "3"]
    numbers = acwgan.main([*arguments, "--out", str(tmp_path)])
    assert numbers["reader_right_on_test_images"]["rate"] > 0.98
    assert numbers["asked_class_read"]["rate"] > 0.5


# ------------------------------------------------------------------------------------- week 1: when things go wrong


def test_mnist_that_is_absent_names_the_files_the_folder_and_the_way_out(tmp_path):
    no_network = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    process = script("acwgan.py", "--dataset", "mnist", "--data", tmp_path / "none", "--out", tmp_path, env=no_network)
    fails(process, 1, "train-images-idx3-ubyte", str(tmp_path / "none" / "MNIST" / "raw"), "--dataset glyphs")


def test_auto_warns_loudly_when_it_falls_back_to_glyphs(tmp_path, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert common.load_digits("auto", tmp_path, True, 100)[0] == "glyphs"
    assert "no number of this run is a result on MNIST" in capsys.readouterr().err


def test_resuming_checks_what_it_resumes(small_run, tmp_path):
    flags = [*SMALL, "--out", str(tmp_path), "--resume"]
    fails(script("acwgan.py", *flags), 2, "nothing to resume", "checkpoint.pt")
    data, foreign = (small_run[0] / "checkpoint.pt").read_bytes(), io.BytesIO()
    torch.save({"generator": {}}, foreign)
    for content, error, word in (
        (data[: len(data) // 2], common.Failure, r"checkpoint\.pt is damaged"),
        (b"text", common.Failure, r"checkpoint\.pt is damaged"),
        (foreign.getvalue(), common.Failure, "not a checkpoint of acwgan"),
        (data, common.Misuse, "batch_size 32 there and 64 here"),
    ):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(error, match=word):
            acwgan.main([*flags, *(["--batch-size", "64"] if content == data else [])])
    torch.save(torch.load(io.BytesIO(data), weights_only=True) | {"steps": "many"}, tmp_path / "checkpoint.pt")
    with pytest.raises(common.Failure, match="does not fit this version"):
        acwgan.main(flags)


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    fails(script("acwgan.py", "--dataset", "glyphs", "--limit", 10, "--out", tmp_path), 2, "--batch-size 32", "10")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    fails(script("acwgan.py", *SMALL, "--out", tmp_path / "file" / "below"), 1, str(tmp_path / "file"), "--out")


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(small_run, tmp_path):
    flags = [*SMALL, "--generator-lr", "1e30", "--critic-lr", "1e30"]
    fails(script("acwgan.py", *flags, "--out", reader_of(small_run, tmp_path)), 1, "not a number", "--critic-lr")
    assert [path.name for path in tmp_path.iterdir()] == ["reader-glyphs-640.pt"]


def test_networks_that_memory_cannot_hold_are_refused_in_one_line(tmp_path):
    fails(script("acwgan.py", *SMALL, "--width", 10**7, "--out", tmp_path), 1, "memory", "--width")


def test_a_full_disk_ends_the_run_in_one_line_that_names_the_file(small_run, tmp_path):
    def no_room():  # files may not grow beyond 100 kB: as on a full disk, the write fails half-way
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = script("acwgan.py", *SMALL, "--out", reader_of(small_run, tmp_path), preexec_fn=no_room)
    fails(process, 1, f"{tmp_path / 'checkpoint.pt'}")
    assert os.listdir(tmp_path) == ["reader-glyphs-640.pt"]


# ------------------------------------------------------------------------------------------------------------- week 2

TRANSFER = ["--limit", "16", "--samples", "100", "--steps", "12", "--batch-size", "16"]


@pytest.fixture(scope="module")
def transferred(small_run, tmp_path_factory):
    """An uninterrupted small run of every variant on the small run's generator: its folder, flags, and numbers."""
    out = tmp_path_factory.mktemp("transfer")
    flags = [*TRANSFER, "--generator", str(small_run[0] / "checkpoint.pt")]
    return out, flags, transfer.main([*flags, "--out", str(out)])


def test_every_variant_writes_the_samples_it_promises(transferred):
    out, _, numbers = transferred
    assert list(numbers["rows"]) == ["original", *transfer.VARIANTS, "pgd"]
    for variant in transfer.VARIANTS:
        samples = np.load(out / f"samples-{variant}.npz")
        assert samples["images"].shape == (100, 28, 28)
        assert samples["images"].dtype == np.uint8
        assert all(samples[name].dtype == np.int64 for name in ("labels", "target", "predicted"))
        assert np.array_equal(samples["target"], (samples["labels"] + 1) % 10)
        row = numbers["rows"][variant]
        assert row["target_fooled"]["rate"] == np.mean(samples["predicted"] == samples["target"])
        assert row["adversarial"]["rate"] <= min(row["target_fooled"]["rate"], row["judge_reads_asked"]["rate"])
    assert numbers["rows"]["original"]["mean_l2"] == 0 < numbers["rows"]["euclidean"]["mean_l2"]
    assert numbers["dataset"] == "glyphs"
    assert not list(out.glob("*.part"))
    for name in ("synthetic-adversarial-framework.png", "synthetic-adversarial-framework-with-fid.png"):
        with Image.open(out / name) as image:
            assert image.size[0] > 600


def test_the_samples_are_those_of_the_kept_generator_and_classifier(transferred, small_run):
    out = transferred[0]
    original, _, shape = transfer.load_generator(small_run[0] / "checkpoint.pt", "auto")
    samples = np.load(out / "samples-ours.npz")
    generator = transfer.new_generator("ours", {"original": original}, shape, torch.device("cpu"))
    generator.load_state_dict(torch.load(out / "generator-ours.pt", weights_only=True)["generator"])
    drawn = acwgan.generate(generator.eval(), torch.from_numpy(samples["labels"]), 0)
    assert np.array_equal((drawn[:, 0] * 255).round().byte().numpy(), samples["images"])
    target = transfer.ModelA()
    target.load_state_dict(torch.load(next(out.glob("ModelA-*.pt")), weights_only=True)["network"])
    assert np.array_equal(transfer.predict(target.eval(), drawn).numpy(), samples["predicted"])


def test_a_transfer_that_was_killed_resumes_to_the_same_table(transferred, tmp_path):
    out, flags, numbers = transferred
    for kept in (*out.glob("Model*.pt"), *out.glob("Auxiliary*.pt"), *out.glob("Judge*.pt"), *out.glob("reader*.pt")):
        shutil.copy(kept, tmp_path)
    there = tmp_path / "generator-scratch-live.pt"
    stop_once_there_is(there, signal.SIGKILL, "transfer.py", *flags, "--out", tmp_path)
    assert not (tmp_path / "generator-ours.pt").exists(), (
        "the run was over before it was stopped: the test shows nothing"
    )
    written = (tmp_path / "generator-scratch.pt").stat().st_mtime_ns
    again = transfer.main([*flags, "--out", str(tmp_path), "--resume"])
    assert (tmp_path / "generator-scratch.pt").stat().st_mtime_ns == written
    for name, row in numbers["rows"].items():
        same = {key: value for key, value in row.items() if key != "samples_per_second"}
        assert same.items() <= again["rows"][name].items(), name
    assert again["ended"] == numbers["ended"]


def test_digits_of_the_wanted_class_do_not_count_as_attacked(transferred, tmp_path):
    assert transfer.wanted_class(torch.tensor([0, 8, 9]), None).tolist() == [1, 9, 0]
    assert transfer.wanted_class(torch.tensor([0, 8, 9]), 8).tolist() == [8, 8, 8]
    out, flags, _ = transferred
    for kept in out.glob("*-glyphs-16.pt"):
        shutil.copy(kept, tmp_path)
    numbers = transfer.main([*flags, "--out", str(tmp_path), "--target", "8", "--approach", "2"])
    assert list(numbers["rows"]) == ["original", "fid-detached", "pgd"]
    assert numbers["rows"]["fid-detached"]["target_fooled"]["n"] == 90
    assert set(np.load(tmp_path / "samples-fid-detached.npz")["target"]) == {8}


@pytest.fixture
def week2(small_run):
    """Untrained networks, some samples of a generator that moves, and what `composition` needs besides."""
    torch.manual_seed(0)
    original, critic, shape = transfer.load_generator(small_run[0] / "checkpoint.pt", "auto")
    nets = {"original": original, "critic": critic, "target": transfer.ModelA().eval()}
    nets |= {"auxiliary": transfer.Auxiliary().eval(), "robust auxiliary": transfer.Auxiliary().eval()}
    nets["batch-norm auxiliary"] = transfer.Auxiliary(batch_norm=True).eval()
    nets["reference"] = dict.fromkeys(("auxiliary", "batch-norm auxiliary"), torch.randn(40, 128))
    for name in ("target", "auxiliary", "batch-norm auxiliary", "robust auxiliary"):
        nets[name].requires_grad_(False)
    return nets, shape


def test_the_logs_distance_moves_no_weight_and_the_true_one_does(week2):
    nets, _ = week2
    args, labels = transfer.settings([]), torch.arange(8)
    gradients, values = {}, {}
    for variant in ("fid-detached", "fid"):
        images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
        nets["crowd"] = {role: (x, collections.deque()) for role, x in nets["reference"].items()}
        terms = transfer.composition(variant, args, nets, images, labels, labels, images.detach())
        values[variant] = {name: value.item() for name, (_, value) in terms.items()}
        rest = sum(weight * value for name, (weight, value) in terms.items() if name != "distance")
        total = rest + terms["distance"][0] * terms["distance"][1]
        gradients[variant] = [torch.autograd.grad(loss, images, retain_graph=True)[0] for loss in (total, rest)]
    assert values["fid"] == values["fid-detached"]
    assert torch.equal(*gradients["fid-detached"])
    assert not torch.allclose(*gradients["fid"])


def test_no_variant_changes_the_networks_it_is_trained_against(week2):
    nets, shape = week2
    args = transfer.settings(["--steps", "2", "--batch-size", "4"])
    images, labels = common.glyphs(20)
    before = [p.clone() for net in ("critic", "original", "target") for p in nets[net].state_dict().values()]
    for variant in transfer.VARIANTS:
        transfer.train(variant, args, nets, shape, images, labels, torch.device("cpu"))
    after = [p for net in ("critic", "original", "target") for p in nets[net].state_dict().values()]
    assert all(map(torch.equal, before, after))


def test_an_untrained_refiner_draws_the_original_digits(week2):
    nets, shape = week2
    latent, labels = torch.randn(4, shape["latent"]), torch.arange(4)
    refiner = transfer.Refiner(nets["original"])
    assert torch.allclose(refiner(latent, labels), nets["original"](latent, labels), atol=1e-6)


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

    w = torch.randn(784, generator=torch.Generator().manual_seed(0)) / 100  # steeper, and the softmax would saturate
    images, labels = torch.full((3, 1, 28, 28), 0.5), torch.zeros(3, dtype=torch.long)
    towards = transfer.pgd(Linear(), images, labels, -1, eps=0.3, alpha=0.02)
    assert torch.allclose(towards, images + 0.3 * w.sign().view(1, 28, 28))
    assert torch.allclose(transfer.pgd(Linear(), images, labels, 1), images - 0.3 * w.sign().view(1, 28, 28))
    once = transfer.fast_gradient(Linear(), images, labels)
    assert (once - images).abs().max() <= 0.3 + 1e-6
    assert ((once - images).flatten(1) @ w < 0).all()


def test_a_generator_that_does_not_fit_is_refused_with_the_command_that_makes_one(small_run, tmp_path, capsys):
    checkpoint = small_run[0] / "checkpoint.pt"
    fails(script("transfer.py", "--generator", tmp_path / "none.pt"), 2, "none.pt", "python acwgan.py --out")
    fails(script("transfer.py", "--generator", checkpoint, "--dataset", "mnist"), 2, "trained on glyphs", "acwgan.py")
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"shape": content["shape"] | {"image_size": 64}}, tmp_path / "large.pt")
    fails(script("transfer.py", "--generator", tmp_path / "large.pt"), 2, "64 pixels", "acwgan.py")
    torch.save(content | {"average": {}}, tmp_path / "other.pt")
    fails(script("transfer.py", "--generator", tmp_path / "other.pt"), 1, "other.pt does not fit", "acwgan.py")
    torch.save(content | {"steps": 7}, tmp_path / "other.pt")
    transfer.load_generator(tmp_path / "other.pt", "auto")
    assert "unfinished, step 7 of 60" in capsys.readouterr().out
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    fails(script("transfer.py", "--generator", tmp_path / "half.pt"), 1, "half.pt is damaged", "acwgan.py")


def test_resuming_a_transfer_of_other_settings_or_of_a_foreign_file_is_refused(week2, tmp_path):
    nets, shape = week2
    data = (*common.glyphs(20), torch.device("cpu"))

    def finished(steps):
        args = transfer.settings(["--steps", steps, "--batch-size", "4", "--out", str(tmp_path), "--resume"])
        return transfer.finished("euclidean", args, nets, shape, *data)

    made = finished("1")
    assert finished("1")[1] == made[1]
    with pytest.raises(common.Misuse, match="contradicts"):
        finished("2")
    path = tmp_path / "generator-euclidean.pt"
    torch.save(torch.load(path, weights_only=True) | {"generator": {}}, path)
    with pytest.raises(common.Failure, match="does not fit"):
        finished("1")


def test_a_transfer_whose_loss_is_no_number_ends_in_one_line(week2):
    nets, shape = week2
    args = transfer.settings(["--steps", "2", "--batch-size", "4", "--gamma", "1e39"])
    with pytest.raises(common.Failure, match="not a number"):
        transfer.train("fid", args, nets, shape, *common.glyphs(20), torch.device("cpu"))


# --------------------------------------------------------------------------------------------- multi-label: scenes


def test_scenes_are_the_same_for_a_seed_whatever_their_number(tiny_mnist):
    def load(n, **kwargs):
        return common.load_scenes(n, source="mnist", data_dir=tiny_mnist, **kwargs)

    images, labels = load(130, seed=3)
    assert images.shape == (130, 3, 64, 64)
    assert images.dtype == labels.dtype == torch.float32
    assert 0 <= images.min() < 0.3 < 0.7 < images.max() <= 1
    assert set(labels.unique().tolist()) == {0, 1}
    assert set(labels.sum(1).int().tolist()) == {1, 2, 3, 4, 5}
    for n in (1, 70):
        assert all(map(torch.equal, load(n, seed=3), (images[:n], labels[:n])))
    assert not torch.equal(load(130, seed=4)[0], images)
    assert load(2, image_size=96)[0].shape == (2, 3, 96, 96)


def test_a_scenes_labels_are_the_digits_drawn_in_it():
    for digit in range(10):
        only = torch.zeros(10, 1, 28, 28)  # the other digits leave no mark
        only[digit, 0, 13:15, 13:15] = 1
        images, labels = common.compose_scenes(only, torch.arange(10), 100, seed=1)
        marked = (images - images[:, :, :1, :1]).abs().amax((1, 2, 3)) > 0.1
        assert torch.equal(marked, labels[:, digit] == 1)
        assert 5 < marked.sum() < 60


def test_the_digits_of_training_validation_and_test_scenes_are_disjoint(tiny_mnist):
    train, validation, test = (common.scene_digits("mnist", tiny_mnist, s)[1] for s in ("train", "validation", "test"))
    assert [len(x) for x in (train, validation, test)] == [37, 3, 20]
    assert torch.equal(torch.cat([train, validation]), common.load_mnist(tiny_mnist)[0])
    assert torch.equal(test, common.load_mnist(tiny_mnist, train=False)[0])


# --------------------------------------------------------------------------------------------- multi-label: photos


def instances():
    """A valid instances file of three photos, 80 categories with COCO's gaps in their ids, in no order."""
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    return {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "coco_url": "file:///etc/passwd"} for i in (42, 9, 7)],
        "annotations": [{"image_id": 9, "category_id": c} for c in (90, 1, 1)] + [{"image_id": 42, "category_id": 60}],
        "categories": [{"id": i, "name": f"name {i}"} for i in reversed(ids)],
    }


@pytest.fixture
def tiny_coco(tmp_path):
    """`instances()` and its photos, of one colour each, in COCO's folders."""
    folder = tmp_path / "data" / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(instances()))
    for i, colour in ((7, "red"), (9, "lime"), (42, "blue")):
        Image.new("RGB", (50, 40), colour).save(folder / "val2017" / f"{i:012}.jpg", quality=100)
    return tmp_path / "data"


def test_coco_labels_are_in_ascending_category_order_and_photos_in_ascending_id_order(tiny_coco):
    images, labels, names = common.load_coco(tiny_coco, 32)
    assert names[:3] == ["name 1", "name 2", "name 3"]
    assert names[54] == "name 60"  # the log's "donut", of category id 60, is output 54
    assert labels.shape == (3, 80)
    assert [row.nonzero()[:, 0].tolist() for row in labels] == [[], [0, 79], [54]]
    assert images.shape == (3, 3, 32, 32)
    assert images[:].argmax(1).flatten(1).mode(1).values.tolist() == [0, 1, 2]
    assert len(common.load_coco(tiny_coco, 32, limit=2)[0]) == 2


def test_photos_are_read_when_asked_for_and_by_a_dataloaders_workers(tiny_coco):
    images, _, _ = common.load_coco(tiny_coco, 32)
    images.paths.append(tiny_coco / "none.jpg")
    assert images[0].shape == (3, 32, 32)
    for rows in ([2, 0], torch.tensor([2, 0])):
        assert torch.equal(images[rows], torch.stack([images[2], images[0]]))
    assert torch.equal(images[1:3], images[[1, 2]])
    assert images[:0].shape == (0, 3, 32, 32)
    with pytest.raises(common.Failure, match=r"none\.jpg"):
        images[3]
    images.paths.pop()
    with pytest.raises(IndexError):
        images[3]
    (batch,) = torch.utils.data.DataLoader(images, 3, num_workers=1)
    assert torch.equal(batch, images[:])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d["images"][0].update(file_name="../../x.jpg"), "file in its folder"),
        (lambda d: d["images"][0].update(file_name="/etc/passwd"), "file in its folder"),
        (lambda d: d["images"][0].update(file_name="a\\b.jpg"), "file in its folder"),
        (lambda d: d["images"][0].update(file_name=".."), "file in its folder"),
        (lambda d: d["images"][0].update(file_name="a\x1b[2J"), "file in its folder"),
        (lambda d: d["images"][0].update(file_name=["x.jpg"]), "file in its folder"),
        (lambda d: d["images"][0].update(id=9), "one id"),
        (lambda d: d["images"][0].update(file_name=d["images"][1]["file_name"]), "comes twice"),
        (lambda d: d["images"][0].update(id={}), "TypeError"),
        (lambda d: d["annotations"][0].update(category_id=12), "category 12"),
        (lambda d: d["annotations"][0].update(image_id=10), "photo 10"),
        (lambda d: d["annotations"][0].update(image_id=[9]), "TypeError"),
        (lambda d: d["annotations"].append(None), "TypeError"),
        (lambda d: d["categories"].append(d["categories"][0]), "comes twice"),
        (lambda d: d["categories"][0].update(name=5), "no text"),
        (lambda d: d.update(images={}), "no photo"),
        (lambda d: d.pop("categories"), "KeyError"),
    ],
)
def test_hostile_annotations_are_refused_in_one_line(tiny_coco, change, word):
    path = tiny_coco / "coco" / "annotations" / "instances_val2017.json"
    content = instances()
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(common.Failure, match=rf"instances_val2017\.json is damaged.*{re.escape(word)}") as problem:
        common.load_coco(tiny_coco, 32)
    assert "\n" not in str(problem.value)
    assert "\x1b" not in str(problem.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": 5}', "\xff\xfe", "[" * 100_000])
def test_annotations_that_are_no_json_are_refused_in_one_line(tiny_coco, text):
    (tiny_coco / "coco" / "annotations" / "instances_val2017.json").write_text(text, encoding="latin-1")
    with pytest.raises(common.Failure, match="is damaged"):
        common.load_coco(tiny_coco, 32)


def test_every_kind_of_image_file_is_read_right(tmp_path):
    red = Image.new("RGB", (8, 4), (200, 30, 10))
    half = Image.new("RGBA", (8, 4), (255, 0, 0, 128))
    palette = Image.new("P", (8, 4), 1)
    palette.putpalette([0, 0, 0, 200, 30, 10])
    clear = palette.copy()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    turned = Image.new("RGB", (8, 4), (200, 30, 10))
    turned.paste((0, 0, 255), (0, 0, 4, 4))
    grey16 = Image.fromarray(np.full((4, 8), 40_000, np.uint16))
    cases = {
        "grey.jpg": (Image.new("L", (8, 4), 90), {}, (90, 90, 90)),
        "cmyk.jpg": (red.convert("CMYK"), {}, (200, 30, 10)),
        "palette.png": (palette, {}, (200, 30, 10)),
        "clear.png": (clear, {"transparency": 1}, (255, 255, 255)),
        "alpha.png": (half, {}, (255, 127, 127)),
        "grey-alpha.png": (half.convert("LA"), {}, (165, 165, 165)),
        "bits.png": (Image.new("1", (8, 4), 1), {}, (255, 255, 255)),
        "sixteen.png": (grey16, {}, (156, 156, 156)),
    }
    for name, (image, options, colour) in cases.items():
        image.save(tmp_path / name, **options)
        read = common.open_photo(tmp_path / name)
        assert read.mode == "RGB"
        assert read.size == (8, 4), name
        assert np.abs(np.asarray(read).astype(int) - colour).max() <= 3, name
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    read = common.open_photo(tmp_path / "turned.jpg")
    assert read.size == (4, 8)
    assert read.getpixel((2, 1))[2] > 200
    assert read.getpixel((2, 6))[0] > 150


def test_a_photo_is_squashed_to_the_square_in_0_1_without_mean_and_std(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    assert torch.equal(common.load_photo(tmp_path / "photo.png", 30), common.Photos([tmp_path / "photo.png"], 30)[0])
    Image.fromarray(np.repeat(np.repeat(pixels[:2, :3], 30, 0), 30, 1)).save(tmp_path / "blocks.png")
    small = common.load_photo(tmp_path / "blocks.png", 96)
    truth = torch.from_numpy(pixels[:2, :3].copy()).permute(2, 0, 1).float() / 255
    for row in range(2):
        for column in range(3):
            assert torch.allclose(small[:, 24 + 48 * row, 16 + 32 * column], truth[:, row, column], atol=0.01)


def test_files_that_are_no_photo_are_named(tmp_path):
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    bomb = b"\x89PNG\r\n\x1a\n" + bytes.fromhex("0000000d49484452000fffff000fffff0802000000")
    (tmp_path / "bomb.png").write_bytes(bomb + zlib.crc32(bomb[12:]).to_bytes(4, "big"))
    for name in ("truncated.jpg", "text.jpg", "empty.jpg", "folder.jpg", "bomb.png", "float.tif", "none.jpg"):
        with pytest.raises(common.Failure, match=re.escape(name)) as problem:
            common.open_photo(tmp_path / name)
        assert "\n" not in str(problem.value)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` {path: bytes} with ranges; an answer breaks off after `most` bytes."""

    files, most, seen = {}, 10**9, []

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Range")))
        if self.path not in self.files:
            return self.send_error(404)
        data, start = self.files[self.path], int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    class Mine(Server):
        files, seen = {}, []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Mine.url = f"http://127.0.0.1:{httpd.server_port}/"
        yield Mine
        httpd.shutdown()


def test_a_download_that_broke_off_is_gone_on_from_and_never_half_there(server, tmp_path):
    path, data = tmp_path / "new" / "file", np.random.default_rng(0).bytes(300_000)
    server.files["/file"] = data
    server.most = 100_000
    for part in (100_000, 200_000):
        with pytest.raises(common.Failure, match=rf"broke off.*put that file at {re.escape(str(path))}"):
            common.download(server.url + "file", path)
        assert [p.name for p in path.parent.iterdir()] == ["file.part"]
        assert path.with_name("file.part").read_bytes() == data[:part]
    common.download(server.url + "file", path)
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert [r for _, r in server.seen] == [None, "bytes=100000-", "bytes=200000-"]
    path.rename(path.with_name("file.part"))  # whole, but killed before it was renamed
    server.most = 10**9
    common.download(server.url + "file", path)
    assert path.read_bytes() == data


def test_a_download_with_another_hash_is_refused_and_not_kept(server, tmp_path):
    server.files["/file"] = b"content"
    digest = hashlib.sha256(b"content").hexdigest()
    with pytest.raises(common.Failure, match=f"its SHA-256 is {digest}, not 00"):
        common.download(server.url + "file", tmp_path / "file", sha256="00")
    assert os.listdir(tmp_path) == []
    common.download(server.url + "file", tmp_path / "file", sha256=digest[:8])
    assert (tmp_path / "file").read_bytes() == b"content"


def test_absent_coco_is_downloaded_only_what_is_asked_for(server, tiny_coco, monkeypatch):
    folder = tiny_coco / "coco"
    monkeypatch.setattr(common, "COCO_URL", server.url)
    annotations, photos = folder / "annotations" / "instances_val2017.json", sorted((folder / "val2017").iterdir())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.write(annotations, "annotations/instances_val2017.json")
        file.writestr("annotations/instances_train2017.json", "{}")
        file.writestr("../evil", "")
    server.files["/annotations/annotations_trainval2017.zip"] = packed.getvalue()
    for photo in photos[:2]:
        server.files[f"/val2017/{photo.name}"] = photo.read_bytes()
        photo.unlink()
    photos[2].unlink()
    annotations.unlink()
    images, _, _ = common.load_coco(tiny_coco, 32, limit=2)
    assert images[:].argmax(1).flatten(1).mode(1).values.tolist() == [0, 1]
    assert os.listdir(folder / "annotations") == [annotations.name]
    assert sorted(folder.rglob("*.jpg")) == photos[:2]
    with pytest.raises(common.Failure, match=rf"404.*put that file at {re.escape(str(photos[2]))}"):
        common.load_coco(tiny_coco, 32)


def test_what_cannot_be_downloaded_is_named_with_its_place(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    with pytest.raises(common.Failure, match=rf"there is no {re.escape(str(path))}.*annotations_trainval2017\.zip"):
        common.load_coco(tmp_path, 32)
    with pytest.raises(common.Failure, match=rf"put that file at {re.escape(str(tmp_path))}/MS_COCO_TRresNet_M_224"):
        asl_model.published("tresnet_m", tmp_path)
    with pytest.raises(common.Failure, match=re.escape(f"put that file at {tmp_path / common.INCEPTION}")):
        common.inception_weights(tmp_path)


# ----------------------------------------------------------------------------------------------- weeks 3-5: networks


@pytest.mark.parametrize(
    ("arch", "entries", "millions"), [("tresnet_m", 374, 29.50), ("tresnet_l", 535, 53.75), ("tresnet_xl", 649, 75.99)]
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
    assert not any("num_batches" in name or "layer4.0.se" in name or "filt" in name for name in state)


def photo_like(n, size, seed=0):
    """Images that differ in colour and brightness, as photos do: on mere noise a random network says one thing."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 1, 1, generator=rng) * torch.rand(n, 3, size, size, generator=rng)


def published_state(arch, classes):
    """A random state dict as InPlace-ABN trains one: moments of real activations, gammas of either sign, some zero."""
    torch.manual_seed(0)
    network = asl_model.tresnet(arch, classes)
    gammas = [module.weight for module in network.modules() if isinstance(module, asl_model.NormAct)]
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
    """TResNet's logits (N, L) in float64 from a published state dict, written from the papers and sharing no code.

    Blocks are found by the entries' names alone; the norm is InPlace-ABN's; the blur is a convolution.
    """
    state = {name: x.double() for name, x in state.items()}

    def conv_abn(x, name, slope):
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        gamma, beta, mean, var = (
            state[f"{name}.1.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
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
    blocks = sorted({tuple(map(int, re.findall(r"layer(\d+)\.(\d+)", name)[0])) for name in state if "layer" in name})
    for stage, i in blocks:
        name = f"body.layer{stage}.{i}"
        y = conv(x, f"{name}.conv1", 1e-3)
        y = conv(y, f"{name}.conv2", 1.0 if stage < 3 else 1e-3)
        if f"{name}.se.fc1.weight" in state:
            scale = y.mean((2, 3))
            for fc, act in (("fc1", torch.relu), ("fc2", torch.sigmoid)):
                scale = act(scale @ state[f"{name}.se.{fc}.weight"][:, :, 0, 0].T + state[f"{name}.se.{fc}.bias"])
            y = y * scale[:, :, None, None]
        if stage > 2:
            y = conv(y, f"{name}.conv3", 1.0)
        if f"{name}.downsample.1.0.weight" in state:
            x = conv_abn(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False), f"{name}.downsample.1", 1.0)
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
    assert (truth - truth.mean(0)).norm() > 0.003 * truth.norm(), "all images look alike: the test shows nothing"
    for folded in (True, False):
        network, class_names = asl_model.load_asl(tmp_path / "file.pth", folded=folded)
        assert class_names == list("abcde")
        assert network.arch == arch
        assert not network.training
        with torch.no_grad():
            error = (network(images) - truth).norm() / truth.norm()
        assert error < 1e-5, folded
    torch.save({"state_dict": state | {"body.conv1.1.num_batches_tracked": torch.tensor(7)}}, tmp_path / "file.pth")
    assert asl_model.load_asl(tmp_path / "file.pth")[1] == list("01234")


def test_folding_changes_no_logit_and_no_input_gradient():
    network = asl_model.tresnet("tresnet_s", 4).double()
    network.load_state_dict(published_state("tresnet_s", 4))
    network.eval()
    images, folded = photo_like(2, 64).double(), asl_model.fold(network)
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
    assert not any("1.running_mean" in name for name in folded.state_dict())


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_the_blur_is_the_reflected_binomial_at_every_second_pixel(size):
    x = torch.rand(2, 3, *size)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    truth = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel.expand(3, 1, 3, 3), stride=2, groups=3)
    assert torch.allclose(asl_model.BlurPool()(x), truth, atol=1e-6)


# ---------------------------------------------------------------------------------------------- weeks 3-5: the loss


def asl_formula(logits, targets, gamma_neg, gamma_pos, clip):
    """Equation 7 of Ben-Baruch et al. 2020, as it is printed."""
    p = 1 / (1 + torch.exp(-logits))
    q = torch.clamp(p - clip, min=0)
    positive = -targets * (1 - p) ** gamma_pos * torch.log(p)
    return (positive - (1 - targets) * q**gamma_neg * torch.log(1 - q)).sum()


@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"), [(4, 1, 0.05), (4, 0, 0.05), (2, 2, 0.0), (1.5, 0.5, 0.2), (0, 0, 0)]
)
def test_asl_and_its_gradient_are_the_formulas(gamma_neg, gamma_pos, clip):
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 8, generator=rng, dtype=torch.float64)
    targets = (torch.rand(50, 8, generator=rng) < 0.3).double()
    exact, ours, single = (logits.clone().to(t).requires_grad_() for t in (torch.float64,) * 2 + (torch.float32,))
    truth = asl_formula(exact, targets, gamma_neg, gamma_pos, clip)
    truth.backward()
    loss = asl_model.AsymmetricLoss(gamma_neg, gamma_pos, clip)
    for x, t, tolerance in ((ours, targets, 1e-9), (single, targets.float(), 1e-4)):
        value = loss(x, t)
        value.backward()
        assert value.item() == pytest.approx(truth.item(), rel=tolerance)
        assert torch.allclose(
            x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * exact.grad.abs().max().item()
        )
    if clip == gamma_neg == gamma_pos == 0:
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        assert truth.item() == pytest.approx(bce.item())


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), [(4, 1, 0.05), (0.5, 0.5, 0.05), (0, 0, 0), (2, 2, 0)])
def test_asl_is_finite_and_pulls_the_right_way_at_any_logit(gamma_neg, gamma_pos, clip):
    logits = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 200.0, 1e4]] * 2, requires_grad=True)
    targets = torch.tensor([[1.0] * 6, [0.0] * 6])
    value = asl_model.AsymmetricLoss(gamma_neg, gamma_pos, clip)(logits, targets)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, :3] <= -0.9).all(), "a positive that is far off is pulled up, whatever its distance"
    assert (logits.grad[1] >= 0).all()
    if not clip:
        assert (logits.grad[1, 3:] >= 0.9).all()


def test_detached_focal_weights_only_weigh_the_gradient():
    logits = torch.linspace(-3, 3, 12, dtype=torch.float64).view(2, 6).requires_grad_()
    targets = (torch.arange(12).view(2, 6) % 2).double()
    (gradient,) = torch.autograd.grad(asl_model.AsymmetricLoss(4, 1, 0.05, detach=True)(logits, targets), logits)
    p = torch.sigmoid(logits)
    q = (p - 0.05).clamp(min=0)
    by_hand = -targets * (1 - p) * (1 - p) + (1 - targets) * q**4 * (q > 0) * p * (1 - p) / (1 - q)
    assert torch.allclose(gradient, by_hand)


# -------------------------------------------------------------------------------------------- weeks 3-5: measuring


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


def test_precision_recall_and_f1_are_the_brute_force_ones():
    rng = np.random.default_rng(1)
    probabilities, labels = rng.random((30, 5)), (rng.random((30, 5)) < 0.4).astype(np.float32)
    probabilities[:, 2] = 0.1
    counts = []
    for c in range(5):
        pairs = [(p > 0.6, t > 0) for p, t in zip(probabilities[:, c], labels[:, c], strict=True)]
        counts.append([pairs.count(kind) for kind in ((True, True), (True, False), (False, True))])
    precision = [tp / (tp + fp) if tp else 0 for tp, fp, _ in counts]
    recall = [tp / (tp + fn) if tp else 0 for tp, _, fn in counts]
    f1 = [2 * p * r / (p + r) if p else 0 for p, r in zip(precision, recall, strict=True)]
    tp, fp, fn = np.sum(counts, 0)
    numbers = asl_model.measure(probabilities, labels, 0.6)
    assert [numbers[k] for k in ("CP", "CR", "CF1")] == pytest.approx([sum(x) / 5 for x in (precision, recall, f1)])
    assert numbers["OP"]["rate"] == pytest.approx(tp / (tp + fp))
    assert numbers["OR"]["rate"] == pytest.approx(tp / (tp + fn))
    assert numbers["OF1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert asl_model.measure(0 * probabilities, labels, 0.6).get("OP") is None


# -------------------------------------------------------------------------------------- weeks 3-5: the whole script


def asl_flags(data, out, *flags):
    return ["--dataset", "scenes", "--digits", "mnist", "--data", str(data), "--out", str(out), *map(str, flags)]


SHORT = ("--train", "--epochs", 5, "--limit", 40, "--batch-size", 8)


def test_training_keeps_the_best_network_in_the_published_format(tiny_mnist, tmp_path, capsys):
    record = asl_model.main(asl_flags(tiny_mnist, tmp_path / "run", *SHORT))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "checkpoint.pt", "results.json", "tresnet_s-scenes-mnist.pth"
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(record))
    assert record["dataset"] == "scenes-mnist"
    assert record["n"] == 2000
    content = torch.load(tmp_path / "run" / "tresnet_s-scenes-mnist.pth", weights_only=True)
    assert set(content) >= {"model", "num_classes", "idx_to_class"}
    weights = ["--weights", tmp_path / "run" / "tresnet_s-scenes-mnist.pth"]
    again = asl_model.main(asl_flags(tiny_mnist, tmp_path / "again", "--evaluate", *weights))
    assert again["mAP"] == record["mAP"]
    first, second = (x for x in re.findall(r"mAP (\S+) over 10", capsys.readouterr().out))
    assert first == second == f"{record['mAP']:.2%}"


def test_our_own_files_keep_their_gammas_as_batch_norm_trained_them(tmp_path):
    state = published_state("tresnet_s", 3)
    content = {"model": state, "num_classes": 3, "idx_to_class": dict(enumerate("abc")), "norm": "batch norm"}
    torch.save(content, tmp_path / "own.pth")
    kept = asl_model.load_asl(tmp_path / "own.pth", folded=False)[0].state_dict()
    assert all(torch.equal(kept[name], x) for name, x in state.items())


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A folder with 40 + 20 made-up digits in MNIST's format, for the whole module."""
    return made_up_mnist(tmp_path_factory.mktemp("digits"))


LONGER = ("--train", "--epochs", 20, "--limit", 32, "--batch-size", 8)


@pytest.fixture(scope="module")
def whole_training(few_digits, tmp_path_factory):
    """An uninterrupted run of `LONGER`."""
    out = tmp_path_factory.mktemp("whole")
    asl_model.main(asl_flags(few_digits, out, *LONGER))
    return out


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_training_that_was_stopped_resumes_to_the_same_bits(whole_training, few_digits, tmp_path, stop):
    flags = asl_flags(few_digits, tmp_path, *LONGER)
    path = tmp_path / "checkpoint.pt"
    stop_once_there_is(path, stop, "asl_model.py", *flags)
    position = torch.load(path, weights_only=True)["steps"]
    assert 0 < position < 80, "the run was over before it was stopped: the test shows nothing"
    assert not list(tmp_path.glob("*.pth")), "a network that is not trained to the end looks like one that is"
    with pytest.raises(common.Misuse, match=r"lr 0\.005 there and 0\.1 here"):
        asl_model.main([*flags, "--resume", "--lr", "0.1"])
    asl_model.main([*flags, "--resume"])
    whole, again = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole_training, tmp_path))
    for part in ("network", "average"):
        assert all(torch.equal(again[part][name], x) for name, x in whole[part].items()), part
    name = "tresnet_s-scenes-mnist.pth"
    assert torch.load(tmp_path / name, weights_only=True)["mAP"] == whole["best"] == again["best"]


def test_a_few_seconds_of_training_tell_ten_glyphs_apart():
    args = asl_model.settings(["--train", "--dataset", "scenes", "--epochs", "1", "--batch-size", "32", "--lr", "5e-3"])
    args.arch, args.image_size = "tresnet_s", 64
    digits = common.glyphs(10)
    torch.manual_seed(0)
    training = asl_model.Training(args, torch.device("cpu"), asl_model.tresnet("tresnet_s", 10), 160, "scenes-glyphs")
    for images, labels in asl_model.training_batches(args, digits, training):
        training.step(images, labels)
    images, labels = common.compose_scenes(*digits, 300, seed=7)
    said = asl_model.predict(asl_model.fold(training.average), images, training.device)
    assert asl_model.average_precision(said, labels.numpy()).mean() > 0.45  # by chance: 0.26


def test_photos_are_learnt_by_heart_and_evaluated(tiny_coco, tmp_path, capsys):
    folder, content, colours = tiny_coco / "coco", instances(), {"red": 60, "lime": 2, "blue": 90}
    for i, (colour, category) in enumerate(4 * list(colours.items()), 100):
        Image.new("RGB", (50, 40 + i), colour).save(folder / "val2017" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png"})
        content["annotations"].append({"image_id": i, "category_id": category})
    content["annotations"] = content["annotations"][4:]  # the first three photos have no label
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    flags = ["--dataset", "coco", "--data", str(tiny_coco), "--out", str(tmp_path / "run"), "--image-size", "64"]
    record = asl_model.main([*flags, "--train", "--arch", "tresnet_s", "--epochs", "20", "--batch-size", "6"])
    assert record["n"] == 12
    assert record["mAP_present"] == 1
    assert record["mAP"] == pytest.approx(3 / 80)
    assert "those it learnt from" in capsys.readouterr().out
    weights = ["--weights", str(tmp_path / "run" / "tresnet_s-coco.pth")]
    assert asl_model.main([*flags, *weights, "--evaluate"])["mAP"] == record["mAP"]
    photo = folder / "val2017" / "100.png"
    labels = asl_model.main([*flags, *weights, "--image", str(photo), "--labels", "name 60", "name 3"])["labels"]
    assert {"name 60", "name 3"} <= set(labels)
    assert max(labels, key=labels.get) == "name 60"
    with Image.open(tmp_path / "run" / "100-labels.png") as image:
        assert image.size[0] > 300


def test_the_order_of_a_files_labels_is_its_own(tiny_coco, tmp_path):
    args = asl_model.settings(["--evaluate", "--data", str(tiny_coco), "--image-size", "32"])
    names = asl_model.load_data(args, "val2017")[2]
    _, labels, order, _ = asl_model.load_data(args, "val2017", names[::-1])
    assert order == names[::-1]
    assert [row.nonzero()[:, 0].tolist() for row in labels] == [[0, 79], [25]]
    numbered = [str(i) for i in range(80)]
    assert asl_model.load_data(args, "val2017", numbered)[2] == names
    with pytest.raises(common.Misuse, match="labels of the weights are not coco's: cat"):
        asl_model.load_data(args, "val2017", [*names[:-1], "cat"])


def test_the_scenes_classifier_is_trained_once_and_says_so(tiny_mnist, tmp_path, monkeypatch, capsys):
    trained = []

    def quick(argv, main=asl_model.main):
        args = asl_model.settings(argv)
        assert all(getattr(args, name) is None for name in ("epochs", "batch_size", "lr", "arch", "limit"))
        trained.append(argv)
        return main([*argv, *map(str, SHORT[1:])])

    def stopped(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*_)

    monkeypatch.setattr(asl_model, "main", quick)
    step = asl_model.Training.step
    monkeypatch.setattr(asl_model.Training, "step", stopped)
    with pytest.raises(common.Stopped, match="run it again to go on"):
        asl_model.scenes_classifier(tiny_mnist, tmp_path / "out")
    monkeypatch.setattr(asl_model.Training, "step", step)
    for _ in range(2):
        network, names = asl_model.scenes_classifier(tiny_mnist, tmp_path / "out")
        assert names == list("0123456789")
        assert network(common.load_scenes(3, source="mnist", data_dir=tiny_mnist)[0]).shape == (3, 10)
    assert ["--resume" in flags for flags in trained] == [False, True]
    assert "is trained first" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- weeks 3-5: when things go wrong


def test_files_that_are_not_published_weights_are_named_with_what_differs(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    state = published_state("tresnet_s", 2)
    good = {"model": state, "num_classes": 2, "idx_to_class": {0: "a", 1: "b"}}
    path = tmp_path / "file.pth"

    def refused(content, *words, arch=None):
        torch.save(content, path)
        with pytest.raises(common.Failure) as problem:
            asl_model.load_asl(path, arch)
        for word in ("file.pth", *words):
            assert word in str(problem.value)
        assert len(str(problem.value)) < 500

    refused(good | {"model": Hostile()}, "damaged")
    assert not (tmp_path / "owned").exists()
    refused({"model": 5}, "state dict")
    refused({"model": {"a": 5}}, "state dict")
    refused(good, "no tresnet_m", "entries differ", "body.conv1.0.weight (16, 48, 3, 3), not (64, 48", arch="tresnet_m")
    missing = {name: x for name, x in state.items() if name != "head.fc.bias"}
    refused(good | {"model": missing}, "no tresnet_s: 1 of", "head.fc.bias absent, not (2,)")
    refused(good | {"model": state | {"extra": torch.zeros(3)}}, "no tresnet_s: 1 of", "extra (3,), not there")
    refused(good | {"model": state | {"head.fc.bias": torch.tensor([1.0, torch.nan])}}, "not finite")
    refused(good | {"model": state | {"head.fc.bias": torch.tensor([1, 2])}}, "not finite")
    for names in ({0: "a"}, {0: "a", 2: "b"}, {0: "a", 1: "a"}, {0: "a", 1: 5}, ["a", "b"], {0: "a", "x": "b"}):
        refused(good | {"idx_to_class": names}, "idx_to_class")
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(common.Failure, match=r"file\.pth is damaged"):
        asl_model.load_asl(path)
    with pytest.raises(common.Failure, match="cannot read"):
        asl_model.load_asl(tmp_path / "none.pth")


def test_an_unknown_label_is_answered_with_the_nearest():
    names = ["person", "dining table", "donut", "teddy bear"]
    assert asl_model.label_index("donut", names) == 2
    with pytest.raises(common.Misuse, match=r"'dounut' is none of the 4 labels; the nearest: donut"):
        asl_model.label_index("dounut", names)
    with pytest.raises(common.Misuse, match="nearest: dining table"):
        asl_model.label_index("Dinning Table", names)
    with pytest.raises(common.Misuse, match="person"):
        asl_model.label_index("", names)


def test_a_damaged_photo_ends_an_evaluation_in_one_line(tiny_coco, tmp_path):
    names = common.load_coco(tiny_coco, 32)[2]
    content = {"model": published_state("tresnet_s", 80), "num_classes": 80, "idx_to_class": dict(enumerate(names))}
    torch.save(content, tmp_path / "file.pth")
    photo = tiny_coco / "coco" / "val2017" / f"{9:012}.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    flags = ["--data", str(tiny_coco), "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "file.pth")]
    fails(script("asl_model.py", "--evaluate", *flags), 1, f"error: {photo} is no photo")
    with pytest.raises(common.Failure, match=r"there is no .*none\.jpg"):
        asl_model.main(["--image", str(tmp_path / "none.jpg"), *flags])
    with pytest.raises(common.Misuse, match="nearest: name 7"):
        asl_model.main(["--image", str(photo), "--labels", "nam 7", *flags])


# ------------------------------------------------------------------------------------------------ weeks 3-5: the attack


class Linear(nn.Module):
    """Images (N, 1, 2, 2) -> logits (N, L), linear in the pixels."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


def test_pgd_of_a_linear_model_is_its_closed_form():
    torch.manual_seed(0)
    weight, images = torch.randn(3, 4), torch.rand(5, 1, 2, 2)
    found = pgd_attack.pgd(Linear(weight), images, torch.full((5,), 1), lambda x, y: -x[:, 1], 0.3, 0.02, 40)
    assert torch.allclose(found, (images + 0.3 * weight[1].sign().view(1, 2, 2)).clamp(0, 1), atol=1e-6)
    few = pgd_attack.pgd(Linear(weight), images, torch.full((5,), 1), lambda x, y: -x[:, 1].mean(), 0.3, 0.02, 3)
    assert torch.allclose(few, (images + 0.06 * weight[1].sign().view(1, 2, 2)).clamp(0, 1), atol=1e-6)
    assert torch.equal(pgd_attack.pgd(Linear(weight), images, torch.zeros(5), lambda x, y: x.sum(1), 0), images)
    assert pgd_attack.pgd(Linear(weight), images[:0], torch.zeros(0), lambda x, y: x.sum(1)).shape == (0, 1, 2, 2)


def test_pgd_with_momentum_is_the_papers_loop():
    images, centre = torch.rand(3, 1, 2, 2), torch.tensor([0.3, 0.5, 0.52, 0.8])
    found = pgd_attack.pgd(
        Linear(torch.eye(4)), images, torch.zeros(3), lambda x, y: (x - centre).square().sum(1), 0.2, 0.05, 9,
        momentum=0.75,
    )  # fmt: skip
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
    moved = pgd_attack.pgd(
        Linear(torch.randn(2, 4)), images, torch.zeros(20), lambda x, y: x.sum(1), 0.1, 0.07, 5, True, clip=clip
    )
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= clip[0]
    assert moved.max() <= clip[1]
    beside = images + 5  # week 4: what was normalised first is cut, however far that is
    assert (
        pgd_attack.pgd(Linear(torch.ones(2, 4)), beside, torch.zeros(20), lambda x, y: x.sum(1), clip=clip).max()
        <= clip[1]
    )


def small_network(classes=3):
    """A convolution network with everything that has a mode, in training mode, its norm used to what it sees."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, classes))
    network[-1].weight.data.mul_(5)
    for i in range(20):
        network(photo_like(16, 12, i))
    return network


def test_pgd_leaves_the_model_and_its_inputs_as_they_were():
    network, images = small_network(), photo_like(4, 12)
    network[1].eval()
    network[0].weight.requires_grad_(False)
    state, copy = {name: x.clone() for name, x in network.state_dict().items()}, images.clone()
    with torch.no_grad():  # which the attack needs to overrule
        moved = pgd_attack.pgd(network, images, torch.tensor([0, 1, 2, 0]), pgd_attack.cross_entropy, steps=3)
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
    network, images, targets = small_network().double(), photo_like(6, 12).double(), torch.arange(6) % 3

    def attack(rows):
        return pgd_attack.pgd(
            network, images[rows], targets[rows], pgd_attack.cross_entropy, 0.05, 0.01, 20, False, early_stop,
            momentum=momentum,
        )  # fmt: skip

    whole = attack(slice(None))
    assert all(torch.allclose(attack([i])[0], whole[i], atol=1e-9) for i in range(6))


def test_early_stop_loses_no_success_and_leaves_what_is_reached_alone():
    network, images = small_network().eval(), photo_like(40, 12)
    targets = torch.arange(40) % 3
    how = (network, images, targets, pgd_attack.cross_entropy, 0.05, 0.005, 30)
    every, stopped = pgd_attack.pgd(*how), pgd_attack.pgd(*how, early_stop=True)
    hit, stopped_hit = (network(x).argmax(1) == targets for x in (every, stopped))
    assert hit.sum() > 30
    assert (stopped_hit >= hit).all()
    there = network(images).argmax(1) == targets
    assert there.any()
    assert torch.equal(stopped[there], images[there])
    assert (stopped - images).abs().amax((1, 2, 3)).mean() < (every - images).abs().amax((1, 2, 3)).mean()
    wanted = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    reached = pgd_attack.reached(torch.tensor([[2.0, -1, 0.5], [-1, -2, -3]]), wanted)
    assert reached.tolist() == [True, False]


def test_an_early_stop_of_ones_own_is_asked_with_logits_and_targets():
    network, images = small_network(), photo_like(4, 12)
    moved = pgd_attack.pgd(network, images, torch.arange(4), lambda x, y: x.sum(1), early_stop=lambda x, y: y < 2)
    same = (moved == images).flatten(1).all(1)
    assert same.tolist() == [True, True, False, False]


def test_a_model_that_answers_nan_ends_the_attack_in_one_line():
    with pytest.raises(common.Failure, match="no finite number"):
        pgd_attack.pgd(lambda x: x.flatten(1) / 0, torch.rand(2, 1, 2, 2), torch.zeros(2), lambda x, y: x.sum(1))
    for sizes in ({"eps": -1}, {"steps": -1}, {"alpha": -0.1}, {"clip": (1, 0)}):
        with pytest.raises(ValueError, match="negative"):
            pgd_attack.pgd(small_network(), photo_like(2, 12), torch.zeros(2), lambda x, y: x.sum(1), **sizes)
    with pytest.raises(ValueError, match="2 images need as many targets, not 3"):
        pgd_attack.pgd(small_network(), photo_like(2, 12), torch.zeros(3), lambda x, y: x.sum(1))


def test_the_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, wanted = 3 * torch.randn(6, 5, dtype=torch.float64), (torch.rand(6, 5) > 0.5).double()
    p, soft = 1 / (1 + np.exp(-logits.numpy())), scipy.special.softmax(logits.numpy(), 1)
    w, at = wanted.numpy(), np.log(0.8 / 0.2)
    sign = 2 * w - 1
    formulas = {
        "softmax-ce": -sign[:, 2] * np.log(soft[:, 2]),
        "bce": -(w * np.log(p) + (1 - w) * np.log(1 - p)).mean(1),
        "softmax-bce": -(w * np.log(soft) + (1 - w) * np.log(1 - soft)).mean(1),
        "bce-target": -(w * np.log(p) + (1 - w) * np.log(1 - p))[:, 2],
        "margin": np.maximum(0, [[0.2, 0.2, 1, 0.2, 0.2]] - sign * (logits.numpy() - at)).sum(1),
    }
    assert set(formulas) == set(pgd_attack.LOSSES)
    for name, values in formulas.items():
        assert np.allclose(pgd_attack.LOSS[name](logits, wanted, 2, 0.8).numpy(), values), name
    huge = torch.tensor([[900.0, 0, -900, 3, 1]], dtype=torch.float64).repeat(6, 1) * wanted  # whose softmax is 0 and 1
    for values in (logits, huge):
        ours, torchs = values.clone().requires_grad_(), values.float().requires_grad_()
        pgd_attack.softmax_bce(ours, wanted).sum().backward()
        F.binary_cross_entropy(torchs.softmax(1), wanted.float(), reduction="none").mean(1).sum().backward()
        assert torch.allclose(ours.grad.float(), torchs.grad, rtol=1e-4)
    copied = logits.index_fill(1, torch.tensor([2]), 1)  # week 4's targets, which torch's own refuses
    expected = (np.log1p(-soft) * (copied.numpy() - 1) - copied.numpy() * np.log(soft)).mean(1)
    assert np.allclose(pgd_attack.softmax_bce(logits, copied).numpy(), expected)


def test_the_margin_pushes_no_label_that_is_where_it_should_be():
    logits = torch.tensor([[5.0, -5, 0.1, 0.7]], requires_grad=True)
    pgd_attack.margin(logits, torch.tensor([[1.0, 0, 1, 1]]), 3, 0.5).sum().backward()
    assert logits.grad.tolist() == [[0, 0, -1, -1]]


def test_restarts_attack_only_what_is_left_and_lose_nothing():
    network, images = small_network(4).eval(), photo_like(30, 12)
    once = pgd_attack.Attack(2, "flip", 0.5, "margin", 0.03, 0.1, 8, True)
    with torch.no_grad():
        logits = network(images)
    wanted = (logits > 0).float()
    wanted[:, 2] = 1 - wanted[:, 2]
    first, again = (attack(network, images, logits) for attack in (once, once._replace(restarts=8)))
    done = (pgd_attack.beyond(network(first), wanted, 0.5) > 0).all(1)
    assert 0 < done.sum() < 30
    assert torch.equal(first[done], again[done])
    won = (pgd_attack.beyond(network(again), wanted, 0.5) > 0).all(1)
    assert won.sum() > done.sum()
    assert torch.equal(first[~won], again[~won])


def test_what_is_counted_is_what_a_loop_counts():
    rng = np.random.default_rng(0)
    before, after, truth = (rng.random((50, 6)) < 0.4 for _ in range(3))
    after[:20] = before[:20]
    after[:10, 3] = ~after[:10, 3]
    numbers = {("x", key): np.ones(50) for key in ("linf", "l2", "seconds")}
    attack = pgd_attack.Attack(3, "on", 0.5, "margin", 0.1)
    row = pgd_attack.count({"before": before, ("x", "after"): after, **numbers}, "x", attack, truth)
    asked = switched = exact = off = on = 0
    for b, a in zip(before, after, strict=True):
        others = [j for j in range(6) if j != 3]
        lost, won = sum(b[j] and not a[j] for j in others), sum(a[j] and not b[j] for j in others)
        off, on = off + lost, on + won
        if not b[3]:
            asked += 1
            switched += a[3]
            exact += a[3] and lost + won == 0
    assert row["target_switched"] == common.wilson(switched, asked)
    assert row["exact"] == common.wilson(exact, asked)
    assert (row["others_off_per_image"], row["others_on_per_image"]) == (off / 50, on / 50)
    assert row["others_lost"] == common.wilson(off, before.sum() - before[:, 3].sum())
    assert row["non_target_changed"] == common.wilson(off + on, 250)
    assert row["counts"] == {
        name: (x[:, 3].sum(), x.sum()) for name, x in (("actual", truth), ("before", before), ("after", after))
    }
    assert (
        pgd_attack.count({"before": before | True, ("x", "after"): after, **numbers}, "x", attack, None)["exact"]
        is None
    )


# ------------------------------------------------------------------------------------------ weeks 3-5: the whole attack


@pytest.fixture(scope="module")
def attackable(tmp_path_factory):
    """The flags that attack four scenes of glyphs with a network of random weights that says some of everything."""
    path = tmp_path_factory.mktemp("weights") / "some.pth"
    state = published_state("tresnet_s", 10)
    network = asl_model.tresnet("tresnet_s", 10).eval()
    network.load_state_dict(asl_model.inplace_abn_gammas(state))
    with torch.no_grad():
        state["head.fc.bias"] -= network(common.load_scenes(50, source="glyphs")[0]).mean(0)
    torch.save({"model": state, "num_classes": 10, "idx_to_class": dict(enumerate("0123456789"))}, path)
    return ["--digits", "glyphs", "--weights", str(path), "--limit", "6", "--steps", "4"]


@pytest.mark.parametrize(("week", "rows"), [(None, 1), (3, 7), (5, 8)])
def test_an_attack_writes_its_table_and_its_figure(attackable, tmp_path, capsys, week, rows):
    flags = [*attackable, "--out", str(tmp_path), "--target", "3", *(["--week", str(week)] if week else [])]
    record = pgd_attack.main(flags)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(record))
    assert len(record["rows"]) == rows
    out = capsys.readouterr().out
    for line in ("actual 3", "predicted 3 before attack", "predicted 3 after attack", "actual present objects",
                 "predicted present objects before attack", "predicted present objects after attack"):  # fmt: skip
        assert line in out
    assert all(row["linf"] <= (0.6 if week else 0.1) + 1e-6 for row in record["rows"].values())
    with Image.open(tmp_path / "pgd-attack-on-asl.png") as image:
        assert image.size[1] > 4 * 300
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "pgd-attack-on-asl.png"}


def test_the_sweep_prints_each_control_with_its_verdict(attackable, tmp_path, capsys):
    record = pgd_attack.main(
        [*attackable, "--out", str(tmp_path), "--sweep", "--loss", "bce-target", "--target", "3", "--limit", "3"]
    )
    out = capsys.readouterr().out
    assert len(re.findall("^(?:holds|FAILS): ", out, re.M)) == len(record["controls"]) == 5
    rates = [record["rows"][f"attack, {eps}/255"]["target_switched"]["rate"] for eps in (0, 0.25, 16)]
    assert rates[0] == 0
    assert rates[2] > 0
    assert record["rows"]["noise, 16/255"]["linf"] == pytest.approx(16 / 255, abs=1e-3)


def test_two_processes_of_torchruns_give_the_table_of_one(attackable, tmp_path):
    flags = [*attackable, "--restarts", "1", "--eps", "0.05", "--precision", "fp32", "--batch-size", "2"]
    one = pgd_attack.main([*flags, "--out", str(tmp_path / "one")])
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    command = [*run, HERE / "pgd_attack.py", *flags, "--out", tmp_path / "two"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    for row in (one["rows"]["margin"], two["rows"]["margin"]):
        del row["images_per_second"]
        row["l2"] = round(row["l2"], 2)
    assert one["rows"]["margin"]["target_switched"]["rate"] > 0
    assert json.loads(json.dumps(one["rows"])) == two["rows"]
    assert process.stdout.count("predicted present objects after attack") == 1


def test_week_4_of_digits_needs_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acwgan, "digit_reader", lambda *_: acwgan.DigitReader().eval())
    flags = ["--week", "4", "--digits", "glyphs", "--limit", "5", "--steps", "3", "--out", str(tmp_path)]
    record = pgd_attack.main([*flags, "--target", "8"])
    assert list(record["rows"]) == ["glyphs's test digits", "scenes of several digits"]
    assert all(len(rows) == 5 for rows in record["rows"].values())
    assert "as logged, but in pixels" in capsys.readouterr().out
    assert (tmp_path / "pgd-attack-on-digits.png").exists()
    for missing, *model in (
        ("torchattacks", "digits", "--benchmark"),
        ("efficientnet_lite_pytorch", "efficientnet_lite0"),
    ):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(common.Misuse, match="pip install"):
            pgd_attack.main(["--digits", "glyphs", "--limit", "5", "--out", str(tmp_path), "--model", *model])


def test_week_4s_attack_is_cut_in_normalised_space_as_it_was_logged():
    network = pgd_attack.Normalised(small_network().eval(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    images = photo_like(5, 12)
    with torch.no_grad():
        logits = network(images)
    log = pgd_attack.ImageAttack(1, pgd_attack.softmax_bce, 0.3, normalised=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    cut = log._replace(loss=None)(network, images, logits)
    assert torch.allclose(cut, images.clamp(mean, mean + std), atol=1e-6)
    moved = log(network, images, logits)
    assert (moved - mean >= -1e-6).all()
    assert (moved - mean - std <= 1e-6).all()
    assert ((moved - cut).abs() <= 0.3 * std + 1e-6).all()
    assert not torch.allclose(moved, cut)


def test_torchvisions_classifiers_load_by_name(tmp_path):
    from torchvision import models

    args = pgd_attack.settings(["--model", "resnet18", "--data", str(tmp_path)])
    state = models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18-f37072fd.pth")
    network, names, size = pgd_attack.image_classifier(args, torch.device("cpu"))
    assert (names[931], size) == ("bagel", 224)
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    torch.save({"fc.weight": state["fc.weight"]}, tmp_path / "resnet18-f37072fd.pth")
    with pytest.raises(common.Failure, match="is not resnet18's"):
        pgd_attack.image_classifier(args, torch.device("cpu"))
    with pytest.raises(common.Misuse, match="nearest: resnet18"):
        pgd_attack.image_classifier(pgd_attack.settings(["--model", "resnet19"]), torch.device("cpu"))


def test_imagenets_classes_are_in_the_files_or_the_folders_names(tmp_path):
    (tmp_path / "imagenet" / "n01440764").mkdir(parents=True)
    for name in ("n01440764_tench.JPEG", "n01530575_water_ouzel.png", "n02012849_crane.jpg", "x.jpg"):
        Image.new("RGB", (64, 32), "red").save(tmp_path / "imagenet" / name)
    Image.new("RGB", (64, 32), "red").save(tmp_path / "imagenet" / "n01440764" / "y.JPEG")
    photos, classes = common.load_imagenet(tmp_path, 28, ["tench", "water ouzel", "crane", "crane"])
    assert photos[:].shape == (5, 3, 28, 28)
    assert photos.paths[0].name == "y.JPEG"
    assert classes.tolist() == [-1, 0, 1, -1, -1]
    assert common.load_imagenet(tmp_path, 28, ["one class"])[1].tolist() == [0, -1, -1, -1, -1]
    with pytest.raises(common.Failure, match="no photo"):
        common.load_imagenet(tmp_path / "none", 28, ["tench"])


def test_a_photo_is_cropped_to_the_middle_for_imagenets_networks(tmp_path):
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[5:75, 45:115] = 255  # 7/8 of the height, in the middle
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert common.load_photo(tmp_path / "x.png", 35, crop=True)[:, 1:-1, 1:-1].min() > 0.99
    assert common.load_photo(tmp_path / "x.png", 35).min() == 0


def test_attacks_that_make_no_sense_are_refused_in_one_line(attackable, tiny_coco, tmp_path):
    folders = ["--out", str(tmp_path), "--data", str(tiny_coco)]
    with pytest.raises(common.Misuse, match="'13' is none of the 10 labels"):
        pgd_attack.main([*attackable, *folders, "--target", "13"])
    with pytest.raises(common.Misuse, match="the labels of the weights are not coco's"):
        pgd_attack.main([*attackable, *folders, "--dataset", "coco"])
    with pytest.raises(common.Failure, match=r"there is no .*none\.jpg"):
        pgd_attack.main([*attackable[2:4], "--image", str(tmp_path / "none.jpg"), "--target", "3", *folders])
    monkey = Path(attackable[3])
    content = torch.load(monkey, weights_only=True)
    content["model"]["head.fc.weight"].fill_(1e38)
    content["model"]["body.conv1.1.weight"].fill_(1e30)
    torch.save(content, tmp_path / "big.pth")
    with pytest.raises(common.Failure, match="no finite number"):
        pgd_attack.main([*attackable, *folders, "--weights", str(tmp_path / "big.pth")])


# ------------------------------------------------------------------------- peers, where they are installed: see README


def test_peer_pytorch_fid_sees_the_same_features_and_distance(inception_file, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: torch.load(inception_file))
    images = photo_like(4, 64)
    with torch.no_grad():
        theirs = peer.InceptionV3().eval()(images)[0].flatten(1).numpy()
    ours = common.inception_features(images, inception_file)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    rng = np.random.default_rng(0)
    stats = (*moments(rng.normal(size=(300, 64))), *moments(rng.normal(size=(300, 64)) + 0.1))
    distances = (
        common.frechet_distance(*stats),
        pytest.importorskip("pytorch_fid.fid_score").calculate_frechet_distance(*stats),
    )
    print(f"features differ by {difference:.1e} of their size; distances: {distances}")
    assert difference < 1e-4
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)


@pytest.mark.parametrize("arch", ["tresnet_m", "tresnet_l", "tresnet_xl"])
def test_peer_timm_gives_the_same_logits(tmp_path, arch):
    timm = pytest.importorskip("timm")
    state = published_state(arch, 80)
    torch.save(
        {"model": state, "num_classes": 80, "idx_to_class": dict(enumerate(map(str, range(80))))}, tmp_path / "x"
    )
    theirs = timm.create_model(arch, num_classes=80).eval()
    theirs.load_state_dict(timm.models.tresnet.checkpoint_filter_fn({"model": state}, theirs))
    images, ours = photo_like(3, 224), asl_model.load_asl(tmp_path / "x")[0]
    with torch.inference_mode():
        logits, truth = ours(images), theirs(images)
    difference = ((logits - truth).norm() / truth.norm()).item()
    print(f"{arch}: logits differ by {difference:.1e} of their size")
    assert difference < 1e-5


def test_peer_torchattacks_makes_the_same_images():
    peer = pytest.importorskip("torchattacks")
    network, images, targets = small_network().eval(), photo_like(6, 12), torch.arange(6) % 3
    attack = peer.PGD(nn.Sequential(network).eval(), 0.05, 0.01, 20, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    ours = pgd_attack.pgd(network, images, targets, pgd_attack.cross_entropy, 0.05, 0.01, 20)
    assert torch.allclose(attack(images, targets), ours, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        (acwgan, ["--epochs", "0"], "less than 1"),
        (acwgan, ["--epochs", "many"], "whole number"),
        (acwgan, ["--critic-lr", "-1"], "positive"),
        (acwgan, ["--average", "1"], "--average"),
        (acwgan, ["--dataset", "cifar"], "cifar"),
        (acwgan, ["--resume", "--benchmark"], "--benchmark"),
        (acwgan, ["--penalty-share", "2"], "--penalty-share"),
        (acwgan, ["--colour"], "--colour"),
        (transfer, ["--target", "10"], "above 9"),
        (transfer, ["--variant", "best"], "scratch-live"),
        (transfer, ["--variant", "ours", "--approach", "1"], "--approach"),
        (transfer, ["--approach", "3"], "--approach"),
        (transfer, ["--gamma", "none"], "--gamma"),
        (transfer, ["--gamma", "-1"], "not below 0"),
        (asl_model, [], "required"),
        (asl_model, ["--train", "--evaluate"], "not allowed"),
        (asl_model, ["--train", "--image-size", "65"], "multiple of 4"),
        (asl_model, ["--evaluate", "--threshold", "1"], "--threshold"),
        (asl_model, ["--evaluate", "--resume"], "--resume"),
        (asl_model, ["--train", "--gamma-neg", "nan"], "--gamma-neg"),
        (asl_model, ["--train", "--arch", "resnet"], "tresnet_xl"),
        (asl_model, ["--evaluate", "--labels", "dog"], "--labels"),
        (pgd_attack, ["--eps", "8/0"], "not a number"),
        (pgd_attack, ["--eps", "-1"], "not a positive"),
        (pgd_attack, ["--threshold", "1"], "--threshold"),
        (pgd_attack, ["--week", "3", "--sweep"], "--week"),
        (pgd_attack, ["--week", "5", "--model", "resnet18"], "week 5"),
        (pgd_attack, ["--week", "4", "--model", "asl"], "--model asl"),
        (pgd_attack, ["--benchmark"], "--benchmark"),
        (pgd_attack, ["--dataset", "imagenet"], "--dataset"),
        (pgd_attack, ["--model", "digits", "--dataset", "coco"], "coco"),
        (pgd_attack, ["--model", "resnet18", "--direction", "on"], "--direction"),
        (pgd_attack, ["--image", "x.jpg", "--dataset", "scenes"], "--image"),
        (pgd_attack, ["--image", "x.jpg", "--sweep"], "--image"),
        (pgd_attack, ["--sweep", "--benchmark"], "not allowed"),
        (pgd_attack, ["--loss", "l2"], "softmax-ce"),
    ],
)
def test_misuse_ends_at_once_with_exit_code_2(script, flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        script.settings(flags)
    assert end.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("acwgan.py", "default: 0.999"),
        ("transfer.py", "default: 64"),
        ("asl_model.py", "13 for scenes"),
        ("pgd_attack.py", "default: margin"),
    ],
)
def test_help_answers_without_loading_torch(name, word):
    code = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_path("{name}", run_name="__main__")
except SystemExit:
    assert "torch" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert process.returncode == 0, process.stderr
    assert word in " ".join(process.stdout.split())


def test_every_command_of_the_readme_is_one_the_scripts_take():
    commands = re.findall(r"python (\w+)\.py([^\n`#&|]*)", (HERE / "README.md").read_text())
    assert commands
    for name, flags in commands:
        __import__(name).settings(shlex.split(flags))
