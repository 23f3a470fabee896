"""Weeks 3 to 5: the multi-label classifier that the log attacked, TResNet trained with the asymmetric loss (ASL).

TResNet (Ridnik et al. 2020, arXiv 2003.13630) in plain PyTorch: the files published with ASL (Ben-Baruch et al. 2020,
arXiv 2009.14119; github.com/Alibaba-MIIL/ASL) load as they are, and give the original's logits without inplace_abn and
without CUDA. Two things go wrong silently elsewhere: the scale of an InPlace-ABN is |gamma| + eps, not gamma, and the
published networks take pixels in [0, 1], without mean and std, of photos squashed to a square, not cropped.

    python asl_model.py --image photo.jpg                 the labels present, by the published TResNet-M
    python asl_model.py --evaluate --dataset coco         mAP, precision, recall and F1
    python asl_model.py --train --dataset scenes          a classifier of small scenes, from nothing, in minutes
    python asl_model.py --train --dataset coco            a TResNet-M on the COCO photos in --data
    python asl_model.py --train --dataset coco --resume   goes on where that run was stopped

Writes into --out: results.json; with --image <name>-labels.png; with --train checkpoint.pt and, at the end, the best
network, <arch>-<dataset>.pth, which --weights takes (until then <arch>-<dataset>.best is the best so far).
"""

from pathlib import Path

import common

# blocks of the four stages, width (of 64 channels), pixels the weights are for
ARCHITECTURES = {
    "tresnet_s": ((2, 3, 1, 1), 0.25, 64),
    "tresnet_m": ((3, 4, 11, 3), 1.0, 224),
    "tresnet_l": ((4, 5, 18, 3), 1.2, 448),
    "tresnet_xl": ((4, 5, 24, 3), 1.3, 640),
}
# what --train takes unless told otherwise; for scenes an epoch is 10,000 of them, new ones every time
DEFAULTS = {
    "scenes": {"arch": "tresnet_s", "epochs": 13, "batch_size": 64, "lr": 5e-3},
    "coco": {"arch": "tresnet_m", "epochs": 40, "batch_size": 16, "lr": 1e-3},
}


def settings(argv=None):
    """The flags. The ASL repository's value is in brackets, where it is another."""

    def default(name):
        return f"; None: {DEFAULTS['scenes'][name]} for scenes, {DEFAULTS['coco'][name]} for coco"

    p = common.parser(__doc__, "asl_model", "coco", tuple(DEFAULTS), "of images and labels")
    add, whole, positive = p.add_argument, common.whole, common.positive
    mode = p.add_mutually_exclusive_group(required=True)
    mode.add_argument("--image", type=Path, metavar="FILE", help="say what is in this photo")
    mode.add_argument("--evaluate", action="store_true", help="measure on --dataset")
    mode.add_argument("--train", action="store_true", help="train on --dataset (coco: train2017, or without its "
        "annotations val2017, and measured on the same photos)")  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="None: the published ones; for scenes and --train: none")
    add("--arch", choices=ARCHITECTURES, help="None: what --weights holds; without --weights" + default("arch")[6:])
    add("--image-size", type=whole(32, 4096), metavar="PIXELS", help="side of the square; None: as the weights are for")
    add("--threshold", type=positive, default=0.5, help="a label is present above this probability [0.8]")
    add("--labels", nargs="+", default=[], metavar="NAME", help="with --image: say these labels' probabilities, too")
    add("--digits", choices=("auto", "mnist", "glyphs"), default="auto", help="what scenes are made of")
    add("--epochs", type=whole(1), help="passes over the training images" + default("epochs"))
    add("--batch-size", type=whole(2), help="images per step [128]" + default("batch_size"))
    add("--lr", type=positive, help="Adam's largest step size [1e-4]" + default("lr"))
    add("--gamma-neg", type=float, default=4.0, help="ASL: focusing of the negatives")
    add("--gamma-pos", type=float, default=1.0, help="ASL: focusing of the positives [0]")
    add("--clip", type=float, default=0.05, help="ASL: probability below which a negative is forgotten")
    add("--average", type=float, default=0.99, help="decay per step of the averaged network [0.9997]")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = p.parse_args(argv)
    if not (args.threshold < 1 and 0 <= args.clip < 1 and 0 <= args.average < 1):
        p.error("--threshold, --clip and --average must lie below 1, the last two not below 0")
    if not (0 <= args.gamma_neg < 100 and 0 <= args.gamma_pos < 100):
        p.error("--gamma-neg and --gamma-pos must lie in [0, 100)")
    if (args.image_size or 4) % 4:
        p.error("--image-size must be a multiple of 4")
    if (args.resume and not args.train) or (args.labels and not args.image):
        p.error("--resume goes with --train, --labels with --image")
    return args


