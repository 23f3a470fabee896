"""Weeks 3 to 5: the multi-label classifier that the log attacked.

A TResNet (Ridnik et al. 2020, arXiv 2003.13630), trained with the asymmetric loss, ASL (Ben-Baruch
et al. 2020, arXiv 2009.14119). The inplace_abn that ASL pinned gave attackers a wrong gradient, a
possible cause of what the log saw: see `inplace_abn_1_0_12`.

    python asl_model.py --image photo.jpg           the labels present, by the published TResNet-M
    python asl_model.py --evaluate --dataset coco   mAP, precision and recall
    python asl_model.py --train --dataset scenes    a classifier, in minutes (coco: a TResNet-M)
    python asl_model.py --resume                    continue a training that was stopped

Writes into --out: results.json; with --train checkpoint.pt, history.csv (loss and mAP) and the best
network, <arch>-<dataset>.pth, which --weights takes.
"""

import copy
import difflib
import math
import os
import re
import runpy
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset, StackDataset
from torchvision import models, transforms
from torchvision.ops import SqueezeExcitation
from torchvision.transforms import RandAugment
from torchvision.transforms.functional import to_pil_image, to_tensor

import acwgan
import common

# blocks of the four stages, width (of 64 channels), pixels, file in ZOO
ARCHITECTURES = {
    "tresnet_s": ((2, 3, 1, 1), 0.25, 64, None),
    "tresnet_m": ((3, 4, 11, 3), 1.0, 224, "MS_COCO_TRresNet_M_224_81.8.pth"),
    "tresnet_l": ((4, 5, 18, 3), 1.2, 448, "MS_COCO_TRresNet_L_448_86.6.pth"),
    "tresnet_xl": ((4, 5, 24, 3), 1.3, 640, "MS_COCO_TResNet_xl_640_88.4.pth"),
}
ZOO = "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/"
DEFAULTS = {  # of --train; gamma_pos is ASL's, coco's as in the log
    "scenes": {"arch": "tresnet_s", "epochs": 13, "batch_size": 64, "lr": 5e-3, "gamma_pos": 1},
    "coco": {"arch": "tresnet_m", "epochs": 60, "batch_size": 16, "lr": 1e-3, "gamma_pos": 0},
}
# what a checkpoint must match to be resumed or overwritten
SHAPING = (*DEFAULTS["coco"], "dataset", "digits", "split", "limit", "image_size", "seed")
AVERAGE = 0.99  # decay per step of the averaged network [0.9997]
EPOCH = 10_000  # new scenes in every epoch
SAVE_EVERY = 60  # seconds between checkpoints
ANEW = "train anew with --force, or choose another --out"


def settings(argv=None):
    """The flags [the ASL repository's value]; --resume takes the defaults from the checkpoint."""
    out, limit = Path("runs/asl_model"), "only the first N photos, or N scenes in an epoch"
    p = common.parser(__doc__, out, "coco", tuple(DEFAULTS), "images and labels", limit, True)
    p.epilog = "\n".join(f"--train on {name} takes {x}" for name, x in DEFAULTS.items())
    add, count, positive = p.add_argument, common.count, common.positive
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--image", type=Path, metavar="FILE", help="say what is in this photo")
    mode.add_argument("--evaluate", action="store_true", help="measure on --dataset")
    mode.add_argument("--train", action="store_true", help="train on --dataset, from nothing")
    add("--weights", type=Path, metavar="FILE", help="otherwise published, or scenes' own")
    add("--arch", choices=ARCHITECTURES, help="published, or to train")
    add("--image-size", type=count(32), metavar="N", help="in pixels; otherwise the weights' own")
    add("--threshold", type=positive, default=0.5, help="a label is present above this [0.8]")
    add("--digits", choices=("auto", "mnist", "glyphs"), default="auto", help="that scenes show")
    add("--split", choices=("val2017", "train2017"), help="of coco (val2017; --train: train2017)")
    add("--epochs", type=count(1), help="passes over the images")
    add("--batch-size", type=count(2), help="images per step [128]")
    add("--lr", type=positive, help="Adam's largest step size [1e-4]")
    args = p.parse_args(argv)
    if args.resume:
        path = args.out / "checkpoint.pt"
        if not path.exists():
            p.error(f"there is no {path}; train first, or name its folder with --out")
        with common.advise(path, ANEW):
            made = common.load_checkpoint(path, "asl_model", ANEW)["settings"]
            p.set_defaults(train=True, **made)
    elif args.train:
        p.set_defaults(**DEFAULTS[args.dataset])
    args = p.parse_args(argv)
    scenes, modes = args.dataset == "scenes", (bool(args.image), args.evaluate, args.train)
    has_weights = args.train or args.weights or (args.arch != "tresnet_s" and not scenes)
    for wrong, text in (
        (modes.count(True) != 1, "one of --image, --evaluate and --train is required"),
        (args.train and args.weights, "--weights goes with --image or --evaluate"),
        (scenes and args.split, "--split goes with --dataset coco"),
        (args.arch and not has_weights, f"no weights of {args.arch} are published; use --weights"),
        (args.threshold >= 1, "--threshold must lie below 1"),
        ((args.image_size or 4) % 4, "--image-size must be a multiple of 4"),
    ):
        if wrong:
            p.error(text)
    if args.train:
        args.image_size = args.image_size or ARCHITECTURES[args.arch][2]
    if scenes:
        args.digits = common.load_digits(args.digits, args.data, True, 1)[0]
    else:
        args.split = args.split or ("train2017" if args.train else "val2017")
    return args


