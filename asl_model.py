"""Weeks 3 to 5: the multi-label classifier that the log attacked.

A TResNet (Ridnik et al. 2020, arXiv 2003.13630), trained with the asymmetric loss, ASL (Ben-Baruch
et al. 2020, arXiv 2009.14119). ASL's repository pinned a version of the package inplace_abn that
gives attackers a wrong gradient: see `InplaceABN1012`.

    python asl_model.py --image photo.jpg           print the labels of a photo
    python asl_model.py --evaluate --dataset coco   measure mAP, precision (OP) and recall (OR)
    python asl_model.py --train --arch resnet18 --limit 40000
                                                    train on COCO; downloads 7 GB of photos
    python asl_model.py --train --dataset scenes    train on scenes of digits; minutes
    python asl_model.py --resume                    continue an interrupted training run

Writes results.json into --out (next to a training: into --out/evaluation); --train also
checkpoint.pt and <arch>-<dataset>.pth, the best network on held-out images.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn import init
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import Adam
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.ops import SqueezeExcitation
from torchvision.transforms import RandAugment
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor

import common
from common import Failure, Photos, number, positive_int, wilson


class Architecture(NamedTuple):
    image_size: int  # in pixels; this and the next three are defaults
    epochs: int
    batch_size: int
    lr: float
    features: int  # inputs of the last layer
    blocks: tuple = ()  # in TResNet's four stages; torchvision's ResNets have none


ARCHITECTURES = {
    "tresnet_s": Architecture(64, 13, 64, 5e-3, 512, (2, 3, 1, 1)),
    "tresnet_m": Architecture(224, 60, 16, 1e-3, 2048, (3, 4, 11, 3)),
    "tresnet_l": Architecture(448, 60, 16, 1e-3, 2432, (4, 5, 18, 3)),
    "tresnet_xl": Architecture(640, 60, 16, 1e-3, 2656, (4, 5, 24, 3)),
    "resnet18": Architecture(128, 2, 64, 1e-4, 512),
    "resnet50": Architecture(128, 2, 64, 1e-4, 2048),
}
ZOO = "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ASL/"
OUT = Path("runs/asl_model")
DEFAULT_ARCH = {"coco": "tresnet_m", "scenes": "tresnet_s"}  # of --train
GAMMA_POS = {"coco": 0, "scenes": 1}  # of ASL: as in the log; ASL's default
HELD_OUT_EVERY = 20  # photos of train2017, which select the best network
SCENES = {"train": 10_000, "validation": 1000, "test": 2000}
AVERAGE = 0.99  # decay per step of the averaged weights; ASL's code has 0.9997
HEAD_LR_FACTOR = 10  # times --lr, while only the last layer is trained
EVALUATIONS = 5  # per training run
SAVE_EVERY = 200  # steps
# what a training run and its record depend on
MUST_MATCH = (
    "dataset",
    "arch",
    "image_size",
    "epochs",
    "batch_size",
    "lr",
    "limit",
    "seed",
    "weights",
    "threshold",
)
COCO_DETECTOR = models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT


def parse_args(argv=None):
    """The flags, with all defaults resolved; --resume takes them from the checkpoint in --out."""
    p = common.parser(
        "asl_model.py",
        __doc__,
        OUT,
        ("coco", "scenes"),
        "images with labels",
        "use only the first N photos, or N scenes, of each split; default: all",
    )
    p.epilog = """defaults that depend on the network and the data:
  tresnet_m, l, xl    --image-size 224, 448, 640 --epochs 60 --batch-size 16 --lr 1e-3
  tresnet_s           --image-size 64 --epochs 13 --batch-size 64 --lr 5e-3
  resnet18, resnet50  --image-size 128 --epochs 2 --batch-size 64 --lr 1e-4
  --train             --arch tresnet_m (scenes: tresnet_s); a resnet from ImageNet's weights
  else                the newest weights in runs/asl_model, or the published ones; at their size