if __name__ == "__main__":
    common.before_torch(settings)

import copy
import difflib
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- network


class NormAct(nn.Module):
    """Batch norm, then leaky ReLU of the given slope (1: none): InPlace-ABN's parameters, without its batch counter."""

    eps = 1e-5  # InPlace-ABN's, too

    def __init__(self, channels, slope):
        super().__init__()
        self.slope = slope
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        moments = self.running_mean, self.running_var
        x = F.batch_norm(x, *moments, self.weight, self.bias, self.training, 0.1, self.eps)
        return x if self.slope == 1 else F.leaky_relu(x, self.slope, inplace=True)


class ConvNorm(nn.Sequential):
    """A convolution and its `NormAct`, which `fold` makes one."""

    def __init__(self, c_in, c_out, kernel, slope=1.0):
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="leaky_relu")
        super().__init__(conv, NormAct(c_out, slope))

    @torch.no_grad()
    def fold(self):
        conv, norm = self
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        conv.weight.copy_(conv.weight * scale[:, None, None, None])
        conv.bias = nn.Parameter((norm.bias - norm.running_mean * scale).to(norm.bias.dtype))
        self[1] = nn.Identity() if norm.slope == 1 else nn.LeakyReLU(norm.slope, inplace=True)


class SpaceToDepth(nn.Module):
    """(N, C, H, W) -> (N, 16 C, H / 4, W / 4), a pixel's channels side by side: the stem, channels-last by itself."""

    def forward(self, x):
        n, c, h, w = x.shape
        patches = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(n, h // 4, w // 4, 16 * c).permute(0, 3, 1, 2)


class BlurPool(nn.Module):
    """Blur with [1 2 1] x [1 2 1] / 16, then every second pixel (Zhang 2019, arXiv 1904.11486).

    As two means of 2x2, because a depthwise convolution's backward pass in bfloat16 took half of a CPU's training step.
    """

    def forward(self, x):
        return F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "reflect"), 2, 1), 2)


class SqueezeExcite(nn.Module):
    """Scale each channel by what all channels' means say (Hu et al. 2017, arXiv 1709.01507)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """What both kinds share: the shortcut, averaged before it is projected where the block halves the image."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        pool = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)] if stride == 2 else []
        self.downsample = nn.Sequential(*pool, ConvNorm(c_in, c_out, 1)) if pool or c_in != c_out else nn.Identity()

    def forward(self, x):
        return (self.residual(x) + self.downsample(x)).relu_()


def strided(conv, stride):
    return nn.Sequential(conv, BlurPool()) if stride == 2 else conv


