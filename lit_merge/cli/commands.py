"""The subcommands of ``lit-merge``: what each is for, its page of help, and where its function is.

Data only, so that the help pages cost no imports. The options listed here are those that most runs
need; a test holds them against the parsers.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

_WIDTH = 96  # characters of a help page


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: What the user types.
        summary: One line for the list of commands.
        function: ``"module:function"``; the function takes the arguments after the command's name
            and returns the exit status.
        usage: What stands after the name in the usage line.
        text: What the command does, in a few sentences.
        options: The options that most runs need, with what they do; empty when the command prints
            its own help.
        example: One command line that works.
    """

    name: str
    summary: str
    function: str
    usage: str
    text: str
    options: tuple[tuple[str, str], ...]
    example: str

    def page(self) -> str:
        """Return the page that ``lit-merge NAME --help`` prints."""
        width = max(len(option) for option, _ in self.options)
        options = "\n".join(f"  {option:<{width}}  {text}" for option, text in self.options)
        return (
            f"usage: lit-merge {self.name} {self.usage}\n\n"
            f"{textwrap.fill(self.text, _WIDTH)}\n\n"
            f"options:\n{options}\n\n"
            f"example:\n  {self.example}\n\n"
            f'Every option: "lit-merge {self.name} --help_all".\n'
            f'A configuration to start from: "lit-merge {self.name} --print_config".'
        )


_CONFIG = ("--config FILE", "YAML with any of the options; may be given several times")
_TRAINER = ("--trainer.NAME VALUE", "an argument of the Trainer: accelerator, devices, strategy, …")
_REPLACE = ("--replace", "replace an existing output")
_JSON = ("--json", "print one JSON object instead of text")
_NETWORK = ("--model CLASS", "the network: TransformersClassifier, TimmClassifier, an nn.Module")