a new last layer is first trained alone for one epoch, at 10 times the learning rate"""
    add = p.add_argument
    add("--image", metavar="FILE", help="print the labels of this photo")
    add("--evaluate", action="store_true", help="measure a network on --dataset")
    add("--train", action="store_true", help="train a network on --dataset")
    add("--resume", action="store_true", help="continue the training in --out")
    add("--arch", choices=ARCHITECTURES, help="default: the one of --weights")
    add("--weights", metavar="FILE", help="checkpoint to use, or to start --train from")
    add("--image-size", type=number(int, 32, 1024), metavar="N", help="pixels")
    add(
        "--threshold",
        type=number(float, 1e-6, 0.999999),
        default=0.5,
        help="probability above which a label is present; ASL's code has 0.8",
    )
    add("--split", choices=("val2017", "train2017"), help="of coco; default: val2017")
    add("--epochs", type=positive_int, help="passes of --train over the images")
    add(
        "--batch-size",
        type=number(int, 2),
        default=32,
        help="images at once; --train: below",
    )
    add("--lr", type=number(float, 1e-12), help="Adam's peak learning rate")
    args = p.parse_args(argv)
    for path in (args.image, args.weights):  # before anything is downloaded
        if path and not Path(path).is_file():
            p.error(f"there is no file {path}")
    if args.resume:
        path = args.out / "checkpoint.pt"
        if args.force or not path.is_file():
            p.error(f"--resume needs {path}, and no --force")
        checkpoint = common.load_checkpoint(path, "delete it to train anew", "asl_model")
        p.set_defaults(train=True, **checkpoint["settings"])
    elif args.train:
        arch = args.arch or DEFAULT_ARCH[args.dataset]
        if args.weights and not args.arch:
            content = common.load_checkpoint(args.weights, "use other --weights")
            arch = architecture_of(state_dict_of(content, args.weights)) or arch
        row = ARCHITECTURES[arch]
        p.set_defaults(
            arch=arch,
            image_size=row.image_size,
            epochs=row.epochs,
            batch_size=row.batch_size,
            lr=row.lr,
        )
    args = p.parse_args(argv)
    if [bool(args.image), args.evaluate, args.train].count(True) != 1:
        p.error("one of --image, --evaluate, --train and --resume is required")
    if args.arch and not (args.train or args.weights):
        p.error("--arch goes with --train or --weights")
    if (args.epochs or args.lr) and not args.train:
        p.error("--epochs and --lr go with --train")
    if args.split and (args.dataset == "scenes" or args.train):
        p.error("--split goes with --evaluate --dataset coco")
    if args.image_size and args.image_size % 4:
        p.error("--image-size must be a multiple of 4")
    if not args.train and (args.out / "checkpoint.pt").exists():
        args.out = args.out / "evaluation"  # the record of the training stays
    return args


# --- networks


class NormAct(nn.BatchNorm2d):
    """Batch norm, then leaky ReLU of the given slope (1: none), with InPlace-ABN's parameters."""

    def __init__(self, channels, slope):
        super().__init__(channels)
        self.slope = slope
        # InPlace-ABN's state dicts have no num_batches_tracked, which load_state_dict would
        # add if this were True; `forward` uses the running statistics all the same
        self.num_batches_tracked = None
        self.track_running_stats = False

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return x if self.slope == 1 else F.leaky_relu(x, self.slope, inplace=True)


class ConvNorm(nn.Sequential):
    """A convolution and its `NormAct`, which `fold` merges."""

    def __init__(self, c_in, c_out, kernel, slope=1.0):
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        init.kaiming_normal_(conv.weight, mode="fan_out")
        super().__init__(conv, NormAct(c_out, slope))


