"""A judge for class-conditional images: a small convolutional network trained on the real data."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from learngenes.data.labelled import LabelledImages


def new_classifier(classes: int, channels: int = 1) -> nn.Module:
    """Untrained network for images (N, channels, H, W), of 28 pixels or more."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(
            nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten()),
            nn.Dropout(0.2),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
        ),
        nn.Linear(128, classes),
    )


def train_classifier(data: LabelledImages, epochs: int = 2, batch_size: int = 200) -> nn.Module:
    """Network trained on the images of `data`; one cycle of Adam."""
    torch.manual_seed(0)
    network = new_classifier(len(data.class_names), data.images.shape[1])
    steps = len(data) // batch_size
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in trange(epochs, desc="classifier", unit="epoch"):
        order = torch.randperm(len(data))
        for step in range(steps):
            indices = order[step * batch_size : (step + 1) * batch_size]
            logits = network(data.normalised(indices))
            loss = F.cross_entropy(logits, data.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: LabelledImages) -> float:
    """Share of images whose label is found."""
    hits = 0
    for indices in torch.arange(len(data)).split(500):
        found: Tensor = network(data.normalised(indices)).argmax(1)
        hits += int((found == data.labels[indices]).sum())
    return hits / len(data)
