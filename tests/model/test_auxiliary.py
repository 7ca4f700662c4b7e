import pytest
import torch

from ptp.errors import ConfigError
from ptp.model.auxiliary import EMBEDDINGS, make_auxiliary_embedding

LARGEST = 1 - 2**-24
HIDDEN = 24

every_kind = pytest.mark.parametrize("kind", EMBEDDINGS)
every_informed_kind = pytest.mark.parametrize("kind", [kind for kind in EMBEDDINGS if kind != "none"])


def make(kind: str, size: int = 32, scale: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    return make_auxiliary_embedding(kind, size, HIDDEN, scale)


@every_kind
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,)])
def test_a_number_becomes_a_vector(kind: str, shape: tuple[int, ...]) -> None:
    assert make(kind)(torch.rand(shape)).shape == (*shape, HIDDEN)


@every_kind
@pytest.mark.parametrize("size", [2, 3, 32, 64])
def test_every_number_in_the_unit_interval_has_finite_values(kind: str, size: int) -> None:
    u = torch.cat([torch.tensor([0.0, 2**-24, 0.5, LARGEST]), torch.rand(1000)])
    assert make(kind, size)(u).isfinite().all()


@every_informed_kind
def test_numbers_far_apart_have_different_vectors(kind: str) -> None:
    u = torch.linspace(0, LARGEST, 9)
    distance = torch.cdist(make(kind)(u), make(kind)(u)) + torch.eye(9)
    assert distance.min() > 1e-2


def test_none_withholds_the_number() -> None:
    vectors = make("none")(torch.rand(10))
    assert torch.equal(vectors, vectors[:1].expand(10, -1))


@pytest.mark.parametrize("kind", ["binary", "fourier", "sawtooth"])
def test_neighbouring_24_bit_numbers_have_different_vectors(kind: str) -> None:
    u = torch.tensor([0.3, 0.3 + 2**-24])
    low, high = make(kind)(u)
    assert not torch.equal(low, high)


def test_linear_interpolates_between_its_points_and_ends_on_the_last() -> None:
    embedding = make("linear", size=3)
    points = embedding.points.weight
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, LARGEST])
    expected = torch.stack([points[0], (points[0] + points[1]) / 2, points[1], (points[1] + points[2]) / 2, points[2]])
    torch.testing.assert_close(embedding(u), expected, rtol=1e-5, atol=1e-5)


def test_bins_round_down() -> None:
    embedding = make("bins", size=4)
    bins = embedding.bins.weight
    assert torch.equal(embedding(torch.tensor([0.0, 0.2499, 0.25, LARGEST])), bins[torch.tensor([0, 0, 1, 3])])


@every_kind
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_vectors_are_about_as_large_as_token_embeddings(kind: str, scale: float) -> None:
    rms = make(kind, scale=scale)(torch.rand(2000)).square().mean().sqrt()
    assert 0.8 * scale < rms < 1.25 * scale


@every_kind
def test_every_parameter_learns(kind: str) -> None:
    embedding = make(kind, size=8)
    embedding(torch.linspace(0, LARGEST, 64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in embedding.parameters())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"auxiliary must be one of binary, linear, .*, none; got 'bianry'"):
        make("bianry")


@pytest.mark.parametrize("kind", ["fourier", "sawtooth"])
def test_more_octaves_than_a_number_has_bits_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="at most 64; got 200"):
        make(kind, 200)