class NormAct(nn.Module):
    """Batch norm, then leaky ReLU of the given slope (1: none), with InPlace-ABN's parameters."""

    eps = 1e-5  # InPlace-ABN's

    def __init__(self, channels, slope):
        super().__init__()
        self.slope = slope
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
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


class BlurPool(nn.Module):
    """Blur with [1 2 1] x [1 2 1] / 16, then every second pixel (Zhang 2019, arXiv 1904.11486)."""

    def forward(self, x):
        # two means of 2x2: a depthwise convolution's backward pass is slow on a CPU
        return F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "reflect"), 2, 1), 2)


def strided(conv, stride):
    return nn.Sequential(conv, BlurPool()) if stride == 2 else conv


class Block(nn.Module):
    """A residual block: two 3x3 convolutions or, as a bottleneck, 1x1, 3x3 and 1x1."""

    def __init__(self, c_in, planes, stride, excite, bottleneck):
        super().__init__()
        c_out = 4 * planes if bottleneck else planes
        self.downsample = nn.Sequential()
        if stride == 2:
            self.downsample.append(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False))
        if stride == 2 or c_in != c_out:
            self.downsample.append(ConvNorm(c_in, c_out, 1))
        if bottleneck:
            self.conv1 = ConvNorm(c_in, planes, 1, 1e-3)
            self.conv2 = strided(ConvNorm(planes, planes, 3, 1e-3), stride)
        else:
            self.conv1 = strided(ConvNorm(c_in, planes, 3, 1e-3), stride)
            self.conv2 = ConvNorm(planes, planes, 3)
        hidden = max(planes // (2 if bottleneck else 4), 64)
        self.se = SqueezeExcitation(planes, hidden) if excite else nn.Identity()
        self.conv3 = ConvNorm(planes, c_out, 1) if bottleneck else nn.Identity()
        last = self.conv3 if bottleneck else self.conv2
        nn.init.zeros_(last[1].weight)  # at first a block hands on its input

    def forward(self, x):
        residual = self.conv3(self.se(self.conv2(self.conv1(x))))
        return (residual + self.downsample(x)).relu_()


class TResNet(nn.Module):
    """Images (N, 3, H, W) in [0, 1], H and W multiples of 4 -> logits (N, num_classes)."""

    def __init__(self, arch, num_classes=80):
        super().__init__()
        blocks, width, self.image_size, _ = ARCHITECTURES[arch]
        self.arch = arch
        channels = planes = int(64 * width)
        body = OrderedDict(conv1=ConvNorm(48, planes, 3, 1e-2))
        for stage, depth in enumerate(blocks, 1):
            layer = body[f"layer{stage}"] = nn.Sequential()
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                layer.append(Block(channels, planes, stride, stage < 4, bottleneck=stage > 2))
                channels = 4 * planes if stage > 2 else planes
            planes *= 2
        self.body = nn.Sequential(body)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(channels, num_classes)))
        nn.init.normal_(self.head.fc.weight, 0, 0.01)

    def forward(self, images):
        # the stem: 4x4 pixels become one of 48 channels, those of a pixel side by side
        x = F.pixel_unshuffle(images, 4).unflatten(1, (3, 16)).transpose(1, 2).flatten(1, 2)
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        return self.head(x.mean((2, 3)))


