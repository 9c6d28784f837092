"""Four trained vision networks in plain torch layers, with data and measures: what both halves of a benchmark load.

The checkpoints of `data/vision` need two rewrites before a quantizer may touch them. Their `SameConv2d` is an
`nn.Conv2d` that pads inside its own forward (TensorFlow's asymmetric "same"); a tool that replaces `nn.Conv2d` by its
own class would lose that padding without a word. Here it becomes `nn.Conv2d(padding=...)` where the padding is
symmetric and `nn.ZeroPad2d` followed by a plain `nn.Conv2d` where it is not. Batch norms are folded into the
convolution before them, and become `nn.Identity`, unless `fold=False`.

| name | data that calibrate | data that test | fidelity to the float network |
|---|---|---|---|
| resnet20, resnet8 | lossless training images 0..999 | 2,000 JPEG test images | lossless images 1000..1999 |
| dscnn | keyword rows 800..999 | rows 0..799 | none |
| vit_mnist | 1,000 training digits | 2,000 test digits | none |

Run: python benchmarks/vision_networks.py --data ../shared/data/vision    # float accuracy, and rewritten = original
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quantkit.errors import InputError

NAMES = ("resnet20", "resnet8", "dscnn", "vit_mnist")
CHECKPOINTS = {
    "resnet20": "resnet20_cifar10",
    "resnet8": "mlperf_tiny_resnet8_cifar10",
    "dscnn": "mlperf_tiny_kws_dscnn",
    "vit_mnist": "vit_mnist",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """A float network in eval mode and its data.

    example (1, ...), calib (n, ...) and test_x (n, ...) are inputs as the network takes them, already normalized;
    test_y (n,) are int64 classes. fidelity_x (1000, 3, 32, 32) are images that neither calibrate nor carry JPEG
    artifacts, or None where there are none.
    """

    name: str
    module: nn.Module
    example: Tensor
    calib: Tensor
    test_x: Tensor
    test_y: Tensor
    fidelity_x: Tensor | None


def load(name: str, data: str | Path, *, fold: bool = True) -> Network:
    """The network `name` of NAMES with the files of the folder `data`; batch norms folded unless `fold=False`.

    InputError for a name that is none of NAMES and for a folder without the files.
    """
    if name not in NAMES:
        raise InputError(f"unknown network {name!r}; accepted: {', '.join(NAMES)}")
    folder = Path(data)
    calib, test_x, test_y, fidelity_x = _data(name, folder)
    module = original(name, folder)
    if fold:
        fold_batch_norms(module)
    explicit_padding(module, calib[:1])
    return Network(name, module, calib[:1], calib, test_x, test_y, fidelity_x)


def original(name: str, data: str | Path) -> nn.Module:
    """The network as its `models.py` writes it, in eval mode: `SameConv2d` and batch norms where it has them."""
    models = _models(Path(data))
    made = {"resnet20": lambda: models.ResNetA(3), "resnet8": models.ResNet8, "dscnn": models.DSCNN}
    module: nn.Module = made.get(name, models.ViTMnist)()
    state = load_file(_file(Path(data), f"{CHECKPOINTS[name]}.safetensors"))
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
        raise InputError(f"{CHECKPOINTS[name]}.safetensors does not fit its network: {[*missing, *unexpected][:3]}")
    return module.eval().requires_grad_(False)


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, every batch norm into the convolution whose output it normalizes; it becomes `nn.Identity`."""
    for name, norm in list(module.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            conv_name = _normalized_by(name)
            conv = module.get_submodule(conv_name)
            assert isinstance(conv, nn.Conv2d)
            module.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            module.set_submodule(name, nn.Identity())


def explicit_padding(module: nn.Module, example: Tensor) -> None:
    """Replace, in place, each convolution that pads in its own forward by a plain one, for inputs of example's size."""
    sizes: dict[str, torch.Size] = {}
    own = {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: sizes.update({n: x[0].shape[2:]})) for n, m in own.items()]
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    for name, conv in own.items():
        module.set_submodule(name, _plain(conv, sizes[name]))


def outputs(module: nn.Module, x: Tensor, batch: int = 250) -> Tensor:
    """Logits (n, classes) of the inputs x, without gradients."""
    with torch.no_grad():  # channels last in memory: convolutions of few channels are several times faster
        parts = x.contiguous(memory_format=torch.channels_last).split(batch)
        return torch.cat([module(part) for part in parts])


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float((logits.argmax(1) == y).double().mean())


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Percent of rows whose top-1 class is the reference's."""
    return accuracy(logits, reference.argmax(1))


