"""The rewritten vision networks are the trained ones; the trained ones themselves need QUANTKIT_SHARED_DATA."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("QUANTKIT_SHARED_DATA", "/nonexistent")) / "vision"
FLOAT_ACCURACY = {"resnet20": 82.15, "resnet8": 77.15, "dscnn": 91.0, "vit_mnist": 97.15}  # shared/data/MANIFEST.md

sys.path.insert(0, str(ROOT / "benchmarks"))
import vision_networks as vision  # noqa: E402


class OwnPadding(nn.Conv2d):
    """TensorFlow's "same" by its definition: out = ceil(in / stride), the odd row or column of zeros goes last."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for n, k, s in reversed(list(zip(x.shape[2:], self.kernel_size, self.stride, strict=True))):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


@pytest.mark.parametrize(
    "kernel, stride, size", [(3, 1, 7), (3, 2, 8), (3, 2, 7), (1, 2, 8), ((10, 4), (2, 2), (49, 10))]
)
def test_padding_written_out_changes_nothing(kernel: object, stride: object, size: int | tuple[int, int]) -> None:
    """A convolution that pads in its forward and its rewrite agree, and no subclass of nn.Conv2d is left."""
    torch.manual_seed(0)
    module = nn.Sequential(OwnPadding(3, 5, kernel, stride), nn.ReLU())  # type: ignore[arg-type]
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    expected = module(x)
    vision.explicit_padding(module, x)
    assert all(type(m) is nn.Conv2d for m in module.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(module(x), expected)


def test_sqnr_of_noise_a_tenth_as_large_is_20_db() -> None:
    """10 log10 of the ratio of energies."""
    reference = torch.tensor([[3.0, -4.0]])
    assert vision.sqnr_db(1.1 * reference, reference) == pytest.approx(20, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="QUANTKIT_SHARED_DATA names no folder with vision")
@pytest.mark.parametrize("name", vision.NAMES)
def test_folded_and_rewritten_networks_are_the_originals(name: str) -> None:
    """Logits agree to 1e-4 of the largest logit, and the float accuracy is the manifest's."""
    network = vision.load(name, DATA)
    logits = vision.outputs(network.module, network.test_x)
    reference = vision.outputs(vision.original(name, DATA), network.test_x[:500])
    assert (logits[:500] - reference).abs().max() < 1e-4 * reference.abs().max()
    assert vision.accuracy(logits, network.test_y) == pytest.approx(FLOAT_ACCURACY[name], abs=0.005)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.module.modules())
