"""How often a checkpoint or merged folder is right on every view of the test drawings.

python examples/existing_script/score.py merged
"""

import sys

import torch
from train_before import VIEWS, Classifier, drawings

from lit_merge.checkpoint import load_into
from lit_merge.expert import open_expert


def main() -> None:
    for path in sys.argv[1:]:
        module = Classifier().eval()
        expert = open_expert(path)
        load_into(module, expert.weights)
        expert.close()
        scores = []
        for view in VIEWS:
            images, digits = drawings(view, train=False).tensors
            with torch.no_grad():
                right = module.net(images).argmax(1) == digits
            scores.append(f"{view} {100 * right.float().mean():.1f} %")
        print(f"{path}: {', '.join(scores)}")


if __name__ == "__main__":
    main()
