"""Training a PTP model: `transformers.Trainer` with our objective, data and checkpoints (METHOD §3)."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import psutil
import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer import SCHEDULER_NAME

from ptp.attention import use_flex_attention
from ptp.config import TrainConfig
from ptp.data.documents import Documents
from ptp.data.packing import collate
from ptp.errors import ConfigError, DataError
from ptp.model.ptp_model import PTPModel
from ptp.processes import world_size
from ptp.sampling import SamplingRule
from ptp.training.checkpoints import remove_incomplete_checkpoints
from ptp.training.failures import is_out_of_memory, kept, not_finite, not_written, out_of_memory
from ptp.training.metrics import WindowMetrics
from ptp.training.objective import Objective, evaluate_windows, make_stream, measured_pass
from ptp.training.optimizers import make_optimizer
from ptp.training.saving import SaveWhenAsked, summed

logger = logging.getLogger(__name__)

RUNNING_METRICS = "metrics.json"
"""In a checkpoint: what was counted since the last row of the log."""


class PTPTrainer(Trainer):
    """Trains what of a `PTPModel` requires gradients; a checkpoint's weights are an adapter directory.

    validation: documents that every checkpoint is measured on; the best by `correct` is kept, and is what the model
    holds in the end. tokens_per_call: what windows promise, for the log.
    """

    model: PTPModel

    def __init__(
        self,
        model: PTPModel,
        config: TrainConfig,
        rule: SamplingRule,
        documents: Documents,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback] = (),
        validation: Documents | None = None,
        tokens_per_call: Callable[[WindowMetrics], float] | None = None,
    ) -> None:
        self.config = config
        self.validation, self.tokens_per_call = validation, tokens_per_call
        model.gradient_checkpointing = config.gradient_checkpointing
        window = model.ptp_config.window
        stream = make_stream(documents, config, window)
        num_processes = world_size()
        num_steps = config.num_steps(len(stream.sequences), num_processes)
        stream.length = num_steps * config.batch_size * config.gradient_accumulation_steps * num_processes
        super().__init__(
            model=model,
            # Where all weights learn, steps as small as theirs would be rounded away in bfloat16 alone.
            args=_arguments(
                config,
                num_steps,
                output_dir,
                bf16=model.ptp_config.trains_all and config.dtype == "bfloat16",
                evaluates=validation is not None,
                layers=list(model.base_model._no_split_modules or ()),
            ),
            train_dataset=stream,
            eval_dataset=validation,
            data_collator=collate,
            callbacks=list(callbacks),
        )
        if self.args.device.type == "cuda":
            use_flex_attention(model.base_model)
        if self.is_fsdp_enabled != (config.fsdp and num_processes > 1):
            raise ConfigError(
                f"train.fsdp is {str(config.fsdp).lower()}, but accelerate "
                f"{'has been configured to' if self.is_fsdp_enabled else 'does not'} share out weights between these "
                f"processes, on {self.args.device.type}; set train.fsdp accordingly (it needs GPUs), and leave FSDP "
                "out of accelerate's own configuration"
            )
        if config.fsdp and num_processes == 1:
            logger.warning(
                "train.fsdp shares out weights between processes, and this is one by itself, which holds them whole; "
                "torchrun starts several (docs/multi-gpu.md)"
            )
        # The live table and the log are the callbacks' business, not standard output's.
        self.remove_callback(PrinterCallback)
        self.saver = SaveWhenAsked(config.save_minutes)
        self.add_callback(self.saver)
        # The loss comes out divided by what `_get_num_items_in_batch` says.
        self.model_accepts_loss_kwargs = True
        weights = config.position_decay ** torch.arange(window, dtype=torch.float32)
        self.objective: Objective = Objective(rule, weights, config.kl_share(model.ptp_config), config.inverse)
        self.running = WindowMetrics.zeros(model.ptp_config)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor | float] = []
        self.clock, self.paused = time.monotonic(), 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. SIGTERM and Ctrl-C save a checkpoint, then raise `Terminated` and `KeyboardInterrupt`.

        Raises `ConfigError` where memory does not suffice or the loss is no number, `DataError` where a checkpoint or a
        tracker's file cannot be written, or a checkpoint holds what is not loaded.
        """
        if self.args.should_save:
            remove_incomplete_checkpoints(self.output_dir)
        try:
            with self.saver.listening():
                self.clock = time.monotonic()
                output = super().train(*args, **kwargs)
        except OSError as error:
            raise DataError(
                f"training stopped ({error}): {kept(self.output_dir)}; mend that and run the same command again"
            ) from error
        except UnpicklingError:
            # torch's message would have the file loaded all the same.
            raise DataError(
                f"the last checkpoint in {self.output_dir} is damaged, or holds more than numbers, which could run "
                "code and is not loaded; remove it and run the same command again"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise ConfigError(out_of_memory(self.config, self.output_dir)) from error
            raise
        self._load_best_model()
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            parameters = (model or self.model).named_parameters()
            self.optimizer = make_optimizer(self.config.optimizer, parameters, self.config.learning_rate)
        return self.optimizer

    # --- Loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert num_items_in_batch is not None, "the Trainer counts them, see _get_num_items_in_batch"
        total, metrics = measured_pass(model, inputs, self.objective)
        self.running = self.running + metrics
        self.losses.append(total.detach())
        # Engines take the mean of the processes' gradients; this is the share of one of them in a sum.
        return total * self.args.world_size / num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Weight of all targets of a step: of every batch accumulated and every process."""
        own = sum((self.objective.num_items(batch, self.model) for batch in batch_samples), torch.zeros(()))
        return self._summed(own.to(device)).clamp(min=1e-9)

    # --- Log ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was counted since the last row to rows of training."""
        if "learning_rate" in logs:
            logs |= self._rates(self._total(self.running))
            self.running = WindowMetrics.zeros(self.model.ptp_config)
        super().log(logs, start_time)

    def _rates(self, metrics: WindowMetrics, prefix: str = "") -> dict[str, float]:
        rates = metrics.rates()
        if self.objective.inverse and not prefix:
            # Nothing was judged: u picks the right token whatever the model predicts.
            rates = {"loss": rates["loss"]}
        elif self.tokens_per_call is not None:
            rates["tokens_per_call"] = self.tokens_per_call(metrics)
        if not prefix:
            now = time.monotonic()
            rates["tokens_per_second"] = float(metrics.tokens) / max(now - self.clock - self.paused, 1e-9)
            rates["memory_gb"] = memory_in_use(self.args.device) / 1e9
            self.clock, self.paused = now, 0.0
        return {f"{prefix}{name}": value for name, value in rates.items()}

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control = self.control
        # There is none when it is called once more, after the last step.
        if self.losses:
            self.norms.append(grad_norm)
            if control.should_log or control.should_evaluate or control.should_save:
                self._check_finite()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check_finite(self) -> None:
        """Raises `ConfigError` if the loss or the gradient of a step since the last look is no number.

        Before a checkpoint holds what came of it.
        """
        # An infinite part of a sum leaves none that is finite.
        losses = self._summed(torch.stack(self.losses)).view(len(self.norms), -1).sum(1).tolist()
        norms, self.losses, self.norms = self.norms, [], []
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), self.state.global_step - len(norms) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise ConfigError(not_finite(what, number, self.config, self.output_dir))

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def measure(self) -> WindowMetrics:
        """What held-out windows say of the model as it is; all processes share the work and get the whole."""
        assert self.validation is not None, "there are no documents to validate with"
        number, processes = self.args.process_index, self.args.world_size
        found = evaluate_windows(self.model, self.validation, self.config, self.objective.rule, number, processes)
        if isinstance(self.model, FSDPModule):
            # Without a backward pass the outermost weights stay whole; optimiser and files are about their shards.
            self.model.reshard()
        return self._total(found)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure and log; the names begin with `eval_`."""
        with self._off_the_clock():
            rates = self._rates(metrics := self.measure(), prefix="eval_")
            if not math.isfinite(rates["eval_loss"]):
                raise ConfigError(not_finite("validation loss", self.state.global_step, self.config, self.output_dir))
            metrics.tell(self.model)
            self.log(rates)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, rates)
        return rates

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._off_the_clock():
            self.running = self._total(self.running)
            directory = self.output_dir / f"checkpoint-{self.state.global_step}"
            try:
                with self._writing(directory):
                    super()._save_checkpoint(model, trial)
            except DataError:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            if not self.args.should_save:
                self.running = WindowMetrics.zeros(self.model.ptp_config)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an adapter directory; all processes call it. Raises `DataError` where the disk refuses."""
        directory = Path(output_dir or self.output_dir)
        with self._writing(directory):
            self.model.save_pretrained(directory, self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            running = json.dumps([part.tolist() for part in self.running.parts()])
            (Path(output_dir) / RUNNING_METRICS).write_text(running, encoding="utf-8")
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer's own would write the whole model beside the optimiser's state.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_adapter(Path(resume_from_checkpoint))
        if self.args.should_save:
            parts = json.loads((Path(resume_from_checkpoint) / RUNNING_METRICS).read_text(encoding="utf-8"))
            self.running = WindowMetrics(*(torch.tensor(part) for part in parts))

    def _load_best_model(self) -> None:
        # Found by its step: the path that the Trainer keeps does not follow a directory that moves.
        best = self.output_dir / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():
            self.model.load_adapter(best)

    @contextmanager
    def _writing(self, directory: Path) -> Iterator[None]:
        """What the disk refuses inside the block is one `DataError`; torch.save tells it by a `RuntimeError`."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise DataError(not_written(directory, error, self.output_dir)) from error

    @property
    def output_dir(self) -> Path:
        """The directory of the checkpoints."""
        return Path(cast(str, self.args.output_dir))

    # --- Processes, time and memory -----------------------------------------------------------------------------------

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        return summed(values.to(self.args.device))

    def _total(self, metrics: WindowMetrics) -> WindowMetrics:
        """The sums over processes, on the CPU: their rates are many numbers, and the device is waited for once."""
        return metrics.mapped(lambda sums: self._summed(sums).cpu())

    @contextmanager
    def _off_the_clock(self) -> Any:
        """Time that is not training's, and does not count in its tokens per second."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - started


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of a GPU since the process began, or what the process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a tracker that transformers does not know, or that is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to names the unknown tracker '{name}'; known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"train.report_to names the tracker '{name}', which is not installed; install it (pip install {name}) "
                "or leave it out"
            )


def _arguments(
    config: TrainConfig,
    num_steps: int,
    output_dir: Path,
    bf16: bool,
    evaluates: bool,
    layers: list[str],
) -> TrainingArguments:
    shares = config.fsdp and world_size() > 1
    # A sharded state is read back by unpickling, a full one with weights_only.
    sharing = {"version": 2, "transformer_layer_cls_to_wrap": layers, "state_dict_type": "FULL_STATE_DICT"}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=1.0,
        bf16=bf16,
        # Else processes on CPUs would not find each other.
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.save_every,
        metric_for_best_model="eval_correct" if evaluates else None,
        logging_steps=config.log_every,
        # A loss that is no number is an error here, not something to hide.
        logging_nan_inf_filter=False,
        seed=config.seed,
        # Item i of the stream is already drawn from (seed, i).
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        fsdp=cast(Any, shares),  # the annotation is that of the command line's argument
        fsdp_config=sharing if shares else None,
        report_to=list(config.report_to),
        disable_tqdm=True,
    )
    # One process trains on one device: the Trainer would split a batch over all that it sees.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
