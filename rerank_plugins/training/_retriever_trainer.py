"""sentence-transformers' trainer for a bi-encoder: resumable runs that keep the best checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rerank_plugins._extras import import_extra
from rerank_plugins._machine import native_bf16
from rerank_plugins._paths import write_file
from rerank_plugins.errors import ConfigurationError
from rerank_plugins.training.settings import Progress

EVALUATIONS = 5
"""Number of evaluations, spread evenly over the steps."""

MEASURES = {"nDCG@10": "cosine_ndcg@10", "MRR@10": "cosine_mrr@10"}
"""Our names of the measures, and those of sentence-transformers' evaluator."""

_BEST_BY = f"eval_dev_{MEASURES['nDCG@10']}"
_CHECKPOINT_S = 120.0
_FILE = "run.json"


@dataclass(slots=True)
class Run:
    """State of a run that a resumption needs.

    Attributes:
        folder: Directory of this state and of the checkpoints.
        settings: Keywords and digests of the data: all that decides the result.
        before: Measures of the dev queries before training; empty until measured.
        seconds: Time spent on training, up to the last checkpoint.
    """

    folder: Path
    settings: dict[str, Any]
    before: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self) -> None:
        """Writes it, at once or not at all."""
        content = {"settings": self.settings, "before": self.before, "seconds": self.seconds}
        write_file(self.folder / _FILE, json.dumps(content, indent=2) + "\n")


def resume(folder: Path, settings: dict[str, Any]) -> Run:
    """The interrupted run in a folder, or a new one.

    Raises:
        ConfigurationError: If the folder holds a run with other settings or data.
    """
    file = folder / _FILE
    if file.is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(name for name, value in settings.items() if saved["settings"].get(name) != value)
        if not differing:
            return Run(folder, settings, saved["before"], saved["seconds"])
        if _last_checkpoint(folder) is not None:
            raise ConfigurationError(
                f"{folder} holds an interrupted run with other settings or data ({', '.join(differing)}). Call with "
                "its settings to go on with it, delete that folder to begin anew, or give another directory."
            )
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, settings)
    run.save()
    return run


def fit_encoder(encoder: Any, data: Any, evaluator: Any, run: Run, progress: Progress | None) -> Path:
    """Trains an encoder in place with sentence-transformers' trainer, from the run's last checkpoint on.

    Args:
        encoder: The `SentenceTransformer`.
        data: A dataset with the columns ``anchor``, ``positive``, ``negative``, and ``label`` for margin MSE.
        evaluator: Measures the dev queries; None without any.
        run: The run.
        progress: Called with a line of news and the share done.

    Returns:
        The checkpoint to keep: the best one by nDCG@10, or the last without dev queries.
    """
    last = _last_checkpoint(run.folder)
    # From a checkpoint of the last step, the trainer would take one step more.
    if last is None or _step(last) < run.settings["steps"]:
        _train(encoder, data, evaluator, run, last, progress)
        last = run.folder / f"checkpoint-{run.settings['steps']}"
    best = run.folder / f"checkpoint-{_state(last)['best_global_step']}"
    return best if best.is_dir() else last


def _train(encoder: Any, data: Any, evaluator: Any, run: Run, last: Path | None, progress: Progress | None) -> None:
    st: Any = import_extra("sentence_transformers", "train")
    losses: Any = import_extra("sentence_transformers.sentence_transformer.losses", "train")
    util: Any = import_extra("sentence_transformers.util", "train")
    callbacks: Any = import_extra("transformers.trainer_callback", "train")
    settings, kind = run.settings, encoder.device.type
    contrastive = settings["loss"] == "multiple-negatives"
    prompts = {"anchor": encoder.prompts.get("query"), "positive": encoder.prompts.get("document")}
    prompts["negative"] = prompts["positive"]
    every = math.ceil(settings["steps"] / EVALUATIONS)
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(run.folder),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=0.1,
        seed=settings["seed"],
        # With a text twice in a batch, it would be its own negative.
        batch_sampler="no_duplicates" if contrastive else "batch_sampler",
        prompts={column: prompt for column, prompt in prompts.items() if prompt} or None,
        use_cpu=kind == "cpu",
        bf16=native_bf16(kind, "train"),
        eval_strategy="no" if evaluator is None else "steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        # The best and the newest one; with 1, the trainer deletes the newest at the end.
        save_total_limit=2,
        metric_for_best_model=None if evaluator is None else _BEST_BY,
        greater_is_better=None if evaluator is None else True,
        logging_steps=max(1, min(20, settings["steps"] // 20)),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=kind == "cuda",
    )
    # One GPU, whatever the machine has, so that a batch is what was asked for.
    arguments._n_gpu = min(1, arguments.n_gpu)
    if contrastive:
        loss = losses.MultipleNegativesRankingLoss(encoder)
    else:
        loss = losses.MarginMSELoss(encoder, similarity_fct=util.pairwise_cos_sim)
    trainer = _trainer_class(st)(
        model=encoder,
        args=arguments,
        train_dataset=data,
        evaluator=evaluator,
        loss=loss,
        callbacks=[_reporter(callbacks.TrainerCallback, run, progress)],
    )
    trainer.remove_callback(callbacks.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _trainer_class(st: Any) -> Any:
    class Trainer(st.SentenceTransformerTrainer):  # type: ignore[misc]
        """Without the trainer's model cards, which ask the Hub, show bars, and tokenise the data for statistics."""

        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            """Adds none."""

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Saves the model alone."""
            self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)

    return Trainer


def _reporter(base: Any, run: Run, progress: Progress | None) -> Any:
    total = run.settings["steps"]
    began = time.monotonic() - run.seconds

    class Reporter(base):  # type: ignore[misc]
        """Reports progress, and asks for a checkpoint when the last one is old."""

        saved = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            """Tells the loss."""
            if progress is not None and "loss" in logs:
                done = state.global_step
                progress(f"step {done} of {total}: loss {float(logs['loss']):.4f}", done / total)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
            """Tells the measure."""
            if progress is not None:
                value = metrics[_BEST_BY]
                progress(f"step {state.global_step} of {total}: dev nDCG@10 {value:.4f}", state.global_step / total)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Asks for a checkpoint."""
            if time.monotonic() - self.saved >= _CHECKPOINT_S:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Notes the time spent."""
            self.saved = time.monotonic()
            run.seconds = self.saved - began
            run.save()

    return Reporter()


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what a kill left of others is deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=_step)
    while found:
        try:
            # The trainer writes it last.
            _state(found[-1])
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
        else:
            return found[-1]
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state