tresnet = TResNet  # its state dict has the names and shapes of the ASL repository's files


@torch.no_grad()
def fold(network):
    """A copy of a `TResNet`, norms folded into convolutions: equal logits, no weight's gradient."""
    device = next(network.parameters()).device
    network = copy.deepcopy(network).cpu().eval()  # in float64, which Apple's GPU lacks
    for module in network.modules():
        if isinstance(module, ConvNorm):
            conv, norm = module
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            conv.weight.copy_(conv.weight * scale[:, None, None, None])
            conv.bias = nn.Parameter((norm.bias - norm.running_mean * scale).to(norm.bias.dtype))
            module[1] = nn.Identity() if norm.slope == 1 else nn.LeakyReLU(norm.slope, inplace=True)
    return network.requires_grad_(False).to(device, memory_format=torch.channels_last)


class SkipActivations(torch.overrides.TorchFunctionMode):
    """Within, leaky ReLUs, and ReLUs of a batch norm, are the identity in backward passes."""

    relus = F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        follows_norm = function in self.relus and getattr(args[0], "is_normalised", False)
        if function is F.leaky_relu or follows_norm:
            x, value = args[0], args[0].detach()
            return function(value.clone(), **kwargs) + (x - value)  # plus zero, of gradient 1
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            # overwritten by a sum in place, as torchvision's blocks make of a norm's output
            result.is_normalised = function is F.batch_norm
        return result


def inplace_abn_1_0_12(model):
    """A copy of `model` in eval mode with its logits and the gradient of inplace_abn v1.0.12.

    The ASL repository pinned that version. Its backward pass in eval mode hands on `dy_act`, the
    gradient behind the activation, where `dy`, the one before it, is meant: the derivative of a
    leaky ReLU, here also of a ReLU that takes the very output of a batch norm, is skipped."""
    model = copy.deepcopy(model).eval()
    forward = model.forward

    def pinned(images):
        with SkipActivations():
            return forward(images)

    model.forward = pinned
    return model


def published(arch, data_dir):
    """The path of the published weights of `arch`, downloaded if absent."""
    file = ARCHITECTURES[arch][3]
    return common.download(ZOO + file, Path(data_dir) / file)


def inplace_abn_gammas(state):
    """An InPlace-ABN network's state dict as a batch norm network's: gamma becomes |gamma| + eps.

    InPlace-ABN inverts its layer in the backward pass (Rota Bulo et al. 2018, arXiv 1712.02616), so
    its scale must not be zero; the eps is the one beside the variance."""
    gammas = {name.replace("running_mean", "weight") for name in state if "running_mean" in name}
    return {k: x.float().abs() + NormAct.eps if k in gammas else x for k, x in state.items()}


def load_asl(path, arch=None, folded=True):
    """(Network, class names) of a file {"model": state dict, "idx_to_class"}, or a state dict.

    `arch` None: by the first layer's width. `folded` False: with its norms, in eval mode. Names are
    in the order of the outputs, else numbers. Raises Failure for other files.
    """
    advice = "name another file with --weights"
    content = common.load_checkpoint(path, None, advice)
    with common.advise(f"{path} is no {arch or 'TResNet'}", advice):
        state = content.get("model", content.get("state_dict", content))
        state = {k: x for k, x in state.items() if not k.endswith("num_batches_tracked")}
        classes, stem = len(state["head.fc.weight"]), len(state["body.conv1.0.weight"])
        widths = {int(64 * width): name for name, (_, width, *_) in ARCHITECTURES.items()}
        network = tresnet(arch or widths[stem], classes)
        if not all(x.is_floating_point() and x.isfinite().all() for x in state.values()):
            raise ValueError("its weights are not all finite numbers")
        # our own files' gammas, which batch norm has trained, may be negative
        own = content.get("norm") == "batch norm"
        network.load_state_dict(state if own else inplace_abn_gammas(state))
        network.image_size = content.get("settings", {}).get("image_size", network.image_size)
        names = content.get("idx_to_class", {i: str(i) for i in range(classes)})
        names = {int(i): name for i, name in names.items()}
        names = [names[i] for i in range(classes)]
        if len({name for name in names if name.isprintable()}) < classes:
            raise ValueError(f"idx_to_class must give {classes} different names")
    return fold(network) if folded else network.eval(), names