class Block(nn.Module):
    """A residual block: two 3x3 convolutions or, as a bottleneck, 1x1, 3x3 and 1x1."""

    def __init__(self, c_in, c_out, stride, use_se, bottleneck):
        super().__init__()
        planes = c_out // 4 if bottleneck else c_out
        self.downsample = nn.Sequential()
        if stride == 2:
            self.downsample.append(
                nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
            )
        if c_in != c_out:
            self.downsample.append(ConvNorm(c_in, c_out, 1))
        kernel = 1 if bottleneck else 3
        self.conv1 = ConvNorm(c_in, planes, kernel, 1e-3)
        self.conv2 = ConvNorm(planes, planes, 3, 1e-3 if bottleneck else 1.0)
        self.conv3 = ConvNorm(planes, c_out, 1) if bottleneck else nn.Identity()
        last = self.conv3 if bottleneck else self.conv2
        init.zeros_(last[1].weight)  # a block starts as the identity
        self.se = nn.Identity()
        if use_se:
            self.se = SqueezeExcitation(planes, max(c_out // 8, 64))
        # blur by [1 2 1] x [1 2 1] / 16, the edge reflected (Zhang 2019, arXiv 1904.11486); torch's
        # own reflection is not deterministic on CUDA
        edge = nn.AvgPool2d(2, padding=1, count_include_pad=False)
        if stride == 2 and bottleneck:
            self.conv2 = nn.Sequential(self.conv2, nn.AvgPool2d(2, 1), edge)
        elif stride == 2:
            self.conv1 = nn.Sequential(self.conv1, nn.AvgPool2d(2, 1), edge)

    def forward(self, x):
        residual = self.conv2(self.conv1(x))
        residual = self.conv3(self.se(residual))
        return (residual + self.downsample(x)).relu_()


class TResNet(nn.Module):
    """Images (N, 3, H, W) in [0, 1], H and W multiples of 4 -> logits (N, num_classes)."""

    def __init__(self, arch, num_classes=80):
        super().__init__()
        row = ARCHITECTURES[arch]
        c_in = width = row.features // 32  # channels of the first stage
        self.body = nn.Sequential()
        self.body.add_module("conv1", ConvNorm(48, c_in, 3, 1e-2))
        for stage, wider in enumerate((1, 2, 16, 32)):
            c_out = wider * width
            layer = nn.Sequential()
            for i in range(row.blocks[stage]):
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(Block(c_in, c_out, stride, stage < 3, stage > 1))
                c_in = c_out
            self.body.add_module(f"layer{stage + 1}", layer)
        self.head = nn.Sequential()
        self.head.add_module("fc", nn.Linear(row.features, num_classes))
        init.normal_(self.head.fc.weight, 0, 0.01)

    def forward(self, images):
        # the stem: 4x4 pixels become one position of 48 channels, a pixel's three side by side
        x = F.pixel_unshuffle(images, 4).unflatten(1, (3, 16))
        x = x.transpose(1, 2).flatten(1, 2)
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        return self.head(x.mean((2, 3)))


def normalise(_, inputs):
    """Scale images by ImageNet's mean and deviation, as torchvision's weights expect."""
    images = normalize(inputs[0], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return images.contiguous(memory_format=torch.channels_last)


def new_network(arch, num_classes):
    """A network of random weights: images (N, 3, H, W) in [0, 1] -> logits (N, num_classes)."""
    row = ARCHITECTURES[arch]
    if row.blocks:
        network = TResNet(arch, num_classes)
    else:
        network = models.get_model(arch, num_classes=num_classes)
        network.register_forward_pre_hook(normalise)
    network.image_size = row.image_size
    return network


@torch.no_grad()
def fold(network):
    """A frozen copy in eval mode, a TResNet's norms folded into its convolutions: equal logits."""
    network = deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, ConvNorm):
            conv, norm = module
            module[0] = fuse_conv_bn_eval(conv, norm)
            module[1] = nn.Identity()
            if norm.slope != 1:
                module[1] = nn.LeakyReLU(norm.slope, inplace=True)
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last)


# --- the gradient of inplace_abn v1.0.12


class StraightThrough(Function):
    """An activation, in place or not, whose backward pass passes the gradient on unchanged."""

    @staticmethod
    def forward(ctx, x, function, args, kwargs):
        result = function(*args, **kwargs)
        if result is x:
            ctx.mark_dirty(x)
        return result

    @staticmethod
    def backward(ctx, gradient):
        # the fault of v1.0.12, rebuilt on purpose: the activation's derivative is missing
        return gradient, None, None, None


def mark_normalised(_module, _inputs, output):
    """Mark a batch norm's output at its current version, which in-place operations raise."""
    if not output.is_inference():
        output.normalised_version = output._version
    return output


class SkipDerivatives(TorchFunctionMode):
    """In this mode, the `first` activations (None: all) skip their derivative in the backward pass.

    Those that InPlace-ABN could have replaced count: leaky ReLU, ELU, and ReLU after a batch norm.
    """

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.skipped = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").removesuffix("_")
        if name == "batch_norm":
            return mark_normalised(None, None, function(*args, **kwargs))
        if name in ("relu", "leaky_relu", "elu") and self.skipped != self.first:
            x = args[0] if args else kwargs["input"]
            if name != "relu" or getattr(x, "normalised_version", None) == x._version:
                self.skipped += 1
                return StraightThrough.apply(x, function, args, kwargs)
        return function(*args, **kwargs)


class InplaceABN1012(nn.Module):
    """A copy of `model` in eval mode with the gradient of inplace_abn v1.0.12.

    The ASL repository pinned that version. In eval mode its backward pass uses `dy_act`, the
    gradient at the activation's output, instead of `dy`, the one at its input. Here the first
    `first` activations (None: all) that InPlace-ABN could have replaced do so; `skipped` counts
    them in the last forward pass. Raises Failure if the first batch's logits change, or if the
    network is scripted or can't be copied.
    """

    def __init__(self, model, first=None):
        super().__init__()
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise Failure(
                "a scripted or traced network hides its activations; "
                "pass the network that it was made from",
                2,
            )
        try:
            self.network = deepcopy(model).eval()
        except (TypeError, RuntimeError) as problem:
            raise Failure(
                f"the network cannot be copied, so use its right gradient: {problem}", 2
            ) from None
        for module in self.network.modules():
            # it multiplies and adds, without F.batch_norm
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.register_forward_hook(mark_normalised)
        self.first = first
        self.skipped = None  # it has not run yet

    def forward(self, images):
        if torch.is_inference_mode_enabled():  # there is no gradient to imitate
            return self.network(images)
        with SkipDerivatives(self.first) as mode:
            logits = self.network(images.clone())
        if self.skipped is None:
            right = self.network(images.clone())
            if not torch.allclose(logits, right, 1e-4, 1e-4):
                raise Failure(
                    "inplace_abn v1.0.12 cannot be imitated for this network: its logits change"
                )
        self.skipped = mode.skipped
        return logits


tresnet = TResNet  # its state dict has the names and shapes of the ASL repository's
inplace_abn_1_0_12 = InplaceABN1012


def published_weights(name, data_dir):
    """The path of torchvision's published weights of its network `name`, downloaded if absent."""
    return common.download(models.get_model_weights(name).DEFAULT.url, data_dir)


def default_weights(dataset, data_dir, device):
    """The path of the newest network that --train left in OUT; failing that, of the classifier of
    scenes, trained first if absent, or of the published COCO network. Raises Failure if there is
    none."""
    newest = max(OUT.glob(f"*-{dataset}.pth"), key=os.path.getmtime, default=None)
    if newest:
        return newest
    if dataset == "scenes":
        return scenes_weights(data_dir, device)
    try:
        return common.download(ZOO + "MS_COCO_TRresNet_M_224_81.8.pth", data_dir)
    except Failure as problem:
        raise Failure(
            "there is no COCO classifier here; train one (7 GB, 35 minutes on two cores): python "
            f"asl_model.py --train --dataset coco --arch resnet18 --limit 40000 ({problem})"
        ) from None


def state_dict_of(content, path):
    """The state dict in the checkpoint of `path`, wrapped or not; raises Failure for others."""
    for key in ("model", "state_dict", "average"):  # the last: of an unfinished --train
        if isinstance(content.get(key), dict):
            content = content[key]
    state = {}
    for name, x in content.items():
        if not isinstance(x, torch.Tensor):
            raise Failure(f"{path}: {name} is not a tensor; use other --weights")
        state[str(name).removeprefix("module.")] = x
    return state


def inplace_abn_gammas(state):
    """Replace gamma by |gamma| + eps, as InPlace-ABN does (Rota Bulo et al., arXiv 1712.02616)."""
    converted = dict(state)
    for name in state:
        if name.endswith("running_mean"):
            gamma = name.replace("running_mean", "weight")
            converted[gamma] = state[gamma].float().abs() + 1e-5
    return converted


def architecture_of(state):
    """The name of the architecture whose last layer a state dict has, or None."""
    for name, row in ARCHITECTURES.items():
        layer = state.get("head.fc.weight" if row.blocks else "fc.weight")
        if layer is not None and layer.shape[1:] == (row.features,):
            return name
    return None


def load_asl(path, arch=None, folded=True):
    """(Network in eval mode, class names in the order of its outputs) of a checkpoint.

    Takes ASL's published files {"model", "num_classes", "idx_to_class"}, those of ASL's training
    {"state_dict", ...} and of --train, torchvision's ResNets, and bare state dicts. `arch` None:
    the one that fits. `folded` True: frozen, a TResNet's norms folded. Raises Failure for others.
    """
    content = common.load_checkpoint(path, "use other --weights")
    state = state_dict_of(content, path)
    is_tresnet = "head.fc.weight" in state
    try:
        n = len(state["head.fc.weight" if is_tresnet else "fc.weight"])
        arch = arch or architecture_of(state)
        network = new_network(arch, n)
        if is_tresnet:
            state = {k: x for k, x in state.items() if "num_batches_tracked" not in k}
            # the gammas of our own files, which batch norm has trained, may be negative
            if content.get("norm") != "batch norm":
                state = inplace_abn_gammas(state)
        network.load_state_dict(state)
        names = [str(i) for i in range(n)]
        if content.get("idx_to_class"):
            table = {int(i): name for i, name in content["idx_to_class"].items()}
            names = [str(table[i]) for i in range(n)]
        elif n == 80:
            print(
                f"{path} has no class names; its 80 outputs are taken for COCO's, in order"
            )
            categories = COCO_DETECTOR.meta["categories"]
            names = [x for x in categories if x not in ("__background__", "N/A")]
        network.image_size = content.get("image_size", network.image_size)
        if network.image_size not in range(32, 1025, 4):
            raise ValueError(f"its image_size is {network.image_size}")
    except Exception as problem:  # a file from elsewhere may raise anything
        raise Failure(
            f"{path} is not a {arch or 'TResNet or ResNet'}; use other --weights "
            f"({type(problem).__name__}: {problem})"
        ) from None
    return fold(network) if folded else network.eval(), names


class AsymmetricLoss(nn.Module):
    """ASL (Ben-Baruch et al. 2020, equation 7): logits (N, L), targets (N, L) 0/1 -> a scalar.

    The sum of -(1 - p)^gamma_pos log(p) over positives and -q^gamma_neg log(1 - q) over negatives,
    with p = sigmoid(logit) and q = max(p - clip, 0); in log space, so that no logit is too large.
    """

    def __init__(self, gamma_neg=4, gamma_pos=1, clip=0.05):
        super().__init__()
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip

    def forward(self, logits, targets):
        if logits.dtype != torch.float64:
            logits = logits.float()
        targets = targets.to(logits)
        log_p = F.logsigmoid(logits)
        log_1_p = F.logsigmoid(-logits)
        log_clip = log_p.new_tensor(self.clip).log()
        # 1 - q = min(1 - p + clip, 1)
        log_1_q = torch.logaddexp(log_1_p, log_clip).clamp(max=0)
        # 1 - p and q, kept above zero, where a power below 1 has no finite gradient
        not_p = -torch.expm1(log_p).clamp(max=-1e-30)
        q = -torch.expm1(log_1_q).clamp(max=-1e-30)
        positive = targets * not_p**self.gamma_pos * log_p
        negative = (1 - targets) * q**self.gamma_neg * log_1_q
        return -(positive + negative).sum()


@cache
def scene_digits(source, data_dir, split):
    """`common.load_digits` of train, validation (the last twelfth of the training set) or test."""
    name, images, labels = common.load_digits(source, data_dir, split != "test")
    cut = len(images) - len(images) // 12
    parts = {"train": slice(cut), "validation": slice(cut, None), "test": slice(None)}
    return name, images[parts[split]], labels[parts[split]]


def load_scenes(n, image_size=64, seed=0, source="auto", data_dir="data", split="train"):
    """`n` scenes of one to five digits of `source`: mnist, glyphs or auto; raises Failure.

    Each digit has its own colour, size and cell of a 3x3 grid. Returns images (n, 3, S, S) float32
    in [0, 1] and labels (n, 10) float32, 1 for those present; scene i does not depend on `n`.
    """
    digits, classes = scene_digits(source, data_dir, split)[1:]
    # the length of its name gives each split its own seed
    rng = np.random.default_rng([seed, len(split)])
    images = np.empty((n, 3, image_size, image_size), np.float32)
    labels = torch.zeros(n, 10)
    for image, label in zip(images, labels, strict=True):
        image[:] = rng.uniform(0, 0.4, (3, 1, 1))
        cells = rng.permutation(9)
        for cell in cells[: rng.integers(1, 6)]:
            row = rng.integers(len(digits))
            size = int(image_size * rng.uniform(0.31, 0.47))
            digit = F.interpolate(digits[row, None], size, mode="bilinear")[0].numpy()
            position = np.array(divmod(cell, 3)) / 2 + rng.uniform(-0.1, 0.1, 2)
            top, left = ((image_size - size) * position.clip(0, 1)).astype(int)
            patch = image[:, top : top + size, left : left + size]
            patch += digit * (rng.uniform(0.6, 1, (3, 1, 1)) - patch)
            label[classes[row]] = 1
    return torch.from_numpy(images), labels


def load_data(args, image_size, split, names=None):
    """(Images, labels, class names, description) of --dataset, --data, --limit and --seed.

    scenes: a tensor (N, 3, S, S) of --limit scenes; `split` train, validation or test.
    coco: `Photos`, those of the first --limit that have a label; `split` val2017, train2017.
    Labels (N, L) are float32 0/1, in the order of `names` if given. Raises Failure for other names.
    """
    if args.dataset == "scenes":
        n = args.limit or SCENES[split]
        images, labels = load_scenes(n, image_size, args.seed, "auto", args.data, split)
        digits = scene_digits("auto", args.data, split)[0]
        description = f"scenes of {digits}'s {split} digits"
        known = list("0123456789")
    else:
        images, labels, known = common.load_coco(args.data, image_size, args.limit, split)
        rows = labels.any(1).nonzero()[:, 0]
        if len(rows) == 0:
            raise Failure(f"no photo of {split} has a label; raise --limit", 2)
        images.paths = [images.paths[i] for i in rows]
        labels = labels[rows]
        description = f"labelled photos of COCO {split}"
    names = names or known
    unknown = set(names) ^ set(known)
    if unknown:
        raise Failure(
            f"{args.dataset} {split} has other labels than the network, or than the other split, "
            f"such as {min(unknown)!r}; change --data, --split or the network",
            2,
        )
    return images, labels[:, [known.index(name) for name in names]], names, description


def read_batches(images, batches):
    """Yield the images (a tensor or `Photos`) at each tensor of row numbers in `batches`."""
    ahead = []  # threads decode the photos of three more batches
    with ThreadPoolExecutor() as pool:
        for rows in batches:
            ahead.append(pool.map(images.__getitem__, rows))
            if len(ahead) > 3:
                yield torch.stack(list(ahead.pop(0)))
        for photos in ahead:
            yield torch.stack(list(photos))


def augment(images, seeds):
    """Cutout (arXiv 1708.04552), then RandAugment (1909.13719), as in the log's training.

    Images (N, 3, S, S) float32 in [0, 1], and a seed for each -> images of the same shape and
    range. Not thread-safe.
    """
    size = images.shape[-1]
    side = size // 2  # of the square that is cut out
    augmented = []
    with torch.random.fork_rng(devices=[]):
        for pixels, seed in zip((images * 255).round().byte(), seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            left, top = (torch.randint(size, (2,)) - side // 2).tolist()
            colour = torch.randint(256, (3, 1, 1))
            pixels[:, max(0, top) : top + side, max(0, left) : left + side] = colour
            image = RandAugment()(to_pil_image(pixels))
            augmented.append(to_tensor(image))
    return torch.stack(augmented).contiguous(memory_format=torch.channels_last)


# --- training and report


def training_data(args, names):
    """((images, labels) to train on, (images, labels) that select the best network)."""
    size = args.image_size
    if args.dataset == "scenes":
        train = load_data(args, size, "train", names)[:2]
        return train, load_data(args, size, "validation", names)[:2]
    images, labels = load_data(args, size, "train2017", names)[:2]
    # independent of seed and limit, so that a later run holds out the same photos
    is_held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == 0
    held_out = Photos(images.paths[::HELD_OUT_EVERY], size)
    del images.paths[::HELD_OUT_EVERY]
    return (images, labels[~is_held_out]), (held_out, labels[is_held_out])


def starting_network(args, names):
    """(Network from which training for the classes `names` starts, epochs of its last layer alone).

    In these first epochs the last layer learns alone: a new one, whose weights are random, would
    undo what the other layers have learnt.
    """
    if not args.weights and ARCHITECTURES[args.arch].blocks:
        return new_network(args.arch, len(names)), 0
    path = args.weights or published_weights(args.arch, args.data)
    network, known = load_asl(path, args.arch, folded=False)
    if known == names:
        return network, 0
    print(f"{path} has other labels, so its last layer is replaced")
    head = getattr(network, "head", network)
    head.fc = nn.Linear(head.fc.in_features, len(names))
    return network, 1


def derived_seed(*numbers):
    """A seed derived from these integers, the same in every process."""
    return hash(numbers) % 2**63


def training_batches(args, images, labels, done):
    """Yield (images, labels) of every step after the first `done`, the same after a resume."""
    per_epoch = len(labels) // args.batch_size
    batches = []
    mirrored = []
    for epoch in range(args.epochs):
        stream = torch.Generator().manual_seed(derived_seed(args.seed, epoch))
        order = torch.randperm(len(labels), generator=stream)
        batches += order.split(args.batch_size)[:per_epoch]
        mirrored.append(torch.rand(len(labels), generator=stream) < 0.5)
    for step, batch in enumerate(read_batches(images, batches[done:]), done):
        rows = batches[step]
        if args.dataset == "coco":
            epoch = step // per_epoch
            seeds = [derived_seed(args.seed, epoch, row) for row in rows.tolist()]
            # a ResNet starts from learnt weights and trains for too few epochs to benefit
            if ARCHITECTURES[args.arch].blocks:
                batch = augment(batch, seeds)
            flipped = mirrored[epoch][rows]
            batch[flipped] = batch[flipped].flip(3)
        yield batch, labels[rows]


def training_checkpoint(path, finished, args):
    """This run's checkpoint at `path`, or a new one; raises Failure if it is another run's.

    `finished` is the file of the finished network.
    """
    settings = common.flags_of(args, MUST_MATCH)
    if path.exists() and not args.force:
        return common.load_checkpoint(
            path, "delete it to train anew", "asl_model", settings
        )
    if finished.exists() and not args.force:
        raise Failure(f"{finished} exists; choose another --out, or add --force", 2)
    # --resume also restores these, unless they are given as flags
    settings.update(common.flags_of(args, ("data", "device")))
    return {"kind": "asl_model", "settings": settings, "steps": 0, "history": []}


def learning_rate(largest, step, head_steps, total):
    """The learning rate of a step: falling for the head, then one cycle (Smith & Topin 2018)."""
    if step <= head_steps:
        return HEAD_LR_FACTOR * largest * (1 - (step - 1) / head_steps)
    # up for a fifth of the training, then down, along cosines
    share = (step - head_steps) / (total - head_steps + 1)
    rise = min(share / 0.2, (1 - share) / 0.8)
    return largest * (0.5 - 0.5 * math.cos(math.pi * rise))


def training_parts(args, device, checkpoint, names, total):
    """{name: part}: the network, its averaged copy and Adam, new ones or those of `checkpoint`."""
    torch.manual_seed(args.seed)
    network = new_network(args.arch, len(names))
    if checkpoint["steps"] == 0:
        network, head_epochs = starting_network(args, names)
        checkpoint["head_steps"] = head_epochs * total // args.epochs
    network.train().to(device, memory_format=torch.channels_last)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:  # not NormAct, its subclass
            module.eval()  # the statistics of a ResNet stay those that its weights came with
    average = deepcopy(network).eval().requires_grad_(False)
    adam = Adam(network.parameters(), fused=True)
    parts = {"network": network, "average": average, "adam": adam}
    if checkpoint["steps"] > 0:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    return parts


def train(args, device, names):
    """Train a network for the classes `names`, or resume; returns (its path, facts for the record).

    Raises Failure if --out holds another run, if there are too few images, and if it diverges.
    """
    path = args.out / "checkpoint.pt"
    weights_path = args.out / f"{args.arch}-{args.dataset}.pth"
    checkpoint = training_checkpoint(path, weights_path, args)
    done = checkpoint["steps"]
    (images, labels), (held_out, truth) = training_data(args, names)
    size = len(labels)
    data = {f"class {i}": name for i, name in enumerate(names)}
    data["training images"] = size
    if args.dataset == "scenes":
        data["digits"] = scene_digits("auto", args.data, "train")[0]
    common.require_same(path, checkpoint.setdefault("training_data", data), data)
    total = args.epochs * (size // args.batch_size)
    if total == 0:
        raise Failure(f"--batch-size exceeds the {size} training images", 2)
    parts = training_parts(args, device, checkpoint, names, total)
    network = parts["network"]
    average = parts["average"]
    adam = parts["adam"]
    weights = [x for x in network.state_dict().values() if x.is_floating_point()]
    averages = [x for x in average.state_dict().values() if x.is_floating_point()]
    asl = AsymmetricLoss(4, GAMMA_POS[args.dataset])
    history = checkpoint["history"]
    head_steps = checkpoint["head_steps"]
    # with its "model", the best network, a checkpoint is also what load_asl takes
    checkpoint.update(
        norm="batch norm",
        image_size=args.image_size,
        num_classes=len(names),
        idx_to_class=dict(enumerate(names)),
    )
    batches = training_batches(args, images, labels, done)
    n = args.batch_size
    bar = common.progress(
        batches, "training, in images", total, initial=done, unit_scale=n
    )
    if args.force:  # otherwise --resume would continue the old run
        path.unlink(missing_ok=True)
    for step, (batch, targets) in enumerate(bar, done + 1):
        for name, weight in network.named_parameters():
            weight.requires_grad_(step > head_steps or "fc." in name)
        adam.param_groups[0]["lr"] = learning_rate(args.lr, step, head_steps, total)
        with torch.autocast(device.type, torch.bfloat16, common.has_bf16(device)):
            logits = network(batch.to(device))
        loss = asl(logits, targets.to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
        torch._foreach_lerp_(averages, weights, 1 - min(AVERAGE, 1 - 8 / (step + 8)))
        # evenly spaced; the last time after the last step
        is_evaluated = step * EVALUATIONS % total < EVALUATIONS
        if is_evaluated:
            logits = predict(average, held_out, device, n)
            if not np.isfinite(logits).all():
                raise Failure(f"the training diverged; lower --lr {args.lr}")
            mean_ap = average_precision(logits, truth.numpy()).mean().item()
            entry = {"step": step, "loss": loss.item() / n, "mAP": mean_ap}
            history.append(entry)
            if mean_ap == max(entry["mAP"] for entry in history):  # on a tie, the later
                checkpoint["model"] = deepcopy(average.state_dict())
        if is_evaluated or step % SAVE_EVERY == 0:
            checkpoint["steps"] = step
            for name, part in parts.items():
                checkpoint[name] = part.state_dict()
            common.save(path, checkpoint, f"--lr {args.lr}")
    for name in parts:
        del checkpoint[name]
    common.save(weights_path, checkpoint)
    return weights_path, {"dataset_size": size, "history": history}


def scenes_weights(data_dir, device):
    """The path of the scenes classifier for these digits, trained if missing."""
    out = Path("runs/scenes_classifier", scene_digits("auto", data_dir, "train")[0])
    path = out / "tresnet_s-scenes.pth"
    if not path.exists():
        print(f"training the classifier of scenes, {path}: minutes on two CPU cores")
        flags = [f"--data={data_dir}", f"--out={out}", f"--device={device.type}"]
        main(["--train", "--dataset=scenes", *flags])
    return path


@torch.no_grad()
def predict(network, images, device, batch_size=32):
    """The logits (N, L), a float32 array, of images."""
    logits = []
    rows = torch.arange(len(images)).split(batch_size)
    for batch in common.progress(
        read_batches(images, rows),
        "measuring, in images",
        len(rows),
        unit_scale=batch_size,
    ):
        logits.append(network(batch.to(device)).float().cpu())
    return torch.cat(logits).numpy()


def is_present(logits, threshold):
    """Whether a label is present: sigmoid(logit) > `threshold`."""
    return logits > math.log(threshold / (1 - threshold))


def average_precision(logits, labels):
    """The AP of each class that an image shows (ASL's code counts the others as 0).

    Arrays (N, L), of any score -> (classes shown,). AP is the mean, over the images that show the
    class, of the precision at their score, where equal scores share one threshold.
    """
    precisions = []
    for scores, present in zip(logits.T, labels.T > 0, strict=True):
        if present.any():
            # how many images, and how many of those showing the class, score at least this high
            predicted = rankdata(-scores, "max")[present]
            right = rankdata(-scores[present], "max")
            precisions.append((right / predicted).mean())
    return np.array(precisions)


def measure(logits, labels, threshold):
    """The numbers of the report, of arrays (N, L). The intervals take labels as independent."""
    predicted = is_present(logits, threshold)
    present = labels > 0
    return {
        "n": len(labels),
        "mAP": average_precision(logits, labels).mean().item(),
        "OP": wilson(present[predicted]),
        "OR": wilson(predicted[present]),
    }


def main(argv=None):
    """Do what the flags say; returns the record in results.json."""
    args = parse_args(argv)
    device = common.pick_device(args.device)
    facts = {}
    numbers = {}
    with common.hold(args):
        part = args.split or "val2017"
        if args.dataset == "scenes":
            part = "test"
        if args.train:  # the evaluation data is loaded first, as it gives the classes
            names = load_data(args, args.image_size, part)[2]
            path, facts = train(args, device, names)
        else:
            path = args.weights or default_weights(args.dataset, args.data, device)
        network, names = load_asl(path, args.arch)
        network.to(device)
        size = args.image_size or network.image_size
        if args.image:
            part = "labels"
            logits = predict(network, Photos([args.image], size), device)[0]
            probabilities = torch.from_numpy(logits).sigmoid().tolist()
            for i in np.argsort(-logits, kind="stable"):
                if is_present(logits[i], args.threshold):
                    numbers[names[i]] = probabilities[i]
        else:
            images, labels, _, facts["images"] = load_data(args, size, part, names)
            facts.setdefault("dataset_size", len(labels))
            logits = predict(network, images, device, args.batch_size)
            numbers = measure(logits, labels.numpy(), args.threshold)
        facts["weights"] = path
        record = common.write_results(args, device, {part: numbers}, **facts)
    common.print_table([part, path], numbers.items())
    if args.image and not numbers:
        print(f"no label has a probability above {args.threshold}")
    return record


if __name__ == "__main__":
    common.run(main, "interrupted; --resume continues from a checkpoint, if there is one")
