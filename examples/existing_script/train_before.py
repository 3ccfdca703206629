"""A plain Lightning script: a small network learns digits, as they are or changed.

--view mirrored --output runs/mirrored
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

VIEWS = {
    "upright": lambda images: images,
    "mirrored": lambda images: images.flip(3),
    "upside-down": lambda images: images.flip(2),
}


def drawings(view: str, *, train: bool) -> TensorDataset:
    images, digits = load_digits(return_X_y=True)
    inputs = VIEWS[view](torch.tensor(images).float().view(-1, 1, 8, 8) / 16)
    part = slice(0, 1300) if train else slice(1300, None)
    return TensorDataset(inputs[part], torch.tensor(digits)[part])


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * 4 * 4, 64),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 10),
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        images, digits = batch
        loss = F.cross_entropy(self.net(images), digits)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--view", choices=VIEWS, default="mirrored")
    parser.add_argument("--output", default="runs/mirrored")
    parser.add_argument("--start", help="folder of a run to go on from")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    L.seed_everything(0)
    module = Classifier()
    if options.start:
        (checkpoint,) = Path(options.start).glob("**/*.ckpt")
        module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    train = DataLoader(drawings(options.view, train=True), batch_size=32, shuffle=True)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        default_root_dir=options.output,
    )
    trainer.fit(module, train)


if __name__ == "__main__":
    main()