def own_network(spec):
    """(network, class names) of the user's `FILE.py:FUNCTION`; Failure otherwise."""
    path, _, function = spec.rpartition(":")
    advice = "FUNCTION() of FILE.py must return (network, class names, image size)"
    with common.advise(f"--model {spec}", advice), torch.no_grad():
        network, names, size = runpy.run_path(path)[function]()
        network, names = network.eval(), [str(name) for name in names]
        shape = tuple(network(torch.zeros(1, 3, size, size)).shape)
        if shape != (1, len(names)):
            raise ValueError(f"logits {shape} of one image for {len(names)} class names")
    network.image_size = size
    return network, names


def torchvision_network(args):
    """(network of images in [0, 1], class names, mean, std) of one of torchvision's classifiers."""
    label_index(args.model, ["asl", "digits", *models.list_models(models)])
    published = models.get_model_weights(args.model).DEFAULT
    name, path = published.url.rpartition("/")[2], args.weights
    if path:
        print(f"{path} is not the file that torchvision publishes for {args.model}")
    else:
        path = common.download(published.url, args.data / name, name.rpartition("-")[2][:8])
    network, advice = models.get_model(args.model, weights=None), "name another with --weights"
    with common.advise(f"{path} is no state dict of torchvision's {args.model}", advice):
        network.load_state_dict(common.load_checkpoint(path, None, advice))
    how = published.transforms()
    network = nn.Sequential(transforms.Normalize(how.mean, how.std), network)
    network.image_size = how.crop_size[0]
    mean, std = torch.tensor([how.mean, how.std])[..., None, None]
    return network, published.meta["categories"], mean, std


def load_imagenet(data_dir, class_names, limit=None):
    """The paths of ImageNet's photos in `data_dir`/imagenet, and their classes (N,) int64.

    The class, an index into `class_names`, is in the file's name (n01440764_tench.JPEG), or, where
    all classes have a folder (n01440764/x.JPEG), the folder's rank; -1 where neither says it.
    """
    folder, endings = Path(data_dir) / "imagenet", {".jpeg", ".jpg", ".png"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)[:limit]
    if not paths:
        raise common.Failure(f"no photo in {folder}; put some there, named n01440764_tench.JPEG")
    folders = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"n\d{8}", path.name))
    if len(folders) == len(class_names):
        return paths, torch.tensor([folders.index(path.parent.name) for path in paths])
    # two kinds of crane and of maillot share a name
    unique = [name if class_names.count(name) == 1 else None for name in class_names]
    stems = [path.stem.partition("_")[2].replace("_", " ") for path in paths]
    return paths, torch.tensor([unique.index(x) if x in unique else -1 for x in stems])


def label_index(name, names):
    """The place of `name` among `names`; Failure, with the nearest, if it is none."""
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name.lower(), names, 3, 0.4) or names[:3]
    text = f"{name[:50]!r} is none of the {len(names)} names; the nearest: {', '.join(near)}"
    raise common.Failure(text, 2)


