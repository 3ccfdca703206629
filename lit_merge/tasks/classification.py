"""Ready LightningModules for classification: any network, a timm model, a transformers model.

A batch is ``(inputs, labels)``; inputs is a tensor ``[B, ...]`` or a mapping of tensors (keyword
arguments of the network), labels int64 ``[B]`` with -100 where an example must not count. The loss
is the mean cross-entropy over the examples that count. A network that classifies every token of an
example gives logits ``[B, L, C]`` for labels ``[B, L]``.
"""

from __future__ import annotations

import difflib
import logging
import math
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lit_merge.correction.forward import run_model
from lit_merge.errors import InputError
from lit_merge.tasks.classification_metrics import classification_metrics, update_metrics
from lit_merge.tasks.schedule import with_cosine
from lit_merge.tasks.task import IGNORED

_log = logging.getLogger(__name__)

Head = Literal["load", "fresh"]


class ClassificationModule(L.LightningModule):
    """Trains a network on labels with AdamW, a linear warm-up and a cosine to zero.

    Args:
        model: The network; its output is the logits ``[B, num_classes]``, or has them as
            ``logits``.
        num_classes: Number of classes.
        lr: Largest learning rate.
        weight_decay: AdamW's decay of matrices and kernels; biases and norms are not decayed.
        warmup: Share of the steps in which the learning rate rises from zero, in [0, 1).
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).

    Raises:
        InputError: If an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(
                f"num_classes: must be at least 2; got {num_classes}. Count the classes."
            )
        if not lr > 0 or not math.isfinite(lr):
            raise InputError(f"lr: must be positive and finite; got {lr}. 1e-3 is usual.")
        if not weight_decay >= 0:
            raise InputError(
                f"weight_decay: must be at least 0; got {weight_decay}. 0.01 is usual."
            )
        for name, share in (("warmup", warmup), ("label_smoothing", label_smoothing)):
            if not 0 <= share < 1:
                raise InputError(f"{name}: must be in [0, 1); got {share}. 0 turns it off.")
        # Primitives only: a checkpoint must load with weights_only=True.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "lr": lr,
                "weight_decay": weight_decay,
                "warmup": warmup,
                "label_smoothing": label_smoothing,
            }
        )
        self.model = model
        self.num_classes = num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.label_smoothing = label_smoothing
        self.metrics = nn.ModuleDict(
            {stage: classification_metrics(num_classes, f"{stage}/") for stage in ("val", "test")}
        )

    def forward(self, inputs: Any) -> Tensor:
        """Return the logits, ``[B, num_classes]``."""
        return read_logits(self.model, inputs)

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        inputs, labels = batch
        loss = F.cross_entropy(
            self(inputs).flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
        )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def on_validation_start(self) -> None:
        """Begin to count."""
        self._begin("val")

    def on_test_start(self) -> None:
        """Begin to count."""
        self._begin("test")

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Count a validation batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Count a test batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities, ``[B, num_classes]``; labels are not used."""
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        return self.forward(inputs).softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the schedule."""
        decayed = [p for p in self.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.lr,
        )
        return with_cosine(self, optimizer, warmup=self.warmup)

    def _begin(self, stage: str) -> None:
        # Tensors that were reset in inference mode, at the end of an earlier evaluation, cannot be
        # counted in outside of it, as the sanity check of a fit does.
        cast("MetricCollection", self.metrics[stage]).reset()

    def _evaluate(self, stage: str, batch: tuple[Any, Tensor]) -> None:
        inputs, labels = batch
        metrics = cast("MetricCollection", self.metrics[stage])
        update_metrics(metrics, self(inputs), labels)
        self.log_dict(metrics, batch_size=len(labels), prog_bar=stage == "val")


class TimmClassifier(ClassificationModule):
    """A classifier of the timm library.

    Args:
        model_name: Name of the architecture in timm.
        num_classes: Number of classes.
        pretrained: Start from timm's published weights, which are downloaded.
        checkpoint: Weights to start from instead: an expert folder, a merged folder or any
            checkpoint.
        head: Whether the head comes from ``checkpoint`` ("load") or is new ("fresh"), as it must be
            where the classes are others.
        model_kwargs: Further arguments of ``timm.create_model``, such as ``img_size`` or
            ``in_chans``.
        lr: See :class:`ClassificationModule`.
        weight_decay: See :class:`ClassificationModule`.
        warmup: See :class:`ClassificationModule`.
        label_smoothing: See :class:`ClassificationModule`.

    Raises:
        InputError: If timm has no such model, or the checkpoint does not fit it.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        pretrained: bool = False,
        checkpoint: str | None = None,
        head: Head = "load",
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        import timm

        kwargs = dict(model_kwargs or {})
        try:
            network = timm.create_model(
                model_name, pretrained=pretrained, num_classes=num_classes, **kwargs
            )
        except (RuntimeError, TypeError, ValueError) as error:
            near = difflib.get_close_matches(model_name, timm.list_models(), n=3, cutoff=0.3)
            raise InputError(
                f"model_name: must be a model of timm that takes {kwargs or 'no arguments'}; got "
                f"{model_name!r} ({error}). Some near it: {', '.join(near) or 'none'}."
            ) from error
        start_from(network, checkpoint, head=head)
        super().__init__(
            network,
            num_classes,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            label_smoothing=label_smoothing,
        )
        # Where the weights came from is left out: a Lightning checkpoint brings its own.
        self.save_hyperparameters(
            {"model_name": model_name, "model_kwargs": kwargs, **self.hparams}
        )