class BasicBlock(Block):
    expansion = 1

    def __init__(self, c_in, planes, stride, excite):
        super().__init__(c_in, planes, stride)
        self.conv1 = strided(ConvNorm(c_in, planes, 3, 1e-3), stride)
        self.conv2 = ConvNorm(planes, planes, 3)
        self.se = SqueezeExcite(planes, max(planes // 4, 64)) if excite else nn.Identity()
        nn.init.zeros_(self.conv2[1].weight)  # at first each block hands on what it gets

    def residual(self, x):
        return self.se(self.conv2(self.conv1(x)))


class Bottleneck(Block):
    expansion = 4

    def __init__(self, c_in, planes, stride, excite):
        super().__init__(c_in, 4 * planes, stride)
        self.conv1 = ConvNorm(c_in, planes, 1, 1e-3)
        self.conv2 = strided(ConvNorm(planes, planes, 3, 1e-3), stride)
        self.se = SqueezeExcite(planes, max(planes // 2, 64)) if excite else nn.Identity()
        self.conv3 = ConvNorm(planes, 4 * planes, 1)
        nn.init.zeros_(self.conv3[1].weight)

    def residual(self, x):
        return self.conv3(self.se(self.conv2(self.conv1(x))))


class TResNet(nn.Module):
    """Images (N, 3, H, W) in [0, 1], H and W multiples of 4 -> logits (N, num_classes)."""

    def __init__(self, arch, num_classes):
        super().__init__()
        self.arch = arch
        blocks, width, _ = ARCHITECTURES[arch]
        channels = planes = int(64 * width)
        self.body = nn.Sequential()
        self.body.add_module("SpaceToDepth", SpaceToDepth())
        self.body.add_module("conv1", ConvNorm(48, planes, 3, 1e-2))
        for stage, block in enumerate((BasicBlock, BasicBlock, Bottleneck, Bottleneck), 1):
            layer = nn.Sequential()
            for i in range(blocks[stage - 1]):
                layer.append(block(channels, planes, stride=2 if stage > 1 and i == 0 else 1, excite=stage < 4))
                channels = planes * block.expansion
            self.body.add_module(f"layer{stage}", layer)
            planes *= 2
        self.head = nn.Sequential()
        self.head.add_module("fc", nn.Linear(channels, num_classes))
        nn.init.normal_(self.head.fc.weight, 0, 0.01)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def tresnet(arch, num_classes=80):
    """A new `TResNet`: "tresnet_m", "tresnet_l" or "tresnet_xl" as published, or "tresnet_s" for scenes of 64 pixels.

    Names and shapes in its state dict are those of the ASL repository's files.
    """
    return TResNet(arch, num_classes)


def fold(network):
    """A copy for inference: normalisation folded into the convolutions, channels-last, no gradient for any weight.

    Equal logits; the gradient still flows to the images, which is what an attack needs.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, ConvNorm):
            module.fold()
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------- weights

ZOO = "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/"
PUBLISHED = {
    "tresnet_m": "MS_COCO_TRresNet_M_224_81.8.pth",
    "tresnet_l": "MS_COCO_TRresNet_L_448_86.6.pth",
    "tresnet_xl": "MS_COCO_TResNet_xl_640_88.4.pth",
}


def published(arch, data_dir):
    """The path of the published COCO weights of `arch` in `data_dir`, downloaded if absent."""
    if arch not in PUBLISHED:
        raise common.Misuse(f"there are no published weights of {arch}; name a file with --weights")
    path = Path(data_dir) / PUBLISHED[arch]
    if not path.exists():
        common.download(ZOO + path.name, path)
    return path


def inplace_abn_gammas(state):
    """The state dict of an InPlace-ABN network as that of a batch norm network: each gamma becomes |gamma| + eps.

    InPlace-ABN inverts its layer in the backward pass (Rota Bulo et al. 2018, arXiv 1712.02616), so its scale must not
    be zero: its kernels take |gamma| + eps wherever the paper has gamma, with the eps that stands beside the variance.
    """
    norms = {name.removesuffix("running_mean") + "weight" for name in state if name.endswith("running_mean")}
    return {name: x.float().abs() + NormAct.eps if name in norms else x for name, x in state.items()}


def load_asl(path, arch=None, folded=True):
    """(network, class names) of a file in the ASL repository's format: {"model" or "state_dict", "idx_to_class"}.

    `arch` None: whichever fits. `folded`: as `fold` returns it; False: with its norms, as `tresnet` does, in eval mode.
    Names are in the order of the outputs; numbers, where the file has none. Raises Failure for a file that is absent,
    damaged or hostile, and for other networks, naming the entries that differ.
    """
    advice = "name another file with --weights"
    content = common.load_weights(path, advice)
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) and not x.is_sparse for x in state.values()):
        raise common.Failure(f"{path} holds no state dict under 'model' or 'state_dict'; {advice}")
    state = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    classes = next(iter(shapes.get("head.fc.weight", ()) or (80,)))

    def differences(arch):
        with torch.device("meta"):
            expected = {name: tuple(x.shape) for name, x in tresnet(arch, classes).state_dict().items()}
        differ = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
        return [f"{name} {shapes.get(name, 'absent')}, not {expected.get(name, 'there')}" for name in differ]

    arch = arch or min(ARCHITECTURES, key=lambda arch: len(differences(arch)))
    if differ := differences(arch):
        entries = "; ".join(differ[:3]) + ("; ..." if differ[3:] else "")
        raise common.Failure(f"{path} is no {arch}: {len(differ)} of its entries differ ({entries}); {advice}")
    if not all(x.is_floating_point() and x.isfinite().all() for x in state.values()):
        raise common.Failure(f"{path} holds weights that are not finite numbers; {advice}")
    names = content.get("idx_to_class", dict(enumerate(map(str, range(classes)))))
    try:
        names = [{int(i): name for i, name in names.items()}[i] for i in range(classes)]
        if len({name for name in names if name.isprintable()}) < classes:
            raise ValueError
    except (AttributeError, TypeError, ValueError, KeyError):
        raise common.Failure(f"{path}: idx_to_class does not name each of the {classes} outputs; {advice}") from None
    network = tresnet(arch, classes)
    # our own files, marked, hold gammas that batch norm has trained, and may be negative
    network.load_state_dict(state if content.get("norm") == "batch norm" else inplace_abn_gammas(state))
    return fold(network) if folded else network.eval(), names


def label_index(name, class_names, what="labels"):
    """The place of `name` among `class_names`; raises Misuse, with the nearest names, if it is none of them."""
    if name in class_names:
        return class_names.index(name)
    near = difflib.get_close_matches(name.lower(), class_names, 3, 0.4) or class_names[:3]
    raise common.Misuse(f"{name!r} is none of the {len(class_names)} {what}; the nearest: {', '.join(near)}")


def scenes_classifier(data_dir="data", out="runs/asl_model", device="cpu", digits="auto"):
    """(network, class names) of the classifier of 64-pixel scenes: the one kept in `out`, or one trained now and kept.

    Training by the default settings takes minutes on two CPU cores, and says so; one that was stopped is gone on with.
    `digits`: what scenes are made of.
    """
    digits = common.load_digits(digits, data_dir, True, 1)[0]
    path = Path(out) / f"tresnet_s-scenes-{digits}.pth"
    if not path.exists():
        print(f"there is no {path}: the classifier of scenes is trained first, minutes on two CPU cores")
        flags = ["--train", "--dataset", "scenes", "--digits", digits, "--data", str(data_dir), "--out", str(out)]
        flags += ["--device", torch.device(device).type]
        resume = ["--resume"] if (Path(out) / "checkpoint.pt").exists() else []
        try:
            main(flags + resume)
        except common.Stopped:
            raise common.Stopped("stopped while the classifier of scenes was trained; run it again to go on") from None
        except common.Failure:
            if not resume:
                raise
            main(flags)  # what is there is another command's
    network, class_names = load_asl(path, "tresnet_s")
    return network.to(device), class_names


# ---------------------------------------------------------------------------------------------------------------- loss


class AsymmetricLoss(nn.Module):
    """ASL (Ben-Baruch et al. 2020, equation 7): logits (N, L) and targets (N, L) of 0 and 1 -> a scalar, the sum of

        -(1 - p)^gamma_pos log(p) for positives, -q^gamma_neg log(1 - q) for negatives,

    p = sigmoid(logit), q = max(p - clip, 0). `detach`: no gradient through the focal weights, as the ASL repository
    trains. In logarithms, so that no logit is too large: the repository's 1e-8 inside them ends the gradient at 18.
    """

    def __init__(self, gamma_neg=4, gamma_pos=1, clip=0.05, detach=False):
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.clip, self.detach = gamma_neg, gamma_pos, clip, detach

    def forward(self, logits, targets):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = targets.to(logits)
        log_p, log_1_p = F.logsigmoid(logits), F.logsigmoid(-logits)
        # log(1 - q) = log(min(1 - p + clip, 1))
        log_1_q = torch.logaddexp(log_1_p, log_1_p.new_tensor(self.clip).log()).clamp(max=0)
        # above zero, where a power below 1 has no gradient
        weight_p, weight_q = (-torch.expm1(x).clamp(max=-1e-30) for x in (log_p, log_1_q))
        weight_p, weight_q = weight_p**self.gamma_pos, weight_q**self.gamma_neg
        if self.detach:
            weight_p, weight_q = weight_p.detach(), weight_q.detach()
        return -(targets * weight_p * log_p + (1 - targets) * weight_q * log_1_q).sum()


# ----------------------------------------------------------------------------------------------------------- measuring


def average_precision(probabilities, labels):
    """Per class, the mean over its positives of the precision at their rank; 0 for a class without any.

    NumPy arrays (N, L) -> (L,), as the ASL repository has it; mAP is the mean.
    """
    order = np.argsort(-probabilities, axis=0, kind="stable")
    hits = np.take_along_axis(labels, order, 0) > 0
    precision = hits.cumsum(0) / np.arange(1, len(labels) + 1)[:, None]
    return (precision * hits).sum(0) / np.maximum(hits.sum(0), 1)


def measure(probabilities, labels, threshold):
    """The report's numbers, from NumPy arrays (N, L): mAP, and precision, recall and F1 as the ASL repository has them.

    CP, CR, CF1 are means over classes (so CF1 is not that of CP and CR), OP, OR, OF1 over all labels. A class that no
    image has counts as 0 in each mean; `mAP_present` leaves it out.
    """
    said, true, aps = probabilities > threshold, labels > 0, average_precision(probabilities, labels)
    right, present = said & true, true.any(0)
    precision, recall, f1 = (
        right.sum(0) / np.maximum(n, 1) for n in (said.sum(0), true.sum(0), (said.sum(0) + true.sum(0)) / 2)
    )
    numbers = {"n": len(labels), "classes_present": int(present.sum()), "mAP": float(aps.mean())}
    numbers |= {"mAP_present": float(aps[present].mean()) if present.any() else 0.0}
    numbers |= {name: float(x.mean()) for name, x in (("CP", precision), ("CR", recall), ("CF1", f1))}
    hits = int(right.sum())
    numbers |= {name: common.wilson(hits, int(x.sum())) for name, x in (("OP", said), ("OR", true)) if x.any()}
    numbers["OF1"] = float(2 * hits / max(said.sum() + true.sum(), 1))
    return numbers | {"exact": common.wilson(int((said == true).all(1).sum()), len(labels))}


def load_data(args, split, names=None, limit=None):
    """(images, labels, class names, what they are); the labels in the order of `names`, if given.

    Of COCO only the photos with a label, as in ASL.
    """
    if args.dataset == "scenes":
        of, *digits = common.scene_digits(args.digits, args.data, split)
        images, labels = common.compose_scenes(*digits, limit or 2000, args.image_size, args.seed)
        known, what = list("0123456789"), f"scenes of {of}'s {split} digits"
    else:
        images, labels, known = common.load_coco(args.data, args.image_size, limit, split)
        kept = labels.any(1).nonzero()[:, 0]
        if not len(kept):
            raise common.Failure(f"none of the {len(images)} photos of {split} has a label; raise --limit")
        images, labels = common.Photos([images.paths[i] for i in kept], args.image_size), labels[kept]
        what = f"labelled photos of COCO {split}"
    if names == [str(i) for i in range(len(known))] != known:
        print(f"the weights do not name their outputs; they are taken to be {args.dataset}'s labels, in its order")
        names = known
    names = names or known
    if sorted(names) != sorted(known):
        odd = [name for name in names if name not in known] or [name for name in known if name not in names]
        raise common.Misuse(f"the labels of the weights are not {args.dataset}'s: {', '.join(odd[:3])} only one has")
    return images, labels[:, [known.index(name) for name in names]], names, what


@torch.inference_mode()
def predict(network, images, device, batch=32):
    """The probabilities (N, L), float32 in NumPy, that `network` gives each label of images (N, 3, S, S)."""
    loader = DataLoader(images, batch, num_workers=workers(images, device), pin_memory=device.type == "cuda")
    loader = tqdm(loader, "measuring", unit="batch", disable=None, leave=False)
    return np.concatenate([network(x.to(device)).sigmoid().float().cpu().numpy() for x in loader])


def workers(images, device):
    """Processes that decode photos ahead: what keeps a GPU busy; one beside a CPU's own work. None for tensors."""
    if isinstance(images, torch.Tensor):
        return 0
    return min(16, os.cpu_count()) if device.type == "cuda" else 1


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """A network in training, its average, Adam and the position of the run: what a checkpoint holds."""

    parts = ("network", "average", "adam")

    def __init__(self, args, device, network, total, dataset):
        self.args, self.device, self.total, self.steps, self.seconds, self.best = args, device, total, 0, 0.0, -1.0
        self.network = network.train().to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.adam = torch.optim.Adam(network.parameters(), args.lr, fused=device.type != "mps")
        self.loss = AsymmetricLoss(args.gamma_neg, args.gamma_pos, args.clip)
        self.file = args.out / f"{args.arch}-{dataset}.pth"
        kept = ("arch", "image_size", "epochs", "batch_size", "lr", "gamma_neg", "gamma_pos", "clip", "average", "seed")
        self.shape = {name: getattr(args, name) for name in kept}
        self.shape |= {"dataset": dataset, "steps": total, "bf16": common.has_bf16(device)}

    def step(self, images, labels):
        """One step on images (N, 3, S, S) and labels (N, L); returns the loss per image, a tensor."""
        share = (self.steps + 1) / (self.total + 1)
        # one cycle (Smith & Topin 2018): up for a fifth of the run, then down to 0, along cosines
        rise = min(share / 0.2, (1 - share) / 0.8)
        self.adam.param_groups[0]["lr"] = self.args.lr * (0.5 - 0.5 * math.cos(math.pi * rise))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.shape["bf16"]):
            logits = self.network(images)
        loss = self.loss(logits, labels)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.steps += 1
        keep = min(self.args.average, 1 - 8 / (self.steps + 8))  # short at first, or it would go on showing the noise
        average, network = (list(x.state_dict().values()) for x in (self.average, self.network))
        torch._foreach_lerp_(average, network, 1 - keep)
        return loss.detach() / len(images)

    def keep_if_best(self, mAP, names):  # noqa: N803
        """Write the averaged network in the published format, if none before was better."""
        if mAP >= self.best:  # of equals the last, whose probabilities are the surest
            self.best = mAP
            content = {"model": self.average.state_dict(), "norm": "batch norm", "num_classes": len(names)}
            content |= {"idx_to_class": dict(enumerate(names)), "mAP": mAP}
            common.save_checkpoint(self.file.with_suffix(".best"), content)

    def save(self, path):
        networks = {name: getattr(self, name).state_dict() for name in self.parts}
        position = {"steps": self.steps, "seconds": self.seconds, "best": self.best}
        common.save_checkpoint(path, {"kind": "asl_model", "shape": self.shape, **position, **networks})

    def take(self, there):
        """Take over what `save` has written."""
        for name in self.parts:
            getattr(self, name).load_state_dict(there[name])
        self.steps, self.seconds, self.best = int(there["steps"]), float(there["seconds"]), float(there["best"])


def training_batches(args, data, training):
    """The run's batches (images, labels) from where it stands, the same ones however often it was stopped.

    `data`: digits and their labels, of which each step's scenes are new ones (with --limit: each epoch's again); or
    photos and their labels, in a new order each epoch.
    """
    first, steps = args.seed * 1_000_003, range(training.steps, training.total)
    per_epoch = training.total // args.epochs
    if args.dataset == "scenes":
        for step in steps:
            seed = first + (step % per_epoch if args.limit else step)
            yield common.compose_scenes(*data, args.batch_size, args.image_size, seed)
        return
    images, labels = data

    def rows():
        for epoch, i in (divmod(step, per_epoch) for step in steps):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(first + epoch))
            yield order[i * args.batch_size :][: args.batch_size].tolist()

    on = {"num_workers": workers(images, training.device), "pin_memory": training.device.type == "cuda"}
    yield from DataLoader(StackDataset(images, labels), batch_sampler=rows(), **on)


def train(training, data, check):
    """Train to the end. Ten times on the way `check` (images, labels, names) says which network is the best, and it is
    kept; a checkpoint is written then, once a minute, and at Ctrl-C."""
    args, path, total = training.args, training.args.out / "checkpoint.pt", training.total
    began, saved, marks = time.time() - training.seconds, time.time(), {-(-total * i // 10) for i in range(1, 11)}
    images, labels, names, _ = check
    with common.ctrl_c() as stop, tqdm(total=total, initial=training.steps, unit="step", disable=None) as bar:
        for batch in training_batches(args, data, training):
            loss = training.step(*(x.to(training.device, non_blocking=True) for x in batch))
            training.seconds = time.time() - began
            bar.update()
            mark = training.steps in marks
            save = mark or stop.pressed or time.time() - saved > 60
            if save or training.steps % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3g}", best_mAP=f"{max(0, training.best):.2%}", refresh=False)
                weights = list(training.network.parameters()) if save else []
                if not all(x.isfinite().all() for x in [loss, *weights]):
                    raise common.Failure(
                        f"the loss or a weight is not a number any more at step {training.steps:,}; start anew with a "
                        "lower --lr; no such state was saved"
                    )
            if mark:
                said = predict(fold(training.average), images, training.device)
                training.keep_if_best(float(average_precision(said, labels.numpy()).mean()), names)
            if save:
                training.save(path)
                saved = time.time()
            if stop.pressed and training.steps < total:
                raise common.Stopped(f"stopped at step {training.steps:,} of {total:,}; --resume goes on from {path}")
    best = training.file.with_suffix(".best")
    if best.exists():  # if not, it was renamed by the run that this one resumes
        os.replace(best, training.file)


def run_training(args, device):
    """`--train`: the best network is written to --out and measured. Returns what results.json holds."""
    for name, value in DEFAULTS[args.dataset].items():
        if name != "arch" and getattr(args, name) is None:
            setattr(args, name, value)
    start, names = load_asl(args.weights, args.arch, folded=False) if args.weights else (None, None)
    args.arch = start.arch if start else args.arch or DEFAULTS[args.dataset]["arch"]
    args.image_size = args.image_size or ARCHITECTURES[args.arch][2]
    if args.dataset == "scenes":
        dataset, size = f"scenes-{args.digits}", args.limit or 10_000
        _, *data = common.scene_digits(args.digits, args.data, "train")
        check, test = load_data(args, "validation", names, min(1000, size)), load_data(args, "test", names)
    else:
        there = (args.data / "coco" / "annotations" / "instances_train2017.json").exists()
        dataset, split = "coco", "train2017" if there else "val2017"
        *data, names, what = load_data(args, split, names, args.limit)
        size = len(data[0])
        check = test = load_data(args, "val2017", names) if there else (*data, names, what + ", those it learnt from")
    if size < args.batch_size:
        raise common.Misuse(f"--batch-size {args.batch_size} is more than the {size} training images")
    torch.manual_seed(args.seed)
    network = start or tresnet(args.arch, len(check[2]))
    training = Training(args, device, network, args.epochs * (size // args.batch_size), dataset)
    if args.resume:
        common.load_run(args.out / "checkpoint.pt", "asl_model", training.shape, training.take)
    train(training, data, check)
    numbers = evaluate(*load_asl(training.file), test, args, device)
    print(f"trained for {training.steps:,} steps, {training.seconds:,.0f} s; {training.file} holds the best network")
    facts = {"dataset": dataset, "dataset_size": size, "device": str(device), "bf16": training.shape["bf16"]}
    return common.write_results(args, numbers | {"training_seconds": round(training.seconds, 1)}, **facts)


# -------------------------------------------------------------------------------------------------------------- report


def evaluate(network, names, data, args, device):
    """Print and return `measure`'s numbers on data (images, labels, names, what they are)."""
    images, labels, _, what = data
    begin = time.perf_counter()
    probabilities = predict(network.to(device), images, device)
    speed = len(images) / (time.perf_counter() - begin)
    numbers = measure(probabilities, labels.numpy(), args.threshold)
    print(f"{len(images):,} {what}, {speed:,.0f} a second: mAP {numbers['mAP']:.2%} over {len(names)} classes")
    if numbers["classes_present"] < len(names):
        print(f"    {numbers['mAP_present']:.2%} over the {numbers['classes_present']} classes that occur")
    print(f"    above {args.threshold}:", *(f"{name} {numbers[name]:.2%}" for name in ("CP", "CR", "CF1", "OF1")))
    rates = {"OP": "labels said are right", "OR": "labels present are said", "exact": "images have every label right"}
    for name, text in rates.items():
        if name in numbers:
            print(f"    {name} {common.percent(numbers[name])} {text}")
    return numbers | {"images": what, "images_per_second": speed}


def figure(photo, names, probabilities, threshold):
    """The photo, at most 640 pixels high, and beside it the labels with their probabilities, as bars."""
    photo = photo.copy()
    photo.thumbnail((960, 640))
    page = Image.new("RGB", (photo.width + 280, max(photo.height, 30 * len(names) + 20)), "white")
    page.paste(photo)
    ink, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (name, p) in enumerate(zip(names, probabilities, strict=True)):
        x, y = photo.width + 12, 10 + 30 * i
        ink.rectangle((x, y + 20, x + 256 * p, y + 24), "green" if p > threshold else "grey")
        ink.text((x, y), f"{name}  {p:.3f}", "black", font)
    return page


def show(network, names, args, device):
    """`--image`: print the labels present and those asked for, and draw them beside the photo."""
    asked = [label_index(name, names) for name in args.labels]
    photo = common.open_photo(args.image)
    p = predict(network.to(device), common.load_photo(args.image, args.image_size)[None], device)[0]
    shown = [i for i in np.argsort(-p) if p[i] > args.threshold or i in asked]
    if not (p > args.threshold).any():
        print(f"no label above {args.threshold}; the nearest to it is {names[p.argmax()]}, {p.max():.3f}")
    for i in shown:
        print(f"{p[i]:.3f}  {names[i]}" + ("" if p[i] > args.threshold else "  (not present)"))
    page = figure(photo, [names[i] for i in shown], [p[i] for i in shown], args.threshold)
    path = args.out / f"{args.image.stem}-labels.png"
    common.write_whole(path, lambda file: page.save(file, "png"))
    print(f"{path} shows them")
    return {"labels": {names[i]: float(p[i]) for i in shown}}


def main(argv=None):
    """Does what the flags say; returns what results.json holds."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    if args.dataset == "scenes":
        args.digits = common.load_digits(args.digits, args.data, True, 1)[0]
    if args.train:
        return run_training(args, device)
    if args.weights or args.dataset == "coco":
        network, names = load_asl(args.weights or published(args.arch or "tresnet_m", args.data), args.arch)
    else:
        network, names = scenes_classifier(args.data, args.out, device, args.digits)
    if args.arch not in (None, network.arch):
        raise common.Misuse(f"there is no {args.arch} for {args.dataset} yet; train one, and name it with --weights")
    args.image_size = args.image_size or ARCHITECTURES[network.arch][2]
    if args.image:
        numbers = show(network, names, args, device)
    else:
        data = load_data(args, "test" if args.dataset == "scenes" else "val2017", names, args.limit)
        numbers = evaluate(network, names, data, args, device)
    return common.write_results(args, numbers, dataset=args.dataset, device=str(device), arch=network.arch)


if __name__ == "__main__":
    common.run(main)
