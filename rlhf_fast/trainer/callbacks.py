"""transformers' callbacks in our loops: its handler, state and control, called at its events.

`on_init_end` when models and optimiser are there, `on_train_begin`, then for each step
`on_step_begin`, `on_step_end`, `on_log` (the row of metrics.jsonl); where the step is one of
`eval_every`, or a callback wants it, `on_log` and `on_evaluate`; where a checkpoint was written,
`on_save`; at last `on_train_end`. A callback stops the run, saves or evaluates by
`control.should_training_stop`, `.should_save` and `.should_evaluate`; of several processes the main
one's word counts. A step is one of ours: a batch of answers, or of pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, ExportableState

from rlhf_fast.trainer.config import RunConfig
from rlhf_fast.trainer.distributed.workers import Workers
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.evaluate import mean_of
from rlhf_fast.trainer.given import Given
from rlhf_fast.trainer.run.console import console
from rlhf_fast.trainer.run.folder import Run

LOWER_IS_BETTER = ("kl", "loss")


class KLStop(TrainerCallback):
    """Ends a run whose policy has gone as far from the reference as it may."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        kl = (logs or {}).get("objective/kl")
        if kl is not None and kl > self.limit:
            control.should_training_stop = True


class Callbacks:
    """A part of a checkpoint: what the callbacks count, the best evaluation, whether one of them
    has ended the run."""

    came_later = True  # checkpoints of before 0.2 have no such part

    def __init__(
        self,
        given: Given,
        config: RunConfig,
        steps: int,
        run: Run,
        workers: Workers,
        *,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        optimizer: Any,
        schedule: Any,
    ) -> None:
        self.config, self.run, self.workers = config, run, workers
        self.metric = f"eval_{config.metric_for_best_model}"
        self.args = arguments(config, steps)
        self.state = TrainerState(
            max_steps=steps, logging_steps=1, save_steps=config.save_every,
            eval_steps=config.eval_every, is_local_process_zero=workers.is_main,
            is_world_process_zero=workers.is_main,
        )  # fmt: skip
        self.control = TrainerControl()
        own = [DefaultFlowCallback(), *given.callbacks, *asked_for(config)]
        self.handler = CallbackHandler(own, model, tokenizer, optimizer, schedule)
        self.answers: dict[str, list] | None = None  # of the last step, if it was evaluated
        self.was_stopped = False  # before the run was continued
        self.event("on_init_end")

    def event(self, name: str, **values: Any) -> None:
        """All callbacks, in all processes; one that fails in one ends all."""
        call = getattr(self.handler, name)
        self.control = self.workers.attempt(
            lambda: call(self.args, self.state, self.control, **values)
        )[self.workers.rank]

    def wanted(self, flag: str) -> bool:
        return self.workers.main_only(lambda: getattr(self.control, flag))

    # ---------------------------------------------------------------------- in the loop

    def steps(self, first: int, history: list[dict[str, Any]]) -> Iterator[int]:
        """The steps that are left, until the last one or until a callback ends the run."""
        self.state.global_step = first
        self.state.log_history = [dict(row) for row in history]
        try:
            self.event("on_train_begin")
        except AssertionError as error:  # transformers' way to say what an option lacks
            raise InputError(f"callbacks: {error}") from None
        self.control.should_training_stop |= self.was_stopped
        while self.state.global_step < self.state.max_steps and not self.stopped():
            self.answers = None
            self.event("on_step_begin")
            yield self.state.global_step
        if self.state.global_step < self.state.max_steps and self.workers.is_main:
            console.print(f"ended by a callback after step {self.state.global_step}")

    def stopped(self) -> bool:
        return self.wanted("should_training_stop")

    def step_ended(self, row: dict[str, Any], per_epoch: float = math.inf) -> None:
        """per_epoch: steps in a pass over the data."""
        self.state.global_step = row["step"]
        self.state.epoch = row["step"] / per_epoch
        self.event("on_step_end")
        self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        self.state.log_history.append(dict(row))
        self.event("on_log", logs=dict(row))

    def evaluates(self) -> bool:
        return self.wanted("should_evaluate")

    def evaluated(self, answers: dict[str, list]) -> None:
        """answers: columns of numbers, of which the means are the metrics, and of texts, which go
        into metrics/eval.jsonl beside them."""
        self.answers, step = answers, self.state.global_step
        texts = {name: x for name, x in answers.items() if x and not is_number(x[0])}
        numbers = {name: x for name, x in answers.items() if name not in texts}
        metrics = {f"eval_{name}": mean_of(x) for name, x in numbers.items()}
        self.run.log_evaluation({"step": step, **metrics, "samples": answers if texts else {}})
        if texts:
            self.answered(answers)
        if self.workers.is_main:
            self.workers.log({"step": step, **metrics})
            said = "  ".join(f"{name[5:]} {value:.3g}" for name, value in metrics.items())
            console.print(f"step {step} evaluated: {said}")
        self.log({"step": step, **metrics})
        self.event("on_evaluate", metrics=dict(metrics))
        if self.better(metrics[self.metric]):
            self.state.best_metric = metrics[self.metric]
            self.state.best_global_step = step
            self.state.best_model_checkpoint = str(self.run.checkpoint_of(step))
            if self.config.load_best_model_at_end:
                self.run.best, self.control.should_save = step, True

    def answered(self, answers: dict[str, list], of: int | None = None) -> dict[str, list]:
        """Keeps and shows the answers of an evaluation; of: the step whose weights gave them, if
        it is not the last one."""
        step = self.state.global_step
        self.run.save_completions(step if of is None else of, answers)
        if self.workers.is_main:
            self.workers.log_answers(step, answers)
        return answers

    def better(self, value: float) -> bool:
        best = self.state.best_metric
        if best is None:
            return True
        return value > best if self.args.greater_is_better else value < best

    def saves(self) -> bool:
        """A run that is ended keeps what it was ended with."""
        return self.wanted("should_save") or self.stopped()

    def saved(self, save: Callable[[], None]) -> None:
        """save: writes the checkpoint; once more if it is now that a callback ends the run."""
        ended = self.stopped()
        self.event("on_save")
        if self.stopped() and not ended:
            save()

    def best_step(self) -> int | None:
        """The step whose weights are to be the trained model's, if it is not the last one."""
        best = self.state.best_global_step if self.config.load_best_model_at_end else None
        if not best or best == self.state.global_step:
            return None
        self.answers = None
        return best

    def summary(self) -> dict[str, Any]:
        """Whether the run came to its end, and whose weights the model has."""
        made, found = self.state.global_step, {}
        if made < self.state.max_steps:
            found["ended_after_step"] = made
        if self.config.load_best_model_at_end and self.state.best_global_step:
            found["best_step"] = self.state.best_global_step
            found[f"best_{self.config.metric_for_best_model}"] = self.state.best_metric
        return found

    def end(self) -> None:
        self.event("on_train_end")

    # ------------------------------------------------------------------- in a checkpoint

    def exportable(self) -> list[TrainerCallback]:
        return [x for x in self.handler.callbacks if isinstance(x, ExportableState)]

    def state_dict(self) -> dict[str, Any]:
        parts = TrainerState(stateful_callbacks=self.exportable()).stateful_callbacks
        state = {
            "metric": self.metric, "best_metric": self.state.best_metric,
            "best_step": self.state.best_global_step or 0, "max_steps": self.state.max_steps,
            "stopped": self.control.should_training_stop, "callbacks": parts,
        }  # fmt: skip
        try:
            return json.loads(json.dumps(state))
        except TypeError as error:
            raise InputError(f"callbacks: the state of one cannot be saved: {error}") from None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state["callbacks"], dict):
            raise TypeError(f"callbacks={state['callbacks']}")
        if state["metric"] == self.metric and state["best_step"]:
            self.state.best_metric, step = float(state["best_metric"]), int(state["best_step"])
            self.state.best_global_step = step
            self.state.best_model_checkpoint = str(self.run.checkpoint_of(step))
            self.run.best = step if self.config.load_best_model_at_end else None
        # A run that was ended and is given more steps goes on.
        self.was_stopped = bool(state["stopped"]) and state["max_steps"] == self.state.max_steps
        kept = {name: x if isinstance(x, list) else [x] for name, x in state["callbacks"].items()}
        for callback in self.exportable():
            if of_one := kept.get(type(callback).__name__):
                vars(callback).update(of_one.pop(0)["attributes"])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def asked_for(config: RunConfig) -> list[TrainerCallback]:
    """Those of the options."""
    made: list[TrainerCallback] = []
    if config.early_stopping_patience is not None:
        made.append(EarlyStoppingCallback(config.early_stopping_patience))
    if getattr(config, "stop_at_kl", None) is not None:
        made.append(KLStop(config.stop_at_kl))
    return made


def arguments(config: RunConfig, steps: int) -> TrainingArguments:
    """Our options by the names that callbacks know; the rest stay at transformers' default."""
    args = TrainingArguments(
        output_dir=config.output_dir, max_steps=steps, seed=config.seed,
        per_device_train_batch_size=config.batch_size, learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm, warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler_type, logging_steps=1,
        save_strategy="steps", save_steps=config.save_every,
        save_total_limit=config.save_total_limit,
        eval_strategy="no" if config.eval_every is None else "steps", eval_steps=config.eval_every,
        metric_for_best_model=config.metric_for_best_model,
        greater_is_better=config.metric_for_best_model not in LOWER_IS_BETTER,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    # Given above it would be refused: transformers wants the two intervals to be multiples.
    args.load_best_model_at_end = config.load_best_model_at_end
    return args
