from collections.abc import Callable
from itertools import product
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainings import loss_and_gradients, random_batch

from ptp.config import PTPConfig, StudentConfig
from ptp.errors import ConfigError
from ptp.model.ptp_model import PTPModel
from ptp.model.student import StudentModel
from ptp.scaling import build_student

WINDOW = 4


@pytest.fixture
def make_model(tiny_llama: Callable, tiny_gpt2: Callable, random_adapter: Callable) -> Callable[..., PTPModel]:
    def make(base: str = "llama", layers: int = 2, **settings: object) -> PTPModel:
        bases = {"llama": tiny_llama, "gpt2": tiny_gpt2, "eager llama": lambda **sizes: tiny_llama(attention="eager")}
        if base == "student":
            size = StudentConfig(hidden_size=32, num_layers=layers, num_heads=2)
            torch.manual_seed(0)
            student = build_student(size, tiny_llama().config, 64)
            config = PTPConfig(window=WINDOW, student=size, **settings)
            return random_adapter(StudentModel(student, config, "teacher", "0"), std=0.1).train()
        torch.manual_seed(0)
        model = PTPModel(bases[base](layers=layers), PTPConfig(window=WINDOW, lora_rank=4, **settings))
        return random_adapter(model, std=0.1).train()

    return make


class Memory(TorchDispatchMode):
    """Bytes of what is computed inside and still there, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = function(*args, **(kwargs or {}))
        self.storages.update(leaf.untyped_storage() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        self.peak = max(self.peak, self.used)
        return output

    @property
    def used(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)


@pytest.mark.parametrize(
    ("base", "variant", "distillation"),
    [
        *product(["llama", "eager llama", "gpt2", "student"], ["one_hot", "categorical"], [0.0]),
        ("llama", "categorical", 1.0),
    ],
)
def test_loss_and_gradients_are_the_same_to_the_bit(
    make_model: Callable, base: str, variant: str, distillation: float
) -> None:
    model, batch = make_model(base, variant=variant), random_batch()
    expected = loss_and_gradients(model, batch, distillation)
    calls = counted_calls(model)
    model.gradient_checkpointing = True
    found = loss_and_gradients(model, batch, distillation)
    # Once for the context, once for the windows, and again whatever has a gradient.
    assert len(calls) == (4 if base == "student" else 3) * model.num_layers
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def counted_calls(model: PTPModel) -> list[nn.Module]:
    """A list that grows by one with each attention computed."""
    calls: list[nn.Module] = []
    for name, module in model.named_modules():
        if name.endswith(("self_attn", ".attn")):
            module.register_forward_pre_hook(lambda called, _: calls.append(called))
    return calls


@pytest.mark.parametrize("base", ["llama", "gpt2", "student"])
def test_less_than_half_of_the_memory_is_held_for_the_backward_pass(make_model: Callable, base: str) -> None:
    model, batch = make_model(base, layers=6), random_batch(num_windows=15)
    used = []
    for model.gradient_checkpointing in (False, True):
        with Memory() as memory:
            output = model(**batch)
        used.append(memory.used)
        del output
    assert 0 < used[1] < 0.5 * used[0]


def test_a_step_s_peak_falls_too(make_model: Callable) -> None:
    model, batch = make_model("student", layers=6), random_batch(num_windows=15)
    peaks = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        with Memory() as memory:
            model(**batch).windows.square().sum().backward()
        peaks.append(memory.peak)
    assert 0 < peaks[1] < 0.6 * peaks[0]


def test_layers_are_as_they_were_after_the_pass(make_model: Callable) -> None:
    model = make_model()
    model.gradient_checkpointing = True
    model(**random_batch())
    assert not [layer for layer in model.modules() if "forward" in vars(layer)]
    assert model.gate.start is None


def test_without_gradient_nothing_is_checkpointed(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.gradient_checkpointing = True
    monkeypatch.setattr("ptp.model.checkpointing.checkpoint", None)
    with torch.no_grad():
        model(**random_batch())
    with pytest.raises(TypeError):
        model(**random_batch())


def test_a_model_whose_layers_are_not_known_is_one_clear_line(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.gradient_checkpointing = True
    monkeypatch.setattr("ptp.model.checkpointing.GradientCheckpointingLayer", type("Other", (), {}))
    with pytest.raises(ConfigError, match=r"no gradient checkpointing for LlamaForCausalLM; set train\.gradient_"):
        model(**random_batch())