COMMANDS: tuple[Command, ...] = (
    Command(
        name="fit",
        summary="fine-tune an expert; callbacks gather what a merge needs",
        function="lit_merge.cli.fit:main",
        usage="--config FILE [options]",
        text="Trains with Lightning's Trainer. With the DiagonalHessian callback the run ends with "
        'an expert folder (<checkpoint folder>/expert) that "lit-merge merge" takes.',
        options=(
            _CONFIG,
            (
                "--model CLASS",
                "a LightningModule: TransformersClassifier, TimmClassifier, your own",
            ),
            ("--model.NAME VALUE", "an argument of that class"),
            ("--data CLASS", "a LightningDataModule: TaskDataModule, your own"),
            _TRAINER,
            ("--trainer.callbacks+=CLASS", "add a callback: DiagonalHessian, ActivationStatistics"),
            ("--trainer.logger CLASS", "CSVLogger, TensorBoardLogger: losses and learning rates"),
            ("--ckpt_path FILE", "resume a training run from this Lightning checkpoint"),
            _JSON,
        ),
        example="lit-merge fit --config configs/fit_text.yaml --trainer.max_epochs 1",
    ),
    Command(
        name="curvature",
        summary="gather the Hessian of a checkpoint that was trained without the callback",
        function="lit_merge.cli.curvature:main",
        usage="--config FILE [options]",
        text="One pass over the training data that writes an expert folder: the weights and the "
        "diagonal of their Hessian. A pass that was stopped goes on where it was when the command "
        "is repeated.",
        options=(
            _CONFIG,
            ("--model CLASS", "the LightningModule whose training_step is the loss"),
            ("--data CLASS", "the data module with the training data"),
            ("--checkpoint PATH", "the weights: checkpoint file, Hugging Face or expert folder"),
            ("--output FOLDER", "the expert folder to write"),
            ("--max_examples N", "a random subset of so many examples"),
            ("--estimator NAME", "exact (the Fisher information), hutchinson (Hessian) or none"),
            ("--labels NAME", "sampled, expected (over all classes) or observed"),
            ("--gram true", "gather the layers' Gram matrices as well: for RegMean"),
            ("--kronecker true", "gather Kronecker factors as well: for MaTS"),
            _TRAINER,
            _REPLACE,
            _JSON,
        ),
        example="lit-merge curvature --config configs/curvature.yaml",
    ),
    Command(
        name="align",
        summary="bring experts of different bases into one order of units",
        function="lit_merge.cli.align:main",
        usage="--config FILE [options]",
        text="Finds the permutation symmetries of the model, proves them, matches every base with "
        "the first group's by activations or weights, and writes the permuted experts beside the "
        "midpoint of the bases, ready to be merged. Every expert computes what it did.",
        options=(
            _CONFIG,
            _NETWORK,
            ("--groups MAPPING", "by group: its base and its experts by task (configs/align.yaml)"),
            ("--tasks FILE", "YAML with a Task per name, whose examples need no labels"),
            ("--by WORD", "weights, activations, both or none; auto: activations, given tasks"),
            ("--input_shape LIST", "shape of one input, where there are no tasks: [3,224,224]"),
            ("--cycle_consistent", "match every base with all others"),
            ("--output FOLDER", "the folder to write"),
            _REPLACE,
            _JSON,
        ),
        example="lit-merge align --config configs/align.yaml --by weights",
    ),
    Command(
        name="merge",
        summary="merge experts into one model, from files to files, without data",
        function="lit_merge.cli.merge:main",
        usage="--config FILE [options]",
        text="Reads base, experts and Hessians in small pieces, on every core, and writes the "
        "merged folder; memory does not grow with the model. Takes Lightning and torch "
        "checkpoints, safetensors, Hugging Face and timm folders, distributed checkpoints, LoRA "
        "adapters and URLs. A merge that was killed goes on when the same command runs again. "
        "Under torchrun each process writes its share.",
        options=(
            _CONFIG,
            ("--base PATH", "the model that the experts were fine-tuned from"),
            ("--experts.TASK PATH", "an expert: folder, checkpoint file or LoRA adapter"),
            ("--groups MAPPING", "instead: experts by base (configs/merge_groups.yaml)"),
            ("--method CLASS", "GradientMatching, TaskArithmetic, TIES, … (docs/methods.md)"),
            ("--method.NAME VALUE", "an argument of the method"),
            ("--scale VALUE", "the method's scale; auto for the forecast's"),
            ("--overrides MAPPING", "another method, scale or action, by pattern of tensor names"),
            ("--output FOLDER", "the merged folder to write, or its URL"),
            ("--sweep MAPPING", "values by setting: a folder for each, from one reading"),
            ("--format FORM", "safetensors, lightning, distributed or adapter"),
            ("--plan", "say what would happen to each tensor, and write nothing"),
            _REPLACE,
            _JSON,
        ),
        example="lit-merge merge --config configs/merge.yaml --method TIES --method.density 0.2",
    ),
    Command(
        name="forecast",
        summary="say what a merge will cost each task, from curvature alone, without data",
        function="lit_merge.cli.forecast:main",
        usage="--config FILE [options]",
        text="Takes the YAML of merge, reads base, experts and Hessians once, and writes no model: "
        "the expected increase of every task's loss, by layer and over scales, and the scale of "
        "the least total. A first guess: its sizes are too small, often by orders of "
        "magnitude.",
        options=(
            _CONFIG,
            ("--method CLASS", "the planned method; any that merge takes"),
            ("--method.NAME VALUE", "an argument of the method"),
            ("--scales LIST", "the scales of the curve: [0,0.2,0.4]"),
            ("--weighting WORD", "mean: every task counts alike; sum: every training example does"),
            ("--output FILE", "the .json file to write; a merge's folder here is left alone"),
            ("--plot FILE", "the picture to write: .png, .svg or .pdf"),
            _REPLACE,
            _JSON,
        ),
        example="lit-merge forecast --config configs/merge.yaml --plot forecast.png",
    ),
    Command(
        name="correct",
        summary="repair a merged model with a few unlabelled examples per task",
        function="lit_merge.cli.correct:main",
        usage="--config FILE [options]",
        text="Sets a scale and a shift per task and channel so that the merged model's activations "
        "match each expert's (TACT, closed form), then refines them in a short fit to the experts' "
        "outputs. Without a merged folder, the experts are merged first; groups of experts by base "
        "are aligned before.",
        options=(
            _CONFIG,
            _NETWORK,
            ("--merged FOLDER", 'what "lit-merge merge" wrote'),
            ("--experts.TASK PATH", "the experts, which teach; with --base PATH they are merged"),
            ("--groups MAPPING", "instead: experts by base (configs/correct_groups.yaml)"),
            ("--least_squares.NAME VALUE", "solve the layers for the experts' activations first"),
            ("--tasks FILE", "YAML with one Task per name: TextTask, ImageTask, your own"),
            ("--tasks.TASK.NAME VALUE", "an argument of one of them"),
            ("--output FOLDER", "the corrected folder to write"),
            ("--trainer.max_steps N", "steps of the learned fit; 0: the closed form only"),
            ("--trainable all", "learn the shared weights too, not scale and shift alone"),
            ("--heads refit", "learn the heads as well"),
            ("--holdout SHARE", "examples to measure on; the fit ends with its best state"),
            _TRAINER,
            _REPLACE,
            _JSON,
        ),
        example="lit-merge correct --config configs/correct.yaml --trainer.max_steps 100",
    ),
    Command(
        name="evaluate",
        summary="test base, experts, merged and corrected models on every task",
        function="lit_merge.cli.evaluate:main",
        usage="--config FILE [options]",
        text="Accuracy and negative log-likelihood of every model on every task's test examples, "
        "as a table and in evaluation.json.",
        options=(
            _CONFIG,
            _NETWORK,
            ("--models.NAME PATH", "a model to test: base, expert, merged or corrected"),
            ("--tasks FILE", "YAML with one Task per name"),
            ("--linear_probe", "add the control: a linear head fitted on the base's features"),
            ("--variance", "measure the activations' variance by site"),
            ("--output FILE", "the evaluation.json to write"),
            _TRAINER,
            _REPLACE,
            _JSON,
        ),
        example="lit-merge evaluate --config configs/evaluate.yaml --json",
    ),
    Command(
        name="export",
        summary="write one task's plain model: masked or corrected weights, with its head",
        function="lit_merge.cli.export:main",
        usage="--merged FOLDER (--task NAME | --tasks LIST) --output FOLDER [options]",
        text="Takes a task's model out of a merged folder, as a folder that transformers, timm or "
        "Lightning loads without lit-merge. After a merge with masks (TALLMasks, EMR) it is the "
        "masked model of this task; the base is read again for it. After lit-merge correct the "
        "scales and shifts are folded into the weights, and the result is proved against the "
        "corrected model; what cannot be folded comes beside it as a file of Python for torch "
        "alone.",
        options=(
            _CONFIG,
            ("--merged FOLDER", 'what "lit-merge merge" wrote'),
            ("--task NAME", "the task"),
            ("--tasks LIST", "several tasks, [svhn,dtd], or all: a folder in the output for each"),
            ("--output FOLDER", "the folder to write"),
            ("--base PATH", "what was merged onto, where it has moved"),
            ("--model CLASS", "the network; for a corrected folder"),
            ("--examples FILE", "YAML with one Task per name, to prove a corrected export with"),
            ("--fold NAME", "possible, or require: all corrections must be in the weights"),
            ("--format NAME", "safetensors, lightning, or multi_task: all tasks in one file"),
            ("--dtype NAME", "the floating type to write"),
            _REPLACE,
            _JSON,
        ),
        example="lit-merge export --merged merged/ --task svhn --output svhn/",
    ),
    Command(
        name="report",
        summary="write one self-contained HTML page from evaluation.json and merged folders",
        function="lit_merge.cli.report:main",
        usage="FILE [FILE …] [options]",
        text="Tables, plots, what each step brings, curves over the scale, what the experts have "
        "in common by layer, forecast against measured, the learned scales, the record of every "
        "tensor and how to repeat it, in one file without external parts.",
        options=(
            ("FILE", "evaluation.json, forecast.json; merged, corrected, aligned, expert folders"),
            ("--base PATH", "what expert folders were fine-tuned from"),
            ("--overlap false", "do not read the experts of merges to compare them"),
            ("--output FILE", "the HTML file to write (default: report.html)"),
            ("--title TEXT", "the page's title"),
            _REPLACE,
            _JSON,
        ),
        example="lit-merge report evaluation.json merged/ corrected/ --output report.html",
    ),
    Command(
        name="inspect",
        summary="say what a file or folder holds, and what is wrong with it",
        function="lit_merge.cli.inspect:main",
        usage="PATH [PATH …] [options]",
        text="Kind, tensors, sizes, types, fingerprint, state of the training, a summary of the "
        "curvature, and warnings: NaN, a Hessian of other weights, missing shards, what a stopped "
        "run has left. Takes checkpoints of every kind, adapters, what lit-merge writes, records "
        "and YAML; several experts are compared. Runs nothing that is in a file.",
        options=(
            ("PATH", "a file or a folder"),
            ("--tensors", "list every tensor"),
            ("--headers", "read no weights: faster, but NaN in them is not found"),
            _JSON,
        ),
        example="lit-merge inspect runs/svhn runs/dtd",
    ),
    Command(
        name="run",
        summary="run a recipe: a whole experiment, from training to the report, in one YAML",
        function="lit_merge.cli.run:main",
        usage="--config FILE [options]",
        text="Runs the commands of a recipe, one after the other, with its variables filled in. "
        "Each command's options are kept in the run's folder, under steps/, so that it can be "
        "repeated by hand. When the same recipe is run again, what is done is skipped, and what "
        "has changed is done again with all after it.",
        options=(
            ("--config FILE", "the recipe: variables and steps"),
            ("--variables.NAME VALUE", "another value for one of its variables"),
            ("--list", "say what would be done, and do nothing"),
            _JSON,
        ),
        example="lit-merge run --config configs/run_text.yaml --variables.output runs/text-1",
    ),
    Command(
        name="completion",
        summary="print a script with which bash, zsh or fish completes lit-merge's commands",
        function="lit_merge.cli.completion:main",
        usage="SHELL",
        text="Completes commands, options, the names of classes and files. The script knows the "
        "installed version; print it again after an update.",
        options=(("SHELL", "bash, zsh or fish"),),
        example='eval "$(lit-merge completion bash)"    # in ~/.bashrc',
    ),
    Command(
        name="demo",
        summary="train, merge, correct, evaluate and report on real digits, in minutes",
        function="lit_merge.demo:main",
        usage="[options]",
        text="The whole way on scikit-learn's bundled handwritten digits, without downloads.",
        options=(),
        example="lit-merge demo",
    ),
)


def overview() -> str:
    """Return the page that ``lit-merge --help`` prints."""
    rows = "\n".join(f"  {command.name:<10} {command.summary}" for command in COMMANDS)
    return (
        "usage: lit-merge COMMAND [--config FILE] [options]\n\n"
        "Merge fine-tuned models: train experts with Lightning, merge them by their curvature,\n"
        "repair and measure the result.\n\n"
        f"commands:\n{rows}\n\n"
        '"lit-merge COMMAND --help" describes a command, "--help_all" lists all its options, and\n'
        '"--print_config" prints a configuration to start from.\n\n'
        "Several devices: lit-merge fit … --trainer.devices 2, or torchrun … -m lit_merge fit …\n"
        "LIT_MERGE_TRACEBACK=1 shows the traceback of an input error.\n\n"
        "exit status:\n"
        "  0 done, 1 a bug, 2 an input that cannot be used, 3 out of memory or disk space,\n"
        "  130 interrupted, 143 terminated"
    )
