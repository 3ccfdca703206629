"""A LightningModule that trains a LoRA adapter of PEFT, and saves it when training ends."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model

from lit_merge import TransformersClassifier


class LoraClassifier(TransformersClassifier):
    """A text classifier of which only an adapter and the head are trained.

    Args:
        model: Folder of the base, or its name on the hub.
        num_labels: Number of classes.
        adapter: The folder to save the adapter to, with PEFT's ``save_pretrained``.
        rank: Of every ΔW.
        alpha: ``lora_alpha``: ΔW = alpha / rank · B·A.
        target_modules: Endings of the names of the layers to adapt; None for PEFT's choice.
        lr: As for TransformersClassifier.
        warmup: As for TransformersClassifier.
    """

    def __init__(
        self,
        model: str,
        num_labels: int,
        adapter: str,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: list[str] | None = None,
        lr: float = 1e-3,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(model, num_labels, lr=lr, warmup=warmup)
        config = LoraConfig(
            task_type="SEQ_CLS", r=rank, lora_alpha=alpha, target_modules=target_modules
        )
        self.model = get_peft_model(self.model, config)
        self.adapter = adapter

    def on_train_end(self) -> None:
        """Save the adapter."""
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.adapter)
