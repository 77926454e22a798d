"""Own models: convolutional nets, U-Net, DenseNet, MLP-Mixer, graph net, NeRF-like MLP, autoencoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import Inputs, features, floats, rng, zoo

FAMILY = "networks"
IMAGES: dict[str, Any] = {"length": 16, "other_length": 24}


class BasicBlock(nn.Module):
    """torchvision's basic block: ReLU(inplace=True) right behind sites."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


@zoo("resnet_own", FAMILY, features(3, -1, -1), **IMAGES)
class ResNet(nn.Module):
    """ResNet with in-place ReLU and in-place residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 64, 2), BasicBlock(64, 64, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def channels_last_images(batch: int, length: int) -> Inputs:
    """Pictures in channels-last memory."""
    return (floats(batch, 3, length, length).contiguous(memory_format=torch.channels_last),), {}


@zoo("resnet_channels_last", FAMILY, channels_last_images, **IMAGES)
def resnet_channels_last() -> nn.Module:
    """ResNet in channels-last memory format; strides must survive."""
    return ResNet().to(memory_format=torch.channels_last)


@zoo("conv_inplace_relu", FAMILY, features(3, -1, -1), **IMAGES)
class ConvInplaceRelu(nn.Module):
    """ReLU(inplace=True) and relu_ directly on watched outputs, without a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.fc1, self.fc2 = nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.features(x).flatten(1)).relu_()
        return F.dropout(self.fc2(x), 0.3, self.training, inplace=True)


@zoo("conv1d_wave", FAMILY, features(2, -1), length=64, other_length=48)
class WaveNet(nn.Module):
    """Dilated 1-d convolutions, gated, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv1d(2, 32, 1)
        self.gates = nn.ModuleList(nn.Conv1d(32, 64, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(32, 32, 1) for _ in range(3))
        self.out = nn.ConvTranspose1d(32, 8, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), 0
        for gate, skip in zip(self.gates, self.skips, strict=True):
            filtered, gated = gate(x).chunk(2, dim=1)
            h = skip(torch.tanh(filtered) * torch.sigmoid(gated))
            total = total + h
            x = x + h
        return self.out(F.relu(total))


@zoo("conv3d_video", FAMILY, features(2, 4, -1, -1), length=8, other_length=6)
def conv3d_video() -> nn.Module:
    """3-d convolutions with GroupNorm and InstanceNorm."""
    return nn.Sequential(
        nn.Conv3d(2, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(inplace=True), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(32, 64, 3, padding=1), nn.InstanceNorm3d(64), nn.ELU(inplace=True), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@zoo(
    "conv_unbatched", FAMILY, lambda _, length: ((floats(3, length, length),), {}), other_batch=None, **IMAGES
)
def conv_unbatched() -> nn.Module:
    """One picture without a batch axis: the channels are axis 0."""
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(inplace=True), nn.Conv2d(64, 8, 1))


@zoo("depthwise_separable", FAMILY, features(8, -1, -1), **IMAGES)
def depthwise_separable() -> nn.Module:
    """Grouped and strided convolutions, string padding, reflect padding."""
    return nn.Sequential(
        nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64), nn.ReLU6(inplace=True),
        nn.Conv2d(64, 64, 3, padding="same", groups=64), nn.BatchNorm2d(64), nn.ReLU6(inplace=True),
        nn.Conv2d(64, 16, 3, stride=2, padding=1, padding_mode="reflect"),
    )  # fmt: skip


@zoo("unet", FAMILY, features(3, -1, -1), length=16, other_length=32)
class UNet(nn.Module):
    """Two levels down, two up, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(3, 16), self.double(16, 32)
        self.middle = self.double(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.mix2, self.mix1 = self.double(64, 32), self.double(32, 16)
        self.out = nn.Conv2d(16, 4, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Module:
        """Conv, norm, ReLU, twice."""
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.mix2(torch.cat([self.up2(x), second], 1))
        return self.out(self.mix1(torch.cat([self.up1(x), first], 1)))


@zoo("densenet", FAMILY, features(3, -1, -1), **IMAGES)
class DenseNet(nn.Module):
    """Each layer reads all before it; pre-activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 16 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 16 * i, 16, 3, padding=1) for i in range(3))
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)), inplace=True)))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


@zoo("mlp_mixer", FAMILY, features(3, 16, 16))
class MlpMixer(nn.Module):
    """MLP-Mixer: Linear over a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, 64), MixerBlock(16, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@zoo("nerf", FAMILY, features(-1, 3), length=20, other_length=12)
class Nerf(nn.Module):
    """NeRF-like: sinusoids, a skip that concatenates the input, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(21 if i == 0 else 64 + (21 if i == 3 else 0), 64) for i in range(5)
        )
        self.sigma, self.colour = (
            nn.Linear(64, 1),
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3), nn.Sigmoid()),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        waves = [f(x * 2**k) for k in range(3) for f in (torch.sin, torch.cos)]
        encoded = h = torch.cat([x, *waves], -1)
        for index, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([encoded, h], -1) if index == 3 else h))
        return {"sigma": F.softplus(self.sigma(h)), "rgb": self.colour(h)}


def graph(batch: int, _: int) -> Inputs:
    """Node features [nodes, 16] and edges [2, edges]."""
    nodes = 6 * batch
    return (floats(nodes, 16), torch.randint(0, nodes, (2, 3 * nodes), generator=rng(nodes))), {}


@zoo("graph_net", FAMILY, graph)
class GraphNet(nn.Module):
    """Messages by index_add and scatter_reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(32, 64), nn.Linear(16 + 64, 64)
        self.lin_self, self.lin_neighbour = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = F.relu(self.message(torch.cat([x[source], x[target]], -1)))
        gathered = torch.zeros(x.shape[0], 64).index_add(0, target, messages)
        h = F.relu(self.update(torch.cat([x, gathered], -1)))
        mean = torch.zeros_like(h).scatter_reduce(0, target[:, None].expand(-1, 64), h[source], "mean")
        return self.lin_self(h) + self.lin_neighbour(mean)


@zoo("vae", FAMILY, features(32))
class Vae(nn.Module):
    """Samples in the forward: the RNG must advance as in the host."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ELU())
        self.mean, self.log_var = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.decoder(z), mean, log_var


@zoo("siamese", FAMILY, lambda batch, _: ((floats(batch, 3, 12, 12), floats(batch, 3, 12, 12) * 2), {}))
class Siamese(nn.Module):
    """One tower run on two inputs, a distance out."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(32)
        )
        self.tower(torch.zeros(1, 3, 12, 12))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.pairwise_distance(self.tower(left), self.tower(right))
