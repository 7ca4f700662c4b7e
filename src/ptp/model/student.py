"""Models all of whose weights train: students from scratch (METHOD §6), and fine-tuned base models.

Their directory is an adapter directory with other weights:

student/               the model itself, as `AutoModelForCausalLM.from_pretrained` takes it
auxiliary.safetensors  the embedding of u, and what corrects and reads the windows' states
ptp_config.json        our settings; the base model they name is the teacher, or what was fine-tuned
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ptp.config import PTPConfig
from ptp.errors import ConfigError
from ptp.model.adapter import AUXILIARY_WEIGHTS, fill, gathered, write_settings, write_weights
from ptp.model.loading import is_quantized
from ptp.model.ptp_model import PTPModel

STUDENT = "student"
STUDENT_WEIGHTS = "model.safetensors"


class StudentModel(PTPModel):
    """A `PTPModel` whose base model is a student: all its weights train, on windows and on the context they read.

    There is no gate, so nothing of it is its teacher's: u must come from stored intervals, or in inverse
    autoregressive training from its own, and it cannot verify. teacher: hub id or path of the model that wrote the
    completions, or from whose weights the student starts; teacher_fingerprint: its `fingerprint`.
    """

    learns_to_read = True

    def __init__(self, student: PreTrainedModel, config: PTPConfig, teacher: str, teacher_fingerprint: str) -> None:
        assert config.trains_all, "a student's config says its size, or that all of the base model trains"
        super().__init__(student, config)
        self.teacher, self.base_fingerprint = teacher, teacher_fingerprint

    @property
    def base_name(self) -> str:
        """The teacher: what the student drafts for."""
        return self.teacher

    def prepare_weights(self) -> None:
        """All weights train. Raises `ConfigError` for quantised ones."""
        if is_quantized(self.base_model):
            raise ConfigError("weights of 8 or 4 bits cannot train; set model.trained to lora")
        self.base_model.requires_grad_(True)

    def save_pretrained(self, directory: str | Path, is_main_process: bool = True) -> None:
        """Write a student's directory; each file appears whole or not at all, the settings last."""
        directory = Path(directory)
        weights = gathered(dict(self.base_model.named_parameters()))
        added = gathered(self.added_weights())
        if not is_main_process:
            return
        self.base_model.config.save_pretrained(directory / STUDENT)
        write_weights(directory / STUDENT / STUDENT_WEIGHTS, weights)
        write_weights(directory / AUXILIARY_WEIGHTS, added)
        write_settings(directory, self.settings(directory))

    def load_adapter(self, adapter: Path) -> None:
        """Fill student and what else there is from a student's directory; every key and shape must match."""
        fill(adapter / STUDENT / STUDENT_WEIGHTS, dict(self.base_model.named_parameters()))
        fill(adapter / AUXILIARY_WEIGHTS, self.added_weights())