def sqnr_db(logits: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise of the logits in dB: 10 log10(sum reference² / sum (logits - reference)²)."""
    signal, noise = reference.double().square().sum(), (logits.double() - reference.double()).square().sum()
    return float(10 * torch.log10(signal / noise))


def measure(module: nn.Module, network: Network) -> dict[str, float | None]:
    """accuracy of `module` on the test data; agreement and sqnr_db with the float network where fidelity_x exists."""
    row: dict[str, float | None] = {"accuracy": accuracy(outputs(module, network.test_x), network.test_y)}
    if network.fidelity_x is None:
        return row | {"agreement": None, "sqnr_db": None}
    logits, reference = outputs(module, network.fidelity_x), outputs(network.module, network.fidelity_x)
    return row | {"agreement": agreement(logits, reference), "sqnr_db": sqnr_db(logits, reference)}


def _plain(conv: nn.Conv2d, size: torch.Size) -> nn.Module:
    """The "same" convolution for inputs of this height and width, with the padding written out."""
    total = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, conv.kernel_size, conv.stride, strict=True)]
    before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    symmetric = before == after
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        padding=(before[0], before[1]) if symmetric else 0,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.load_state_dict(conv.state_dict())
    plain.eval().requires_grad_(False)
    return plain if symmetric else nn.Sequential(nn.ZeroPad2d((before[1], after[1], before[0], after[0])), plain)


def _normalized_by(norm: str) -> str:
    """The convolution before a batch norm: bn1 follows conv1, dwbn.0 follows dw.0, pwbn.0 follows pw.0."""
    *path, last = norm.split(".")
    if last.isdigit():
        return ".".join([*path[:-1], path[-1].removesuffix("bn"), last])
    return ".".join([*path, last.replace("bn", "conv")])


def _data(name: str, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """calib, test_x, test_y, fidelity_x."""
    if name == "vit_mnist":
        calib, _ = _digits(folder, "mnist_train_calib1000.npz")
        return calib, *_digits(folder, "mnist_test2000.npz"), None
    if name == "dscnn":
        kws = np.load(_file(folder, "kws_mfcc_test800_calib200.npz"))
        x = ((torch.tensor(kws["x"]).float() - 83) * 0.5847029)[:, None]
        return x[800:], x[:800], torch.tensor(kws["y"][:800]).long(), None
    lossless, _ = _cifar(folder, "cifar10_train_lossless2000.npz", normalize=name == "resnet20")
    test_x, test_y = _cifar(folder, "cifar10_test_jpeg2000.npz", normalize=name == "resnet20")
    return lossless[:1000], test_x, test_y, lossless[1000:]


def _digits(folder: Path, file: str) -> tuple[Tensor, Tensor]:
    z = np.load(_file(folder, file))
    return (torch.tensor(z["x"]).float()[:, None] / 255 - 0.1307) / 0.3081, torch.tensor(z["y"]).long()


def _cifar(folder: Path, file: str, normalize: bool) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32), 0..255 or ImageNet-normalized, and classes (n,)."""
    z = np.load(_file(folder, file))
    x = torch.tensor(z["x"]).float().permute(0, 3, 1, 2).contiguous()
    if normalize:
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = (x / 255 - mean) / std
    return x, torch.tensor(z["y"]).long()


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise InputError(f"{folder} has no {name}; give --data the folder of the vision checkpoints")
    return folder / name


def _models(folder: Path) -> ModuleType:
    """The folder's own models.py."""
    spec = importlib.util.spec_from_file_location("vision_models", _file(folder, "models.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print each network's float accuracy, and how far folding and rewriting moved its logits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="../shared/data/vision")
    data = parser.parse_args().data
    for name in NAMES:
        network = load(name, data)
        reference = outputs(original(name, data), network.test_x)
        logits = outputs(network.module, network.test_x)
        moved = float((logits - reference).abs().max() / reference.abs().max())
        float_accuracy = accuracy(logits, network.test_y)
        print(f"{name}: accuracy {float_accuracy:.2f} %, largest logit error / largest logit {moved:.1e}")


if __name__ == "__main__":
    main()
