"""What every training command does: one run with its folder, checkpoints, resuming, plan and log."""

import dataclasses
import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm

from diffusers_dpm.data import describe, load_data, load_held_out_data
from diffusers_dpm.errors import DiffusersDPMError, NonFiniteLossError, deferred_interrupts, user_error
from diffusers_dpm.networks import LONG, NoProgress, Progress, check_finite, duration
from diffusers_dpm.options import flag
from diffusers_dpm.processes import Processes
from diffusers_dpm.records import LOCK, fingerprint, remove_folder, short_hash, write_json, write_text, writing
from diffusers_dpm.run_folder import RunFolder
from diffusers_dpm.training import checkpoints
from diffusers_dpm.training.loop import Loss, StepRecord, batch_shares, seconds_of_step, training_steps
from diffusers_dpm.training.state import TrainingState
from diffusers_dpm.training.timestep_sampling import timestep_quantile


MANY_EPOCHS = 4000  # twice those of the DDPM paper on CIFAR-10
METRICS_LOG = "metrics.csv"  # beside the events of TensorBoard
# Options of the invocation, not of the run; not saved.
CALL_OPTIONS = frozenset({"resume", "overwrite", "dry_run", "push_to_hub", "hub_private"})
# What a resumed run may change of its further course; the log says from which step on.
LOGGED_CHANGES = ("learning_rate", "batch_size", "max_train_steps")

# What else it may change: nothing that its weights depend on, beyond rounding.
MAY_CHANGE = frozenset(
    {
        *("data", "unet_config", "classifier_config"),  # their content is compared
        *("output_dir", "checkpoint_every", "checkpoints_total_limit", "log_with", "log_every"),
        *("sample_every", "sample_steps", "num_samples", "eval_split", "eval_data", "eval_draws", "eval_every"),
        *("cache_gigabytes", "dataloader_num_workers", "gradient_accumulation_steps", "cpu"),
        *("gradient_checkpointing", "compile"),
        *LOGGED_CHANGES,
    }
)

NUM_COMPARED = 64  # images by which the data of a resumed run is known again


