import io
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ptp.errors import ConfigError
from ptp.training.optimizers import Chain, make_optimizer


def make_module() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 6), "norm": nn.LayerNorm(4)})


def optimizer_of(module: nn.Module, name: str) -> torch.optim.Optimizer:
    return make_optimizer(name, module.named_parameters(), 1e-2)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step along gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def written_and_read(state: dict[str, object]) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_takes_the_same_next_steps(name: str) -> None:
    module = make_module()
    optimizer = optimizer_of(module, name)
    for seed in range(3):
        step(module, optimizer, seed)
    restored = deepcopy(module)
    other = optimizer_of(restored, name)
    other.load_state_dict(written_and_read(optimizer.state_dict()))
    for seed in range(3, 6):
        step(module, optimizer, seed)
        step(restored, other, seed)
        assert same(module, restored)


@pytest.mark.parametrize("restore", [False, True])
def test_a_schedule_reaches_every_chained_optimizer(restore: bool) -> None:
    module = make_module()
    optimizer = optimizer_of(module, "muon")
    if restore:
        optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = deepcopy(module)
    step(module, optimizer, 0)
    assert same(module, before)


def test_muon_takes_matrices_and_leaves_the_rest_to_adamw() -> None:
    module = make_module()
    optimizer = optimizer_of(module, "muon")
    assert isinstance(optimizer, Chain)
    assert optimizer.optimizers[0].param_groups[0]["params"] == [module["linear"].weight]
    others: list[Tensor] = optimizer.optimizers[1].param_groups[0]["params"]
    assert {id(p) for p in others} == {id(p) for p in module.parameters()} - {id(module["linear"].weight)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_are_left_alone(name: str) -> None:
    module = make_module()
    module["linear"].weight.requires_grad_(False)
    module["linear"].bias.requires_grad_(False)
    held = {id(p) for group in optimizer_of(module, "adamw").param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


def test_an_unknown_optimizer_is_named_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"optimizer must be 'adamw' or 'muon'; got 'sgd'"):
        optimizer_of(make_module(), "sgd")