class TransformersClassifier(ClassificationModule):
    """A sequence classifier of the transformers library.

    Args:
        model: Folder of a model, or its name on the Hugging Face hub.
        num_labels: Number of classes.
        checkpoint: Weights to start from instead of those of ``model``: an expert folder, a merged
            folder or any checkpoint.
        head: Whether the head comes from ``checkpoint`` ("load") or is new ("fresh"), as it must be
            where the classes are others.
        config: The model's configuration as a mapping; given, ``model`` is only a name and nothing
            is read from it. Lightning checkpoints store it, so that they load where the folder is
            gone.
        lr: See :class:`ClassificationModule`.
        weight_decay: See :class:`ClassificationModule`.
        warmup: See :class:`ClassificationModule`.
        label_smoothing: See :class:`ClassificationModule`.

    Raises:
        InputError: If there is no such model, or the checkpoint does not fit it.
    """

    def __init__(
        self,
        model: str,
        num_labels: int,
        checkpoint: str | None = None,
        head: Head = "load",
        config: dict[str, Any] | None = None,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        network = load_transformer(
            AutoModelForSequenceClassification,
            model,
            kind="a sequence classifier",
            config=config,
            weights=checkpoint is None,
            num_labels=num_labels,
        )
        start_from(network, checkpoint, head=head)
        super().__init__(
            network.train(),  # transformers hands models out in evaluation mode
            num_labels,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            label_smoothing=label_smoothing,
        )
        hparams = {key: value for key, value in self.hparams.items() if key != "num_classes"}
        self.save_hyperparameters(
            {
                "model": model,
                "num_labels": num_labels,
                "config": network.config.to_dict(),
                **hparams,
            }
        )


def load_transformer(
    auto: Any,
    model: str,
    *,
    kind: str,
    config: dict[str, Any] | None = None,
    weights: bool = True,
    **settings: Any,
) -> Any:
    """Return a network of the transformers library.

    Args:
        auto: The library's class that knows all models of a kind.
        model: Folder of a model, or its name on the Hugging Face hub.
        kind: What the network must be, for the message.
        config: The configuration instead, for fresh weights.
        weights: Whether to read the weights, too; else they are fresh.
        **settings: What is changed in the configuration of ``model``.

    Raises:
        InputError: If there is no such model.
    """
    from transformers import AutoConfig

    try:
        if config is not None:
            return auto.from_config(AutoConfig.for_model(**config))
        if not weights:
            return auto.from_config(AutoConfig.from_pretrained(model, **settings))
        return auto.from_pretrained(model, dtype=torch.float32, **settings)
    except (OSError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model: must be the folder of a transformers model with {kind}, or its name on the "
            f"hub; got {model!r} ({reason}). Check the path."
        ) from error


def read_logits(model: nn.Module, inputs: Any) -> Tensor:
    """Run a classifier and return its logits, ``[B, C]``; of a language model ``[B, L, V]``.

    Args:
        model: A network whose output is the logits, or has them as the attribute ``logits``.
        inputs: A mapping is passed as keyword arguments, anything else as one argument.

    Raises:
        InputError: If the output is no batch of logits.
    """
    output = run_model(model, inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise InputError(
            f"model: the output of {type(model).__name__} must be logits [batch, classes], or "
            f"[batch, tokens, vocabulary]; got {got}. Return the logits, or an object with them as "
            ".logits."
        )
    return logits


def start_from(network: nn.Module, checkpoint: str | None, *, head: Head) -> None:
    """Load weights into a network, with or without those of its head.

    Args:
        network: The network.
        checkpoint: An expert folder, a merged folder or any checkpoint; None does nothing.
        head: "load" takes the head as well, "fresh" leaves the network's own.

    Raises:
        InputError: If the checkpoint does not fit, or no head is known in the network.
    """
    from lit_merge.checkpoint import load_into
    from lit_merge.expert import open_expert
    from lit_merge.parameters import detect_heads

    if checkpoint is None:
        return
    left_out: tuple[str, ...] = ()
    if head == "fresh":
        left_out = detect_heads(network)
        if not left_out:
            raise InputError(
                f'head: "fresh" needs a network whose head is known; got {type(network).__name__}. '
                'Use head: "load".'
            )
    try:
        load_into(network, open_expert(checkpoint).weights, ignore=left_out)
    except InputError as error:
        if head == "fresh" or not detect_heads(network):
            raise
        raise InputError(f'{error} Where only the classes differ, use head: "fresh".') from error
    _log.info("Loaded %s; left new: %s", checkpoint, ", ".join(left_out) or "nothing")
