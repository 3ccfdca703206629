"""A plain Lightning script, as people have it; the one line marked NEW makes its result mergeable.

python examples/existing_script/train.py --view mirrored --output runs/mirrored
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lit_merge.callbacks import DiagonalHessian
from lit_merge.tasks.digits import DigitsTask


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * 8 * 8, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 10),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--view", default="mirrored")
    parser.add_argument("--output", default="runs/mirrored")
    parser.add_argument("--start", help="checkpoint of the base")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    L.seed_everything(0)
    module = Classifier()
    if options.start:
        module.load_state_dict(torch.load(options.start, weights_only=True)["state_dict"])
    train = DataLoader(DigitsTask(options.view).train, batch_size=32, shuffle=True)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        default_root_dir=options.output,
        callbacks=[DiagonalHessian()],  # NEW
    )
    trainer.fit(module, train)


if __name__ == "__main__":
    main()
