"""A ready LightningModule for causal language models of the transformers library.

To say the next token is to classify: the logits are ``[B, L, V]``, the labels ``[B, L]`` the token
behind each token (see :mod:`~lit_merge.tasks.language_task`, which has shifted them already), and
the loss is the mean cross-entropy of all of them. Everything that works on a
:class:`~lit_merge.tasks.classification.ClassificationModule` works on this one.
"""

from __future__ import annotations

from typing import Any, cast

from torchmetrics import MetricCollection

from lit_merge.errors import InputError
from lit_merge.tasks.classification import ClassificationModule, load_transformer, start_from
from lit_merge.tasks.language_task import LanguageTask


class TransformersCausalLM(ClassificationModule):
    """A causal language model of the transformers library, such as GPT-2.

    Validation and test log the accuracy of the next token, its negative log-likelihood in nats and
    the perplexity, exp of that.

    Args:
        model: Folder of a model, or its name on the Hugging Face hub.
        checkpoint: Weights to start from instead of those of ``model``: an expert folder, a merged
            folder or any checkpoint.
        config: The model's configuration as a mapping, as ``{model_type: gpt2, n_layer: 4}``;
            given, ``model`` is only a name and nothing is read from it, so that without a
            ``checkpoint`` the model is a fresh one. Lightning checkpoints store it, so that they
            load where the folder is gone.
        lr: See :class:`~lit_merge.tasks.classification.ClassificationModule`.
        weight_decay: See there.
        warmup: See there.

    Raises:
        InputError: If there is no such model, or the checkpoint does not fit it; when training or
            testing begins, if a :class:`LanguageTask` has more tokens than the model, or longer
            blocks than it has positions.
    """

    def __init__(
        self,
        model: str,
        checkpoint: str | None = None,
        config: dict[str, Any] | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.0,
    ) -> None:
        from transformers import AutoModelForCausalLM

        network = load_transformer(
            AutoModelForCausalLM,
            model,
            kind="a causal language model",
            config=config,
            weights=checkpoint is None,
        )
        # What the layers have computed for a text is kept for its next token: memory for nothing.
        network.config.use_cache = False
        start_from(network, checkpoint, head="load")
        super().__init__(
            network.train(),  # transformers hands models out in evaluation mode
            network.get_output_embeddings().weight.shape[0],
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
        )
        left_out = ("num_classes", "label_smoothing")
        hparams = {key: value for key, value in self.hparams.items() if key not in left_out}
        self.save_hyperparameters({"model": model, "config": network.config.to_dict(), **hparams})

    def on_fit_start(self) -> None:
        """Check that tokenizer and blocks fit the model."""
        self._require_fit()

    def on_test_start(self) -> None:
        """Begin to count."""
        self._require_fit()
        super().on_test_start()

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Log the perplexity."""
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        nll = cast("MetricCollection", self.metrics[stage])["nll"].compute()
        self.log(f"{stage}/perplexity", nll.exp(), prog_bar=stage == "val", sync_dist=True)

    def _require_fit(self) -> None:
        task = getattr(getattr(self.trainer, "datamodule", None), "task", None)
        if not isinstance(task, LanguageTask):
            return
        misfit = task.misfit(self.num_classes)
        if misfit is not None:
            raise InputError(misfit)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < task.block_length:
            raise InputError(
                f"block_length: must be at most the model's positions, {positions}; got "
                f"{task.block_length}. Lower block_length."
            )