class AsymmetricLoss(nn.Module):
    """ASL (Ben-Baruch et al. 2020, equation 7): logits (N, L), targets (N, L) 0/1 -> a scalar, the
    sum of -(1 - p)^gamma_pos log(p) for positives and -q^gamma_neg log(1 - q) for negatives; p =
    sigmoid(logit), q = max(p - clip, 0). In logarithms, so that no logit is too large."""

    def __init__(self, gamma_neg=4, gamma_pos=1, clip=0.05):
        super().__init__()
        self.gamma_neg, self.gamma_pos = gamma_neg, gamma_pos
        self.log_clip = math.log(clip) if clip else -math.inf

    def forward(self, logits, targets):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = targets.to(logits)
        log_p, log_1_p = F.logsigmoid(logits), F.logsigmoid(-logits)
        # log(1 - q) = log(min(1 - p + clip, 1))
        log_1_q = torch.logaddexp(log_1_p, torch.full_like(log_1_p, self.log_clip)).clamp(max=0)
        # 1 - p and q, above zero, where a power below 1 has no gradient
        not_p, q = (-torch.expm1(x).clamp(max=-1e-30) for x in (log_p, log_1_q))
        positive = targets * not_p**self.gamma_pos * log_p
        return -(positive + (1 - targets) * q**self.gamma_neg * log_1_q).sum()


class Augmented(Dataset):
    """`photos`, items (3, S, S) float32 in [0, 1], through Cutout (arXiv 1708.04552), then
    RandAugment, as the log trained; the i-th is the same for a `seed`."""

    def __init__(self, photos, seed):
        self.photos, self.seed, self.rand_augment = photos, seed, RandAugment()

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, i):
        image = to_pil_image((self.photos[i] * 255).round().byte())
        side = image.width // 2  # of the square that is cut out
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + i)  # of RandAugment, too
            left, top = (torch.randint(image.width, (2,)) - side // 2).tolist()
            colour = tuple(torch.randint(256, (3,)).tolist())
            ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), colour)
            return to_tensor(self.rand_augment(image))


def load_data(dataset, data_dir, image_size, split, names=None, limit=None, digits="auto", seed=0):
    """(Images, labels, class names, what they are): tensor (N, 3, S, S) or `common.Photos`; (N, L)
    float32 0/1, in the order of `names`, if given. `split`: of scenes train, validation or test; of
    COCO val2017 or train2017, photos with a label, as in ASL. Failure if `names` differ."""
    if dataset == "scenes":
        where = digits, data_dir, split
        images, labels = common.load_scenes(limit or 2000, image_size, seed, *where)
        what = f"scenes of {common.scene_digits(*where)[0]}'s {split} digits"
        known = list("0123456789")
    else:
        photos, labels, known = common.load_coco(data_dir, image_size, limit, split)
        rows = labels.any(1).nonzero()[:, 0].tolist()
        if not rows:
            raise common.Failure(f"no photo of {split} has a label; raise --limit", 2)
        images, labels = common.Photos([photos.paths[i] for i in rows], image_size), labels[rows]
        what = f"labelled photos of COCO {split}"
    names = names or known
    if set(names) != set(known):
        lacks = ", ".join(sorted(set(names) ^ set(known))[:3])[:99]
        raise common.Failure(f"labels of {dataset} and the network: one of them lacks {lacks}", 2)
    return images, labels[:, [known.index(name) for name in names]], names, what


def workers(images, device):
    """Processes that decode photos ahead: enough for a GPU, or one beside a CPU's work."""
    if isinstance(images, torch.Tensor):
        return 0
    return min(16, os.cpu_count()) if device.type == "cuda" else 1


def training_batches(args, data, steps, total, device):
    """Batches (images, labels) from step `steps` to `total`, the same after a resume: photos, in a
    new order in each epoch, or new scenes."""
    seed, per_epoch = args.seed * 1_000_003, total // args.epochs
    if args.dataset == "scenes":
        for step in range(steps, total):
            number = step % per_epoch if args.limit else step  # --limit: the same in each epoch
            how = args.image_size, seed + number, args.digits, args.data
            yield common.load_scenes(args.batch_size, *how)
        return
    photos, labels = data
    first_epoch, done = divmod(steps, per_epoch)
    for epoch in range(first_epoch, args.epochs):
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed + epoch))
        rows = [batch.tolist() for batch in order.split(args.batch_size)[done:per_epoch]]
        images, count = Augmented(photos, seed + epoch), workers(photos, device)
        pairs = StackDataset(images, labels)
        yield from DataLoader(pairs, batch_sampler=rows, num_workers=count)
        done = 0


def weights_path(args):
    """Where `train` writes the best network."""
    digits = f"-{args.digits}" if args.dataset == "scenes" else ""
    return args.out / f"{args.arch}-{args.dataset}{digits}.pth"