class Trainer(ABC):
    """One training run. Whatever can be refused is refused on construction, before anything is written.

    A subclass builds the network and the loss, and says how the model is saved and what the run leaves.

    Args:
        options: what to train, on what and how: the groups of options that all commands share, and the subclass's.
        run_folder: where checkpoints, log and options lie.
        result: what a finished run has left; without checkpoints it cannot be resumed, and must not be replaced.

    Attributes:
        data, loss, state: what is trained on, towards, and trained.
        eval_data: what accuracy, or the held-out loss, is measured on; None if the options name nothing.

    Raises:
        DiffusersDPMError: options that contradict each other, the data, the run folder or the checkpoint to resume.
    """

    conditional: bool = True  # whether the loss gets the labels
    component: ClassVar[Path] = RunFolder.classifier  # what is trained; in a checkpoint, with the averaged weights
    command: str  # that starts such a run: subcommand and operands

    def __init__(self, options: Any, run_folder: Path, result: Path):
        self.run_folder, self.files = run_folder, RunFolder(run_folder)
        self.found = checkpoints.find_checkpoints(options, run_folder)
        if options.resume and not self.found and result.exists():
            ways = "'train --init-from RUN' goes on from a U-Net's weights, --overwrite trains anew"
            raise DiffusersDPMError(f"{run_folder} has no checkpoints left, and this would replace {result}: {ways}")
        trackers = trackers_of(options)
        with user_error("accelerate"):
            self.accelerator = Accelerator(
                cpu=options.cpu,
                mixed_precision=options.mixed_precision,
                log_with=trackers or None,
                project_dir=self.files.logs,
            )
        self.options = dataclasses.replace(options, mixed_precision=self.accelerator.mixed_precision)
        batch_shares(options, self.accelerator)
        set_seed(options.seed)
        with self.accelerator.main_process_first():  # which fills the cache of `datasets`
            self.data = load_data(self.options, require_labels=self.conditional)
            self.eval_data = load_held_out_data(self.options, self.data, require_labels=self.conditional)
        self.options = dataclasses.replace(self.options, split=self.data.source.split)
        model, self.loss = self._build()
        timestep_quantile(self.loss.schedule, self.options)  # refuses what has no meaning
        self.state = TrainingState(model, self.options, self.accelerator, len(self.loss.schedule))
        self.checkpointed_step: int | None = None
        self.changes: list[str] = []  # of the options, on resuming
        self.images_seen = 0
        self.damaged: dict[Path, str] = {}  # checkpoints, and why
        for checkpoint in self.found:
            try:
                self._load(checkpoint)
                break
            except checkpoints.DamagedCheckpointError as error:
                self.damaged[checkpoint] = str(error)
        if self.damaged and self.checkpointed_step is None:
            raise DiffusersDPMError(f"no whole checkpoint: {'; '.join(self.damaged.values())}")

    @abstractmethod
    def _build(self) -> tuple[torch.nn.Module, Loss]:
        """The network for `self.data`, and its loss."""

    def _save_model(self, model: Any, folder: Path) -> None:
        """Write a model into `folder`, as its part `self.component`."""
        model.save_pretrained(folder / self.component)

    @abstractmethod
    def _finish(self) -> str:
        """Leave what the run is for; called by the main process at the end. Returns a line about it."""

    def _delete(self) -> None:
        """Delete all that the run has written, and what was made from its model: what `--overwrite` does."""
        self.files.delete()

    def _held_out_figures(self, first: int, step: int) -> dict[str, float]:
        """What else stands in the log entry of the steps `first` .. `step`; the same names in every entry."""
        return {}

    def _after_step(self, step: int) -> None:  # noqa: B027 (optional)
        """Called by all processes after each optimiser step."""

    def run(self, progress: Progress | None = None) -> Path:
        """Train; returns the run folder. With `dry_run` only prints what would happen.

        Args:
            progress: gets `update(1)` after each optimiser step.

        Raises:
            NonFiniteLossError: names the step and the last good checkpoint.
            DataError: an image that is read during training is broken.
        """
        self.accelerator.print(self.plan())
        if not self.options.dry_run:
            lock = Processes(self.accelerator).locked(self.run_folder / LOCK)
            with lock, thread_errors_hidden(), self._log_open():
                self._open_run_folder()
                self._train(NoProgress() if progress is None else progress)
                self._checkpoint()
                self.state.end_sharding()
                done = self._finish() if self.accelerator.is_main_process else ""
                self.accelerator.wait_for_everyone()
            self.accelerator.print(f"trained {self.state.step} steps; {done}")
        return self.run_folder

    def plan(self) -> str:
        """What the run does, in a few aligned lines."""
        options, data, accelerator = self.options, self.data, self.accelerator
        parameters = sum(parameter.numel() for parameter in self.state.parameters)
        names = ", ".join(data.class_names or ())
        classes = f", {data.num_classes} classes" + (f": {names}" if names else "") if data.num_classes else ""
        done = f"{self.images_seen:,} images in {self.state.step:,} steps, then " if self.state.step else ""
        # float32: the model, and in a checkpoint also the raw weights and AdamW's two moments, unless of 8 bits
        model, checkpoint = 4 * parameters / 1e6, (16 if options.optimizer == "adamw" else 10) * parameters / 1e6
        num = 1 + (options.max_train_steps - 1) // options.checkpoint_every if options.checkpoint_every else 1
        num = min(num, options.checkpoints_total_limit or num)
        snapshots = -(-options.max_train_steps // options.ema_snapshot_every) if options.ema_snapshot_every else 0
        snapshot = 4 * len(self.state.power_averages) * parameters / 1e6
        checkpoint += snapshot
        averages = f", {snapshots} x snapshot {snapshot:,.1f} MB" if snapshots else ""
        time = "none: all steps are done"
        if self.steps_left:
            each, whole = map(duration, (self.seconds_a_step, self.seconds_a_step * self.steps_left))
            time = f"about {each} a step, {whole} in all, measured here"
        padded = "" if data.shape == data.picture_shape else f", padded to {data.shape[1]}x{data.shape[2]}"
        lines = {
            "data": f"{len(data):,} images, {describe(data.picture_shape)}{padded}{classes}",
            "network": f"{parameters:,} parameters",
            "training": f"{done}{self.steps_left:,} steps x {options.batch_size} images = "
            f"{self.images_in_all:,} images, {self.images_in_all / len(data):,.1f} epochs",
            "time": time,
            "device": f"{accelerator.device}, processes {accelerator.num_processes}"
            f"{', each with a part of the network (FSDP)' if self.state.is_sharded else ''}, accumulation steps "
            f"{options.gradient_accumulation_steps}, mixed precision {accelerator.mixed_precision}",
            "disk": f"{model + num * checkpoint + snapshots * snapshot:,.1f} MB: model {model:,.1f} MB, "
            f"{num} x checkpoint {checkpoint:,.1f} MB{averages}; the log and pictures beside",
            "run folder": str(self.run_folder),
        }
        text = [f"{name:<12}{line}" for name, line in lines.items()]
        if self.changes:
            text.append(f"changed     from step {self.state.step + 1:,} on: {'; '.join(self.changes)}")
        return "\n".join(text + [f"warning: {warning}" for warning in self._warnings()])

    @property
    def steps_left(self) -> int:
        return self.options.max_train_steps - self.state.step

    @property
    def images_in_all(self) -> int:
        """Those of the steps done, which another batch size may have had, and of the steps left."""
        return self.images_seen + self.steps_left * self.options.batch_size

    @cached_property
    def seconds_a_step(self) -> float:
        """What a step takes here, measured."""
        return seconds_of_step(self.state, self.data, self.loss, self.options, conditional=self.conditional)

    def _warnings(self) -> list[str]:
        options = self.options
        warnings = [f"{why}: resuming from step {self.state.step:,}" for why in self.damaged.values()]
        if self.state.ema is not None:
            horizon = 1 / (1 - self.state.ema.decay_at(options.max_train_steps))
            if horizon > options.max_train_steps:
                warnings.append(
                    f"the EMA averages over {horizon:,.0f} steps, more than the run has; lower --ema-decay or leave "
                    "--ema-warmup on"
                )
        if options.random_flip and any(name in Path(options.data).name.lower() for name in ("digit", "mnist")):
            warnings.append("--random-flip mirrors the digits too")
        if self.steps_left and (seconds := self.steps_left * self.seconds_a_step) > LONG:
            smaller = "a smaller network or --resolution, fewer --max-train-steps, or a faster device, would take less"
            warnings.append(f"{seconds / 3600:,.0f} hours: {smaller}")
        epochs, enough = self.images_in_all / len(self.data), MANY_EPOCHS * len(self.data)
        if epochs > MANY_EPOCHS:
            steps = self.state.step + max(enough - self.images_seen, 0) // options.batch_size
            fewer = f"--max-train-steps {steps or 1} would be {MANY_EPOCHS:,} epochs"
            warnings.append(f"{epochs:,.0f} epochs: the network may learn the images by heart; {fewer}")
        if options.resume and not self.state.step:
            warnings.append(f"no checkpoint in {self.run_folder} to resume: starting at step 0")
        return warnings

    def _load(self, checkpoint: Path) -> None:
        """Take over a checkpoint, after checking that it is of the same run."""
        model = checkpoint / self.component
        if self.options.resume != "latest" and not model.is_dir():
            raise DiffusersDPMError(
                f"{checkpoint} has no {model.name}: 'diffusers-dpm {self.command}' did not write it"
            )
        folder, saved = checkpoint / checkpoints.TRAINER_STATE, checkpoints.unseal(checkpoint)
        with checkpoints.reading(checkpoint):
            before = dict(saved["options"])
        self.changes = []
        for name, value in saved_options(self.options).items():
            earlier = before.get(name, getattr(type(self.options), name, None))  # an option that there was not yet
            if earlier != value and name in LOGGED_CHANGES:
                self.changes.append(f"{flag(name)} {value}, was {earlier}")
            if name not in MAY_CHANGE and earlier != value:
                raise DiffusersDPMError(
                    f"{flag(name)} was {earlier} and now is {value}: a resumed run keeps it ({checkpoint}; "
                    f"'diffusers-dpm {self.command} {self.files.options} --resume' keeps all options)"
                )
        for name, value in self.facts.items():
            if saved.get(name, value) != value:
                raise DiffusersDPMError(f"{checkpoint} was trained with the {name} {saved.get(name)}, now {value}")
        with checkpoints.reading(checkpoint):
            self.state.load(folder, model)
            for network in (self.state.model, self.model):
                check_finite(network, str(checkpoint))
        self.checkpointed_step = self.state.step
        self.images_seen = saved.get("images_seen", self.state.step * saved["options"]["batch_size"])
        if self.state.step > self.options.max_train_steps:
            raise DiffusersDPMError(f"{checkpoint} is past --max-train-steps {self.options.max_train_steps}")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the weights depend on beside the options, as JSON; the data by its content, wherever it lies."""
        count = min(NUM_COMPARED, len(self.data))
        some = self.data[[len(self.data) * i // count for i in range(count)]]["images"]
        about = [some, self.data.labels] if self.conditional else [some]
        return {
            "data": f"{len(self.data)} images of {describe(self.data.shape)}",
            "sha256 of some images and all labels": fingerprint(about)[:16],
            "network": short_hash({key: value for key, value in self.model.config.items() if key[0] != "_"}),
        }

    def _open_run_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # all have looked at the folder before it changes
        if self.accelerator.is_main_process:
            if checkpoints.find_checkpoints(self.options, self.run_folder) != self.found:
                raise DiffusersDPMError(f"another process has just trained in {self.run_folder}")
            if self.options.overwrite:
                self._delete()
            self.run_folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_incomplete(self.run_folder)
            for path in self.damaged:
                remove_folder(path)
            write_json(self.files.options, saved_options(self.options))
            drop_rows_after(self.files.logs / METRICS_LOG, self.state.step)
            for step, path in checkpoints.list_snapshots(self.run_folder).items():
                if step > self.state.step:  # of another course of the run
                    path.unlink()
        self.accelerator.wait_for_everyone()
        config = {name: str(value) for name, value in saved_options(self.options).items()}
        with writing(self.files.logs):
            where = {"wandb": {"dir": str(self.files.logs)}}  # its default is the working directory
            self.accelerator.init_trackers("train", config=config, init_kwargs=where)
            if self.changes:
                self.accelerator.log({"changed options": "; ".join(self.changes)}, step=self.state.step)

    @contextmanager
    def _log_open(self) -> Iterator[None]:
        """At the end the network is let go of, and the log is closed."""
        try:
            yield
        except BaseException:
            self.state.release_network()
            with suppress(OSError):  # what the disk refuses to the log, too, says nothing new
                self.accelerator.end_training()
            raise
        self.state.release_network()
        with writing(self.files.logs):
            self.accelerator.end_training()

    def _check_folder(self) -> None:
        """Raise DiffusersDPMError if the run folder is gone: it would be made again, with half of a run in it."""
        if self.accelerator.is_main_process and not self.files.options.is_file():
            raise DiffusersDPMError(f"{self.files.options} was deleted while the run was training: it has ended")

    def _train(self, progress: Progress) -> None:
        options, recent, processes = self.options, [], Processes(self.accelerator)
        steps = training_steps(self.state, self.data, self.loss, options, conditional=self.conditional)
        bar = tqdm(total=options.max_train_steps, initial=self.state.step, unit="step")
        with bar, deferred_interrupts() as signals:
            try:
                for record in steps:
                    bar.update()
                    progress.update(1)
                    self.images_seen += options.batch_size
                    recent.append(record)
                    if is_due(record.step, options.log_every) or record.step == options.max_train_steps:
                        bar.set_postfix_str(self._log(recent))
                        recent = []
                    self._after_step(record.step)
                    stop = len(signals)
                    if processes.count > 1:  # they ask each other, where the host waits for the device anyway
                        asked = is_due(record.step, options.log_every)
                        stop = int(processes.sum(torch.tensor([float(stop)]))) if asked else 0
                    if stop or is_due(record.step, options.checkpoint_every):
                        record.check_finite()
                        self._checkpoint()
                    if stop:
                        raise KeyboardInterrupt(f"step {record.step} is kept in {self.files.checkpoints}")
            except NonFiniteLossError as error:
                good = checkpoints.last_checkpoint(self.run_folder)
                hint = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
                raise NonFiniteLossError(f"{error}; {hint}") from error

    def _log(self, records: list[StepRecord]) -> str:
        """Log the means of the steps since the last call; returns the progress bar's text."""
        self._check_folder()
        last = records[-1]
        by_quartile = zip(*(record.loss_by_quartile for record in records), strict=True)
        values = {
            "loss": fmean(record.loss for record in records),
            "gradient_norm": fmean(record.gradient_norm for record in records),
            "learning_rate": last.learning_rate,
            "images_per_second": harmonic_mean([record.images_per_second for record in records]),
            "images_seen": self.images_seen,
            "batch_size": self.options.batch_size,
            "skipped_steps": fmean(record.skipped for record in records),
        }
        if last.ema_decay is not None:
            values["ema_decay"] = last.ema_decay
        for i, losses in enumerate(by_quartile, 1):
            numbers = [loss for loss in losses if not math.isnan(loss)]
            values[f"loss_by_timestep/quartile_{i}"] = fmean(numbers) if numbers else math.nan
        values |= self._held_out_figures(records[0].step, last.step)
        with writing(self.files.logs):
            self.accelerator.log({key: x for key, x in values.items() if not math.isnan(x)}, step=last.step)
        if self.accelerator.trackers and self.accelerator.is_main_process:
            append_row(self.files.logs / METRICS_LOG, {"step": last.step, **values})
        return f"loss {values['loss']:.4f}, {values['images_per_second']:,.0f} images/s"

    def _checkpoint(self) -> None:
        """Save the step's model and trainer state, then delete what is beyond the limit."""
        self._check_folder()
        step, processes = self.state.step, Processes(self.accelerator)
        if step != self.checkpointed_step:
            with processes.atomic_folder(checkpoints.checkpoint_folder(self.run_folder, step)) as folder:
                self.state.save(folder / checkpoints.TRAINER_STATE)
                model = self.state.whole(self.model)
                if processes.is_main:
                    self._save_model(model, folder)
                    about = {"options": saved_options(self.options), "images_seen": self.images_seen, **self.facts}
                    checkpoints.seal(folder, about)
            if processes.is_main:
                checkpoints.prune_checkpoints(self.run_folder, self.options.checkpoints_total_limit)
        self.checkpointed_step = step
        self.accelerator.wait_for_everyone()

    @property
    def model(self) -> Any:
        """The averaged network, or the raw one without EMA: a diffusers model, which `TrainingState.whole` saves."""
        return self.state.ema_model or self.state.model


def check_beside_pipeline(result: Path, run_folder: Path, options: Any) -> None:
    """Of a training whose `result` lies in a pipeline's folder.

    Raises:
        DiffusersDPMError: there is no such folder, or `result` is there without the `run_folder` that it came from.
    """
    if not result.parent.is_dir():
        raise DiffusersDPMError(f"{result.parent} is not a folder")
    if result.exists() and not run_folder.exists() and not options.overwrite:
        raise DiffusersDPMError(f"{result} exists already; --overwrite replaces it")


@contextmanager
def thread_errors_hidden() -> Iterator[None]:
    """Inside, TensorBoard's thread does not print what its disk refuses: its next call raises it here."""

    def show(error: threading.ExceptHookArgs) -> None:
        if not issubclass(error.exc_type, OSError):
            former(error)

    former, threading.excepthook = threading.excepthook, show
    try:
        yield
    finally:
        threading.excepthook = former


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a table of comma-separated values; the first one brings the header, which the others follow."""
    with writing(path):
        header = ""
        if path.is_file():  # a device may have no end of a line
            with path.open(encoding="utf-8") as file:
                header = file.readline().rstrip("\n")
        names = header.split(",") if header else [*row]
        lines = [[row.get(name, math.nan) for name in names]]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(",".join(map(str, line)) + "\n" for line in (lines if header else [names, *lines]))


def drop_rows_after(path: Path, step: int) -> None:
    """Delete the rows of later steps, which a run that is now resumed before them has left, and a torn one."""
    if path.is_file():
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        first = re.compile(r"(?:step|(\d+)),.*\n")
        write_text(path, "".join(row for row in rows if (new := first.match(row)) and int(new[1] or 0) <= step))


def trackers_of(options: Any) -> list[str]:
    """The trackers that the options name; raises DiffusersDPMError, where accelerate would warn, if one is missing."""
    named = [options.log_with] if isinstance(options.log_with, str) else [*options.log_with]  # one, in former runs
    if named == ["none"]:
        return []
    for name in named:
        if name == "none":
            raise DiffusersDPMError(f"--log-with {' '.join(named)}: none goes with no other")
        if name != "tensorboard" and find_spec(name) is None:
            raise DiffusersDPMError(f"--log-with {name} needs {name}: pip install {name.replace('_', '-')}")
        import_module(name)
    return named


def saved_options(options: Any) -> dict[str, Any]:
    """The options that describe the run."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in CALL_OPTIONS}


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