def train(args, device):
    """Train; write checkpoint.pt, history.csv and the network of the best mAP, at ten marks.
    Returns facts for the record. Failure if --out holds another training."""
    path, shaping = args.out / "checkpoint.pt", {name: getattr(args, name) for name in SHAPING}
    checkpoint = acwgan.starting_point(path, "asl_model", shaping, args)
    kept, place = shaping | {"data": str(args.data)}, (args.dataset, args.data, args.image_size)
    if args.dataset == "scenes":
        data, size = None, args.limit or EPOCH
        check = "validation", None, min(1000, size), args.digits, args.seed
    else:
        data = load_data(*place, args.split, limit=args.limit)[:2]
        size, check = len(data[0]), ("val2017", None, args.limit)
    if size < args.batch_size:
        raise common.Failure(f"--batch-size {args.batch_size}: there are only {size} images", 2)
    check_images, check_labels, names, what = load_data(*place, *check)
    torch.manual_seed(args.seed)
    network = tresnet(args.arch, len(names)).train().to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    adam = torch.optim.Adam(network.parameters(), args.lr, fused=True)
    asl, bf16 = AsymmetricLoss(4, args.gamma_pos), common.has_bf16(device)
    parts = {"network": network, "average": average, "adam": adam}
    weights, averages = (list(x.state_dict().values()) for x in (network, average))
    done = {"steps": 0, "seconds": 0.0, "history": [], "best": None, "best_mAP": -1.0}
    if checkpoint:
        with common.advise(path, ANEW):
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            done = {name: checkpoint[name] for name in done}
    total = args.epochs * (size // args.batch_size)
    marks = {math.ceil(total * i / 10) for i in range(1, 11)}
    start, saved = time.time() - done["seconds"], time.time()
    batches = training_batches(args, data, done["steps"], total, device)
    bar = common.progress(batches, "training", total, initial=done["steps"])
    for step, (images, labels) in enumerate(bar, done["steps"] + 1):
        # one cycle (Smith & Topin 2018): up for a fifth of the run, then down, along cosines
        position = step / (total + 1)
        rise = min(position / 0.2, (1 - position) / 0.8)
        adam.param_groups[0]["lr"] = args.lr * (0.5 - 0.5 * math.cos(math.pi * rise))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(images.to(device))
        loss = asl(logits, labels.to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay = min(AVERAGE, 1 - 8 / (step + 8))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item() / len(images):.3g}", refresh=False)
        if step not in marks and time.time() - saved < SAVE_EVERY:
            continue
        if not all(x.isfinite().all() for x in [loss, *network.parameters()]):
            raise common.Failure(f"no finite loss or weight at step {step:,}; try a lower --lr")
        done |= {"steps": step, "seconds": time.time() - start}
        if step in marks:
            probabilities = predict(fold(average), check_images, device)
            mean_ap = float(average_precision(probabilities, check_labels.numpy()).mean())
            row = {"step": step, "seconds": round(done["seconds"], 1)}
            done["history"].append(row | {"loss": loss.item() / len(images), "mAP": mean_ap})
            if mean_ap >= done["best_mAP"]:  # of equals, the last
                done |= {"best": copy.deepcopy(average.state_dict()), "best_mAP": mean_ap}
        state = {name: part.state_dict() for name, part in parts.items()}
        common.save_checkpoint(path, {"kind": "asl_model", "settings": kept, **state, **done})
        saved = time.time()
    content = {"model": done["best"], "norm": "batch norm", "mAP": done["best_mAP"]}
    content |= {"num_classes": len(names), "idx_to_class": dict(enumerate(names))}
    common.save_checkpoint(weights_path(args), content | {"settings": kept})
    acwgan.write_history(args.out / "history.csv", done["history"])
    print(f"{weights_path(args)}: mAP {done['best_mAP']:.2%} on {len(check_images):,} {what}")
    facts = {"dataset_size": size, "bf16": bf16, "steps": total, "best_mAP": done["best_mAP"]}
    return facts | {"best_mAP_on": what, "training_seconds": done["seconds"]}


def scenes_classifier(data_dir, out="runs/scenes_classifier", device="cpu", digits="auto", seed=0):
    """(Network, class names, path) of the classifier of scenes in `out`, trained, or resumed, where
    there is none. Failure for one of other settings."""
    flags = ["--train", "--dataset", "scenes", "--digits", digits, "--data", str(data_dir)]
    args = settings([*flags, "--out", str(out), "--seed", str(seed)])
    args.resume = True  # which settings() refuses without a checkpoint
    path, shaping = weights_path(args), {name: getattr(args, name) for name in SHAPING}
    if not path.exists():
        print(f"training the classifier of scenes, {path}: minutes on two CPU cores")
        common.make_folder(args.out)
        train(args, torch.device(device))
    acwgan.starting_point(path, None, shaping, args, "delete it, and it is trained anew")
    network, names = load_asl(path, args.arch)
    return network.to(device), names, path


@torch.inference_mode()
def predict(network, images, device, batch=32):
    """The probabilities (N, L), float32 in NumPy, of images (N, 3, S, S)."""
    loader = DataLoader(images, batch, num_workers=workers(images, device))
    rows, found = torch.arange(len(images)), torch.empty(len(images), network.head.fc.out_features)
    for i, x in zip(rows.split(batch), common.progress(loader, "measuring"), strict=True):
        found[i] = network(x.to(device)).sigmoid().cpu()
    return found.numpy()


def average_precision(probabilities, labels):
    """NumPy arrays (N, L) -> the AP of each class that an image shows (ASL counts the others 0)."""
    probabilities, labels = (x[:, labels.any(0)] for x in (probabilities, labels))
    order = np.argsort(-probabilities, axis=0, kind="stable")
    hits = np.take_along_axis(labels, order, 0) > 0
    precision = hits.cumsum(0) / np.arange(1, len(labels) + 1)[:, None]
    return (precision * hits).sum(0) / hits.sum(0)


def measure(probabilities, labels, threshold):
    """The report's numbers, of NumPy arrays (N, L). OP, OR: of all labels predicted, or present,
    those right."""
    predicted, actual = probabilities > threshold, labels > 0
    ap, right = average_precision(probabilities, labels), predicted & actual
    return {
        "n": len(labels),
        "classes_present": len(ap),
        "mAP": float(ap.mean()),
        "OP": common.wilson(right.sum(), predicted.sum()),
        "OR": common.wilson(right.sum(), actual.sum()),
        "exact": common.wilson((predicted == actual).all(1).sum(), len(labels)),
    }


def main(argv=None):
    """Do what the flags say; returns what results.json holds, numbers under each split's name."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    facts, numbers = {"dataset": args.dataset, "device": str(device)}, {}
    splits = [args.split or "test"]
    if args.train:
        facts |= train(args, device)
        path = weights_path(args)
        if args.split == "train2017":
            splits = ["val2017", "train2017"]
    elif args.weights or args.dataset == "coco":
        path = args.weights or published(args.arch or "tresnet_m", args.data)
    else:
        path = scenes_classifier(args.data, device=device, digits=args.digits)[-1]
    network, names = load_asl(path, args.arch)
    facts |= {"weights": str(path), "arch": network.arch}
    network, size = network.to(device), args.image_size or network.image_size
    if args.image:
        p = predict(network, common.Photos([args.image], size)[:], device)[0]
        order = np.argsort(-p)
        numbers["labels"] = {names[i]: float(p[i]) for i in order if p[i] > args.threshold}
        for i in order[: len(numbers["labels"]) + 3]:
            print(f"{p[i]:.3f}  {names[i]}", "" if p[i] > args.threshold else "(not present)")
        return common.write_results(args, numbers, **facts)
    for split in splits:
        how = size, split, names, args.limit, args.digits, args.seed
        images, labels, _, what = load_data(args.dataset, args.data, *how)
        found = measure(predict(network, images, device), labels.numpy(), args.threshold)
        lines = ((k, f"{x:.2%}" if isinstance(x, float) else x) for k, x in found.items())
        common.print_table((what, ""), lines)
        numbers[split] = found | {"images": what}
    return common.write_results(args, numbers, **facts)


if __name__ == "__main__":
    common.run(main)
